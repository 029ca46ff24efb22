"""TLS between real processes: who is believed, what a refusal says, new files under load, and which ports may be open."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request

import grpc
import httpx2
import openai
import pytest
from conftest import BINARY, Process, free_port, run, wait_until

CLUSTER = "tls"
PASSWORD = "correct horse battery staple"
RELOAD = "200ms"


def certs(directory, *args, cluster=CLUSTER):
    return run("certs", *args, "--dir", directory, "--cluster", cluster)


def pair(directory, name):
    return directory / f"{name}.pem", directory / f"{name}-key.pem"


def tls_section(directory, role, clients="clients"):
    cert, key = pair(directory, role)
    shown, shown_key = pair(directory, clients)
    return (
        f'[tls]\nreload_every = "{RELOAD}"\ncluster_cert = "{cert}"\ncluster_key = "{key}"\n'
        f'cluster_ca = "{directory / "ca.pem"}"\nclients_cert = "{shown}"\nclients_key = "{shown_key}"\n'
    )


def expired(directory, role):
    """A certificate of the authority whose time is over; ours makes none, openssl does."""
    cert, key = pair(directory, "expired")
    settings = directory / "openssl.cnf"
    settings.write_text(
        "[ca]\ndefault_ca = d\n[d]\n"
        f"new_certs_dir = {directory}\ndatabase = {directory}/index\nserial = {directory}/serial\n"
        "default_md = sha256\npolicy = p\nx509_extensions = e\n[p]\ncommonName = supplied\n[e]\n"
        "extendedKeyUsage = serverAuth, clientAuth\n"
        f"subjectAltName = URI:spiffe://{CLUSTER}/{role}, DNS:localhost\n"
    )
    (directory / "index").write_text("")
    (directory / "serial").write_text("77\n")
    request = directory / "expired.csr"
    for command in [
        ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key,
         "-out", request, "-subj", "/CN=expired"],
        ["ca", "-batch", "-notext", "-config", settings, "-in", request, "-out", cert, "-cert", directory / "ca.pem",
         "-keyfile", directory / "ca-key.pem", "-startdate", "20200101000000Z", "-enddate", "20200201000000Z"],
    ]:
        done = subprocess.run(["openssl", *map(str, command)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


class Secured:
    """An etcd that asks for certificates and a password, a router and three workers; everything over TLS."""

    def __init__(self, tmp):
        self.tmp, self.certs, self.foreign = tmp, tmp / "certs", tmp / "foreign"
        certs(self.certs, "init", "--host", "llm.example.org")
        certs(self.certs, "issue", "--role", "etcd")
        certs(self.foreign, "init")
        certs(self.certs, "issue", "--role", "router", "--name", "other-cluster", "--force", cluster="other")
        expired(self.certs, "worker")
        # As a mounted secret is: what processes read is behind a link.
        self.live = tmp / "live"
        self.live.symlink_to(self.certs)
        self.http, self.grpc, self.admin, self.etcd_port = (free_port() for _ in range(4))
        self.start_etcd()
        self.router = Process("router", [
            BINARY, "router", *self.common("router"), "--host", "0.0.0.0", "--http-port", self.http,
            "--grpc-port", self.grpc, "--admin-host", "0.0.0.0", "--admin-port", self.admin, "--min-workers", "3",
        ], self.env())
        self.workers, self.ops, self.doors = {}, {}, {}
        for name in ("w-0", "w-1"):
            self.start_worker(name)
        # One tells all that it does.
        self.start_worker("w-2", "--log", "trace")

    def start_etcd(self):
        cert, key = pair(self.certs, "etcd")
        peer, health = free_port(), free_port()
        url = f"https://127.0.0.1:{self.etcd_port}"
        self.etcd = Process("etcd", [
            "etcd", "--data-dir", self.tmp / "etcd", "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{peer}",
            "--listen-metrics-urls", f"http://127.0.0.1:{health}",
            "--cert-file", cert, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", self.certs / "ca.pem",
        ])

        def healthy():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{health}/health", timeout=2) as answer:
                    return json.load(answer)["health"] == "true"
            except OSError:
                return False

        wait_until(healthy, 60, "etcd is healthy")
        for command in [
            ["user", "add", f"root:{PASSWORD}"], ["user", "grant-role", "root", "root"],
            ["user", "add", f"tramontane:{PASSWORD}"], ["role", "add", "tramontane"],
            ["role", "grant-permission", "tramontane", "--prefix=true", "readwrite", "/tramontane/"],
            ["user", "grant-role", "tramontane", "tramontane"], ["auth", "enable"],
        ]:
            done = self.etcdctl(*command)
            assert done.returncode == 0 or "already exists" in done.stderr, (command, done.stderr)

    def etcdctl(self, *command):
        cert, key = pair(self.certs, "etcd")
        flags = ["--endpoints", f"https://127.0.0.1:{self.etcd_port}", "--cacert", self.certs / "ca.pem", "--cert", cert, "--key", key]
        return subprocess.run(
            ["etcdctl", *map(str, flags), *command], capture_output=True, text=True, errors="replace", timeout=60,
            env={**os.environ, "ETCDCTL_API": "3"},
        )

    def env(self):
        return {"TRAMONTANE_ETCD__PASSWORD": PASSWORD}

    def common(self, role):
        cert, key = pair(self.live, role)
        settings = self.tmp / f"{role}.toml"
        # Once: a process that starts may be reading it.
        if not settings.exists():
            settings.write_text(
                tls_section(self.live, role) + f'[auth]\nanonymous = true\n[etcd]\nendpoints = ["https://127.0.0.1:{self.etcd_port}"]\n'
                f'cluster = "{CLUSTER}"\ntls_ca = "{self.live / "ca.pem"}"\ntls_cert = "{cert}"\ntls_key = "{key}"\n'
                'user = "tramontane"\n'
            )
        return ["--config", settings]

    def start_worker(self, name, *flags):
        self.ops[name], self.doors[name] = free_port(), free_port()
        self.workers[name] = Process(name, [
            BINARY, "worker", *self.common("worker"), "--id", name, "--threads", "1", "--host", "0.0.0.0",
            "--grpc-port", self.doors[name], "--ops-port", self.ops[name],
            "--advertise", f"127.0.0.1:{self.doors[name]}", *flags,
        ], self.env())

    def operator(self, *args, role="operator", **options):
        cert, key = pair(self.live, role)
        flags = ["--tls-ca", self.live / "ca.pem", "--tls-cert", cert, "--tls-key", key]
        return run(*args, "--router", f"127.0.0.1:{self.admin}", *flags, **options)

    def ready(self):
        done = self.operator("status", "--output", "json", check=False)
        return bool(done.stdout) and json.loads(done.stdout).get("ready")

    def client(self):
        trust = ssl.create_default_context(cafile=self.certs / "ca.pem")
        return openai.OpenAI(
            base_url=f"https://localhost:{self.http}/v1", api_key="unused", max_retries=0,
            http_client=httpx2.Client(verify=trust),
        )

    def channel(self, port, name, directory=None):
        """A foreign gRPC client with one of our certificates."""
        directory = directory or self.certs
        cert, key = pair(directory, name)
        shown = grpc.ssl_channel_credentials(
            (self.certs / "ca.pem").read_bytes(), key.read_bytes(), cert.read_bytes()
        )
        return grpc.secure_channel(f"localhost:{port}", shown)

    def processes(self):
        return [self.router, *self.workers.values()]

    def logs(self):
        return "\n".join(f"== {p.name}\n{p.output()[-3000:]}" for p in [self.etcd, *self.processes()])


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    assert shutil.which("etcd") and shutil.which("etcdctl"), "etcd is not installed; `make test` installs it"
    secured = Secured(tmp_path_factory.mktemp("tls"))
    try:
        wait_until(secured.ready, 120, "the cluster is ready")
    except AssertionError:
        raise AssertionError(secured.logs())
    yield secured
    assert all(process.alive() for process in secured.processes()), secured.logs()
    for process in [*secured.processes(), secured.etcd]:
        process.stop(signal.SIGKILL)


def tell(client, **options):
    return client.chat.completions.create(
        model="tramontane-demo", messages=[{"role": "user", "content": "Tell me a story."}],
        temperature=0, max_tokens=120, **options,
    )


def openssl(port, *flags, said=""):
    """What another TLS says about a port."""
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"localhost:{port}", "-servername", "localhost", *map(str, flags)],
        input=said, capture_output=True, text=True, timeout=30,
    )
    return done.stdout + done.stderr


def test_router_workers_and_etcd_answer_over_tls(secured):
    assert tell(secured.client()).choices[0].message.content
    workers = json.loads(secured.operator("workers", "list", "--output", "json").stdout)
    assert all(w["state"] == "ready" and w["segments"] > 0 for w in workers) and len(workers) == 3
    for process in secured.processes():
        assert PASSWORD not in process.output()
    checked = run("config", "check", "--config", secured.common("router")[1], env={**os.environ, **secured.env()})
    assert PASSWORD not in checked.stdout and "(hidden)" in checked.stdout


def test_another_tls_agrees_about_every_port(secured):
    trust = ["-CAfile", secured.certs / "ca.pem", "-verify_return_error"]
    for port in (secured.http, secured.grpc, secured.ops["w-0"]):
        for version, alpn in (("-tls1_3", "h2"), ("-tls1_2", "http/1.1")):
            said = openssl(port, *trust, "-verify_hostname", "localhost", version, "-alpn", alpn)
            assert "Verify return code: 0 (ok)" in said and f"ALPN protocol: {alpn}" in said, said
    assert "llm.example.org" in subprocess.run(
        ["openssl", "x509", "-noout", "-text"], input=openssl(secured.http, *trust), capture_output=True, text=True
    ).stdout
    for port in (secured.admin, secured.doors["w-0"]):
        assert "Verify return code: 0 (ok)" in openssl(port, *trust, "-tls1_2", *shown(secured, "operator"))
        assert "alert certificate required" in openssl(port, *trust, "-tls1_3", "-ign_eof"), port
        old = openssl(port, *trust, "-tls1_1")
        assert "Cipher is (NONE)" in old, old
    with urllib.request.urlopen(
        f"https://localhost:{secured.ops['w-0']}/metrics", timeout=10,
        context=ssl.create_default_context(cafile=secured.certs / "ca.pem"),
    ) as page:
        assert b"tramontane_" in page.read()


def shown(secured, name):
    cert, key = pair(secured.certs, name)
    return ["-cert", cert, "-key", key]


def refusal(call):
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value


def test_a_wrong_role_or_cluster_is_told_what_was_expected(secured, proto):
    stub = lambda name, port: proto.admin_grpc.AdminStub(secured.channel(port, name))
    asked = proto.admin.ClusterStatusRequest()
    assert stub("operator", secured.admin).ClusterStatus(asked, timeout=10).ready
    for name, said in [
        ("worker", f"got spiffe://{CLUSTER}/worker"), ("router", f"got spiffe://{CLUSTER}/router"),
        ("other-cluster", "got spiffe://other/router"), ("etcd", "has no URI spiffe://"),
    ]:
        error = refusal(lambda: stub(name, secured.admin).ClusterStatus(asked, timeout=10))
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED, error
        assert said in error.details(), error
        if name != "etcd":
            assert f"is for spiffe://{CLUSTER}/operator" in error.details(), error
    drain = lambda name: secured.channel(secured.doors["w-0"], name).unary_unary(
        "/tramontane.v1.Worker/Drain", request_serializer=lambda _: b"", response_deserializer=bytes
    )(None, timeout=10)
    for name in ("worker", "other-cluster"):
        error = refusal(lambda: drain(name))
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED and "v1.Worker/Drain" in error.details(), error
    refused = secured.operator("status", role="router", check=False)
    assert refused.returncode == 2 and "expected the role operator" in refused.stderr, refused.stderr
    assert secured.ready()


def test_peers_let_in_workers_only(secured, proto):
    """Rows and weights: the doors that only workers have a reason to go through."""
    port = secured.doors["w-0"]
    seen = json.loads(secured.operator("workers", "list", "--output", "json").stdout)[0]
    expert, weights = proto.expert, proto.weights
    hello = expert.ExpertFrame(hello=expert.Hello(
        worker_id="w-9", cluster=CLUSTER, numeric_class=seen["numeric_class"], model=seen["weights"], credits=1,
    ))
    asker = weights.WeightsAsker(worker_id="w-9", cluster=CLUSTER, model=seen["weights"])

    def exchange(name):
        stub = proto.expert_grpc.ExpertExchangeStub(secured.channel(port, name))
        return next(stub.Exchange(iter([hello]), timeout=10))

    def describe(name):
        stub = proto.weights_grpc.WeightsStub(secured.channel(port, name))
        return stub.DescribeCheckpoint(weights.DescribeCheckpointRequest(asker=asker), timeout=10)

    assert exchange("worker").hello.worker_id == "w-0"
    assert describe("worker").fingerprint == seen["weights"]
    for call, path in [(exchange, "ExpertExchange/Exchange"), (describe, "Weights/DescribeCheckpoint")]:
        for name, got in [
            ("router", f"spiffe://{CLUSTER}/router"), ("operator", f"spiffe://{CLUSTER}/operator"),
            ("other-cluster", "spiffe://other/router"),
        ]:
            error = refusal(lambda: call(name))
            assert error.code() == grpc.StatusCode.PERMISSION_DENIED, error
            assert f"v1.{path} is for spiffe://{CLUSTER}/worker, got {got}" in error.details(), error
        before = len(secured.workers["w-0"].output())
        error = refusal(lambda: call("expired"))
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        said = lambda: re.search("connection refused.*[Ee]xpired", secured.workers["w-0"].output()[before:])
        wait_until(said, 15, "the worker's log says why")
    assert secured.ready()


def test_secrets_are_nowhere_but_in_their_files(secured):
    """The password of etcd and every private key: in no log, one of them at `trace`, in no metric and nowhere in etcd."""
    secrets = {PASSWORD}
    for file in secured.certs.glob("*-key.pem"):
        secrets |= {line for line in file.read_text().splitlines() if line and not line.startswith("-----")}
    assert len(secrets) > 10
    trust = ssl.create_default_context(cafile=secured.certs / "ca.pem")
    page = lambda port: urllib.request.urlopen(f"https://localhost:{port}/metrics", timeout=10, context=trust).read().decode()
    everything = secured.etcdctl("--user", f"root:{PASSWORD}", "get", "--prefix", "/")
    assert all(f"/tramontane/{CLUSTER}/workers/{name}" in everything.stdout for name in secured.workers), everything.stderr
    places = {"etcd": everything.stdout, "the router's metrics": page(secured.http)}
    places |= {f"the metrics of {name}": page(port) for name, port in secured.ops.items()}
    places |= {f"the log of {process.name}": process.output() for process in secured.processes()}
    assert "TRACE" in places["the log of w-2"]
    for place, text in places.items():
        assert text and not [secret for secret in secrets if secret in text], place


def test_a_certificate_of_another_authority_or_time_is_no_certificate(secured, proto):
    asked = proto.admin.ClusterStatusRequest()
    for name, directory, why in [
        ("operator", secured.foreign, "UnknownIssuer"), ("expired", secured.certs, "[Ee]xpired"),
    ]:
        before = len(secured.router.output())
        stub = proto.admin_grpc.AdminStub(secured.channel(secured.admin, name, directory))
        error = refusal(lambda: stub.ClusterStatus(asked, timeout=10))
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        wait_until(
            lambda: re.search(f"connection refused.*{why}", secured.router.output()[before:]), 10, f"the log says {why}"
        )
    assert "127.0.0.1:" in secured.router.output()[before:]
    cert, key = pair(secured.foreign, "operator")
    stranger = run(
        "status", "--router", f"127.0.0.1:{secured.admin}", "--tls-ca", secured.foreign / "ca.pem",
        "--tls-cert", cert, "--tls-key", key, check=False,
    )
    assert stranger.returncode == 5 and "UnknownIssuer" in stranger.stderr, stranger.stderr
    assert secured.ready()


@pytest.mark.parametrize("change,said", [
    (("cluster_cert", "router"), "router.pem"), (("cluster_cert", "expired"), "expired.pem is valid from Jan  1"),
    (("cluster_key", "operator-key"), "is not that of certificate"), (("cluster_cert", "missing"), "missing.pem"),
    (("cluster_ca", "worker-key"), "must be PEM with at least one certificate"),
])
def test_a_process_with_the_wrong_files_says_so_and_does_not_start(secured, tmp_path, change, said):
    key, name = change
    settings = tmp_path / "settings.toml"
    text = tls_section(secured.certs, "worker")
    text = re.sub(rf'^{key} = .*$', f'{key} = "{secured.certs / name}.pem"', text, flags=re.M)
    if name == "expired":
        text = text.replace("worker-key.pem", "expired-key.pem")
    settings.write_text(text + f'[etcd]\ncluster = "{CLUSTER}"\n')
    refused = run("worker", "--id", "w", "--config", settings, check=False)
    assert refused.returncode == 2 and said in refused.stderr, refused.stderr


def test_a_certificate_of_another_role_or_cluster_does_not_start_a_process(secured, tmp_path):
    settings = tmp_path / "settings.toml"
    for name, cluster, got in [("operator", CLUSTER, "tls/operator"), ("worker", "prod", "tls/worker")]:
        settings.write_text(tls_section(secured.certs, name) + f'[etcd]\ncluster = "{cluster}"\n')
        refused = run("worker", "--id", "w", "--config", settings, check=False)
        expected = f"is that of spiffe://{got}, expected spiffe://{cluster}/worker"
        assert refused.returncode == 2 and expected in refused.stderr, refused.stderr


def test_plaintext_at_a_tls_port_is_told_so(secured):
    for port in (secured.http, secured.ops["w-0"], secured.admin):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=10)
        assert refused.value.code == 400 and "https://" in refused.value.read().decode()
    before = len(secured.router.output())
    channel = grpc.insecure_channel(f"127.0.0.1:{secured.grpc}")
    error = refusal(lambda: channel.unary_unary("/tramontane.v1.Inference/ListModels")(b"", timeout=10))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    wait_until(lambda: "speaks plaintext" in secured.router.output()[before:], 10, "the log says so")
    plain = run("status", "--router", f"http://127.0.0.1:{secured.admin}", check=False)
    assert plain.returncode == 5, plain.stderr
    assert secured.ready()


def test_tls_at_a_plaintext_port_is_told_so(secured, server):
    cert, key = pair(secured.certs, "operator")
    flags = ["--tls-ca", secured.certs / "ca.pem", "--tls-cert", cert, "--tls-key", key]
    refused = run("status", "--router", f"https://{server.admin}", *flags, check=False)
    assert refused.returncode == 5 and "plaintext" in refused.stderr, refused.stderr
    refused = run("status", "--router", f"https://{server.admin}", check=False)
    assert refused.returncode == 2 and "--tls-cert" in refused.stderr, refused.stderr


def test_an_operator_goes_beyond_this_machine_with_tls_or_on_its_word():
    """192.0.2.0/24 is nobody's: what would go there would be lost, and is not sent."""
    env = {**os.environ, "TRAMONTANE_API_KEY": "trm_secret", "OPENAI_API_KEY": "trm_secret"}
    for command, address in [
        (["status", "--router"], "192.0.2.2:8002"), (["status", "--router"], "http://192.0.2.2:8002"),
        (["drill", "slow", "w-0", "--router"], "192.0.2.2:8002"),
        (["chat", "hello", "--url"], "http://192.0.2.2:8000"), (["bench", "--url"], "http://192.0.2.2:8000/v1"),
    ]:
        refused = run(*command, address, check=False, env=env)
        assert refused.returncode == 2, (command, refused.stderr)
        assert "192.0.2.2" in refused.stderr and "--insecure" in refused.stderr, refused.stderr
        assert "trm_secret" not in refused.stderr


