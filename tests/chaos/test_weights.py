"""A rolling update under load and its way back: every answer is wholly of one version of the weights."""

import json
import signal
import subprocess
import sys
import time

from cluster import ADMIN, BINARY, ROOT, wait_until
from history import Baseline
from load import Client

sys.path.insert(0, str(ROOT / "tests"))
import other_weights  # noqa: E402

DEMO = ROOT / "models" / "demo"


def tramontane(cluster, *args):
    address = f"{cluster.routers[0].address}:{ADMIN}"
    done = subprocess.run([BINARY, *args, "--router", address], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def weights(cluster):
    return {v["version"]: v for v in json.loads(tramontane(cluster, "weights", "list", "-o", "json"))}


def use(cluster, version):
    tramontane(cluster, "weights", "use", version, "--wait", "--timeout", "120s")
    # Every router, not only the one that was asked.
    for number in range(len(cluster.routers)):
        wait_until(lambda: cluster.status(number).weights == version, 30, f"router {number} lets it serve")


def fingerprint(model):
    shown = subprocess.run([BINARY, "model", "inspect", model, "-o", "json"], capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)["fingerprint"]


def leave(cluster, row, workers):
    """All of them are asked to go; each ends what it runs."""
    for worker in workers:
        worker.signal(signal.SIGTERM)
    for worker in workers:
        code = worker.popen.wait(120)
        if row:
            row.expected_exits.add(worker.name)
        assert code == 0, f"{worker.name}: exit {code}\n{worker.log(3000)}"


def test_rolling_update_and_rollback(chaos, cluster, tmp_path):
    model = other_weights.make(DEMO, tmp_path / "other")
    old, new = fingerprint(DEMO), fingerprint(model)
    assert old != new
    before = list(cluster.workers.values())
    beside = [cluster.add_worker(f"worker-new-{i}", "--model", model) for i in range(3)]
    placed = lambda version: (found := weights(cluster).get(version)) and found["placed"] and found["workers_ready"] == 3
    wait_until(lambda: placed(new), 120, "the new version is placed", every=0.2)
    assert weights(cluster)[old]["serving"], "a newcomer has taken over"
    use(cluster, new)
    others = Baseline(Client(cluster, 0, cluster.protos), list(cluster.baseline.specs.values()))
    differing = sum(others.ids[name] != cluster.baseline.ids[name] for name in others.ids)
    assert differing == len(others.ids), "both versions say the same, nothing could be noticed"
    use(cluster, old)
    leave(cluster, None, beside)
    wait_until(lambda: new not in weights(cluster), 60, "the new version has no workers", every=0.2)
    try:
        with chaos.row("update", "rolling update to other weights under load, and back", others=[others]) as row:
            row.began = time.monotonic()
            for worker in beside:
                worker.start()
            wait_until(lambda: placed(new), 120, "the new version is placed", every=0.2)
            row.load.wait_answers(8)
            assert weights(cluster)[old]["serving"]
            use(cluster, new)
            row.load.wait_answers(16)
            leave(cluster, row, before)
            row.load.wait_answers(16)
            assert cluster.status().weights == new
            # And back: the old version comes beside the new one.
            for worker in before:
                worker.start()
                row.expected_exits.discard(worker.name)
            wait_until(lambda: placed(old), 120, "the old version is placed", every=0.2)
            use(cluster, old)
            row.load.wait_answers(16)
            leave(cluster, row, beside)
            row.load.wait_answers(16)
            row.injected(cluster.status().weights == old and "each version served, all six left with exit 0", row.began)
        answered = row.verdict.by_baseline
        assert min(answered) > 0, f"answers by version: {answered}"
    finally:
        for worker in beside:
            worker.kill()
            cluster.workers.pop(worker.name, None)
            worker.host.remove()
    cluster.wait_settled(120)
