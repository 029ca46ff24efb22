"""Drills: real faults under load, in one process and between processes; not one token may differ."""

import json

import pytest
from conftest import Server, run, wait_until
from test_cluster import Cluster, etcd  # noqa: F401 (a fixture)

DRILL_SECONDS = 400


def drill(doors, kind, worker, *flags, check=True):
    """Runs a drill; returns the exit status, the verdict and what was said to the person."""
    admin, grpc = doors
    done = run(
        "drill", kind, worker, "--router", admin, "--grpc", grpc, "--output", "json", *flags,
        check=False, seconds=DRILL_SECONDS,
    )
    verdict = json.loads(done.stdout) if done.stdout else {}
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.returncode, verdict, done.stderr


def doors(server):
    """Where operators and clients come in."""
    return server.admin, server.grpc


def assert_nothing_was_lost(verdict):
    assert verdict["passed"] and verdict["fault_proved"], verdict
    for when in ("before", "during", "after"):
        requests = verdict[when]
        assert requests["requests"] >= len(verdict["stall_ms"]), verdict
        for wrong in ("failed", "lost_tokens", "duplicated_tokens", "changed_tokens"):
            assert requests[wrong] == 0, verdict
    assert verdict["well_again_ms"] is not None


@pytest.fixture(scope="module")
def one_process():
    server = Server("--workers", "3", "--replicas", "2", "--drills")
    yield server
    assert server.alive(), f"the server died:\n{server.output()[-4000:]}"
    assert server.stop() == 0, server.output()[-4000:]


def test_a_slow_worker_changes_nothing(one_process):
    _, verdict, _ = drill(doors(one_process), "slow", "worker-1", "--for", "2s", "--delay", "20ms")
    assert_nothing_was_lost(verdict)
    assert verdict["loss_reported_ms"] is None
    assert verdict["epoch_after"] == verdict["epoch_before"]


def test_a_partition_from_one_peer_changes_nothing(one_process):
    flags = ["--for", "2s", "--peers", "worker-0"]
    _, verdict, _ = drill(doors(one_process), "partition", "worker-1", *flags)
    assert_nothing_was_lost(verdict)


def test_a_worker_that_reaches_no_peer_is_left(one_process):
    """It answers its router all the time; only what it lacks says that its sequences must go on elsewhere."""
    _, verdict, _ = drill(doors(one_process), "partition", "worker-1", "--for", "12s")
    assert_nothing_was_lost(verdict)
    assert max(verdict["stall_ms"]) < 8000, verdict


def test_what_cannot_be_drilled_is_refused_by_name(one_process):
    code, _, said = drill(doors(one_process), "pause", "worker-1", check=False)
    assert code == 4 and "slow or a kill drill" in said, said
    code, _, said = drill(doors(one_process), "slow", "worker-9", check=False)
    assert code == 3 and "worker-9" in said and "workers list" in said, said
    code, _, said = drill(doors(one_process), "slow", "worker-1", "--for", "61s", check=False)
    assert code == 2 and "duration_ms" in said and "60000" in said, said
    code, _, said = drill(doors(one_process), "partition", "worker-1", "--peers", "nobody", check=False)
    assert code == 3 and "nobody" in said, said
    code, _, said = drill(("127.0.0.1:1", "127.0.0.1:1"), "slow", "worker-1", check=False)
    assert code == 5 and "--router" in said, said


def test_a_killed_worker_of_three_changes_nothing(one_process):
    _, verdict, _ = drill(doors(one_process), "kill", "worker-1")
    assert_nothing_was_lost(verdict)
    assert verdict["loss_reported_ms"] is not None
    assert verdict["epoch_after"] > verdict["epoch_before"]
    workers = json.loads(run("workers", "list", "--output", "json", "--router", one_process.admin).stdout)
    assert [w["id"] for w in workers] == ["worker-0", "worker-2"]


def test_drills_are_off_by_default_and_a_lone_worker_wants_a_yes(server):
    code, _, said = drill(doors(server), "kill", "worker-0", check=False)
    assert code == 4 and "worker.drills = true" in said, said
    lone = Server("--workers", "2", "--drills")
    code, _, said = drill(doors(lone), "kill", "worker-0", check=False)
    assert code == 4 and "--yes" in said, said
    assert lone.stop() == 0


def test_a_router_with_keys_is_drilled_by_an_operator(tmp_path):
    keys, settings = tmp_path / "keys", tmp_path / "settings.toml"
    operator = run("keys", "add", "--tenant", "ops", "--operator", "--file", keys).stdout.strip()
    client = run("keys", "add", "--tenant", "acme", "--file", keys).stdout.strip()
    settings.write_text(f'[auth]\nkeys_file = "{keys}"\n')
    server = Server("--workers", "2", "--replicas", "2", "--drills", "--config", settings)
    faint = ["--for", "1s", "--delay", "5ms", "--streams", "2"]
    ask = lambda *flags: drill(doors(server), "slow", "worker-1", *faint, *flags, check=False)
    code, _, said = ask()
    assert code == 1 and "API key is required" in said, said
    code, _, said = ask("--api-key", operator, "--grpc-api-key", "trm_unknown")
    assert code == 1 and "API key is not valid" in said, said
    for flags in (["--api-key", operator], ["--api-key", operator, "--grpc-api-key", client]):
        code, verdict, said = ask(*flags)
        assert code == 0, said
        assert_nothing_was_lost(verdict)
    assert operator not in server.output() and client not in server.output()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def processes(etcd, tmp_path_factory):  # noqa: F811
    settings = tmp_path_factory.mktemp("drill") / "tramontane.toml"
    settings.write_text("[router]\nreplicas = 2\n")
    cluster = Cluster(etcd, "--config", settings, name="drill")
    for name in ("w-0", "w-1", "w-2"):
        cluster.start_worker(name, "--drills")
    try:
        wait_until(lambda: cluster.status().get("survives_one_loss"), 120, "the cluster is safe")
    except AssertionError:
        raise AssertionError(cluster.logs())
    yield cluster
    cluster.kill()


@pytest.mark.parametrize("seconds", [1, 8])
def test_a_process_that_stands_still_changes_nothing(processes, seconds):
    _, verdict, _ = drill(processes.doors(), "pause", "w-1", "--for", f"{seconds}s")
    assert_nothing_was_lost(verdict)
    assert all(worker.alive() for worker in processes.workers.values())


def test_a_killed_process_changes_nothing(processes):
    _, verdict, _ = drill(processes.doors(), "kill", "w-1")
    assert_nothing_was_lost(verdict)
    assert processes.workers["w-1"].popen.wait(10) == -9
    assert verdict["epoch_after"] > verdict["epoch_before"]
    assert processes.workers["w-0"].alive() and processes.workers["w-2"].alive()
