#!/usr/bin/env python3
"""Figures of docs/perf/first.md: decode and prefill of a synthetic Mixtral, one process with two threads against
two workers with one thread each, joined by gRPC and coordinated by etcd. Prints Markdown tables.

usage: first.py MODEL_DIR [--weights bf16 q8] [--batch 1 8 32]   (release binary; etcd on the PATH; 127.0.0.1 only)
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench"))
from cluster import Cluster

DECODE = dict(prompt=16, tokens=64)
PREFILL = dict(prompt=512, tokens=1)


def figures(cluster, batch):
    before = cluster.metrics()
    decode = cluster.bench(batch, DECODE["prompt"], DECODE["tokens"])
    after = cluster.metrics()
    prefill = cluster.bench(batch, PREFILL["prompt"], PREFILL["tokens"])
    gained = {k: after[k] - before.get(k, 0) for k in after}
    rows = decode["prompt_tokens"] + decode["output_tokens"]
    return dict(
        decode=batch * 1000 / decode["itl_ms"]["p50"],
        prefill=prefill["prompt_tokens"] / prefill["seconds"],
        ttft=prefill["ttft_ms"]["p50"],
        bytes=(
            gained.get("tramontane_exchange_bytes_sent_total", 0)
            + gained.get("tramontane_exchange_bytes_received_total", 0)
        ) / rows,
        gained=gained,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", nargs="+", default=["bf16", "q8"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    args = parser.parse_args()
    print("| weights | workers x threads | batch | decode tok/s | prefill tok/s | wire bytes per token |")
    print("|---|---|---|---|---|---|", flush=True)
    shares = []
    for weights in args.weights:
        for workers, threads in ((1, 2), (2, 1)):
            cluster = Cluster(args.model, weights, workers, threads)
            try:
                cluster.bench(1, 16, 8)
                for batch in args.batch:
                    f = figures(cluster, batch)
                    print(
                        f"| {weights} | {workers} x {threads} | {batch} | {f['decode']:.1f} | {f['prefill']:.0f} "
                        f"| {f['bytes']:.0f} |", flush=True,
                    )
                    shares.append((weights, workers, batch, f["gained"]))
            finally:
                cluster.stop()
    print("\nSeconds per worker phase during the decode runs:\n")
    names = sorted(
        k for k in shares[0][3] if k.endswith("_seconds_total") or k in ("tramontane_steps_total", "tramontane_step_seconds_sum")
    )
    print("| weights | workers | batch | " + " | ".join(n.removeprefix("tramontane_") for n in names) + " |")
    print("|---" * (3 + len(names)) + "|")
    for weights, workers, batch, gained in shares:
        cells = " | ".join(f"{gained.get(n, 0):.2f}" for n in names)
        print(f"| {weights} | {workers} | {batch} | {cells} |")


if __name__ == "__main__":
    main()
