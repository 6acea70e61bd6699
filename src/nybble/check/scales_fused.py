"""Rules about modules that engines run as one matmul: q/k/v, gate/up, in_proj_qkv/in_proj_z."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.check.rule import Finding, Rule, Severity
from nybble.check.scales_scan import Scalars, scan_of
from nybble.check.scales_unusable import needs_input_scale
from nybble.check.survey import Survey
from nybble.families.family import normalise

#: Upper ends of the histogram's classes of ratios.
RATIOS = (1.01, 1.1, 1.5, 2.0, 4.0, 10.0)
#: Below this the rounding of a scale to BF16 explains the difference.
SLIGHT = 1.01


@dataclass(frozen=True, slots=True)
class Unequal:
    """A fused group whose members have different scales: indices, and largest over smallest."""

    members: tuple[int, ...]
    ratio: float


def unequal_groups(
    survey: Survey, column: Scalars, is_meant: NDArray[np.bool_]
) -> tuple[list[Unequal], int]:
    """The fused groups among these modules whose scales differ, worst first, and how many groups
    there are. Members with unusable scales are left out: other rules report them."""
    group, values = scan_of(survey).fused[column.places], column.multiplier
    at = column.where(is_meant & (group >= 0) & np.isfinite(values) & (values > 0))
    if not at:
        return [], 0
    order = np.array(at, dtype=np.int64)
    order = order[np.argsort(group[order], kind="stable")]
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    ends = [*starts[1:].tolist(), len(order)]
    least = np.minimum.reduceat(values[order], starts)
    most = np.maximum.reduceat(values[order], starts)
    found = [
        Unequal(tuple(order[starts[i] : ends[i]].tolist()), float(most[i] / least[i]))
        for i in np.flatnonzero(most > least).tolist()
    ]
    count = int((np.diff([*starts, len(order)]) > 1).sum())
    return sorted(found, key=lambda u: -u.ratio), count


def histogram(ratios: Sequence[float]) -> dict[str, int]:
    """How many ratios are below each of RATIOS and not below the one before."""
    out, rest = {}, list(ratios)
    for end in RATIOS:
        out[f"<{end:g}"] = sum(r < end for r in rest)
        rest = [r for r in rest if r >= end]
    out[f">={RATIOS[-1]:g}"] = len(rest)
    return {words: number for words, number in out.items() if number}


def _tensor_scales(survey: Survey) -> Iterator[Finding]:
    tops = scan_of(survey).tops
    # FP8 is requantized to the largest by every engine; one scale per member is no fault there.
    four = np.array([m.kind.held.startswith("nvfp4") for m in tops.modules], dtype=bool)
    unequal, count = unequal_groups(survey, tops, four)
    if unequal:
        graver = unequal[0].ratio >= SLIGHT
        severity = Severity.ERROR if graver else Severity.WARNING
        yield _finding(UNEQUAL_SCALES, "tensor scales", tops, unequal, count, severity)


def _input_scales(survey: Survey) -> Iterator[Finding]:
    inputs = scan_of(survey).inputs
    unequal, count = unequal_groups(survey, inputs, inputs.is_read)
    if unequal:
        is_read = any(needs_input_scale(inputs.modules[i]) for u in unequal for i in u.members)
        severity = Severity.WARNING if is_read else Severity.NOTE
        yield _finding(UNEQUAL_INPUTS, "input scales", inputs, unequal, count, severity)


def _finding(
    rule: Rule, what: str, column: Scalars, unequal: list[Unequal], count: int, severity: Severity
) -> Finding:
    worst = unequal[0]
    shown = ", ".join(
        f"{column.infos[i].name} = {column.stored[i]:g}"
        for i in sorted(worst.members, key=lambda i: column.multiplier[i])[
            :: len(worst.members) - 1
        ]
    )
    ratios = [u.ratio for u in unequal]
    classes = histogram(ratios)
    spelled = ", ".join(f"{number:,} {words}" for words, number in classes.items())
    kinds: dict[str, int] = {}
    for u in unequal:
        name = normalise(column.modules[u.members[0]].name).rpartition(".")[0]
        kinds[name] = kinds.get(name, 0) + 1
    return rule.finding(
        f"{len(unequal):,} of {count:,} fused groups have members with different {what}, by up to "
        f"{worst.ratio:.4g} times (ratios: {spelled}), the worst {shown}: expected one value for "
        "all members",
        [column.modules[i].name for u in unequal for i in u.members],
        file=column.infos[worst.members[0]].file,
        severity=severity,
        groups=len(unequal),
        of=count,
        max_ratio=worst.ratio,
        histogram=classes,
        places=kinds,
    )


UNEQUAL_SCALES = Rule(
    "NB210",
    "fused-scales-unequal",
    Severity.ERROR,
    "Fused projections have different tensor scales",
    "Engines run q/k/v, gate/up and in_proj_qkv/in_proj_z as one matmul with one tensor scale. "
    "They take the largest or the first of those stored, warn at best, and decode the other "
    "members too large or too small by the ratio. 69 % of the gate/up pairs of one public "
    "checkpoint differ, by up to ten times; ten times is enough for answers that repeat one "
    "token. Differences below 1 %, as BF16 arithmetic on scales leaves them, are a warning. FP8 "
    "projections may differ: engines requantize those to the largest scale.",
    "`nybble repair` gives a group its largest tensor scale and moves the ratio into the block "
    "scales; codes stay as they are.",
    _tensor_scales,
    (
        "https://github.com/vllm-project/vllm/issues/54974",
        "https://github.com/vllm-project/vllm/issues/47515",
        "https://github.com/NVIDIA/TensorRT-LLM/issues/14199",
        "https://github.com/vllm-project/llm-compressor/issues/1869",
        "https://github.com/NVIDIA/Model-Optimizer/pull/1411",
    ),
    is_repairable=True,
    needs=frozenset({"values"}),
)
UNEQUAL_INPUTS = Rule(
    "NB211",
    "fused-inputs-unequal",
    Severity.WARNING,
    "Fused projections have different input scales",
    "Members of a fused matmul see the same input, so a measured scale is the same for all. "
    "Engines take the largest, which costs the others little; but the difference shows that they "
    "were not measured together. A note where nothing declared reads the scales.",
    "`nybble repair` gives a group its largest input scale.",
    _input_scales,
    is_repairable=True,
    needs=frozenset({"values"}),
)

RULES = (UNEQUAL_SCALES, UNEQUAL_INPUTS)
