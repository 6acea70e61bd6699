"""The rule that holds quantized weights against the source's: decoded rows must be like theirs
(NB120).

What loads, has sound scales and answers badly is often another matrix, or the right one at another
scale: nibbles in the other order, a tensor scale of another expert, experts exchanged. Rows of
every module with --deep, else of a spread of them, are decoded by the definition and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.check.completeness_copies import find_in_source
from nybble.check.contents import CODES, SCALES, TENSOR_SCALES, Module, is_divisor
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.check.wording import first_of, plural
from nybble.checkpoint.files import read_ranges
from nybble.checkpoint.safetensors import DTYPES, TensorInfo
from nybble.formats.block import FORMATS, BlockFormat
from nybble.formats.element import F32, decode, unpack_nibbles

#: Modules that are looked at without --deep, and rows of each.
MODULES, ROWS, REMOTE_MODULES = 512, 12, 32
#: Of the energy of the source's rows that the decoded ones explain at the best scale. Round to
#: nearest explains 0.99 in four bits; another matrix of the same size about nothing.
ALIKE = 0.9
#: How far the best scale may be from one. Least squares over the rows is good to 0.01.
SCALE = 0.1
_PLAIN = ("BF16", "F16", "F32")

F64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A quantized matrix [N, K], what it was made of, and the rows to look at."""

    module: Module
    format: BlockFormat
    codes: TensorInfo
    scale: TensorInfo
    tensor_scale: TensorInfo | None
    source: TensorInfo
    rows: tuple[int, ...]

    @property
    def k(self) -> int:
        return self.source.shape[1]


def wrong_scales(survey: Survey) -> dict[str, float]:
    """Modules that are the source's weights at another scale, and what they must be multiplied
    with; every module is looked at."""
    found = {}
    if survey.source is not None:
        pairs = list(_pairs(survey, survey.source, every=True))
        for pair, codes, scales, x in _read(survey, survey.source, pairs):
            like, factor = _alike(x, _decoded(pair, codes, scales))
            if like >= ALIKE and abs(factor - 1) > SCALE:
                found[pair.module.name] = factor
    return found


def _weights(survey: Survey) -> Iterator[Finding]:
    source = survey.source
    if source is None or not source.has_data or survey.config.get("transform_config"):
        return
    pairs = list(_pairs(survey, source))
    scaled: dict[str, float] = {}
    swapped, columns, others = [], [], []
    for pair, codes, scales, x in _read(survey, source, pairs):
        d = _decoded(pair, codes, scales)
        like, factor = _alike(x, d)
        if like >= ALIKE and abs(factor - 1) <= SCALE:
            continue
        name = pair.module.name
        if like >= ALIKE:
            scaled[name] = factor
        elif pair.format.is_packed and _is_swapped(pair, codes, scales, x):
            swapped.append(name)
        elif _is_by_columns(x, d):
            columns.append(name)
        else:
            others.append(name)
    looked = f"{len(pairs):,} of {sum(1 for _ in survey.quantized):,} looked at"
    yield from _findings(scaled, swapped, columns, others, looked)


def _findings(
    scaled: dict[str, float],
    swapped: list[str],
    columns: list[str],
    others: list[str],
    looked: str,
) -> Iterator[Finding]:
    if scaled:
        name, factor = max(scaled.items(), key=lambda item: abs(np.log(abs(item[1]) + 1e-300)))
        yield WEIGHTS_DIFFER.finding(
            f"{plural(len(scaled), 'module')} ({looked}) decode to the source's weights at another "
            f"scale, the worst {name}: expected the values times 1, found that they must be "
            f"multiplied by {factor:.4g}",
            scaled,
            kind="scale",
            factors=scaled,
        )
    for names, kind, words in (
        (swapped, "nibbles", "hold the source's weights with the two codes of a byte exchanged"),
        (others, "other", "decode to something that has nothing to do with the source's weights"),
    ):
        if names:
            yield WEIGHTS_DIFFER.finding(
                f"{plural(len(names), 'module')} ({looked}) {words}, "
                f"{first_of(names, len(names))}: expected round-off alone",
                names,
                kind=kind,
            )
    if columns:
        yield WEIGHTS_DIFFER.finding(
            f"{plural(len(columns), 'module')} ({looked}) are the source's weights with scaled "
            f"columns, {first_of(columns, len(columns))}: as smoothing (AWQ, SmoothQuant) makes "
            "them, if the layer before undoes it",
            columns,
            severity=Severity.NOTE,
            kind="columns",
        )


