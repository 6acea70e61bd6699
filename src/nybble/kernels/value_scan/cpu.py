"""The C kernel of cpu.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nybble.kernels.build import loaded
from nybble.kernels.value_scan import COUNTS, KINDS, WIDTHS, Segment

_SEGMENT = np.dtype([("data", np.uint64), ("count", np.int64), ("kind", np.int64)])


def scan(data: NDArray[np.uint8], segments: Sequence[Segment]) -> NDArray[np.void]:
    """See the package."""
    rows = np.array(
        [(start, length // WIDTHS[kind], KINDS[kind]) for start, length, kind in segments],
        dtype=_SEGMENT,
    )
    rows["data"] += np.uint64(_address(data))
    out = np.zeros(len(rows), dtype=COUNTS)
    loaded().nyb_value_scan(
        ctypes.c_void_p(_address(rows)), ctypes.c_int64(len(rows)), ctypes.c_void_p(_address(out))
    )
    return out


def _address(array: NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])
