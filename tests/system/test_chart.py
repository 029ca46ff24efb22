"""The Helm chart: lints, renders, refuses bad values, and agrees with itself and with the binary."""

import base64
import json
import pathlib
import re
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
    "gpus": {"values": CHART / "examples" / "gpus.yaml"},
    "pools": {
        "worker.env[0].name": "TRAMONTANE_WORKER__MAX_RUNNING", "worker.env[0].value": "64", "worker.kvFormat": "q8",
        "workerPools[0].name": "large", "workerPools[0].replicas": "2", "workerPools[0].device": "cuda:0", "workerPools[0].weights": "e4m3",
        "workerPools[1].name": "large-1", "workerPools[1].roles": "experts", "workerPools[1].nodeSelector.disk": "fast",
        "tls.certManager.enabled": "true", "tls.certManager.issuer.name": "ours", "tls.hosts[0]": "llm.example.org",
        "networkPolicy.operators.team": "ops",
    },
    "pools-insecure": {"tls.insecure": "true", "workerPools[0].name": "b", "workerPools[0].runtimeClassName": "nvidia"},
}


def helm(*args):
    return subprocess.run([str(HELM), *map(str, args)], capture_output=True, text=True, timeout=60)


def flags(values):
    # A large number given by --set would become a float, and one in an environment is text.
    kind = lambda key: "--set-string" if key == "worker.expertMemory" or key.endswith("].value") else "--set"
    files = ["--values", values["values"]] if "values" in values else []
    return files + [flag for key, value in values.items() if key != "values" for flag in (kind(key), f"{key}={value}")]


def render(values):
    rendered = helm("template", "rel", CHART, *flags(values))
    assert rendered.returncode == 0, rendered.stderr
    return [o for o in yaml.safe_load_all(rendered.stdout) if o]


@pytest.fixture(params=VARIANTS, scope="module")
def objects(request):
    values = EVERYBODY | VARIANTS[request.param]
    lint = helm("lint", "--strict", CHART, *flags(values))
    assert lint.returncode == 0, lint.stdout
    return render(values)


def pods(objects):
    return [(o, o["spec"]["template"]) for o in objects if o["kind"] in ("Deployment", "StatefulSet")]


def matches(selector, labels):
    """Whether a label selector, of those kinds that the chart has, finds a pod."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    among = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in among)
    return selector["matchLabels"].items() <= labels.items() and all(labels.get(e["key"]) in e["values"] for e in among)


def test_selectors_find_their_own_pods_and_no_others(objects):
    labels = {owner["metadata"]["name"]: template["metadata"]["labels"] for owner, template in pods(objects)}
    selectors = {"Service": {}, "PodDisruptionBudget": {}}
    for owner, _ in pods(objects):
        selectors.setdefault(owner["kind"], {})[owner["metadata"]["name"]] = owner["spec"]["selector"]
    for o in objects:
        name = o["metadata"]["name"]
        if o["kind"] == "Service":
            selectors["Service"][name] = {"matchLabels": o["spec"]["selector"]}
        if o["kind"] == "PodDisruptionBudget":
            selectors["PodDisruptionBudget"][name] = o["spec"]["selector"]
    routers = {"rel": "rel-router", "rel-admin": "rel-router"}
    for named in selectors.values():
        for name, selector in named.items():
            assert [pod for pod, l in labels.items() if matches(selector, l)] == [routers.get(name, name)]
    stateful = set(selectors["StatefulSet"])
    assert stateful == set(selectors["Service"]) - set(routers)
    assert set(selectors["PodDisruptionBudget"]) == {"rel-router"} | stateful - {"rel-etcd"}
    for owner, template in pods(objects):
        for spread in template["spec"].get("topologySpreadConstraints", []):
            assert spread["labelSelector"] == owner["spec"]["selector"]


def test_network_policies_cover_every_pod_once(objects):
    policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
    for owner, template in pods(objects):
        found = [o for o in policies if matches(o["spec"]["podSelector"], template["metadata"]["labels"])]
        assert len(found) == 1, owner["metadata"]["name"]
        ports = {p["name"] for c in template["spec"]["containers"] for p in c["ports"]}
        for rule in found[0]["spec"]["ingress"]:
            assert {p["port"] for p in rule["ports"]} <= ports
            assert "from" in rule or {p["port"] for p in rule["ports"]} <= {"http", "grpc", "ops", "health"}
    # All workers and routers reach all workers and etcd.
    callers = [t["metadata"]["labels"] for _, t in pods(objects) if t["metadata"]["labels"]["app.kubernetes.io/component"] != "etcd"]
    for policy in policies:
        if policy["metadata"]["name"] == "rel-router":
            continue
        peers = policy["spec"]["ingress"][0]["from"]
        for labels in callers:
            assert any(matches(peer["podSelector"], labels) for peer in peers)


def environment(container):
    return {e["name"]: e for e in container.get("env", [])}


def ours(objects):
    """Pods, containers and environment of the binary's processes."""
    found = [(t, c) for _, t in pods(objects) for c in t["spec"]["containers"] if c["name"] in ("router", "worker")]
    assert {c["name"] for _, c in found} == {"router", "worker"}
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


