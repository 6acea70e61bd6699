"""The definition of the counts, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nybble.kernels.value_scan import COUNTS, EMPTY_LEAST, Segment

#: Per kind: word, mask of the magnitude, first NaN or infinity, its infinity, largest finite, sign.
_BITS: dict[str, tuple[type[np.unsignedinteger], int, int, int, int, int]] = {
    "codes": (np.uint8, 0x77, 0x100, 0x100, 0x77, 0),
    "e4m3": (np.uint8, 0x7F, 0x7F, 0x100, 0x7E, 0x80),
    "e8m0": (np.uint8, 0xFF, 0xFF, 0x100, 0xFE, 0),
    "bf16": (np.uint16, 0x7FFF, 0x7F81, 0x7F80, 0x7F7F, 0x8000),
    "f16": (np.uint16, 0x7FFF, 0x7C01, 0x7C00, 0x7BFF, 0x8000),
    "f32": (np.uint32, 0x7FFFFFFF, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x80000000),
}


def scan(data: NDArray[np.uint8], segments: Sequence[Segment]) -> NDArray[np.void]:
    """See the package."""
    out = np.zeros(len(segments), dtype=COUNTS)
    for i, (start, length, kind) in enumerate(segments):
        out[i] = _count(data[start : start + length], kind)
    return out


def _count(data: NDArray[np.uint8], kind: str) -> tuple[int, ...]:
    word, mask, first_nan, infinite, largest, sign = _BITS[kind]
    bits = np.frombuffer(data.tobytes(), dtype=word)  # copied: it may lie unaligned
    if word is np.uint8:  # by value: what each byte is, times how often it is there
        often = np.zeros(256, dtype=np.int64)
        for at in range(0, bits.size, _BLOCK):
            often += np.bincount(bits[at : at + _BLOCK], minlength=256)
        bits = np.flatnonzero(often).astype(np.uint8)
        times = often[bits]
    else:
        times = np.ones(1, dtype=np.int64)
    v = (bits & word(mask)).astype(np.int64)
    signs = (bits & word(sign)) != 0
    tests = (v >= first_nan, v == infinite, v == 0, signs, v == largest)
    return (
        data.size // np.dtype(word).itemsize,
        *(int((test * times).sum()) for test in tests),
        int(v.min(initial=EMPTY_LEAST)),
        int(v.max(initial=0)),
    )


_BLOCK = 1 << 16
