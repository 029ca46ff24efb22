"""What prompt lookup brings and costs: the same greedy answers by servers that guess 0, 4 and 8 tokens, in turn.

Usage: .venv/bin/python bench/lookup.py [MODEL] [--weights q8] [--threads 2] [--rounds 4]; needs a release binary and etcd.
Two kinds of answers: ones that say again what the prompt says, and free ones, where guesses seldom come true. All servers are
up all the time and asked one after the other; their answers must be the same, letter by letter.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import time
import urllib.request

from cluster import Cluster

GUESSES, BATCHES, TOKENS = (0, 4, 8), (1, 4, 16), 96
PASSAGE = (
    "The harbour town of Vella lies where the river Ombra meets the sea. Its old lighthouse, built in 1873, still warns the boats "
    "that come home at night with mackerel and squid. On Saturdays the fishermen sell their catch on the square below the tower, and "
    "the baker brings warm bread with olives. When the north wind blows, nobody sails, and the children fly their kites on the pier."
)
KINDS = {
    "says again": "Text number {n}:\n" + PASSAGE + "\n\nText number {n} once more, word for word:\n",
    "free": "Story number {n}.\n\nOnce upon a time",
}


def answer(url, prompt):
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=1800) as reply:
        return json.load(reply)["choices"][0]["text"]


def measure(cluster, kind, batch, number):
    """Tokens per second, the answers, and what the worker guessed of it."""
    prompts = [KINDS[kind].format(n=number + i) for i in range(batch)]
    before, began = cluster.metrics(), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(batch) as pool:
        texts = list(pool.map(lambda prompt: answer(cluster.url, prompt), prompts))
    took, after = time.monotonic() - began, cluster.metrics()
    guessed, kept = (after[name] - before[name] for name in ("tramontane_tokens_guessed_total", "tramontane_guesses_true_total"))
    return batch * TOKENS / took, texts, guessed, kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="models/smol")
    parser.add_argument("--weights", default="q8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    clusters = {}
    try:
        for guess in GUESSES:
            settings = {"TRAMONTANE_WORKER__LOOKUP_TOKENS": str(guess)}
            clusters[guess] = Cluster(args.model, args.weights, 1, args.threads, settings)
        print(f"{args.model}, {args.weights}, {args.threads} threads, {TOKENS} tokens each, {args.rounds} rounds, medians")
        for kind in KINDS:
            for batch in BATCHES:
                compare(clusters, kind, batch, args.rounds)
    finally:
        for cluster in clusters.values():
            cluster.stop()


def compare(clusters, kind, batch, num_rounds):
    rounds = []
    for i in range(-1, num_rounds):
        # Who comes first changes; the first round warms up.
        order = GUESSES[i % 3:] + GUESSES[:i % 3]
        rounds.append({guess: measure(clusters[guess], kind, batch, 1000 * (i + 2) + 50 * batch) for guess in order})
        texts = [rounds[-1][guess][1] for guess in GUESSES]
        assert all(text == texts[0] for text in texts), (kind, batch, texts)
    rounds = rounds[1:]
    said = [f"{statistics.median(r[0][0] for r in rounds):.1f} tok/s"]
    for guess in GUESSES[1:]:
        ratios = [r[guess][0] / r[0][0] for r in rounds]
        guessed, kept = (sum(r[guess][i] for r in rounds) for i in (2, 3))
        said.append(
            f"guessing {guess}: x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {kept:.0f} of {guessed:.0f} guesses true"
        )
    print(f"{kind}, {batch} at once: " + "; ".join(said), flush=True)


if __name__ == "__main__":
    main()
