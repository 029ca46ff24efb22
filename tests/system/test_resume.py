"""Streams that break go on, retried requests are one request, and processes that are told twice end at once."""

import http.client
import json
import shutil
import signal
import subprocess
import time
import urllib.parse

import openai
import pytest
from conftest import BINARY, Process, Server, free_port, run, wait_until
from test_cluster import etcd_healthy

STORY = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 60, "temperature": 1, "stream": True, "stream_options": {"include_usage": True},
}
CHAT = "/v1/chat/completions"


class Had:
    """What a client has after some lines of an event stream."""

    def __init__(self):
        self.text, self.finish, self.usage, self.ids = "", [], [], set()
        self.last_event_id, self.events, self.done = None, 0, False
        self.pending = None

    def line(self, line):
        """Takes a line; an event counts when the empty line after it has come."""
        if line.startswith("id: "):
            self.pending = line[4:]
        elif line.startswith("data: "):
            self.data = line[6:]
        elif line == "" and self.data is not None:
            self.take(self.data)
            self.last_event_id = self.pending
            self.data = None

    data = None

    def take(self, data):
        self.events += 1
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        assert "error" not in chunk, chunk
        self.ids.add((chunk["id"], chunk["created"]))
        if chunk.get("usage"):
            self.usage.append(chunk["usage"])
        for choice in chunk["choices"]:
            self.text += choice["delta"].get("content") or ""
            if choice["finish_reason"]:
                self.finish.append(choice["finish_reason"])

    def whole(self):
        assert self.done and len(self.finish) == 1 and len(self.usage) == 1 and len(self.ids) == 1
        counts = {k: self.usage[0][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return self.text, self.finish, counts, self.ids


def post(url, body, **headers):
    """A connection on which the answer to `body` begins."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json", **names})
    return connection, connection.getresponse()


def read(had, response, events=None):
    """Reads up to so many events in all, or to the end; a broken connection is an end too."""
    try:
        while events is None or had.events < events:
            line = response.readline()
            if not line:
                return
            had.line(line.decode().rstrip("\n"))
    except (OSError, http.client.HTTPException):
        return


def resume(url, had, body=STORY):
    connection, response = post(url, body, last_event_id=had.last_event_id)
    assert response.status == 200, response.read()
    read(had, response)
    connection.close()


def test_curl_goes_on_after_a_broken_stream(server):
    curl = ["curl", "-sSN", f"{server.url}{CHAT}", "-H", "content-type: application/json", "-d", json.dumps(STORY)]
    had, whole = Had(), Had()
    with subprocess.Popen(curl, stdout=subprocess.PIPE, text=True) as broken:
        for line in broken.stdout:
            had.line(line.rstrip("\n"))
            if had.events == 1:
                whole.last_event_id = had.last_event_id
            if had.events == 20:
                break
        broken.kill()
    assert not had.done
    again = subprocess.run(
        [*curl, "-H", f"Last-Event-ID: {had.last_event_id}"], capture_output=True, text=True, timeout=60, check=True
    )
    for line in again.stdout.split("\n"):
        had.line(line)
    # All but the first event once more: what an unbroken stream would have been.
    resume(server.url, whole)
    assert had.whole() == whole.whole()
    assert had.usage[0]["completion_tokens"] <= 60 and had.text


def test_the_openai_client_goes_on_and_retries(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    model = client.models.list().data[0].id
    asked = {"model": model, **STORY}
    had = Had()
    with client.chat.completions.with_streaming_response.create(**asked) as response:
        for line in response.iter_lines():
            had.line(line)
            if had.events == 10:
                break
    begin = had.text
    rest = client.chat.completions.create(**asked, extra_headers={"Last-Event-ID": had.last_event_id})
    chunks = list(rest)
    text = begin + "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert {c.id for c in chunks} == {next(iter(had.ids))[0]}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(
            **{**asked, "temperature": 0.5}, extra_headers={"Last-Event-ID": had.last_event_id}
        )
    again = had.last_event_id.rsplit("/", 1)[0] + "/0"
    whole = client.chat.completions.create(**asked, extra_headers={"Last-Event-ID": again})
    assert "".join(c.choices[0].delta.content or "" for c in whole if c.choices) == text

    once = {"model": model, "messages": STORY["messages"], "max_tokens": 20}
    key = {"Idempotency-Key": "test-resume-1"}
    first = client.chat.completions.create(**once, extra_headers=key)
    second = client.chat.completions.create(**once, extra_headers=key)
    assert first == second, "the same answer, not one like it"
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(**{**once, "max_tokens": 21}, extra_headers=key)
    # Whose keys are whose is a matter of tenants: crates/router/tests/router/auth.rs.


ENDLESS = {**STORY, "max_tokens": 1500, "ignore_eos": True}


def stop_twice(process, is_stopping):
    process.popen.send_signal(signal.SIGTERM)
    wait_until(is_stopping, 30, f"{process.name} is stopping")
    assert process.alive(), "what runs is waited for"
    begin = time.monotonic()
    assert process.stop(signal.SIGTERM, seconds=10) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 5


def test_a_second_signal_ends_a_server_at_once():
    server = Server("--workers", "1")
    connection, response = post(server.url, ENDLESS)
    had = Had()
    read(had, response, events=2)
    address = urllib.parse.urlsplit(server.url)

    def is_stopping():
        probe = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
        try:
            probe.request("GET", "/health/ready")
            return probe.getresponse().status == 503
        except OSError:
            return True

    stop_twice(server, is_stopping)
    read(had, response)
    assert not had.done and not had.finish, "a cut stream does not pretend to have ended"
    connection.close()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    assert shutil.which("etcd"), "etcd is not installed; `make test` installs it"
    client, peer = free_port(), free_port()
    process = Process("etcd-alone", [
        "etcd", "--data-dir", tmp_path_factory.mktemp("etcd"),
        "--listen-client-urls", f"http://127.0.0.1:{client}",
        "--advertise-client-urls", f"http://127.0.0.1:{client}",
        "--listen-peer-urls", f"http://127.0.0.1:{peer}",
    ])
    wait_until(lambda: etcd_healthy(client), 60, "etcd is healthy")
    yield f"http://127.0.0.1:{client}"
    process.stop()


class Router(Process):
    def __init__(self, etcd, name):
        self.http, self.grpc, self.admin = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http}"
        super().__init__(name, [
            BINARY, "router", "--etcd", etcd, "--cluster", "resume", "--host", "127.0.0.1",
            "--http-port", self.http, "--grpc-port", self.grpc, "--admin-port", self.admin, "--min-workers", "2",
        ], {"TRAMONTANE_ROUTER__ID": name})

    def ready(self):
        done = run("status", "--output", "json", "--router", f"127.0.0.1:{self.admin}", check=False)
        return bool(done.stdout) and json.loads(done.stdout)["ready"]


class Worker(Process):
    def __init__(self, etcd, name):
        self.ops = free_port()
        super().__init__(name, [
            BINARY, "worker", "--etcd", etcd, "--cluster", "resume", "--id", name, "--threads", "1",
            "--host", "127.0.0.1", "--grpc-port", free_port(), "--ops-port", self.ops,
        ])

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.ops, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def running(self):
        lines = self.get("/metrics")[1].splitlines()
        return next(int(l.split()[1]) for l in lines if l.startswith("tramontane_sequences_running "))


@pytest.fixture(scope="module")
def cluster(etcd):
    routers = [Router(etcd, f"router-{i}") for i in range(2)]
    workers = [Worker(etcd, f"worker-{i}") for i in range(2)]
    for router in routers:
        wait_until(router.ready, 120, f"{router.name} is ready")
    yield routers, workers
    for process in [*routers, *workers]:
        if process.alive():
            process.stop(signal.SIGKILL)


def test_a_stream_goes_on_at_another_router_when_the_first_is_killed(cluster):
    (first, second), workers = cluster
    had, whole = Had(), Had()
    body = {**STORY, "max_tokens": 400, "ignore_eos": True}
    connection, response = post(first.url, body)
    read(had, response, events=1)
    whole.last_event_id = had.last_event_id
    read(had, response, events=20)
    assert sum(worker.running() for worker in workers) == 1
    first.stop(signal.SIGKILL)
    killed = time.monotonic()
    read(had, response)
    connection.close()
    assert not had.done and not had.finish, "a cut, not an end"
    wait_until(lambda: sum(worker.running() for worker in workers) == 0, 10, "the orphan is gone")
    assert time.monotonic() - killed < 5
    before = had.events
    resume(second.url, had, body)
    assert had.events > before
    resume(second.url, whole, body)
    assert had.whole() == whole.whole()
    assert had.usage[0]["completion_tokens"] == 400


def test_a_second_signal_ends_routers_and_workers_at_once(cluster):
    (_, router), workers = cluster
    connection, response = post(router.url, ENDLESS)
    read(Had(), response, events=2)
    worker = next(worker for worker in workers if worker.running())
    stop_twice(worker, lambda: worker.get("/health/ready")[0] == 503)
    stop_twice(router, lambda: "router drains" in router.output())
    connection.close()
