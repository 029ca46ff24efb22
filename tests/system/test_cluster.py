"""Many processes: a 3-node etcd, a router and three workers; one joins, one leaves, no request is lost."""

import concurrent.futures
import json
import pathlib
import shutil
import signal
import threading
import urllib.request

import openai
import pytest
from conftest import BINARY, Process, free_port, run, wait_until


def etcd_healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return json.load(answer)["health"] == "true"
    except OSError:
        return False


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    """Three members on free ports; yields their client URLs."""
    assert shutil.which("etcd"), "etcd is not installed; `make test` installs it"
    members = [(f"etcd-{i}", free_port(), free_port()) for i in range(3)]
    cluster = ",".join(f"{name}=http://127.0.0.1:{peer}" for name, _, peer in members)
    processes = []
    for name, client, peer in members:
        data: pathlib.Path = tmp_path_factory.mktemp(name)
        command = [
            "etcd", "--name", name, "--data-dir", data,
            "--listen-client-urls", f"http://127.0.0.1:{client}",
            "--advertise-client-urls", f"http://127.0.0.1:{client}",
            "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", cluster, "--initial-cluster-state", "new",
            "--heartbeat-interval", "500", "--election-timeout", "5000",
        ]
        processes.append(Process(name, command))
    for _, client, _ in members:
        wait_until(lambda: etcd_healthy(client), 60, "etcd is healthy")
    yield ",".join(f"http://127.0.0.1:{client}" for _, client, _ in members)
    for process in processes:
        process.stop()


class Cluster:
    def __init__(self, etcd, *router_flags, name="test", min_workers=3):
        self.etcd, self.name = etcd, name
        self.http, self.grpc, self.admin = free_port(), free_port(), free_port()
        self.router = Process("router", [
            BINARY, "router", "--etcd", etcd, "--cluster", name, "--host", "127.0.0.1",
            "--http-port", self.http, "--grpc-port", self.grpc, "--admin-port", self.admin,
            "--min-workers", min_workers, *router_flags,
        ])
        self.workers, self.ops = {}, {}

    def start_worker(self, name, *flags, env=None):
        self.ops[name] = free_port()
        self.workers[name] = Process(name, [
            BINARY, "worker", "--etcd", self.etcd, "--cluster", self.name, "--id", name, "--threads", "1",
            "--host", "127.0.0.1", "--grpc-port", free_port(), "--ops-port", self.ops[name], *flags,
        ], env)
        return self.workers[name]

    def doors(self):
        """Where operators and clients come in."""
        return f"127.0.0.1:{self.admin}", f"127.0.0.1:{self.grpc}"

    def list_workers(self):
        done = run("workers", "list", "--output", "json", "--router", f"127.0.0.1:{self.admin}", check=False)
        if done.returncode != 0:
            return {}
        return {w["id"]: w for w in json.loads(done.stdout)}

    def status(self):
        done = run("status", "--output", "json", "--router", f"127.0.0.1:{self.admin}", check=False)
        return json.loads(done.stdout) if done.stdout else {}

    def client(self, **options):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.http}/v1", api_key="unused", **options)

    def kill(self):
        for process in [*self.workers.values(), self.router]:
            if process.alive():
                process.stop(signal.SIGKILL)

    def logs(self):
        parts = [self.router, *self.workers.values()]
        return "\n".join(f"== {p.name}\n{p.output()[-3000:]}" for p in parts)


@pytest.fixture(scope="module")
def cluster(etcd):
    cluster = Cluster(etcd)
    for name in ("w-0", "w-1", "w-2"):
        cluster.start_worker(name)
    try:
        wait_until(lambda: cluster.status().get("ready"), 120, "the cluster is ready")
    except AssertionError:
        raise AssertionError(cluster.logs())
    yield cluster
    cluster.kill()


def ask(client, text, **options):
    options = {"temperature": 0, "max_tokens": 40, **options}
    return client.chat.completions.create(
        model="tramontane-demo", messages=[{"role": "user", "content": text}], **options
    ).choices[0].message.content


class Load:
    """Keeps asking until it is told to stop; collects every answer and every failure."""

    QUESTION = "Tell me a story."

    def __init__(self, cluster, streams):
        self.expected = ask(cluster.client(), self.QUESTION, max_tokens=120)
        self.answers, self.failures = [], []
        self.stopping = threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(streams)
        self.running = [self.pool.submit(self.work, cluster) for _ in range(streams)]

    def work(self, cluster):
        client = cluster.client(max_retries=0)
        while not self.stopping.is_set():
            try:
                self.answers.append(ask(client, self.QUESTION, max_tokens=120))
            except openai.OpenAIError as error:
                self.failures.append(repr(error))

    def finish(self, more):
        """Waits for `more` further answers, then stops."""
        target = len(self.answers) + more
        wait_until(lambda: len(self.answers) >= target or self.failures, 120, "answers keep coming")
        self.stopping.set()
        for running in self.running:
            running.result(120)


def test_three_processes_serve_and_are_listed(cluster):
    assert "Warsaw" in ask(cluster.client(), "What is the capital of Poland?")
    workers = cluster.list_workers()
    assert sorted(workers) == ["w-0", "w-1", "w-2"]
    assert all(w["segments"] > 0 for w in workers.values()), workers
    placement = run("placement", "show", "--router", f"127.0.0.1:{cluster.admin}").stdout
    assert all(name in placement for name in workers)


def test_a_worker_joins_and_takes_experts_while_requests_run(cluster):
    load = Load(cluster, 4)
    cluster.start_worker("w-3")

    def joined():
        worker = cluster.list_workers().get("w-3")
        return worker and worker["state"] == "ready" and worker["segments"] > 0

    wait_until(joined, 60, "w-3 holds experts")
    load.finish(more=8)
    assert not load.failures, f"{load.failures}\n{cluster.logs()}"
    assert set(load.answers) == {load.expected}


def test_a_worker_leaves_by_sigterm_without_a_lost_request(cluster):
    load = Load(cluster, 4)
    assert cluster.workers["w-1"].stop(signal.SIGTERM, seconds=90) == 0, cluster.logs()
    wait_until(lambda: "w-1" not in cluster.list_workers(), 60, "w-1 is gone")
    load.finish(more=8)
    assert not load.failures, f"{load.failures}\n{cluster.logs()}"
    assert set(load.answers) == {load.expected}
    workers = cluster.list_workers()
    assert all(w["segments"] > 0 for w in workers.values())


def test_the_operator_drains_a_worker(cluster):
    router = ["--router", f"127.0.0.1:{cluster.admin}"]
    plan = run("workers", "drain", "w-2", "--dry-run", *router)
    assert "w-2" in plan.stderr and "w-2" in cluster.list_workers()
    run("workers", "drain", "w-2", *router)
    wait_until(lambda: not cluster.workers["w-2"].alive(), 90, "w-2 ends by itself")
    assert cluster.workers["w-2"].popen.returncode == 0
    assert "Warsaw" in ask(cluster.client(), "What is the capital of Poland?")
    unknown = run("workers", "drain", "w-9", *router, check=False)
    assert unknown.returncode != 0 and "w-9" in unknown.stderr
