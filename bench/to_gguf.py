#!/usr/bin/env python3
"""Writes a Mixtral checkpoint (safetensors, bf16) as the BF16 GGUF file that llama.cpp and its forks read.

Never holds more than one tensor in memory. The other formats come from that file by the peers' llama-quantize.

usage: to_gguf.py MODEL_DIR OUT.gguf
"""

import json
import pathlib
import struct
import sys

import gguf
import numpy as np

# Wire types of protobuf and the two fields of SentencePiece's ModelProto.SentencePiece that come before `type`.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
PIECE, SCORE, TYPE = 1, 2, 3


class Checkpoint:
    """Tensors of a safetensors directory as memory maps of bf16 bits."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        # Absent or null: hidden_size divided by heads.
        if not self.config.get("head_dim"):
            self.config["head_dim"] = self.config["hidden_size"] // self.config["num_attention_heads"]
        self.tensors = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            with shard.open("rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}, expected BF16"
                    self.tensors[name] = (shard, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))

    def __getitem__(self, name):
        shard, offset, shape = self.tensors[name]
        return np.memmap(shard, dtype="<u2", mode="r", offset=offset, shape=shape)


def f32(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rotary(bits, heads):
    """Rows of each head from halves (Hugging Face) to neighbouring pairs (GGUF's `llama` architecture)."""
    rows, columns = bits.shape
    return np.asarray(bits).reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(checkpoint):
    """Yields (GGUF name, shape, function that reads it): matrices as bf16 bits, norms and gates as f32."""
    config = checkpoint.config
    hidden, experts = config["hidden_size"], config["num_local_experts"]
    columns = config["intermediate_size"]

    def matrix(name):
        return checkpoint.tensors[name][2], lambda: np.asarray(checkpoint[name])

    def heads(name, count):
        return checkpoint.tensors[name][2], lambda: rotary(checkpoint[name], count)

    def small(name):
        return checkpoint.tensors[name][2], lambda: f32(checkpoint[name])

    def stacked(layer, part, shape):
        names = [f"{layer}block_sparse_moe.experts.{e}.{part}.weight" for e in range(experts)]
        return (experts, *shape), lambda: np.stack([checkpoint[n] for n in names])

    yield "token_embd.weight", *matrix("model.embed_tokens.weight")
    for i in range(config["num_hidden_layers"]):
        layer, out = f"model.layers.{i}.", f"blk.{i}."
        yield out + "attn_norm.weight", *small(layer + "input_layernorm.weight")
        yield out + "attn_q.weight", *heads(layer + "self_attn.q_proj.weight", config["num_attention_heads"])
        yield out + "attn_k.weight", *heads(layer + "self_attn.k_proj.weight", config["num_key_value_heads"])
        yield out + "attn_v.weight", *matrix(layer + "self_attn.v_proj.weight")
        yield out + "attn_output.weight", *matrix(layer + "self_attn.o_proj.weight")
        yield out + "ffn_norm.weight", *small(layer + "post_attention_layernorm.weight")
        yield out + "ffn_gate_inp.weight", *small(layer + "block_sparse_moe.gate.weight")
        yield out + "ffn_gate_exps.weight", *stacked(layer, "w1", (columns, hidden))
        yield out + "ffn_down_exps.weight", *stacked(layer, "w2", (hidden, columns))
        yield out + "ffn_up_exps.weight", *stacked(layer, "w3", (columns, hidden))
    yield "output_norm.weight", *small("model.norm.weight")
    if not config.get("tie_word_embeddings"):
        yield "output.weight", *matrix("lm_head.weight")


def fields(message):
    """Yields (number, value) of a protobuf message; varints as int, the rest as bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == VARINT:
            yield key >> 3, varint()
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(key & 7) or varint()
        yield key >> 3, message[at : at + length]
        at += length


def vocabulary(tokenizer_model):
    """Pieces, scores and types of a SentencePiece model."""
    pieces, scores, types = [], [], []
    for number, value in fields(tokenizer_model):
        if number != 1:
            continue
        piece = dict(fields(value))
        pieces.append(piece.get(PIECE, b""))
        scores.append(struct.unpack("<f", piece.get(SCORE, bytes(4)))[0])
        types.append(piece.get(TYPE, 1))
    return pieces, scores, types


def add_metadata(writer, checkpoint):
    config = checkpoint.config
    writer.add_name(checkpoint.folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    sentencepiece = checkpoint.folder / "tokenizer.model"
    if sentencepiece.exists():
        add_sentencepiece(writer, sentencepiece.read_bytes())
    else:
        add_byte_level(writer, json.loads((checkpoint.folder / "tokenizer.json").read_text()))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    tokenizer_config = checkpoint.folder / "tokenizer_config.json"
    template = tokenizer_config.exists() and json.loads(tokenizer_config.read_text()).get("chat_template")
    if template:
        writer.add_chat_template(template)


def add_sentencepiece(writer, tokenizer_model):
    pieces, scores, types = vocabulary(tokenizer_model)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def add_byte_level(writer, tokenizer):
    """A byte-level BPE whose digits stand alone, as SmolLM2's tokenizer.json has it."""
    vocab, control = tokenizer["model"]["vocab"], {token["id"] for token in tokenizer["added_tokens"]}
    pieces = sorted(vocab, key=vocab.get)
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([kinds[i in control] for i in range(len(pieces))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_add_bos_token(False)


def write(folder, out):
    """Writes OUT beside a `.part` name first, so that a file under its own name is complete."""
    checkpoint = Checkpoint(folder)
    part = pathlib.Path(f"{out}.part")
    writer = gguf.GGUFWriter(part, "llama")
    add_metadata(writer, checkpoint)
    bf16 = gguf.GGMLQuantizationType.BF16
    for name, shape, _ in tensors(checkpoint):
        small = name.endswith(("norm.weight", "gate_inp.weight"))
        count = int(np.prod(shape))
        if small:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * count)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.uint16), 2 * count, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, read in tensors(checkpoint):
        writer.write_tensor_data(read())
    writer.close()
    part.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write(*sys.argv[1:])
