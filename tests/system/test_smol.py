"""Real weights: the SmolLM2 Mixtral (692 M parameters) prints the text that transformers prints, from one and from three workers."""

import json

import openai
import pytest
from conftest import ROOT, Server

MODEL = ROOT / "models" / "smol"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "smol" / "golden.json").read_text())


@pytest.fixture(scope="module", params=[1, 3], ids=["1-worker", "3-workers"])
def client(request):
    server = Server(
        "--model", MODEL, "--model-name", "smol", "--weights", "f32", "--workers", request.param
    )
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=600)
    assert server.stop() == 0


def test_the_text_is_that_of_transformers(client):
    for case in GOLDEN["cases"]:
        answer = client.completions.create(
            model="smol", prompt=case["prompt_ids"], max_tokens=len(case["new_ids"]), temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.choices[0].text == case["text"], case["prompt"]


def test_it_talks(client):
    answer = client.chat.completions.create(
        model="smol", temperature=0, max_tokens=32,
        messages=[{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    )
    assert "Paris" in answer.choices[0].message.content
