"""The official client, sync and async, with its retries, errors and helpers: what it makes of our answers.

What the routes answer is in test_serve.py, test_responses.py, test_tools.py and test_constrained.py; here it is what the client does with it."""

import asyncio
import contextlib
import signal
import time

import httpx2
import openai
import pydantic
import pytest
from conftest import Server, run, wait_until
from test_cluster import Cluster
from test_fields import post
from test_resume import etcd  # noqa: F401, a fixture
from test_tenants import Issuer
from test_tools import ASK, TOOLS, pieces_of, talking

MODEL = "talking"
HELLO = [{"role": "user", "content": "What is the capital of Poland?"}]
TALK = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 24}
# More than the buffers of a connection take: it runs until it is closed, or a minute.
ENDLESS = {
    **TALK, "stream": True, "n": 8, "max_tokens": 1800, "logprobs": True, "top_logprobs": 8, "extra_body": {"ignore_eos": True},
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Weather(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    city: str = pydantic.Field(max_length=12)
    days: int = pydantic.Field(ge=1, le=9)


def texts(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


class Seen:
    """What goes over the wire below a client: when each request went out, and what came back."""

    def __init__(self):
        self.sent, self.answers = [], []
        hooks = {"request": [lambda _: self.sent.append(time.monotonic())], "response": [self.answered]}
        self.http_client = httpx2.Client(event_hooks=hooks)

    def answered(self, response):
        self.answers.append((time.monotonic(), response.status_code, response.headers))

    def statuses(self):
        return [status for _, status, _ in self.answers]


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A model that can call, with places for all."""
    server = talking(tmp_path_factory.mktemp("talks"), "by-name")
    yield server
    assert server.stop() == 0, server.output()[-4000:]


@pytest.fixture(scope="module")
def client(talks):
    return openai.OpenAI(base_url=f"{talks.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Places for one `ENDLESS`, no queue, keys and tokens, and a tenant with a quota."""
    folder = tmp_path_factory.mktemp("narrow")
    issuer, keys, config = Issuer(folder), folder / "keys", folder / "config.toml"
    config.write_text(
        f'[auth]\nkeys_file = "{keys}"\n[auth.jwt]\nissuer = "https://issuer.example"\naudience = "tramontane"\n'
        f'jwks_file = "{issuer.jwks}"\n[router]\nsequences_max = 8\nqueue_max = 0\nhold_wait = "0s"\n'
        "[tenants.metered]\nrequests_per_minute = 3\ntokens_per_minute = 120\n"
    )
    tenants = {name: run("keys", "add", "--tenant", name, "--file", keys).stdout.strip() for name in ("acme", "metered")}
    operator = run("keys", "add", "--tenant", "ops", "--operator", "--file", keys).stdout.strip()
    server = Server("--workers", "1", "--model-name", MODEL, "--config", config)
    server.keys, server.operator, server.issuer = tenants, operator, issuer
    yield server
    assert server.stop() == 0, server.output()[-4000:]


def at(server, key="acme", **options):
    options = {"max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.keys.get(key, key), **options)


@contextlib.contextmanager
def busy(server):
    """Somebody has all places; yields the stream that has them."""
    with at(server).chat.completions.create(**ENDLESS) as stream:
        next(iter(stream))
        yield stream


class TestRetries:
    def test_a_client_comes_again_when_it_was_told_to(self, narrow):
        seen = Seen()

        def leave(response):
            if response.status_code == 429:
                stream.close()

        with busy(narrow) as stream:
            seen.http_client.event_hooks["response"].append(leave)
            reply = at(narrow, max_retries=4, http_client=seen.http_client).chat.completions.create(**TALK)
        assert "Warsaw" in reply.choices[0].message.content
        assert seen.statuses()[0] == 429 and seen.statuses()[-1] == 200
        for (answered, status, headers), again in zip(seen.answers, seen.sent[1:]):
            assert status == 429 and headers["x-should-retry"] == "true"
            wait = int(headers["retry-after-ms"]) / 1000
            # Its own first pause is half a second at most: this one is ours.
            assert 0.5 < wait <= again - answered

    def test_it_gives_up_when_its_attempts_are_used_up(self, narrow):
        seen = Seen()
        with busy(narrow):
            for attempts in (0, 1):
                del seen.answers[:]
                with pytest.raises(openai.RateLimitError) as refused:
                    at(narrow, max_retries=attempts, http_client=seen.http_client).chat.completions.create(**TALK)
                assert seen.statuses() == [429] * (attempts + 1)
                assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "rate_limit_error")
                assert refused.value.response.headers["retry-after-ms"]

    def test_it_does_not_repeat_what_cannot_succeed(self, narrow):
        """A client would come again after 409 by itself; `x-should-retry: false` says that it need not."""
        seen = Seen()
        client = at(narrow, max_retries=3, http_client=seen.http_client)
        with pytest.raises(openai.ConflictError) as refused:
            client.chat.completions.create(
                **{**TALK, "stream": True}, extra_headers={"Last-Event-ID": "006b087d063ba745761d534442e94c2d/00000000/1"}
            )
        assert refused.value.code == "resume_mismatch"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**TALK, "temperature": 9})
        assert seen.statuses() == [409, 400]


class TestErrors:
    def test_each_has_its_class(self, narrow):
        def refused(error, key="acme", **options):
            with pytest.raises(error) as caught:
                at(narrow, key).chat.completions.create(**(TALK | options))
            assert type(caught.value) is error and caught.value.request_id.startswith("req_")
            return caught.value

        assert refused(openai.AuthenticationError, "trm_nobody").code == "invalid_api_key"
        assert refused(openai.AuthenticationError, narrow.issuer.token(aud="other")).code == "invalid_api_key"
        assert refused(openai.PermissionDeniedError, narrow.issuer.token(tenant=None)).code == "permission_denied"
        missing = refused(openai.NotFoundError, model="gpt-9")
        assert (missing.code, missing.param) == ("model_not_found", "model")
        wrong = refused(openai.BadRequestError, temperature=7)
        assert (wrong.code, wrong.param, wrong.type) == (None, "temperature", "invalid_request_error")
        assert "got 7" in wrong.message
        unsupported = refused(openai.BadRequestError, tools=TOOLS)  # this model has no tokens for calls
        assert unsupported.param == "tools"
        assert refused(openai.BadRequestError, functions=[{"name": "f"}]).code == "unsupported_parameter"
        assert refused(openai.BadRequestError, max_tokens=100_000).code == "context_length_exceeded"
        large = refused(openai.APIStatusError, messages=[{"role": "user", "content": "x" * 9_000_000}])
        assert (large.status_code, large.code) == (413, "request_too_large")
        # A token with a tenant gets in.
        assert at(narrow, narrow.issuer.token()).chat.completions.create(**TALK).choices[0].message.content

    def test_nobody_can_serve(self, narrow):
        """503 is the class of 500; with attempts left the client waits until somebody can."""
        operator = ["--router", narrow.admin, "--api-key", narrow.operator]
        run("workers", "cordon", "worker-0", *operator)
        try:
            with pytest.raises(openai.InternalServerError) as refused:
                at(narrow).chat.completions.create(**TALK)
            assert (refused.value.status_code, refused.value.code) == (503, "service_unavailable")
            assert refused.value.response.headers["retry-after-ms"]
        finally:
            run("workers", "uncordon", "worker-0", *operator)
        assert at(narrow, max_retries=3).chat.completions.create(**TALK).choices

    def test_a_stream_that_nobody_goes_on_with(self, etcd, tmp_path):  # noqa: F811
        """The only worker dies in the middle of answers: an error as the last event, which the client raises."""
        config = tmp_path / "config.toml"
        config.write_text('[router]\nfailover_wait = "500ms"\nhold_wait = "0s"\n')
        cluster = Cluster(etcd, "--config", config, name="client", min_workers=1)
        worker = cluster.start_worker("w-0")
        try:
            wait_until(lambda: cluster.status().get("ready"), 120, f"the cluster is ready\n{cluster.logs()}")
            client = cluster.client(max_retries=0)
            model = client.models.list().data[0].id
            chat = client.chat.completions.create(**{**ENDLESS, "model": model})
            asked = {"model": model, "max_output_tokens": 1800, "extra_body": {"ignore_eos": True}}
            response = client.responses.create(input="Tell me a story.", stream=True, **asked)
            chunks, events = [next(chat)], [next(response)]
            assert worker.stop(signal.SIGKILL) == -signal.SIGKILL
            with pytest.raises(openai.APIError) as broken:
                chunks += chat
            assert type(broken.value) is openai.APIError and broken.value.code == "service_unavailable", broken.value
            assert broken.value.type == "overloaded_error" and broken.value.message
            assert all(choice.finish_reason is None for chunk in chunks for choice in chunk.choices)
            # To responses an error is an event like others.
            events += response
            assert (events[-1].type, events[-1].code) == ("error", "service_unavailable") and events[-1].message
            type(events[-1]).model_validate(events[-1].model_dump(by_alias=True))
            assert not {"response.completed", "response.incomplete"} & {event.type for event in events}
            with pytest.raises(openai.InternalServerError) as refused:
                client.chat.completions.create(**{**TALK, "model": model})
            assert refused.value.status_code == 503
        finally:
            cluster.kill()


class TestHelpers:
    def test_parse(self, client):
        reply = client.chat.completions.parse(**(TALK | {"max_tokens": 200}), response_format=Weather, seed=1)
        message = reply.choices[0].message
        assert isinstance(message.parsed, Weather) and message.parsed == Weather.model_validate_json(message.content)
        with pytest.raises(openai.LengthFinishReasonError) as cut:
            client.chat.completions.parse(**(TALK | {"max_tokens": 3}), response_format=Weather)
        assert cut.value.completion.usage.completion_tokens == 3

    def test_parse_calls(self, client):
        tool = openai.pydantic_function_tool(Weather, name="get_weather")
        reply = client.chat.completions.parse(**(ASK | {"tools": [tool]}), tool_choice=NAMED, parallel_tool_calls=False, seed=2)
        (call,) = reply.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Weather)

    def test_stream_of_a_chat(self, client):
        whole = client.chat.completions.create(**TALK)
        with client.chat.completions.stream(**TALK, stream_options={"include_usage": True}, logprobs=True) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        deltas = [event for event in events if event.type == "content.delta"]
        assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == whole.choices[0].message.content
        (done,) = [event for event in events if event.type == "content.done"]
        assert done.content == whole.choices[0].message.content
        scored = [token.token for event in events if event.type == "logprobs.content.delta" for token in event.content]
        assert scored and scored == [token.token for token in final.choices[0].logprobs.content]
        assert final.usage == whole.usage and final.choices[0].finish_reason == "stop"

    def test_stream_of_what_is_structured(self, client):
        with client.chat.completions.stream(**(TALK | {"max_tokens": 200}), response_format=Weather, seed=1) as stream:
            (done,) = [event for event in stream if event.type == "content.done"]
            assert isinstance(done.parsed, Weather)
            assert stream.get_final_completion().choices[0].message.parsed == done.parsed

    def test_stream_of_calls(self, client):
        tool = openai.pydantic_function_tool(Weather, name="get_weather")
        # With this seed white space comes before the bracket: the helper cannot read a piece that is nothing else.
        asked = ASK | {"tools": [tool], "tool_choice": NAMED, "parallel_tool_calls": False, "seed": 2}
        with client.chat.completions.stream(**asked) as stream:
            events = list(stream)
        deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        assert len(deltas) > 1 and "".join(event.arguments_delta for event in deltas) == done.arguments
        assert done.name == "get_weather" and isinstance(done.parsed_arguments, Weather)

    def test_responses(self, client):
        asked = {"model": MODEL, "input": "Weather in Paris?", "max_output_tokens": 200, "temperature": 0}
        parsed = client.responses.parse(**asked, text_format=Weather)
        assert isinstance(parsed.output_parsed, Weather)
        with client.responses.stream(**asked, text_format=Weather) as stream:
            events = list(stream)
            assert stream.get_final_response().output_parsed == parsed.output_parsed
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == parsed.output_text
        tool = openai.pydantic_function_tool(Weather, name="get_weather")
        called = client.responses.parse(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False)
        assert isinstance(called.output[0].parsed_arguments, Weather)

    def test_models(self, client):
        listed = client.models.list()
        assert [model.id for model in listed] == [MODEL]
        assert client.models.retrieve(MODEL) == listed.data[0]
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve("gpt-9")
        assert refused.value.code == "model_not_found"

    def test_raw_answers(self, narrow):
        client = at(narrow, "metered")
        raw = client.chat.completions.with_raw_response.create(**TALK)
        reply = raw.parse()
        assert "Warsaw" in reply.choices[0].message.content
        assert raw.request_id == raw.headers["x-request-id"] == reply._request_id
        assert reply.id.removeprefix("chatcmpl-") == raw.request_id.removeprefix("req_")
        assert int(raw.headers["openai-processing-ms"]) > 0
        assert (raw.headers["x-ratelimit-limit-requests"], raw.headers["x-ratelimit-limit-tokens"]) == ("3", "120")
        assert 0 <= int(raw.headers["x-ratelimit-remaining-tokens"]) < 120
        again = client.completions.with_raw_response.create(model=MODEL, prompt="Hello", max_tokens=2)
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in (raw, again)]
        assert left == ["2", "1"] and again.request_id != raw.request_id
        with client.chat.completions.with_streaming_response.create(**{**TALK, "stream": True}) as streamed:
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert streamed.headers["x-ratelimit-remaining-requests"] and streamed.request_id.startswith("req_")
            assert texts(streamed.parse()) == reply.choices[0].message.content


