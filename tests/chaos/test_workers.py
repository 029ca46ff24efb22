"""Workers die, hang and are cut off while sixteen streams run (F1 to F5, F7)."""

import contextlib
import itertools
import signal
import time

import pytest
from cluster import wait_until


def kill(row, victim):
    """SIGKILL in the middle of every stream; noticed by a router."""
    before = row.losses()
    row.load.wait_streaming()
    at = victim.kill()
    row.expected_exits.add(victim.name)
    row.injected(victim.popen.returncode == -signal.SIGKILL and "exit by SIGKILL", at)
    return at, before


def bring_back(row, cluster, victim):
    victim.start()
    row.expected_exits.discard(victim.name)
    cluster.wait_settled()


def test_f1_worker_killed_mid_decode(chaos, cluster):
    with chaos.row("F1", "SIGKILL of a worker mid-decode") as row:
        for _ in range(3):
            victim = row.busiest()
            at, before = kill(row, victim)
            row.wait_noticed(at, before)
            row.load.wait_answers(16)
            bring_back(row, cluster, victim)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_f1_worker_with_experts_only(chaos, cluster, how):
    """It has no streams: what is lost are calls, and those go to the other holders."""
    cluster.roles["experts-0"] = "experts"
    victim = cluster.add_worker("experts-0")
    wait_until(lambda: "experts-0" in {w.id for w in cluster.listed().values() if w.segments}, 60, "it holds experts", every=0.1)
    cluster.wait_settled()
    with chaos.row("F1b", f"{how} of a worker that has experts only") as row:
        if how == "SIGKILL":
            row.injected("exit by SIGKILL", victim.kill())
        else:
            row.injected("state T", victim.pause())
        row.expected_exits.add(victim.name)
        row.load.wait_answers(32)
        victim.kill()
        wait_until(lambda: "experts-0" not in cluster.listed(), 30, "its lease ends")
        del cluster.workers["experts-0"]
        victim.host.remove()
        cluster.wait_settled()


def test_f1_worker_with_the_only_copy(chaos, cluster):
    """Nobody else holds its experts: survivors load them, and the steps that need them wait."""
    def copies(count):
        request = cluster.protos.admin.SetIntentRequest(replicas=count)
        cluster.admin().SetIntent(request, timeout=10)

    def is_placed(count):
        status = cluster.status()
        return status.pending_epoch == 0 and status.replicas_min == count

    copies(1)
    wait_until(lambda: is_placed(1), 60, "a placement with one copy", every=0.1)
    try:
        with chaos.row("F1c", "SIGKILL of a worker that holds the only copy of its experts") as row:
            victim = row.busiest()
            kill(row, victim)
            row.load.wait_answers(16)
            victim.start()
            row.expected_exits.discard(victim.name)
    finally:
        copies(2)
        wait_until(lambda: is_placed(2), 60, "a placement with two copies", every=0.1)
    cluster.wait_settled()


def test_f2_worker_killed_mid_prefill(chaos, cluster):
    with chaos.row("F2a", "SIGKILL of a worker mid-prefill", specs_of=["long", "greedy-2", "greedy-5"]) as row:
        for victim in itertools.islice(cluster.workers.values(), 2):
            kill(row, victim)
            row.load.wait_answers(8)
            bring_back(row, cluster, victim)


def test_f2_worker_killed_while_it_joins(chaos, cluster):
    newcomer = cluster.workers.get("worker-9") or cluster.add_worker("worker-9")
    with chaos.row("F2b", "SIGKILL of a worker that joins and loads") as row:
        for _ in range(3):
            wait_until(lambda: "worker-9" in cluster.listed(), 30, "worker-9 registers")
            newcomer.kill()
            row.expected_exits.add(newcomer.name)
            row.injected(newcomer.popen.returncode == -signal.SIGKILL and "exit by SIGKILL")
            wait_until(lambda: "worker-9" not in cluster.listed(), 30, "its lease ends")
            row.load.wait_answers(4)
            newcomer.log_path.write_bytes(b"")
            newcomer.start()
        newcomer.kill()
        wait_until(lambda: "worker-9" not in cluster.listed(), 30, "its lease ends")
        del cluster.workers["worker-9"]
        newcomer.host.remove()
        cluster.wait_settled()


@pytest.mark.parametrize("seconds", [0.5, 2, 30])
def test_f3_worker_stopped(chaos, cluster, seconds):
    with chaos.row("F3", f"SIGSTOP of a worker for {seconds} s") as row:
        victim, before = row.busiest(), row.losses()
        at = victim.pause()
        try:
            row.injected("state T", at)
            if seconds >= 2:
                row.wait_noticed(at, before)
            # The length of the fault, not a wait for something.
            time.sleep(max(0.0, at + seconds - time.monotonic()))
        finally:
            victim.resume()
        row.load.wait_answers(16)
        cluster.wait_settled()


@pytest.mark.parametrize("two_way", [False, True])
def test_f4_workers_cut_off_from_each_other(chaos, cluster, two_way):
    a, b = cluster.workers["worker-0"], cluster.workers["worker-1"]
    name = "two-way" if two_way else "one-way"
    with chaos.row("F4", f"partition between two workers, {name}") as row:
        with a.host.filter(b.host, outgoing=two_way) as fault:
            row.began = time.monotonic()
            row.load.wait_answers(40)
            row.injected(fault.hits() and "packets dropped", row.began)
        row.load.wait_answers(16)
        cluster.wait_settled()


@pytest.mark.parametrize("count", [1, 3])
def test_f5_workers_cut_off_from_etcd(chaos, cluster, count):
    """Their leases end, but they answer: nobody is left, also when all are affected."""
    victims = list(cluster.workers.values())[-count:]
    names = {victim.name for victim in victims}

    def without_lease():
        return {worker.id for worker in cluster.listed().values() if worker.unconfirmed}

    name = "a worker" if count == 1 else "all workers"
    with chaos.row("F5", f"partition between {name} and etcd") as row, contextlib.ExitStack() as faults:
        members = [member.host for member in cluster.etcd.members]
        filters = [faults.enter_context(victim.host.filter(*members)) for victim in victims]
        row.began = time.monotonic()
        wait_until(lambda: without_lease() == names, 30, "their leases end")
        row.load.wait_answers(24)
        row.injected(all(fault.hits() for fault in filters) and "packets dropped, leases ended", row.began)
        faults.close()
        wait_until(lambda: not without_lease() and names <= set(cluster.listed()), 30, "they register again")
        row.load.wait_answers(8)
        cluster.wait_settled()


@pytest.mark.parametrize("verdict", ["drop", "reject with tcp reset"])
def test_f7_router_cut_off_from_a_worker(chaos, cluster, verdict):
    hosts = [router.host for router in cluster.routers]
    name = "packets lost" if verdict == "drop" else "connections reset"
    match = "" if verdict == "drop" else "meta l4proto tcp"
    with chaos.row("F7", f"partition between routers and a worker, {name}") as row:
        victim, before = row.busiest(), row.losses()
        at = time.monotonic()
        with victim.host.filter(*hosts, verdict=verdict, match=match) as fault:
            row.wait_noticed(at, before)
            row.load.wait_answers(24)
            row.injected(fault.hits() and name, at)
        row.load.wait_answers(8)
        cluster.wait_settled()
