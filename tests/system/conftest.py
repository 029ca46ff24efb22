"""What the system tests share: real processes of the real binary, on loopback, on free ports."""

import atexit
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARY = pathlib.Path(os.environ.get("TRAMONTANE_BINARY", TARGET / "debug" / "tramontane"))
START_SECONDS = 120
STOP_SECONDS = 60


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition, seconds, what):
    """Polls a condition; returns its first true value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


STARTED = []


@atexit.register
def kill_what_is_left():
    """A test that fails while it starts its processes must not leave them behind."""
    for process in STARTED:
        if process.popen.poll() is None:
            process.popen.kill()
        pathlib.Path(process.log.name).unlink(missing_ok=True)


class Process:
    """A process of the binary (or of etcd) with its output in a file."""

    def __init__(self, name, command, env=None):
        self.name = name
        self.log = tempfile.NamedTemporaryFile("w+b", prefix=f"{name}-", suffix=".log", delete=False)
        self.popen = subprocess.Popen(
            [str(c) for c in command],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
        )
        STARTED.append(self)

    def output(self):
        return pathlib.Path(self.log.name).read_text(errors="replace")

    def resident(self):
        """Bytes of memory that it has."""
        pages = pathlib.Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def alive(self):
        return self.popen.poll() is None

    def wait_for(self, pattern, seconds=START_SECONDS):
        def found():
            assert self.alive() or re.search(pattern, self.output()), (
                f"{self.name} ended with {self.popen.returncode}:\n{self.output()}"
            )
            return re.search(pattern, self.output())

        return wait_until(found, seconds, f"{self.name} prints {pattern!r}")

    def stop(self, signum=signal.SIGTERM, seconds=STOP_SECONDS):
        if self.alive():
            self.popen.send_signal(signum)
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"{self.name} did not stop within {seconds} s:\n{self.output()[-4000:]}")
        finally:
            self.log.close()


class Server(Process):
    """`tramontane serve` on free ports."""

    def __init__(self, *flags, env=None):
        super().__init__(
            "serve", [BINARY, "serve", "--http-port", "0", "--grpc-port", "0", "--admin-port", "0", *flags], env
        )
        self.url = self.wait_for(r"OpenAI API\s+(http://\S+)/v1").group(1)
        self.grpc = self.wait_for(r"gRPC API\s+(\S+)").group(1)
        self.admin = self.wait_for(r"admin API\s+(\S+)").group(1)


def run(*args, check=True, seconds=60, input=None, env=None):
    """Runs the binary to its end; returns the completed process with text output."""
    done = subprocess.run(
        [str(BINARY), *map(str, args)], capture_output=True, text=True, timeout=seconds, input=input, env=env
    )
    if check:
        assert done.returncode == 0, f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def server():
    server = Server("--workers", "2")
    yield server
    assert server.alive(), f"the server died:\n{server.output()[-4000:]}"
    assert server.stop() == 0, server.output()[-4000:]


@pytest.fixture(scope="session")
def proto(tmp_path_factory):
    """Python modules made from /proto, as a user would make them."""
    import importlib
    import sys

    from grpc_tools import protoc

    out = tmp_path_factory.mktemp("proto")
    files = sorted(str(p) for p in (ROOT / "proto").rglob("*.proto"))
    code = protoc.main(
        ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}", *files]
    )
    assert code == 0
    sys.path.insert(0, str(out))

    class Modules:
        inference = importlib.import_module("tramontane.v1.inference_pb2")
        inference_grpc = importlib.import_module("tramontane.v1.inference_pb2_grpc")
        admin = importlib.import_module("tramontane.v1.admin_pb2")
        admin_grpc = importlib.import_module("tramontane.v1.admin_pb2_grpc")
        worker = importlib.import_module("tramontane.v1.worker_pb2")
        expert = importlib.import_module("tramontane.v1.expert_pb2")
        expert_grpc = importlib.import_module("tramontane.v1.expert_pb2_grpc")
        weights = importlib.import_module("tramontane.v1.weights_pb2")
        weights_grpc = importlib.import_module("tramontane.v1.weights_pb2_grpc")

    return Modules