def test_a_session_of_an_operator_is_not_resumed(secured, tmp_path):
    """Resuming would not check the certificate again; another TLS tries, with what it was told to remember."""
    session = tmp_path / "session"
    for version in ("-tls1_3", "-tls1_2"):
        flags = ["-CAfile", secured.certs / "ca.pem", version]
        for port, who, expected in [(secured.admin, shown(secured, "operator"), "New"), (secured.http, [], "Reused")]:
            session.unlink(missing_ok=True)
            # It asks for something and waits for the end of the answer: tickets come after the handshake.
            ask = "GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            first = openssl(port, *flags, *who, "-sess_out", session, "-alpn", "http/1.1", "-ign_eof", said=ask)
            assert "New, TLSv1" in first, first
            if not session.exists():
                assert expected == "New", first
                continue
            again = openssl(port, *flags, *who, "-sess_in", session)
            assert f"{expected}, TLSv1" in again, again


def test_a_flood_of_strangers_leaves_a_short_log(secured):
    before = len(secured.router.output())
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", secured.admin), 10) as stranger:
            stranger.sendall(b"hello, this is no TLS at all\n")
            try:
                stranger.recv(1024)
            except ConnectionResetError:
                pass
    assert secured.ready()
    assert 1 <= secured.router.output()[before:].count("connection refused") <= 40


