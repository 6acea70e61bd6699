"""Input scales from measured input magnitudes: the arithmetic behind every stored `input_scale`.

What was measured comes as numbers (`InputAmax`); how, `amax.py` knows. Knows no layout: the scales
multiply, and members of a fused group share theirs.

Source of the arithmetic: ModelOpt and compressed-tensors as docs/layouts.md describes them; static
FP8 stores amax / 448, NVFP4 amax / (6 * 448), the scale of the block scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, isfinite, log2

import numpy as np

from nybble.calibrate.block_amax import BlockAmax
from nybble.errors import RecipeError
from nybble.formats.element import E2M1, E4M3
from nybble.formats.scheme import Scheme
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan
from nybble.quantize.input_scales import InputScales, is_scale

#: What a measured amax is multiplied by. The amax itself is the best scale for the text it was
#: measured on (ModelOpt's study on Qwen3.5-9B, pull request 1545: within 0.06 dB of the optimum on
#: every layer; percentiles lose 1 to 25 dB). The risk is the outlier that this text did not hold:
#: it saturates. On SmolLM2-135M and the carried hybrid, 8,192 tokens of other text went above the
#: mixture's amax in up to half of the linears: by 1.7 and 2.3 at most, above 2 in 3 of 1,812 cases.
#: Both formats are floating point, so room is nearly free: a power of two only shifts exponents,
#: and what stays normal rounds to the same number, bit for bit. The small values pay: 2 cost 0.003
#: dB on average and 0.26 dB in the worst linear of SmolLM2 (FP8; NVFP4 nothing), 4 cost 1.2 dB.
HEADROOM = 2.0
#: Above this nothing is left: E4M3 spans 448 / 2^-6 = 28672 in normal numbers, and typical values
#: lie some 30 times below the largest.
MOST_HEADROOM = 1024.0
#: Of NVFP4 inputs: how far above a small block (the first percentile) the scale may reach. The
#: block scale is an E4M3 number, and that block's is 448 / 16384 there, 1.75 times the smallest
#: normal one: all the room below costs nothing. The rule of ModelOpt 0.47 (nvfp4_act_headroom), but
#: never below what was measured, in powers of two, and no more than outliers will ever need: a
#: scale of any size would hide one that was stored the wrong way round (rule NB212).
ANCHOR, SMALL_BLOCK, MOST_ROOM = 16384.0, 0.01, 64.0
#: Tokens that an expert must have seen for its own amax to count. One is enough: engines that run
#: all experts of a layer as one matmul take the largest scale anyway, and the headroom covers what
#: a few tokens missed. None says nothing.
FEWEST_TOKENS = 1


@dataclass(frozen=True, slots=True)
class InputAmax:
    """What a pass measured: per module the largest input magnitude, and the tokens it was seen on.

    Experts one by one; one that saw no token may be absent or have 0 tokens. `total_tokens` is the
    length of the pass. `blocks` are the sizes of blocks of NVFP4 inputs, where they were measured;
    all experts of a layer share theirs.
    """

    amax: Mapping[str, float]
    tokens: Mapping[str, int]
    total_tokens: int
    blocks: Mapping[str, BlockAmax] = field(default_factory=dict)


def input_scales(plan: Plan, measured: InputAmax, headroom: float = HEADROOM) -> InputScales:
    """The scale of every module whose scheme stores one; members of a job share the largest.

    amax * headroom / 448 for static FP8, amax * headroom / 2688 for NVFP4 W4A4, in float32. Where
    the blocks of an NVFP4 input were measured, `headroom` is the least: it is doubled as long as
    a small block does not pay for it (ANCHOR), so that outliers that this text lacks saturate as
    late as can be had for nothing. Experts of a layer are moved together, for engines that run them
    as one matmul take the largest of their scales. An
    expert that saw fewer than FEWEST_TOKENS tokens, or zeros alone, takes the largest amax of this
    projection over all experts of its layer, and is listed in `fallbacks`. Raises RecipeError for a
    headroom outside of [1, MOST_HEADROOM], and, naming the module, for what has no measurement, is
    zero, NaN or infinite, or too small or large for a float32 scale.
    """
    check_headroom(headroom)
    jobs = [job for job in plan.jobs if job.scheme.needs_input_scale]
    peaks = {job.name: _peak(job, measured) for job in jobs}
    layers: dict[tuple[str, ...], float] = {}
    for job in jobs:
        key = _layer(job)
        layers[key] = max(layers.get(key, 0.0), peaks[job.name])
    values: dict[str, float] = {}
    fallbacks: list[str] = []
    for job in jobs:
        modules = [m.module for m in job.members]
        peak = peaks[job.name]
        if peak == 0:
            peak = layers[_layer(job)]
            fallbacks += modules
        if peak == 0:
            raise _nothing_measured(job, measured)
        room = max(headroom, _free_room(job, measured, layers[_layer(job)]))
        values.update(dict.fromkeys(modules, _scale(job, peak * room)))
    return InputScales(values, tuple(fallbacks), headroom, measured.total_tokens)


def _free_room(job: Job, measured: InputAmax, peak: float) -> float:
    """The power of two that the scale of the largest input `peak` may be raised by, by its blocks;
    0 where the input has none, or they are not known."""
    assert job.scheme.input is not None
    if job.scheme.input.element is not E2M1:
        return 0.0
    small = [
        blocks.quantile(SMALL_BLOCK)
        for m in job.members
        if (blocks := measured.blocks.get(m.module)) is not None and blocks.blocks
    ]
    room = ANCHOR * min(small) / peak if small else 0.0
    return 2.0 ** floor(log2(min(room, MOST_ROOM))) if room >= 1 else 0.0


def check_headroom(headroom: float) -> None:
    """Raise RecipeError for a headroom that clips what was measured, or leaves no precision."""
    if not 1 <= headroom <= MOST_HEADROOM:
        raise RecipeError(
            f"headroom {headroom}: expected 1 to {MOST_HEADROOM:g}; below 1 even measured values "
            "would saturate, and above small ones vanish"
        )


def _peak(job: Job, measured: InputAmax) -> float:
    """The largest amax of a job's members; 0 if nothing that counts was measured."""
    peak = 0.0
    for m in job.members:
        amax = measured.amax.get(m.module, 0.0)
        if not isfinite(amax) or amax < 0:
            raise RecipeError(
                f"{m.module}: its input was measured as {amax}; the model computes nothing with "
                "that. Mend the source, or keep this module out of the recipe"
            )
        if measured.tokens.get(m.module, 0) >= FEWEST_TOKENS:
            peak = max(peak, amax)
    return peak


