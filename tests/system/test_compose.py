"""The compose file without Docker: its script makes certificates, its processes take them and serve together over TLS."""

import os
import re
import signal
import subprocess

import pytest
import yaml
from conftest import BINARY, ROOT, Process, free_port, run, wait_until

FILE = ROOT / "deploy" / "compose.yaml"
SERVICES = yaml.safe_load(FILE.read_text())["services"]
WORKERS = ("worker-0", "worker-1", "worker-2")


class Composed:
    """The services as processes of this machine: other folders and ports, and every host is this one."""

    def __init__(self, tmp):
        self.tls, self.data, self.bin = tmp / "tls", tmp / "data", tmp / "bin"
        for folder in (self.tls, self.data, self.bin):
            folder.mkdir()
        (self.bin / "tramontane").symlink_to(BINARY)
        # Only root gives files away; all processes here are of one user.
        self.given = tmp / "given"
        (self.bin / "chown").write_text(f'#!/bin/sh\necho "$@" >> {self.given}\n')
        (self.bin / "chown").chmod(0o755)
        self.etcd, self.http, self.grpc, self.admin = (free_port() for _ in range(4))
        self.doors = {name: free_port() for name in WORKERS}
        self.processes = []

    def here(self, text):
        text = str(text).replace("/tls", str(self.tls)).replace("/data", str(self.data))
        text = re.sub(r"\b(etcd|0\.0\.0\.0):2379", f"localhost:{self.etcd}", text)
        return re.sub(r"^(worker-\d):8100$", lambda found: f"127.0.0.1:{self.doors[found[1]]}", text)

    def make_certificates(self):
        service = SERVICES["certs"]
        command = [*service["entrypoint"], *map(self.here, service["command"])]
        env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 0, done.stderr

    def start(self, name, *flags):
        service = SERVICES[name]
        command = [*map(self.here, service["command"]), *flags]
        if name != "etcd":
            command = [BINARY, *command]
        env = {key: self.here(value) for key, value in service.get("environment", {}).items()}
        self.processes.append(Process(name, command, env))

    def logs(self):
        return "\n".join(f"== {p.name}\n{p.output()[-3000:]}" for p in self.processes)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    composed = Composed(tmp_path_factory.mktemp("compose"))
    composed.make_certificates()
    peer = f"http://127.0.0.1:{free_port()}"
    composed.start(
        "etcd", "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"etcd={peer}"
    )
    composed.start("router", "--http-port", composed.http, "--grpc-port", composed.grpc, "--admin-port", composed.admin)
    for name, port in composed.doors.items():
        composed.start(name, "--grpc-port", port, "--ops-port", free_port(), "--threads", "1")
    yield composed
    for process in composed.processes:
        process.stop(signal.SIGKILL)


def test_certificates_are_made_once_and_nobody_keeps_the_authoritys_key(composed):
    made = {path.name: path.read_bytes() for path in composed.tls.iterdir()}
    assert {"ca.pem", "clients.pem", "router.pem", "worker.pem", "operator.pem", "etcd.pem"} <= set(made)
    assert "ca-key.pem" not in made
    assert composed.given.read_text() == f"-R 65534 {composed.tls}\n"
    composed.make_certificates()
    assert {path.name: path.read_bytes() for path in composed.tls.iterdir()} == made


def test_it_serves_over_tls(composed):
    operator = [
        "--router", f"127.0.0.1:{composed.admin}", "--tls-ca", composed.tls / "ca.pem",
        "--tls-cert", composed.tls / "operator.pem", "--tls-key", composed.tls / "operator-key.pem",
    ]
    try:
        wait_until(lambda: run("status", *operator, check=False).returncode == 0, 120, "the cluster serves")
    except AssertionError:
        raise AssertionError(composed.logs())
    url = f"https://localhost:{composed.http}"
    asked = ["chat", "What is the capital of Poland?", "--temperature", "0", "--url", url]
    assert "Warsaw" in run(*asked, "--tls-ca", composed.tls / "ca.pem").stdout
    assert "insecure" not in FILE.read_text()


def test_what_one_service_asks_of_another_is_there():
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= set(SERVICES), name
        if name != "certs":
            assert "certs:/tls:ro" in service["volumes"], name
            assert service["depends_on"]["certs"]["condition"] == "service_completed_successfully", name
    # What is published is published on this machine: nobody is asked who they are.
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["router"]["ports"])
    assert not any("ports" in service for name, service in SERVICES.items() if name != "router")
