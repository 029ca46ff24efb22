"""Bad input: a clear 4xx that names the parameter, over HTTP and gRPC alike; the next request is answered."""

import gzip
import json
import math
import os
import re
import shutil
import socket
import struct
import urllib.error
import urllib.request

import grpc
import pytest
from conftest import BINARY, ROOT, Process, run

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


def around(content=b'"Hello"', more=b""):
    return b'{"messages": [{"role": "user", "content": ' + content + b'}], "max_tokens": 2, "temperature": 0' + more + b"}"


@pytest.mark.parametrize("body,words", [
    (around(b'"\\ud800"'), ["not valid JSON", "escape"]),
    (around(more=b', "\\ud800": 1'), ["not valid JSON", "escape"]),
    (around(more=b', "top_p": 1e999'), ["not valid JSON", "out of range"]),
    (around(more=b', "nobody_knows": -1e999'), ["not valid JSON", "out of range"]),
    (around(more=b', "nobody_knows": ' + b"[" * 200 + b"]" * 200), ["not valid JSON", "recursion"]),
    (around(b'{"a":' * 200 + b"1" + b"}" * 200), ["not valid JSON", "recursion"]),
    (around(b"[" * 60 + b"]" * 60), ["messages[0].content[0]"]),
    (around(b'"a\x00b"'), ["not valid JSON", "control character"]),
    (around(b'"a\nb"'), ["not valid JSON", "control character"]),
    (around() + b"\x00", ["not valid JSON", "trailing"]),
    (around() + around(), ["not valid JSON", "trailing"]),
    (b"\xef\xbb\xbf" + around(), ["not valid JSON"]),
    (around(b'"\xed\xa0\x80"'), ["not valid JSON"]),
    (around(more=b', "top_p": 0x1'), ["not valid JSON"]),
    (around(more=b', "top_p": Infinity'), ["not valid JSON"]),
    (around(more=b","), ["not valid JSON"]),
    (around(more=b', "messages": [' + b'{"role": "user", "content": "a"},' * 4096 + b'{"role": "user", "content": "a"}]'),
     ["messages must have 1 to 4096 entries, got 4097"]),
], ids=["lone-surrogate", "lone-surrogate-key", "1e999", "1e999-ignored", "deep-ignored", "deep-content", "deep-parts", "nul", "line-feed",
        "nul-after", "two", "bom", "surrogate-bytes", "hex", "infinity", "comma", "messages"])
def test_odd_json_is_refused_with_a_reason(server, body, words):
    got, reply = post(server, "chat/completions", body)
    assert got == 400, reply
    for word in words:
        assert word in reply["error"]["message"], reply
    answers(server)


def test_odd_json_that_is_json_means_one_thing(server):
    """Of a key that comes twice the last one counts, in every place; NUL and pairs of surrogates are characters."""
    said = lambda body: post(server, "chat/completions", body)[1]["choices"][0]["message"]["content"]
    assert said(around(b'"Bye", "content": "Hello"')) == said(around())
    assert said(around(more=b', "messages": [{"role": "user", "content": "Hello"}], "stop": 7, "stop": null')) == said(around())
    assert post(server, "chat/completions", around(more=b', "max_tokens": 3'))[1]["usage"]["completion_tokens"] == 3
    got, reply = post(server, "chat/completions", around(more=b', "messages": []'))
    assert got == 400 and reply["error"]["param"] == "messages"
    assert said(around(b'"\\ud83d\\ude00"')) == said(around("\"\U0001f600\"".encode()))
    num_tokens = lambda text: post(server, "chat/completions", around(text))[1]["usage"]["prompt_tokens"]
    assert num_tokens(b'"a\\u0000b"') > num_tokens(b'"ab"')


