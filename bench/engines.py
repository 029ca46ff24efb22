"""The engines that are compared, each behind one method: `measure(cell, weights)` starts, measures, stops.

Ours is measured as a client sees it, through HTTP. For one stream and for prefill the peers' figures are those of their
own llama-bench, which has no server in the way: the comparison is never in our favour.
"""

import json
import pathlib
import re
import subprocess

from cluster import BINARY, Cluster, Server, free_port

PREFILL_PROMPT = 512
# Short prompts: 32 of them are one step of ours, so that all answers run together from their first token on.
DECODE_PROMPT, DECODE_TOKENS = 16, 64
LONG_CONTEXT, LONG_TOKENS = 16384, 32
SERVED_STREAMS, SERVED_PROMPT, SERVED_TOKENS = 32, 128, 64
TTFT_STREAMS = 8
# GGUF formats that stand for ours; where there are two the better one counts.
GGUF = {"bf16": ["BF16"], "q8": ["Q8_0"], "q4": ["Q4_0", "Q4_K_M"]}
TOOL_SECONDS = 1800
# A step for each token, as the peers have it: prompts of random tokens would be guessed well or badly for no reason.
NO_GUESSES = {"TRAMONTANE_WORKER__LOOKUP_TOKENS": "0"}


def served(server, cell):
    """The cells that are measured through HTTP for all engines alike, in two waves."""
    if cell == "served-32":
        return server.bench(SERVED_STREAMS, SERVED_PROMPT, SERVED_TOKENS, rounds=2)["output_tokens_per_s"]
    return server.bench(TTFT_STREAMS, SERVED_PROMPT, SERVED_TOKENS, rounds=2)["ttft_ms"]["p50"]


class Ours:
    """`tramontane serve` with one worker; two processes with one thread each for the cells of that name."""

    def __init__(self, model, threads):
        self.name, self.model, self.threads = "tramontane", model, threads

    def measure(self, cell, weights):
        """Figures by setting: here one setting, named for how it is measured."""
        if cell.startswith("processes-"):
            return self.processes(cell, weights)
        port = free_port()
        server = Server("serve", [
            BINARY, "serve", "--model", self.model, "--workers", 1, "--threads", self.threads,
            "--weights", weights, "--http-port", port, "--grpc-port", 0, "--admin-port", 0,
        ], port, "/health/ready", NO_GUESSES)
        try:
            server.bench(1, 16, 8)
            return {"http": self.through_http(server, cell)}
        finally:
            server.stop()

    def through_http(self, server, cell):
        # Time per output token of a request rather than between events: several tokens may be read at once.
        if cell in ("decode-1", "decode-32"):
            batch = int(cell.removeprefix("decode-"))
            return batch * 1000 / server.bench(batch, DECODE_PROMPT, DECODE_TOKENS)["tpot_ms"]["p50"]
        if cell == "prefill-512":
            return 1000 * PREFILL_PROMPT / server.bench(1, PREFILL_PROMPT, 1, rounds=3)["ttft_ms"]["p50"]
        if cell == "decode-16k":
            return 1000 / server.bench(1, LONG_CONTEXT, LONG_TOKENS)["tpot_ms"]["p50"]
        return served(server, cell)

    def processes(self, cell, weights):
        """One worker with all threads against as many workers with one each; the engine's own step time beside."""
        figures = {}
        for workers, threads in ((1, self.threads), (self.threads, 1)):
            cluster = Cluster(self.model, weights, workers, threads, NO_GUESSES)
            try:
                cluster.bench(1, 16, 8)
                setting = f"{workers} x {threads}"
                if cell == "processes-prefill":
                    figures[setting] = self.through_http(cluster, "prefill-512")
                    continue
                before = cluster.metrics()
                figures[setting] = self.through_http(cluster, cell.replace("processes", "decode"))
                if workers == 1 and cell == "processes-1":
                    figures["engine"] = steps_per_second(before, cluster.metrics())
            finally:
                cluster.stop()
        return figures


def steps_per_second(before, after):
    """At one stream a step is a token; the prompt's one step is among them."""
    name = "tramontane_step_seconds"
    return (after[f"{name}_count"] - before[f"{name}_count"]) / (after[f"{name}_sum"] - before[f"{name}_sum"])