# ------------------------------------------------------------------------------------- the numbers


def _alike(x: F64Array, d: F64Array) -> tuple[float, float]:
    """The share of x's energy that the best multiple of d explains, and that multiple."""
    with np.errstate(all="ignore"):
        xx, xd, dd = float((x * x).sum()), float((x * d).sum()), float((d * d).sum())
    if xx == 0 or not np.isfinite(dd):
        return (1.0, 1.0) if xx == dd == 0 else (0.0, 0.0)
    return (xd * xd / (xx * dd), xd / dd) if dd > 0 else (0.0, 0.0)


def _is_by_columns(x: F64Array, d: F64Array) -> bool:
    """Whether a factor per column explains the rows: there are more rows than factors by far."""
    with np.errstate(all="ignore"):
        factor = (x * d).sum(axis=0) / np.maximum((d * d).sum(axis=0), 1e-300)
        left = ((x - factor * d) ** 2).sum() / (x * x).sum()
    return bool(left < 0.05 and (factor > 0).mean() > 0.99)


def _is_swapped(pair: _Pair, codes: NDArray[np.uint8], scales: F64Array, x: F64Array) -> bool:
    turned = ((codes << 4) | (codes >> 4)).astype(np.uint8)
    return _alike(x, _decoded(pair, turned, scales))[0] >= ALIKE


def _decoded(pair: _Pair, codes: NDArray[np.uint8], scales: F64Array) -> F64Array:
    """The rows by the definition; `scales` has a value per element."""
    values = decode(unpack_nibbles(codes) if pair.format.is_packed else codes, pair.format.element)
    return values.astype(np.float64)[:, : pair.k] * scales


# ---------------------------------------------------------------------------------------- reading


def _pairs(survey: Survey, source: Survey, *, every: bool = False) -> Iterator[_Pair]:
    known = [p for m in survey.quantized if (p := _pair(survey, source, m)) is not None]
    if not (every or survey.deep):
        most = MODULES if survey.files.local and source.files.local else REMOTE_MODULES
        known = _spread(known, most)
    yield from known


