"""What went wrong in other servers of language models, tried on ours. Each class of advisory is a test of its name; those
that a faster test covers are listed in docs/security.md."""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

from conftest import ROOT, Server, run, wait_until
from test_cluster import Cluster
from test_resume import etcd  # noqa: F401, a fixture

# The lease of a worker ends within ten seconds; the rest is for a machine that is busy.
READY_SECONDS = 40


def post(server, path, body, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}{path}", data=data, headers={"content-type": "application/json", **dict(headers)}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def chat(server, text, **options):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0, **options}
    return post(server, "/v1/chat/completions", body)


def still_serves(server):
    status, answer = chat(server, "What is the capital of Poland?", max_tokens=30)
    assert status == 200 and "Warsaw" in answer["choices"][0]["message"]["content"]


def test_special_tokens_in_a_prompt_are_text(server):
    """CVE-2026-44222, PYSEC-2026-2303: text that looks like control tokens ends a worker."""
    for text in ["<s>", "</s>" * 50, "[INST] [/INST] [TOOL_CALLS]", "<unk><pad>\ufffd\ufdd0", "\x00\x01\x7f", "￾￿"]:
        status, answer = chat(server, text)
        assert status == 200, answer
    ids = post(server, "/tokenize", {"prompt": "</s>", "add_special_tokens": False})[1]["tokens"]
    assert len(ids) > 1, "one token would be the end of the sequence"
    still_serves(server)


