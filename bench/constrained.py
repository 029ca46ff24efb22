"""What a schema costs: 16 answers at a time, free and by a schema, one after the other in one run of one server.

Usage: .venv/bin/python bench/constrained.py [MODEL] [--weights q8] [--threads 2] [--rounds 6]; needs a release binary and etcd.
Both kinds have the same prompts and the same number of tokens: the schema's array is longer than the limit of tokens, and
free answers go on after their end. Rounds alternate, so that what else the machine does hits both.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import time
import urllib.request

from cluster import Cluster

BATCH, TOKENS = 16, 128
WORD = {"type": "string", "maxLength": 24}
SCHEMA = {
    "type": "array", "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 130}, "email": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.com$"},
            "tags": {"type": "array", "items": {"enum": ["new", "old", "red", "blue"]}, "maxItems": 3},
            "address": {"anyOf": [{"type": "null"}, {
                "type": "object", "properties": {"street": WORD, "number": {"type": "integer"}},
                "required": ["street", "number"], "additionalProperties": False,
            }]},
        },
        "required": ["name", "age", "email", "tags", "address"], "additionalProperties": False,
    },
}
COUNTERS = ("masks_total", "mask_seconds_total", "mask_wait_seconds_total", "step_seconds_count", "step_seconds_sum")


def answer(url, seed, is_constrained):
    body = {
        "prompt": f"List number {seed} of some people as JSON:\n", "max_tokens": TOKENS, "temperature": 1, "seed": seed, "ignore_eos": True,
    }
    if is_constrained:
        body["structured_outputs"] = {"json": SCHEMA}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=1800) as reply:
        usage = json.load(reply)["usage"]
    assert usage["completion_tokens"] == TOKENS, usage
    return usage["completion_tokens"]


def throughput(cluster, seed, is_constrained):
    """Tokens per second, and what the worker's counters say."""
    before, began = cluster.metrics(), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(BATCH) as pool:
        seeds = range(seed, seed + BATCH)
        tokens = sum(pool.map(lambda s: answer(cluster.url, s, is_constrained), seeds))
    took, after = time.monotonic() - began, cluster.metrics()
    counts = {name: after[f"tramontane_{name}"] - before[f"tramontane_{name}"] for name in COUNTERS}
    return tokens / took, counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="models/smol")
    parser.add_argument("--weights", default="q8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    cluster = Cluster(args.model, args.weights, 1, args.threads)
    try:
        for is_constrained in (False, True):
            throughput(cluster, 0, is_constrained)
        rounds = []
        for i in range(args.rounds):
            # Who comes first changes.
            order = (False, True) if i % 2 == 0 else (True, False)
            rounds.append({kind: throughput(cluster, 1000 * (i + 1), kind) for kind in order})
    finally:
        cluster.stop()
    free, bound = ([r[kind][0] for r in rounds] for kind in (False, True))
    costs = [100 * (1 - b / f) for f, b in zip(free, bound)]
    total = {name: sum(r[True][1][name] for r in rounds) for name in COUNTERS}
    print(f"{args.model}, {args.weights}, {args.threads} threads, batch {BATCH}, {TOKENS} tokens each, {args.rounds} rounds")
    print(f"free {statistics.median(free):.1f} tok/s, by a schema {statistics.median(bound):.1f} tok/s (medians)")
    print(f"cost {statistics.median(costs):.1f} % (median of the rounds' {', '.join(f'{c:.1f}' for c in costs)})")
    print(f"a mask takes {1e6 * total['mask_seconds_total'] / total['masks_total']:.0f} us of a thread")
    print(f"a step takes {1e3 * total['step_seconds_sum'] / total['step_seconds_count']:.1f} ms, "
          f"{1e3 * total['mask_wait_seconds_total'] / total['step_seconds_count']:.3f} ms of it waiting for masks")


if __name__ == "__main__":
    main()
