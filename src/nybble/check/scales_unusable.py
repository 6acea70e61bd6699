"""Rules about scales that no arithmetic survives: zero, negative, NaN, infinite, or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import TENSOR_SCALES, Module
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.scales_scan import Counted, F64Array, Scalars, expert_place, indices, scan_of
from nybble.check.survey import Survey

Mask = Callable[[F64Array], NDArray[np.bool_]]
#: Of a KV cache's scale, amax / 448: what no attention layer measures.
KV_LEAST, KV_MOST = 1e-6, 1e3


def needs_input_scale(module: Module) -> bool:
    """Whether a wrong input scale reaches the arithmetic; unknown where nothing is declared."""
    return module.declared is None or module.declared.needs_input_scale


def _scalars(survey: Survey, rule: Rule, word: str, is_bad: Mask) -> Iterator[Finding]:
    tops, inputs = scan_of(survey).tops, scan_of(survey).inputs
    yield from _finding(
        rule, "tensor scales of weights", word, tops, tops.where(is_bad(tops.stored))
    )
    bad = inputs.where(is_bad(inputs.stored))
    read = [i for i in bad if needs_input_scale(inputs.modules[i])]
    idle = [i for i in bad if not needs_input_scale(inputs.modules[i])]
    yield from _finding(rule, "input scales", word, inputs, read)
    yield from _finding(
        rule, "input scales that nothing declared reads", word, inputs, idle, Severity.WARNING
    )


def _finding(
    rule: Rule,
    what: str,
    word: str,
    column: Scalars,
    bad: list[int],
    severity: Severity | None = None,
) -> Iterator[Finding]:
    if bad:
        names = [column.infos[i].name for i in bad]
        yield rule.finding(
            f"{len(bad):,} of {int(column.is_read.sum()):,} {what} are {word}, the first "
            f"{names[0]} = {column.stored[bad[0]]:g}: expected finite numbers above 0",
            names,
            file=column.infos[bad[0]].file,
            severity=severity,
            count=len(bad),
            looked_at=int(column.is_read.sum()),
        )


def _vectors(survey: Survey, rule: Rule, word: str, count: str) -> Iterator[Finding]:
    """Scales of channels, FP8 blocks or INT4 groups, and of experts in one tensor."""
    for column, what in (
        (scan_of(survey).vectors, "channels or blocks"),
        (scan_of(survey).stacks, "stacked experts"),
    ):
        bad = indices(column.column(count) > 0)
        if not len(bad):
            continue
        number, of = (int(column.column(c)[bad[0]]) for c in (count, "size"))
        names = [column.infos[i].name for i in bad]
        yield rule.finding(
            f"{len(names):,} scale tensors of {what} ({column.looked}) hold values that "
            f"are {word}, the first {names[0]} with {number:,} in {of:,}: expected finite numbers "
            "above 0",
            names,
            file=column.infos[bad[0]].file,
            severity=_vector_severity(column, bad, count)
            if column is scan_of(survey).vectors
            else Severity.ERROR,
            count=len(names),
        )


def _vector_severity(vectors: Counted, bad: list[int], count: str) -> Severity:
    if count != "zero":
        return Severity.ERROR
    # A channel of zeros may have a scale of 0; a tensor of them has not.
    whole = vectors.column("zero")[bad] == vectors.column("size")[bad]
    return Severity.ERROR if whole.any() else Severity.NOTE


def _zero(survey: Survey) -> Iterator[Finding]:
    yield from _scalars(survey, ZERO_SCALE, "0", lambda v: v == 0)
    yield from _vectors(survey, ZERO_SCALE, "0", "zero")


def _negative(survey: Survey) -> Iterator[Finding]:
    yield from _scalars(survey, NEGATIVE_SCALE, "negative", lambda v: v < 0)
    yield from _vectors(survey, NEGATIVE_SCALE, "negative", "negative")


def _nan(survey: Survey) -> Iterator[Finding]:
    yield from _scalars(survey, NAN_SCALE, "NaN", np.isnan)
    yield from _vectors(survey, NAN_SCALE, "NaN", "nan")


def _infinite(survey: Survey) -> Iterator[Finding]:
    yield from _scalars(survey, INFINITE_SCALE, "infinite", np.isinf)
    yield from _vectors(survey, INFINITE_SCALE, "infinite", "inf")


# --------------------------------------------------------------------------------- absent scales


def _missing_inputs(survey: Survey) -> Iterator[Finding]:
    needing = [m for m in scan_of(survey).quantized if m.declared and m.declared.needs_input_scale]
    lacking = [m for m in needing if not m.kind.has_input_scale]
    # If all of them lack it, the declaration is at odds with the file: another rule says so.
    if lacking and len(lacking) < len(needing):
        yield _missing(survey, lacking, f"{len(needing):,} modules that are declared to need one")
    idle = [m for m in scan_of(survey).quantized if m.declared and not m.declared.needs_input_scale]
    some = [m for m in idle if m.kind.has_input_scale]
    if some and len(some) < len(idle):
        places = {expert_place(m.name) for m in some if ".experts." in m.name}
        uneven = [m for m in idle if not m.kind.has_input_scale and expert_place(m.name) in places]
        if uneven:
            words = "the experts beside others that have one (nothing declared reads them)"
            yield _missing(survey, uneven, words, Severity.NOTE)


def _missing(
    survey: Survey, lacking: list[Module], of: str, severity: Severity | None = None
) -> Finding:
    layers: dict[str, list[int]] = {}
    for m in lacking:
        container, rest = expert_place(m.name)
        if rest:
            number = m.name[len(container) + len(".experts.") :].partition(".")[0]
            if number.isdecimal():
                layers.setdefault(f"{container}.experts.#.{rest}", []).append(int(number))
    experts = {
        (place.partition(".experts.#")[0], e) for place, all_ in layers.items() for e in all_
    }
    among = f", in {len(experts):,} experts of {len({c for c, _ in experts}):,} layers"
    return MISSING_INPUT.finding(
        f"{len(lacking):,} of {of} have no input scale{among if experts else ''}, the first "
        f"{lacking[0].name}: expected a positive input_scale or input_global_scale in each",
        [m.name for m in lacking],
        file=lacking[0].tensors[0].file,
        severity=severity,
        count=len(lacking),
        experts=layers,
    )


def _no_tensor_scale(survey: Survey) -> Iterator[Finding]:
    lacks: dict[int, bool] = {}  # by kind: its modules have the same tensors
    for m in scan_of(survey).quantized:
        if id(m.kind) not in lacks:
            lacks[id(m.kind)] = (
                m.kind.held.startswith("nvfp4")
                and m.tensor("weight_scale") is not None
                and m.tensor(*TENSOR_SCALES) is None
            )
    bad = [m for m in scan_of(survey).quantized if lacks[id(m.kind)]]
    if bad:
        yield NO_TENSOR_SCALE.finding(
            f"{len(bad):,} NVFP4 modules have codes and block scales but no tensor scale, the "
            f"first {bad[0].name}: expected weight_scale_2 or weight_global_scale",
            [m.name for m in bad],
            file=bad[0].tensors[0].file,
            count=len(bad),
        )


# ------------------------------------------------------------------------------------ the KV cache


def _kv(survey: Survey) -> Iterator[Finding]:
    infos = survey.contents.kv_scales
    dead, odd = [], []
    for info, stored in zip(infos, survey.values(infos), strict=True):
        if stored is None or not stored.size or info.dtype not in ("F32", "BF16", "F16"):
            continue
        values = stored.astype(np.float64)
        if not (np.isfinite(values).all() and (values > 0).all()):
            dead.append((info, float(values.reshape(-1)[np.argmin(values > 0)])))
        elif values.min() < KV_LEAST or values.max() > KV_MOST:
            odd.append((info, float(values.max() if values.max() > KV_MOST else values.min())))
    for bad, words, severity in (
        (dead, "are zero, negative, NaN or infinite", Severity.ERROR),
        (odd, f"are below {KV_LEAST:g} or above {KV_MOST:g}", Severity.WARNING),
    ):
        if bad:
            yield KV_SCALE.finding(
                f"{len(bad)} of {len(infos)} scales of the KV cache {words}, the first "
                f"{bad[0][0].name} = {bad[0][1]:g}: expected the largest key or value over 448",
                [info.name for info, _ in bad],
                file=bad[0][0].file,
                severity=severity,
                count=len(bad),
            )


_VALUES = frozenset({"values"})
_EXPERTS = "https://github.com/vllm-project/vllm/issues/45212"
_TRACING = "https://github.com/vllm-project/compressed-tensors/issues/832"
_INF = "https://github.com/vllm-project/compressed-tensors/pull/595"

ZERO_SCALE = Rule(
    "NB201",
    "zero-scale",
    Severity.ERROR,
    "A tensor scale or input scale is zero",
    "A weight whose tensor scale is 0 is lost: it decodes to zeros, and an engine that stores "
    "the reciprocal computes with infinity. An input scale of 0 divides by zero in every prompt "
    "that reaches the module; of a rarely chosen expert that is one prompt in thousands, so "
    "short tests pass and later answers turn to NaN or padding tokens. Zeros come from experts "
    "that calibration never reached, and from files that were not downloaded whole. The error is "
    "a warning for input scales that nothing declared reads, and a note where single channels "
    "have scale 0.",
    "Fill input scales with `nybble repair`; download again or requantize where weights' scales "
    "are 0.",
    _zero,
    (_EXPERTS, "https://github.com/flashinfer-ai/flashinfer/issues/3592"),
    is_repairable=True,
    needs=_VALUES,
)
NEGATIVE_SCALE = Rule(
    "NB202",
    "negative-scale",
    Severity.ERROR,
    "A tensor scale or input scale is negative",
    "Scales are magnitudes: every quantizer divides the largest absolute value by the largest "
    "code. A negative one flips the sign of a whole tensor in some kernels, is clipped to "
    "nothing by others, and shows that the bytes are not what the name says.",
    "Find what wrote it; `nybble repair` replaces negative input scales by those of the layer.",
    _negative,
    is_repairable=True,
    needs=_VALUES,
)
NAN_SCALE = Rule(
    "NB203",
    "nan-scale",
    Severity.ERROR,
    "A tensor scale or input scale is NaN",
    "One NaN scale makes every output of its module NaN, and all that follows. It comes from a "
    "calibration whose tracing failed half-way, or from 0/0 on data that never reached the module.",
    "Calibrate again; `nybble repair` replaces NaN input scales by those of the layer.",
    _nan,
    (_TRACING,),
    is_repairable=True,
    needs=_VALUES,
)
INFINITE_SCALE = Rule(
    "NB204",
    "infinite-scale",
    Severity.ERROR,
    "A tensor scale or input scale is infinite",
    "compressed-tensors stores 2688 / amax, and an expert whose inputs were all zero in "
    "calibration gets infinity: 14 of 92,400 in one published checkpoint, one of which was "
    "enough to crash inference. As a factor, infinity times a zero is NaN.",
    "Calibrate with data that reaches every expert; `nybble repair` replaces infinite input scales "
    "by those of the layer.",
    _infinite,
    (_INF, _TRACING),
    is_repairable=True,
    needs=_VALUES,
)
MISSING_INPUT = Rule(
    "NB209",
    "input-scale-missing",
    Severity.ERROR,
    "Input scales are missing for some modules",
    "A module that is to run with quantized activations needs a measured input scale. Where some "
    "experts have none, because no calibration token reached them, engines leave the slot as it "
    "was: zero or garbage, without a word, because missing tensors of quantized models are not "
    "reported. Prompts that route to those experts get NaN; all others look fine. Only a note "
    "where the modules are declared weight-only.",
    "`nybble repair` gives them the largest input scale of their layer, with head-room.",
    _missing_inputs,
    (_EXPERTS,),
    is_repairable=True,
)
NO_TENSOR_SCALE = Rule(
    "NB213",
    "tensor-scale-missing",
    Severity.ERROR,
    "NVFP4 without a tensor scale",
    "NVFP4 has two levels of scales. With block scales alone they must hold the weights' own "
    "magnitude, for which E4M3 is too coarse and too narrow: small blocks vanish. Engines that "
    "expect the second level refuse the file or take 1. One such model fell into endless thinking "
    "loops.",
    "Requantize with two levels.",
    _no_tensor_scale,
    ("https://github.com/ollama/ollama/issues/15880",),
)
KV_SCALE = Rule(
    "NB216",
    "kv-scale-nonsense",
    Severity.ERROR,
    "A scale of the KV cache cannot be right",
    "An FP8 KV cache stores keys and values divided by k_scale and v_scale. Zero, NaN or infinity "
    "destroy attention in that layer; a scale orders of magnitude off clips every key, or rounds "
    "all of them to zero (warning).",
    "Calibrate the KV cache again, or drop the tensors: engines then use 1.",
    _kv,
    threads=(
        "https://github.com/vllm-project/llm-compressor/issues/1928",
        "https://github.com/sgl-project/sglang/pull/40243",
    ),
    needs=_VALUES,
)

RULES = (
    ZERO_SCALE,
    NEGATIVE_SCALE,
    NAN_SCALE,
    INFINITE_SCALE,
    MISSING_INPUT,
    NO_TENSOR_SCALE,
    KV_SCALE,
)
