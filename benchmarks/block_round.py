"""Speed of rounding a strip in a metric, and what passes and kept scales buy.

    python benchmarks/block_round.py [--rows 2048] [--columns 128] [--threads 1] [--runs 9] [--json]

A strip of Gaussian weights under the Hessian of correlated inputs. The choices take turns, so that
a busy neighbour slows all of them; medians of wall time, in nanoseconds per weight and thread. The
loss is relative to the first choice's. The last row is the search without a metric (`mse` of
`block_quantize`, from float32), for what the metric costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from nybble.formats.block import NVFP4
from nybble.kernels import block_quantize, dispatch
from nybble.kernels.block_round import BLOCK, round_strip

#: Passes, kept scales.
CHOICES = ((0, 1), (1, 1), (2, 1), (1, 3), (2, 3))


def a_metric(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U and D of the Hessian of inputs that go together."""
    x = torch.randn(3 * columns, columns) @ torch.randn(columns, columns)
    hessian = (x.T @ x / x.square().mean() / len(x)).double()
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return (factor / factor.diagonal()).float().contiguous(), factor.diagonal().square().float()


def plain_search(weight: torch.Tensor, threads: int) -> Callable[[], None]:
    """The exact search of least squares over the same weights."""
    run = [weight.contiguous().numpy().reshape(-1)]
    codes = [np.empty(weight.numel() // 2, dtype=np.uint8)]
    scales = [np.empty(weight.numel() // BLOCK, dtype=np.uint8)]
    one = np.ones(1, dtype=np.float32)
    return lambda: block_quantize.quantize(run, NVFP4, "mse", one, codes, scales, threads)


def measure(rows: int, columns: int, threads: int, runs: int) -> list[dict[str, object]]:
    """One row per choice."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * 100
    upper, importance = a_metric(columns)
    calls: list[Callable[[], object]] = []
    losses: list[float | None] = []
    for passes, kept in CHOICES:

        def call(passes: int = passes, kept: int = kept) -> float:
            strip = round_strip(
                weight, weight, upper, importance, passes=passes, kept=kept, threads=threads
            )
            return float(strip.loss.double().sum())

        calls.append(call)
        losses.append(call())
    calls.append(plain_search(weight, threads))
    losses.append(None)
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(runs + 1):
        for each, mine in zip(calls, taken, strict=True):
            start = time.perf_counter()
            each()
            mine.append(time.perf_counter() - start)
    names = [f"{p} passes over {k}" for p, k in CHOICES] + ["no metric"]
    first = losses[0]
    return [
        {
            "choice": name,
            "ns": statistics.median(mine[1:]) * 1e9 * threads / weight.numel(),
            "loss": None if loss is None or first is None else loss / first,
        }
        for name, mine, loss in zip(names, taken, losses, strict=True)
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rows, options.columns, options.threads, options.runs)
    if options.json:
        print(json.dumps({"schema": "nybble.bench.block_round/1", "rows": found}))
        return
    print(f"{dispatch.choose()}, {options.rows} x {options.columns}, {options.threads} threads")
    for row in found:
        loss = "" if row["loss"] is None else f"  loss {row['loss']:.4f}"
        print(f"{row['choice']:>18}  {row['ns']:6.2f} ns per weight{loss}")


if __name__ == "__main__":
    main()
