"""Real processes of the real binary and of etcd, one network namespace each."""

import atexit
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

import grpc

from net import Network, rss_bytes, state_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARY = pathlib.Path(os.environ.get("TRAMONTANE_BINARY", TARGET / "release" / "tramontane"))
REPORT = TARGET / "chaos"
HTTP, GRPC, ADMIN, WORKER, OPS, ETCD, PEER = 8000, 8001, 8002, 8100, 8101, 2379, 2380
START_SECONDS, STOP_SECONDS, SETTLE_SECONDS = 60, 60, 60


def wait_until(condition, seconds, what, every=0.02):
    """Polls a condition; returns its first true value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(every)


class Process:
    """One host with one process, which may be started again and again."""

    def __init__(self, network, name, make_argv, env=None):
        self.name = name
        self.host = network.join(name)
        self.argv, self.env = make_argv(self.host.address), env or {}
        self.log_path = REPORT / "logs" / f"{name}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path.write_bytes(b"")
        self.popen = None
        self.starts = 0
        atexit.register(self.kill)

    @property
    def address(self):
        return self.host.address

    def start(self, *more):
        assert self.popen is None or self.popen.poll() is not None, f"{self.name} runs already"
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                self.host.command([*self.argv, *more]),
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **self.env},
            )
        self.starts += 1
        return self

    @property
    def pid(self):
        return self.popen.pid

    def alive(self):
        return self.popen is not None and self.popen.poll() is None

    def signal(self, signum):
        self.popen.send_signal(signum)

    def kill(self):
        """SIGKILL; returns once the process is gone, which proves it."""
        if self.alive():
            self.signal(signal.SIGKILL)
            self.popen.wait()
        return time.monotonic()

    def pause(self):
        """SIGSTOP; returns once the kernel says that it is stopped."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: state_of(self.pid) == "T", 5, f"{self.name} is stopped", every=0.001)
        return time.monotonic()

    def resume(self):
        assert state_of(self.pid) == "T", f"{self.name} was not stopped any more"
        self.signal(signal.SIGCONT)

    def stop(self, seconds=STOP_SECONDS):
        self.signal(signal.SIGTERM)
        return self.popen.wait(seconds)

    def takes_connections(self, port):
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((self.address, port)) == 0

    def log(self, last=None):
        text = self.log_path.read_text(errors="replace")
        return text if last is None else text[-last:]

    def rss(self):
        return rss_bytes(self.pid)


def metrics(host, port):
    """The samples of a metrics page without labels, and sums over labels."""
    url = f"http://{host.address}:{port}/metrics"
    found = {}
    with urllib.request.urlopen(url, timeout=5) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("#") or not line:
                continue
            name, value = line.rsplit(" ", 1)
            name = name.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


class Etcd:
    """Members of one etcd cluster."""

    def __init__(self, network, size=3):
        assert shutil.which("etcd"), "etcd is not installed; `make chaos` installs it"
        self.data = [tempfile.mkdtemp(prefix="chaos-etcd-") for _ in range(size)]
        for path in self.data:
            atexit.register(shutil.rmtree, path, ignore_errors=True)
        self.members = [Process(network, f"etcd-{i}", lambda address: []) for i in range(size)]
        self.fill()

    def fill(self):
        peers = ",".join(f"{m.name}=http://{m.address}:{PEER}" for m in self.members)
        for member, data in zip(self.members, self.data):
            client, peer = f"http://{member.address}:{ETCD}", f"http://{member.address}:{PEER}"
            member.argv = [
                "etcd", "--name", member.name, "--data-dir", data,
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", peers, "--initial-cluster-state", "new",
                "--heartbeat-interval", "100", "--election-timeout", "1000",
            ]

    def start(self):
        for member in self.members:
            member.start()
        self.wait_healthy()
        return self

    def urls(self):
        return ",".join(f"http://{m.address}:{ETCD}" for m in self.members)

    def healthy(self, member):
        try:
            with urllib.request.urlopen(f"http://{member.address}:{ETCD}/health", timeout=1) as answer:
                return json.load(answer)["health"] == "true"
        except OSError:
            return False

    def wait_healthy(self):
        for member in self.members:
            wait_until(lambda: self.healthy(member), START_SECONDS, f"{member.name} is healthy", every=0.2)

    def leader(self):
        for member in self.members:
            try:
                page = metrics(member.host, ETCD)
            except OSError:
                continue
            if page.get("etcd_server_is_leader"):
                return member
        raise AssertionError("etcd has no leader")

    def wipe(self):
        """Their data is gone, as after a lost volume."""
        for path in self.data:
            shutil.rmtree(path)
            os.mkdir(path, mode=0o700)


