"""etcd is slow, leaderless, away or empty while sixteen streams run (F6, F10, F11)."""

import signal
import time

import grpc
import pytest
from cluster import OPS, metrics, wait_until


def test_f6_routers_cut_off_from_etcd(chaos, cluster):
    members = [member.host for member in cluster.etcd.members]
    with chaos.row("F6", "partition between both routers and etcd") as row:
        faults = [router.host.filter(*members) for router in cluster.routers]
        began = time.monotonic()
        with faults[0] as one, faults[1] as other:
            wait_until(lambda: not cluster.status().store_available, 30, "the router says that etcd is away")
            status = cluster.status()
            assert status.ready, status.reason
            row.load.wait_answers(48)
            row.injected(one.hits() and other.hits() and "packets dropped", began)
        wait_until(lambda: cluster.status().store_available, 60, "the router sees etcd again")
        row.load.wait_answers(8)
        cluster.wait_settled()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_f10_etcd_leader(chaos, cluster, how):
    with chaos.row("F10", f"{how} of the etcd leader") as row:
        leader = cluster.etcd.leader()
        if how == "SIGKILL":
            at = leader.kill()
            row.expected_exits.add(leader.name)
            row.injected(leader.popen.returncode == -signal.SIGKILL and "exit by SIGKILL", at)
        else:
            row.injected("state T", leader.pause())
        others = [member for member in cluster.etcd.members if member is not leader]
        wait_until(lambda: any(is_leader(member) for member in others), 30, "another member leads", every=0.1)
        row.load.wait_answers(48)
        # No worker lost its lease over it: the placement did not move.
        assert all(worker.state == "ready" for worker in cluster.listed().values())
        if how == "SIGKILL":
            leader.start()
            row.expected_exits.discard(leader.name)
        else:
            leader.resume()
        cluster.etcd.wait_healthy()
        cluster.wait_settled()


def is_leader(member):
    try:
        return metrics(member.host, 2379).get("etcd_server_is_leader") == 1.0
    except OSError:
        return False


@pytest.mark.parametrize("wiped", [False, True])
def test_f11_etcd_away(chaos, cluster, wiped, request):
    seconds = request.config.getoption("--etcd-outage")
    name = f"etcd away for {seconds:.0f} s" + (", back without its data" if wiped else "")
    with chaos.row("F11", name) as row:
        epoch = cluster.status().epoch
        for member in cluster.etcd.members:
            at = member.kill()
            row.expected_exits.add(member.name)
        row.injected(not any(m.alive() for m in cluster.etcd.members) and "all members gone", at)
        wait_until(lambda: not cluster.status().store_available, 30, "the router says that etcd is away")
        with pytest.raises(grpc.RpcError) as refused:
            cluster.admin().SetCordon(
                cluster.protos.admin.SetCordonRequest(worker_id="worker-0", cordoned=True), timeout=20
            )
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE, refused.value
        # The length of the fault, not a wait for something.
        time.sleep(max(0.0, at + seconds - time.monotonic()))
        assert cluster.status().ready, cluster.status().reason
        if wiped:
            cluster.etcd.wipe()
        for member in cluster.etcd.members:
            member.start()
            row.expected_exits.discard(member.name)
        cluster.etcd.wait_healthy()
        cluster.wait_settled()
        assert cluster.status().epoch >= epoch, "epochs went back"
        row.load.wait_answers(16)


def test_f11_worker_killed_while_etcd_is_away(chaos, cluster):
    victim = cluster.workers["worker-2"]
    of_victim = lambda record: record.router == 1
    name = "SIGKILL of a worker and a router while etcd is away, both started again without it"
    with chaos.row("F11b", name, may_fail=of_victim) as row:
        for member in cluster.etcd.members:
            member.kill()
            row.expected_exits.add(member.name)
        wait_until(lambda: not cluster.status().store_available, 30, "the router says that etcd is away")
        row.load.wait_streaming()
        at = victim.kill()
        row.expected_exits.add(victim.name)
        row.injected(victim.popen.returncode == -signal.SIGKILL and "exit by SIGKILL", at)
        row.load.wait_answers(32)
        victim.start()
        row.expected_exits.discard(victim.name)
        # It goes by what it wrote down before it died.
        segments = lambda: has_segments(victim)
        wait_until(segments, 30, "the worker loads its experts without etcd", every=0.1)
        row.load.wait_answers(16)
        # So does a router.
        router = cluster.routers[1]
        router.kill()
        router.start()
        wait_until(lambda: (status := cluster.status(1)) and status.ready, 30, "the router serves without etcd", every=0.1)
        row.load.wait_answers(16)
        for member in cluster.etcd.members:
            member.start()
            row.expected_exits.discard(member.name)
        cluster.etcd.wait_healthy()
        cluster.wait_settled()


def has_segments(worker):
    try:
        return metrics(worker.host, OPS).get("tramontane_expert_segments", 0) > 0
    except OSError:
        return False


def test_f12_hostile_values_in_etcd(chaos, cluster):
    """Garbage under every key that is read: skipped, counted, never served on."""
    import base64
    import json
    import urllib.request

    def put(key, value):
        body = {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(value).decode()}
        url = f"http://{cluster.etcd.members[0].address}:2379/v3/kv/put"
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=5).read()

    def keys_of_placements():
        body = {"key": base64.b64encode(f"{prefix}placement/".encode()).decode(),
                "range_end": base64.b64encode(f"{prefix}placement0".encode()).decode(), "keys_only": True}
        url = f"http://{cluster.etcd.members[0].address}:2379/v3/kv/range"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=5) as answer:
            found = json.load(answer).get("kvs", [])
        return [base64.b64decode(kv["key"]).decode().removeprefix(prefix) for kv in found]

    prefix = "/tramontane/chaos/"
    placements = keys_of_placements()
    published = [key for key in placements if key.endswith("/published")]
    assert published and "placement/serving" in placements, placements
    hostile = [
        *placements, published[0].replace("published", "pending"), "placement/0123456789abcdef/published",
        "placement/../x", "intent", "workers/worker-0", "workers/../../x", "nonsense",
    ]
    with chaos.row("F12", "garbage under the keys of etcd") as row:
        epoch = cluster.status().epoch
        for value in (b"\xff\xfe garbage", b"{}", b'{"epoch": 1}', b"x" * 1_400_000, b"null"):
            for key in hostile:
                put(prefix + key, value)
            row.injected(True)
            row.load.wait_answers(4)
        row.proofs.append("values written")
        put(prefix + "intent", b"{}")
        wait_until(lambda: "worker-0" in cluster.listed(), 60, "worker-0 writes its record again")
        cluster.wait_settled()
        assert cluster.status().epoch >= epoch