def test_certificates_name_every_pod(objects, tmp_path):
    asked = {o["metadata"]["name"]: o["spec"]["dnsNames"] for o in objects if o["kind"] == "Certificate" and "dnsNames" in o["spec"]}
    for name, data in secrets(objects).items():
        (tmp_path / "cert").write_bytes(base64.b64decode(data["tls.crt"]))
        command = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", tmp_path / "cert"]
        text = subprocess.run(command, capture_output=True, text=True).stdout
        asked[name.removesuffix("-tls")] = re.findall(r"DNS:([^,\s]+)", text)
    if len(asked) < 2:
        pytest.skip("these certificates are the operator's")
    for owner, template in pods(objects):
        if owner["kind"] != "StatefulSet":
            continue
        (container,) = template["spec"]["containers"]
        name = owner["metadata"]["name"]
        said = [a for a in container.get("args", []) if a.startswith("--advertise=")]
        assert said == ([f"--advertise=$(POD_NAME).{name}:8100"] if container["name"] == "worker" else [])
        for host in (name, f"{name}.default.svc", f"{name}-0.{name}", f"{name}-1.{name}.default.svc"):
            assert {host, "*." + host.partition(".")[2]} & set(asked[f"rel-{container['name']}"]), host


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


def test_the_binary_takes_every_setting(objects):
    """Settings are read before anything else; what is missing here, and nobody gave it, are etcd's authorities."""
    for _, container, env in ours(objects):
        args = [a for a in container["args"] if not a.startswith("--etcd=")]
        more = {name: e["value"] for name, e in env.items() if name.startswith("TRAMONTANE_WORKER__")}
        ended = run(*args, "--etcd=https://127.0.0.1:1", env=more, check=False)
        assert ended.returncode == 2 and "etcd.tls_ca must name" in ended.stderr, ended.stderr


def args_of(objects):
    """Arguments of the workers by their StatefulSet."""
    workers = [(o, t["spec"]["containers"][0]) for o, t in pods(objects)]
    return {o["metadata"]["name"]: c["args"] for o, c in workers if c["name"] == "worker"}


def test_a_pool_that_says_nothing_is_the_first_one_again():
    objects = render(EVERYBODY | VARIANTS["roles"] | {
        "worker.device": "cpu", "worker.numericClass": "a+b@2", "worker.kvFormat": "q8", "worker.env[0].name": "X",
        "worker.env[0].value": "1", "worker.nodeSelector.disk": "fast", "worker.tolerations[0].operator": "Exists",
        "worker.runtimeClassName": "nvidia", "worker.drainSeconds": "7", "workerPools[0].name": "gpu",
    })
    for kind in ("StatefulSet", "Service", "PodDisruptionBudget"):
        named = {o["metadata"]["name"]: json.dumps(o) for o in objects if o["kind"] == kind}
        assert named["rel-worker-gpu"] != named["rel-worker"]
        assert named["rel-worker-gpu"].replace("worker-gpu", "worker") == named["rel-worker"]
    (router,) = [c["args"] for _, t in pods(objects) for c in t["spec"]["containers"] if c["name"] == "router"]
    assert "--min-workers=6" in router


def test_the_first_placement_waits_for_those_who_can_hold_experts():
    for roles, waits_for in [("attention", 5), ("experts", 7), ("attention,experts", 7)]:
        pools = {"workerPools[0].name": "a", "workerPools[0].replicas": "2", "workerPools[0].roles": roles.replace(",", "\\,")}
        objects = render(EVERYBODY | {"worker.replicas": "5"} | pools)
        (router,) = [c["args"] for _, t in pods(objects) for c in t["spec"]["containers"] if c["name"] == "router"]
        assert f"--min-workers={waits_for}" in router, roles


