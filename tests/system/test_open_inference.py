"""The Open Inference Protocol and deadlines, by a client that knows nothing but what reflection tells it."""

import base64
import json
import re
import struct
import subprocess
import urllib.parse
import urllib.request

import grpc
import pytest
from conftest import wait_until
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVICE = "inference.GRPCInferenceService"


class Reflected:
    """Calls methods with JSON, like grpcurl."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address)
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def call(self, service, name, message=None, stream=False, **options):
        method = self.pool.FindServiceByName(service).FindMethodByName(name)
        request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        make = self.channel.unary_stream if stream else self.channel.unary_unary
        call = make(
            f"/{service}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call(json_format.ParseDict(message or {}, request()), timeout=60, **options)


@pytest.fixture(scope="module")
def client(server):
    return Reflected(server.grpc)


@pytest.fixture(scope="module")
def model(client):
    return client.call("tramontane.v1.Inference", "ListModels").models[0].id


def tensor(name, texts, **others):
    """BYTES as `google.protobuf.json_format` takes them: base64."""
    contents = [base64.b64encode(text.encode()).decode() for text in texts]
    return {
        "name": name, "datatype": "BYTES", "shape": [len(texts)],
        "contents": {"bytesContents": contents}, **others,
    }


def refused(call):
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error = raised.value
    details = dict(error.trailing_metadata()).get("grpc-status-details-bin")
    fields = []
    for detail in status_pb2.Status.FromString(details).details if details else []:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
    return error.code(), fields, error.details()


def test_five_questions_about_the_server(client, model):
    assert client.call(SERVICE, "ServerLive").live
    assert client.call(SERVICE, "ServerReady").ready
    assert client.call(SERVICE, "ModelReady", {"name": model}).ready
    assert client.call(SERVICE, "ServerMetadata").name == "tramontane"
    metadata = client.call(SERVICE, "ModelMetadata", {"name": model})
    assert [t.name for t in metadata.inputs] == ["text_input", "sampling_parameters"]
    assert [t.name for t in metadata.outputs] == ["text_output", "finish_reason"]
    version = metadata.versions[0]
    assert client.call(SERVICE, "ModelReady", {"name": model, "version": version}).ready
    code, _, said = refused(lambda: client.call(SERVICE, "ModelReady", {"name": "gpt-9"}))
    assert code == grpc.StatusCode.NOT_FOUND and model in said
    code, fields, _ = refused(
        lambda: client.call(SERVICE, "ModelReady", {"name": model, "version": "other"})
    )
    assert (code, fields) == (grpc.StatusCode.NOT_FOUND, ["model_version"])


def test_prompts_are_completed_as_over_http(server, client, model):
    import openai

    prompts = ["The capital of Poland", "La capitale"]
    http = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    expected = http.completions.create(model=model, prompt=prompts, max_tokens=12, temperature=0)
    reply = client.call(SERVICE, "ModelInfer", {
        "modelName": model, "id": "mine",
        "inputs": [tensor("text_input", prompts), tensor("sampling_parameters", ['{"max_tokens": 12}'])],
        "parameters": {"temperature": {"doubleParam": 0}},
    })
    texts, reasons = reply.outputs
    assert (reply.id, reply.model_name) == ("mine", model)
    assert [t.decode() for t in texts.contents.bytes_contents] == [c.text for c in expected.choices]
    assert [r.decode() for r in reasons.contents.bytes_contents] == [c.finish_reason for c in expected.choices]
    assert reply.parameters["completion_tokens"].int64_param == expected.usage.completion_tokens


def test_the_best_answers_are_the_same_at_every_door(server, client, model):
    import openai

    prompts = ["The capital of Poland", "La capitale"]
    sampling = {"n": 2, "best_of": 5, "max_tokens": 12, "seed": 7}
    http = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    expected = http.completions.create(model=model, prompt=prompts, logprobs=0, **sampling).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in expected]
    assert len(expected) == 4 and means[0] >= means[1] and means[2] >= means[3]
    reply = client.call(SERVICE, "ModelInfer", {
        "modelName": model, "inputs": [tensor("text_input", prompts), tensor("sampling_parameters", [json.dumps(sampling)])],
    })
    texts = [t.decode() for t in reply.outputs[0].contents.bytes_contents]
    assert texts == [c.text for c in expected]
    once = client.call("tramontane.v1.Inference", "GenerateOnce", {
        "prompt": prompts[0], "options": {"n": 2, "bestOf": 5, "maxTokens": 12, "seed": 7},
    })
    assert [answer.text for answer in once.answers] == texts[:2]
    assert [answer.index for answer in once.answers] == [0, 1]


def test_raw_tensors_get_raw_answers(client, model):
    prompt = "The capital of Poland".encode()
    raw = base64.b64encode(struct.pack("<I", len(prompt)) + prompt).decode()
    asked = {
        "modelName": model, "parameters": {"temperature": {"doubleParam": 0}},
        "outputs": [{"name": "text_output"}],
    }
    plain = client.call(SERVICE, "ModelInfer", {**asked, "inputs": [tensor("text_input", [prompt.decode()])]})
    reply = client.call(SERVICE, "ModelInfer", {
        **asked, "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1]}],
        "rawInputContents": [raw],
    })
    expected = plain.outputs[0].contents.bytes_contents[0]
    assert list(reply.raw_output_contents) == [struct.pack("<I", len(expected)) + expected]
    assert len(reply.outputs) == 1 and not reply.outputs[0].HasField("contents")


@pytest.mark.parametrize(
    "message,field",
    [
        ({}, "inputs"),
        ({"inputs": [tensor("text_input", ["a"], shape=[2])]}, "inputs.text_input"),
        ({"inputs": [tensor("text_input", ["a"], datatype="INT8")]}, "inputs.text_input"),
        ({"inputs": [tensor("text_input", ["a"], shape=[-1, 2**62])]}, "inputs.text_input"),
        ({"inputs": [tensor("text_input", ["a"]), tensor("other", ["a"])]}, "inputs"),
        ({"inputs": [tensor("text_input", ["a"])], "rawInputContents": ["AA==", "AA=="]}, "raw_input_contents"),
        ({"inputs": [tensor("text_input", ["a"])], "outputs": [{"name": "x"}]}, "outputs[0].name"),
        ({"inputs": [tensor("text_input", ["a"])], "parameters": {"stream": {"boolParam": True}}}, "parameters.stream"),
        ({"inputs": [tensor("text_input", ["a"])], "parameters": {"logprobs": {"int64Param": "1"}}}, "parameters.logprobs"),
        ({"inputs": [tensor("text_input", ["a"])], "parameters": {"n": {"int64Param": "0"}}}, "parameters.n"),
        ({"inputs": [tensor("text_input", ["a"])], "parameters": {"top_p": {"doubleParam": "NaN"}}}, "parameters.top_p"),
        ({"inputs": [tensor("text_input", ["a"])], "id": "i" * 257}, "id"),
    ],
)
def test_what_is_wrong_is_named(client, model, message, field):
    code, fields, said = refused(lambda: client.call(SERVICE, "ModelInfer", {"modelName": model, **message}))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field]), said


@pytest.mark.parametrize("method", ["Generate", "GenerateOnce"])
def test_an_answer_ends_at_the_callers_deadline(server, client, method):
    context = client.call("tramontane.v1.Inference", "ListModels").models[0].context_length
    message = {"prompt": "Once", "options": {"maxTokens": context - 8, "ignoreEos": True}}
    code, said = status_of(server, client, method, message, "300m")
    assert (code, said) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline has passed")
    wait_until(lambda: running(server) == 0, 10, "nothing runs any more")


def test_a_deadline_that_is_none_is_refused(server, client):
    code, said = status_of(server, client, "GenerateOnce", {"prompt": "a"}, "soon")
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "grpc-timeout" in said


def running(server):
    page = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    return float(re.search(r"^vllm:num_requests_running\S* (\S+)$", page, re.M).group(1))


def status_of(server, client, method, message, wait):
    """By curl, which does not watch the deadline itself: what ends the call is the server."""
    description = client.pool.FindServiceByName("tramontane.v1.Inference").FindMethodByName(method)
    request = message_factory.GetMessageClass(description.input_type)
    body = json_format.ParseDict(message, request()).SerializeToString()
    done = subprocess.run(
        ["curl", "-sS", "--http2-prior-knowledge", f"http://{server.grpc}/tramontane.v1.Inference/{method}",
         "-H", "content-type: application/grpc", "-H", "te: trailers", "-H", f"grpc-timeout: {wait}",
         "--data-binary", "@-", "-o", "/dev/null", "-D", "-"],
        input=struct.pack(">BI", 0, len(body)) + body, capture_output=True, timeout=60, check=True,
    )
    said = dict(line.split(": ", 1) for line in done.stdout.decode().splitlines() if ": " in line)
    code = next(c for c in grpc.StatusCode if c.value[0] == int(said["grpc-status"]))
    return code, urllib.parse.unquote(said["grpc-message"])
