"""Where the time of a step goes, kernel by kernel, and what the matmuls read of the bandwidth.

    python benchmarks/engine/kernels_of_step.py CKPT [--batch 1] [--steps 64] [--context 128]

A recorded step of decoding is replayed with a clock for each call. Matmuls are compared over the
packed bytes of all linears, with the read bandwidth that is measured before and after.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from nybble.api.conditions import Watch, conditions
from nybble.api.llm import OpenOptions, open_engine
from nybble.api.traffic import read_traffic
from nybble.checkpoint.reader import Checkpoint
from nybble.engine.model_runner import ModelRunner
from nybble.engine.runner import Work
from nybble.kernels.dispatch import default_threads
from nybble.kernels.machine_limits import read_bandwidth


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--context", type=int, default=128, help="tokens before the step")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=default_threads())
    a = parser.parse_args()
    watch = Watch()
    bandwidth = read_bandwidth(a.threads)
    options = OpenOptions(
        kv_cache_dtype="bf16",
        max_sequences=a.batch,
        max_context=a.context + 1,
        precision=a.precision,
        threads=a.threads,
        prefix_cache=False,
        draft="off",
    )
    engine = open_engine(a.checkpoint, options)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    assert runner.program is not None
    each = -(-(a.context + 1) // engine.options.page_tokens)
    draw = np.random.default_rng(0)
    works = [
        Work([int(draw.integers(runner.vocab))], engine.pages.take(each), slot, a.context, True, 1)
        for slot in engine.slots.take(a.batch)
    ]
    ticks = np.zeros(len(runner.program.names), dtype=np.int64)
    for _ in range(3):
        runner.forward(works)
    sizes = {"tokens": a.batch, "sequences": a.batch, "outputs": a.batch}
    # Medians of each call: a moment in which somebody else had the core does not count.
    samples = np.zeros((a.steps, len(ticks)), dtype=np.int64)
    for i in range(a.steps):
        runner.program.run(**sizes, ticks=samples[i])
    median = np.median(samples, axis=0) / 1e9
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, seconds in zip(runner.program.names, median, strict=True):
        spent[name] += float(seconds)
        calls[name] += 1
    bandwidth = max(bandwidth, read_bandwidth(a.threads))
    with Checkpoint.open(a.checkpoint, headers_only=True) as checkpoint:
        traffic = read_traffic(checkpoint)
    total = float(median.sum())
    print(f"{a.checkpoint.name}, batch {a.batch}, {a.precision}: {total * 1e3:.2f} ms a step\n")
    print("| kernel | calls | ms | share |\n|---|--:|--:|--:|")
    for name, seconds in spent.most_common():
        print(f"| {name} | {calls[name]} | {seconds * 1e3:.3f} | {100 * seconds / total:.1f} % |")
    read = traffic.weight_bytes(a.batch, a.batch)
    matmuls = sum(seconds for name, seconds in spent.items() if "matmul" in name)
    for title, seconds in (("matmuls", matmuls), ("the whole step", total)):
        if seconds:
            print(
                f"\n{title}: {read / seconds / 1e9:.1f} GB/s of packed bytes, "
                f"{100 * read / seconds / bandwidth:.0f} % of {bandwidth / 1e9:.1f} GB/s read"
            )
    print(f"\n{conditions(a.threads, watch.others_share())}")


if __name__ == "__main__":
    main()
