#!/usr/bin/env python3
"""Whether we choose the tokens that llama.cpp chooses, from the same GGUF file.

Prompts and continuations are those of tests/golden/smol: 5 prompts, 64 tokens each. Both engines read the same ids; at each
position that chose a token, their choices are compared, and where they differ, how near llama.cpp's first two were.

usage: gguf_tokens.py KIND ... --llama BUILD   (KIND: F16, Q8_0, Q4_K_M, ... of llama-quantize)
"""

import argparse
import json
import pathlib

import numpy as np

import quality

# What our worker keeps such a file as when nobody says.
NATIVE = {"F32": "f32", "F16": "bf16", "BF16": "bf16", "Q8_0": "q8", "Q6_K": "q8", "Q5_K_M": "q8", "Q4_0": "q4", "Q4_K_M": "q4"}


def cases():
    """Ids in windows of one case each, and the positions that choose a token."""
    golden = json.loads((quality.ROOT / "tests" / "golden" / "smol" / "golden.json").read_text())
    ids = np.zeros((len(golden["cases"]), quality.WINDOW), dtype="<u4")
    positions = []
    for row, case in enumerate(golden["cases"]):
        text = case["prompt_ids"] + case["new_ids"]
        ids[row, : len(text)] = text
        first = row * quality.WINDOW + len(case["prompt_ids"]) - 1
        positions.extend(range(first, first + len(case["new_ids"])))
    return ids.reshape(-1), positions


def chosen(command, vocab, count, positions):
    """Logits at the positions, [positions, vocab]."""
    rows, begin, wanted = [], 0, np.array(positions)
    for logits in quality.stream(command, vocab, count):
        here = wanted[(wanted >= begin) & (wanted < begin + len(logits))]
        rows.append(logits[here - begin].copy())
        begin += len(logits)
    return np.concatenate(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--llama", type=pathlib.Path, required=True, help="build directory of llama.cpp")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where the GGUF files go")
    a = parser.parse_args()
    model = quality.ROOT / "models" / "smol"
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    ids, positions = cases()
    path = a.work / "golden.ids"
    ids.tofile(path)
    llama = quality.Llama(model, a.work, a.llama, a.llama.parent)
    binary = quality.build_ours()
    print("| file | weights | same token | our choice is llama.cpp's second | widest margin where not |\n|-|-|-|-|-|")
    for kind in a.kinds:
        theirs = chosen(llama.command(kind, path), vocab, len(ids), positions)
        ours = chosen(quality.Ours(llama.gguf(kind), binary).command(NATIVE[kind], path), vocab, len(ids), positions)
        choice, best = ours.argmax(axis=1), np.argsort(theirs, axis=1)[:, -2:]
        differ = np.flatnonzero(choice != best[:, 1])
        margins = [theirs[i, best[i, 1]] - theirs[i, choice[i]] for i in differ]
        second = sum(int(choice[i] == best[i, 0]) for i in differ)
        widest = f"{max(margins):.3f}" if margins else "-"
        print(f"| {kind} | {NATIVE[kind]} | {len(choice) - len(differ)} of {len(choice)} | {second} of {len(differ)} | {widest} |", flush=True)


if __name__ == "__main__":
    main()
