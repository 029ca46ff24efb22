"""Slow, lossy, late and clogged links while sixteen streams run (F8, F9, F24)."""

import random
import time

import pytest
from cluster import OPS, metrics

# What a relay does to the link of one worker, each way, and what it must have counted.
RELAYED = {
    "packets 50±20 ms late": ({"delay_ms": 50, "jitter_ms": 20}, ["delayed"]),
    "packets 50±20 ms late, overtaking each other": (
        {"delay_ms": 50, "jitter_ms": 20, "in_order": False}, ["delayed", "overtaken"]
    ),
    "10 % of packets come twice": ({"duplicate": 0.1}, ["duplicated"]),
    "1 % of packets have a flipped bit": ({"corrupt": 0.01}, ["corrupted"]),
    "all of these": (
        {"delay_ms": 50, "jitter_ms": 20, "in_order": False, "duplicate": 0.1, "corrupt": 0.01},
        ["delayed", "overtaken", "duplicated", "corrupted"],
    ),
}


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


@pytest.mark.parametrize("what", RELAYED)
def test_f9_link_through_a_relay(chaos, cluster, what):
    """Late, repeated, reordered and spoiled packets cost time; they are no reason to think that anybody is gone."""
    victim = cluster.workers["worker-1"]
    faults, happened = RELAYED[what]
    with chaos.row("F9", f"one worker's link, each way: {what}") as row:
        before = thought_lost(row, cluster)
        with victim.host.relay(seed=9, **faults) as relay:
            began, spoiled = time.monotonic(), checksum_errors(victim.host)
            # A token takes a way there and back for every layer: where that is long, whole answers take minutes.
            row.load.wait_flowing(tokens=32 if "delay_ms" in faults else 200)
            row.injected(relay.did(*happened), began)
            if "corrupt" in faults:
                row.proofs.append(f"{checksum_errors(victim.host) - spoiled} segments refused by their checksum")
        row.load.wait_answers(8)
        cluster.wait_settled()
        assert thought_lost(row, cluster) == before


def checksum_errors(host):
    """TCP segments with a wrong checksum that a host has received."""
    names, values = (line.split() for line in host.run("grep ^Tcp: /proc/net/snmp").splitlines())
    return int(values[names.index("InCsumErrors")])


def thought_lost(row, cluster):
    """What changes when somebody is believed to be gone: sequences moved, placements made, connections given up."""
    connects = {
        worker.name: metrics(worker.host, OPS)["tramontane_exchange_connects_total"] for worker in cluster.workers.values()
    }
    return row.losses(), cluster.status().epoch, connects


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
