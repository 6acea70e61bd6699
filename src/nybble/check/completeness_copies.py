"""Whether what was copied is still the source's: dtypes and values of unquantized tensors (NB113).

Quantized weights are not compared: their error is for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.check.completeness_inventory import leaf_of
from nybble.check.completeness_source import STACKS, head_of_tied, spellings
from nybble.check.contents import SIDE
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.check.wording import first_of, plural
from nybble.checkpoint.safetensors import DTYPES, WIDTHS, TensorInfo

SAMPLE_BYTES = 2048
#: Tensors up to this size are compared as numbers where bytes cannot be.
SMALL_BYTES = 1 << 20
PLAIN = ("BF16", "F16", "F32", "F64")

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor here, and in the source the tensor or slice of a stack that it is a copy of."""

    name: str
    here: TensorInfo
    there: TensorInfo


def _copies(survey: Survey) -> Iterator[Finding]:
    source = survey.source
    if source is None or not source.has_data:
        return
    pairs = list(_pairs(survey, source))
    changed = [p for p in pairs if p.here.shape != p.there.shape]
    fitting = [p for p in pairs if p.here.shape == p.there.shape]
    recast = [p for p in fitting if p.here.dtype != p.there.dtype]
    wrong = _where_numbers(survey, source, recast, lambda *args: not _is_cast(*args))
    different = _different_bytes(survey, source, [p for p in fitting if p not in recast])
    shifted = _where_numbers(survey, source, [p for p in different if _is_norm(p)], _is_shifted)
    others = [p for p in different if p not in shifted]
    is_smoothed = _is_smoothed(survey, pairs, others)
    smoothed = [p for p in others if _is_norm(p) and is_smoothed]
    excused = {p.name for p in (*shifted, *smoothed)}
    changed += [*wrong, *(p for p in different if p.name not in excused)]
    how = "" if survey.deep else " (samples were compared, --deep compares all)"
    yield from _finding(
        changed, f"with other values than in the source{how}", Severity.ERROR, "values", len(pairs)
    )
    yield from _finding(
        shifted,
        "rounded as 1 + weight, which tools that calibrate around one and return leave behind",
        Severity.WARNING,
        "shifted",
        len(pairs),
    )
    yield from _finding(
        smoothed, "changed as smoothing leaves them", Severity.WARNING, "smoothed", len(pairs)
    )
    yield from _finding(
        [p for p in recast if p not in wrong],
        "of another dtype than in the source, with the values that it can hold",
        Severity.WARNING,
        "dtype",
        len(pairs),
    )


def _finding(
    pairs: list[_Pair], words: str, severity: Severity, kind: str, copies: int
) -> Iterator[Finding]:
    """`kind` and `copies`, all that were compared, are for `repair`."""
    if not pairs:
        return
    one, names = pairs[0], [p.name for p in pairs]
    against = ""
    if (one.here.dtype, one.here.shape) != (one.there.dtype, one.there.shape):
        against = (
            f": expected {one.there.dtype} {list(one.there.shape)}, "
            f"found {one.here.dtype} {list(one.here.shape)}"
        )
    yield COPY_DIFFERS.finding(
        f"{plural(len(names), 'unquantized tensor')} {words}, {first_of(names, len(names))}"
        f"{against}",
        names,
        file=one.here.file,
        severity=severity,
        tensors=names,
        kind=kind,
        copies=copies,
    )


def _is_norm(pair: _Pair) -> bool:
    return "norm" in pair.name


def _is_smoothed(survey: Survey, pairs: list[_Pair], different: list[_Pair]) -> bool:
    """Whether a method that moves scales between layers was at work: it leaves its scales behind,
    or folds them into norms, all through the model and into nothing else."""
    if any(m.tensor("pre_quant_scale") is not None for m in survey.quantized):
        return True
    norms = sum(_is_norm(p) for p in pairs)
    return len(different) >= max(2, norms / 4) and all(_is_norm(p) for p in different)


# ------------------------------------------------------------------------------------------ pairs


def _pairs(survey: Survey, source: Survey) -> Iterator[_Pair]:
    """Every unquantized tensor here with its like in the source."""
    for module in survey.modules:
        if module.kind.is_quantized:
            continue
        for here in module.tensors:
            if leaf_of(module, here.name) in SIDE:
                continue
            there = find_in_source(survey, source, here.name)
            if there is not None:
                yield _Pair(here.name, here, there)


