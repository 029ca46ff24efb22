"""The group grows and shrinks under load; workers die at random, many times."""

import json
import random
import signal
import time

from cluster import OPS, metrics, wait_until


def test_scale_three_to_six_to_three(chaos, cluster):
    extra = []
    with chaos.row("scale", "3 to 6 to 3 workers under load") as row:
        row.began = time.monotonic()
        for number in (6, 7, 8):
            extra.append(cluster.add_worker(f"worker-{number}"))
        newcomers = {worker.name for worker in extra}
        holds = lambda: newcomers <= {w.id for w in cluster.listed().values() if w.segments}
        wait_until(holds, 120, "newcomers hold experts", every=0.2)
        cluster.wait_settled(120)
        row.load.wait_answers(32)
        for worker in extra:
            worker.signal(signal.SIGTERM)
            assert worker.popen.wait(120) == 0
            row.expected_exits.add(worker.name)
            row.load.wait_answers(8)
        for worker in extra:
            del cluster.workers[worker.name]
            worker.host.remove()
        cluster.wait_settled(120)
        row.injected("6 ready, then exit 0 of three", row.began)


def test_soak_random_kills(chaos, cluster, request):
    """Kill, stop or cut off a random worker, again and again; memory of those that stay must not grow."""
    kills = request.config.getoption("--kills")
    chance = random.Random(4)
    grown = {}
    with chaos.row("soak", f"{kills} random kills, stops and partitions in a row") as row:
        for number in range(kills):
            victim = chance.choice(list(cluster.workers.values()))
            how = chance.choice(["kill", "kill", "stop", "cut"])
            row.load.wait_streaming(seconds=60)
            if how == "kill":
                at = victim.kill()
                row.expected_exits.add(victim.name)
                row.injected(victim.popen.returncode == -signal.SIGKILL, at)
                row.load.wait_answers(4)
                victim.start()
                row.expected_exits.discard(victim.name)
            elif how == "stop":
                row.injected(True, victim.pause())
                row.load.wait_answers(4)
                victim.resume()
            else:
                with victim.host.filter() as fault:
                    began = time.monotonic()
                    row.load.wait_answers(4)
                    wait_until(fault.hits, 5, "the filter hits something")
                    row.injected(True, began)
            cluster.wait_settled(120)
            # The next fault waits for those whom this one holds up. A killed worker may still be starting then: it is
            # listed as it was until its lease ends.
            row.load.wait_flowing()
            for router in cluster.routers:
                grown.setdefault(router.name, []).append(router.rss() >> 20)
        row.proofs.append("each proved; routers' MiB first, middle, last: " + "; ".join(
            f"{name} {sizes[0]}, {sizes[len(sizes) // 2]}, {sizes[-1]}" for name, sizes in grown.items()
        ))


def set_roles(cluster, name, *roles):
    """Asks for roles, and waits until the worker has them and the placement fits."""
    request = cluster.protos.admin.SetWorkerRolesRequest(worker_id=name, roles=roles)
    cluster.admin().SetWorkerRoles(request, timeout=30)
    wait_until(lambda: set(cluster.listed()[name].roles) == set(roles), 150, f"{name} does {roles}", every=0.1)
    cluster.wait_settled(120)


def test_roles_change_under_load(chaos, cluster):
    """A worker gives attention up and takes it on again, another one its experts; nobody is started again."""
    started = {name: worker.starts for name, worker in cluster.workers.items()}
    with chaos.row("roles", "roles of two workers change and change back under load") as row:
        row.began = time.monotonic()
        set_roles(cluster, "worker-0", "experts")
        page = metrics(cluster.workers["worker-0"].host, OPS)
        freed = "tramontane_kv_pages" not in page and page["tramontane_expert_segments"] > 0
        row.injected(freed and "cache freed, experts kept")
        row.load.wait_answers(16)
        set_roles(cluster, "worker-1", "attention")
        row.injected("worker-1" not in placed(cluster) and "no expert on the other")
        row.load.wait_answers(16)
        set_roles(cluster, "worker-0", "attention", "experts")
        set_roles(cluster, "worker-1", "attention", "experts")
        row.load.wait_answers(16)
        serves = lambda: metrics(cluster.workers["worker-0"].host, OPS).get("tramontane_tokens_sampled_total", 0) > 0
        row.injected(wait_until(serves, 60, "worker-0 samples tokens again") and "it samples again")
    assert started == {name: worker.starts for name, worker in cluster.workers.items()}


def placed(cluster):
    """Workers that the published placement names."""
    answer = cluster.admin().GetPlacement(cluster.protos.admin.GetPlacementRequest(), timeout=5)
    return json.loads(answer.placement_json)["workers"]
