"""A group whose attention is of another numeric class than its experts: real processes, real etcd."""

import json
import re
import signal

import pytest
from conftest import BINARY, Process, free_port, run, wait_until
from test_cluster import Cluster, Load, ask, etcd  # noqa: F401

QUESTION = "What is the capital of Poland?"


def own_class(etcd, weights):  # noqa: F811
    """The class that a worker of this machine computes: one that is no part of its group says so."""
    refused = Process("refused", [
        BINARY, "worker", "--etcd", etcd, "--cluster", "nobody", "--weights", weights, "--device", "cpu",
        "--numeric-class", "one+other", "--host", "127.0.0.1", "--grpc-port", free_port(), "--ops-port", free_port(),
    ])
    wait_until(lambda: not refused.alive(), 60, "the worker ends")
    said = refused.output()
    assert refused.popen.returncode == 2, said
    named = re.search(r"numeric_class must be one that names (\S+), which this worker computes, got one\+other", said)
    assert named, said
    return named.group(1)


@pytest.fixture(scope="module")
def classes(etcd):  # noqa: F811
    return own_class(etcd, "bf16"), own_class(etcd, "q4")


def mixed(etcd, name, min_workers):  # noqa: F811
    return Cluster(etcd, name=name, min_workers=min_workers)


def start(cluster, worker, weights, roles, numeric_class):
    flags = ["--device", "cpu", "--weights", weights, "--roles", roles, "--numeric-class", numeric_class]
    return cluster.start_worker(worker, *flags)


def test_experts_of_another_class_outlive_one_of_them(etcd, classes):  # noqa: F811
    bf16, q4 = classes
    cluster = mixed(etcd, "mixed", 2)
    router = ["--router", f"127.0.0.1:{cluster.admin}"]
    try:
        start(cluster, "a", "bf16", "attention", f"{bf16}+{q4}")
        for name in ("e-0", "e-1"):
            start(cluster, name, "q4", "experts", f"{bf16}+{q4}")
        wait_until(lambda: cluster.status().get("ready"), 120, f"the cluster is ready\n{cluster.logs()}")
        workers = cluster.list_workers()
        assert {w["numeric_class"] for w in workers.values()} == {f"{bf16}+{q4}"}
        assert {name: w["segments"] > 0 for name, w in workers.items()} == {"a": False, "e-0": True, "e-1": True}
        assert "Warsaw" in ask(cluster.client(), QUESTION)

        refused = run("workers", "set-roles", "e-0", "attention,experts", *router, check=False)
        assert refused.returncode != 0 and "can have the roles experts" in refused.stderr, refused.stderr

        load = Load(cluster, 4)
        assert cluster.workers["e-1"].stop(signal.SIGKILL) == -signal.SIGKILL
        load.finish(more=8)
        assert not load.failures, f"{load.failures}\n{cluster.logs()}"
        assert set(load.answers) == {load.expected}
        # Somebody of the attention's own class is no part of this group.
        cluster.start_worker("alone", "--device", "cpu", "--weights", "bf16")
        wait_until(lambda: cluster.status().get("incompatible") == ["alone"], 60, "it is named")
    finally:
        cluster.kill()


def test_whoever_attends_has_the_experts_of_the_first_layers(etcd, classes):  # noqa: F811
    bf16, q4 = classes
    cluster = mixed(etcd, "layers", 3)
    try:
        start(cluster, "a", "bf16", "attention,experts", f"{bf16}+{q4}@1")
        for name in ("e-0", "e-1"):
            start(cluster, name, "q4", "experts", f"{bf16}+{q4}@1")
        wait_until(lambda: cluster.status().get("ready"), 120, f"the cluster is ready\n{cluster.logs()}")
        assert "Warsaw" in ask(cluster.client(), QUESTION)
        shown = run("placement", "show", "--output", "json", "--router", f"127.0.0.1:{cluster.admin}").stdout
        placement = json.loads(shown)
        holders = [
            {placement["workers"][holder] for piece in expert for holder in piece["holders"]}
            for expert in placement["experts"]
        ]
        first = placement["num_experts"]
        assert set.union(*holders[:first]) == {"a"}
        assert len(holders) > first and set.union(*holders[first:]) == {"e-0", "e-1"}, holders
        load = Load(cluster, 2)
        assert cluster.workers["e-0"].stop(signal.SIGKILL) == -signal.SIGKILL
        load.finish(more=4)
        assert not load.failures, f"{load.failures}\n{cluster.logs()}"
        assert set(load.answers) == {load.expected}
    finally:
        cluster.kill()
