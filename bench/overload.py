"""What ten times the load costs (F18 of docs/reliability.md): goodput, refusals, probes and memory of one server.

Usage: .venv/bin/python bench/overload.py [MODEL] [--weights q8] [--threads 1] [--rounds 6] [--seconds 20]; needs a release binary
and etcd. Rounds with as many clients as the server has places and queue (its capacity) alternate with rounds of ten times as
many. Clients that are refused come again when the answer says so, as official clients do. They share the machine: give the
worker fewer threads than there are cores.
"""

import argparse
import asyncio
import json
import statistics
import time

from cluster import Cluster

PLACES, QUEUE, TIMES, TOKENS = 16, 16, 10, 32
PROBE_EVERY = 0.1
# Seconds in which the clients come.
RAMP = 2


class Connection:
    """HTTP/1.1 with keep-alive, and nothing that would cost the machine more than that."""

    def __init__(self, port):
        self.port, self.writer = port, None

    async def ask(self, method, path, body=b""):
        """Status, headers, body and the seconds until all of them were there."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        began = time.monotonic()
        self.writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await self.reader.readexactly(int(headers["content-length"]))
        took = time.monotonic() - began
        if headers.get("connection") == "close":
            self.writer.close()
            self.writer = None
        return int(lines[0].split(" ")[1]), headers, body, took


class Round:
    """So many clients for so long, once all of them are there."""

    def __init__(self, port, clients, seconds):
        self.port, self.clients, self.seconds = port, clients, seconds
        self.counts, self.is_over = False, False
        self.refused, self.probes, self.late = [], [], []

    async def client(self, number):
        # All at once would be a queue in this process before it is one in the server.
        await asyncio.sleep(RAMP * number / self.clients)
        connection = Connection(self.port)
        body = {"prompt": f"Client {number} says:", "max_tokens": TOKENS, "temperature": 1, "ignore_eos": True}
        while not self.is_over:
            status, headers, answer, took = await connection.ask("POST", "/v1/completions", json.dumps(body).encode())
            if status == 200:
                continue
            assert status == 429, (status, answer)
            if self.counts:
                self.refused.append(took)
            await asyncio.sleep(int(headers["retry-after-ms"]) / 1000)

    async def probe(self):
        connection, due = Connection(self.port), time.monotonic()
        while not self.is_over:
            # How late this process is with what it does itself.
            late = time.monotonic() - due
            status, _, answer, took = await connection.ask("GET", "/health/ready")
            assert status == 200, answer
            if self.counts:
                self.probes.append(took)
                self.late.append(late)
            due = time.monotonic() + PROBE_EVERY
            await asyncio.sleep(PROBE_EVERY)

    async def generated(self):
        """Tokens so far, by the router's count: an answer may take longer than a round."""
        _, _, page, _ = await Connection(self.port).ask("GET", "/metrics")
        lines = page.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("tramontane_router_tenant_generated_tokens_total{"))

    async def run(self):
        working = [asyncio.create_task(work) for work in (self.probe(), *(self.client(number) for number in range(self.clients)))]
        await asyncio.sleep(2 * RAMP)
        before, began, self.counts = await self.generated(), time.monotonic(), True
        await asyncio.sleep(self.seconds)
        after, self.counts, self.is_over = await self.generated(), False, True
        self.rate = (after - before) / (time.monotonic() - began)
        await asyncio.gather(*working)
        return self


def quantiles(values):
    values = sorted(values)
    return " / ".join(f"{1e3 * values[min(int(q * len(values)), len(values) - 1)]:.1f}" for q in (0.5, 0.99, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="models/smol")
    parser.add_argument("--weights", default="q8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    limits = {"TRAMONTANE_ROUTER__SEQUENCES_MAX": str(PLACES), "TRAMONTANE_ROUTER__QUEUE_MAX": str(QUEUE)}
    cluster = Cluster(args.model, args.weights, 1, args.threads, limits)
    port, few = int(cluster.url.rsplit(":", 1)[1]), PLACES + QUEUE
    router = cluster.processes[-1]
    try:
        for clients in (few, few * TIMES):
            asyncio.run(Round(port, clients, args.seconds).run())
        rounds, grown, before = [], [], router.resident()
        for i in range(args.rounds):
            # Who comes first changes.
            order = (few, few * TIMES) if i % 2 == 0 else (few * TIMES, few)
            rounds.append({clients: asyncio.run(Round(port, clients, args.seconds).run()) for clients in order})
            grown.append(router.resident() - before)
    finally:
        cluster.stop()
    shares = [r[few * TIMES].rate / r[few].rate for r in rounds]
    rates = [statistics.median(r[clients].rate for r in rounds) for clients in (few, few * TIMES)]
    refused = [took for r in rounds for took in r[few * TIMES].refused]
    probes = [took for r in rounds for took in r[few * TIMES].probes]
    late = [by for r in rounds for by in r[few * TIMES].late]
    print(f"{args.model}, {args.weights}, {args.threads} threads, {PLACES} places, queue {QUEUE}, {args.rounds} rounds of {args.seconds:.0f} s")
    print(f"goodput: {few} clients {rates[0]:.1f} tok/s, {few * TIMES} clients {rates[1]:.1f} tok/s (medians)")
    print(f"of capacity: {statistics.median(shares):.3f} (median of the rounds' {', '.join(f'{s:.3f}' for s in shares)})")
    print(f"{len(refused)} refused in {quantiles(refused)} ms, {len(probes)} probes in {quantiles(probes)} ms (median / 99 % / slowest)")
    print(f"the clients' own process was late by {quantiles(late)} ms")
    print(f"memory of the router: {before / 2**20:.0f} MiB, then {', '.join(f'{g / 2**20:+.1f}' for g in grown)} MiB after each round")


if __name__ == "__main__":
    main()
