#!/usr/bin/env python3
"""Figures of docs/perf/first.md: decode and prefill of a synthetic Mixtral, one process with two threads against
two workers with one thread each, joined by gRPC and coordinated by etcd. Prints Markdown tables.

usage: first.py MODEL_DIR [--weights bf16 q8] [--batch 1 8 32]   (release binary; etcd on the PATH; 127.0.0.1 only)
"""

import argparse
import json
import pathlib
import re
import sys
import tempfile
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "system"))
import conftest
from conftest import Process, free_port, run, wait_until

conftest.BINARY = conftest.TARGET / "release" / "tramontane"
DECODE = dict(prompt=16, tokens=64)
PREFILL = dict(prompt=512, tokens=1)


class Cluster:
    """An etcd, a router and workers as processes, so that every worker has its metrics."""

    def __init__(self, model, weights, workers, threads):
        client, peer = free_port(), free_port()
        self.http, router_grpc = free_port(), free_port()
        etcd = f"http://127.0.0.1:{client}"
        self.processes = [Process("etcd", [
            "etcd", "--data-dir", tempfile.mkdtemp(prefix="etcd-"), "--listen-client-urls", etcd,
            "--advertise-client-urls", etcd, "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{peer}",
        ])]
        # One worker owns the sequences; all of them hold experts.
        self.ops = []
        for i in range(workers):
            self.ops.append(free_port())
            self.processes.append(Process(f"worker-{i}", [
                conftest.BINARY, "worker", "--model", model, "--model-name", "bench", "--etcd", etcd,
                "--id", f"w-{i}", "--weights", weights, "--threads", threads, "--grpc-port", free_port(),
                "--ops-port", self.ops[-1],
            ]))
        self.processes.append(Process("router", [
            conftest.BINARY, "router", "--model", model, "--model-name", "bench", "--etcd", etcd,
            "--http-port", self.http, "--grpc-port", router_grpc, "--min-workers", workers,
        ]))
        wait_until(self.ready, 600, "the cluster is ready")

    def ready(self):
        assert all(p.alive() for p in self.processes), "\n".join(p.output()[-2000:] for p in self.processes)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/health/ready", timeout=5):
                return True
        except OSError:
            return False

    def metrics(self):
        """All workers' metrics, added up."""
        total = {}
        for port in self.ops:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if match := re.match(r"(\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", line):
                        total[match[1]] = total.get(match[1], 0) + float(match[2])
        return total

    def bench(self, batch, prompt, tokens, rounds=1):
        done = run(
            "bench", "--url", f"http://127.0.0.1:{self.http}", "--concurrency", batch, "--requests", batch * rounds,
            "--prompt-tokens", prompt, "--max-tokens", tokens, "--vocab", 32000, "--seed", self.seed(),
            "--output", "json", seconds=900,
        )
        return json.loads(done.stdout)

    def seed(self):
        # Every run has prompts that no cache has seen.
        Cluster.seeds = getattr(Cluster, "seeds", 0) + 1
        return Cluster.seeds

    def stop(self):
        for process in reversed(self.processes):
            process.popen.kill()
            process.popen.wait()


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
