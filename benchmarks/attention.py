"""Attention over pages and log-likelihoods over a vocabulary, paired with torch on the same data.

    python benchmarks/attention.py [--runs 9] [--threads 2] [--only scoring,decode,vocabulary]

Scoring is 8 windows of 512 tokens in SmolLM2's shapes (9 query heads, 3 key/value heads of 64), the
vocabulary 512 rows of 49,152 logits. Decode writes one token and attends, after 1, 4,096 and 32,768
others, in SmolLM2's shapes and those of Qwen3.6-35B-A3B (16 query heads, 2 key/value heads of 256),
as a program of as many layers as no cache holds; GB/s are those of keys and values, to be compared
with the machine's read bandwidth, which is printed. Runs alternate between the
contenders, so that a busy moment hits all of them; figures are medians. torch's attention gets
contiguous keys and values, is_causal, enable_gqa and its own dtype throughout; ours reads pages and
computes in float32. GFLOP/s count what a causal mask leaves. One line per contender goes to
benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.machine_limits import read_bandwidth
from nybble.kernels.paged_attention import FP8, Pages, attention, write
from nybble.kernels.program import Program
from nybble.kernels.vocabulary import divergence, log_likelihood

ROOT = Path(__file__).resolve().parents[1]
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
WINDOWS, WINDOW_TOKENS, PAGE_TOKENS = 8, 512, 64
ROWS, VOCABULARY = 512, 49_152
DECODE_SHAPES = {"SmolLM2": (HEADS, KV_HEADS, HEAD_DIM), "35B": (16, 2, 256)}
CONTEXTS = (1, 4096, 32_768)
#: Keys and values of all layers together: more than a cache holds; but no more layers than this.
DECODE_BYTES, MOST_LAYERS = 192 << 20, 30


@dataclass(frozen=True)
class Contender:
    """What is timed: `work` is in `unit` per step, a second's worth of it is reported; a call makes
    `steps` of them."""

    name: str
    call: Callable[[], object]
    work: float
    unit: str
    steps: int = 1


def ints(values: list[int]) -> Tensor:
    """An int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)


def scoring(compute: Compute) -> list[Contender]:
    """Prompts from nothing, all tokens at once."""
    flop = WINDOWS * HEADS * HEAD_DIM * 4 * WINDOW_TOKENS * (WINDOW_TOKENS + 1) / 2 / 1e9
    q = torch.randn(WINDOWS, HEADS, WINDOW_TOKENS, HEAD_DIM)
    k, v = (torch.randn(WINDOWS, KV_HEADS, WINDOW_TOKENS, HEAD_DIM) for _ in range(2))
    ragged = q.transpose(1, 2).reshape(-1, HEADS, HEAD_DIM).contiguous()
    table = ints(list(range(WINDOWS)))[:, None].contiguous()
    starts = ints([i * WINDOW_TOKENS for i in range(WINDOWS + 1)])
    lengths = ints([0] * WINDOWS)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        pages = Pages(k.to(dtype), v.to(dtype))  # one page per sequence

        def ours(pages: Pages = pages) -> Tensor:
            return attention(
                ragged, pages, table, starts, lengths, scale=HEAD_DIM**-0.5, compute=compute
            )

        def torchs(inputs: tuple[Tensor, ...] = (q.to(dtype), pages.keys, pages.values)) -> Tensor:
            return scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

        difference = (ours().reshape(WINDOWS, -1, HEADS, HEAD_DIM).transpose(1, 2) - torchs()).abs()
        print(f"# scoring {dtype}: largest difference {difference.max():.1e}")
        found.append(Contender(f"scoring nybble, {dtype} pages", ours, flop, "GFLOP/s"))
        found.append(Contender(f"scoring torch SDPA, {dtype}", torchs, flop, "GFLOP/s"))
    return found


