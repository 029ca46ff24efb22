"""One network namespace per process, joined by a bridge; faults are nftables rules, token buckets and a relay.

This kernel family may lack netem, so loss is a random drop in nftables, slowness a token bucket, and what takes time or
comes twice goes through a program between a host and the bridge (`relay.py`). Every fault counts what it hit, so that
a test can prove that it happened. The whole test run lives in namespaces of its own (see `make chaos`): nothing outside
is touched, and nothing is left when it ends.
"""

import atexit
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

PREFIX = "10.77.0"
RELAY = pathlib.Path(__file__).parent / "relay.py"
# What a relay may hold a frame longer than it should, in the mean, before a row does not show what it says.
RELAY_LATE_MS_MAX = 2.0
# Network, host and broadcast address and the bridge itself take four of a /24.
HOSTS_MAX = 250


def sh(command, check=True):
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise AssertionError(f"{command!r}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def in_own_namespace():
    """Whether this process has a network of its own, so that faults hit nobody else."""
    return [link["ifname"] for link in json.loads(sh("ip -j link"))] in (["lo"], ["lo", "br0"])


class Network:
    """A bridge in the namespace of the test run, 10.77.0.1; members reach each other and it."""

    def __init__(self):
        assert in_own_namespace(), "faults would hit this machine's network; run `make chaos`"
        if "br0" not in sh("ip -o link"):
            sh("ip link set lo up")
            sh("ip link add br0 type bridge && ip link set br0 up")
            sh(f"ip addr add {PREFIX}.1/24 dev br0")
        self.numbers = itertools.count(10)

    def join(self, name):
        number = next(self.numbers)
        assert number < HOSTS_MAX, "addresses are used up"
        return Namespace(name, f"{PREFIX}.{number}", number)


class Namespace:
    """One host: a namespace with an address on the bridge."""

    def __init__(self, name, address, number):
        self.name, self.address, self.number = name, address, number
        self.link = f"v{number}"
        sh(f"ip netns add {name}")
        sh(f"ip link add {self.link} type veth peer name eth0 netns {name}")
        sh(f"ip link set {self.link} master br0 up")
        self.run("ip link set lo up && ip link set eth0 up")
        self.run(f"ip addr add {address}/24 dev eth0")

    def run(self, command, check=True):
        return sh(f"ip netns exec {self.name} sh -c '{command}'", check)

    def command(self, argv):
        """`argv` to be started in here. The process keeps its id: `ip` replaces itself."""
        return ["ip", "netns", "exec", self.name, *map(str, argv)]

    def remove(self):
        sh(f"ip netns del {self.name}", check=False)

    @contextlib.contextmanager
    def filter(self, *peers, incoming=True, outgoing=True, verdict="drop", match=""):
        """Drops (or what `verdict` says) what goes to and comes from the peers, or everybody when none is named."""
        fault = Filter(self, peers, incoming, outgoing, verdict, match)
        try:
            yield fault
        finally:
            fault.lift()

    @contextlib.contextmanager
    def rate(self, mbit):
        """Sends no faster than `mbit` Mbit/s, and neither do the others to it."""
        bucket = f"tbf rate {mbit}mbit burst 32kb latency 400ms"
        self.run(f"tc qdisc add dev eth0 root {bucket}")
        sh(f"tc qdisc add dev {self.link} root {bucket}")
        try:
            yield lambda: int(json.loads(self.run("tc -s -j qdisc show dev eth0"))[0]["packets"])
        finally:
            self.run("tc qdisc del dev eth0 root", check=False)
            sh(f"tc qdisc del dev {self.link} root", check=False)

    @contextlib.contextmanager
    def relay(self, seed, **faults):
        """Sends what comes and goes through a relay with these faults."""
        relay = Relay(self, seed)
        try:
            relay.insert()
            relay.ask(**faults)
            yield relay
            relay.ask(delay_ms=0)
        finally:
            relay.remove()


class Relay:
    """A program between a host and the bridge, `relay.py`: host - bridge of its own - tap - program - tap - bridge.

    The frames of a tap are whole, with their checksums: the kernel cuts and sums what it would leave to a device.
    """

    def __init__(self, namespace, seed):
        self.namespace = namespace
        self.bridge, *self.taps = (f"{kind}{namespace.number}" for kind in "fab")
        command = [sys.executable, RELAY, *self.taps, str(seed)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.popen.kill)

    def insert(self):
        # Its first answer says that the taps are there.
        self.popen.stdout.readline()
        own, outer = self.taps
        sh(f"ip link add {self.bridge} type bridge && ip link set {self.bridge} up")
        sh(f"ip link set {own} master {self.bridge} up && ip link set {outer} master br0 up")
        sh(f"ip link set {self.namespace.link} master {self.bridge}")

    def ask(self, **faults):
        """Lets only these faults happen from now on, if there are any. The counters."""
        self.popen.stdin.write((json.dumps(faults) if faults else "") + "\n")
        self.popen.stdin.flush()
        return json.loads(self.popen.stdout.readline())

    def did(self, *names):
        """How often each of these happened, as a proof; empty if one never did."""
        counts = self.ask()
        assert counts["overflowed"] == 0, f"the relay lost frames: {counts}"
        late = counts["late_ms"] / max(1, counts["frames"])
        assert late < RELAY_LATE_MS_MAX, f"the relay was late by {late:.1f} ms in the mean: {counts}"
        if not all(counts[name] for name in names):
            return ""
        return f"{counts['frames']} frames: " + ", ".join(f"{counts[name]} {name}" for name in names)

    def remove(self):
        sh(f"ip link set {self.namespace.link} master br0", check=False)
        self.popen.stdin.close()
        try:
            self.popen.wait(5)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        sh(f"ip link del {self.bridge}", check=False)


class Filter:
    """An nftables table in one namespace; its counters prove what it did."""

    tables = itertools.count()

    def __init__(self, namespace, peers, incoming, outgoing, verdict, match):
        self.namespace, self.table = namespace, f"fault{next(self.tables)}"
        addresses = ", ".join(peer.address for peer in peers)
        rules = []
        for hook, field, wanted in (("input", "saddr", incoming), ("output", "daddr", outgoing)):
            who = f"ip {field} {{ {addresses} }}" if peers else 'iifname != "lo"' if hook == "input" else 'oifname != "lo"'
            rule = f"{who} {match} counter {verdict};" if wanted else ""
            rules.append(f"chain {hook} {{ type filter hook {hook} priority 0; {rule} }}")
        text = f"table inet {self.table} {{\n" + "\n".join(rules) + "\n}\n"
        subprocess.run(
            namespace.command(["nft", "-f", "-"]), input=text, text=True, check=True
        )
        self.lifted = False

    def hits(self):
        """Packets that it hit."""
        listed = json.loads(self.namespace.run(f"nft -j list table inet {self.table}"))
        return sum(
            part["counter"]["packets"]
            for item in listed["nftables"]
            for part in item.get("rule", {}).get("expr", [])
            if "counter" in part
        )

    def lift(self):
        if not self.lifted:
            self.lifted = True
            self.namespace.run(f"nft delete table inet {self.table}", check=False)


def state_of(pid):
    """The letter of /proc: T is stopped, Z ended."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0]


def rss_bytes(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
