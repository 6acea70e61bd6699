"""Each part of GPTQ-X switched off in turn, on one model: what it is worth in KL.

    scripts/bench fidelity/ablation MODEL --calibration IDS.json --out FOLDER [--effort default]

A row is the whole method without one part, held against the whole method on the same windows of
WikiText-2, with the interval of paired resamples. Each folder keeps its report.json, where the
held-out losses are. `--reuse` takes checkpoints that are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from scorer import protocol, score
from table import reduction

from nybble.api.quantize import quantize
from nybble.calibrate.rounding import EFFORTS, Effort
from nybble.evaluate.divergence import compare_candidates
from nybble.evaluate.score import TokenDivergence

#: What is changed, and what the row is called.
SWITCHES: dict[str, tuple[str, dict[str, object]]] = {
    "whole": ("the whole method", {}),
    "plain_hessian": (
        "plain Hessian E[x x^T], no token normalisation",
        {"plain_share": 1.0, "residual_share": 0.0},
    ),
    "normalised_hessian": (
        "every token scaled to the same energy",
        {"plain_share": 0.0, "residual_share": 0.0},
    ),
    "no_residual": ("tokens not weighed by the residual stream", {"residual_share": 0.0}),
    "no_order": ("columns in the order of the file", {"orders": False}),
    "frozen_scales": ("block scales by MSE, before the feedback", {"searches_in_loop": False}),
    "fixed_damping": ("damping 0.01 everywhere", {"dampings": (0.01,)}),
    "no_guard": ("without the guard", {"guards": False}),
    "teacher_inputs": ("inputs of the unquantized model", {"is_sequential": False}),
    "no_descent": ("without coordinate descent inside blocks", {"passes": 0}),
    "no_feedback": ("local Hessian alone, no error feedback", {"gptq": False}),
}


def without(effort: Effort, name: str) -> Effort:
    """The effort with one switch turned."""
    return replace(effort, **SWITCHES[name][1])  # type: ignore[arg-type]


def run(name: str, a: argparse.Namespace) -> tuple[TokenDivergence, float]:
    """Quantize without a part, and score; CPU seconds of the quantization."""
    folder = a.out / f"{a.effort}-{name}"
    known = folder / "cost.json"
    if not (a.reuse and known.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        whole = EFFORTS[a.effort]
        began = time.process_time()
        EFFORTS[a.effort] = without(whole, name)
        try:
            quantize(
                *(a.model, folder / "checkpoint", a.recipe),
                calibrate=str(a.calibration),
                effort=a.effort,
                jobs=a.threads,
            )
        finally:
            EFFORTS[a.effort] = whole
        known.write_text(json.dumps({"cpu_s": time.process_time() - began}))
    conditions = protocol(a.precision, a.windows, a.threads)
    figures = score(folder / "checkpoint", a.model, conditions, a.out)
    return figures, float(json.loads(known.read_text())["cpu_s"])


def main() -> None:
    """Print a row for each switch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SWITCHES))
    parser.add_argument("--effort", default="default", choices=EFFORTS)
    parser.add_argument("--recipe", default="nvfp4-all")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reuse", action="store_true")
    a = parser.parse_args()
    names = ["whole", *(name for name in a.only.split(",") if name != "whole")]
    unknown = [name for name in names if name not in SWITCHES]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: unknown; the switches are {', '.join(SWITCHES)}")
    lines = [
        f"{a.model.name}, effort {a.effort}, {a.windows} windows, {a.precision}\n",
        "| without | mean KL | against the whole method | CPU s |",
        "|---|--:|--:|--:|",
    ]
    print("\n".join(lines), flush=True)
    whole: TokenDivergence | None = None
    for name in names:
        figures, cpu_s = run(name, a)
        whole = whole or figures
        change = "" if figures is whole else reduction(compare_candidates(figures, whole))
        lines.append(f"| {SWITCHES[name][0]} | {figures.kl.mean():.5f} | {change} | {cpu_s:,.0f} |")
        print(lines[-1], flush=True)
    (a.out / f"ablation-{a.effort}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
