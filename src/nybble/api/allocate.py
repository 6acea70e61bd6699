"""`nybble quantize --target-bits`, `--target-size`: a format for every group of modules, under a
limit of bytes, chosen by measurement.

A uniform checkpoint in the smallest format is made first, and one in FP8 where that is an option;
both lie in OUT.allocation until the end. Each group's damage is measured with networks put together
of them and the original. Candidates made from the damages are then *measured* as whole networks,
beside a control of the same bytes that knows no damages, and the best measured one is written: its
NVFP4 tensors are the uniform checkpoint's. The text of both measurements is the calibration's
guard, in halves: nothing was fitted to it, and it is no test set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.allocation_work import Quantize, Remembered, Work, bench_of, held_out, report_of
from nybble.api.extras import needs_torch
from nybble.api.plan import find_layout
from nybble.calibrate.allocate import FORMATS, Ground, find_ground
from nybble.calibrate.candidates import Candidate, Damages, candidates, predicted, settle_inputs
from nybble.calibrate.derived import recipe_text
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import SHARD_BYTES, refuse_inside
from nybble.errors import RecipeError
from nybble.families.dimensions import text_section
from nybble.formats.search import Search
from nybble.kernels.dispatch import default_threads
from nybble.plan.plan import make_plan
from nybble.plan.recipe import Recipe, load_recipe
from nybble.progress import Progress
from nybble.quantize.reuse import Reuse

if TYPE_CHECKING:
    from torch import Tensor

    from nybble.api.quantize import Result
    from nybble.calibrate.damage import Source
    from nybble.calibrate.samples import Samples
    from nybble.evaluate.significance import Comparison, Estimate

#: Side documents of the result: what was weighed and measured, and the recipe to repeat it.
DOCUMENT, RECIPE = "allocation.json", "allocation.toml"


@dataclass(frozen=True, slots=True)
class Target:
    """How large the result may be: bits per weight of what the recipe quantizes, so many more than
    uniform NVFP4 has, or bytes of the whole checkpoint. One of them is set."""

    bits: float | None = None
    more_bits: float | None = None
    payload_bytes: int | None = None

    def limit(self, ground: Ground) -> int:
        """The bytes that what is open may take. Raises RecipeError as `Ground.limit` does."""
        if self.payload_bytes is not None:
            return ground.limit(payload_bytes=self.payload_bytes)
        bits = self.bits
        if bits is None:
            assert self.more_bits is not None
            bits = ground.bits(ground.smallest()) + self.more_bits
        return ground.limit(bits=bits)


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate, measured: `kl` on the judge's tokens, and `gap` its KL against the control's,
    token by token (None for the control itself).

    `expected` is the sum of damages in proportion: what the uniform checkpoint was measured at,
    times the candidate's sum over the uniform one's. So it is of the judge's text, not the probe's.
    """

    candidate: Candidate
    payload_bytes: int
    bits: float
    kl: Estimate
    expected: float
    gap: Comparison | None

    @property
    def surrogate_error(self) -> float:
        """By how much `expected` is off, as a share of what was measured."""
        measured = self.kl.value
        return self.expected / measured - 1 if measured > 0 else 0.0

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.candidate.name,
            "reason": self.candidate.reason,
            "payload_bytes": self.payload_bytes,
            "bits_per_weight": self.bits,
            "kl": self.kl.as_json(),
            "sum_of_damages": self.candidate.predicted,
            "expected_kl": self.expected,
            "surrogate_error": self.surrogate_error,
            "against_control": self.gap and self.gap.as_json(),
            "schemes": {name: s.name for name, s in self.candidate.choice.items()},
        }


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was weighed, and what became of it. `rows` begin with the uniform checkpoint; `tokens`
    are those of the `probe`, of the `judge`, and the judge's windows."""

    result: Result
    base: str
    rows: tuple[Row, ...]
    chosen: str
    damages: Damages
    tokens: Mapping[str, int]

    def as_json(self) -> dict[str, object]:
        """What `quantize --json` adds for an allocation; OUT/allocation.json is the same."""
        return _document(self.base, self.rows, self.chosen, self.damages, self.tokens)


