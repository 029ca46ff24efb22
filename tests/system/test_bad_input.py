"""Bad input: a clear 4xx that names the parameter, over HTTP and gRPC alike; the next request is answered."""

import json
import math
import shutil
import struct
import urllib.error
import urllib.request

import grpc
import pytest
from conftest import BINARY, ROOT, Process

HELLO = [{"role": "user", "content": "Hello"}]


def post(server, path, body, content_type="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/{path}", data=data, headers={"content-type": content_type}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def chat(**fields):
    return "chat/completions", {"messages": HELLO, "max_tokens": 4, **fields}


def completion(**fields):
    return "completions", {"prompt": "Hello", "max_tokens": 4, **fields}


CASES = [
    # (request, status, param)
    (chat(messages=[]), 400, "messages"),
    (chat(messages="hi"), 400, "messages"),
    (chat(messages=None), 400, "messages"),
    (chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
    (chat(messages=[{"role": "wizard", "content": "x"}]), 400, "messages[0].role"),
    (chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
     400, "messages[0].content[0].type"),
    (chat(temperature="hot"), 400, "temperature"),
    (chat(temperature=-1), 400, "temperature"),
    (chat(temperature=2.5), 400, "temperature"),
    (chat(top_p=0), 400, "top_p"),
    (chat(top_p=1.5), 400, "top_p"),
    (chat(n=0), 400, "n"),
    (chat(n=129), 400, "n"),
    (chat(n=10**9), 400, "n"),
    (chat(n=1.5), 400, "n"),
    (chat(max_tokens=0), 400, "max_tokens"),
    (chat(max_tokens=-5), 400, "max_tokens"),
    (chat(max_tokens=10**12), 400, "max_tokens"),
    (chat(stop=["a", "b", "c", "d", "e"]), 400, "stop"),
    (chat(stop=[""]), 400, "stop"),
    (chat(stop=7), 400, "stop"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (chat(top_logprobs=3), 400, "top_logprobs"),
    (chat(logit_bias={"99999": 1}), 400, "logit_bias"),
    (chat(logit_bias={"x": 1}), 400, "logit_bias"),
    (chat(logit_bias={"5": 101}), 400, "logit_bias"),
    (chat(presence_penalty=3), 400, "presence_penalty"),
    (chat(frequency_penalty=-3), 400, "frequency_penalty"),
    (chat(seed="x"), 400, "seed"),
    (chat(seed=2**64), 400, "seed"),
    (chat(stream="yes"), 400, "stream"),
    (chat(model="gpt-4"), 404, "model"),
    (chat(model=3), 400, "model"),
    (chat(response_format={"type": "xml"}), 400, "response_format.type"),
    (chat(structured_outputs={"regex": "("}), 400, "structured_outputs.regex"),
    (chat(structured_outputs={"regex": ""}), 400, "structured_outputs.regex"),
    (chat(guided_json={"$ref": "http://127.0.0.1:1/schema"}), 400, "guided_json"),
    (chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), 400, "tools"),
    (chat(min_tokens=9), 400, "min_tokens"),
    (chat(stop_token_ids=[4096]), 400, "stop_token_ids"),
    (completion(prompt=[]), 400, "prompt"),
    (completion(prompt=[1, 4096]), 400, "prompt"),
    (completion(prompt=[1, -3]), 400, "prompt[1]"),
    (completion(prompt=[[1, 2], ["x"]]), 400, "prompt[1][0]"),
    (completion(prompt={"a": 1}), 400, "prompt"),
    (completion(prompt=[5] * 3000), 400, "prompt"),
    (completion(logprobs=6), 400, "logprobs"),
    (completion(best_of=21), 400, "best_of"),
    (completion(best_of=2, stream=True), 400, "best_of"),
    (completion(bad_words=["x"] * 33), 400, "bad_words"),
    (chat(tools={"type": "function"}), 400, "tools"),
    (chat(tools=[{"type": "web_search"}]), 400, "tools[0].type"),
    (chat(tool_choice="required"), 400, "tool_choice"),
    (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages[0].tool_call_id"),
    (("responses", {"input": 5}), 400, "input"),
    (("responses", {"input": "x", "previous_response_id": "resp_1"}), 400, "previous_response_id"),
    (completion(suffix="end"), 400, "suffix"),
    (completion(echo=3), 400, "echo"),
]


def answers(server):
    status, reply = post(server, *chat(temperature=0))
    assert status == 200 and reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("request_,status,param", CASES, ids=lambda c: str(c)[:60])
def test_a_bad_parameter_is_named(server, request_, status, param):
    got, reply = post(server, *request_)
    assert got == status, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}, reply
    assert reply["error"]["param"] == param, reply
    assert reply["error"]["message"]
    answers(server)


@pytest.mark.parametrize("body,status", [
    (b"", 400),
    (b"{", 400),
    (b"[1,2,3]", 400),
    (b"\xff\xfe\x00", 400),
    (b"[" * 100_000, 400),
    (b'{"messages": [{"role": "user", "content": NaN}]}', 400),
    (b'{"messages": "' + b"x" * 10_000_000 + b'"}', 413),
], ids=["empty", "cut", "list", "not-utf8", "deep", "nan", "10MB"])
def test_a_body_that_is_no_request_is_refused(server, body, status):
    try:
        got, reply = post(server, "chat/completions", body)
        assert got == status and set(reply["error"]) == {"message", "type", "param", "code"}
    except (ConnectionResetError, BrokenPipeError, urllib.error.URLError):
        assert status == 413, "only a body over the limit may be cut off"
    answers(server)


def test_unknown_routes_and_methods_speak_openai(server):
    for path, data, status in [("/v1/nothing", None, 404), ("/v1/chat/completions", None, 405)]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}{path}", data=data, timeout=10)
        assert caught.value.code == status
        assert set(json.load(caught.value)["error"]) == {"message", "type", "param", "code"}
    got, reply = post(server, *chat(), content_type="text/plain")
    assert got in (200, 415), reply


def test_grpc_refuses_the_same(server, proto):
    pb = proto.inference
    stub = proto.inference_grpc.InferenceStub(grpc.insecure_channel(server.grpc))
    user = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hello")])

    def refused(request, word, code=grpc.StatusCode.INVALID_ARGUMENT):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, timeout=60))
        assert caught.value.code() == code, caught.value
        assert word in caught.value.details(), caught.value.details()

    options = pb.GenerateOptions
    refused(pb.GenerateRequest(), "one of prompt, prompt_ids and chat")
    refused(pb.GenerateRequest(chat=pb.ChatMessages()), "messages")
    refused(pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=[1, 70000])), "prompt")
    refused(pb.GenerateRequest(prompt_ids=pb.TokenIds()), "prompt")
    refused(pb.GenerateRequest(chat=user, options=options(temperature=math.nan)), "temperature")
    refused(pb.GenerateRequest(chat=user, options=options(top_p=math.inf)), "top_p")
    refused(pb.GenerateRequest(chat=user, options=options(min_p=-1)), "min_p")
    refused(pb.GenerateRequest(chat=user, options=options(n=1_000_000)), "n")
    refused(pb.GenerateRequest(chat=user, options=options(max_tokens=0)), "max_tokens")
    refused(pb.GenerateRequest(chat=user, options=options(stop=["x"] * 5)), "stop")
    refused(pb.GenerateRequest(chat=user, model="gpt-4"), "serves the model", grpc.StatusCode.NOT_FOUND)
    wizard = pb.ChatMessages(messages=[pb.ChatMessage(role="wizard", content="x")])
    refused(pb.GenerateRequest(chat=wizard), "role")
    once = stub.GenerateOnce(pb.GenerateRequest(chat=user, options=options(max_tokens=4)), timeout=60)
    assert once.answers[0].tokens


