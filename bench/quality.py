#!/usr/bin/env python3
"""What quantising costs: KL divergence, top-1 agreement and perplexity of each format against f32, ours and llama.cpp's.

The text (quality/text.txt, eight European languages) is cut into windows, each a prompt of its own; every position
counts. The base is our reference backend in f32. Every engine gets the same token ids and this script alone computes
the figures, so rows differ by nothing but logits. Rows:

  bf16 q8 q4          ours, as served; with /kv8 the KV cache in q8 too
  f32/PART=FORMAT,..  the reference in f32 with the weights of attention, experts or head rounded to q8 or q4: what the
                      weights alone cost, without quantised rows and a 16-bit KV cache
  F32 Q8_0 Q4_K_M ..  llama.cpp; F32 shows that both engines compute the same model

usage: quality.py [ROW ...] [--model models/smol] [--turned] [--llama BUILD]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
DEFAULT_ROWS = ("bf16", "q8", "q4", "Q8_0", "Q4_K_M")
WINDOW = 512
# Rows of logits that are compared at once: bounds the memory.
ROWS_AT_ONCE = 64


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


class Text:
    """Token ids of the text, and where each engine reads them."""

    def __init__(self, model, work):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        ids = tokenizer.encode((HERE / "quality" / "text.txt").read_text(encoding="utf-8"), add_special_tokens=False).ids
        self.ids = np.array(ids, dtype="<u4")
        self.path = work / "ids"
        self.ids.tofile(self.path)

    def next_tokens(self):
        """The token after each position; -1 behind the last of a window."""
        following = np.append(self.ids[1:], 0).astype(np.int64)
        following[WINDOW - 1 :: WINDOW] = -1
        following[-1] = -1
        return following


class Ours:
    """The example `logits` of crate tramontane-model."""

    def __init__(self, model, binary):
        self.model, self.binary = model, binary

    def command(self, row, ids):
        weights, _, rest = row.partition("/")
        options = ["--kv", "q8"] if rest == "kv8" else [x for p in rest.split(",") if p for x in part_option(p)]
        return [self.binary, "--model", self.model, "--weights", weights, "--tokens", ids, "--window", WINDOW, *options]


def part_option(text):
    part, _, kind = text.partition("=")
    return f"--{part}", kind


class Llama:
    """llama.cpp through llama_logits.c, linked with a static build of it."""

    def __init__(self, model, work, build, source):
        self.model, self.work, self.build, self.source = model, work, build, source

    def command(self, row, ids):
        kv = "f32" if row == "F32" else "f16"
        return [self.program(), self.gguf(row), ids, WINDOW, os.cpu_count(), kv]

    def program(self):
        out, source = self.work / "llama_logits", HERE / "llama_logits.c"
        if not out.exists() or out.stat().st_mtime < source.stat().st_mtime:
            include = [f"-I{self.source / 'include'}", f"-I{self.source / 'ggml' / 'include'}"]
            ggml = [self.build / "ggml" / "src" / f"lib{n}.a" for n in ("ggml", "ggml-cpu", "ggml-base")]
            subprocess.run(["cc", "-O2", *include, "-c", source, "-o", f"{out}.o"], check=True)
            libraries = [self.build / "src" / "libllama.a", *(g for g in ggml if g.exists()), "-lpthread", "-ldl", "-lm"]
            subprocess.run(["c++", "-fopenmp", f"{out}.o", *libraries, "-o", out], check=True)
        return out

    def gguf(self, kind):
        import to_gguf

        whole, out = (self.work / f"{self.model.name}-{k}.gguf" for k in ("BF16", kind))
        if not whole.exists():
            to_gguf.write(self.model, whole)
        if not out.exists():
            quantize = self.build / "bin" / "llama-quantize"
            subprocess.run([quantize, whole, f"{out}.part", kind], check=True, capture_output=True)
            os.rename(f"{out}.part", out)
        return out


def gguf_types(path):
    """Which types a file has, by number of weights."""
    import gguf

    count = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = tensor.tensor_type.name
        count[kind] = count.get(kind, 0) + int(tensor.n_elements)
    whole = sum(count.values())
    return ", ".join(f"{k} {100 * n / whole:.0f} %" for k, n in sorted(count.items(), key=lambda x: -x[1]) if n * 200 > whole)


def stream(command, vocab, count):
    """Yields [rows, vocab] logits of a program as it writes them."""
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE) as program:
        for begin in range(0, count, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, count - begin)
            data = program.stdout.read(rows * vocab * 4)
            if len(data) != rows * vocab * 4:
                program.kill()
                raise SystemExit(f"{command[0]} ended after {begin + len(data) // (vocab * 4)} of {count} positions")
            yield np.frombuffer(data, dtype="<f4").reshape(rows, vocab)


def base(ours, text, vocab, work):
    """The f32 logits, [num_tokens, vocab], computed once per model and text."""
    out, count = work / "f32.logits", len(text.ids)
    if not out.exists() or out.stat().st_size != count * vocab * 4:
        with open(f"{out}.part", "wb") as f:
            for logits in stream(ours.command("f32", text.path), vocab, count):
                f.write(logits.tobytes())
        os.rename(f"{out}.part", out)
    return np.memmap(out, dtype="<f4", mode="r", shape=(count, vocab))


def measure(program, base_logits, following):
    """Figures of one format: (KL per position, agreement per position, negative log likelihoods)."""
    kl, agree, nll = [], [], []
    begin = 0
    for logits in program:
        end = begin + len(logits)
        p, q = log_softmax(base_logits[begin:end]), log_softmax(logits)
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        agree.append(p.argmax(axis=1) == q.argmax(axis=1))
        target = following[begin:end]
        inside = np.flatnonzero(target >= 0)
        nll.append(-q[inside, target[inside]])
        begin = end
    return tuple(np.concatenate(x) for x in (kl, agree, nll))


def line(name, figures):
    kl, agree, nll = figures
    error = kl.std() / np.sqrt(len(kl))
    median, last = np.percentile(kl, (50, 99))
    return (
        f"| {name} | {kl.mean():.6f} ± {error:.6f} | {median:.6f} | {last:.4f} "
        f"| {100 * agree.mean():.2f} | {np.exp(nll.mean()):.3f} |"
    )


def build_ours():
    subprocess.run(
        ["cargo", "build", "--release", "--quiet", "-p", "tramontane-model", "--example", "logits"], check=True, cwd=ROOT
    )
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "examples" / "logits"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=DEFAULT_ROWS)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models" / "smol")
    parser.add_argument("--turned", action="store_true", help="off the grid of the file it came from, see smol_turned.py")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target" / "bench" / "quality")
    parser.add_argument("--ours", type=pathlib.Path, help="the built example `logits`; default: cargo builds it")
    parser.add_argument("--llama", type=pathlib.Path, help="build folder of llama.cpp; default: that of cpu.py")
    parser.add_argument("--llama-source", type=pathlib.Path, help="its sources; default: beside the build folder")
    return parser.parse_args()


def main():
    a = arguments()
    model = a.model
    if a.turned:
        import smol_turned

        model = a.work / f"{a.model.name}-turned"
        if not (model / "config.json").exists():
            smol_turned.write(a.model, model)
    work = a.work / model.name
    work.mkdir(parents=True, exist_ok=True)
    build = a.llama or ROOT / "target" / "bench" / "llama.cpp"
    ours = Ours(model, a.ours or build_ours())
    llama = Llama(model, work, build, a.llama_source or build.with_name(build.name + "-source"))
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    text = Text(model, work)
    base_logits = base(ours, text, vocab, work)
    following = text.next_tokens()
    own = [-log_softmax(base_logits[i : i + 1])[0, t] for i, t in enumerate(following) if t >= 0]
    print(f"{model.name}: {len(text.ids)} tokens in windows of {WINDOW}; perplexity in f32 {np.exp(np.mean(own)):.3f}\n")
    print("| weights | KL mean, nats | median | 99 % | top-1 agreement, % | perplexity |\n|---|---|---|---|---|---|")
    for row in a.rows:
        engine = llama if row[0].isupper() else ours
        program = stream(engine.command(row, text.path), vocab, len(text.ids))
        name = f"llama.cpp {row} ({gguf_types(llama.gguf(row))})" if engine is llama else row
        print(line(name, measure(program, base_logits, following)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
