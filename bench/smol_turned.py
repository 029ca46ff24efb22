"""models/smol in other coordinates: the same function, but weights that no quantiser has seen.

models/smol was made from a Q4_1 file, so its blocks of 32 lie on 16 levels already, and any format with a scale and a
minimum per 32 can find them again and look better than it is. And its width of 576 is no multiple of 256, so
llama.cpp replaces Q4_K by larger types. Here the residual stream is turned (pairs of dimensions by 30 to 60 degrees,
which keeps outliers) and padded to 768 with zeros, 64 in every 256; heads are padded from 9 to 12. Norm weights move
into the matrices behind them. Rounded to bf16, the result is a checkpoint of its own, with its own f32 base.
"""

import json
import shutil

import numpy as np

import to_gguf

SUPER_BLOCK, USED = 256, 192
NUM_HEADS, NUM_KV_HEADS = 12, 4
SHARD_LAYERS = 5


def turn(size, rng):
    """Orthogonal [size, size]: every dimension is mixed with one other."""
    pairs = rng.permutation(size).reshape(-1, 2)
    angle = rng.uniform(np.pi / 6, np.pi / 3, len(pairs))
    matrix = np.zeros((size, size), dtype=np.float32)
    i, j = pairs.T
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def basis(hidden):
    """[padded hidden, hidden]: the new coordinates of the old dimensions."""
    padded = hidden // USED * SUPER_BLOCK
    places = [i // USED * SUPER_BLOCK + i % USED for i in range(hidden)]
    out = np.zeros((padded, hidden), dtype=np.float32)
    out[places] = turn(hidden, np.random.Generator(np.random.PCG64(11)))
    return out


def pad_rows(x, rows):
    return np.concatenate([x, np.zeros((rows - len(x), x.shape[1]), dtype=np.float32)])


def layer(get, prefix, to, config):
    """Yields (name, array) of a layer's tensors in the new coordinates."""
    # The mean square is now one of more dimensions.
    scale = np.float32(np.sqrt(to.shape[1] / to.shape[0]))
    attention, dim = prefix + "self_attn.", config["head_dim"]
    norms = {n: get(f"{prefix}{n}.weight") for n in ("input_layernorm", "post_attention_layernorm")}
    enter = {n: (scale * to * gain).T for n, gain in norms.items()}
    for norm in norms:
        yield f"{prefix}{norm}.weight", np.ones(len(to), dtype=np.float32)
    for name, heads in (("q", NUM_HEADS), ("k", NUM_KV_HEADS), ("v", NUM_KV_HEADS)):
        name = f"{attention}{name}_proj.weight"
        yield name, pad_rows(get(name) @ enter["input_layernorm"], heads * dim)
    o = to @ get(attention + "o_proj.weight")
    yield attention + "o_proj.weight", pad_rows(o.T, NUM_HEADS * dim).T
    moe = prefix + "block_sparse_moe."
    yield moe + "gate.weight", get(moe + "gate.weight") @ enter["post_attention_layernorm"]
    for expert in range(config["num_local_experts"]):
        name = f"{moe}experts.{expert}."
        for part in ("w1", "w3"):
            yield f"{name}{part}.weight", get(f"{name}{part}.weight") @ enter["post_attention_layernorm"]
        yield name + "w2.weight", to @ get(name + "w2.weight")


def ends(get, to, config):
    """Yields what lies before and behind the layers."""
    embed = get("model.embed_tokens.weight")
    head = embed if config["tie_word_embeddings"] else get("lm_head.weight")
    scale = np.float32(np.sqrt(to.shape[1] / to.shape[0]))
    yield "model.embed_tokens.weight", embed @ to.T
    yield "model.norm.weight", np.ones(len(to), dtype=np.float32)
    yield "lm_head.weight", head @ (scale * to * get("model.norm.weight")).T


def bf16(x):
    """float32 to bfloat16 bits, nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_shard(path, named):
    header, offset, tensors = {}, 0, []
    for name, x in named:
        x = bf16(x)
        header[name] = dict(dtype="BF16", shape=list(x.shape), data_offsets=[offset, offset + x.nbytes])
        offset += x.nbytes
        tensors.append(x)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors:
            x.tofile(f)
    return dict.fromkeys(header, path.name)


def write(source, out):
    """Writes the folder OUT from the folder SOURCE; config.json comes last."""
    checkpoint = to_gguf.Checkpoint(source)
    config, index = checkpoint.config, {}
    out.mkdir(parents=True, exist_ok=True)

    def get(name):
        return to_gguf.f32(checkpoint[name])

    to = basis(config["hidden_size"])
    index |= write_shard(out / "model-ends.safetensors", ends(get, to, config))
    for first in range(0, config["num_hidden_layers"], SHARD_LAYERS):
        layers = range(first, min(first + SHARD_LAYERS, config["num_hidden_layers"]))
        named = (pair for i in layers for pair in layer(get, f"model.layers.{i}.", to, config))
        index |= write_shard(out / f"model-layers-{first}.safetensors", named)
    (out / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out / name)
    epsilon = config["rms_norm_eps"] * to.shape[1] / to.shape[0]
    config |= dict(
        hidden_size=len(to), num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_KV_HEADS, rms_norm_eps=epsilon,
        tie_word_embeddings=False,
    )
    (out / "config.json").write_text(json.dumps(config, indent=1))