def _spread(pairs: Sequence[_Pair], most: int) -> list[_Pair]:
    """At most so many, evenly over each role, so that small roles are seen whole."""
    roles: dict[tuple[str, str], list[_Pair]] = {}
    for p in pairs:
        roles.setdefault((p.module.role, p.format.name), []).append(p)
    each = max(1, most // max(1, len(roles)))
    return [
        members[i * len(members) // min(each, len(members))]
        for members in roles.values()
        for i in range(min(each, len(members)))
    ]


def _pair(survey: Survey, source: Survey, module: Module) -> _Pair | None:
    """None for formats that are not decoded here, smoothed modules, and what the source lacks."""
    fmt = FORMATS.get(module.kind.held)
    codes, scale = module.tensor(*CODES), module.tensor(*SCALES)
    if fmt is None or codes is None or scale is None or module.tensor("pre_quant_scale"):
        return None
    there = find_in_source(survey, source, f"{module.name}.weight")
    if there is None or there.dtype not in _PLAIN or len(codes.shape) != 2:
        return None
    n, k = there.shape[-2:] if len(there.shape) == 2 else (0, 0)
    if codes.shape != fmt.codes_shape((n, k)) or not n or not survey.is_held(codes):
        return None
    parts = module.kind.problem.split("; ") if module.kind.problem else []
    if not all(part.startswith("lacks input_") for part in parts):
        return None  # scales that do not fit, or are none: a rule of its own says so
    top = module.tensor(*TENSOR_SCALES)
    if (fmt.has_tensor_scale and (top is None or top.size != 1)) or not source.is_held(there):
        return None
    rows = tuple(sorted({i * n // ROWS for i in range(ROWS)}))
    return _Pair(module, fmt, codes, scale, top, there, rows)


def _read(
    survey: Survey, source: Survey, pairs: Sequence[_Pair]
) -> Iterator[tuple[_Pair, NDArray[np.uint8], F64Array, F64Array]]:
    """Codes, scales per element and the source's values of the rows, some modules at a time."""
    tops = survey.scalars([p.tensor_scale or p.codes for p in pairs])
    for at in range(0, len(pairs), 256):
        batch = pairs[at : at + 256]
        codes = iter(_rows(survey, [(p.codes, r) for p in batch for r in p.rows]))
        blocks = iter(_rows(survey, [(p.scale, r) for p in batch if _is_by_row(p) for r in p.rows]))
        wide = [p for p in batch if not _is_by_row(p)]
        whole = dict(zip(map(id, wide), survey.values([p.scale for p in wide]), strict=True))
        values = iter(_rows(source, [(p.source, r) for p in batch for r in p.rows]))
        for p, top in zip(batch, tops[at : at + 256], strict=True):
            own = np.stack([np.frombuffer(next(codes), np.uint8) for _ in p.rows])
            if _is_by_row(p):
                raw = np.stack([np.frombuffer(next(blocks), np.uint8) for _ in p.rows])
                scales = decode(raw, p.format.scale).astype(np.float64)
                scales = np.repeat(scales, p.format.block[1], axis=1)[:, : p.k]
            else:
                scales = _float_scales(p, whole[id(p)])
            if p.tensor_scale is not None:
                with np.errstate(divide="ignore"):
                    scales = scales * (1 / top if is_divisor(p.tensor_scale) else top)
            kind = DTYPES[p.source.dtype]
            x = np.stack([np.frombuffer(next(values), kind) for _ in p.rows]).astype(np.float64)
            yield p, own, scales, x


def _is_by_row(pair: _Pair) -> bool:
    """Eight-bit block scales, [N, K / block]; others are few numbers."""
    return pair.format.scale is not F32


def _float_scales(pair: _Pair, stored: NDArray[np.generic] | None) -> F64Array:
    """FP8's scales of the rows, one per element."""
    assert stored is not None
    n, k = pair.source.shape
    height, width = pair.format.block
    grid = stored.astype(np.float64).reshape(pair.format.scale_shape((n, k)))
    rows = grid[[r // (height or n) for r in pair.rows]]
    spread: F64Array = np.repeat(rows, width or k, axis=1)[:, :k]
    return spread


def _rows(survey: Survey, wanted: Sequence[tuple[TensorInfo, int]]) -> list[bytes]:
    """Rows of matrices, read together by file."""
    out = [b""] * len(wanted)
    by_file: dict[str, list[int]] = {}
    for i, (info, _) in enumerate(wanted):
        by_file.setdefault(info.file, []).append(i)
    for file, places in by_file.items():
        ranges = []
        for i in places:
            info, row = wanted[i]
            width = info.nbytes // info.shape[0]
            ranges.append((info.offset + row * width, width))
        for i, data in zip(places, read_ranges(survey.files, file, ranges), strict=True):
            out[i] = data
    return out


WEIGHTS_DIFFER = Rule(
    "NB120",
    "weights-differ-from-source",
    Severity.ERROR,
    "Quantized weights do not decode to the source's",
    "The file loads, its scales are sound, and a module decodes to other weights than it was made "
    "of: a tensor scale of another module or stored as something else, the two codes of a byte in "
    "the other order, experts exchanged, or a source of another model. Nothing else shows it "
    "before an evaluation does. Some rows are decoded and compared; --deep looks at every module.",
    "A scale that its fused partner has, or a power of two: `nybble repair --source`. Else "
    "quantize again; if everything differs, give the right source.",
    _weights,
    threads=("https://github.com/ollama/ollama/issues/15880",),
    is_repairable=True,
    needs=frozenset({"source", "values"}),
)

RULES: tuple[Rule, ...] = (WEIGHTS_DIFFER,)