def decode(compute: Compute) -> list[Contender]:
    """One token of one sequence, for each shape, context and page format."""
    found = []
    for shape in DECODE_SHAPES:
        for context in CONTEXTS:
            for dtype in (torch.bfloat16, FP8):
                found.append(decode_layers(shape, context, dtype, compute))
    print(f"# read bandwidth {read_bandwidth(compute.threads) / 1e9:.1f} GB/s")
    return found


def decode_layers(shape: str, context: int, dtype: torch.dtype, compute: Compute) -> Contender:
    """Writing and attention of some layers, recorded and replayed."""
    heads, kv_heads, head_dim = DECODE_SHAPES[shape]
    count = -(-context // PAGE_TOKENS)
    one = torch.randn(2, count, kv_heads, PAGE_TOKENS, head_dim).to(dtype)
    layers = max(1, min(MOST_LAYERS, DECODE_BYTES // one.nbytes))
    pages = [Pages(*one.clone()) for _ in range(layers)]
    table = torch.randperm(count)[None].int().contiguous()
    batch = (table, ints([0, 1]), ints([context - 1]))
    q, k = torch.randn(1, heads, head_dim), torch.randn(1, kv_heads, head_dim)
    program = Program(tokens=1, sequences=1, outputs=1)
    recording = Compute(threads=compute.threads, program=program)
    with program.recording():
        for layer in pages:
            write(k, k, layer, *batch, recording)
            attention(q, layer, *batch, scale=head_dim**-0.5, compute=recording)
    program.keep((pages, batch, q, k))
    gigabytes = 2 * context * kv_heads * head_dim * dtype.itemsize / 1e9
    return Contender(
        f"decode {shape}, {context:,} in {str(dtype)[6:]}, a layer",
        lambda: program.run(tokens=1, sequences=1, outputs=0),
        gigabytes,
        "GB/s",
        steps=layers,
    )


def vocabulary(compute: Compute) -> list[Contender]:
    """What scoring does to logits, beside the softmax that torch would do first."""
    x = 4 * torch.randn(ROWS, VOCABULARY)
    y = x + 0.1 * torch.randn(ROWS, VOCABULARY)
    targets = torch.randint(VOCABULARY, (ROWS,))
    entries = x.numel() / 1e9
    return [
        Contender(
            "log_likelihood", lambda: log_likelihood(x, targets, compute), entries, "G entries/s"
        ),
        Contender("torch.log_softmax", lambda: x.log_softmax(-1), entries, "G entries/s"),
        Contender(
            "divergence", lambda: divergence(x, y, targets, compute), 2 * entries, "G entries/s"
        ),
    ]


def main() -> None:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=dispatch.default_threads())
    parser.add_argument("--only", default="scoring,decode,vocabulary")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    parts = {"scoring": scoring, "decode": decode, "vocabulary": vocabulary}
    compute = Compute(threads=arguments.threads)
    for part in arguments.only.split(","):
        report(parts[part](compute), arguments.runs, arguments.threads)


def report(contenders: list[Contender], runs: int, threads: int) -> None:
    """Time in turns; the table on stdout, the rows in results.csv."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for c in contenders:
        c.call()
    for _ in range(runs):
        for c in contenders:
            started = time.perf_counter()
            c.call()
            seconds[c.name].append((time.perf_counter() - started) / c.steps)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    machine = f"{os.cpu_count()} cores, {dispatch.choose()}, {threads} threads"
    print(f"\n{machine}; medians of {runs}; commit {commit}; torch {torch.__version__}\n")
    print("| what | ms | fastest | rate |\n|---|--:|--:|--:|")
    with (ROOT / "benchmarks" / "results.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        for c in contenders:
            median, fastest = statistics.median(seconds[c.name]), min(seconds[c.name])
            rate = f"{c.work / median:.3g} {c.unit}"
            print(f"| {c.name} | {median * 1e3:.3f} | {fastest * 1e3:.3f} | {rate} |")
            writer.writerow(["attention", commit, machine, c.name, median, fastest, rate])


if __name__ == "__main__":
    main()
