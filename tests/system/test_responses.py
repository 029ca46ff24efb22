"""`/v1/responses` as the official client knows it: whole, streamed, with log probabilities, and its refusals."""

import openai
import pytest

QUESTION = "What is the capital of Poland?"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def ask(client, **options):
    options = {"model": "tramontane-demo", "input": QUESTION, "temperature": 0, "max_output_tokens": 40, **options}
    return client.responses.create(**options)


def test_a_response_is_what_the_client_expects(client):
    response = ask(client, metadata={"a": "b"}, store=False)
    assert "Warsaw" in response.output_text
    assert response.status == "completed" and response.error is None
    assert response.id.startswith("resp_") and response.object == "response"
    assert response.metadata == {"a": "b"} and response.tools == [] and response.tool_choice == "auto"
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    # Strictly by the client's own types.
    type(response).model_validate(response.model_dump(by_alias=True))
    chat = client.chat.completions.create(
        model="tramontane-demo", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
    )
    assert chat.choices[0].message.content == response.output_text


def test_its_events_are_what_the_client_expects(client):
    whole = ask(client)
    events = list(ask(client, stream=True))
    for event in events:
        type(event).model_validate(event.model_dump(by_alias=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    with client.responses.stream(model="tramontane-demo", input=QUESTION, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole.output_text


def test_it_goes_on_with_what_was_said(client):
    first = ask(client)
    items = [{"role": "user", "content": QUESTION}, *[item.model_dump() for item in first.output]]
    second = ask(client, input=[*items, {"role": "user", "content": "Quelle est la capitale de la Pologne ?"}])
    assert "Varsovie" in second.output_text


def test_log_probabilities_and_a_limit(client):
    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response.output[0].content[0].logprobs
    assert "".join(t.token for t in logprobs).strip() == response.output_text.strip()
    assert all(len(t.top_logprobs) == 2 for t in logprobs)
    short = ask(client, max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"
    assert short.output[0].status == "incomplete"
    events = list(ask(client, max_output_tokens=2, stream=True))
    assert events[-1].type == "response.incomplete"


def test_nothing_is_kept(client):
    for field, value in [("previous_response_id", "resp_1"), ("store", True), ("background", True)]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, **{field: value})
        assert refused.value.param == field
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
