"""A model whose weights lie on no four-bit grid, made of one whose weights do.

    scripts/bench fidelity/dithered MODEL.gguf OUT [--seed 0]

SmolLM2 comes from the registry in Q4_1 only. Every such weight is drawn anew, uniformly, from the
cell that Q4_1 rounds to its code; a block's smallest and largest code have half a cell, as Q4_1
puts the block's extremes on the grid. OUT is then a BF16 model of its own: a reference, not
SmolLM2. Everything else is as examples/smollm2.py has it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import smollm2

#: Bytes of a Q4_1 block: a half for the step, a half for the minimum, 32 codes.
_BLOCK_BYTES, _BLOCK = 20, 32


def noise(raw: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.float32]:
    """What moves each weight inside its cell; raw: bytes of blocks, [N, K / 32 * 20] -> [N, K]."""
    blocks = np.ascontiguousarray(raw).reshape(-1, _BLOCK_BYTES)
    step = blocks[:, :2].copy().view(np.float16).astype(np.float32)  # [blocks, 1]
    packed = blocks[:, 4:]
    codes = np.concatenate((packed & 15, packed >> 4), axis=1)  # [blocks, 32]
    low = np.where(codes == 0, 0.0, -0.5)
    high = np.where(codes == 15, 0.0, 0.5)
    drawn = generator.random(codes.shape, dtype=np.float32)
    moved = (low + (high - low) * drawn) * step
    return moved.astype(np.float32).reshape(raw.shape[0], -1)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    generator = np.random.default_rng(a.seed)

    def dithered(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
        values = dequantize(raw, kind)
        return values + noise(raw, generator) if kind.name == "Q4_1" else values

    smollm2.dequantize = dithered
    print(smollm2.convert(a.gguf, a.out), end="")
    with (a.out / "NOTICE").open("a") as notice:
        notice.write(f"Q4_1 weights were then dithered inside their cells, seed {a.seed}.\n")


if __name__ == "__main__":
    main()
