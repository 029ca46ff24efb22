"""Full disks, broken checkpoints, full caches, no memory and jumping clocks while sixteen streams run (F13 to F15, F20)."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from cluster import BINARY, OPS, ROOT, metrics, wait_until
from memory import MemoryGroup, may_limit_memory
from net import sh

DEMO = ROOT / "models" / "demo"


# Room for what processes write down, and not much more.
DISK = "128k"


@contextlib.contextmanager
def small_disk(path):
    """A disk of its own; whoever still writes to it at the end does so into the void."""
    path.mkdir()
    sh(f"mount -t tmpfs -o size={DISK} none {path}")
    try:
        yield path
    finally:
        sh(f"umount -l {path}")


def fill(disk):
    """Until nothing more fits, not even a byte."""
    with (disk / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 512)
    return f"{os.statvfs(disk).f_bavail} blocks free"


def refuse_writes(disk):
    sh(f"mount -o remount,ro {disk}")
    with pytest.raises(OSError):
        (disk / "new").touch()
    return "a write is refused"


def test_f13_disks_that_take_nothing(chaos, cluster, tmp_path):
    """Neither what processes write down for the next start nor their logs go anywhere: whoever serves needs no disk."""
    victims = [cluster.workers["worker-1"], cluster.routers[1]]
    log_paths = [victim.log_path for victim in victims]
    with small_disk(tmp_path / "state") as state, small_disk(tmp_path / "logs") as logs:
        for victim in victims:
            victim.log_path = logs / victim.log_path.name
            restart(cluster, victim, {"TRAMONTANE_ETCD__STATE_DIR": str(state)})
        written = lambda: {path.name: path.read_text() for path in state.glob("*.json")}
        try:
            wait_until(lambda: len(written()) == 2, 30, "both have written down what they know")
            with chaos.row("F13", "the disks of a worker and a router are full, then read-only; their logs too") as row:
                for fault in (fill, refuse_writes):
                    fill(logs)
                    proof, before = fault(state), written()
                    change_placement(row, cluster)
                    row.injected(written() == before and f"{fault.__name__.replace('_', ' ')}: {proof}, nothing was written")
                    row.load.wait_answers(8)
            sh(f"mount -o remount,rw {state} && rm {state}/filler {logs}/filler")
            wait_until(lambda: all(written()[name] != text for name, text in before.items()), 30, "both write again")
        finally:
            for victim, log_path in zip(victims, log_paths):
                victim.log_path = log_path
                restart(cluster, victim, {})


def change_placement(row, cluster):
    """A worker is gone long enough to be planned out, and comes back."""
    victim, epoch = cluster.workers["worker-0"], cluster.status(0).epoch
    victim.kill()
    row.expected_exits.add(victim.name)
    wait_until(lambda: cluster.status(0).epoch > epoch, 60, "the planner plans without it", every=0.1)
    victim.start()
    row.expected_exits.discard(victim.name)
    cluster.wait_settled()


def flip_a_byte(model):
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x10
    weights.write_bytes(data)


def truncate(model):
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)


def other_shape(model):
    config = model / "config.json"
    config.write_text(config.read_text().replace('"num_local_experts": 8', '"num_local_experts": 7'))


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, other_shape])
def test_f14_corrupt_checkpoint(chaos, cluster, tmp_path, damage):
    """A worker whose files are damaged never serves, and says what is wrong."""
    model = tmp_path / "demo"
    shutil.copytree(DEMO, model)
    subprocess.run([BINARY, "model", "verify", model, "--write-manifest"], check=True, capture_output=True)
    damage(model)
    with chaos.row("F14", f"a worker joins with a damaged checkpoint: {damage.__name__.replace('_', ' ')}", streams=8) as row:
        broken = cluster.add_worker("worker-broken", "--model", model)
        row.expected_exits.add(broken.name)
        code = broken.popen.wait(60)
        said = broken.log().strip().splitlines()[-1:]
        row.injected(code not in (0, None) and f"exit {code}")
        assert said and "panicked" not in broken.log(), broken.log(2000)
        assert "worker-broken" not in cluster.listed()
        row.load.wait_answers(8)
        del cluster.workers["worker-broken"]
        broken.host.remove()


@pytest.mark.parametrize("killed", [False, True])
def test_f14_weights_from_peers(chaos, cluster, killed):
    """A worker that has no files takes its weights from others; whoever gives them may die meanwhile."""
    # Slow enough that a transfer can be met in the middle.
    for worker in cluster.workers.values():
        restart(cluster, worker, {"TRAMONTANE_WORKER__WEIGHTS_RATE": str(1 << 20)})
    cluster.roles["worker-new"] = "attention,experts"
    sent = lambda worker: metrics(worker.host, OPS).get("tramontane_weights_bytes_sent_total", 0)
    fault = "the peer that gives them is killed by SIGKILL" if killed else "none of them is lost"
    try:
        with chaos.row("F14b", f"a worker without files takes its weights from others; {fault}") as row:
            row.began = time.monotonic()
            old = list(cluster.workers.values())
            newcomer = cluster.add_worker("worker-new", "--model-from-peers")
            victim = wait_until(lambda: next((w for w in old if sent(w) > 1 << 18), None), 60, "weights are on their way")
            if killed:
                assert "worker-new" not in cluster.listed(), "it had its weights already"
                at = victim.kill()
                row.expected_exits.add(victim.name)
                row.injected(victim.popen.returncode == -signal.SIGKILL and "exit by SIGKILL", at)
            holds = lambda: cluster.listed().get("worker-new") and cluster.listed()["worker-new"].segments
            wait_until(holds, 180, "worker-new holds experts", every=0.2)
            if killed:
                victim.start()
                row.expected_exits.discard(victim.name)
            cluster.wait_settled(180)
            page = metrics(newcomer.host, OPS)
            taken, failed = (page[f"tramontane_weights_{name}_total"] for name in ("bytes_received", "requests_failed"))
            assert (failed > 0) == killed, newcomer.log(4000)
            row.injected(taken > 4 << 20 and f"{taken / (1 << 20):.0f} MiB taken")
            row.load.wait_answers(32)
            row.expected_exits.add(newcomer.name)
            assert newcomer.stop() == 0
            del cluster.workers["worker-new"]
            newcomer.host.remove()
            cluster.wait_settled(120)
    finally:
        for worker in cluster.workers.values():
            restart(cluster, worker, {})


def test_f15_kv_cache_full(chaos, cluster):
    """Pages for a fraction of what runs: sequences are preempted and computed again, none fails."""
    victim = cluster.workers["worker-2"]
    restart(cluster, victim, {"TRAMONTANE_WORKER__NUM_PAGES": "34"})
    others = [cluster.workers[name] for name in ("worker-0", "worker-1")]
    for other in others:
        restart(cluster, other, {"TRAMONTANE_WORKER__NUM_PAGES": "34"})
    try:
        with chaos.row("F15", "KV cache of 34 pages a worker for 32 streams", streams=32) as row:
            preempted = lambda: sum(metrics(w.host, OPS).get("tramontane_preemptions_total", 0) for w in cluster.workers.values())
            row.load.wait_answers(64)
            row.injected(preempted() and f"{preempted():.0f} preemptions")
    finally:
        for worker in cluster.workers.values():
            restart(cluster, worker, {})


@pytest.mark.skipif(not may_limit_memory(), reason="no memory control group of version 1 that may be written")
def test_f15_out_of_memory(chaos, cluster):
    """The kernel kills a worker that asks for a page too many: as any other death."""
    victim = cluster.workers["worker-1"]
    group = MemoryGroup(f"chaos-{os.getpid()}-{victim.name}")
    try:
        assert victim.stop() == 0, victim.log(2000)
        victim.start()
        group.take(victim.pid)
        cluster.wait_settled()
        with chaos.row("F15", "a worker runs out of memory and is killed by the kernel") as row:
            row.expected_exits.add(victim.name)
            squeezed = lambda: group.squeeze() or victim.popen.poll() is not None
            wait_until(squeezed, 60, "the kernel kills it")
            assert victim.popen.returncode == -signal.SIGKILL, victim.log(2000)
            row.injected(group.kills() and f"{group.kills()} process killed in its control group")
            row.load.wait_answers(16)
            victim.start()
            row.expected_exits.discard(victim.name)
            cluster.wait_settled()
    finally:
        group.remove()


def test_f20_clock_jumps(chaos, cluster, tmp_path):
    """The wall clock of a worker and a router jumps by two hours, forth and back, while they run."""
    offset = tmp_path / "offset"
    offset.write_text("+0")
    library = next(pathlib.Path("/usr/lib").rglob("libfaketime.so.1"), None)
    assert library, "libfaketime is not installed; `make chaos` installs it"
    env = {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    victims = [cluster.workers["worker-1"], cluster.routers[1]]
    for victim in victims:
        restart(cluster, victim, env)
    try:
        with chaos.row("F20", "the wall clock of a worker and a router jumps by +2 h, -2 h") as row:
            for jump in ("+2h", "-2h", "+0"):
                offset.write_text(jump)
                row.load.wait_answers(24)
                row.injected(wait_until(lambda: shifted(victims[0], jump), 30, f"the worker's clock shows {jump}"))
            row.proofs.append("times in the logs shifted")
            assert all(worker.state == "ready" for worker in cluster.listed().values())
    finally:
        for victim in victims:
            restart(cluster, victim, {})


def shifted(process, jump):
    """Whether the process's clock is off by `jump`, as another process with the same library sees it."""
    shown = subprocess.run(["date", "+%s"], env=process.env, capture_output=True, text=True, check=True).stdout
    real = subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True).stdout
    hours = round((int(shown) - int(real)) / 3600)
    return hours == {"+2h": 2, "-2h": -2, "+0": 0}[jump]


def restart(cluster, process, env):
    """Ends a process as an operator would, and starts it in another environment."""
    assert process.stop() == 0, process.log(2000)
    base = getattr(process, "base_env", process.env)
    process.base_env = base
    process.env = {**base, **env}
    process.start()
    cluster.wait_settled()
