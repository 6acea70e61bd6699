"""Speed of the matmul kernels against memory, and against torch's BF16 matmul (oneDNN).

    python benchmarks/matmul.py [--runs 5] [--threads N] [--weights nvfp4,...] [--shapes NAME,...]

Shapes of a 1.16B Llama, of SmolLM2-135M and of the experts of Qwen3.6-35B-A3B. A weight is a format
and, after a slash, the precision of the input where it is not BF16. Ours, torch's and a probe that
reads memory are timed in turn, so that a busy moment hits all; medians, and the medians of the
ratios of one turn. One thread: its own CPU time, so that a busy neighbour does not count; more:
wall time. Ours are calls of a program, as the engine makes them, and take an activation in float32
to outputs in float32; torch gets its activation in BF16, ready, and writes BF16. GFLOP/s count
2 M N K; GB/s (10^9 bytes) count the weight as stored, and "read" is their part of what the probe
reads a second from the same file.
Weights of a shape lie side by side in a mapped file, 128 MB of them or one, and calls walk through
them: at M = 1 a model reads from memory, not from cache (`--hot` keeps to one).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TypeVar, cast

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.formats.block import FORMATS
from nybble.formats.search import quantize
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import dispatch, machine_limits
from nybble.kernels.block_matmul import Prepared, Weight, matmul, prepare
from nybble.kernels.compute import Compute, Precision
from nybble.kernels.expert_matmul import expert_matmul, prepare_experts
from nybble.kernels.machine_limits.cpu import read
from nybble.kernels.program import Program

Array = TypeVar("Array", bound=NDArray[np.generic])
SHAPES = {  # name -> (N, K)
    "1.16B attention": (2048, 2048),
    "1.16B gate": (8192, 2048),
    "1.16B down": (2048, 8192),
    "135M gate": (1536, 576),
    "135M down": (576, 1536),
    "35B expert up": (512, 2048),
    "35B expert down": (2048, 512),
}
WEIGHTS = ("nvfp4", "nvfp4/int8", "fp8_channel", "bf16")
ROWS = (1, 2, 3, 4, 5, 8, 16, 32, 512)
#: Weights that a call finds in no cache: the third holds 32 MB here.
COLD_BYTES = 128 << 20
#: Shorter calls are repeated until a measurement takes this long.
LEAST_S = 1e-3


@dataclass(frozen=True, slots=True)
class Weights:
    """Copies of one weight, for the kernels and for torch, the bytes of one as stored, and all of
    the file that they lie in."""

    ours: list[Prepared]
    theirs: list[Tensor]
    stored_bytes: int
    file: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of a call of ours and of torch's, and of reading a byte, one after the other."""

    ours: float
    theirs: float
    byte: float


def stored_bytes(weight: Weight) -> int:
    """Bytes of codes and scales."""
    if isinstance(weight, BlockScaledTensor):
        return weight.codes.nbytes + weight.scale.nbytes
    return weight.nbytes


