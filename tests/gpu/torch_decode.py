"""The same steps as `tramontane bench model` in PyTorch: random Mixtral weights, bf16, decode by CUDA graph.

The peer is what somebody writes who knows PyTorch: per layer one RMS norm, fused QKV, scaled_dot_product_attention over a
static cache, and experts either by gathering the chosen ones' weights (few rows, as gpt-fast) or expert by expert
(torch._grouped_mm where it exists, and all experts for all rows); the fastest way counts, and is said. Only the part on the
device is timed: no sampling, no copy to the host.
"""

import argparse
import json
import sys
import time

import torch
from torch.nn import functional as F

HIDDEN, FF, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, VOCAB = 4096, 14336, 32, 8, 128, 8, 2, 32000


class Layer:
    def __init__(self):
        def random(*shape):
            return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).uniform_(-0.035, 0.035)

        self.qkv = random((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
        self.o = random(HIDDEN, HEADS * HEAD_DIM)
        self.gate = random(EXPERTS, HIDDEN)
        self.w13 = random(EXPERTS, 2 * FF, HIDDEN)
        self.w2 = random(EXPERTS, HIDDEN, FF)


def norm(x):
    return F.rms_norm(x, (HIDDEN,), eps=1e-5)


def experts_by_gather(layer, x, weights, ids):
    w13, w2 = layer.w13[ids], layer.w2[ids]  # [rows, top_k, ...]
    gate, up = torch.einsum("th,tkfh->tkf", x, w13).chunk(2, dim=-1)
    y = torch.einsum("tkf,tkhf->tkh", F.silu(gate) * up, w2)
    return (y * weights[..., None]).sum(1)


def experts_by_loop(layer, x, weights, ids):
    """All experts for all rows, weighted by zero where not chosen: no synchronisation, so it can be in a graph."""
    dense = torch.zeros(x.shape[0], EXPERTS, device="cuda", dtype=x.dtype).scatter_(1, ids, weights)
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        gate, up = F.linear(x, layer.w13[e]).chunk(2, dim=-1)
        out += F.linear(F.silu(gate) * up, layer.w2[e]) * dense[:, e : e + 1]
    return out


def experts_grouped(layer, x, weights, ids):
    order = ids.flatten().argsort(stable=True)
    rows = x[order // TOP_K]
    ends = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(rows, layer.w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = torch._grouped_mm(F.silu(gate) * up, layer.w2.transpose(1, 2), offs=ends)
    out = torch.empty_like(y)
    out[order] = y
    return (out.view(-1, TOP_K, HIDDEN) * weights[..., None]).sum(1)


def step(layers, head, x, caches, length, experts):
    rows = x.shape[0]
    for layer, (keys, values) in zip(layers, caches):
        qkv = F.linear(norm(x), layer.qkv)
        q, k, v = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
        q = q.view(rows, HEADS, 1, HEAD_DIM)
        keys[:, :, length - 1] = k.view(rows, KV_HEADS, HEAD_DIM)
        values[:, :, length - 1] = v.view(rows, KV_HEADS, HEAD_DIM)
        y = F.scaled_dot_product_attention(q, keys[:, :, :length], values[:, :, :length], enable_gqa=True)
        x = x + F.linear(y.reshape(rows, HEADS * HEAD_DIM), layer.o)
        z = norm(x)
        weights, ids = F.linear(z, layer.gate).softmax(-1).topk(TOP_K)
        x = x + experts(layer, z, weights / weights.sum(-1, keepdim=True), ids)
    return F.linear(norm(x), head)


def decode(layers, head, batch, context, experts, steps=20):
    length = context + 1
    shape = (batch, KV_HEADS, length, HEAD_DIM)
    caches = [tuple(torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in layers]
    x = torch.randn(batch, HIDDEN, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(layers, head, x, caches, length, experts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layers, head, x, caches, length, experts)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 64, 128, 256])
    args = parser.parse_args()
    layers = [Layer() for _ in range(args.layers)]
    head = torch.empty(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16).uniform_(-0.035, 0.035)
    ways = {"gather": experts_by_gather, "all": experts_by_loop}
    if hasattr(torch, "_grouped_mm"):
        ways["grouped"] = experts_grouped
    lines = []
    for batch in args.batch:
        best = None
        for name, experts in ways.items():
            # Gathered weights are a copy for every row.
            if name == "gather" and batch > 8:
                continue
            try:
                with torch.inference_mode():
                    seconds = decode(layers, head, batch, args.context, experts)
            except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                print(f"{name} at {batch}: {error}", file=sys.stderr)
                torch.cuda.empty_cache()
                continue
            if best is None or seconds < best[1]:
                best = (name, seconds)
        if best:
            lines.append({"rows": batch, "way": best[0], "step_ms": best[1] * 1e3, "tokens_per_second": batch / best[1]})
    print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(), "layers": args.layers, "lines": lines}, indent=2))


if __name__ == "__main__":
    main()
