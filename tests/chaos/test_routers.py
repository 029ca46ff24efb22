"""Routers die, stand still, leave and are replaced while their clients stream (F19, F21, F22, F25)."""

import os
import signal
import time

from cluster import BINARY, wait_until
from load import Client, Record


# The build that is upgraded from; this one where it is not set, which is a rolling restart.
OLD_BINARY = "TRAMONTANE_OLD_BINARY"


def replace(cluster, process, binary):
    """As an operator upgrades one process: ask it to leave, start the other build."""
    process.signal(signal.SIGTERM)
    assert process.popen.wait(90) == 0, process.log(2000)
    process.argv[0] = binary
    process.start()
    cluster.wait_settled()


def is_of(process, binary):
    return os.path.samefile(f"/proc/{process.pid}/exe", binary)


def test_f19_rolling_upgrade(chaos, cluster):
    """Routers first, then workers, one at a time: both builds serve together meanwhile."""
    old = os.environ.get(OLD_BINARY, BINARY)
    processes = [*cluster.routers, *cluster.workers.values()]
    for process in processes:
        replace(cluster, process, old)
        assert is_of(process, old)
    # While a router leaves and comes back it takes nothing new; its clients here do not ask the other one.
    away = []
    refused = lambda record: record.ended and not record.tokens and any(
        cluster.routers[record.router] is process and since <= record.ended <= until for process, since, until in away
    )
    name = "a rolling restart" if old is BINARY else "a rolling upgrade from another build"
    with chaos.row("F19", f"{name}: routers, then workers", may_fail=refused) as row:
        for process in processes:
            row.expected_exits.add(process.name)
            began, before = time.monotonic(), process.pid
            replace(cluster, process, BINARY)
            away.append((process, began, time.monotonic()))
            row.expected_exits.discard(process.name)
            row.injected(is_of(process, BINARY) and process.pid != before and "exit 0, then another process", began)
            row.load.wait_answers(8)


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
