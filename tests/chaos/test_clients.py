"""Clients leave, stop reading and come in crowds (F16 to F18)."""

import contextlib
import http.client
import json
import selectors
import socket
import struct
import time

from cluster import HTTP, wait_until
from load import MODEL


def ask(cluster, max_tokens=2000, stream=True):
    """An open connection that has asked for a long answer."""
    body = json.dumps({
        "model": MODEL, "prompt": "Tell me a story.", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream,
        "temperature": 0,
    })
    return post(cluster.routers[0], body)


def reset(connection):
    """Closes with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_f16_a_thousand_clients_leave_at_once(chaos, cluster):
    with chaos.row("F16", "1,000 clients leave at once: before, in and after their first token", streams=8) as row:
        row.began = time.monotonic()
        crowd = [ask(cluster, stream=number % 3 > 0) for number in range(1000)]
        for connection in crowd[::2]:
            # The head of the answer: this one is in the middle.
            with contextlib.suppress(TimeoutError):
                connection.settimeout(0.01)
                connection.recv(64)
        for number, connection in enumerate(crowd):
            reset(connection) if number % 2 else connection.close()
        row.injected("connections closed", row.began)
        running = lambda: cluster.status().requests_running + cluster.status().requests_queued
        gone = time.monotonic()
        wait_until(lambda: running() <= 8, 30, "nobody else's requests run")
        row.noticed.append(time.monotonic() - gone)
        row.load.wait_answers(8)


def test_f17_clients_that_do_not_read(chaos, cluster):
    with chaos.row("F17", "50 clients that read nothing, with a closed window", streams=8) as row:
        row.began = time.monotonic()
        before = cluster.routers[0].rss()
        lazy = []
        for _ in range(50):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect((cluster.routers[0].address, HTTP))
            body = json.dumps({"model": MODEL, "prompt": "Tell me", "max_tokens": 1500, "ignore_eos": True, "stream": True})
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n{body}".encode()
            )
            lazy.append(connection)
        row.injected("sockets unread", row.began)
        row.load.wait_answers(48)
        grown = cluster.routers[0].rss() - before
        row.proofs.append(f"router grew by {grown >> 20} MiB")
        assert grown < 256 << 20, f"{grown} bytes for 50 clients that do not read"
        for connection in lazy:
            reset(connection)


def test_f18_overload(chaos, cluster):
    """More than queue and places hold: what is taken is finished, the rest is refused at once, probes answer."""
    with chaos.row("F18", "1,500 requests of 64 answers at once, for the workers' places and a queue of 1,024", streams=4, routers=(0,)) as row:
        body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 4, "n": 64, "temperature": 0.5})
        row.injected("1,500 requests sent")
        waiting = selectors.DefaultSelector()
        for _ in range(1500):
            connection = post(cluster.routers[1], body)
            waiting.register(connection, selectors.EVENT_READ, time.monotonic())
        answers, refused, probes = {}, [], []
        deadline = time.monotonic() + 240
        while waiting.get_map():
            assert time.monotonic() < deadline, f"{len(waiting.get_map())} requests have no answer"
            for key, _ in waiting.select(0.2):
                head = key.fileobj.recv(65536)
                status = head.split(b" ", 2)[1:2]
                answers[status[0] if status else b"cut"] = answers.get(status[0] if status else b"cut", 0) + 1
                if status and status[0] in (b"429", b"503"):
                    refused.append(time.monotonic() - key.data)
                    assert b"retry-after" in head.lower(), head[:500]
                waiting.unregister(key.fileobj)
                key.fileobj.close()
            probes.append(probe(cluster.routers[1]))
        assert set(answers) <= {b"200", b"429", b"503"}, answers
        assert refused and answers[b"200"] >= 16, answers
        quick = sorted(refused)[len(refused) // 2]
        row.proofs.append(
            f"{len(refused)} refused, half of them within {quick * 1000:.0f} ms; slowest probe {max(probes) * 1000:.0f} ms"
        )
        assert max(probes) < 5, f"a probe took {max(probes):.1f} s"


def post(router, body):
    connection = socket.create_connection((router.address, HTTP), timeout=30)
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}".encode()
    )
    return connection


def probe(router):
    """Seconds that a readiness probe takes."""
    began = time.monotonic()
    connection = http.client.HTTPConnection(router.address, HTTP, timeout=10)
    connection.request("GET", "/health/ready")
    assert connection.getresponse().status == 200
    connection.close()
    return time.monotonic() - began