class TestAsync:
    """The same over the other half of the client, which has transport, streams and helpers of its own."""

    def test_chats_completions_and_responses(self, talks, client):
        whole = client.chat.completions.create(**TALK).choices[0].message.content

        async def ask():
            async with openai.AsyncOpenAI(base_url=f"{talks.url}/v1", api_key="unused", max_retries=0) as client:
                chunks = [chunk async for chunk in await client.chat.completions.create(**TALK, stream=True)]
                assert texts(chunks) == whole and chunks[-1].choices[0].finish_reason == "stop"
                prompt = {"model": MODEL, "prompt": "The capital of Poland", "max_tokens": 8, "temperature": 0}
                done = await client.completions.create(**prompt)
                pieces = [chunk async for chunk in await client.completions.create(**prompt, stream=True)]
                assert "".join(piece.choices[0].text for piece in pieces) == done.choices[0].text
                asked = {"model": MODEL, "input": HELLO[0]["content"], "temperature": 0, "max_output_tokens": 24}
                response = await client.responses.create(**asked)
                events = [event async for event in await client.responses.create(**asked, stream=True)]
                assert events[-1].response.output_text == response.output_text == whole
                assert [model.id async for model in client.models.list()] == [MODEL]
                with pytest.raises(openai.BadRequestError) as refused:
                    await client.chat.completions.create(**{**TALK, "top_p": 7})
                assert refused.value.param == "top_p"

        asyncio.run(ask())

    def test_tools_and_structure(self, talks):
        async def ask():
            async with openai.AsyncOpenAI(base_url=f"{talks.url}/v1", api_key="unused", max_retries=0) as client:
                asked = ASK | {"tool_choice": NAMED, "seed": 1}
                reply, chunks = await asyncio.gather(
                    client.chat.completions.create(**asked), client.chat.completions.create(**asked, stream=True)
                )
                (call,) = reply.choices[0].message.tool_calls
                streamed = pieces_of([choice async for chunk in chunks for choice in chunk.choices])
                assert streamed == {(0, 0): [call.id, "get_weather", call.function.arguments]}
                long = TALK | {"max_tokens": 200, "seed": 1}
                parsed = await client.chat.completions.parse(**long, response_format=Weather)
                assert isinstance(parsed.choices[0].message.parsed, Weather)
                async with client.chat.completions.stream(**long, response_format=Weather) as stream:
                    types = {event.type async for event in stream}
                    final = await stream.get_final_completion()
                assert {"chunk", "content.delta", "content.done"} <= types
                assert final.choices[0].message.parsed == parsed.choices[0].message.parsed
                asked = {"model": MODEL, "input": "Weather?", "max_output_tokens": 200, "temperature": 0}
                response = await client.responses.parse(**asked, text_format=Weather)
                async with client.responses.stream(**asked, text_format=Weather) as stream:
                    assert [event.type async for event in stream][-1] == "response.completed"
                    assert (await stream.get_final_response()).output_parsed == response.output_parsed

        asyncio.run(ask())

    def test_retries(self, narrow):
        """Places are free when their holder leaves."""

        async def ask():
            seen = []

            async def answered(response):
                seen.append(response.status_code)
                if response.status_code == 429:
                    await stream.close()

            key = narrow.keys["acme"]
            async with openai.AsyncOpenAI(base_url=f"{narrow.url}/v1", api_key=key, max_retries=0) as client:
                stream = await client.chat.completions.create(**ENDLESS)
                await anext(aiter(stream))
                with pytest.raises(openai.RateLimitError):
                    await client.chat.completions.create(**TALK)
                http_client = httpx2.AsyncClient(event_hooks={"response": [answered]})
                again = client.with_options(max_retries=4, http_client=http_client)
                raw = await again.chat.completions.with_raw_response.create(**TALK)
                assert raw.retries_taken == len(seen) - 1 >= 1 and seen[0] == 429
                assert (await again.chat.completions.with_raw_response.create(**TALK)).retries_taken == 0

        asyncio.run(ask())
