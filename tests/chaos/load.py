"""Clients that keep asking, and remember every token with its time."""

import dataclasses
import http.client
import itertools
import json
import threading
import time

import grpc
from cluster import GRPC

REQUEST_SECONDS = 120
MODEL = "tramontane-demo"


@dataclasses.dataclass(frozen=True)
class Spec:
    """One kind of request; its answer is always the same."""

    name: str
    prompt: str
    options: dict
    n: int = 1


def specs():
    """Greedy and seeded, short and long, with penalties, log probabilities and several answers."""
    places = ["Poland", "France", "Italy", "Spain", "Norway", "Greece"]
    found = []
    for i, place in enumerate(places):
        prompt = f"What is the capital of {place}? " * (1 + 9 * (i % 3))
        found.append(Spec(f"greedy-{i}", prompt, {"temperature": 0.0, "max_tokens": 160 + 20 * i}))
        seeded = {"temperature": 0.9, "top_p": 0.95, "seed": 1000 + i, "max_tokens": 120 + 20 * i}
        found.append(Spec(f"seeded-{i}", prompt, seeded))
    penalties = {"temperature": 0.8, "seed": 7, "presence_penalty": 0.6, "frequency_penalty": 0.4, "max_tokens": 180}
    found.append(Spec("penalties", "Tell me a story.", penalties))
    found.append(Spec("logprobs", "Tell me a story.", {"temperature": 0.0, "logprobs": 3, "max_tokens": 150}))
    found.append(Spec("several", "Tell me a story.", {"temperature": 0.7, "seed": 11, "n": 3, "max_tokens": 90}, 3))
    long = "The tramontane is a cold wind from the north. " * 40
    found.append(Spec("long", long, {"temperature": 0.0, "max_tokens": 100}))
    return found


@dataclasses.dataclass
class Record:
    """One request as its client saw it."""

    spec: str
    router: int
    began: float
    # (time, choice, index, token id)
    tokens: list = dataclasses.field(default_factory=list)
    text: str = ""
    # "finish", "error", or None while it runs or when the client left
    end: str = None
    error: str = None
    ended: float = None

    def ids(self, choice):
        return [token for _, c, _, token in self.tokens if c == choice]


class Client:
    """Sends one request after another through one router, and records what comes."""

    def __init__(self, cluster, router, protos):
        self.cluster, self.router, self.protos = cluster, router, protos
        self.stub = protos.inference_grpc.InferenceStub(cluster.channel(router))

    def ask(self, spec, record=None, deadline=REQUEST_SECONDS):
        record = record or Record(spec.name, self.router, time.monotonic())
        options = self.protos.inference.GenerateOptions(ignore_eos=True, **spec.options)
        request = self.protos.inference.GenerateRequest(prompt=spec.prompt, options=options)
        finished = set()
        try:
            for message in self.stub.Generate(request, timeout=deadline):
                now = time.monotonic()
                for token in message.tokens:
                    record.tokens.append((now, message.index, token.index, token.id))
                if message.HasField("finish_reason"):
                    finished.add(message.index)
            whole = len(finished) == spec.n
            record.end = "finish" if whole else "error"
            record.error = None if whole else f"stream ended after {len(finished)} of {spec.n} answers"
        except grpc.RpcError as error:
            record.end, record.error = "error", f"{error.code().name}: {error.details()}"
        record.ended = time.monotonic()
        return record

    def ask_http(self, spec):
        """The same over HTTP, as server-sent events; only the text is seen."""
        record = Record(spec.name, self.router, time.monotonic())
        body = {"model": MODEL, "prompt": spec.prompt, "stream": True, "ignore_eos": True, **spec.options}
        connection = http.client.HTTPConnection(self.cluster.routers[self.router].address, 8000, timeout=REQUEST_SECONDS)
        ends = 0
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, f"HTTP {answer.status}: {answer.read()[:300]}"
            finishes = 0
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                assert ends == 0, "something came after [DONE]"
                if line.strip() == b"data: [DONE]":
                    ends += 1
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk["error"]
                for choice in chunk["choices"]:
                    record.tokens.append((time.monotonic(), choice["index"], None, choice["text"]))
                    finishes += choice["finish_reason"] is not None
            assert (ends, finishes) == (1, spec.n), f"{finishes} of {spec.n} answers ended, [DONE] {ends} times"
            record.end = "finish"
        except (AssertionError, OSError, http.client.HTTPException, ValueError) as error:
            record.end, record.error = "error", f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        record.ended = time.monotonic()
        return record


class Load:
    """Streams that ask without a pause until told to stop."""

    def __init__(self, cluster, baseline, streams=16, routers=(0,), specs_of=None):
        self.cluster, self.baseline = cluster, baseline
        self.records, self.running = [], {}
        self.stopping = threading.Event()
        specs = [baseline.specs[name] for name in (specs_of or baseline.specs)]
        self.threads = []
        for number in range(streams):
            client = Client(cluster, routers[number % len(routers)], cluster.protos)
            chosen = itertools.islice(itertools.cycle(specs), number, None)
            # Every fifth over HTTP.
            work = self.work_http if number % 5 == 4 else self.work
            self.threads.append(threading.Thread(target=work, args=(client, chosen, number), daemon=True))
        for thread in self.threads:
            thread.start()

    def is_over(self, client):
        """Waits while the router is away: a client that finds nobody there has asked nothing."""
        process = self.cluster.routers[client.router]
        while not self.stopping.is_set() and not process.takes_connections(GRPC):
            self.stopping.wait(0.05)
        return self.stopping.is_set()

    def work(self, client, specs, number):
        for spec in specs:
            if self.is_over(client):
                return
            record = Record(spec.name, client.router, time.monotonic())
            self.running[number] = record
            client.ask(spec, record)
            self.records.append(record)

    def work_http(self, client, specs, _number):
        for spec in specs:
            if self.is_over(client):
                return
            self.records.append(client.ask_http(spec))

    def wait_answers(self, more, seconds=REQUEST_SECONDS):
        """Waits for so many further whole answers."""
        count = lambda: sum(record.end == "finish" for record in list(self.records))
        target = count() + more
        deadline = time.monotonic() + seconds
        while count() < target:
            assert time.monotonic() < deadline, f"{target - count()} of {more} answers did not come in {seconds} s"
            time.sleep(0.02)

    def wait_streaming(self, tokens=8, seconds=30):
        """Waits until every gRPC stream is in the middle of an answer."""
        deadline = time.monotonic() + seconds
        expected = sum(thread._target == self.work for thread in self.threads)
        while True:
            running = list(self.running.values())
            busy = [r for r in running if r.end is None and len(r.tokens) >= tokens]
            if len(busy) >= max(1, expected // 2):
                return
            assert time.monotonic() < deadline, "streams do not get going"
            time.sleep(0.005)

    def wait_flowing(self, tokens=1, seconds=REQUEST_SECONDS):
        """Waits until every gRPC stream has had so many tokens, or has ended: nobody still waits because of a fault."""
        waiting = [(record, len(record.tokens)) for record in list(self.running.values())]
        deadline = time.monotonic() + seconds
        while any(record.end is None and len(record.tokens) < seen + tokens for record, seen in waiting):
            assert time.monotonic() < deadline, "a stream does not go on"
            time.sleep(0.005)

    def finish(self):
        """Lets every stream end its request; all records."""
        self.stopping.set()
        for thread in self.threads:
            thread.join(REQUEST_SECONDS + 10)
        stuck = [record for record in self.running.values() if record.end is None]
        for record in stuck:
            record.end, record.error = "error", "the request never ended"
        return self.records + stuck