def allocate(
    model: str | PathLike[str],
    out: str | PathLike[str],
    recipe: str | Recipe,
    target: Target,
    samples: Samples,
    *,
    uniform: Quantize,
    plain: Quantize,
    layout: str = "modelopt",
    formats: Sequence[str] = FORMATS,
    data_free: bool = False,
    resume: bool = False,
    headroom: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    on_rows: Callable[[Sequence[Row], str], None] | None = None,
) -> Allocation:
    """Quantize `model` into `out` within `target`; `recipe` says what may be quantized.

    `uniform` makes the uniform checkpoint (calibrated or not), `plain` the FP8 one and the result;
    both are `quantize` with the model and its options filled in. `samples` brings the text: its
    guard windows judge, its fit windows measure static input scales (times `headroom`).
    `data_free` allows no scheme that needs those. `on_rows` is told the candidates and the choice
    before the result is written.

    An interrupted run is continued with `resume`. Raises MissingExtra without torch, RecipeError
    for a target or recipe that leaves no choice, TextError where the guard is too short, DoesNotFit
    for a disk that cannot hold three checkpoints, and what quantizing and computing raise.
    """
    needs_torch("an allocation")
    progress, threads = progress or Progress(), threads or default_threads()
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    chosen = chosen.without_data() if data_free else chosen
    target_folder = Path(out)
    refuse_inside(Path(model), target_folder)
    probes, judges = held_out(samples)
    with Checkpoint.open(Path(model)) as checkpoint:
        base = make_plan(checkpoint, chosen, find_layout(layout))
        ground = find_ground(base, formats, can_measure=not data_free)
        target.limit(ground)
        work = Work(target_folder, base, ground, resume=resume)
        schemes = {s for g in ground.groups for s in g.schemes}
        if headroom is not None and not any(s.needs_input_scale for s in schemes):
            raise RecipeError("--headroom: no option stores an input scale here; leave it out")
        remembered = Remembered(samples, threads, headroom)
        work.make(uniform, plain, remembered, progress)
        with work.opened(threads) as sources:
            damages = work.damages(sources, probes, threads, progress)
            ground, promoted = settle_inputs(ground, damages)
            if promoted:
                progress.say(f"{len(promoted)} groups become W4A16: {', '.join(promoted)}")
            limit = target.limit(ground)
            rows = _measured(ground, damages, limit, sources, judges, threads, progress)
        best = min(rows, key=lambda r: r.kl.value)
        if on_rows is not None:
            on_rows(rows, best.candidate.name)
        tokens = {
            "probe": sum(map(len, probes)),
            "judge": sum(map(len, judges)),
            "judge_windows": len(judges),
        }
        document = _document(chosen.name, rows, best.candidate.name, damages, tokens)
        final = work.recipe(best.candidate.choice, f"{best.bits:.2f} bits per weight, measured")
        planned = work.plan(final)
        assert planned.payload_bytes == best.payload_bytes, "bytes are what was weighed"
        documents = {
            DOCUMENT: (json.dumps(document, indent=1) + "\n").encode(),
            RECIPE: recipe_text(final).encode(),
            **report_of(work.uniform, planned),
        }
    with Reuse(work.uniform, documents) as reuse:
        result = plain(
            target_folder, final, rounder=reuse, resume=resume, **remembered.keywords(planned)
        )
    work.remove()
    name = best.candidate.name
    return Allocation(result, chosen.name, tuple(rows), name, damages, tokens)


