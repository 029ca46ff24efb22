#!/usr/bin/env python3
"""Blocks of every GGUF type and the numbers that the gguf package (llama.cpp's own) makes of them.

For each type TYPE.bin: two rows of 512 numbers, as blocks, then the numbers as f32. The first row is quantised by the
package where it can (not the K types), the rest are random bytes with finite scales.

usage: make_golden.py [FOLDER]  (needs gguf, numpy)
"""

import pathlib
import sys

import gguf
import numpy as np

COLS = 512
# Bytes at which a block has f16 numbers.
SCALES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}


def random_blocks(rng, name, count, size):
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in SCALES[name]:
        # All exponents of f16, subnormal ones too; never infinite.
        halves = rng.integers(0, 0x7C00, count).astype(np.uint16) | (rng.integers(0, 2, count).astype(np.uint16) << 15)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(count, 2)
    return blocks


def main(folder):
    rng = np.random.default_rng(20240407)
    for name in SCALES:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = [random_blocks(rng, name, COLS // block, size).reshape(-1) for _ in range(2)]
        try:
            rows[0] = gguf.quants.quantize(rng.standard_normal((1, COLS)).astype(np.float32), kind).reshape(-1)
        except NotImplementedError:
            pass
        stored = np.stack(rows)
        numbers = gguf.quants.dequantize(stored, kind).astype("<f4")
        assert numbers.shape == (2, COLS) and np.isfinite(numbers).all()
        (folder / f"{name}.bin").write_bytes(stored.tobytes() + numbers.tobytes())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent))