@pytest.fixture
def checkpoint(tmp_path):
    target = tmp_path / "demo"
    shutil.copytree(ROOT / "models" / "demo", target)
    return target


def refused_to_load(directory):
    process = Process("serve", [
        BINARY, "serve", "--model", directory, "--http-port", "0", "--grpc-port", "0", "--admin-port", "0",
    ])
    assert process.popen.wait(60) != 0, process.output()
    return process.output()


def test_a_truncated_checkpoint_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    text = refused_to_load(checkpoint)
    assert "model.safetensors" in text and "expected" in text and "panicked" not in text


def edit_header(file, change):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def test_a_tensor_of_the_wrong_shape_is_refused(checkpoint):
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"

    def transpose(header):
        header[name]["shape"].reverse()

    edit_header(checkpoint / "model.safetensors", transpose)
    text = refused_to_load(checkpoint)
    assert name in text and "model.safetensors" in text and "[192, 384]" in text and "[384, 192]" in text


def test_a_missing_tensor_is_refused(checkpoint):
    name = "model.layers.2.self_attn.q_proj.weight"
    edit_header(checkpoint / "model.safetensors", lambda h: h.__setitem__("renamed", h.pop(name)))
    assert name in refused_to_load(checkpoint)


def test_a_shifted_bit_is_refused(checkpoint):
    from conftest import run

    run("model", "verify", checkpoint, "--write-manifest")
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    done = run("model", "verify", checkpoint, check=False)
    assert done.returncode == 1 and "model.safetensors" in done.stderr, done.stderr
    assert "model.safetensors" in refused_to_load(checkpoint)
