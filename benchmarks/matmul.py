"""Speed of the matmul kernels against torch's BF16 matmul (oneDNN) on the same shapes.

    python benchmarks/matmul.py [--runs 9] [--threads N] [--formats nvfp4,bf16] [--shapes NAME,...]

Shapes of SmolLM2-135M and Qwen3.6-35B-A3B. The two are timed in turn, so that a busy moment hits
both; medians, and the median of the ratios of pairs. One thread: its own CPU time, so that a busy
neighbour does not count; more: wall time. One call takes an activation in float32, as
the engine has it, to outputs in float32; torch gets its activation in BF16, ready, and writes BF16.
GFLOP/s count 2 M N K; GB/s (10^9 bytes) count the weight as stored. Weights of a shape lie side by
side, 64 MB of them or one, and calls walk through them: at M = 1 a model reads from memory, not
from cache (`--hot` keeps to one).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from nybble.formats.block import FORMATS
from nybble.formats.search import quantize
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import dispatch
from nybble.kernels.block_matmul import Prepared, Weight, matmul, prepare
from nybble.kernels.compute import Compute
from nybble.kernels.expert_matmul import expert_matmul, prepare_experts

SHAPES = {  # name -> (N, K)
    "135M attention": (576, 576),
    "135M gate": (1536, 576),
    "135M down": (576, 1536),
    "135M head": (49152, 576),
    "35B expert up": (512, 2048),
    "35B expert down": (2048, 512),
    "35B attention": (8192, 2048),
}
ROWS = (1, 4, 16, 64, 512)
#: Weights that a call finds in no cache: the third holds 32 MB here.
COLD_BYTES = 64 << 20
#: Shorter calls are repeated until a measurement takes this long.
LEAST_S = 200e-6


@dataclass(frozen=True, slots=True)
class Weights:
    """Copies of one weight, for the kernels and for torch, and the bytes of one as stored."""

    ours: list[Prepared]
    theirs: list[Tensor]
    stored_bytes: int


def stored_bytes(weight: Weight) -> int:
    """Bytes of codes and scales."""
    if isinstance(weight, BlockScaledTensor):
        return weight.codes.nbytes + weight.scale.nbytes
    return weight.nbytes


def make(kind: str, n: int, k: int, is_hot: bool) -> Weights:
    """Random weights; the copies share their values, not their memory."""
    w = np.random.default_rng(n + k).standard_normal((n, k), dtype=np.float32)
    bf16 = w.astype(ml_dtypes.bfloat16)
    first: Weight = bf16 if kind == "bf16" else quantize(w, FORMATS[kind], "absmax")
    size = stored_bytes(first)

    def copy() -> Weight:
        if isinstance(first, BlockScaledTensor):
            codes, scale = first.codes.copy(), first.scale.copy()
            return BlockScaledTensor(first.format, first.shape, codes, scale, first.tensor_scale)
        return first.copy()

    ours = 1 if is_hot else max(1, COLD_BYTES // size)
    theirs = 1 if is_hot else max(1, COLD_BYTES // bf16.nbytes)
    dense = torch.from_numpy(w).bfloat16()
    return Weights(
        [prepare([copy()]) for _ in range(ours)], [dense.clone() for _ in range(theirs)], size
    )


def measure(made: Weights, m: int, k: int, threads: int, runs: int) -> tuple[float, float, float]:
    """Median seconds of ours and of torch's, and the median of torch's over ours."""
    x = torch.randn(m, k)
    rounded = x.bfloat16()
    compute = Compute("bf16", threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    at = [0, 0]

    def ours() -> None:
        at[0] += 1
        matmul(x, made.ours[at[0] % len(made.ours)], compute)

    def theirs() -> None:
        at[1] += 1
        torch.mm(rounded, made.theirs[at[1] % len(made.theirs)].T)

    def seconds(call: object, repeats: int) -> float:
        assert callable(call)
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    repeats = []
    for call in (ours, theirs):
        seconds(call, 2)
        repeats.append(max(1, round(LEAST_S / seconds(call, 1))))
    pairs = [(seconds(ours, repeats[0]), seconds(theirs, repeats[1])) for _ in range(runs)]
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def skewed_experts(threads: int, runs: int) -> None:
    """256 experts of the 35B, 8 of them per token, from few tokens to many."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    one = quantize(rng.standard_normal((1024, 2048), dtype=np.float32), FORMATS["nvfp4"], "absmax")
    copies: list[list[Weight]] = [
        [BlockScaledTensor(one.format, one.shape, one.codes.copy(), one.scale, one.tensor_scale)]
        for _ in range(256)
    ]
    stack = prepare_experts(copies)
    print("\n| experts [256, 1024, 2048] NVFP4, 8 per token | ms | GFLOP/s | GB/s of codes |")
    print("|---|--:|--:|--:|")
    popularity = rng.permutation(1.0 / np.arange(1, 257))
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
            expert_matmul(x, counts, stack, Compute("bf16", threads))
            taken.append(clock() - start)
        s = statistics.median(taken)
        flops = 2 * len(x) * 1024 * 2048
        read = int((counts > 0).sum()) * one.codes.nbytes
        print(f"| {tokens} tokens | {s * 1e3:.2f} | {flops / s / 1e9:.0f} | {read / s / 1e9:.1f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Matmul kernels against torch's BF16 matmul.")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=dispatch.default_threads())
    parser.add_argument("--formats", default=",".join(["bf16", *FORMATS]))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--hot", action="store_true", help="one weight, which stays in cache")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, {dispatch.choose()}, torch", end=" ")
    print(f"{torch.__version__}, {options.threads} threads, load {os.getloadavg()[0]:.2f}\n")
    print("| shape | N x K | weight | M | us | GFLOP/s | GB/s | torch us | torch GFLOP/s | x |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.shapes.split(","):
        n, k = SHAPES[name]
        for kind in options.formats.split(","):
            made = make(kind, n, k, options.hot)
            for m in map(int, options.rows.split(",")):
                ours, theirs, ratio = measure(made, m, k, options.threads, options.runs)
                flops = 2 * m * n * k / 1e9
                print(
                    f"| {name} | {n} x {k} | {kind} | {m} | {ours * 1e6:.1f} | {flops / ours:.0f} "
                    f"| {made.stored_bytes / ours / 1e9:.1f} | {theirs * 1e6:.1f} "
                    f"| {flops / theirs:.0f} | {ratio:.2f} |"
                )
    skewed_experts(options.threads, options.runs)


if __name__ == "__main__":
    main()
