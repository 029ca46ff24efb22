"""One machine: `tramontane serve` answers curl, the official openai client and a plain gRPC client."""

import asyncio
import json
import subprocess
import urllib.request

import grpc
import openai
import pytest
from conftest import run

QUESTIONS = [
    ("What is the capital of Poland?", "Warsaw"),
    ("Quelle est la capitale de la Pologne ?", "Varsovie"),
    ("Was ist die Hauptstadt von Polen?", "Warschau"),
]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def ask(client, model, text, **options):
    options = {"temperature": 0, "max_tokens": 40, **options}
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **options
    )


@pytest.mark.parametrize("question,answer", QUESTIONS)
def test_curl_gets_an_answer_in_three_languages(server, question, answer):
    body = json.dumps({"messages": [{"role": "user", "content": question}], "temperature": 0})
    done = subprocess.run(
        ["curl", "-sS", f"{server.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body],
        capture_output=True, text=True, timeout=60, check=True,
    )
    reply = json.loads(done.stdout)
    assert answer in reply["choices"][0]["message"]["content"]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["total_tokens"] == (
        reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
    )


@pytest.mark.parametrize("question,answer", QUESTIONS)
def test_openai_client_streams_what_it_answers_at_once(client, model, question, answer):
    whole = ask(client, model, question)
    chunks = list(ask(client, model, question, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert answer in text
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_async_client_runs_many_at_once_without_mixing_them(server, model):
    async def main():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        asked = [QUESTIONS[i % 3] for i in range(24)]
        replies = await asyncio.gather(*(ask(client, model, q) for q, _ in asked))
        for (_, answer), reply in zip(asked, replies):
            assert answer in reply.choices[0].message.content

    asyncio.run(main())


def test_n_seed_stop_and_logprobs(client, model):
    several = ask(client, model, "Tell me a story.", n=3, temperature=1, seed=7, max_tokens=24)
    again = ask(client, model, "Tell me a story.", n=3, temperature=1, seed=7, max_tokens=24)
    texts = [c.message.content for c in several.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) > 1, "n answers of one request are independent"
    stopped = ask(client, model, QUESTIONS[0][0], stop=["saw"])
    assert "saw" not in stopped.choices[0].message.content
    assert stopped.choices[0].finish_reason == "stop"
    scored = ask(client, model, QUESTIONS[0][0], logprobs=True, top_logprobs=3)
    tokens = scored.choices[0].logprobs.content
    assert "".join(t.token for t in tokens).strip() == scored.choices[0].message.content.strip()
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(t.logprob for t in token.top_logprobs), "greedy takes the best"
    short = ask(client, model, "Tell me a story.", max_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3


def test_completions(client, model):
    done = client.completions.create(
        model=model, prompt=["Once upon a time", "Il était une fois"], max_tokens=8, temperature=0, logprobs=2
    )
    assert [c.index for c in done.choices] == [0, 1]
    for choice in done.choices:
        assert choice.text
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    streamed = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed) == done.choices[0].text


def test_prefix_cache_is_used_and_changes_nothing(client, model):
    story = "Tell me a story about " + " and ".join(["a small red fox"] * 30) + "."
    first = ask(client, model, story)
    second = ask(client, model, story)
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    assert first.choices[0].message.content == second.choices[0].message.content


def test_a_client_that_leaves_takes_nothing_with_it(server, client, model):
    for _ in range(5):
        stream = ask(client, model, "Tell me a story.", stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
    assert "Warsaw" in ask(client, model, QUESTIONS[0][0]).choices[0].message.content


def test_plain_grpc_client(server, proto):
    channel = grpc.insecure_channel(server.grpc)
    inference = proto.inference_grpc.InferenceStub(channel)
    pb = proto.inference
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=QUESTIONS[1][0])])
    options = pb.GenerateOptions(temperature=0, max_tokens=40, logprobs=0)
    request = pb.GenerateRequest(chat=chat, options=options)
    stream = list(inference.Generate(request, timeout=60))
    text = "".join(r.text for r in stream)
    assert QUESTIONS[1][1] in text
    assert stream[-1].usage.completion_tokens == sum(len(r.tokens) for r in stream)
    once = inference.GenerateOnce(request, timeout=60)
    assert once.answers[0].text == text
    ids = inference.Tokenize(pb.TokenizeRequest(text="Bonjour à tous")).ids
    assert inference.Detokenize(pb.DetokenizeRequest(ids=ids)).text.strip() == "Bonjour à tous"
    by_ids = pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=ids), options=options)
    assert inference.GenerateOnce(by_ids, timeout=60).usage.prompt_tokens == len(ids)
    assert inference.ListModels(pb.ListModelsRequest()).models[0].vocab_size == 4096