def test_what_a_pool_says_replaces_what_worker_says():
    worker = {
        "worker.device": "cuda:1", "worker.numericClass": "a+b", "worker.threads": "4", "worker.env[0].name": "X", "worker.drainSeconds": "7",
        "worker.nodeSelector.disk": "fast", "worker.nodeSelector.rack": "one", "worker.tolerations[0].operator": "Exists",
    }
    pool = {
        "replicas": "5", "roles": "experts", "weights": "q4", "device": "cpu", "numericClass": "c+d@1", "kvFormat": "q8", "threads": "0",
        "env[0].name": "Y", "drainSeconds": "9", "nodeSelector.disk": "slow", "resources.limits.memory": "1Gi",
    }
    pools = {f"workerPools[1].{key}": value for key, value in pool.items()}
    objects = render(EVERYBODY | worker | pools | {"workerPools[0].name": "a", "workerPools[1].name": "b"})
    said = {name: [a for a in args if a.split("=")[0] in (
        "--roles", "--weights", "--device", "--numeric-class", "--kv-format", "--threads"
    )] for name, args in args_of(objects).items()}
    first = ["--roles=attention,experts", "--weights=bf16", "--device=cuda:1", "--numeric-class=a+b", "--threads=4"]
    other = ["--roles=experts", "--weights=q4", "--device=cpu", "--numeric-class=c+d@1", "--kv-format=q8"]
    assert said == {"rel-worker": first, "rel-worker-a": first, "rel-worker-b": other}
    (spec,) = [o["spec"] for o in objects if o["kind"] == "StatefulSet" and o["metadata"]["name"] == "rel-worker-b"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["replicas"] == 5 and pod["terminationGracePeriodSeconds"] == 39
    assert pod["nodeSelector"] == {"disk": "slow"} and pod["tolerations"] == [{"operator": "Exists"}]
    assert container["resources"] == {"limits": {"memory": "1Gi"}}
    assert "Y" in environment(container) and "X" not in environment(container)


def test_a_worker_without_more_settings_has_no_more_flags():
    (args,) = args_of(render(EVERYBODY)).values()
    assert [a.split("=")[0] for a in args] == [
        "worker", "--id", "--host", "--advertise", "--etcd", "--cluster", "--roles", "--weights"
    ]


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
    ("worker.name", "first"), ("worker.device", "gpu"), ("worker.kvFormat", "bf16"), ("worker.numericClass", "cpu-q4"),
    ("worker.numericClass", "a+b@0"), ("worker.numericClass", "a+b+c"), ("worker.env", "X=1"), ("worker.tolerations", "all"),
    ("worker.nodeSelector", "gpu"), ("workerPools", "gpu"),
])
def test_bad_values_are_refused(key, value):
    refused = helm("template", "rel", CHART, *flags(EVERYBODY | {key: value}))
    assert refused.returncode != 0 and key.split(".")[0] in refused.stderr, refused.stderr


@pytest.mark.parametrize("pools,said", [
    ([{}], "name is required"),
    ([{"name": ""}], "workerPools.0.name"),
    ([{"name": "GPU"}], "workerPools.0.name"),
    ([{"name": "a.b"}], "workerPools.0.name"),
    ([{"name": "gpu-"}], "workerPools.0.name"),
    # Pods of the first pool are called so.
    ([{"name": "0"}], "workerPools.0.name"),
    # With rel-worker- and the hash of a revision this is a label.
    ([{"name": "g" * 42}], "at most 52 characters"),
    ([{"name": "a"}, {"name": "b"}, {"name": "a"}], 'got "a" twice'),
    ([{"name": "a"}, {"name": "b", "colour": "red"}], "workerPools.1: Additional property colour"),
    ([{"name": "a", "replicas": 0}], "workerPools.0.replicas"),
    ([{"name": "a", "roles": "cook"}], "workerPools.0.roles"),
    ([{"name": "a", "weights": "q3"}], "workerPools.0.weights"),
    ([{"name": "a", "device": "cuda"}], "workerPools.0.device"),
    ([{"name": "a", "device": None}], "workerPools.0.device"),
    ([{"name": "a", "numericClass": "cuda-sm89-q4+cpu-q4@"}], "workerPools.0.numericClass"),
    ([{"name": "a", "kvFormat": "q4"}], "workerPools.0.kvFormat"),
    ([{"name": "a", "nodeSelector": {"gpus": 1}}], "workerPools.0.nodeSelector"),
    ([{"name": "a", "env": [{"value": "1"}]}], "workerPools.0.env.0"),
])
def test_bad_pools_are_refused(pools, said):
    refused = helm("template", "rel", CHART, *flags(EVERYBODY), "--set-json", f"workerPools={json.dumps(pools)}")
    assert refused.returncode != 0 and said in refused.stderr, refused.stderr


def test_the_longest_name_of_a_pool_is_taken():
    assert f"rel-worker-{'g' * 41}" in args_of(render(EVERYBODY | {"workerPools[0].name": "g" * 41}))
