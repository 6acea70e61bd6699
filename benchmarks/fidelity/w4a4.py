"""W4A4: what calibration wins where inputs are rounded too, and the floor under every weight.

    python benchmarks/fidelity/w4a4.py MODEL --calibration IDS.json --out FOLDER

All decoder linears in NVFP4 with NVFP4 inputs, served as the checkpoint declares. The floor has the
original weights and the same rounded inputs: no method for weights gets below it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from scorer import protocol, score
from table import reduction

from nybble.api.evaluate import Protocol
from nybble.api.quantize import quantize
from nybble.checkpoint.reader import Checkpoint
from nybble.evaluate.divergence import compare_candidates
from nybble.evaluate.score import TokenDivergence, compare
from nybble.evaluate.sources import StreamedSource
from nybble.evaluate.windows import load_suite, make_windows
from nybble.models.linear import Experts, Linear, Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.text.tokenizer import Tokenizer

RECIPE = """title = "All decoder linears NVFP4 W4A4"

[[rule]]
roles = ["routed_expert", "shared_expert", "mlp", "attention", "linear_attention", "linear"]
scheme = "nvfp4-w4a4"
"""
ROWS: dict[str, dict[str, Any]] = {
    "absmax": {"search": "absmax"},
    "mse": {},
    "fast": {"effort": "fast"},
    "default": {"effort": "default"},
    "best": {"effort": "best"},
}


def original(part: Any, source: Any) -> Any:
    """A part of a network with the weights of another's, and its own rounding of inputs."""
    if isinstance(part, Linear | Experts):
        return replace(part, weight=source.weight)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changed = {}
    for field in fields(part):
        own, other = getattr(part, field.name), getattr(source, field.name)
        if is_dataclass(own) and field.name not in ("network", "weight"):
            changed[field.name] = original(own, other)
    return replace(part, **changed) if changed else part


def floor(checkpoint: Path, model: Path, conditions: Protocol) -> TokenDivergence:
    """The divergence of the original weights with the checkpoint's rounded inputs."""
    with Checkpoint.open(model) as source, Checkpoint.open(checkpoint) as candidate:
        teacher, served = Model(source), Model(candidate)
        own = served.weights.layer
        served.weights.layer = lambda n: original(own(n), teacher.weights.layer(n))  # type: ignore[method-assign]
        ids = Tokenizer.open(model).encode(load_suite("wikitext2").content, parse_special=False)
        windows = make_windows(ids, 512, limit=conditions.limit)
        sides = [
            StreamedSource(
                *(each, windows, Mode(conditions.compute, simulate=each is served)),
                page_dtype=conditions.kv_dtype,
                title=title,
                progress=Progress(),
            )
            for each, title in ((teacher, "original"), (served, "floor"))
        ]
        for side in sides:
            side.run()
        figures = compare(*sides, windows, sides[0].stream.mode, Progress())
        for side in sides:
            side.close()
    return figures


def main() -> None:
    """Print a row for each way to quantize, and the floor."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    recipe = a.out / "w4a4-all.toml"
    recipe.write_text(RECIPE)
    ids = json.loads(a.calibration.read_text())["input_ids"]
    text = a.out / "calibration.txt"
    tokenizer = Tokenizer.open(a.model)
    text.write_text("\n\n".join(tokenizer.decode(row) for row in ids))
    conditions = replace(protocol("bf16", a.windows, a.threads), simulate=True)
    base: TokenDivergence | None = None
    lines = ["| weights | mean KL | against absmax | CPU s |", "|---|--:|--:|--:|"]
    print("\n".join(lines), flush=True)
    for name in a.rows.split(","):
        folder = a.out / name
        began = time.process_time()
        if not (folder / "checkpoint").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            options = dict(ROWS[name])
            if "effort" in options:
                options["calibrate"] = str(a.calibration)
            else:
                options["calibration_text"] = text
            quantize(a.model, folder / "checkpoint", str(recipe), jobs=a.threads, **options)
        cpu_s = time.process_time() - began
        figures = score(folder / "checkpoint", a.model, conditions, a.out)
        base = base or figures
        change = "" if figures is base else reduction(compare_candidates(figures, base))
        lines.append(f"| {name} | {figures.kl.mean():.5f} | {change} | {cpu_s:,.0f} |")
        print(lines[-1], flush=True)
    under = floor(a.out / a.rows.split(",")[-1] / "checkpoint", a.model, conditions)
    lines.append(f"| the original's (floor) | {under.kl.mean():.5f} | | |")
    print(lines[-1], flush=True)
    (a.out / "w4a4.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
