"""Answers that are words of a grammar: a schema library that is not ours agrees with every one, also after a worker was lost."""

import concurrent.futures
import json
import os
import re
import signal
import time

import jsonschema
import openai
import pytest
from conftest import run, wait_until
from test_cluster import Cluster, etcd  # noqa: F401
from test_resume import Had, post, read
from test_roles_and_peers import metric

# Fewer while one works on something else.
ANSWERS = int(os.environ.get("TRAMONTANE_TEST_CONSTRAINED", "1000"))
STREAMS = 16
TOKENS = 1200


def object_of(properties, **more):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False, **more}


WORD = {"type": "string", "maxLength": 12}
NUMBER = {"type": "integer", "minimum": -1000, "maximum": 1000}
# A number without a last digit, or a name without a last letter, may go on for as long as the model likes.
QUARTERS = {"type": "number", "minimum": -2.5, "maximum": 2.5, "multipleOf": 0.25}
SCHEMAS = [
    object_of({"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 130}}),
    object_of({"city": {"enum": ["Warsaw", "Paris", "Łódź", "São Paulo", "東京"]}, "capital": {"type": "boolean"}}),
    object_of({"point": object_of({"x": QUARTERS, "y": {**QUARTERS, "minimum": 0, "exclusiveMaximum": 1}})}),
    {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 6},
    {"type": "array", "items": object_of({"id": NUMBER, "tag": {"const": "x"}}), "maxItems": 3},
    {"type": "array", "prefixItems": [WORD, NUMBER, {"type": "null"}], "items": False, "minItems": 3},
    {"anyOf": [NUMBER, {"type": "boolean"}, object_of({"why": WORD})]},
    {"oneOf": [object_of({"kind": {"const": "a"}, "n": NUMBER}), object_of({"kind": {"const": "b"}, "s": WORD})]},
    {"allOf": [object_of({"a": NUMBER}) | {"additionalProperties": True}, {"required": ["a"]}, {"maxProperties": 1}]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "string", "format": "date", "pattern": "^[12]"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"enum": [1, "one", None, True, [1], {"one": 1}]},
    {"const": {"deeply": ["nested", {"value": 1.5}]}},
    {"type": ["integer", "null"], "minimum": 5, "maximum": 7},
    QUARTERS,
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "object", "properties": {"a": NUMBER, "b": WORD, "c": {"type": "null"}}, "required": ["b"], "additionalProperties": False},
    {"type": "object", "patternProperties": {"^.{1,9}$": NUMBER}, "additionalProperties": False, "minProperties": 1, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^[a-c]{1,2}$": {"type": "boolean"}}, "additionalProperties": False, "maxProperties": 2},
    {"$defs": {"leaf": object_of({"v": NUMBER})}, **object_of({"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}})},
    {
        "$defs": {"node": object_of({"v": NUMBER, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}})},
        "$ref": "#/$defs/node",
    },
    object_of({"matrix": {"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2}, "minItems": 2, "maxItems": 2}}),
    object_of({"say \"it\"\n": {"type": "boolean"}, "ключ": NUMBER, "empty": {"type": "object", "maxProperties": 0}}),
    {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 2}, "maxItems": 2},
    object_of({f"field_{i}": {"type": "boolean"} for i in range(12)}),
    {"type": "array", "items": {"anyOf": [{"const": w} for w in ("red", "green", "blue", "")]}, "minItems": 1, "maxItems": 4},
]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=300)


def ask(client, seed, **options):
    options = {"max_tokens": TOKENS, "temperature": 1, "seed": seed, **options}
    return client.chat.completions.create(
        model="tramontane-demo", messages=[{"role": "user", "content": f"Give me number {seed}."}], **options
    )


def by_schema(client, index, **options):
    schema = SCHEMAS[index % len(SCHEMAS)]
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    return ask(client, index, response_format=form, **options)


def test_every_answer_is_valid(client):
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(lambda index: by_schema(client, index), range(ANSWERS)))
    took = time.monotonic() - began
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    wrong, tokens = [], 0
    for index, answer in enumerate(answers):
        choice, schema = answer.choices[0], SCHEMAS[index % len(SCHEMAS)]
        tokens += answer.usage.completion_tokens
        try:
            assert choice.finish_reason == "stop", f"{choice.finish_reason} after {answer.usage.completion_tokens} tokens"
            jsonschema.validate(json.loads(choice.message.content), schema, format_checker=checker)
        except (AssertionError, ValueError, jsonschema.ValidationError) as error:
            wrong.append((index, schema, choice.message.content[:200], str(error)[:200]))
    print(f"{ANSWERS - len(wrong)} of {ANSWERS} valid, {tokens} tokens, {took:.1f} s")
    assert not wrong, f"{len(wrong)} of {ANSWERS}: " + "\n".join(map(str, wrong[:12]))


def test_an_answer_depends_on_its_request_alone(client):
    alone = [by_schema(client, index).choices[0].message.content for index in range(8)]
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        together = list(pool.map(lambda i: by_schema(client, i % 8).choices[0].message.content, range(48)))
    assert together == alone * 6
    several = by_schema(client, 0, n=4).choices
    assert several[0].message.content == alone[0]
    assert len({choice.message.content for choice in several}) > 1
    for choice in several:
        jsonschema.validate(json.loads(choice.message.content), SCHEMAS[0])
    chunks = by_schema(client, 0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone[0]


def test_other_forms_of_constraints(client):
    any_object = ask(client, 1, response_format={"type": "json_object"}, max_tokens=60)
    assert any_object.choices[0].message.content.startswith("{")

    def says(seed=1, **extra):
        answer = ask(client, seed, extra_body=extra).choices[0]
        assert answer.finish_reason == "stop"
        return answer.message.content

    for seed in range(8):
        assert re.fullmatch(r"(ab|cd){2,4}-[0-9]+\.", says(seed, structured_outputs={"regex": r"^(ab|cd){2,4}-[0-9]+\.$"}))
        assert says(seed, structured_outputs={"choice": ["yes", "no (why?)", "a|b", "é"]}) in ("yes", "no (why?)", "a|b", "é")
        assert says(seed, guided_choice=["+", "-"]) in ("+", "-")
        assert re.fullmatch(" [a-z]{3}", says(seed, guided_regex=" [a-z]{3}"))
        assert says(seed, guided_choice=[" yes", " no"]) in (" yes", " no")
        lark = 'start: "[" item ("," item)~0..3 "]"\nitem: /[a-c]{2}/ | start\n'
        assert re.fullmatch(r"[\[\]a-c,]+", says(seed, guided_grammar=lark))
        jsonschema.validate(json.loads(says(seed, guided_json=SCHEMAS[0])), SCHEMAS[0])
        completion = client.completions.create(
            model="tramontane-demo", prompt="One:", max_tokens=50, seed=seed, extra_body={"guided_regex": "[0-9]{4}"}
        )
        assert re.fullmatch("[0-9]{4}", completion.choices[0].text)


def test_the_answer_may_be_too_long_for_its_limit(client):
    cut = by_schema(client, 3, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(cut.message.content)


LONG = {
    "messages": [{"role": "user", "content": "Numbers."}], "max_tokens": 1500, "temperature": 1, "seed": 5, "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "numbers", "schema": {
        "type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99999}, "minItems": 120, "maxItems": 130,
    }}},
}


def test_a_constrained_stream_goes_on_when_its_worker_is_killed(etcd, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TRAMONTANE_ROUTER__REPLICAS", "2")
    cluster = Cluster(etcd, name="constrained")
    try:
        for name in ("w-0", "w-1"):
            cluster.start_worker(name)
        # It has no tokenizer either: what its tokens stand for comes from the others.
        cluster.start_worker("w-2", "--model-from-peers")
        safe = lambda: cluster.status().get("survives_one_loss")
        wait_until(safe, 120, f"one may be lost\n{cluster.logs()}")
        url = f"http://127.0.0.1:{cluster.http}"
        compiled = lambda name: metric(cluster.ops[name], "grammars_compiled_total")

        def whole():
            had = Had()
            connection, response = post(url, LONG)
            read(had, response)
            connection.close()
            return had.whole()[:3]

        expected = whole()
        assert expected[1] == ["stop"]
        assert 120 <= len(json.loads(expected[0])) <= 130
        connection, response = post(url, LONG)
        had = Had()
        read(had, response, events=30)
        running = lambda: [name for name in cluster.workers if metric(cluster.ops[name], "sequences_running")]
        (victim,) = wait_until(running, 30, "somebody has the sequence")
        has_compiled = compiled("w-2")
        cluster.workers[victim].stop(signal.SIGKILL)
        read(had, response)
        connection.close()
        assert had.whole()[:3] == expected, cluster.logs()
        if not has_compiled:
            other = next(name for name in ("w-0", "w-1") if name != victim)
            run("workers", "cordon", other, "--router", f"127.0.0.1:{cluster.admin}")
            wait_until(lambda: whole() == expected and compiled("w-2"), 60, f"w-2 says the same\n{cluster.logs()}")
    finally:
        cluster.kill()


def test_the_same_over_grpc(server, client, proto):
    """One request type: what HTTP calls `response_format` is `options.constraint` here, and refused with its name."""
    import grpc

    stub = proto.inference_grpc.InferenceStub(grpc.insecure_channel(server.grpc))
    worker = proto.worker
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    request = proto.inference.GenerateRequest(prompt="Say it:")
    request.options.max_tokens, request.options.seed = 60, 5
    request.options.constraint.CopyFrom(worker.Constraint(json_schema=json.dumps(schema)))
    said = stub.GenerateOnce(request, timeout=60).answers[0].text
    assert json.loads(said)["a"] in ("x", "y")
    over_http = client.completions.create(
        model=client.models.list().data[0].id, prompt="Say it:", max_tokens=60, seed=5,
        extra_body={"structured_outputs": {"json": schema}},
    )
    assert over_http.choices[0].text == said
    for constraint in [worker.Constraint(), worker.Constraint(regex="(")]:
        request.options.constraint.CopyFrom(constraint)
        with pytest.raises(grpc.RpcError) as raised:
            stub.GenerateOnce(request, timeout=60)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "options.constraint" in raised.value.details()
