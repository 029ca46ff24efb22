"""Routers die, stand still and leave while their clients stream (F21, F22, F25)."""

import signal
import time

from cluster import wait_until
from load import Client, Record


def test_f21_router_killed(chaos, cluster):
    victim = cluster.routers[1]
    of_victim = lambda record: record.router == 1
    with chaos.row("F21", "SIGKILL of one of two routers", may_fail=of_victim) as row:
        at = victim.kill()
        row.expected_exits.add(victim.name)
        row.injected(victim.popen.returncode == -signal.SIGKILL and "exit by SIGKILL", at)
        row.load.wait_answers(24)
        victim.start()
        row.expected_exits.discard(victim.name)
        cluster.wait_settled()


def test_f21_workers_free_orphans_of_a_killed_router(cluster):
    client = Client(cluster, 1, cluster.protos)
    spec = cluster.baseline.specs["greedy-5"]
    import threading

    record = Record(spec.name, 1, time.monotonic())
    thread = threading.Thread(target=client.ask, args=(spec, record), daemon=True)
    thread.start()
    wait_until(lambda: len(record.tokens) > 5, 30, "the stream runs")
    at = cluster.routers[1].kill()
    thread.join(30)
    assert record.end == "error", "the router is gone, and the stream ended as if all were well"
    left = lambda: {key: n for key, n in worker_gauges(cluster).items() if n}
    wait_until(lambda: not left(), 10, "workers abort what nobody waits for")
    assert time.monotonic() - at < 10
    cluster.routers[1].start()
    cluster.wait_settled()


def worker_gauges(cluster):
    from cluster import OPS, metrics

    return {
        (worker.name, name): metrics(worker.host, OPS).get(name)
        for worker in cluster.workers.values()
        for name in ("tramontane_sequences_running", "tramontane_sequences_waiting")
    }


def test_f22_a_router_that_stood_still_has_a_stale_view(chaos, cluster):
    """Stopped while a worker is replaced; afterwards it plans nothing old and serves on what is new."""
    sleeper, victim = cluster.routers[0], cluster.workers["worker-0"]
    with chaos.row("F22", "a router stopped for 8 s while a worker is lost and comes back", routers=(1,)) as row:
        epoch = cluster.status(1).epoch
        row.injected("state T", sleeper.pause())
        victim.kill()
        row.expected_exits.add(victim.name)
        wait_until(lambda: cluster.status(1).epoch > epoch, 60, "the other router plans without it")
        victim.start()
        row.expected_exits.discard(victim.name)
        sleeper.resume()
        cluster.wait_settled()
        assert cluster.status(0).epoch == cluster.status(1).epoch >= epoch
        row.load.wait_answers(16)


def test_f25_router_sigterm_under_load(chaos, cluster):
    """Not ready first, every stream ends whole, exit 0. New requests go to the other router meanwhile."""
    victim = cluster.routers[1]
    refused = lambda record: record.router == 1 and not record.tokens
    with chaos.row("F25", "SIGTERM of a router under load", may_fail=refused) as row:
        victim.signal(signal.SIGTERM)
        code = victim.popen.wait(60)
        row.expected_exits.add(victim.name)
        row.injected(code == 0 and "exit 0")
        row.load.wait_answers(16)
        victim.start()
        row.expected_exits.discard(victim.name)
        cluster.wait_settled()


def test_f25_worker_sigterm_under_load(chaos, cluster):
    victim = cluster.workers["worker-1"]
    with chaos.row("F25", "SIGTERM of a worker under load") as row:
        victim.signal(signal.SIGTERM)
        code = victim.popen.wait(90)
        row.expected_exits.add(victim.name)
        row.injected(code == 0 and "exit 0")
        row.load.wait_answers(16)
        victim.start()
        row.expected_exits.discard(victim.name)
        cluster.wait_settled()
