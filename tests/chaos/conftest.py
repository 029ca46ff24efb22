"""One cluster for all rows, the fault-free answers, and the table at the end."""

import contextlib
import importlib
import json
import os
import pathlib
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from cluster import HTTP, OPS, REPORT, ROOT, Cluster, metrics, wait_until  # noqa: E402
from history import Baseline, check  # noqa: E402
from load import Client, Load, specs  # noqa: E402

# A stall beyond this is a hang, however busy the machine is. What a stall should be is in the table.
HANG_SECONDS = 30
IDLE_SECONDS = 15
COLUMNS = ["row", "fault", "times", "requests", "failed", "lost", "duplicated", "changed", "stall ms", "noticed ms", "proof"]


def pytest_addoption(parser):
    parser.addoption("--etcd-outage", type=float, default=20, help="seconds without etcd in F11")
    parser.addoption("--kills", type=int, default=20, help="random kills of the soak")
    parser.addoption("--swizzles", type=int, default=3, help="rounds of clogging in F24")


@pytest.fixture(scope="session")
def protos(tmp_path_factory):
    """Python modules made from /proto, as a user would make them."""
    from grpc_tools import protoc

    out = tmp_path_factory.mktemp("proto")
    files = sorted(str(p) for p in (ROOT / "proto").rglob("*.proto"))
    arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}", *files]
    assert protoc.main(arguments) == 0
    sys.path.insert(0, str(out))

    class Modules:
        inference = importlib.import_module("tramontane.v1.inference_pb2")
        inference_grpc = importlib.import_module("tramontane.v1.inference_pb2_grpc")
        admin = importlib.import_module("tramontane.v1.admin_pb2")
        admin_grpc = importlib.import_module("tramontane.v1.admin_pb2_grpc")

    return Modules


@pytest.fixture(scope="session")
def shared(protos):
    """The cluster that most rows use: three workers that each do everything, two routers, three etcd members."""
    cluster = Cluster(protos)
    cluster.baseline = Baseline(Client(cluster, 0, protos), specs())
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(shared):
    """Whole before the row and whole after it."""
    shared.restore()
    yield shared


@pytest.fixture
def chaos(cluster):
    return Chaos(cluster)


class Chaos:
    def __init__(self, cluster):
        self.cluster = cluster

    @contextlib.contextmanager
    def row(self, number, fault, streams=16, routers=(0, 1), may_fail=lambda record: False, specs_of=None, others=()):
        """Load while the body injects faults; afterwards the history, the gauges and the processes are checked."""
        row = Row(self.cluster, number, fault)
        row.load = Load(self.cluster, self.cluster.baseline, streams, routers, specs_of)
        try:
            row.load.wait_streaming()
            yield row
        finally:
            records = row.load.finish()
        row.verdict = check(records, [self.cluster.baseline, *others], may_fail, row.began or 0.0)
        if others:
            row.proofs.append(f"finished by version: {row.verdict.by_baseline}")
        row.write(records)
        row.judge()


class Row:
    def __init__(self, cluster, number, fault):
        self.cluster, self.number, self.fault = cluster, number, fault
        self.began, self.times, self.noticed, self.proofs = None, 0, [], []
        self.expected_exits = set()

    def injected(self, proof, at=None):
        """Notes a fault that is proved to have happened."""
        assert proof, f"{self.number}: the fault did not happen"
        self.began = self.began or at or time.monotonic()
        self.times += 1
        if proof is not True and str(proof) not in self.proofs:
            self.proofs.append(str(proof))
        return at or time.monotonic()

    def losses(self):
        """How often anybody has noticed that a worker does not answer."""
        total = 0.0
        for host, port, name in self.witnesses():
            with contextlib.suppress(OSError):
                total += metrics(host, port).get(name, 0.0)
        return total

    def witnesses(self):
        for router in self.cluster.routers:
            if router.alive():
                yield router.host, HTTP, "tramontane_router_worker_losses_total"

    def busiest(self):
        """The worker that runs most sequences: its loss is noticed by somebody."""
        running = {}

        def look():
            for worker in self.cluster.workers.values():
                # One that was started just now does not answer yet.
                with contextlib.suppress(OSError):
                    running[worker.name] = metrics(worker.host, OPS).get("tramontane_sequences_running", 0)
            return max(running.values(), default=0) >= 2

        wait_until(look, 30, "a worker runs sequences")
        return self.cluster.workers[max(running, key=running.get)]

    def wait_noticed(self, since, before, seconds=10):
        """Waits until a router has moved a sequence because of the fault."""
        wait_until(lambda: self.losses() > before, seconds, "a router notices the loss", every=0.02)
        self.noticed.append(time.monotonic() - since)

    def write(self, records):
        with open(REPORT / f"{self.number}-history.jsonl", "w") as out:
            for record in records:
                out.write(json.dumps(record.__dict__) + "\n")
        row = {
            "row": self.number, "fault": self.fault, "times": self.times, "requests": self.verdict.requests,
            "failed": self.verdict.failed, "lost": self.verdict.lost, "duplicated": self.verdict.duplicated,
            "changed": self.verdict.changed, "stall ms": round(self.verdict.stall * 1000),
            "noticed ms": round(max(self.noticed) * 1000) if self.noticed else "", "proof": "; ".join(self.proofs),
        }
        with open(REPORT / "rows.jsonl", "a") as out:
            out.write(json.dumps(row) + "\n")

    def judge(self):
        verdict = self.verdict
        assert self.times > 0, "no fault was injected"
        assert verdict.requests > 0, "no request ran"
        assert verdict.clean(), f"{verdict}"
        assert verdict.stall < HANG_SECONDS, f"a stream hung for {verdict.stall:.1f} s"
        # I6
        dead = [p.name for p in self.cluster.processes() if not p.alive() and p.name not in self.expected_exits]
        assert not dead, f"{dead} ended\n" + "".join(p.log(2000) for p in self.cluster.processes() if p.name in dead)
        assert not self.cluster.panics()
        # I4
        with_left = {}

        def idle():
            with_left.clear()
            with_left.update(self.cluster.gauges())
            return not with_left

        try:
            wait_until(idle, IDLE_SECONDS, "gauges are back at idle", every=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}: {with_left}") from None


def table(rows):
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "-|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def pytest_sessionstart(session):
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "rows.jsonl").write_text("")


def pytest_terminal_summary(terminalreporter):
    rows = [json.loads(line) for line in (REPORT / "rows.jsonl").read_text().splitlines()]
    if rows:
        (REPORT / "table.md").write_text(table(rows) + "\n")
        terminalreporter.write_line("\n" + table(rows) + f"\n\nhistories and logs: {os.path.relpath(REPORT, ROOT)}")
