"""Workers without files, and workers whose roles change, as an operator does it: real processes, real etcd."""

import signal
import urllib.request

import pytest
from conftest import BINARY, Process, free_port, run, wait_until
from test_cluster import Cluster, Load, ask, etcd  # noqa: F401

QUESTION = "What is the capital of Poland?"


@pytest.fixture(scope="module")
def cluster(etcd):  # noqa: F811
    cluster = Cluster(etcd, name="roles")
    for name in ("w-0", "w-1", "w-2"):
        # So slow that a transfer can be met in the middle.
        cluster.start_worker(name, env={"TRAMONTANE_WORKER__WEIGHTS_RATE": str(1 << 20)})
    try:
        wait_until(lambda: cluster.status().get("ready"), 120, "the cluster is ready")
    except AssertionError:
        raise AssertionError(cluster.logs())
    yield cluster
    cluster.kill()


def metric(port, name):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"tramontane_{name} ")), 0.0)


def test_a_worker_without_files_outlives_the_peer_that_gives_it_weights(cluster):
    expected = ask(cluster.client(), QUESTION)
    cluster.start_worker("w-new", "--model-from-peers")
    sent = lambda name: metric(cluster.ops[name], "weights_bytes_sent_total")
    giving = lambda: next((name for name in ("w-0", "w-1", "w-2") if sent(name) > 1 << 18), None)
    victim = wait_until(giving, 60, "weights are on their way")
    assert "w-new" not in cluster.list_workers(), "it had its weights already"
    assert cluster.workers[victim].stop(signal.SIGKILL) == -signal.SIGKILL

    def holds():
        worker = cluster.list_workers().get("w-new")
        return worker and worker["state"] == "ready" and worker["segments"] > 0

    wait_until(holds, 120, f"w-new holds experts\n{cluster.logs()}")
    assert metric(cluster.ops["w-new"], "weights_requests_failed_total") > 0
    # Everything from here on is what it has computed.
    for name in ("w-0", "w-1", "w-2"):
        if name != victim:
            assert cluster.workers[name].stop(signal.SIGTERM, seconds=90) == 0, cluster.logs()
    wait_until(lambda: list(cluster.list_workers()) == ["w-new"], 60, "w-new is alone")
    wait_until(lambda: cluster.status().get("ready"), 60, "it serves")
    assert ask(cluster.client(), QUESTION) == expected


def test_a_worker_waits_for_others_and_ends_when_told_to(etcd):  # noqa: F811
    alone = Process("alone", [
        BINARY, "worker", "--etcd", etcd, "--cluster", "nobody", "--id", "alone", "--model-from-peers",
        "--host", "127.0.0.1", "--grpc-port", free_port(), "--ops-port", free_port(),
    ])
    alone.wait_for("waiting for one")
    assert alone.stop(signal.SIGTERM, seconds=30) == 0, alone.output()


def test_roles_change_under_load_and_outlive_a_restart(etcd):  # noqa: F811
    cluster = Cluster(etcd, name="changing")
    router = ["--router", f"127.0.0.1:{cluster.admin}"]
    try:
        for name in ("w-0", "w-1", "w-2"):
            cluster.start_worker(name)
        wait_until(lambda: cluster.status().get("ready"), 120, f"the cluster is ready\n{cluster.logs()}")
        load = Load(cluster, 4)
        plan = run("workers", "set-roles", "w-0", "experts", "--dry-run", *router)
        assert "would have w-0 do experts instead of attention,experts" in plan.stderr
        for name, roles in [("w-0", "experts"), ("w-1", "attention"), ("w-1", "attention,experts")]:
            done = run("workers", "set-roles", name, roles, "--wait", *router, seconds=180)
            assert f"done: {name} does {roles}" in done.stderr
            assert ",".join(cluster.list_workers()[name]["roles"]) == roles
        load.finish(more=8)
        assert not load.failures, f"{load.failures}\n{cluster.logs()}"
        assert set(load.answers) == {load.expected}

        run("workers", "set-roles", "w-1", "experts", "--wait", *router, seconds=180)
        last = run("workers", "set-roles", "w-2", "experts", *router, check=False)
        assert last.returncode == 4 and "attention" in last.stderr and "--force" in last.stderr, last.stderr
        unknown = run("workers", "set-roles", "w-9", "experts", *router, check=False)
        assert unknown.returncode == 3 and "w-9" in unknown.stderr

        assert cluster.workers["w-0"].stop(signal.SIGTERM, seconds=90) == 0, cluster.logs()
        cluster.start_worker("w-0")
        ready = lambda: cluster.list_workers().get("w-0", {}).get("state") == "ready"
        wait_until(ready, 60, "w-0 is back")
        worker = cluster.list_workers()["w-0"]
        assert (worker["roles"], worker["wanted_roles"]) == (["experts"], ["experts"])
        events = run("events", "--last", "1024", *router).stdout
        assert "worker_roles_wanted" in events and "worker_roles_changed" in events
        assert "Warsaw" in ask(cluster.client(), QUESTION)
    finally:
        cluster.kill()
