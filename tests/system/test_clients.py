"""Clients that others wrote, against the real server: what works with OpenAI works here."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.request

import openai
import pytest
from conftest import ROOT

# LiteLLM's table of prices comes from the package, not from the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
for package in ["langchain_openai", "litellm", "lm_eval"]:
    pytest.importorskip(package, reason="`make clients` installs what this needs")

QUESTION = "What is the capital of Poland?"
ANSWER = "Warsaw"


@pytest.fixture(scope="module")
def model(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused").models.list().data[0].id


class TestLangChain:
    @pytest.fixture
    def chat(self, server, model):
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model=model, base_url=f"{server.url}/v1", api_key="unused", temperature=0, max_retries=0, stream_usage=True
        )

    def test_invokes_streams_and_batches(self, chat):
        whole = chat.invoke(QUESTION)
        assert ANSWER in whole.content
        assert whole.response_metadata["finish_reason"] == "stop"
        chunks = list(chat.stream(QUESTION))
        assert "".join(chunk.content for chunk in chunks) == whole.content
        assert chunks[-1].usage_metadata or any(chunk.usage_metadata for chunk in chunks)
        assert [reply.content for reply in chat.batch([QUESTION] * 3)] == [whole.content] * 3

    def test_waits_without_a_thread(self, chat):
        async def ask():
            return await asyncio.gather(*(chat.ainvoke(QUESTION) for _ in range(4)))

        assert all(ANSWER in reply.content for reply in asyncio.run(ask()))

    def test_structured_output_is_what_it_should_be(self, chat):
        from pydantic import BaseModel, Field

        class City(BaseModel):
            name: str = Field(max_length=12)
            people: int = Field(ge=0, le=9)

        got = chat.with_structured_output(City, method="json_schema").invoke(QUESTION)
        assert isinstance(got, City)

    def test_completions(self, server, model):
        from langchain_openai import OpenAI

        llm = OpenAI(model=model, base_url=f"{server.url}/v1", api_key="unused", temperature=0, max_tokens=8, max_retries=0)
        assert llm.invoke("The capital of Poland") == "".join(llm.stream("The capital of Poland"))


class TestLiteLlm:
    @pytest.fixture
    def ask(self, server, model):
        import litellm

        def ask(**options):
            return litellm.completion(
                model=f"openai/{model}", api_base=f"{server.url}/v1", api_key="unused", max_retries=0, temperature=0,
                messages=[{"role": "user", "content": QUESTION}], **options,
            )

        return ask

    def test_completes_and_streams(self, ask):
        whole = ask()
        assert ANSWER in whole.choices[0].message.content
        streamed = list(ask(stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
        assert text == whole.choices[0].message.content

    def test_its_errors_are_ours(self, server, ask):
        import litellm

        with pytest.raises(litellm.BadRequestError) as raised:
            ask(top_p=7)
        assert "top_p" in str(raised.value)
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(
                model="openai/gpt-9", api_base=f"{server.url}/v1", api_key="unused", max_retries=0,
                messages=[{"role": "user", "content": "hi"}],
            )


def test_lm_eval_scores_and_generates(server, model, tmp_path):
    """Log likelihoods of given answers and free answers, as every published score is made."""
    cases = [
        ("What is the capital of Poland?", "Warsaw", "Paris"),
        ("What is the capital of France?", "Paris", "Warsaw"),
    ]
    data = tmp_path / "capitals.jsonl"
    lines = (json.dumps({"q": q, "choices": [good, bad], "label": 0}) for q, good, bad in cases)
    data.write_text("\n".join(lines) + "\n")
    shared = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        "task: capitals_choose\noutput_type: multiple_choice\n" + shared
        + 'doc_to_text: "{{q}}"\ndoc_to_target: label\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n'
    )
    (tmp_path / "say.yaml").write_text(
        "task: capitals_say\noutput_type: generate_until\n" + shared
        + 'doc_to_text: "{{q}}"\ndoc_to_target: "{{choices[0]}}"\n'
        + 'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 24\n  temperature: 0\n'
        + "metric_list:\n  - metric: exact_match\n"
    )
    out = tmp_path / "out"
    arguments = {
        "model": model, "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote", "max_retries": 1,
        "num_concurrent": 2, "max_length": 256,
    }
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
         ",".join(f"{key}={value}" for key, value in arguments.items()),
         "--tasks", "capitals_choose,capitals_say", "--include_path", tmp_path, "--output_path", out, "--log_samples"],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "unused"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    assert results["capitals_choose"]["sample_len"] == len(cases)
    scored = next(out.rglob("samples_capitals_choose_*.jsonl")).read_text().splitlines()
    for line in map(json.loads, scored):
        for text, (got, _) in zip(line["doc"]["choices"], line["filtered_resps"]):
            expected = likelihood(server, model, line["doc"]["q"], " " + text)
            assert float(got) == pytest.approx(expected, abs=1e-3), text
    samples = next(out.rglob("samples_capitals_say_*.jsonl")).read_text().splitlines()
    assert len(samples) == 2 and all(json.loads(s)["resps"][0][0] for s in samples)


def likelihood(server, model, context, continuation):
    """The same token by token: each is forced and reported as the model sees it, before it is forced."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")

    def ids(text):
        body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
        request = urllib.request.Request(f"{server.url}/tokenize", body, {"content-type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=30).read())["tokens"]

    prompt, whole = ids(context), ids(context + continuation)
    total = 0.0
    for end in range(len(prompt), len(whole)):
        token = whole[end]
        reply = client.completions.create(
            model=model, prompt=whole[:end], max_tokens=1, temperature=0, logprobs=0, logit_bias={str(token): 100},
            extra_body={"ignore_eos": True},
        )
        total += reply.choices[0].logprobs.token_logprobs[0]
    return total