def certificate(port):
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)


def switch(secured, directory):
    """Points the link elsewhere in one step, as kubelet does."""
    fresh = secured.tmp / "fresh"
    fresh.symlink_to(directory)
    fresh.replace(secured.live)


def test_new_certificates_are_taken_while_a_stream_runs(secured):
    before = {port: certificate(port) for port in (secured.http, *secured.ops.values())}
    whole = tell(secured.client()).choices[0].message.content
    stream = tell(secured.client(), stream=True)
    first = next(stream).choices[0].delta.content or ""

    broken = secured.tmp / "broken"
    shutil.copytree(secured.certs, broken)
    (broken / "clients.pem").write_text("not a certificate")
    (broken / "worker.pem").write_bytes((broken / "router.pem").read_bytes())
    switch(secured, broken)
    wait_until(lambda: "the old identity stays" in secured.router.output(), 20, "the router keeps its certificate")
    wait_until(
        lambda: "the old identity stays" in secured.workers["w-0"].output(), 20, "the worker keeps its certificate"
    )
    assert {port: certificate(port) for port in before} == before and secured.ready()

    renewed = secured.tmp / "renewed"
    renewed.mkdir()
    for name in ("ca.pem", "ca-key.pem"):
        shutil.copy(secured.certs / name, renewed / name)
    for role in ("clients", "router", "worker", "operator"):
        certs(renewed, "issue", "--role", role)
    switch(secured, renewed)
    for port, old in before.items():
        wait_until(lambda: certificate(port) != old, 20, f"port {port} shows the new certificate")
    trust = ["-CAfile", secured.certs / "ca.pem", "-verify_return_error"]
    assert "Verify return code: 0 (ok)" in openssl(secured.http, *trust)
    rest = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert first + rest == whole
    # New connections between processes as well: a worker that starts again is met by all.
    secured.workers["w-1"].stop(signal.SIGTERM, seconds=90)
    secured.start_worker("w-1")
    wait_until(
        lambda: json.loads(secured.operator("status", "--output", "json", check=False).stdout or "{}").get("workers_ready") == 3,
        60, "w-1 is back",
    )
    assert tell(secured.client()).choices[0].message.content == whole


