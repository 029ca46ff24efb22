"""The Helm chart: lints, renders, refuses bad values, and agrees with itself and with the binary."""

import pathlib
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, run

CHART = ROOT / "helm" / "tramontane"
HELM = pathlib.Path(sys.executable).parent / "helm"
VARIANTS = {
    "defaults": {},
    "own-etcd": {"etcd.endpoints[0]": "http://etcd.infra:2379"},
    "claim": {"model.existingClaim": "weights", "model.path": "mixtral", "worker.weights": "q8"},
    "auth": {"auth.keysSecret": "keys", "router.env[0].name": "TRAMONTANE_TENANTS__ACME__WEIGHT", "router.env[0].value": "3"},
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
    values = flags(VARIANTS[request.param])
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
    ("model.path", "../../etc"), ("nonsense", "1"), ("image.digest", "sha256:12"),
])
def test_bad_values_are_refused(key, value):
    refused = helm("template", "rel", CHART, "--set", f"{key}={value}")
    assert refused.returncode != 0 and key.split(".")[0] in refused.stderr, refused.stderr
