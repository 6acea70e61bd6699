"""The measurement of input scales, and of an FP8 KV cache, that `nybble quantize` runs before it
writes: what was asked for, and one pass over its text.

Torch is imported where something runs, not here: a run without text needs none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.extras import needs_torch
from nybble.calibrate.scales import HEADROOM, InputAmax, check_headroom, input_scales
from nybble.errors import RecipeError, TextError
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.quantize.input_scales import InputScales

if TYPE_CHECKING:
    from nybble.calibrate.kv_scales import KvScale
    from nybble.calibrate.samples import Samples

#: Tokens of the measurement of input scales alone: ModelOpt found the choice and amount of text to
#: matter little, and 8,192 show each of 256 experts some 256 tokens (8 are active at a time).
CALIBRATION_TOKENS = 8192

Measure = Callable[[Plan, Progress], InputAmax]


@dataclass(frozen=True, slots=True)
class InputMeasurement:
    """What was asked of the measurement of input scales; `text` None is the project's own mixture.
    `samples` take the place of both."""

    text: str | None
    tokens: int
    headroom: float
    measure: Measure | None
    threads: int
    samples: Samples | None = None

    def __str__(self) -> str:
        if name := getattr(self.measure, "name", None):
            return str(name)
        if self.samples is not None:
            digest = str(self.samples.record["sha256"])[:16]
            source = self.samples.record["source"]
            return f"{self.samples.fit_tokens:,} tokens of {source}, sha256 {digest}"
        if self.text is None:
            return f"{self.tokens:,} tokens of the project's mixture"
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return f"{self.tokens:,} tokens of a text with sha256 {digest}"

    def run(
        self, plan: Plan, progress: Progress
    ) -> tuple[InputScales | None, dict[int, KvScale] | None]:
        """Measure, and make scales of it: of inputs and of the cache (by layer, -1 the MTP head's),
        as far as the plan stores them."""
        measured = None if self.measure is None else self.measure(plan, progress)
        kv = None
        if measured is None or plan.kv_scales:
            found, kv = self._pass(plan, progress)
            measured = measured or found
        if not plan.needs_data:
            return None, kv
        return replace(input_scales(plan, measured, self.headroom), calibration=str(self)), kv

    def _pass(self, plan: Plan, progress: Progress) -> tuple[InputAmax, dict[int, KvScale] | None]:
        """The pass over the text."""
        from nybble.calibrate.amax import measure_amax
        from nybble.calibrate.kv_scales import KvSizes

        sizes = KvSizes() if plan.kv_scales else None
        found = measure_amax(
            plan,
            text=self.text,
            tokens=self.tokens,
            windows=None if self.samples is None else self.samples.fit_windows,
            kv=sizes,
            threads=self.threads,
            progress=progress,
        )
        return found, None if sizes is None else sizes.scales()

    def over(self, stored: InputScales | None) -> InputScales | None:
        """Stored scales as if asked for now: the journal refuses what it was not asked for then."""
        if stored is None:
            return None
        return replace(stored, headroom=self.headroom, calibration=str(self))


def input_measurement(
    text: str | PathLike[str] | None,
    tokens: int | None,
    headroom: float | None,
    measure: Measure | None,
    threads: int,
) -> InputMeasurement:
    """Raises TextError for a text that cannot be read, RecipeError for a headroom of no use."""
    tokens = CALIBRATION_TOKENS if tokens is None else tokens
    if tokens < 1:
        raise TextError(f"{tokens} calibration tokens; at least one is needed")
    headroom = HEADROOM if headroom is None else float(headroom)
    check_headroom(headroom)
    content = None if text is None else calibration_text(text)
    return InputMeasurement(content, tokens, headroom, measure, threads)


def calibration_text(path: str | PathLike[str]) -> str:
    """What a file says. Raises TextError for one that cannot be read."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"calibration text {path} cannot be read: {error}") from None


def refuse_missing(plan: Plan) -> None:
    """Raise MissingExtra where the model cannot be run, with the ways out that this recipe has."""
    if not plan.needs_data:
        needs_torch("--kv-scales", ", or leave --kv-scales out")
        return
    try:
        plan.recipe.without_data()
    except RecipeError:
        otherwise = ", or choose a recipe that measures nothing (nvfp4-all)"
    else:
        otherwise = ", or --data-free, which leaves out what needs measured scales"
    needs_torch(f"measuring the input scales of recipe {plan.recipe.name}", otherwise)