@pytest.mark.parametrize("command,key", [
    (["serve", "--host", "0.0.0.0"], "listen.http"), (["serve", "--admin-host", "::"], "listen.admin"),
    (["router", "--host", "0.0.0.0"], "listen.http"), (["router", "--admin-host", "0.0.0.0"], "listen.admin"),
    (["worker", "--id", "w", "--host", "0.0.0.0"], "listen."),
])
def test_nothing_is_open_beyond_this_machine_in_the_clear(command, key):
    refused = run(*command, check=False)
    assert refused.returncode == 2, refused.stderr
    for word in (key, "beyond this machine", "tramontane certs init", "--insecure"):
        assert word in refused.stderr, refused.stderr


def test_a_health_port_is_no_exception(tmp_path):
    env = {**os.environ, "TRAMONTANE_LISTEN__OPS": "0.0.0.0:0"}
    refused = run("worker", "--id", "w", check=False, env=env)
    assert refused.returncode == 2 and "listen.ops is 0.0.0.0:0" in refused.stderr, refused.stderr


@pytest.mark.parametrize("command", ["serve", "router"])
def test_nobody_is_served_beyond_this_machine_unless_somebody_says_who(secured, tmp_path, command):
    settings = tmp_path / "settings.toml"
    settings.write_text(tls_section(secured.certs, "router") + f'[etcd]\ncluster = "{CLUSTER}"\n')
    refused = run(command, "--host", "0.0.0.0", "--config", settings, check=False)
    assert refused.returncode == 2, refused.stderr
    for word in ("listen.http", "tramontane keys add", "[auth.jwt]", "auth.anonymous"):
        assert word in refused.stderr, refused.stderr