class Cluster:
    """etcd, routers and workers, each on a host of its own."""

    def __init__(self, protos, workers=3, routers=2, replicas=2, worker_env=None, router_env=None, roles=None):
        self.protos = protos
        self.network = Network()
        self.etcd = Etcd(self.network).start()
        self.worker_env, self.roles = worker_env or {}, roles or {}
        # So that processes start while etcd is away.
        self.state = tempfile.mkdtemp(prefix="chaos-state-")
        atexit.register(shutil.rmtree, self.state, ignore_errors=True)
        state = {"TRAMONTANE_ETCD__STATE_DIR": self.state}
        self.worker_env = {**state, **self.worker_env}
        env = {**state, "TRAMONTANE_ROUTER__REPLICAS": str(replicas), "TRAMONTANE_ROUTER__SETTLE_TIME": "500ms", **(router_env or {})}
        self.routers = [
            Process(self.network, f"router-{i}", self.router_argv(i, workers), env).start() for i in range(routers)
        ]
        self.workers = {}
        for i in range(workers):
            self.add_worker(f"worker-{i}")
        self.channels = {}
        self.wait_settled(START_SECONDS)

    def router_argv(self, number, min_workers):
        return lambda address: [
            BINARY, "router", "--etcd", self.etcd.urls(), "--cluster", "chaos", "--host", address,
            "--http-port", HTTP, "--grpc-port", GRPC, "--admin-host", address, "--admin-port", ADMIN,
            # Hosts of a network that nobody else reaches.
            "--insecure", "--min-workers", min_workers,
        ]

    def add_worker(self, name, *flags):
        roles = self.roles.get(name, "attention,experts")
        argv = lambda address: [
            BINARY, "worker", "--etcd", self.etcd.urls(), "--cluster", "chaos", "--id", name, "--threads", "1",
            "--host", address, "--grpc-port", WORKER, "--ops-port", OPS, "--roles", roles, "--weights", "q8",
            "--insecure", *flags,
        ]
        self.workers[name] = Process(self.network, name, argv, self.worker_env).start()
        return self.workers[name]

    def processes(self):
        return [*self.etcd.members, *self.routers, *self.workers.values()]

    def channel(self, router=0, port=GRPC):
        address = f"{self.routers[router].address}:{port}"
        if address not in self.channels:
            self.channels[address] = grpc.insecure_channel(address)
        return self.channels[address]

    def admin(self, router=0):
        return self.protos.admin_grpc.AdminStub(self.channel(router, ADMIN))

    def status(self, router=0):
        try:
            return self.admin(router).ClusterStatus(self.protos.admin.ClusterStatusRequest(), timeout=2)
        except grpc.RpcError:
            return None

    def listed(self, router=0):
        answer = self.admin(router).ListWorkers(self.protos.admin.ListWorkersRequest(), timeout=5)
        return {worker.id: worker for worker in answer.workers}

    def is_settled(self, router, num_workers):
        status = self.status(router)
        return (
            status is not None and status.ready and status.pending_epoch == 0 and status.store_available
            and status.workers_ready == status.workers_total == num_workers
            and (status.survives_one_loss or num_workers == 1)
        )

    def wait_settled(self, seconds=SETTLE_SECONDS, num_workers=None):
        """Every worker that runs is ready, and any one of them may be lost."""
        count = num_workers or sum(worker.alive() for worker in self.workers.values())
        for number, router in enumerate(self.routers):
            if router.alive() and state_of(router.pid) != "T":
                wait_until(
                    lambda: self.is_settled(number, count), seconds,
                    f"{router.name} sees {count} workers ready and a placement that survives one loss", every=0.05,
                )

    def restore(self):
        """Starts what was killed; ends when all is well again."""
        for process in self.processes():
            if not process.alive():
                process.start()
        self.etcd.wait_healthy()
        self.wait_settled()

    def panics(self):
        return [p.name for p in self.processes() if re.search(r"panicked at|SIGSEGV|stack overflow", p.log())]

    def gauges(self):
        """What must be zero at rest: by process and name, only what is not."""
        left = {}
        for router in self.routers:
            page = metrics(router.host, HTTP)
            for name in ("tramontane_router_journal_entries", "tramontane_router_journal_tokens", "vllm:num_requests_running",
                         "vllm:num_requests_waiting"):
                if page.get(name):
                    left[router.name, name] = page[name]
        for worker in self.workers.values():
            if not worker.alive():
                continue
            page = metrics(worker.host, OPS)
            for name in ("tramontane_sequences_running", "tramontane_sequences_waiting"):
                if page.get(name):
                    left[worker.name, name] = page[name]
            taken = page.get("tramontane_kv_pages", 0) - page.get("tramontane_kv_pages_free", 0)
            if taken:
                left[worker.name, "kv pages taken"] = taken
        return left

    def close(self):
        for process in self.processes():
            process.kill()
            process.host.remove()