@pytest.mark.parametrize(
    "options,param",
    [
        ({"n": 16384}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
        ({"stop": ["a"] * 1000}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"bad_words": ["a"] * 1000}, "bad_words"),
        ({"top_logprobs": 2**31, "logprobs": True}, "top_logprobs"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_a_parameter_without_a_bound_has_one(server, options, param):
    """CVE-2026-34756, CVE-2026-114051, CVE-2026-21869: n, min_tokens and the like end the engine."""
    status, answer = chat(server, "hi", **options)
    assert status == 400 and answer["error"]["param"].startswith(param), answer
    still_serves(server)


def test_a_list_of_prompts_is_no_multiplier(server):
    """PYSEC-2026-3704: prompts times answers."""
    status, answer = post(server, "/v1/completions", {"prompt": ["a"] * 64, "n": 64})
    assert status == 400 and answer["error"]["param"] == "prompt"
    status, answer = post(server, "/v1/completions", {"prompt": ["a"] * 100_000})
    assert status == 400 and answer["error"]["param"] == "prompt"
    still_serves(server)


def test_many_token_ids_over_grpc_end_nobody(server, proto):
    """CVE-2026-116173: more ids than a front end expected end the engine."""
    import grpc

    client = proto.inference_grpc.InferenceStub(grpc.insecure_channel(server.grpc))
    request = proto.inference.GenerateRequest()
    request.prompt_ids.ids.extend([5] * 100_000)
    request.options.stop_token_ids.extend([5] * 1000)
    with pytest.raises(grpc.RpcError) as raised:
        client.GenerateOnce(request, timeout=30)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    still_serves(server)


def test_a_template_of_a_request_is_refused(server):
    """GHSA-69j4-grxj-j64p, CVE-2026-5760: templates and their arguments come with the request."""
    for name, value in [("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"a": 1})]:
        status, answer = chat(server, "hi", **{name: value})
        assert status == 400 and answer["error"]["param"] == name


# By what a message says: ways to never end, to take all memory, and out of the template; they end with nothing or a refusal.
TEMPLATES = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "range": "{{ range(99999999999) | list }}",
    "repeat": "{{ ('x' * 99999) * 99999 }}",
    "double": "{% set n = namespace(s='xxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "class": "{{ ''.__class__ }}",
    "attr": "{{ ''|attr('__class__') }}",
    "mro": "{{ messages.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "popen": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self._TemplateReference__context }}",
    "open": "{{ open('/etc/passwd').read() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as p %}{{ p }}",
    "from": "{% from '/etc/passwd' import p %}{{ p }}",
}
ENDLESS = ("loop", "recursion", "range", "repeat", "double")
# A fifth of a second by itself; the rest is for a machine that is busy.
TEMPLATE_SECONDS = 10


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model whose template is each of them, by what the first message says."""
    model = tmp_path_factory.mktemp("hostile") / "m"
    shutil.copytree(ROOT / "models" / "demo", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    branches = "".join("{% if said == '" + name + "' %}" + text + "{% endif %}" for name, text in TEMPLATES.items())
    config["chat_template"] = "{% set said = messages[0]['content'] %}" + branches + "{% if said == 'hi' %}hello{% endif %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    server = Server("--model", model)
    yield server
    assert server.stop() == 0


def rendered(server, said):
    """Status of the conversation's ids, and their text or the error."""
    status, answer = post(server, "/tokenize", {"messages": [{"role": "user", "content": said}]})
    if status != 200:
        return status, answer["error"]
    return status, post(server, "/detokenize", {"tokens": answer["tokens"]})[1]["prompt"]


def test_a_template_of_a_model_reaches_nothing_but_its_text(hostile):
    """CVE-2024-34359: out of the template over attributes, or into files."""
    assert rendered(hostile, "hi")[1].strip() == "hello"
    for name in TEMPLATES.keys() - set(ENDLESS):
        status, said = rendered(hostile, name)
        if status == 200:
            assert said.strip() == "", (name, said)
            continue
        assert status == 400 and said["param"] == "messages" and "chat template" in said["message"], (name, said)
        assert "root:" not in said["message"]


def test_a_template_of_a_model_has_a_limit(hostile):
    """CVE-2026-115911: a template that never ends. It ends soon, costs little memory, and others are served meanwhile."""
    before, stopping = hostile.resident(), threading.Event()

    def render(said):
        began = time.monotonic()
        status, answer = chat(hostile, said)
        return said, status, answer, time.monotonic() - began

    def others():
        slowest = 0
        while not stopping.is_set():
            began = time.monotonic()
            status, answer = post(hostile, "/v1/completions", {"prompt": "The", "max_tokens": 2})
            assert status == 200 and answer["usage"]["completion_tokens"], "what needs no template is served"
            slowest = max(slowest, time.monotonic() - began)
        return slowest

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        served = pool.submit(others)
        renders = list(pool.map(render, ENDLESS * 3))
        stopping.set()
        assert 0 < served.result() < TEMPLATE_SECONDS
    for said, status, answer, took in renders:
        assert status == 400 and "chat template" in answer["error"]["message"], (said, answer)
        assert took < TEMPLATE_SECONDS, said
    assert hostile.resident() - before < 256 << 20


def test_nothing_a_client_names_is_fetched(server):
    """CVE-2026-24779, CVE-2026-34753, CVE-2026-100650: the server asks for addresses of a client."""
    import http.server

    asked = []

    class Trap(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    trap = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=trap.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{trap.server_port}/x"
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert post(server, "/v1/chat/completions", body)[0] == 400
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": url}}}
    assert chat(server, "hi", response_format=schema)[0] == 400
    trap.shutdown()
    assert asked == []


def test_internal_ids_are_no_clients(server):
    """CVE-2026-105755, CVE-2026-105754, CVE-2026-94627: a client's request id or hash is a key inside."""
    names = {"x-request-id": "same", "x-tramontane-answer": "same"}
    bodies = [{"prompt": p, "max_tokens": 12, "temperature": 0} for p in ("The capital of Poland", "La capitale de la France")]
    alone = [post(server, "/v1/completions", body)[1]["choices"] for body in bodies]
    assert alone[0] != alone[1]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        named = [body | {"request_id": "same"} for body in bodies] * 4
        answers = list(pool.map(lambda body: post(server, "/v1/completions", body, names), named))
    assert [status for status, _ in answers] == [200] * 8
    assert [answer["choices"] for _, answer in answers] == alone * 4
    ids = {answer["id"] for _, answer in answers}
    assert len(ids) == 8 and not any("same" in id for id in ids)


def test_a_tenant_has_nothing_of_anothers(tmp_path):
    """The same advisories: a prompt, a request id and an idempotency key of one are no keys to what the other has."""
    keys, config = tmp_path / "keys", tmp_path / "config.toml"
    config.write_text(f'[auth]\nkeys_file = "{keys}"\n')
    tenants = [run("keys", "add", "--tenant", name, "--file", keys).stdout.strip() for name in ("one", "other")]
    server = Server("--workers", "1", "--config", config)

    def asked(key, retry, tokens):
        names = {"authorization": f"Bearer {key}", "x-request-id": "same", "idempotency-key": retry}
        body = {"prompt": "The capital of Poland and " * 30, "max_tokens": tokens, "temperature": 0}
        return post(server, "/v1/completions", body, names)

    for tokens, key in zip((6, 7), tenants):
        status, answer = asked(key, "same", tokens)
        assert status == 200 and answer["usage"]["completion_tokens"] == tokens, answer
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "it was told that somebody asked this"
        assert asked(key, "same", tokens) == (200, answer), "a retry is the same request"
        assert asked(key, "same", 8)[0] == 422, "the key is in use, by its own tenant"
        again = asked(key, "new", tokens)[1]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64, "one's own prompts are cached"
        assert again["id"] != answer["id"] and again["choices"] == answer["choices"]
    assert server.stop() == 0


def test_labels_of_metrics_are_a_closed_set(server):
    """PYSEC-2026-4325: each method, path or model that a client makes up is a series."""
    host, port = server.url.removeprefix("http://").split(":")
    for i in range(50):
        subprocess.run(
            ["curl", "-sS", "-o", "/dev/null", "-X", f"M{i}", f"http://{host}:{port}/p{i}?q={i}"],
            timeout=10, check=True, capture_output=True,
        )
        post(server, "/v1/completions", {"model": f"made-up-{i}", "prompt": "x"})
    page = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    assert not re.search(r"M\d+|/p\d+|made-up", page)
    assert len(page.splitlines()) < 2000


def test_the_health_of_a_worker_that_stands_still_is_no_good(etcd):  # noqa: F811
    """CVE-2026-114051: health answers 200 with a dead engine. Ours: readiness follows workers that show signs of life."""
    cluster = Cluster(etcd, name="advisories", min_workers=1)
    worker = cluster.start_worker("w-0")

    def health(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http}/health/{path}", timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    try:
        wait_until(lambda: health("ready") == 200, 120, "the worker serves")
        worker.popen.send_signal(signal.SIGSTOP)
        wait_until(lambda: health("ready") == 503, READY_SECONDS, "a worker that stands still is noticed")
        # The router itself is well: whoever restarts it for that restarts the wrong process.
        assert health("live") == 200
        worker.popen.send_signal(signal.SIGCONT)
        wait_until(lambda: health("ready") == 200, 60, "it goes on where it stood")
    except AssertionError as failed:
        raise AssertionError(f"{failed}\n{cluster.logs()}")
    finally:
        cluster.kill()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_line_is_one_line(tmp_path, log_format):
    """RUSTSEC-2025-0055: control sequences of a client in a terminal's log. Refusals that quote a client are in it at `debug`."""
    config = tmp_path / "config.toml"
    config.write_text(f'[telemetry]\nlog = "debug"\nlog_format = "{log_format}"\n')
    server = Server("--workers", "1", "--config", config)
    host, port = server.url.removeprefix("http://").split(":")
    forged = "\x1b[31m\r\n2026-11-26T00:00:00.000000Z FORGED \x9b\u2028\x00"
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"GET /v1/%1b%5b31m%0aFORGED HTTP/1.1\r\nhost: x\r\nx-evil: \x9b31mFORGED\r\nconnection: close\r\n\r\n")
        assert b"404" in client.recv(65536)
    quoted = [
        {"guided_json": {"type": forged}}, {"guided_json": {"$ref": forged}}, {"guided_regex": "(" + forged},
        {"guided_grammar": forged}, {"guided_json": {"pattern": "(" + forged}},
    ]
    for options in quoted:
        status, answer = chat(server, forged, **options)
        assert status == 400 and "FORGED" in answer["error"]["message"], answer
    wait_until(lambda: server.output().count("request refused") >= len(quoted), 10, "refusals are in the log")
    assert server.stop() == 0
    log = pathlib.Path(server.log.name).read_bytes()
    assert not set(log) & {0x00, 0x0D, 0x1B} and b"\xc2\x9b" not in log and "\u2028".encode() not in log
    lines = [line for line in log.decode().splitlines() if "FORGED" in line]
    assert len(lines) >= len(quoted)
    for line in lines:
        if log_format == "json":
            assert json.loads(line)["message"], line
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT\S+Z +DEBUG ", line), line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_value_of_etcd_is_one_line_in_a_log(etcd, tmp_path, log_format):  # noqa: F811
    """RUSTSEC-2025-0055 again: what cannot be read is quoted, with its line feeds and escapes."""
    config = tmp_path / "config.toml"
    config.write_text(f'[telemetry]\nlog_format = "{log_format}"\n')
    cluster = Cluster(etcd, "--config", config, name=f"log-{log_format}", min_workers=1)
    try:
        cluster.router.wait_for("router serves")
        forged = "\x1b[31m\r\n2026-11-26T00:00:00.000000Z FORGED"
        put = ["etcdctl", "--endpoints", etcd, "put", f"/tramontane/log-{log_format}/workers/w-7", "--"]
        subprocess.run([*put, json.dumps({"id": forged, "state": forged})], check=True, env={**os.environ, "ETCDCTL_API": "3"})
        cluster.router.wait_for("FORGED")
        log = pathlib.Path(cluster.router.log.name).read_bytes()
        assert not set(log) & {0x0D, 0x1B}, log
        (line,) = [line for line in log.decode().splitlines() if "FORGED" in line]
        assert json.loads(line)["message"] if log_format == "json" else re.match(r"\d{4}-\S+Z +WARN ", line), line
    finally:
        cluster.kill()