def test_unknown_routes_and_methods_speak_openai(server):
    for path, data, status, words in [
        ("/v1/nothing", None, 404, "/openapi.json"),
        ("/v1/embeddings", b"{}", 404, "no embeddings"),
        ("/chat/completions", b"{}", 404, "below /v1"),
        ("/v1/responses/resp_1", None, 404, "responses are not kept"),
        ("/v1/chat/completions/chatcmpl-1", None, 404, "completions are not kept"),
        ("/v1/chat/completions", None, 405, "another method"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}{path}", data=data, timeout=10)
        assert caught.value.code == status
        error = json.load(caught.value)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert words in error["message"] and error["code"] == {404: "not_found", 405: "method_not_allowed"}[status]
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp"):
        got, reply = post(server, *chat(), content_type=content_type)
        assert got == 415 and reply["error"]["code"] == "unsupported_media_type", reply
    assert post(server, *chat(), content_type="application/problem+json; charset=utf-8")[0] == 200


class Wire:
    """What goes over a connection, byte for byte."""

    def __init__(self, server):
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)

    def say(self, *pieces):
        try:
            for piece in pieces:
                self.socket.sendall(piece)
        except OSError:
            # It has its answer already, and is closed.
            pass
        return self

    def answers(self):
        """Status and body of each answer, in order, up to the end of the connection."""
        said, found = b"", []
        try:
            while more := self.socket.recv(65536):
                said += more
        except ConnectionResetError:
            pass
        self.socket.close()
        while said:
            head, _, said = said.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            found.append((int(head.split()[1]), said[:length]))
            said = said[length:]
        return found


MODELS = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
MIB = 1 << 20


@pytest.mark.parametrize("request_,status", [
    ([MODELS, b"x-large: " + b"a" * MIB + b"\r\n\r\n"], 431),
    ([MODELS, b"authorization: Bearer " + b"a" * MIB + b"\r\n\r\n"], 431),
    ([MODELS, b"".join(b"x-%d: a\r\n" % i for i in range(10_000)), b"\r\n"], 431),
    ([b"GET /" + b"a" * MIB + b" HTTP/1.1\r\nhost: x\r\n\r\n"], 431),
    ([b"GE(T" + MODELS[3:] + b"\r\n"], 400),
    ([b"\x16\x03\x01" + MODELS[3:] + b"\r\n"], 400),
    ([MODELS, b"x-nul: a\x00b\r\n\r\n"], 400),
    ([MODELS, b"x-bare: a\rb\r\n\r\n"], 400),
    ([MODELS, b"no colon\r\n\r\n"], 400),
    ([POST, b"content-length: 5\r\ncontent-length: 6\r\n\r\n", around()], 400),
    ([POST, b"content-length: -5\r\n\r\n", around()], 400),
    ([POST, b"content-length: 1e2\r\n\r\n", around()], 400),
    ([CHUNKED, b"no number\r\n", around(), b"\r\n0\r\n\r\n"], 400),
    ([CHUNKED, b"5\r\n", around(), b"\r\n0\r\n\r\n"], 400),
    ([CHUNKED, b"-1\r\n", around(), b"\r\n0\r\n\r\n"], 400),
    ([CHUNKED, b"fffffffffffffffff\r\n", around(), b"\r\n0\r\n\r\n"], 400),
], ids=["large-header", "large-token", "many-headers", "long-path", "method", "tls", "nul", "bare-cr", "no-colon", "two-lengths",
        "negative-length", "odd-length", "chunk-no-number", "chunk-short", "chunk-negative", "chunk-huge"])
def test_odd_http_is_refused_once_and_closed(server, request_, status):
    """What follows a request whose end is not known would be somebody else's request, so nothing does."""
    ((got, body),) = Wire(server).say(*request_, MODELS + b"\r\n").answers()
    assert got == status
    if body:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    answers(server)


def test_requests_in_one_go_are_answered_in_order(server):
    body = around()
    # What could be read in two ways is read in one, and nothing after it.
    both = POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    whole = POST + b"content-length: %d\r\n\r\n%b" % (len(body), body)
    missing = b"GET /v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n"
    first, second, third, fourth = Wire(server).say(whole + missing + MODELS + b"\r\n" + both + MODELS + b"\r\n").answers()
    assert [first[0], second[0], third[0], fourth[0]] == [200, 404, 200, 200]
    chats = [json.loads(answer[1])["choices"] for answer in (first, fourth)]
    assert chats[0] == chats[1] and json.loads(third[1])["object"] == "list"


