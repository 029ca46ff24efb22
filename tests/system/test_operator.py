"""The operator's verbs against real processes: what they change, what they print, how they exit."""

import concurrent.futures
import json
import os
import pty
import signal
import subprocess
import threading
import urllib.request

import openai
import pytest
import yaml
from conftest import BINARY, Process, Server, free_port, run, wait_until
from test_cluster import etcd_healthy

QUESTION = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def serve():
    """Two workers, with room for more."""
    server = Server("--workers", "2", "--threads", "2")
    yield server
    assert server.alive(), server.output()[-4000:]
    assert server.stop() == 0, server.output()[-4000:]


def tramontane(server, *args, check=True):
    return run(*args, "--router", server.admin, check=check, seconds=120)


def read(server, *args):
    return json.loads(tramontane(server, *args, "--output", "json").stdout)


def workers(server):
    return {worker["id"]: worker for worker in read(server, "workers", "list")}


def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def stream(server):
    """The text of one greedy answer, read as a stream."""
    chunks = client(server).chat.completions.create(
        model="tramontane-demo", messages=QUESTION, temperature=0, max_tokens=120, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


class Streams:
    """Keeps streams running; every text must be the one that came when nothing happened."""

    def __init__(self, server, number):
        self.expected = stream(server)
        self.texts, self.failures = [], []
        self.stopping = threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(number)
        self.running = [self.pool.submit(self.work, server) for _ in range(number)]

    def work(self, server):
        while not self.stopping.is_set():
            try:
                self.texts.append(stream(server))
            except openai.OpenAIError as error:
                self.failures.append(repr(error))

    def more(self, number):
        """Waits for so many further texts."""
        target = len(self.texts) + number
        wait_until(lambda: len(self.texts) >= target or self.failures, 120, "texts keep coming")

    def finish(self):
        self.stopping.set()
        for running in self.running:
            running.result(120)
        assert not self.failures, self.failures
        assert set(self.texts) == {self.expected}


def test_yaml_says_what_json_says(serve):
    reads = [
        ("status",), ("workers", "list"), ("workers", "describe", "worker-0"), ("placement", "show"), ("events",),
    ]
    for verb in reads:
        as_json = tramontane(serve, *verb, "-o", "json").stdout
        as_yaml = tramontane(serve, *verb, "-o", "yaml").stdout
        said, same = json.loads(as_json), yaml.safe_load(as_yaml)
        if verb[0] == "status":
            # What moves by itself.
            said.pop("tokens_sampled"), same.pop("tokens_sampled")
        for worker in (w for w in (said, same) if verb[:1] == ("workers",)):
            for row in worker if isinstance(worker, list) else [worker]:
                row.pop("kv_pages_free"), row.pop("sequences_running"), row.pop("sequences_waiting")
        assert same == said, verb
    assert yaml.safe_load(run("config", "check", "-o", "yaml").stdout)
    assert yaml.safe_load(run("model", "inspect", "-o", "yaml").stdout)["geometry"]["num_experts"] == 8


def test_exit_statuses(serve):
    nobody = ["--router", "127.0.0.1:1"]
    cases = [
        (0, ["status"]),
        (2, ["workers", "scale", "0"]),
        (2, ["placement", "apply"]),
        (2, ["status", "--router", "http://[nowhere"]),
        (3, ["workers", "describe", "w-9"]),
        (3, ["workers", "drain", "w-9"]),
        (3, ["workers", "cordon", "w-9"]),
        (3, ["workers", "remove", "w-9"]),
        (4, ["workers", "remove", "worker-0"]),
        (5, ["status", *nobody]),
        (5, ["workers", "list", *nobody]),
        (5, ["top", *nobody]),
    ]
    for expected, args in cases:
        router = [] if "--router" in args else ["--router", serve.admin]
        done = run(*args, *router, check=False)
        assert done.returncode == expected, f"{args}: {done.returncode}\n{done.stderr}"
        if expected > 2:
            assert "\n  try: " in done.stderr, done.stderr
    assert sorted(workers(serve)) == ["worker-0", "worker-1"]


def test_ctrl_c_is_130_and_events_are_followed(serve):
    following = Process("events", [BINARY, "events", "--follow", "-o", "json", "--router", serve.admin])
    following.wait_for(r"router_started")
    tramontane(serve, "workers", "cordon", "worker-1")
    cordoned = following.wait_for(r'\{[^\n]*"worker_cordoned"[^\n]*\}').group(0)
    assert json.loads(cordoned)["worker"] == "worker-1"
    tramontane(serve, "workers", "uncordon", "worker-1", "--wait")
    assert following.stop(signal.SIGINT) == 130


def test_a_cordoned_worker_gives_its_experts_away_and_serving_goes_on(serve):
    dry = tramontane(serve, "workers", "cordon", "worker-1", "--dry-run")
    assert "slices move" in dry.stderr and not workers(serve)["worker-1"]["cordoned"]
    streams = Streams(serve, 2)
    tramontane(serve, "workers", "cordon", "worker-1", "--wait", "--timeout", "60s")
    cordoned = workers(serve)["worker-1"]
    assert cordoned["cordoned"] and cordoned["slices"] == 0 and cordoned["state"] == "ready"
    streams.more(2)
    assert read(serve, "status")["cordoned"] == ["worker-1"]
    tramontane(serve, "workers", "cordon", "worker-0")
    status = tramontane(serve, "status", check=False)
    assert status.returncode == 5 and "cordoned" in status.stdout
    tramontane(serve, "workers", "uncordon", "worker-0")
    tramontane(serve, "workers", "uncordon", "worker-1", "--wait", "--timeout", "60s")
    assert workers(serve)["worker-1"]["slices"] > 0
    streams.stopping.set()
    for running in streams.running:
        running.result(120)
    # While both were cordoned new requests were refused, by the operator's own word.
    assert all("503" in failure for failure in streams.failures), streams.failures
    assert set(streams.texts) == {streams.expected}


def test_workers_are_scaled_up_and_down_under_running_streams(serve):
    assert "would start 2" in tramontane(serve, "workers", "scale", 4, "--dry-run").stderr
    streams = Streams(serve, 4)
    begun = tramontane(serve, "workers", "scale", 4, "--wait", "--timeout", "100s")
    assert "starting worker-2 worker-3" in begun.stderr
    grown = workers(serve)
    assert sorted(grown) == ["worker-0", "worker-1", "worker-2", "worker-3"]
    assert all(w["state"] == "ready" and w["slices"] > 0 for w in grown.values()), grown
    streams.more(6)
    begun = tramontane(serve, "workers", "scale", 2, "--wait", "--timeout", "100s")
    assert "draining worker-3 worker-2" in begun.stderr
    shrunk = workers(serve)
    assert sorted(shrunk) == ["worker-0", "worker-1"]
    assert {w["started"] for w in shrunk.values()} <= {w["started"] for w in grown.values()}, "restarted"
    streams.more(4)
    streams.finish()
    happened = [(e["event"], e["worker"]) for e in read(serve, "events", "--last", 1024)]
    for name in ("worker-2", "worker-3"):
        joined, left = happened.index(("worker_joined", name)), happened.index(("worker_left", name))
        assert joined < left
    assert "worker_lost" not in [kind for kind, _ in happened], happened


def test_a_drained_worker_has_left_when_the_wait_ends(serve):
    late = tramontane(serve, "workers", "scale", 3, "--wait", "--timeout", "1ms", check=False)
    assert late.returncode == 124 and "it goes on" in late.stderr
    tramontane(serve, "workers", "scale", 3, "--wait", "--timeout", "100s")
    tramontane(serve, "workers", "drain", "worker-1", "--wait", "--timeout", "100s")
    assert sorted(workers(serve)) == ["worker-0", "worker-2"]
    # The lowest free number comes next; the drained one counts no more.
    back = tramontane(serve, "workers", "scale", 3, "--wait", "--timeout", "100s")
    assert "starting worker-1" in back.stderr
    tramontane(serve, "workers", "scale", 2, "--wait", "--timeout", "100s")
    assert sorted(workers(serve)) == ["worker-0", "worker-1"]


def test_the_placement_follows_the_operators_wish(serve):
    before = stream(serve)
    dry = tramontane(serve, "placement", "apply", "--replicas", 2, "--dry-run")
    assert "from default to 2" in dry.stderr or "from 1 to 2" in dry.stderr, dry.stderr
    tramontane(serve, "placement", "apply", "--replicas", 2, "--slices", 4, "--wait", "--timeout", "60s")
    status = read(serve, "status")
    assert (status["replicas_min"], status["slices_per_expert"]) == (2, 4), status
    assert status["intent"] == {"replicas": 2, "slices_per_expert": 4}
    assert status["survives_one_loss"] and status["planner"]["settled"]
    assert stream(serve) == before
    tramontane(serve, "placement", "apply", "--replicas", "default", "--slices", "default", "--wait")
    status = read(serve, "status")
    assert status["intent"] == {"replicas": None, "slices_per_expert": None}
    assert status["replicas_min"] == 1, status


def test_top_shows_the_cluster_once_where_there_is_no_terminal(serve):
    text = tramontane(serve, "top").stdout
    assert "worker-0" in text and "tokens/s" in text and "\x1b" not in text
    shown = read(serve, "top", "--once")
    assert shown["status"]["ready"] and len(shown["workers"]) == 2 and shown["events"]
    assert shown["tokens_per_second"] >= 0


def test_top_is_drawn_anew_on_a_terminal_until_ctrl_c(serve):
    terminal, end = pty.openpty()
    top = subprocess.Popen(
        [BINARY, "top", "--router", serve.admin], stdin=end, stdout=end, stderr=subprocess.PIPE, start_new_session=True
    )
    os.close(end)
    try:
        drawn = ""
        while drawn.count("\x1b[H") < 3:
            drawn += os.read(terminal, 65536).decode()
        last = drawn.rsplit("\x1b[H", 2)[1]
        assert "worker-0" in last and "tokens/s" in last and "router_started" not in last.split("EVENT")[0]
        top.send_signal(signal.SIGINT)
        assert top.wait(30) == 130, top.stderr.read()
    finally:
        top.kill()
        os.close(terminal)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """An etcd, a router and two workers as processes; leases long enough to outlast a test."""
    etcd, peer, http, grpc, admin = (free_port() for _ in range(5))
    url = f"http://127.0.0.1:{etcd}"
    store = Process("etcd", [
        "etcd", "--data-dir", tmp_path_factory.mktemp("etcd"), "--listen-client-urls", url,
        "--advertise-client-urls", url, "--listen-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-cluster", f"default=http://127.0.0.1:{peer}",
    ])
    wait_until(lambda: etcd_healthy(etcd), 60, "etcd is healthy")
    router = Process("router", [
        BINARY, "router", "--etcd", url, "--cluster", "operator", "--host", "127.0.0.1",
        "--http-port", http, "--grpc-port", grpc, "--admin-port", admin, "--min-workers", "2",
    ])
    router.url, router.admin = f"http://127.0.0.1:{http}", f"127.0.0.1:{admin}"
    names = ("w-0", "w-1")
    router.workers = {
        name: Process(name, [
            BINARY, "worker", "--etcd", url, "--cluster", "operator", "--id", name, "--threads", "1",
            "--host", "127.0.0.1", "--grpc-port", free_port(), "--ops-port", free_port(),
        ], env={"TRAMONTANE_WORKER__LEASE_TTL": "10m"})
        for name in names
    }

    def ready():
        try:
            with urllib.request.urlopen(f"{router.url}/health/ready", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    wait_until(ready, 120, "the cluster is ready")
    yield router
    for process in [*router.workers.values(), router, store]:
        process.stop(signal.SIGKILL)


def test_a_killed_worker_is_removed_before_its_lease_ends(cluster):
    before = stream(cluster)
    refused = tramontane(cluster, "workers", "scale", 3, check=False)
    assert refused.returncode == 4 and "tramontane worker" in refused.stderr, refused.stderr
    cluster.workers["w-1"].stop(signal.SIGKILL)
    assert workers(cluster)["w-1"]["state"] == "ready", "nobody knows yet"
    removed = tramontane(cluster, "workers", "remove", "w-1", "--wait", "--timeout", "60s")
    assert "out of the records" in removed.stderr
    left = workers(cluster)
    assert list(left) == ["w-0"] and left["w-0"]["slices"] > 0
    wait_until(lambda: read(cluster, "status")["planner"]["settled"], 60, "the placement fits")
    assert stream(cluster) == before
    lost = [e for e in read(cluster, "events") if e["event"] == "worker_lost"]
    assert [e["worker"] for e in lost] == ["w-1"]


def test_closed_pipes_are_no_failure(serve):
    listing = subprocess.Popen(
        [BINARY, "placement", "show", "--router", serve.admin], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    assert listing.wait(60) == 0, listing.stderr.read()
