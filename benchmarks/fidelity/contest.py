"""Every quantizer on the same model, calibration tokens and scorer: KL from BF16, side by side.

    scripts/bench fidelity/contest MODEL --calibration IDS.json --out FOLDER [--tools a,b,...]

Makes a checkpoint with each tool (tools.py; `--list` names them), scores all of them on windows of
WikiText-2 and prints a table: mean KL with its interval, the reduction against round-to-nearest and
of our rows against every peer, both from paired resamples of the windows. FOLDER keeps the
checkpoints, the numbers of every token, table.md and table.json. `--reuse` takes checkpoints that
are there. `--choices` adds flips on a multiple-choice set (choices.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from choices import answers, judge, read_questions
from scorer import PRECISIONS, Sizes, protocol, score, sizes_of, summary
from table import Row, as_json, markdown
from tools import TOOLS, Cost, Task, Tool, make, prepare_kernels

#: Round-to-nearest: what all others are held against.
BASE = "nybble-absmax"


def read_or_make(tool: Tool, task: Task, folder: Path, *, reuse: bool) -> Cost:
    """A checkpoint and what it cost."""
    known = folder / "cost.json"
    if reuse and known.exists():
        return Cost(**json.loads(known.read_text()))
    print(f"{tool.title}: quantizing", file=sys.stderr, flush=True)
    return make(tool, task, folder)


def ask(folder: Path, a: argparse.Namespace) -> dict[str, object]:
    """What choices.py finds of FOLDER/checkpoint; kept, as is what the model itself answered."""
    if a.choices is None:
        return {}
    kept = folder / f"choices-{a.choices.parent.name}-{a.items}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    questions = read_questions(a.choices, a.items)
    reference = a.out / f"answers-{a.choices.parent.name}-{a.items}.npy"
    if not reference.exists():
        np.save(reference, answers(a.model, questions, a.threads))
    given = answers(folder / "checkpoint", questions, a.threads)
    found = judge(given, np.load(reference), questions)
    kept.write_text(json.dumps(found))
    return found


def enter(name: str, task: Task, a: argparse.Namespace) -> Row:
    """A tool's row: made, weighed and scored."""
    tool = TOOLS[name]
    folder = a.out / name
    cost = read_or_make(tool, task, folder, reuse=a.reuse)
    figures = {}
    for precision in a.precision.split(","):
        print(f"{tool.title}: scoring in {precision}", file=sys.stderr, flush=True)
        conditions = protocol(precision, a.windows, a.threads)
        figures[precision] = score(folder / "checkpoint", task.model, conditions, a.out)
    sizes: Sizes = sizes_of(folder, task.model)
    primary = figures[next(iter(figures))]
    return Row(tool, cost, sizes, figures, summary(primary), ask(folder, a))


def check(a: argparse.Namespace) -> list[str]:
    """The tools asked for, round-to-nearest first."""
    names: Sequence[str] = list(TOOLS) if a.tools == "all" else a.tools.split(",")
    unknown = [name for name in names if name not in TOOLS]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: unknown; the tools are {', '.join(TOOLS)}")
    if any(p not in PRECISIONS for p in a.precision.split(",")):
        sys.exit(f"--precision {a.precision}: choose from {', '.join(PRECISIONS)}")
    return [BASE, *(name for name in names if name != BASE)]


def main() -> None:
    """Run the contest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path, help="windows of ids, made by fidelity/tokens")
    parser.add_argument("--out", type=Path, help="folder of all checkpoints and results")
    parser.add_argument("--tools", default="all", help="comma-separated; default all")
    parser.add_argument("--recipe", default="nvfp4-all", help="of nybble's rows")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--precision", default="f32", help="f32, bf16 or both; first one is shown")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choices", type=Path, help="multiple-choice questions, JSON lines")
    parser.add_argument("--items", type=int, default=400, help="questions asked")
    parser.add_argument("--reuse", action="store_true", help="take checkpoints that are there")
    parser.add_argument("--list", action="store_true", help="name the tools and stop")
    a = parser.parse_args()
    if a.list:
        print("\n".join(f"{tool.name:<24} {tool.title}" for tool in TOOLS.values()))
        return
    if not (a.model and a.calibration and a.out):
        parser.error("MODEL, --calibration and --out are needed")
    a.out.mkdir(parents=True, exist_ok=True)
    prepare_kernels()
    task = Task(a.model.resolve(), a.calibration.resolve(), a.threads, a.recipe)
    rows = [enter(name, task, a) for name in check(a)]
    text = markdown(rows, a.model.name)
    (a.out / "table.md").write_text(text)
    (a.out / "table.json").write_text(json.dumps(as_json(rows, a.model.name), indent=1))
    print(text)


if __name__ == "__main__":
    main()
