#!/usr/bin/env python3
"""Writes a Mixtral with random bf16 weights as Hugging Face safetensors: the size of a real model, the sense of none.

Tensor names are those of MixtralForCausalLM. Every tensor has its own seed, so one preset and seed give the same bytes on
any machine. Never holds more than one tensor in memory.

usage: synth_mixtral.py --preset mid --out DIR --tokenizer tokenizer.model
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import struct
import zlib

import numpy as np

SHARD_BYTES = 1_000_000_000
MAX_POSITION = 32_768
VOCAB = 32_000
EOS = 2


@dataclasses.dataclass(frozen=True)
class Preset:
    hidden: int
    columns: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 8
    topk: int = 2


PRESETS = {
    "tiny": Preset(hidden=64, columns=160, layers=2, heads=4, kv_heads=2, head_dim=16),
    "mid": Preset(hidden=1024, columns=3584, layers=16, heads=16, kv_heads=4, head_dim=64),
    "large": Preset(hidden=2048, columns=7168, layers=12, heads=16, kv_heads=4, head_dim=128),
}


def tensors(p):
    """Yields (name, shape, standard deviation); None for norms, which are ones."""
    queries, keys = p.heads * p.head_dim, p.kv_heads * p.head_dim
    yield "model.embed_tokens.weight", (VOCAB, p.hidden), 1.0
    for i in range(p.layers):
        layer = f"model.layers.{i}."
        yield layer + "self_attn.q_proj.weight", (queries, p.hidden), p.hidden**-0.5
        yield layer + "self_attn.k_proj.weight", (keys, p.hidden), p.hidden**-0.5
        yield layer + "self_attn.v_proj.weight", (keys, p.hidden), p.hidden**-0.5
        yield layer + "self_attn.o_proj.weight", (p.hidden, queries), queries**-0.5
        yield layer + "block_sparse_moe.gate.weight", (p.experts, p.hidden), p.hidden**-0.5
        for e in range(p.experts):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            yield expert + "w1.weight", (p.columns, p.hidden), p.hidden**-0.5
            yield expert + "w2.weight", (p.hidden, p.columns), p.columns**-0.5
            yield expert + "w3.weight", (p.columns, p.hidden), p.hidden**-0.5
        yield layer + "input_layernorm.weight", (p.hidden,), None
        yield layer + "post_attention_layernorm.weight", (p.hidden,), None
    yield "model.norm.weight", (p.hidden,), None
    yield "lm_head.weight", (VOCAB, p.hidden), p.hidden**-0.5


def bf16(x):
    """float32 to bfloat16 bits, nearest even."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def values(name, shape, deviation, seed):
    if deviation is None:
        return bf16(np.ones(shape, np.float32))
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    w = random.standard_normal(shape, dtype=np.float32)
    w *= deviation
    if name == "lm_head.weight":
        # The logit of </s> is zero: greedy decoding of this random model never stops early.
        w[EOS] = 0.0
    return bf16(w)


def shards(p):
    """Tensors in files of about SHARD_BYTES."""
    files, size = [[]], 0
    for tensor in tensors(p):
        num_bytes = 2 * int(np.prod(tensor[1]))
        if files[-1] and size + num_bytes > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += num_bytes
    return files


def write_shard(path, members, seed):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in members:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for name, shape, deviation in members:
            values(name, shape, deviation, seed).tofile(f)


def configuration(p):
    return dict(
        architectures=["MixtralForCausalLM"], model_type="mixtral", hidden_act="silu", torch_dtype="bfloat16",
        hidden_size=p.hidden, intermediate_size=p.columns, num_hidden_layers=p.layers, num_attention_heads=p.heads,
        num_key_value_heads=p.kv_heads, head_dim=p.head_dim, num_local_experts=p.experts, num_experts_per_tok=p.topk,
        vocab_size=VOCAB, max_position_embeddings=MAX_POSITION, rope_theta=1e6, rms_norm_eps=1e-5, sliding_window=None,
        tie_word_embeddings=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=EOS, initializer_range=0.02,
        output_router_logits=False, router_aux_loss_coef=0.02, use_cache=True,
    )


def write(preset, out, tokenizer, seed=1):
    """Writes the model; config.json last, so that a directory that has one is complete."""
    p, out = PRESETS[preset], pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = shards(p)
    index = {}
    for number, members in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_shard(out / name, members, seed)
        index.update({tensor: name for tensor, _, _ in members})
    total = sum(2 * int(np.prod(shape)) for _, shape, _ in tensors(p))
    shutil.copyfile(tokenizer, out / "tokenizer.model")
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for name, content in {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": index},
        "generation_config.json": dict(bos_token_id=1, eos_token_id=EOS),
        "special_tokens_map.json": special,
        "tokenizer_config.json": dict(
            tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=True,
            model_max_length=MAX_POSITION, **special,
        ),
        "config.json": configuration(p),
    }.items():
        (out / name).write_text(json.dumps(content, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece tokenizer.model to copy in")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write(args.preset, args.out, args.tokenizer, args.seed)


if __name__ == "__main__":
    main()
