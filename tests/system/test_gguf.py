"""GGUF files, written by llama.cpp's own Python package, answer as the safetensors they are made from."""

import json
import shutil
import sys

import gguf
import numpy as np
import openai
import pytest
from conftest import ROOT, Server, run
from safetensors.numpy import save_file

sys.path.insert(0, str(ROOT / "bench"))
import to_gguf  # noqa: E402

DEMO = ROOT / "models" / "demo"
SMOL = ROOT / "models" / "smol"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "smol" / "golden.json").read_text())
PROMPTS = ["Once upon a time", "Die Hauptstadt von Frankreich", " two  spaces, 12 digits\n"]
QUESTION = "What is the capital of Poland?"
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "w1",
    "ffn_down_exps": "w2",
    "ffn_up_exps": "w3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def bf16(folder):
    out = folder / "demo-bf16.gguf"
    to_gguf.write(DEMO, out)
    return out


def quantised(source, out):
    """The same file with its matrices as Q8_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kinds = [gguf.GGUFValueType(kind) for kind in field.types]
        writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, numbers)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_safetensors(source, out):
    """A directory with exactly the numbers of a GGUF file, as f32."""
    out.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, out)
    config = json.loads((out / "config.json").read_text())
    heads = dict(attn_q=config["num_attention_heads"], attn_k=config["num_key_value_heads"])
    tensors = {}
    for tensor in gguf.GGUFReader(source).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in NAMES:
            tensors[NAMES[tensor.name]] = numbers
            continue
        _, layer, part, _ = tensor.name.split(".")
        prefix = f"model.layers.{layer}."
        if part.endswith("_exps"):
            for expert, matrix in enumerate(numbers):
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{NAMES[part]}.weight"] = np.ascontiguousarray(matrix)
            continue
        if part in heads:
            pairs = numbers.reshape(heads[part], -1, 2, numbers.shape[1])
            numbers = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(numbers.shape)
        tensors[f"{prefix}{NAMES[part]}.weight"] = numbers
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def answers(*flags):
    """Texts, tokens and their log probabilities."""
    server = Server("--workers", "1", *flags)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=600)
    model = client.models.list().data[0].id
    said = []
    for prompt in PROMPTS:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0, logprobs=1)
        choice = answer.choices[0]
        said.append((choice.text, choice.logprobs.tokens, choice.logprobs.token_logprobs, answer.usage.prompt_tokens))
    answer = client.chat.completions.create(
        model=model, max_tokens=24, temperature=0, messages=[{"role": "user", "content": QUESTION}]
    )
    said.append((answer.choices[0].message.content, answer.usage.prompt_tokens))
    assert server.stop() == 0
    return said


def test_a_bf16_file_answers_as_its_checkpoint(bf16):
    assert answers("--model", bf16) == answers("--model", DEMO, "--weights", "bf16")


def test_a_q8_0_file_answers_as_a_checkpoint_of_its_numbers(bf16, folder):
    file, directory = folder / "demo-q8_0.gguf", folder / "demo-q8_0"
    quantised(bf16, file)
    as_safetensors(file, directory)
    assert answers("--model", file) == answers("--model", directory, "--weights", "q8")


def test_inspect_and_verify_read_a_file(bf16, tmp_path):
    copy = tmp_path / "model.gguf"
    shutil.copy(bf16, copy)
    theirs, ours = (json.loads(run("model", "inspect", path, "-o", "json").stdout) for path in (DEMO, copy))
    assert ours["geometry"] == theirs["geometry"]
    assert ours["parameters"] == theirs["parameters"]
    run("model", "verify", copy, "--write-manifest")
    assert (tmp_path / "model.gguf.sha256").is_file()
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "sha-256" in run("model", "inspect", copy, check=False).stderr


def test_real_weights_print_the_text_of_transformers(folder):
    file = folder / "smol.gguf"
    to_gguf.write(SMOL, file)
    server = Server("--model", file, "--model-name", "smol", "--weights", "f32", "--workers", "1")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=600)
    for case in [case for case in GOLDEN["cases"] if not case["chat"]]:
        answer = client.completions.create(
            model="smol", prompt=case["prompt"], max_tokens=len(case["new_ids"]), temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage.prompt_tokens == len(case["prompt_ids"])
        assert answer.choices[0].text == case["text"], case["prompt"]
    assert server.stop() == 0
    file.unlink()