def test_a_whole_token_is_read_up_to_the_limit_of_heads(server):
    with_token = MODELS + b"connection: close\r\nauthorization: Bearer " + b"a" * 60_000 + b"\r\n\r\n"
    ((status, _),) = Wire(server).say(with_token).answers()
    assert status == 200


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


# What stands in a file, what the environment says, and words of the refusal: the key, the rule, what came.
SETTINGS = [
    (b"[router]\nhold_wait = \"2d\"\n", {}, ["router.hold_wait must be between 0s and 1day, got 2days"]),
    (b"[router]\nbody_bytes_max = 1\n", {}, ["router.body_bytes_max must be between 1024 and", "got 1"]),
    (b"[router]\nid = \"\"\n", {}, ["router.id must be 1 to 128 bytes"]),
    (b"[auth.jwt]\nissuer = \"\"\naudience = \"x\"\njwks_file = \"x\"\n", {}, ["auth.jwt.issuer must be of 1 to 1024 bytes, got 0"]),
    (b"[tenants.\"\"]\nweight = 1\n", {}, ["tenants must be sections with names of 1 to 64", 'got ""']),
    (b"[router\n", {}, ["configuration file", "settings.toml", "line 1", "expected `]`"]),
    (b"[router]\nid = \"\xff\"\n", {}, ["configuration file", "settings.toml", "UTF-8"]),
    (b"#" * (1 << 20) + b"\n", {}, ["configuration file", "settings.toml", "1048577 bytes, expected at most 1048576"]),
    (b"", {"ROUTER__HOLD_WAIT": "2d"}, ["router.hold_wait must be between 0s and 1day, got 2days"]),
    (b"", {"ROUTER__ID": ""}, ["router.id must be 1 to 128 bytes"]),
    (b"", {"ETCD__CLUSTER": ""}, ['etcd.cluster ""', "1 to 63 letters"]),
    (b"", {"LISTEN__HTTP": ""}, ["listen.http must be host:port", 'got ""']),
    (b"", {"LISTEN__HTTP": "localhost:99999"}, ["listen.http must be host:port", 'got "localhost:99999"']),
    (b"", {"TELEMETRY__LOG": "[[["}, ["telemetry.log", '"[[["']),
]


@pytest.mark.parametrize("text,env,words", SETTINGS, ids=lambda value: str(value)[:40])
def test_a_bad_setting_is_named_before_anything_starts(tmp_path, text, env, words):
    settings = tmp_path / "settings.toml"
    settings.write_bytes(text)
    variables = {f"TRAMONTANE_{name}": value for name, value in env.items()}
    refused = run("router", "--config", settings, check=False, env={**os.environ, **variables})
    assert refused.returncode == 2, refused.stderr
    for word in words:
        assert word in refused.stderr, refused.stderr
    assert "panicked" not in refused.stderr and not refused.stdout


def test_a_bad_flag_is_named_before_anything_starts(tmp_path):
    for flags, words in [
        (["router", "--config", tmp_path], ["configuration file", str(tmp_path), "directory"]),
        (["router", "--config", tmp_path / "missing.toml"], ["missing.toml", "No such file"]),
        (["router", "--config", ""], ["--config"]),
        (["router", "--etcd", ""], ["etcd.endpoints must be", 'got ""']),
        (["router", "--cluster", ""], ["etcd.cluster", "1 to 63 letters"]),
        (["router", "--http-port", "65536"], ["--http-port", "65536"]),
        (["serve", "--model", ""], ["--model"]),
        (["serve", "--host", ""], ["--host"]),
        (["serve", "--host", "example.org"], ["--host", "example.org"]),
        (["serve", "--workers", "many"], ["--workers", "many"]),
        (["worker", "--id", "a b"], ["worker.id", "a b"]),
        (["worker", "--id", "w", "--expert-memory", "5GiB"], ["--expert-memory", "5GiB"]),
    ]:
        refused = run(*flags, check=False)
        assert refused.returncode == 2, (flags, refused.stderr)
        for word in words:
            assert word in refused.stderr, (flags, refused.stderr)


