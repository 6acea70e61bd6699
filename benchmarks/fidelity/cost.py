"""What rounding costs a weight, by shape, against the budget of GPTQ-X.

    scripts/bench fidelity/cost [--inputs 576,1536,2048,4096,17408] [--effort default]

One thread, CPU seconds of `rounding.round_group` (all that a group costs: data-free search, local
method, dampings, codes, guard) and of `rounding.gptq` alone with one damping. The budget is 0.05 us
+ 10 ps x (K + K^2 / N) a weight on a core that makes 287 GFLOP/s in FP32, and scaled by what this
one makes, measured before and after. Weights are normal, Hessians have the spread of trained ones;
neither changes what is computed. K = 17408 needs 10 GB of memory.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibrate.rounding import EFFORTS, Effort, Evidence, gptq, round_group
from nybble.kernels.machine_limits import peak

#: Inputs and outputs of groups of real models: SmolLM2's q/k/v, gate/up and down; an expert's
#: gate/up and a linear attention's output of Qwen3.5 35B-A3B; gate/up and down of the 27B.
SHAPES = (
    *((576, 960), (576, 3072), (1536, 576)),
    *((2048, 1024), (2048, 12288), (4096, 2048), (17408, 5120)),
)
#: FP32 operations a second of the core that the budget was written for.
BUDGET_PEAK = 287e9


@dataclass(frozen=True)
class Measured:
    """Microseconds of a weight."""

    group_us: float
    gptq_us: float
    method: str


def hessian(k: int, generator: torch.Generator) -> Tensor:
    """Positive definite, mean diagonal 1, with channels of very different energy."""
    spread = torch.randn(k, generator=generator).exp()
    low = torch.randn((k, min(k, 256)), generator=generator) * spread.sqrt()[:, None]
    h = low @ low.T
    h.div_(2 * h.diagonal().mean())
    h.diagonal().add_(0.5 * spread / spread.mean())
    return h


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(k: int, n: int, effort: Effort) -> Measured:
    """One shape."""
    generator = torch.Generator().manual_seed(k + n)
    weight = torch.randn((n, k), generator=generator) * 0.02
    fit = hessian(k, generator)
    evidence = Evidence(fit, fit, 4096, 512)
    chosen = []
    group = seconds(
        lambda: chosen.append(round_group(weight, 2.0**-12, evidence, effort, 1)[2].method)
    )
    gc.collect()
    unit = weight * 2.0**12
    alone = seconds(lambda: gptq(unit, fit, effort.dampings[0], effort, 1))
    return Measured(1e6 * group / (n * k), 1e6 * alone / (n * k), chosen[0])


def budget_us(k: int, n: int, peak_s: float) -> float:
    """The issue's bound, on this machine."""
    return (0.05 + 1e-5 * (k + k * k / n)) * BUDGET_PEAK / peak_s


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--inputs", default=",".join(str(k) for k in sorted({k for k, _ in SHAPES}))
    )
    parser.add_argument("--effort", default="default", choices=EFFORTS)
    a = parser.parse_args()
    wanted = {int(k) for k in a.inputs.split(",")}
    torch.set_num_threads(1)
    peaks = [peak("f32", 1) or 0.0]
    found = {}
    for k, n in SHAPES:
        if k in wanted:
            print(f"K {k}, N {n}", file=sys.stderr, flush=True)
            found[k, n] = measure(k, n, EFFORTS[a.effort])
    peaks.append(peak("f32", 1) or 0.0)
    best = max(peaks)
    print(
        f"effort {a.effort}, one thread, {best / 1e9:.0f} GFLOP/s of FP32 multiply-adds (before "
        f"and after: {', '.join(f'{p / 1e9:.0f}' for p in peaks)})\n"
    )
    print("| K | N | GPTQ-X us | budget us | of budget | whole group us | taken |")
    print("|--:|--:|--:|--:|--:|--:|---|")
    for (k, n), row in found.items():
        allowed = budget_us(k, n, best)
        print(
            f"| {k} | {n} | {row.gptq_us:.3f} | {allowed:.3f} | {row.gptq_us / allowed:.2f} | "
            f"{row.group_us:.3f} | {row.method} |"
        )


if __name__ == "__main__":
    main()
