"""Two versions of the weights side by side: a rolling update and its way back, with real processes."""

import json
import signal
import sys
import threading
import urllib.request

import openai
import pytest
from conftest import BINARY, ROOT, Process, free_port, run, wait_until
from test_cluster import etcd_healthy

sys.path.insert(0, str(ROOT / "tests"))
import other_weights  # noqa: E402

DEMO = ROOT / "models" / "demo"
QUESTION = [{"role": "user", "content": "Tell me a story."}]


class Cluster:
    """An etcd, two routers, and workers that come and go."""

    def __init__(self, tmp_path):
        etcd, peer = free_port(), free_port()
        url = f"http://127.0.0.1:{etcd}"
        self.etcd = url
        self.store = Process("etcd", [
            "etcd", "--data-dir", tmp_path / "etcd", "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{peer}",
        ])
        wait_until(lambda: etcd_healthy(etcd), 60, "etcd is healthy")
        self.routers, self.workers = [], {}
        for number in range(2):
            http, grpc, admin = free_port(), free_port(), free_port()
            router = Process(f"router-{number}", [
                BINARY, "router", "--etcd", url, "--cluster", "weights", "--host", "127.0.0.1",
                "--http-port", http, "--grpc-port", grpc, "--admin-port", admin, "--min-workers", "2",
            ], env={"TRAMONTANE_ROUTER__SETTLE_TIME": "500ms"})
            router.url, router.admin = f"http://127.0.0.1:{http}", f"127.0.0.1:{admin}"
            self.routers.append(router)

    def start(self, name, *flags):
        self.workers[name] = Process(name, [
            BINARY, "worker", "--etcd", self.etcd, "--cluster", "weights", "--id", name, "--threads", "1",
            "--weights", "q8", "--host", "127.0.0.1", "--grpc-port", free_port(), "--ops-port", free_port(), *flags,
        ])

    def tramontane(self, *args, check=True):
        return run(*args, "--router", self.routers[0].admin, check=check, seconds=120)

    def read(self, *args):
        return json.loads(self.tramontane(*args, "-o", "json").stdout)

    def weights(self):
        return {version["version"]: version for version in self.read("weights", "list")}

    def ready(self):
        try:
            for router in self.routers:
                with urllib.request.urlopen(f"{router.url}/health/ready", timeout=2):
                    pass
            return True
        except OSError:
            return False

    def client(self, router=0):
        url = f"{self.routers[router].url}/v1"
        return openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120)

    def kill(self):
        for process in [*self.workers.values(), *self.routers, self.store]:
            process.stop(signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    for name in ("old-0", "old-1"):
        cluster.start(name)
    wait_until(cluster.ready, 120, "the cluster is ready")
    yield cluster
    cluster.kill()


def ask(client, **options):
    """The text of an answer and the version that it is of."""
    answer = client.chat.completions.create(
        model="tramontane-demo", messages=QUESTION, temperature=0, max_tokens=120, **options
    )
    return answer.choices[0].message.content, answer.system_fingerprint


class Load:
    """Asks both routers all the time; every answer must be wholly of one version."""

    def __init__(self, cluster, expected):
        self.expected, self.answers, self.failures = expected, [], []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.work, args=(cluster.client(i % 2),)) for i in range(4)]
        for thread in self.threads:
            thread.start()

    def work(self, client):
        while not self.stopping.is_set():
            try:
                self.answers.append(ask(client))
            except openai.OpenAIError as error:
                self.failures.append(repr(error))

    def more(self, number):
        target = len(self.answers) + number
        wait_until(lambda: len(self.answers) >= target or self.failures, 120, "answers keep coming")

    def finish(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(120)
        assert not self.failures, self.failures
        for text, version in self.answers:
            assert self.expected[version] == text, f"{version} said {text!r}"


def test_a_rolling_update_and_its_way_back(cluster, tmp_path):
    model = other_weights.make(DEMO, tmp_path / "other")
    old_text, old_name = ask(cluster.client())
    (old,) = cluster.weights()
    assert old_name == f"{old}-cpu-q8" and cluster.weights()[old]["serving"]
    events = cluster.read("events")
    assert [e["text"] for e in events if e["event"] == "weights_serving"] == [
        f"new requests begin with {old} (cpu-q8) (before: none)"
    ]

    # One worker alone: beside, shown, and without requests.
    cluster.start("new-0", "--model", model, "--model-name", "tramontane-demo")
    wait_until(lambda: len(cluster.weights()) == 2, 60, "the new version is listed")
    (new,) = set(cluster.weights()) - {old}
    status = cluster.read("status")
    assert status["weights"] == old and status["incompatible"] == ["new-0"], status
    assert len(status["other_weights"]) == 1 and new in status["other_weights"][0], status
    unknown = cluster.tramontane("weights", "use", "ffff", check=False)
    assert unknown.returncode == 3 and "tramontane weights list" in unknown.stderr, unknown.stderr
    dry = cluster.tramontane("weights", "use", new[:6], "--dry-run", "--wait")
    assert new in dry.stderr and cluster.read("status")["weights_wanted"] is None

    # Over to it: the wish waits until it is placed.
    done = cluster.tramontane("weights", "use", new[:6], "--wait", "--timeout", "100s")
    assert f"done: new requests begin with {new}" in done.stderr
    new_text, new_name = wait_until(
        lambda: (answer := ask(cluster.client(1)))[1] != old_name and answer, 30, "the other router follows"
    )
    assert new_name == f"{new}-cpu-q8" and new_text != old_text
    cluster.start("new-1", "--model", model)
    wait_until(lambda: cluster.weights()[new]["workers_ready"] == 2, 60, "both workers of the new version are ready")

    # Back and over again under load, and then the old ones leave.
    load = Load(cluster, {old_name: old_text, new_name: new_text})
    load.more(4)
    for version in (old, new):
        cluster.tramontane("weights", "use", version, "--wait", "--timeout", "100s")
        load.more(8)
    for name in ("old-0", "old-1"):
        cluster.workers[name].popen.send_signal(signal.SIGTERM)
    for name in ("old-0", "old-1"):
        assert cluster.workers[name].popen.wait(100) == 0, cluster.workers[name].output()[-3000:]
    load.more(8)
    assert list(cluster.weights()) == [new]
    refused = cluster.tramontane("weights", "use", old, check=False)
    assert refused.returncode == 3, "nobody has it any more"
    load.finish()
    assert {version for _, version in load.answers} == {old_name, new_name}
    said = [e["text"] for e in cluster.read("events") if e["event"] == "weights_serving"]
    assert len(said) == 4 and said[-1].startswith(f"new requests begin with {new}"), said


def test_a_stream_that_broke_goes_on_with_its_own_version(cluster, tmp_path):
    model = other_weights.make(DEMO, tmp_path / "other")
    body = json.dumps({"messages": QUESTION, "temperature": 0, "max_tokens": 60, "stream": True}).encode()

    def stream(router, last=None):
        headers = {"content-type": "application/json", **({"last-event-id": last} if last else {})}
        request = urllib.request.Request(f"{cluster.routers[router].url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            blocks = answer.read().decode().strip().split("\n\n")
        return [block for block in blocks if not block.startswith(":")]

    whole = stream(0)
    last = whole[len(whole) // 2].split("\n")[0].removeprefix("id: ")
    (old,) = cluster.weights()
    cluster.start("new-0", "--model", model)
    wait_until(lambda: len(cluster.weights()) == 2, 60, "the new version is listed")
    (new,) = set(cluster.weights()) - {old}
    cluster.tramontane("weights", "use", new, "--wait", "--timeout", "100s")
    wait_until(lambda: new in stream(1)[0], 30, "the other router follows")
    text = lambda blocks: "".join(
        json.loads(block.split("data: ", 1)[1])["choices"][0]["delta"].get("content", "")
        for block in blocks if not block.endswith("[DONE]")
    )
    rest = stream(1, last)
    assert text(whole[: len(whole) // 2 + 1]) + text(rest) == text(whole)
    assert all(old in block for block in rest[:-1]), rest[0]
