"""Slow, lossy and clogged links while sixteen streams run (F8, F9, F24)."""

import random
import time

import pytest


@pytest.mark.parametrize("mbit", [1, 10, 100])
def test_f8_slow_link(chaos, cluster, mbit):
    victim = cluster.workers["worker-1"]
    with chaos.row("F8", f"one worker's link at {mbit} Mbit/s") as row:
        with victim.host.rate(mbit) as packets:
            began = time.monotonic()
            row.load.wait_answers(32)
            row.injected(packets() and "packets through the bucket", began)
        row.load.wait_answers(8)
        cluster.wait_settled()


@pytest.mark.parametrize("percent", [1, 5, 20])
def test_f9_lossy_link(chaos, cluster, percent):
    victim = cluster.workers["worker-1"]
    match = f"numgen random mod 100 < {percent}"
    with chaos.row("F9", f"one worker loses {percent} % of its packets, each way") as row:
        with victim.host.filter(match=match) as fault:
            began = time.monotonic()
            row.load.wait_answers(32)
            row.injected(fault.hits() and "packets dropped", began)
        row.load.wait_answers(8)
        cluster.wait_settled()


def test_f24_swizzle_clog(chaos, cluster, request):
    """Clogs some hosts one after the other, unclogs them in another order (FoundationDB's deepest bugs)."""
    rounds = request.config.getoption("--swizzles")
    with chaos.row("F24", "swizzle-clog: workers and etcd members cut off in turn, back in another") as row:
        for seed in range(rounds):
            chance = random.Random(seed)
            hosts = [*cluster.workers.values(), *cluster.etcd.members]
            # Somebody must be left to serve, and most of etcd.
            chosen = chance.sample(hosts[:3], chance.randint(1, 2)) + chance.sample(hosts[3:], chance.randint(0, 1))
            chance.shuffle(chosen)
            faults = []
            for process in chosen:
                context = process.host.filter()
                faults.append((process, context, context.__enter__()))
                # Pauses are part of the fault.
                time.sleep(chance.uniform(0.05, 1.0))
            row.load.wait_answers(4)
            chance.shuffle(faults)
            for process, context, fault in faults:
                row.injected(fault.hits() and "packets dropped")
                context.__exit__(None, None, None)
                time.sleep(chance.uniform(0.05, 1.0))
            cluster.wait_settled(120)
