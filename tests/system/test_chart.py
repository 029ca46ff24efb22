"""The Helm chart: lints, renders, refuses bad values, and agrees with itself and with the binary."""

import base64
import pathlib
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, run

CHART = ROOT / "helm" / "tramontane"
HELM = pathlib.Path(sys.executable).parent / "helm"
# Who may ask is to be said; a variant that says it otherwise takes this back.
EVERYBODY = {"auth.anonymous": "true"}
VARIANTS = {
    "anonymous": {},
    "own-etcd": {"etcd.endpoints[0]": "http://etcd.infra:2379"},
    "own-etcd-tls": {
        "etcd.endpoints[0]": "https://etcd.infra:2379", "etcd.tlsSecret": "etcd-ca", "etcd.clientCert": "false",
        "etcd.authSecret": "etcd-user",
    },
    "insecure": {"tls.insecure": "true", "auth.anonymous": "false"},
    "cert-manager": {"tls.certManager.enabled": "true", "tls.certManager.issuer.name": "ours", "tls.hosts[0]": "llm.example.org"},
    "secrets": {f"tls.existing.{holder}": f"my-{holder}" for holder in ("clients", "router", "worker", "operator", "etcd")},
    "operators": {"networkPolicy.operators.team": "ops"},
    "claim": {"model.existingClaim": "weights", "model.path": "mixtral", "worker.weights": "q8"},
    "auth": {
        "auth.keysSecret": "keys", "auth.anonymous": "false",
        "router.env[0].name": "TRAMONTANE_TENANTS__ACME__WEIGHT", "router.env[0].value": "3",
    },
    "tokens": {
        "auth.anonymous": "false", "router.env[0].name": "TRAMONTANE_AUTH__JWT__ISSUER", "router.env[0].value": "https://issuer",
    },
    "roles": {"worker.roles": "experts", "worker.threads": "4", "worker.expertMemory": "1000000"},
}


def helm(*args):
    return subprocess.run([str(HELM), *map(str, args)], capture_output=True, text=True, timeout=60)


def flags(values):
    # A large number given by --set would become a float.
    kind = lambda key: "--set-string" if key in ("worker.expertMemory", "router.env[0].value") else "--set"
    return [flag for key, value in values.items() for flag in (kind(key), f"{key}={value}")]


@pytest.fixture(params=VARIANTS, scope="module")
def objects(request):
    values = flags(EVERYBODY | VARIANTS[request.param])
    lint = helm("lint", "--strict", CHART, *values)
    assert lint.returncode == 0, lint.stdout
    rendered = helm("template", "rel", CHART, *values)
    assert rendered.returncode == 0, rendered.stderr
    return [o for o in yaml.safe_load_all(rendered.stdout) if o]


def pods(objects):
    return [(o, o["spec"]["template"]) for o in objects if o["kind"] in ("Deployment", "StatefulSet")]


def test_selectors_find_their_pods(objects):
    labels = [template["metadata"]["labels"] for _, template in pods(objects)]
    for owner, template in pods(objects):
        selector = owner["spec"]["selector"]["matchLabels"].items()
        assert selector <= template["metadata"]["labels"].items()
    for o in objects:
        if o["kind"] == "Service":
            selected = [l for l in labels if o["spec"]["selector"].items() <= l.items()]
            assert len(selected) == 1, o["metadata"]["name"]
        if o["kind"] == "PodDisruptionBudget":
            selector = o["spec"]["selector"]["matchLabels"].items()
            assert sum(selector <= l.items() for l in labels) == 1
        if o["kind"] == "NetworkPolicy":
            selector = o["spec"]["podSelector"]["matchLabels"].items()
            chosen = [t for _, t in pods(objects) if selector <= t["metadata"]["labels"].items()]
            assert len(chosen) == 1
            names = {p["name"] for c in chosen[0]["spec"]["containers"] for p in c["ports"]}
            for rule in o["spec"]["ingress"]:
                assert {p["port"] for p in rule["ports"]} <= names
                assert "from" in rule or {p["port"] for p in rule["ports"]} <= {"http", "grpc", "ops", "health"}


def environment(container):
    return {e["name"]: e for e in container.get("env", [])}


def ours(objects):
    """Pods, containers and environment of the binary's processes."""
    found = [(t, c) for _, t in pods(objects) for c in t["spec"]["containers"] if c["name"] in ("router", "worker")]
    assert len(found) == 2
    return [(template, container, environment(container)) for template, container in found]


def test_every_process_has_certificates_or_says_that_it_goes_without(objects):
    for template, container, env in ours(objects):
        schemes = {container[p]["httpGet"]["scheme"] for p in ("startupProbe", "livenessProbe", "readinessProbe")}
        if env.get("TRAMONTANE_TLS__INSECURE", {}).get("value") == "true":
            assert schemes == {"HTTP"} and not [n for n in env if n.startswith("TRAMONTANE_TLS__C")]
            assert "--admin-host=0.0.0.0" not in container["args"]
            continue
        assert schemes == {"HTTPS"} and "TRAMONTANE_TLS__INSECURE" not in env
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        files = {name: e["value"] for name, e in env.items() if "_TLS" in name}
        assert {"TRAMONTANE_TLS__CLUSTER_CERT", "TRAMONTANE_TLS__CLUSTER_KEY", "TRAMONTANE_TLS__CLUSTER_CA"} <= set(files)
        assert ("TRAMONTANE_TLS__CLIENTS_CERT" in files) == (container["name"] == "router")
        made = secrets(objects)
        for path in files.values():
            directory, file = path.rsplit("/", 1)
            secret = volumes[mounts[directory]]["secret"]["secretName"]
            assert secret not in made or file in made[secret], f"{secret} has no {file}"
            assert file in ("tls.crt", "tls.key", "ca.crt")