class Peer:
    """A build of llama.cpp or of a fork: llama-bench, llama-batched-bench and llama-server in one folder."""

    def __init__(self, name, folder, gguf_of, threads):
        self.name, self.folder, self.gguf_of = name, pathlib.Path(folder), gguf_of
        self.threads = threads
        usage = subprocess.run([self.folder / "llama-bench", "--help"], capture_output=True, text=True).stdout
        # ik_llama.cpp: weights repacked at load, better for most formats and worse for some; both are tried.
        self.repacks = "-rtr" in usage
        self.has_depth = "--n-depth" in usage

    def tool(self, name, *arguments):
        done = subprocess.run(
            [str(a) for a in (self.folder / name, *arguments)],
            capture_output=True, text=True, errors="replace", timeout=TOOL_SECONDS,
        )
        assert done.returncode == 0, f"{self.name} {name} {arguments}:\n{done.stderr[-2000:]}"
        return done

    def measure(self, cell, weights):
        """Figures by setting; nothing for cells that are ours alone."""
        if cell.startswith("processes-"):
            return {}
        figures = {}
        for kind in GGUF[weights]:
            model = self.gguf_of(kind)
            if cell in ("served-32", "ttft-8"):
                figures[kind] = self.through_http(cell, model)
            elif cell == "decode-32":
                figures[kind] = self.batched(model)
            else:
                figures |= {f"{kind}{s}": self.llama_bench(cell, model, flags) for s, flags in self.settings(cell)}
        return figures

    def settings(self, cell):
        """(name, flags) of the variants of llama-bench."""
        variants = [(" -rtr 0", ["-rtr", 0]), (" -rtr 1", ["-rtr", 1])] if self.repacks else [("", [])]
        if cell != "decode-16k":
            return variants
        # At long context the format of keys and values matters; the prompt takes too long to try everything.
        name, flags = variants[-1]
        return [(f"{name} kv {kv}", [*flags, "-ctk", kv, "-ctv", kv]) for kv in ("f16", "q8_0")]

    def llama_bench(self, cell, model, flags):
        long = ["-d", LONG_CONTEXT, "-n", LONG_TOKENS] if self.has_depth else ["-gp", f"{LONG_CONTEXT},{LONG_TOKENS}", "-n", 0]
        work = {
            "prefill-512": ["-p", PREFILL_PROMPT, "-n", 0, "-r", 3],
            "decode-1": ["-p", 0, "-n", DECODE_TOKENS, "-r", 3],
            "decode-16k": ["-p", 0, *long, "-r", 1],
        }[cell]
        text = self.tool("llama-bench", "-m", model, "-t", self.threads, "-fa", 1, *work, *flags, "-o", "json").stdout
        return json.loads(text[text.index("[\n") :])[-1]["avg_ts"]

    def batched(self, model):
        batch = 32
        done = self.tool(
            "llama-batched-bench", "-m", model, "-t", self.threads, "-tb", self.threads, "-fa", "on",
            *(["-rtr"] if self.repacks else []), "-c", batch * (DECODE_PROMPT + DECODE_TOKENS), "-b", 2048, "-ub", 512,
            "-npp", DECODE_PROMPT, "-ntg", DECODE_TOKENS, "-npl", batch,
        )
        # | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | ...
        # The fork prints it among its log.
        (row,) = re.findall(rf"^\|\s+{DECODE_PROMPT} \|.*$", done.stdout + done.stderr, re.M)
        return float(row.split("|")[8])

    def through_http(self, cell, model):
        streams = SERVED_STREAMS if cell == "served-32" else TTFT_STREAMS
        port = free_port()
        server = Server(self.name, [
            self.folder / "llama-server", "-m", model, "-t", self.threads, "-tb", self.threads, "-fa", "on",
            *(["-rtr"] if self.repacks else []), "-np", streams, "-c", streams * 256, "--host", "127.0.0.1", "--port", port,
        ], port, "/health")
        try:
            server.bench(1, 16, 8)
            return served(server, cell)
        finally:
            server.stop()
