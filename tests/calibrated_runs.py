"""Calibrated runs of tiny random models, over random tokens: no tokenizer, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nybble.api.plan import find_layout
from nybble.calibrate.rounding import EFFORTS, Effort
from nybble.calibrate.samples import Samples
from nybble.calibrate.sequential import Calibration
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import Recipe, load_recipe
from nybble.progress import Progress
from nybble.quantize.input_scales import InputScales
from nybble.quantize.run import Options, execute

#: Rotary embeddings that transformers' configs of the hybrids name.
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LENGTHS = (70, 33, 64, 90, 41)
GUARD = frozenset({1, 4})


def samples(
    vocabulary: int, lengths: Sequence[int] = LENGTHS, guard: frozenset[int] = GUARD
) -> Samples:
    """Windows of random tokens."""
    generator = torch.Generator().manual_seed(1)
    windows = tuple(torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths)
    return Samples(windows, guard, {"source": "random", "sha256": str(sum(lengths))})


def plan_of(checkpoint: Checkpoint, recipe: str | Recipe, layout: str = "modelopt") -> Plan:
    """The plan of a recipe, by its name or itself."""
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return make_plan(checkpoint, chosen, find_layout(layout))


def calibrate(
    plan: Plan,
    out: Path,
    given: Samples,
    effort: str | Effort = "default",
    *,
    threads: int = 1,
    progress: Progress | None = None,
    scales: InputScales | None = None,
    disk: Disk | None = None,
    limit_bytes: int | None = None,
    kind: type[Calibration] = Calibration,
    options: Mapping[str, Any] | None = None,
) -> Calibration:
    """One run; returns its rounder, whose hidden states are gone."""
    chosen = EFFORTS[effort] if isinstance(effort, str) else effort
    rounder = kind(
        plan,
        given,
        chosen,
        spill=out.with_name(out.name + ".calibration"),
        threads=threads,
        progress=progress or Progress(),
        input_scales=scales.values if scales else None,
        limit_bytes=limit_bytes,
    )
    execute(
        plan,
        out,
        Options(threads=threads, **(options or {})),
        version="1",
        progress=progress or Progress(),
        input_scales=scales,
        disk=disk,
        rounder=rounder,
    )
    return rounder
