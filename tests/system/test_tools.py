"""Calls of tools through the official client: the demo model with tokens for calls, held to them by a grammar."""

import json
import shutil

import openai
import pytest
from conftest import ROOT, Server
from sentencepiece import sentencepiece_model_pb2

TOKENS = [
    "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]",
]
# They take the place of the last tokens, which stand for rare characters.
FIRST = 4080
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]
ASK = {"model": "talking", "messages": [{"role": "user", "content": "Weather in Paris?"}], "max_tokens": 200, "tools": TOOLS}


@pytest.fixture(scope="module", params=[False, True], ids=["list", "by-name"])
def client(request, tmp_path_factory):
    model = tmp_path_factory.mktemp("talking")
    for file in (ROOT / "models" / "demo").iterdir():
        if file.name not in ("tokenizer.json", "tokenizer.model"):
            shutil.copy(file, model / file.name)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    tokens = TOKENS + (["[ARGS]", "[CALL_ID]"] if request.param else [])
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString((ROOT / "models" / "demo" / "tokenizer.model").read_bytes())
    for piece, token in zip(pieces.pieces[FIRST:], tokens):
        piece.piece, piece.type = token, piece.CONTROL
    (model / "tokenizer.model").write_bytes(pieces.SerializeToString())
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    server = Server("--workers", "2", "--model", model, "--model-name", "talking")
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert server.stop() == 0, server.output()[-4000:]


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_is_required_is_made_and_its_arguments_are_as_the_schema_says(client, seed):
    named = {"type": "function", "function": {"name": "get_weather"}}
    reply = client.chat.completions.create(**ASK, tool_choice=named, seed=seed)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and set(arguments) == {"city", "days"} and 1 <= arguments["days"] <= 9
    streamed = {}
    for chunk in client.chat.completions.create(**ASK, tool_choice=named, seed=seed, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            so_far = streamed.setdefault(piece.index, [piece.id, piece.function.name, ""])
            so_far[2] += piece.function.arguments
    assert list(streamed) == [0] and streamed[0][1:] == ["get_weather", call.function.arguments]
    # And the conversation goes on.
    said = [*ASK["messages"], choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    client.chat.completions.create(**(ASK | {"messages": said, "max_tokens": 8}))


def test_only_allowed_tools_are_called(client):
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}}
    for seed in range(4):
        reply = client.chat.completions.create(**ASK, tool_choice=allowed, parallel_tool_calls=False, seed=seed)
        assert {call.function.name for call in reply.choices[0].message.tool_calls} == {"clock"}
    tools = [{"type": "function", **t["function"]} for t in TOOLS]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    response = client.responses.create(model="talking", input="Time?", tools=tools, tool_choice=allowed, parallel_tool_calls=False, max_output_tokens=200)
    assert {item.name for item in response.output} == {"clock"} and response.tool_choice.mode == "required"


def test_responses_call_too(client):
    tools = [{"type": "function"} | t["function"] | {"strict": True} for t in TOOLS]
    response = client.responses.create(
        model="talking", input="Weather?", tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=200,
        extra_body={"seed": 1},
    )
    (item,) = response.output
    assert item.type == "function_call" and item.name in ("get_weather", "clock")
    json.loads(item.arguments)


def test_no_call_when_none_is_wanted(client):
    # A model that wants nothing but to call: where it is free to, it says no word and never ends.
    begins = {"logit_bias": {str(FIRST): 100}, "temperature": 0, "logprobs": True}
    free = client.chat.completions.create(**(ASK | {"max_tokens": 4}), tool_choice="auto", **begins).choices[0]
    assert {token.token for token in free.logprobs.content} == {TOKENS[0]}, free
    reply = client.chat.completions.create(**ASK, tool_choice="none", **begins).choices[0]
    assert reply.message.tool_calls is None and reply.message.content.strip()
    assert TOKENS[0] not in {token.token for token in reply.logprobs.content}
