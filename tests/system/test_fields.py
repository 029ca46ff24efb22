"""Every field that the official client can send is honoured, ignored on purpose, or refused by name.

The client's own types say which fields there are: one that a newer client knows and this table does not fails the test.
"""

import json
import typing
import urllib.error
import urllib.request

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

HONOURED, IGNORED, REFUSED = "honoured", "ignored", "refused"
HELLO = [{"role": "user", "content": "Hello"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
SAMPLING = {
    "temperature": (HONOURED, 0.5),
    "top_p": (HONOURED, 0.9),
    "model": (HONOURED, "tramontane-demo"),
    "stream": (HONOURED, False),
    "user": (IGNORED, "me"),
}
PENALTIES = {
    "frequency_penalty": (HONOURED, 0.5),
    "presence_penalty": (HONOURED, 0.5),
    "logit_bias": (HONOURED, {"5": 1}),
    "n": (HONOURED, 2),
    "seed": (HONOURED, 7),
    "stop": (HONOURED, "x"),
    "max_tokens": (HONOURED, 2),
}
COMMON = {
    "metadata": (IGNORED, {"a": "b"}),
    "safety_identifier": (IGNORED, "me"),
    "prompt_cache_key": (IGNORED, "k"),
    "prompt_cache_options": (IGNORED, {"mode": "implicit"}),
    "prompt_cache_retention": (IGNORED, "24h"),
    "service_tier": (IGNORED, "auto"),
    "store": (IGNORED, False),
    "moderation": (REFUSED, {"model": "x"}),
    "parallel_tool_calls": (HONOURED, True),
    "tool_choice": (HONOURED, "auto"),
    "top_logprobs": (HONOURED, 0),
}
# By path and type of the client: what becomes of each field, and a value that asks for something.
ROUTES = {
    "/v1/chat/completions": (
        chat_create_params.CompletionCreateParamsStreaming,
        {"messages": HELLO, "max_tokens": 2},
        SAMPLING
        | PENALTIES
        | COMMON
        | {
            "messages": (HONOURED, HELLO),
            "max_completion_tokens": (HONOURED, 2),
            "logprobs": (HONOURED, True),
            "tools": (REFUSED, [{"type": "function", "function": FUNCTION}]),  # the demo model knows none
            "response_format": (HONOURED, {"type": "text"}),
            "stream_options": (HONOURED, None),
            "reasoning_effort": (REFUSED, "low"),
            "verbosity": (REFUSED, "low"),
            "audio": (REFUSED, {"voice": "x", "format": "wav"}),
            "modalities": (REFUSED, ["audio"]),
            "prediction": (REFUSED, {"type": "content", "content": "x"}),
            "web_search_options": (REFUSED, {}),
            "functions": (REFUSED, [FUNCTION]),
            "function_call": (REFUSED, {"name": "f"}),
        },
    ),
    "/v1/completions": (
        completion_create_params.CompletionCreateParamsStreaming,
        {"prompt": "Hello", "max_tokens": 2},
        SAMPLING
        | PENALTIES
        | {
            "prompt": (HONOURED, ["Hello"]),
            "best_of": (HONOURED, 2),
            "echo": (HONOURED, True),
            "logprobs": (HONOURED, 1),
            "stream_options": (HONOURED, None),
            "suffix": (REFUSED, "x"),  # the demo model cannot fill gaps
        },
    ),
    "/v1/responses": (
        response_create_params.ResponseCreateParamsStreaming,
        {"input": "Hello", "max_output_tokens": 2},
        SAMPLING
        | COMMON
        | {
            "input": (HONOURED, HELLO),
            "max_output_tokens": (HONOURED, 2),
            "include": (HONOURED, ["message.output_text.logprobs"]),
            "instructions": (HONOURED, None),
            "text": (HONOURED, {"format": {"type": "text"}}),
            "stream_options": (IGNORED, {"include_obfuscation": False}),
            "truncation": (HONOURED, "disabled"),
            "reasoning": (REFUSED, {"effort": "low"}),
            "tools": (REFUSED, [{"type": "function"} | FUNCTION]),
            "background": (REFUSED, True),
            "background_options": (REFUSED, {"x": 1}),
            "access_programs": (REFUSED, {"cyber": "standard"}),
            "context_management": (REFUSED, [{"type": "compaction"}]),
            "conversation": (REFUSED, "conv_1"),
            "image": (REFUSED, {"x": 1}),
            "max_tool_calls": (REFUSED, 1),
            "previous_response_id": (REFUSED, "resp_1"),
            "prompt": (REFUSED, {"id": "x"}),
        },
    ),
}


def post(server, path, body):
    request = urllib.request.Request(
        f"{server.url}{path}", data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("path", ROUTES)
def test_no_field_of_the_official_client_is_dropped_in_silence(server, path):
    params, body, table = ROUTES[path]
    known = set(typing.get_type_hints(params))
    assert set(table) == known, f"fields without a decision: {set(table) ^ known}"
    for field, (fate, value) in table.items():
        status, reply = post(server, path, body | {field: value})
        if fate == REFUSED:
            assert status == 400, (field, reply)
            assert reply["error"]["param"].split(".")[0].split("[")[0] == field, reply
        else:
            assert status == 200, (field, reply)


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_honoured_is_also_checked(server, path):
    """A field that were not looked at would take anything."""
    _, body, table = ROUTES[path]
    for field, (fate, _) in table.items():
        if fate != HONOURED or field in ("tool_choice", "stop", "model", "messages", "prompt", "input", "truncation"):
            continue
        status, reply = post(server, path, body | {field: {"no": "such value"} if field != "logit_bias" else 5})
        if field in ("text", "stream_options", "response_format"):
            status, reply = post(server, path, body | {field: 5})
        assert status == 400, (field, reply)
        assert (reply["error"]["param"] or "").split(".")[0] == field, (field, reply)