def secrets(objects):
    return {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "Secret"}


def test_the_authority_of_helm_is_mounted_nowhere(objects):
    for _, template in pods(objects):
        for volume in template["spec"].get("volumes", []):
            assert volume.get("secret", {}).get("secretName") != "rel-ca"


def test_certificates_of_helm_are_what_the_binary_takes(objects, tmp_path):
    made = secrets(objects)
    if "rel-router-tls" not in made:
        pytest.skip("these certificates are not Helm's")
    for name, data in made.items():
        for file, text in data.items():
            (tmp_path / f"{name}-{file}").write_bytes(base64.b64decode(text))
    for holder in ("clients", "router", "worker", "operator"):
        cert = tmp_path / f"rel-{holder}-tls-tls.crt"
        verified = subprocess.run(
            ["openssl", "verify", "-CAfile", tmp_path / f"rel-{holder}-tls-ca.crt", cert], capture_output=True, text=True
        )
        assert verified.returncode == 0, verified.stderr
        asked = run(
            "status", "--router", "127.0.0.1:1", "--tls-ca", tmp_path / f"rel-{holder}-tls-ca.crt",
            "--tls-cert", cert, "--tls-key", tmp_path / f"rel-{holder}-tls-tls.key", check=False,
        )
        # An operator's is taken, and nobody is there; the others are known for what they are.
        said = {"operator": "no router at", "clients": "has no URI"}.get(holder, f"is that of spiffe://rel/{holder}, expected")
        assert said in asked.stderr, asked.stderr


def test_cert_manager_is_asked_for_roles(objects):
    asked = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "Certificate"}
    if not asked:
        pytest.skip("cert-manager makes none of these")
    for role in ("router", "worker", "operator"):
        spec = asked[f"rel-{role}"]
        assert spec["uris"] == [f"spiffe://rel/{role}"] and "client auth" in spec["usages"]
    assert "llm.example.org" in asked["rel-clients"]["dnsNames"]
    assert "dnsNames" not in asked["rel-operator"]


def test_ports_mounts_and_services_exist(objects):
    services = {o["metadata"]["name"] for o in objects if o["kind"] == "Service"}
    for owner, template in pods(objects):
        spec = template["spec"]
        volumes = {v["name"] for v in spec.get("volumes", [])}
        volumes |= {c["metadata"]["name"] for c in owner["spec"].get("volumeClaimTemplates", [])}
        for container in spec["containers"]:
            names = {p["name"] for p in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in names
            assert {m["name"] for m in container["volumeMounts"]} <= volumes
            assert container["securityContext"]["readOnlyRootFilesystem"]
        if owner["kind"] == "StatefulSet":
            assert owner["spec"]["serviceName"] in services
        assert spec["securityContext"]["runAsNonRoot"]


def test_the_binary_knows_every_flag(objects):
    for _, template in pods(objects):
        for container in template["spec"]["containers"]:
            args = container.get("args")
            if not args:
                continue
            known = run(args[0], "--help").stdout
            for arg in args[1:]:
                assert arg.split("=")[0] in known, f"tramontane {args[0]} has no {arg}"


def test_routers_say_who_may_ask(objects):
    (env,) = [env for _, container, env in ours(objects) if container["name"] == "router"]
    said = [name for name in env if name.startswith("TRAMONTANE_AUTH__")]
    assert len(said) == 1 or env["TRAMONTANE_TLS__INSECURE"]["value"] == "true"


@pytest.mark.parametrize("values", [{}, {"auth.keysSecret": "keys", "auth.anonymous": "true"}])
def test_a_chart_that_does_not_say_who_may_ask_is_refused(values):
    refused = helm("template", "rel", CHART, *flags(values))
    assert refused.returncode != 0, refused.stdout
    for word in ("auth.keysSecret", "auth.anonymous"):
        assert word in refused.stderr, refused.stderr


def test_ports_are_those_of_the_binary(objects):
    ports = {
        p["name"]: p["containerPort"]
        for _, t in pods(objects) for c in t["spec"]["containers"] if c["name"] == "worker" for p in c["ports"]
    }
    checked = run("config", "check").stdout
    assert f":{ports['grpc']}" in checked or str(ports["grpc"]) in checked
    assert str(ports["ops"]) in checked


@pytest.mark.parametrize("key,value", [
    ("worker.roles", "cook"), ("worker.replicas", "0"), ("etcd.replicas", "2"), ("worker.weights", "q3"),
    ("tls.certManager.enabled", "true"), ("tls.days", "0"), ("tls.existing.cook", "x"),
    ("model.path", "../../etc"), ("nonsense", "1"), ("image.digest", "sha256:12"), ("auth.anonymous", "perhaps"),
])
def test_bad_values_are_refused(key, value):
    refused = helm("template", "rel", CHART, *flags(EVERYBODY | {key: value}))
    assert refused.returncode != 0 and key.split(".")[0] in refused.stderr, refused.stderr
