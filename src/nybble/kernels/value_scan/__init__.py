"""Counts over the stored values of many tensors in one buffer: NaN, infinities, zeros and more.

Knows bytes and how they are meant; refuses to know tensors, names and files. `reference.py` is the
definition, `cpu.py` calls the C kernel; both give the same integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.kernels import dispatch

#: How bytes can be meant, and how many an element has. Codes are two E2M1 numbers to a byte; a
#: byte of them is one element here.
WIDTHS = {"codes": 1, "e4m3": 1, "e8m0": 1, "bf16": 2, "f16": 2, "f32": 4}
KINDS = {kind: number for number, kind in enumerate(WIDTHS)}

#: One row per segment. `size` elements looked at; of these `nan`, `inf`, `zero` (of either sign;
#: both codes of a byte), `negative` (the sign bit is set, NaN and zero too; never for codes and
#: E8M0), `saturated` (the largest finite magnitude: 448 for E4M3, both codes 6). `least` and
#: `largest` are the extremes of the bits without the sign, NaN and infinities too, which order as
#: magnitudes do; 2^63 - 1 and 0 for an empty segment. A zero of E8M0 is its byte 0, 2^-127.
COUNTS = np.dtype(
    [
        (name, np.int64)
        for name in ("size", "nan", "inf", "zero", "negative", "saturated", "least", "largest")
    ]
)
EMPTY_LEAST = 2**63 - 1

Segment = tuple[int, int, str]


def scan(data: NDArray[np.uint8], segments: Sequence[Segment]) -> NDArray[np.void]:
    """The counts of each (first byte, length in bytes, kind) of `data`, as COUNTS [segments].

    Segments may overlap and need not be aligned. Runs on the calling thread, with the interpreter
    lock released. Raises FormatError for an unknown kind, for a length that is no whole number of
    elements, and for what `data` does not hold.
    """
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise FormatError(f"values are scanned in a run of bytes, found {data.dtype} {data.shape}")
    for start, length, kind in segments:
        if kind not in KINDS:
            raise FormatError(f"{kind!r} is no kind of values: choose {', '.join(KINDS)}")
        if start < 0 or length < 0 or start + length > data.size or length % WIDTHS[kind]:
            raise FormatError(
                f"bytes {start} to {start + length} are no whole {kind} values of {data.size} bytes"
            )
    return _backend().scan(data, segments)  # type: ignore[no-any-return]


def add(total: NDArray[np.void], at: NDArray[np.int64], part: NDArray[np.void]) -> None:
    """Add the counts of segments to those of the tensors `at` that they are pieces of."""
    for name in ("size", "nan", "inf", "zero", "negative", "saturated"):
        np.add.at(total[name], at, part[name])
    np.minimum.at(total["least"], at, part["least"])
    np.maximum.at(total["largest"], at, part["largest"])


def empty(count: int) -> NDArray[np.void]:
    """Counts of nothing, to `add` to."""
    total = np.zeros(count, dtype=COUNTS)
    total["least"] = EMPTY_LEAST
    return total


def _backend() -> ModuleType:
    if dispatch.choose().backend == "cpu":
        from nybble.kernels.value_scan import cpu

        return cpu
    from nybble.kernels.value_scan import reference

    return reference
