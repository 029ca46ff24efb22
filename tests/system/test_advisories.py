"""What went wrong in other servers of language models, tried on ours. Each class of advisory is a test of its name; those
that a faster test covers are listed in docs/security.md."""

import json
import pathlib
import re
import signal
import subprocess
import threading
import urllib.error
import urllib.request

import pytest

from conftest import Server, wait_until
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


def test_a_template_of_a_model_has_a_limit(tmp_path):
    """CVE-2026-115911, CVE-2024-34359: a template that never ends, or wants more than text."""
    import shutil

    root = pathlib.Path(__file__).resolve().parents[2]
    model = tmp_path / "m"
    shutil.copytree(root / "models" / "demo", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    hostile = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    config["chat_template"] = hostile
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    for file in model.glob("chat_template*"):
        file.unlink()
    server = Server("--model", model)
    status, answer = chat(server, "hi")
    assert status in (400, 500) and "error" in answer
    status, _ = post(server, "/v1/completions", {"prompt": "The", "max_tokens": 2})
    assert status == 200, "what needs no template is served"
    assert server.stop() == 0


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
    headers = {"x-request-id": "same", "x-tramontane-answer": "same"}
    answers = [
        post(server, "/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0}, headers)
        for prompt in ["The capital of Poland", "La capitale"]
    ]
    assert [status for status, _ in answers] == [200, 200]
    (_, one), (_, other) = answers
    assert one["id"] != other["id"] and "same" not in one["id"] + other["id"]


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


def test_a_log_line_is_one_line(tmp_path):
    """RUSTSEC-2025-0055: control sequences of a client in a terminal's log."""
    server = Server("--log", "debug")
    path = "/v1/%1b%5b31m%0aFORGED"
    subprocess.run(["curl", "-sS", "-o", "/dev/null", "-H", "x-evil: \x1b[31mFORGED", f"{server.url}{path}"], timeout=10)
    chat(server, "\x1b[31m\nFORGED")
    wait_until(lambda: "/v1/" in server.output(), 10, "the request is in the log")
    lines = server.output().splitlines()
    assert not any(line.startswith("FORGED") for line in lines)
    assert "\x1b[31mFORGED" not in server.output()
    assert server.stop() == 0