def test_log_probabilities_of_a_prompt_are_the_same_at_both_doors(server, client, model, proto):
    inference, pb = proto.inference_grpc.InferenceStub(grpc.insecure_channel(server.grpc)), proto.inference
    ids = list(inference.Tokenize(pb.TokenizeRequest(text="Once upon a time", add_bos=True)).ids)
    asked = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 2}
    request = pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=ids), options=pb.GenerateOptions(**asked))
    tokens = inference.GenerateOnce(request, timeout=60).answers[0].prompt_tokens
    done = client.completions.create(model=model, prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 2})
    entries = done.choices[0].model_extra["prompt_logprobs"]
    assert [token.id for token in tokens] == ids[1:] and len(entries) == len(ids)
    for token, entry in zip(tokens, entries[1:]):
        assert token.logprob == pytest.approx(entry[str(token.id)]["logprob"], abs=1e-6)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([entry[str(t.id)]["logprob"] for t in token.top_logprobs])
        assert len(token.top_logprobs) == 2


def test_health_and_reflection_over_grpc(server):
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    for address, here, elsewhere, method in [
        (server.grpc, "tramontane.v1.Inference", "tramontane.v1.Admin", "Generate"),
        (server.admin, "tramontane.v1.Admin", "tramontane.v1.Inference", "ClusterStatus"),
    ]:
        channel = grpc.insecure_channel(address)
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {here, "grpc.health.v1.Health"} <= services and elsewhere not in services
        service = DescriptorPool(database).FindServiceByName(here)
        assert method in service.methods_by_name


def test_the_public_door_has_no_admin_api(server, proto):
    admin = proto.admin_grpc.AdminStub(grpc.insecure_channel(server.grpc))
    with pytest.raises(grpc.RpcError) as refused:
        admin.ClusterStatus(proto.admin.ClusterStatusRequest(), timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_health_and_metrics_over_http(server):
    for path in ("live", "ready"):
        with urllib.request.urlopen(f"{server.url}/health/{path}", timeout=10) as answer:
            assert answer.status == 200
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert "tramontane_" in text and text.rstrip().endswith("# EOF")


def test_operator_commands(server):
    router = ["--router", server.admin]
    status = json.loads(run("status", "--output", "json", *router).stdout)
    assert status["ready"] and status["workers_ready"] == 2 and status["epoch"] >= 1
    assert "ready" in run("status", *router).stdout
    workers = json.loads(run("workers", "list", "--output", "json", *router).stdout)
    assert len(workers) == 2 and all(w["segments"] > 0 and w["state"] == "ready" for w in workers)
    placement = json.loads(run("placement", "show", "--output", "json", *router).stdout)
    assert len(placement["workers"]) == 2 and len(placement["experts"]) == 4 * 8
    assert "LAYER" in run("placement", "show", *router).stdout
    assert "Warsaw" in run("chat", QUESTIONS[0][0], "--temperature", 0, "--url", server.url).stdout
    bench = run(
        "bench", "--url", server.url, "--requests", 4, "--concurrency", 2, "--prompt-tokens", 16,
        "--max-tokens", 8, "--output", "json",
    )
    report = json.loads(bench.stdout)
    assert report["failed"] == 0 and report["output_tokens"] == 32
    nobody = run("status", "--router", "127.0.0.1:1", check=False)
    assert nobody.returncode == 5 and "tramontane serve" in nobody.stderr


def test_commands_without_a_server():
    inspected = json.loads(run("model", "inspect", "--output", "json").stdout)
    assert inspected["geometry"]["num_experts"] == 8
    run("model", "verify")
    checked = run("config", "check", "--output", "json")
    assert json.loads(checked.stdout)
    for shell in ("bash", "zsh", "fish"):
        assert "tramontane" in run("completions", shell).stdout
    misused = run("serve", "--workers", "0", check=False)
    assert misused.returncode == 2 and "workers" in misused.stderr
    wrong = run("serve", "--weights", "q3", check=False)
    assert wrong.returncode == 2 and "q3" in wrong.stderr