def test_a_port_in_use_is_named(server):
    port = server.url.rsplit(":", 1)[1]
    refused = run("serve", "--http-port", port, "--grpc-port", "0", "--admin-port", "0", check=False)
    assert refused.returncode == 1, refused.stderr
    assert f"127.0.0.1:{port}" in refused.stderr and "in use" in refused.stderr
    answers(server)


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
    run("model", "verify", checkpoint, "--write-manifest")
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    done = run("model", "verify", checkpoint, check=False)
    assert done.returncode == 1 and "model.safetensors" in done.stderr, done.stderr
    assert "model.safetensors" in refused_to_load(checkpoint)


@pytest.mark.parametrize("text,env,flags,key,got", [
    ('[router]\nhold_wait = "5 parsecs"\n', {}, ["router"], "router.hold_wait", "5 parsecs"),
    ("[router]\nhold_wait = 5\n", {}, ["router"], "router.hold_wait", "5"),
    ("[router]\nqueue_max = -1\n", {}, ["router"], "router.queue_max", "-1"),
    ("[router]\nreplicas = 0\n", {}, ["router"], "router.replicas", "0"),
    ('[router]\npolicy = ""\n', {}, ["router"], "router.policy", "``"),
    ('[worker]\nexpert_memory = "5 GiB"\n', {}, ["worker", "--id", "w"], "worker.expert_memory", "5 GiB"),
    ("", {"TRAMONTANE_ROUTER__HOLD_WAIT": "5x"}, ["router"], "router.hold_wait", "5x"),
    ("", {"TRAMONTANE_ROUTER__HOLD_WAIT": ""}, ["router"], "router.hold_wait", '""'),
    ("", {"TRAMONTANE_ROUTER__QUEUE_MAX": ""}, ["router"], "router.queue_max", '""'),
    ("", {"TRAMONTANE_ETCD__ENDPOINTS": ""}, ["router"], "etcd.endpoints", '""'),
    ("", {"TRAMONTANE_TELEMETRY__LOG_FORMAT": ""}, ["router"], "telemetry.log_format", "``"),
    ("", {"TRAMONTANE_ROUTER__NOPE": "1"}, ["router"], "router.nope", "unknown"),
    ("", {}, ["worker", "--id", "w", "--weights", ""], "worker.weights", "``"),
])
def test_a_setting_of_the_wrong_type_or_unit_is_named(tmp_path, text, env, flags, key, got):
    """docs/configuration.md: "a message that names the key, the rule and the value"."""
    settings = tmp_path / "settings.toml"
    settings.write_text(text)
    refused = run(*flags, "--config", settings, check=False, env={**os.environ, **env})
    assert refused.returncode == 2 and got in refused.stderr, refused.stderr
    assert key in refused.stderr, refused.stderr


@pytest.mark.parametrize("env", [{"TRAMONTANE_ETCD__CLUSTER": ""}, {"TRAMONTANE_LISTEN__HTTP": ""}, {"TRAMONTANE_TELEMETRY__LOG": "[[["}])
def test_a_check_of_settings_refuses_what_a_start_refuses(env):
    env = {**os.environ, **env}
    assert run("router", check=False, env=env).returncode == 2
    assert run("config", "check", check=False, env=env).returncode == 2


def test_a_missing_keys_file_is_a_wrong_setting(tmp_path):
    """As a missing file of `[tls]` is."""
    settings = tmp_path / "settings.toml"
    settings.write_text(f'[auth]\nkeys_file = "{tmp_path}/missing"\n')
    refused = run("router", "--config", settings, check=False)
    assert "auth.keys_file" in refused.stderr and refused.returncode == 2, refused.stderr


def test_an_encoding_that_is_not_read_is_refused_by_name(server):
    body = json.dumps({"prompt": "Hello", "max_tokens": 2}).encode()
    for sent in (gzip.compress(body), body):
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", sent, headers), timeout=30)
        error = json.load(refused.value)["error"]
        assert refused.value.code == 415 and "encoding" in error["message"], error