def find_in_source(survey: Survey, source: Survey, name: str) -> TensorInfo | None:
    """The plain tensor of the source that this one was made of, or its part of a stack."""
    for spelled in spellings(survey.family, name):
        found = source.tensors.get(spelled) or _slice(source, spelled)
        if found is not None:
            return found if found.dtype in PLAIN else None
    tied = source.tensors.get(head_of_tied(source, name))
    return tied if tied is not None and tied.dtype in PLAIN else None


def _slice(source: Survey, name: str) -> TensorInfo | None:
    """Expert e's projection as it lies in a stack of the source."""
    parts = name.rsplit(".", 3)
    if len(parts) != 4 or parts[3] != "weight" or not parts[1].isdecimal():
        return None
    stack = next((s for s, projections in STACKS.items() if parts[2] in projections), "")
    info = source.tensors.get(f"{parts[0]}.{stack}") if stack else None
    if info is None or len(info.shape) != 3 or int(parts[1]) >= info.shape[0]:
        return None
    rows = info.shape[1] // len(STACKS[stack])
    first = int(parts[1]) * info.shape[1] + STACKS[stack].index(parts[2]) * rows
    at = info.offset + first * info.shape[2] * WIDTHS[info.dtype]
    return info._replace(shape=(rows, info.shape[2]), offset=at)


# ----------------------------------------------------------------------------------------- values


def _different_bytes(survey: Survey, source: Survey, pairs: list[_Pair]) -> list[_Pair]:
    """Pairs of one dtype and shape whose bytes differ where they were looked at."""
    found = []
    if survey.deep:
        for pair in pairs:
            mine, other = survey.values([pair.here])[0], source.values([pair.there])[0]
            if mine is not None and other is not None and mine.tobytes() != other.tobytes():
                found.append(pair)
        return found
    mine_all = survey.samples([p.here for p in pairs], SAMPLE_BYTES)
    other_all = source.samples([p.there for p in pairs], SAMPLE_BYTES)
    for pair, a, b in zip(pairs, mine_all, other_all, strict=True):
        if len(a) and len(b) and a.tobytes() != b.tobytes():
            found.append(pair)
    return found


def _where_numbers(
    survey: Survey, source: Survey, pairs: list[_Pair], test: Callable[[Array, Array, str], bool]
) -> list[_Pair]:
    """The pairs that pass a test of numbers here, numbers there and the dtype here."""
    if not survey.deep:  # those that change dtype are small, or too many to read
        pairs = [p for p in pairs if p.there.nbytes <= SMALL_BYTES]
    mine = survey.values([p.here for p in pairs])
    others = source.values([p.there for p in pairs])
    return [
        pair
        for pair, x, y in zip(pairs, mine, others, strict=True)
        if x is not None and y is not None and test(x, y, pair.here.dtype)
    ]


def _is_cast(mine: Array, other: Array, dtype: str) -> bool:
    """Whether `mine` is `other` in this dtype, up to the last bit."""
    if dtype not in PLAIN:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        cast = other.astype(np.float32).astype(DTYPES[dtype]).astype(np.float32)
    ulp = 2.0**-7 if dtype == "BF16" else 2.0**-10
    return bool(np.allclose(mine.astype(np.float32), cast, rtol=ulp, atol=0, equal_nan=True))


def _is_shifted(mine: Array, other: Array, dtype: str) -> bool:
    """Whether `mine` is what one more and one less leave of `other` in its own dtype."""
    kind = DTYPES[dtype]
    around_one = (other.astype(np.float32) + np.float32(1)).astype(kind).astype(np.float32)
    back = (around_one - np.float32(1)).astype(kind).astype(np.float32)
    return bool(np.array_equal(mine.astype(np.float32), back))


# -------------------------------------------------------------------------------------- the rules

COPY_DIFFERS = Rule(
    "NB113",
    "copied-tensor-differs",
    Severity.ERROR,
    "An unquantized tensor is not the source's",
    "What stays unquantized must be the source's, byte for byte. Other values mean another source, "
    "a damaged copy, or a method that moved scales; F32 state parameters saved as BF16 (A_log and "
    "the norms of DeltaNet layers, as published exports have them) cost precision in every step "
    "of the recurrence.",
    "Copy the tensor from the source, in its dtype.",
    _copies,
    threads=("https://github.com/modelscope/ms-swift/pull/9972",),
    is_repairable=True,
    needs=frozenset({"source", "values"}),
)

RULES: tuple[Rule, ...] = (COPY_DIFFERS,)
