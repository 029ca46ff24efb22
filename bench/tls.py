"""What TLS costs: the same load on a cluster in the clear and on one with TLS at every port, in turn.

Usage: .venv/bin/python bench/tls.py [MODEL] [--weights bf16] [--rounds 6]; needs a release binary and etcd. The demo model is so
small that a token is little more than its way from worker to client, which is what TLS could slow down. Workers of one host
exchange rows over Unix sockets, with TLS or without: that is not measured here.
"""

import argparse
import pathlib
import statistics
import tempfile

from cluster import Cluster
from conftest import run

LOADS = {"one stream": (1, 8, 256), "32 streams": (32, 64, 128)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    certs = pathlib.Path(tempfile.mkdtemp(prefix="certs-"))
    run("certs", "init", "--cluster", "default", "--dir", certs / "all")
    clusters = {}
    try:
        clusters["in the clear"] = Cluster(args.model, args.weights, 2, 1)
        clusters["with TLS"] = Cluster(args.model, args.weights, 2, 1, certs=certs / "all")
        for name, load in LOADS.items():
            compare(clusters, name, *load, args.rounds)
    finally:
        for cluster in clusters.values():
            cluster.stop()


def compare(clusters, name, batch, requests, tokens, num_rounds):
    rounds = []
    for i in range(-1, num_rounds):
        # Who comes first changes; the first round warms up.
        order = list(clusters) if i % 2 else list(reversed(clusters))
        rounds.append({kind: clusters[kind].bench(batch, 32, tokens, requests // batch) for kind in order})
    rounds = rounds[1:]
    plain, secured = ([r[kind]["output_tokens_per_s"] for r in rounds] for kind in clusters)
    ratios = [s / p for s, p in zip(secured, plain)]
    print(f"{name}: in the clear {statistics.median(plain):.0f} tok/s, with TLS {statistics.median(secured):.0f} tok/s (medians); "
          f"x {statistics.median(ratios):.3f} ({', '.join(f'{r:.3f}' for r in ratios)})", flush=True)


if __name__ == "__main__":
    main()