class Copies:
    """A mapped file that arrays are copied into, one after the other."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        file.truncate(size)
        self.bytes = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
        self.used = 0

    def add(self, array: Array) -> Array:
        """A copy of the array in the file."""
        start, self.used = self.used, self.used + array.nbytes
        copy = self.bytes[start : self.used].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return cast(Array, copy)


def make(kind: str, n: int, k: int, is_hot: bool, file: IO[bytes]) -> Weights:
    """Random weights; the copies share their values, not their memory."""
    w = np.random.default_rng(n + k).standard_normal((n, k), dtype=np.float32)
    bf16 = w.astype(ml_dtypes.bfloat16)
    first: Weight = bf16 if kind == "bf16" else quantize(w, FORMATS[kind], "absmax")
    size = stored_bytes(first)
    count = 1 if is_hot else max(1, COLD_BYTES // size)
    copies = Copies(file, max(count * size, COLD_BYTES))

    def copy() -> Weight:
        if not isinstance(first, BlockScaledTensor):
            return copies.add(first)
        codes, scale = copies.add(first.codes), copies.add(first.scale)
        return BlockScaledTensor(first.format, first.shape, codes, scale, first.tensor_scale)

    ours = [prepare([copy()]) for _ in range(count)]
    dense = torch.from_numpy(w).bfloat16()
    theirs = [dense.clone() for _ in range(1 if is_hot else max(1, COLD_BYTES // bf16.nbytes))]
    words = copies.bytes[: len(copies.bytes) // 8 * 8].view(np.uint64)
    return Weights(ours, theirs, size, words)


def measure(made: Weights, m: int, precision: Precision, threads: int, runs: int) -> list[Turn]:
    """So many turns."""
    x = torch.randn(m, made.ours[0].k)
    rounded = x.bfloat16()
    clock = time.thread_time if threads == 1 else time.perf_counter
    program = Program(tokens=m, sequences=1, outputs=1)
    with program.recording():
        for weight in made.ours:
            matmul(x, weight, Compute(precision, threads, program))
    at = [0]

    def ours() -> None:
        program.run(tokens=m, sequences=1, outputs=1)

    def theirs() -> None:
        at[0] += 1
        torch.mm(rounded, made.theirs[at[0] % len(made.theirs)].T)

    def seconds(call: Callable[[], object], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    repeats = []
    for call in (ours, theirs):
        seconds(call, 2)
        repeats.append(max(1, round(LEAST_S / max(seconds(call, 1), 1e-9))))
    return [
        Turn(
            seconds(ours, repeats[0]) / len(made.ours),
            seconds(theirs, repeats[1]),
            seconds(lambda: read(made.file, 1, threads), 1) / made.file.nbytes,
        )
        for _ in range(runs)
    ]


def skewed_experts(precision: Precision, threads: int, runs: int) -> None:
    """256 experts of the 35B, 8 of them per token, from few tokens to many."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    one = quantize(rng.standard_normal((1024, 2048), dtype=np.float32), FORMATS["nvfp4"], "absmax")
    copies: list[list[Weight]] = [
        [
            BlockScaledTensor(
                one.format, one.shape, one.codes.copy(), one.scale.copy(), one.tensor_scale
            )
        ]
        for _ in range(256)
    ]
    stack = prepare_experts(copies)
    print(f"\n| experts [256, 1024, 2048] NVFP4, {precision} | ms | GFLOP/s | GB/s | read |")
    print("|---|--:|--:|--:|--:|")
    popularity = rng.permutation(1.0 / np.arange(1, 257))
    bandwidth = machine_limits.read_bandwidth(threads)
    for tokens in (1, 4, 64, 512):
        draws = [
            rng.choice(256, 8, replace=False, p=popularity / popularity.sum())
            for _ in range(tokens)
        ]
        counts = torch.from_numpy(np.bincount(np.concatenate(draws), minlength=256))
        x = torch.randn(8 * tokens, 2048)
        taken = []
        for _ in range(runs):
            start = clock()
            expert_matmul(x, counts, stack, Compute(precision, threads))
            taken.append(clock() - start)
        s = statistics.median(taken)
        flops = 2 * len(x) * 1024 * 2048
        speed = int((counts > 0).sum()) * stored_bytes(one) / s
        print(f"| {tokens} tokens of 8 | {s * 1e3:.2f} | {flops / s / 1e9:.0f}", end=" | ")
        print(f"{speed / 1e9:.1f} | {speed / bandwidth:.0%} |")


def precision_of(name: str) -> Precision:
    """BF16 where a weight names none."""
    return cast(Precision, name or "bf16")


def line(name: str, n: int, k: int, weight: str, m: int, size: int, turns: list[Turn]) -> str:
    """A row of the table."""
    ours = statistics.median(t.ours for t in turns)
    theirs = statistics.median(t.theirs for t in turns)
    of_read = statistics.median(size * t.byte / t.ours for t in turns)
    ratio = statistics.median(t.theirs / t.ours for t in turns)
    flops = 2 * m * n * k / 1e9
    return (
        f"| {name} | {n} x {k} | {weight} | {m} | {ours * 1e6:.1f} | {flops / ours:.0f} "
        f"| {size / ours / 1e9:.1f} | {of_read:.0%} | {theirs * 1e6:.1f} "
        f"| {flops / theirs:.0f} | {ratio:.2f} |"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Matmul kernels against memory and torch.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=dispatch.default_threads())
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--hot", action="store_true", help="one weight, which stays in cache")
    parser.add_argument("--no-experts", action="store_true", help="leave out the second table")
    options = parser.parse_args()
    threads, runs = options.threads, options.runs
    torch.set_num_threads(threads)
    peaks = {kind: machine_limits.peak(kind, threads) for kind in ("bf16", "int8")}
    print(f"{platform.processor() or platform.machine()}, {dispatch.choose()}, torch", end=" ")
    print(f"{torch.__version__}, {threads} threads, load {os.getloadavg()[0]:.2f}, peaks", end=" ")
    print(", ".join(f"{kind} {(p or 0) / 1e9:.0f} GFLOP/s" for kind, p in peaks.items()), "\n")
    print("| shape | N x K | weight | M | us | GFLOP/s | GB/s | read | torch us | GFLOP/s | x |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.shapes.split(","):
        n, k = SHAPES[name]
        for weight in options.weights.split(","):
            kind, _, precision = weight.partition("/")
            with tempfile.TemporaryFile() as file:
                made = make(kind, n, k, options.hot, file)
                for m in map(int, options.rows.split(",")):
                    turns = measure(made, m, precision_of(precision), threads, runs)
                    print(line(name, n, k, weight, m, made.stored_bytes, turns), flush=True)
    if not options.no_experts:
        skewed_experts("bf16", threads, runs)
        skewed_experts("int8", threads, runs)


if __name__ == "__main__":
    main()
