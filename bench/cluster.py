"""Our own processes as a user starts them: `tramontane serve`, or an etcd, a router and workers. On loopback only."""

import json
import pathlib
import re
import ssl
import sys
import tempfile
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "system"))
import conftest
from conftest import Process, free_port, run, wait_until

BINARY = conftest.BINARY = conftest.TARGET / "release" / "tramontane"
READY_SECONDS = 600
BENCH_SECONDS = 1800
VOCAB, DEMO_VOCAB = 32000, 4096


class Load:
    """`tramontane bench` against any OpenAI endpoint. Every run has prompts that no cache has seen."""

    seed = 0
    trust, vocab = None, VOCAB

    def __init__(self, url):
        self.url = url

    def bench(self, batch, prompt, tokens, rounds=1):
        Load.seed += 1
        done = run(
            "bench", "--url", self.url, "--concurrency", batch, "--requests", batch * rounds,
            "--prompt-tokens", prompt, "--max-tokens", tokens, "--vocab", self.vocab, "--seed", Load.seed,
            "--output", "json", *(["--tls-ca", self.trust] if self.trust else []), seconds=BENCH_SECONDS,
        )
        return json.loads(done.stdout)


class Server(Load):
    """Any server process that answers at `health` once it is ready."""

    def __init__(self, name, command, port, health, settings=None):
        super().__init__(f"http://127.0.0.1:{port}")
        self.process = Process(name, command, settings)
        wait_until(lambda: answers(self.url + health, self.process), READY_SECONDS, f"{name} is ready")

    def stop(self):
        self.process.stop()


class Cluster(Load):
    """An etcd, a router and workers as processes, so that every worker has its metrics."""

    def __init__(self, model, weights, workers, threads, settings=None, certs=None):
        """`settings` are for all processes; with `certs`, a directory of `tramontane certs init`, all of them have TLS."""
        client, peer = free_port(), free_port()
        http, router_grpc = free_port(), free_port()
        super().__init__(f"https://localhost:{http}" if certs else f"http://127.0.0.1:{http}")
        self.trust = certs and certs / "ca.pem"
        etcd = f"http://127.0.0.1:{client}"
        self.processes = [Process("etcd", [
            "etcd", "--data-dir", tempfile.mkdtemp(prefix="etcd-"), "--listen-client-urls", etcd,
            "--advertise-client-urls", etcd, "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{peer}",
        ])]
        # The embedded model is what a process has that names none.
        model = [] if model == "demo" else ["--model", model]
        self.vocab = VOCAB if model else DEMO_VOCAB
        # As many slices of each expert as there are workers: then even a single token is work for all of them.
        settings = {"TRAMONTANE_ROUTER__SLICES_PER_EXPERT": str(min(workers, 8)), **(settings or {})}
        self.ops = []
        for i in range(workers):
            self.ops.append(free_port())
            self.processes.append(Process(f"worker-{i}", [
                BINARY, "worker", *model, "--model-name", "bench", "--etcd", etcd,
                "--id", f"w-{i}", "--weights", weights, "--threads", threads, "--grpc-port", free_port(),
                "--ops-port", self.ops[-1],
            ], settings | identity(certs, "worker")))
        self.processes.append(Process("router", [
            BINARY, "router", *model, "--model-name", "bench", "--etcd", etcd,
            "--http-port", http, "--grpc-port", router_grpc, "--admin-port", free_port(), "--min-workers", workers,
        ], settings | identity(certs, "router")))
        ready = f"{self.url}/health/ready"
        wait_until(lambda: answers(ready, *self.processes, trust=self.trust), READY_SECONDS, "the cluster is ready")

    def metrics(self):
        """All workers' metrics, added up."""
        total = {}
        for port in self.ops:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if match := re.match(r"(\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", line):
                        total[match[1]] = total.get(match[1], 0) + float(match[2])
        return total

    def stop(self):
        for process in reversed(self.processes):
            process.popen.kill()
            process.popen.wait()


def identity(certs, role):
    """Settings of a process that has its certificates from `certs`."""
    if certs is None:
        return {}
    files = {
        "CLUSTER_CERT": f"{role}.pem", "CLUSTER_KEY": f"{role}-key.pem", "CLUSTER_CA": "ca.pem",
        "CLIENTS_CERT": "clients.pem", "CLIENTS_KEY": "clients-key.pem",
    }
    return {f"TRAMONTANE_TLS__{key}": str(certs / file) for key, file in files.items()}


def answers(url, *processes, trust=None):
    assert all(p.alive() for p in processes), "\n".join(p.output()[-2000:] for p in processes)
    try:
        context = ssl.create_default_context(cafile=trust) if trust else None
        with urllib.request.urlopen(url, timeout=5, context=context):
            return True
    except OSError:
        return False