def allocate_command(
    model: str | PathLike[str],
    out: str | PathLike[str],
    recipe: str | Recipe,
    target: Target,
    *,
    formats: Sequence[str] = FORMATS,
    layout: str = "modelopt",
    search: Search = "mse",
    jobs: int | None = None,
    shard_size: int = SHARD_BYTES,
    resume: bool = False,
    data_free: bool = False,
    calibrate: str | PathLike[str] | None = None,
    effort: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    allow_mixed: bool = False,
    calibration_text: str | PathLike[str] | None = None,
    headroom: float | None = None,
    progress: Progress | None = None,
    on_rows: Callable[[Sequence[Row], str], None] | None = None,
) -> Allocation:
    """`allocate` with the options of `quantize`, which mean what they mean there.

    Without `calibrate` the uniform checkpoint is made without text; `samples`, `length` and
    `calibration_text` then choose the text that is measured on. Raises as both functions do.
    """
    needs_torch("an allocation")
    from nybble.api.quantize import quantize
    from nybble.calibrate.samples import open_samples

    plain = partial(
        quantize,
        model,
        layout=layout,
        search=search,
        jobs=jobs,
        shard_size=shard_size,
        data_free=data_free,
        progress=progress,
    )
    uniform = plain
    if calibrate is not None:
        uniform = partial(
            plain,
            calibrate=calibrate,
            effort=effort,
            samples=samples,
            length=length,
            allow_mixed=allow_mixed,
        )
    elif effort is not None or allow_mixed:
        raise RecipeError("--effort and --allow-mixed belong to --calibrate, which is not there")
    text = calibrate if calibrate is not None else calibration_text
    with Checkpoint.open(Path(model), headers_only=True) as checkpoint:
        context = text_section(checkpoint.config).get("max_position_embeddings")
    found = open_samples(
        Path(model),
        None if text is None else str(text),
        samples=samples,
        length=length,
        context=context if isinstance(context, int) else None,
    )
    return allocate(
        model,
        out,
        recipe,
        target,
        found,
        uniform=uniform,
        plain=plain,
        layout=layout,
        formats=formats,
        data_free=data_free,
        resume=resume,
        headroom=headroom,
        threads=jobs,
        progress=progress,
        on_rows=on_rows,
    )


def _measured(
    ground: Ground,
    damages: Damages,
    limit: int,
    sources: Mapping[str, Source],
    judges: Sequence[Tensor],
    threads: int,
    progress: Progress,
) -> list[Row]:
    """The uniform checkpoint and every candidate, each measured as a whole network."""
    from nybble.calibrate.damage import Branch
    from nybble.evaluate.significance import compare, mean_estimate

    small = ground.smallest()
    first = Candidate("uniform", small, predicted(small, damages), "the smallest format everywhere")
    found = [first, *(c for c in candidates(ground, damages, limit) if c.choice != small)]
    bench = bench_of(sources, ground, judges, threads, progress)
    measured = bench.run([Branch(c.choice) for c in found], "candidates")
    place = next((i for i, c in enumerate(found) if c.name == "control"), None)
    scale = float(measured.kl[0].mean()) / first.predicted if first.predicted else 0.0
    rows = []
    for i, (candidate, kl) in enumerate(zip(found, measured.kl, strict=True)):
        gap = None
        if place is not None and i != place and measured.kl[place].sum() > 0:
            gap = compare(kl, measured.kl[place], measured.window)
        choice = candidate.choice
        rows.append(
            Row(
                candidate,
                ground.payload_bytes(choice),
                ground.bits(choice),
                mean_estimate(kl, measured.window),
                scale * candidate.predicted,
                gap,
            )
        )
    return rows


def _document(
    base: str,
    rows: Sequence[Row],
    chosen: str,
    damages: Damages,
    tokens: Mapping[str, int],
) -> dict[str, object]:
    return {
        "schema": "nybble.allocation/1",
        "recipe": base,
        "chosen": chosen,
        "tokens": dict(tokens),
        "candidates": [row.as_json() for row in rows],
        "damages": {name: dict(by) for name, by in damages.items()},
    }


__all__ = ["Allocation", "Row", "Target", "allocate", "allocate_command", "held_out"]