@pytest.mark.parametrize("flags,env", [(["--insecure"], {}), ([], {"TRAMONTANE_TLS__INSECURE": "true"})])
def test_whoever_insists_may(flags, env):
    insists = Process("insists", [
        BINARY, "serve", "--workers", "1", "--host", "0.0.0.0", "--http-port", "0", "--grpc-port", "0",
        "--admin-port", "0", *flags,
    ], env)
    insists.wait_for(r"OpenAI API\s+http://0\.0\.0\.0:\d+/v1")
    insists.wait_for(r"admin API\s+127\.0\.0\.1:\d+")
    assert insists.stop() == 0


def test_one_process_with_tls(secured, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text(tls_section(secured.certs, "router") + f'[auth]\nanonymous = true\n[etcd]\ncluster = "{CLUSTER}"\n')
    one = Process("serve", [
        BINARY, "serve", "--config", settings, "--workers", "1", "--host", "0.0.0.0", "--http-port", "0",
        "--grpc-port", "0", "--admin-port", "0",
    ])
    url = one.wait_for(r"OpenAI API\s+(https://\S+)/v1").group(1).replace("0.0.0.0", "localhost")
    admin = one.wait_for(r"admin API\s+(\S+)").group(1)
    ca = ["--tls-ca", secured.certs / "ca.pem"]
    assert "Warsaw" in run("chat", "What is the capital of Poland?", "--temperature", 0, "--url", url, *ca).stdout
    distrusted = run("chat", "hello", "--url", url, "--tls-ca", secured.foreign / "ca.pem", check=False)
    assert distrusted.returncode == 1, distrusted.stderr
    cert, key = pair(secured.certs, "operator")
    assert "ready" in run("status", "--router", admin, *ca, "--tls-cert", cert, "--tls-key", key).stdout
    assert one.stop() == 0