def _layer(job: Job) -> tuple[str, ...]:
    """What is equal for one projection of all experts of a layer; of other jobs, themselves."""
    if not _is_expert(job):
        return (job.name,)
    return tuple(_without_number(m.module) for m in job.members)


def _is_expert(job: Job) -> bool:
    """A routed expert, of the trunk or of the MTP head, which has one role."""
    is_mine = job.role in ("routed_expert", "mtp")
    return is_mine and ".experts." in job.members[0].module


def _without_number(module: str) -> str:
    container, _, below = module.rpartition(".experts.")
    return f"{container}.experts.*.{below.partition('.')[2]}"


def _nothing_measured(job: Job, measured: InputAmax) -> RecipeError:
    seen: Sequence[int] = [measured.tokens.get(m.module, 0) for m in job.members]
    what = f"zeros alone on {max(seen):,} tokens" if max(seen) else "no token at all"
    of_layer = ", nor did any expert of its layer" if _is_expert(job) else ""
    return RecipeError(
        f"{job.members[0].module}: {job.scheme} needs the size of its inputs, and the measurement "
        f"saw {what}{of_layer}; a made-up scale would silently ruin answers. Measure on more or "
        "other text, or keep this module out of the recipe"
    )


def _divisor(scheme: Scheme) -> float:
    """The largest value that one unit of the scale reaches: 448 for FP8, 6 * 448 for NVFP4."""
    assert scheme.input is not None
    if scheme.input.element is E2M1:
        return E2M1.max * E4M3.max
    return scheme.input.element.max


def _scale(job: Job, amax: float) -> float:
    with np.errstate(over="ignore"):
        scale = np.float32(amax / _divisor(job.scheme))
    if not is_scale(float(scale)):
        raise RecipeError(
            f"{job.members[0].module}: inputs of up to {amax:.3g} (headroom included) need an "
            f"input_scale of {scale:.3g}, which a float32 cannot hold as a normal number; keep "
            "this module out of the recipe"
        )
    return float(scale)
