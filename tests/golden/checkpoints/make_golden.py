#!/usr/bin/env python3
"""Writes tiny Mixtral and Mistral checkpoints with random weights, and what transformers computes from them in f32.

Each case is a Hugging Face directory plus
  golden.json         prompts, 64 greedy tokens of each, and how far from a coin toss they were
  golden.safetensors  logits.I, f32 [tokens of prompt I, vocabulary]
The golden numbers are f32 arithmetic on the stored weights (bf16 and f16 weights are widened exactly), eager
attention, every greedy step computed anew without a cache. A seed is taken when the two best logits of every step
are MARGIN apart and no routing hangs on the last bits.

usage: make_golden.py [CASE ...]   (needs torch, transformers, safetensors; writes beside itself)
"""

import json
import os
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
NEW_TOKENS = 64
MARGIN = 2e-3
ROUTER_MARGIN = 1e-5
PROMPT_TOKENS = (1, 5, 24, 70)  # the last one and its continuation cross two pages of 64
SEEDS = 1000


def rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


BASE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, rope_parameters=rope(1e6),
    sliding_window=None, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)
MIXTRAL = dict(num_local_experts=8, num_experts_per_tok=2)
# name: (experts or None, what differs, stored type, most bytes per shard, write the configuration as in 2023)
CASES = {
    "mixtral-8x2-f32": (MIXTRAL, dict(intermediate_size=40), torch.float32, None, False),
    "mixtral-8x2-bf16": (MIXTRAL, {}, torch.bfloat16, None, False),
    "mixtral-4x1-gqa1": (
        dict(num_local_experts=4, num_experts_per_tok=1),
        dict(num_key_value_heads=4, intermediate_size=64), torch.bfloat16, "40KB", True,
    ),
    "mixtral-6x3-odd": (
        dict(num_local_experts=6, num_experts_per_tok=3),
        dict(hidden_size=72, intermediate_size=100, vocab_size=331, num_attention_heads=6), torch.float16, None, False,
    ),
    "mixtral-headdim-gqa4": (
        dict(num_local_experts=4, num_experts_per_tok=2),
        dict(hidden_size=40, head_dim=16, num_key_value_heads=1), torch.bfloat16, None, False,
    ),
    "mixtral-tied-window": (
        dict(num_local_experts=3, num_experts_per_tok=2),
        dict(tie_word_embeddings=True, sliding_window=20, rope_parameters=rope(1e4)), torch.float32, None, False,
    ),
    "mistral-window": (
        None, dict(intermediate_size=96, sliding_window=16, rope_parameters=rope(1e4), rms_norm_eps=1e-6),
        torch.float32, None, True,
    ),
    "mistral-gqa8": (
        None, dict(num_attention_heads=8, num_key_value_heads=1, head_dim=6, intermediate_size=300), torch.bfloat16,
        None, False,
    ),
}


def gain(name):
    """Gates that decide clearly, attention that is not all on one key: a rounding stays a rounding."""
    gains = {"gate.weight": 3.0, "q_proj.weight": 1.0, "k_proj.weight": 1.0, "lm_head.weight": 1.6}
    return next((g for end, g in gains.items() if name.endswith("." + end) or name == end), 1.2)


def make_model(experts, extra, dtype, seed):
    """A model whose numbers stay of order one through the layers."""
    torch.manual_seed(seed)
    if experts:
        model = MixtralForCausalLM(MixtralConfig(**{**BASE, **experts, **extra}))
    else:
        model = MistralForCausalLM(MistralConfig(**{**BASE, **extra}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.1)
            elif "embed" in name:
                p.normal_(0.0, 0.3 if extra.get("tie_word_embeddings") else 1.0)
            else:
                p.normal_(0.0, gain(name) / p.shape[-1] ** 0.5)
            # Only the weights are rounded: the rotary frequencies stay f32, as they do in a model that is loaded.
            p.copy_(p.to(dtype))
    return model.eval()


def greedy(model, prompt, top_k):
    """Logits of the prompt, the continuation, the smallest gaps; None when a gap is too small."""
    gaps = []

    def gate(_module, _inputs, output):
        p = output[0].float().softmax(-1).sort(-1, descending=True).values
        if p.shape[-1] > top_k:
            gaps.append((p[:, top_k - 1] - p[:, top_k]).min().item())

    hooks = [layer.mlp.gate.register_forward_hook(gate) for layer in model.model.layers] if top_k else []
    tokens, margin, first = list(prompt), float("inf"), None
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
            first = logits if first is None else first
            best = logits[-1].topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            if margin < MARGIN or min(gaps, default=1) < ROUTER_MARGIN:
                break
            tokens.append(int(best.indices[0]))
    for hook in hooks:
        hook.remove()
    if len(tokens) < len(prompt) + NEW_TOKENS:
        return None
    return first, tokens[len(prompt):], margin


def write_old_names(folder):
    """`config.json` as files of 2023 are: rope_theta and torch_dtype at the top, no head_dim, defaults left out."""
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        c = json.load(f)
    c["rope_theta"] = c.pop("rope_parameters")["rope_theta"]
    c["torch_dtype"] = c.pop("dtype")
    c.pop("head_dim", None)
    if c["model_type"] == "mistral":
        del c["rms_norm_eps"]
    else:
        del c["sliding_window"], c["rms_norm_eps"]
    with open(path, "w") as f:
        json.dump(c, f, indent=2)


def make(name):
    experts, extra, dtype, shard, old = CASES[name]
    generator = torch.Generator().manual_seed(11)
    vocab = extra.get("vocab_size", BASE["vocab_size"])
    prompts = [[1] + torch.randint(3, vocab, (n - 1,), generator=generator).tolist() for n in PROMPT_TOKENS]
    top_k = experts["num_experts_per_tok"] if experts else 0
    for seed in range(SEEDS):
        model = make_model(experts, extra, dtype, seed)
        runs = []
        for prompt in prompts:
            runs.append(greedy(model, prompt, top_k))
            if runs[-1] is None:
                break
        if all(runs):
            break
    else:
        sys.exit(f"{name}: no seed below {SEEDS} keeps its margins")
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, **(dict(max_shard_size=shard) if shard else {}))
    if old:
        write_old_names(folder)
    save_file({f"logits.{i}": r[0].contiguous() for i, r in enumerate(runs)}, os.path.join(folder, "golden.safetensors"))
    cases = [dict(prompt=p, greedy=r[1], min_margin=round(r[2], 5)) for p, r in zip(prompts, runs)]
    about = dict(transformers=transformers.__version__, torch=torch.__version__, seed=seed, cases=cases)
    with open(os.path.join(folder, "golden.json"), "w") as f:
        f.write(json.dumps(about) + "\n")
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(name, "seed", seed, "margin", min(c["min_margin"] for c in cases), "bytes", size, flush=True)


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        make(name)


if __name__ == "__main__":
    main()
