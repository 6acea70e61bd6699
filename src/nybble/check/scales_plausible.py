"""Rules about scales that are numbers, and cannot be the right ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import frexp, isfinite

import ml_dtypes
import numpy as np

from nybble.check.contents import Module
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.scales_scan import Scalars, expert_place, indices, peers, scan_of
from nybble.check.scales_unusable import needs_input_scale
from nybble.check.survey import Survey
from nybble.families.family import normalise

#: Root mean square of a module's weights. Trained ones have 1e-3 to 1.
RMS_LEAST, RMS_MOST = 1e-7, 100.0
#: A factor of FP8 weights beyond which the largest would be over 10,000.
FP8_MOST = 22.0
#: The input scale of W4A4 is amax / 2688: half of the modules above 4 would see inputs over 10,000.
INPUT_MOST = 4.0
#: Decades from the median of its peers, and peers that make a median.
DECADES, FEWEST_PEERS = 3.0, 3
#: From the median of the other experts of its layer.
INPUT_RATIO = 100.0
#: Places with one input scale, and fused groups with one tensor scale, that are no chance.
FEWEST_EQUAL = 6
FEWEST_BLOCKS = 128
#: Codes of FP8 reach 448 under a measured scale, and more than half of it under the power of two
#: below. Samples are spared some: under a default such as 1.0 weights have codes of 4 at most.
CODES_REACH = 112.0


# --------------------------------------------------------------------------------------- magnitudes


def _implausible(survey: Survey) -> Iterator[Finding]:
    rms = scan_of(survey).magnitudes
    reversed_ = set(_reciprocal_modules(survey, rms))
    chosen = [m for m in scan_of(survey).chosen if m.name not in reversed_]
    modules = [m for m in chosen if 0 < rms.get(m.name, 0) < np.inf]
    size = np.log10([rms[m.name] for m in modules])
    odd: dict[int, float] = {i: 0.0 for i in range(len(modules)) if rms[modules[i].name] > RMS_MOST}
    for members in peers(modules).values():
        if len(members) <= FEWEST_PEERS:
            continue
        middle = float(np.median(size[members]))
        for i in members[np.abs(size[members] - middle) > DECADES]:
            odd[int(i)] = 10**middle
    if odd:
        first = min(odd)
        beside = f" beside {odd[first]:.3g} of its peers" if odd[first] else ""
        yield IMPLAUSIBLE.finding(
            f"the weights of {len(odd):,} modules ({len(modules):,} sampled) have an implausible "
            f"size, the first {modules[first].name} with a root mean square of "
            f"{rms[modules[first].name]:.3g}{beside}: expected 1e-3 to 1, and peers within a "
            "factor of 1000",
            [modules[i].name for i in sorted(odd)],
            file=modules[first].tensors[0].file,
            count=len(odd),
        )


# -------------------------------------------------------------------------------------- reciprocals


def _reciprocal_modules(survey: Survey, rms: dict[str, float]) -> list[str]:
    """Modules whose weights have a plausible size only with the reciprocal of their scale."""
    tops = scan_of(survey).tops
    values = tops.multiplier
    with np.errstate(invalid="ignore"):
        candidates = tops.where(np.isfinite(values) & (values >= 0.5))
    sure = [i for i in candidates if _is_reciprocal(tops.modules[i], float(values[i]), rms)]
    # Of peers that were not sampled, those that are of the same size.
    known = {m.name for m in scan_of(survey).chosen}
    like = {_peer(tops.modules[i]): float(values[i]) for i in sure}
    rest = [
        i
        for i in candidates
        if tops.modules[i].name not in known
        and like.get(_peer(tops.modules[i]), np.inf) / 1000 < values[i]
        and values[i] > 2
    ]
    return [tops.modules[i].name for i in sorted({*sure, *rest})]


def _peer(module: Module) -> tuple[str, str, str]:
    return module.role, module.name.rpartition(".")[2], module.kind.held


def _is_reciprocal(module: Module, value: float, rms: dict[str, float]) -> bool:
    found = rms.get(module.name)
    if found is None:
        return module.kind.held.startswith("fp8") and FP8_MOST < value < 1e9
    return found > RMS_MOST and RMS_LEAST < found / value**2 < RMS_MOST


def _reciprocal(survey: Survey) -> Iterator[Finding]:
    tops, rms = scan_of(survey).tops, scan_of(survey).magnitudes
    bad = [tops.by_module[name] for name in _reciprocal_modules(survey, rms)]
    if bad:
        first = tops.modules[bad[0]].name
        size = (
            f"; its weights would have a root mean square of {rms[first]:.3g}"
            if first in rms
            else ""
        )
        yield RECIPROCAL.finding(
            f"{len(bad):,} of {len(tops.modules):,} tensor scales are the reciprocal of what their "
            f"name says, the first {tops.infos[bad[0]].name} = {tops.stored[bad[0]]:g}{size}: "
            f"expected about {1 / tops.stored[bad[0]]:.3g}",
            [tops.infos[i].name for i in bad],
            file=tops.infos[bad[0]].file,
            count=len(bad),
        )
    yield from _reciprocal_inputs(scan_of(survey).inputs)


def _reciprocal_inputs(inputs: Scalars) -> Iterator[Finding]:
    values = inputs.multiplier
    usable = [
        i
        for i in inputs.where(np.isfinite(values) & (values > 0))
        if inputs.modules[i].kind.held.startswith("nvfp4")
    ]
    if not usable or float(np.median(values[usable])) <= INPUT_MOST:
        return
    needed = any(needs_input_scale(inputs.modules[i]) for i in usable)
    yield RECIPROCAL.finding(
        f"the {len(usable):,} input scales of NVFP4 modules have a median of "
        f"{np.median(values[usable]):.3g} as a factor, the first {inputs.infos[usable[0]].name} = "
        f"{inputs.stored[usable[0]]:g}: expected amax / 2688, about 0.001 to 1 (its reciprocal as "
        "input_global_scale)",
        [inputs.infos[i].name for i in usable],
        file=inputs.infos[usable[0]].file,
        severity=None if needed else Severity.WARNING,
        count=len(usable),
    )


# ----------------------------------------------------------------------------------------- defaults


def _defaults(survey: Survey) -> Iterator[Finding]:
    yield from _equal_blocks(survey)
    yield from _equal_tensor_scales(scan_of(survey).tops)
    yield from _equal_inputs(scan_of(survey).inputs)


def _equal_blocks(survey: Survey) -> Iterator[Finding]:
    scan = scan_of(survey)
    dead = scan.zero_codes | _reaching(survey)
    for column, what in ((scan.blocks, "block scales"), (scan.vectors, "channel or block scales")):
        least, largest, size = (column.column(c) for c in ("least", "largest", "size"))
        same = (least == largest) & (largest > 0) & (size >= FEWEST_BLOCKS)
        same &= (column.column("nan") == 0) & (column.column("negative") == 0)
        bad = [int(i) for i in indices(same) if column.modules[i].name not in dead]
        if bad:
            info = column.infos[bad[0]]
            is_byte = info.dtype in ("F8_E4M3", "F8_E8M0", "U8")
            value = f" (byte 0x{int(largest[bad[0]]):02X})" if is_byte else ""
            yield DEFAULT.finding(
                f"all {what} of {len(bad):,} tensors ({column.looked}) are the same "
                f"number, the first {info.name}: one value{value} {int(size[bad[0]]):,} times, "
                "expected as many as its blocks differ in size",
                [column.infos[i].name for i in bad],
                file=info.file,
                count=len(bad),
            )


def _reaching(survey: Survey) -> frozenset[str]:
    """The FP8 modules whose codes make use of their range: whatever scale they have fits them.

    Rows of one size under a power of two have one scale, and that is no default.
    """
    codes = scan_of(survey).codes
    least = np.array(CODES_REACH, dtype=ml_dtypes.float8_e4m3fn).view(np.uint8)
    return frozenset(
        module.name
        for module, info, largest in zip(
            codes.modules, codes.infos, codes.column("largest"), strict=True
        )
        if info.dtype == "F8_E4M3" and largest >= int(least)
    )


def _equal_tensor_scales(tops: Scalars) -> Iterator[Finding]:
    for members in tops.peers.values():
        values = tops.stored[members]
        if not tops.is_read[members].all() or not _is_one_value(values):
            continue
        value = float(values[0])
        # Powers of two are chosen on purpose: one of them fits many weights.
        if frexp(value)[0] == 0.5:
            continue
        groups = {tops.modules[i].name.rpartition(".")[0] for i in members}
        if len(groups) >= FEWEST_EQUAL:
            yield _equal(tops, members.tolist(), "tensor scales", Severity.WARNING)


def _equal_inputs(inputs: Scalars) -> Iterator[Finding]:
    """One input scale everywhere. All experts of one layer may share one: they see the same."""
    everything = list(range(len(inputs.modules)))
    read = inputs.where(np.ones(len(everything), dtype=bool))
    if _is_one_value(inputs.stored[read]) and _is_everywhere(inputs, read, FEWEST_EQUAL):
        yield _equal(inputs, read, "input scales", None)
        return
    for members in inputs.peers.values():
        at = members[inputs.is_read[members]].tolist()
        if _is_one_value(inputs.stored[at]) and _layers(inputs, at) >= FEWEST_EQUAL:
            yield _equal(inputs, at, "input scales", None)


def _is_one_value(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> bool:
    return len(values) > 1 and isfinite(values[0]) and values[0] > 0 and len(set(values)) == 1


def _layers(column: Scalars, members: list[int]) -> int:
    """In how many containers of one pattern these modules are: layers, if the pattern has any."""
    return len({expert_place(column.modules[i].name) for i in members})


def _is_everywhere(column: Scalars, members: list[int], places: int) -> bool:
    found = {expert_place(column.modules[i].name) for i in members}
    if len(found) < places:
        return False
    patterns = {normalise(place) + rest for place, rest in found}
    return len(patterns) < len(found)  # more than one layer


def _equal(column: Scalars, members: list[int], what: str, severity: Severity | None) -> Finding:
    idle = all(not needs_input_scale(column.modules[i]) for i in members)
    if what == "input scales" and idle:
        severity = Severity.NOTE
    first = column.infos[members[0]]
    return DEFAULT.finding(
        f"{len(members):,} {what} in {_layers(column, members):,} places are all "
        f"{column.stored[members[0]]:g}, the first {first.name}: expected other values in other "
        "layers; a default was stored, not a measurement",
        [column.infos[i].name for i in members],
        file=first.file,
        severity=severity,
        count=len(members),
        value=float(column.stored[members[0]]),
    )


# --------------------------------------------------------------------------------- outlying experts


def _outlying(survey: Survey) -> Iterator[Finding]:
    inputs = scan_of(survey).inputs
    values = inputs.multiplier
    groups: dict[tuple[str, str], list[int]] = {}
    for i in inputs.where(np.isfinite(values) & (values > 0)):
        name = inputs.modules[i].name
        if ".experts." in name:
            groups.setdefault(expert_place(name), []).append(i)
    wide: dict[str, list[int]] = {}
    for (_, rest), members in groups.items():
        wide.setdefault(rest, []).extend(members)
    low, high = [], []
    for (_, rest), members in groups.items():
        against = members if len(members) > FEWEST_PEERS else wide[rest]
        some = values[members]
        # Equal within the layer is the usual case: nothing to look for.
        if len(against) <= FEWEST_PEERS or (against is members and some.max() / some.min() < 10):
            continue
        middle = float(np.median(values[against]))
        low += [(i, middle) for i in members if values[i] * INPUT_RATIO < middle]
        high += [(i, middle) for i in members if values[i] > middle * INPUT_RATIO]
    for bad, word, severity in (
        (low, "below", Severity.WARNING),
        (high, "above", Severity.NOTE),
    ):
        if bad:
            i, middle = bad[0]
            idle = all(not needs_input_scale(inputs.modules[j]) for j, _ in bad)
            yield OUTLYING.finding(
                f"the input scales of {len(bad):,} experts' projections are more than "
                f"{INPUT_RATIO:g} times {word} the median of their layer, the first "
                f"{inputs.infos[i].name}, {values[i]:.3g} as a factor beside {middle:.3g}: "
                "expected the same order of magnitude",
                [inputs.infos[j].name for j, _ in bad],
                file=inputs.infos[i].file,
                severity=Severity.NOTE if idle else severity,
                count=len(bad),
            )


_VALUES = frozenset({"values"})
_RECIPROCAL_THREADS = (
    "https://github.com/modular/modular/issues/6600",
    "https://github.com/JustVugg/colibri/issues/83",
)

DEFAULT = Rule(
    "NB208",
    "default-scales",
    Severity.WARNING,
    "Scales are all the same where measured ones differ",
    "Block scales follow the weights and input scales the layers. One number for all blocks of a "
    "tensor, for all tensors of a kind, or for the inputs of all layers is a default that was "
    "never replaced: a calibration that did not run, or skipped modules under a new class name. "
    "The experts of one layer may share an input scale (ModelOpt writes it so), and tensor "
    "scales that are powers of two may repeat.",
    "Look at the log of the calibration; calibrate again with data that reaches all modules.",
    _defaults,
    (
        "https://github.com/vllm-project/llm-compressor/pull/2547",
        "https://github.com/vllm-project/compressed-tensors/issues/832",
    ),
    needs=_VALUES,
)
RECIPROCAL = Rule(
    "NB212",
    "reciprocal-scale",
    Severity.ERROR,
    "Scales are stored as their reciprocals",
    "ModelOpt stores factors (weight_scale_2, input_scale), compressed-tensors divisors "
    "(weight_global_scale, input_global_scale). A converter that renames without inverting is "
    "wrong by the square of the scale, ten million times and more: logits are noise or overflow. "
    "Found by the size of the decoded weights, so that unusual but right scales do not count.",
    "`nybble repair` inverts the scalars named.",
    _reciprocal,
    _RECIPROCAL_THREADS,
    is_repairable=True,
    needs=_VALUES,
)
IMPLAUSIBLE = Rule(
    "NB218",
    "implausible-magnitude",
    Severity.WARNING,
    "Decoded weights have an implausible size",
    "Weights of one kind have about the same size in all layers, within a factor of ten or so. A "
    "module a thousand times off, or of a root mean square above 100, was scaled by a wrong "
    "number: another tensor's scale, one in other units, or one left at 1. It drowns its layer, "
    "or is silent in it.",
    "Compare with the source; requantize the modules named.",
    _implausible,
    needs=_VALUES,
)
OUTLYING = Rule(
    "NB219",
    "outlying-input-scale",
    Severity.WARNING,
    "An expert's input scale is far from those of its layer",
    "The experts of a layer see tokens of one hidden state. One whose input scale is a hundred "
    "times below the median saw a token or two in calibration, and saturates on all others. "
    "Above the median it is only a note: a few experts do have massive activations.",
    "Calibrate with more and more varied data, or take the layer's largest scale for these.",
    _outlying,
    ("https://github.com/vllm-project/vllm/pull/26135",),
    needs=_VALUES,
)

RULES = (DEFAULT, RECIPROCAL, IMPLAUSIBLE, OUTLYING)
