"""Calls of tools through the official client: the demo model with tokens for calls, held to them by a grammar."""

import base64
import json
import re
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


# How a model writes its calls: as a list (v3), each by its name and id (v11), or without the id (v13, in a tekken file).
WIRES = {"list": TOKENS, "by-name": [*TOKENS, "[ARGS]", "[CALL_ID]"], "without-id": [*TOKENS, "[ARGS]"]}
TEKKEN = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]


def tekken(pieces, tokens):
    """A tekken file of v13: control tokens, all bytes, then the model's pieces; what it says with them is no language."""
    controls = TEKKEN + tokens
    words = [bytes([byte]) for byte in range(256)]
    known = set(words)
    for piece in pieces:
        word = piece.piece.replace("\u2581", " ").encode()
        if piece.type == piece.NORMAL and word not in known:
            known.add(word)
            words.append(word)
    specials = max(20, len(controls))
    # What is missing are words that no text has.
    words += [b"\xff" + number.to_bytes(2) for number in range(4096 - specials - len(words))]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
        for rank, word in enumerate(words[: 4096 - specials])
    ]
    return {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(vocabulary), "default_vocab_size": 4096, "default_num_special_tokens": specials,
            "version": "v13",
        },
        "vocab": vocabulary,
        "special_tokens": [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(controls)],
    }


def talking(folder, wire, *flags):
    """A server of the demo model with tokens for calls; `first` is the id of `[TOOL_CALLS]`."""
    for file in (ROOT / "models" / "demo").iterdir():
        if file.name not in ("tokenizer.json", "tokenizer.model"):
            shutil.copy(file, folder / file.name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString((ROOT / "models" / "demo" / "tokenizer.model").read_bytes())
    if wire == "without-id":
        (folder / "tekken.json").write_text(json.dumps(tekken(pieces.pieces, WIRES[wire])))
    else:
        for piece, token in zip(pieces.pieces[FIRST:], WIRES[wire]):
            piece.piece, piece.type = token, piece.CONTROL
        (folder / "tokenizer.model").write_bytes(pieces.SerializeToString())
    server = Server("--workers", "2", "--model", folder, "--model-name", "talking", *flags)
    server.first = len(TEKKEN) if wire == "without-id" else FIRST
    # The end of a list is likely; and before the 120th token nothing ends, so that further calls come.
    bracket = next(id for id, piece in enumerate(pieces.pieces) if piece.piece == "<0x5D>")  # "]"
    server.several = {"logit_bias": {str(bracket): 9}} if wire == "list" else {"extra_body": {"min_tokens": 120}}
    return server


@pytest.fixture(scope="module", params=WIRES)
def client(request, tmp_path_factory):
    server = talking(tmp_path_factory.mktemp("talking"), request.param)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    client.first, client.several = server.first, server.several
    yield client
    assert server.stop() == 0, server.output()[-4000:]


def pieces_of(choices):
    """Calls as a stream tells them: by choice and index, id, name and arguments."""
    calls = {}
    for choice in choices:
        for piece in choice.delta.tool_calls or []:
            so_far = calls.setdefault((choice.index, piece.index), [piece.id, piece.function.name, ""])
            so_far[2] += piece.function.arguments
    return calls


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_is_required_is_made_and_its_arguments_are_as_the_schema_says(client, seed):
    named = {"type": "function", "function": {"name": "get_weather"}}
    reply = client.chat.completions.create(**ASK, tool_choice=named, seed=seed)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and set(arguments) == {"city", "days"} and 1 <= arguments["days"] <= 9
    chunks = client.chat.completions.create(**ASK, tool_choice=named, seed=seed, stream=True)
    streamed = pieces_of(choice for chunk in chunks for choice in chunk.choices)
    assert list(streamed) == [(0, 0)] and streamed[0, 0][1:] == ["get_weather", call.function.arguments]
    # And the conversation goes on.
    said = [*ASK["messages"], choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    client.chat.completions.create(**(ASK | {"messages": said, "max_tokens": 8}))


def test_several_calls_in_one_answer(client):
    asked = ASK | client.several | {"tool_choice": "required", "n": 4, "seed": 3, "max_tokens": 400}
    reply = client.chat.completions.create(**asked)
    several = [c for c in reply.choices if c.finish_reason == "tool_calls" and len(c.message.tool_calls) > 1]
    assert several, [(c.finish_reason, len(c.message.tool_calls or [])) for c in reply.choices]
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = pieces_of(choice for chunk in chunks for choice in chunk.choices)
    for choice in several:
        calls = choice.message.tool_calls
        assert len({call.id for call in calls}) == len(calls)
        for index, call in enumerate(calls):
            assert re.fullmatch("[a-zA-Z0-9]{9}", call.id) and call.function.name in ("get_weather", "clock")
            assert isinstance(json.loads(call.function.arguments), dict)
            assert streamed[choice.index, index][1:] == [call.function.name, call.function.arguments]
        assert (choice.index, len(calls)) not in streamed
    calls = several[0].message.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    said = [*ASK["messages"], several[0].message.model_dump(exclude_none=True)]
    assert client.chat.completions.create(**(ASK | {"messages": said + results, "max_tokens": 8})).usage.completion_tokens
    # One result for two calls is no conversation.
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**(ASK | {"messages": said + results[:1], "max_tokens": 8}))
    assert "messages" in (refused.value.param or ""), refused.value


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
    begins = {"logit_bias": {str(client.first): 100}, "temperature": 0, "logprobs": True}
    free = client.chat.completions.create(**(ASK | {"max_tokens": 4}), tool_choice="auto", **begins).choices[0]
    assert {token.token for token in free.logprobs.content} == {TOKENS[0]}, free
    reply = client.chat.completions.create(**ASK, tool_choice="none", **begins).choices[0]
    assert reply.message.tool_calls is None and reply.message.content.strip()
    assert TOKENS[0] not in {token.token for token in reply.logprobs.content}
