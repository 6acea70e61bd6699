"""The C kernels of cpu.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.formats.block import MXFP4, NVFP4, BlockFormat
from nybble.formats.element import F32Array, U8Array
from nybble.formats.search import Search
from nybble.kernels import dispatch
from nybble.kernels.block_quantize import Buffers, Comparison, Runs
from nybble.kernels.build import loaded

# The enums and structs of cpu.h.
_DTYPES = {np.dtype(ml_dtypes.bfloat16): 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}
_SEARCHES = {"absmax": 0, "four-six": 1, "mse": 2}
_SEGMENT = np.dtype(
    [
        ("source", np.uint64),
        ("codes", np.uint64),
        ("scale", np.uint64),
        ("count", np.int64),
        ("tensor_scale", np.float32),
        ("bf16_quotient", np.int32),
    ]
)
_COMPARISON = np.dtype([("error", np.float64), ("energy", np.float64), ("bad_scales", np.int64)])


def amax(runs: Runs, dtype: np.dtype[np.generic], threads: int) -> F32Array:
    """See the package."""
    segments = _segments(runs, [], [], np.zeros(len(runs), dtype=np.float32))
    found = np.zeros(len(runs), dtype=np.uint32)
    _call("nyb_amax", segments, _DTYPES[dtype], found, threads=threads)
    return found.view(np.float32)


def quantize(
    runs: Runs,
    dtype: np.dtype[np.generic],
    fmt: BlockFormat,
    search: Search,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int,
    bf16_quotient: bool,
) -> None:
    """See the package."""
    segments = _segments(runs, codes, block_scales if fmt.is_packed else [], scales)
    segments["bf16_quotient"] = bf16_quotient
    _call(
        "nyb_quantize",
        segments,
        _DTYPES[dtype],
        _format(fmt),
        _SEARCHES[search],
        threads=threads,
    )


def decode(
    fmt: BlockFormat,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int,
) -> list[F32Array]:
    """See the package."""
    out = [np.empty(c.size * (2 if fmt.is_packed else 1), dtype=np.float32) for c in codes]
    segments = _segments(out, codes, block_scales if fmt.is_packed else [], scales)
    pointers = np.array([_address(o) for o in out], dtype=np.uint64)
    _call("nyb_decode", segments, _format(fmt), pointers, threads=threads)
    return out


def compare(
    runs: Runs,
    dtype: np.dtype[np.generic],
    fmt: BlockFormat,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int,
) -> list[Comparison]:
    """See the package."""
    segments = _segments(runs, codes, block_scales if fmt.is_packed else [], scales)
    found = np.zeros(len(runs), dtype=_COMPARISON)
    _call("nyb_compare", segments, _DTYPES[dtype], _format(fmt), found, threads=threads)
    if isinstance(runs, np.ndarray):
        sums = (found[name].sum() for name in ("error", "energy", "bad_scales"))
        return [Comparison(*(s.item() for s in sums))]
    return [Comparison(*row) for row in found.tolist()]


def _format(fmt: BlockFormat) -> int:
    return 0 if fmt is NVFP4 else 1 if fmt is MXFP4 else 2


def _address(array: NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


def _addresses(runs: Runs) -> NDArray[np.uint64]:
    """Where each run begins; of a matrix, where each row does."""
    if isinstance(runs, np.ndarray):
        rows = np.arange(len(runs), dtype=np.uint64) * np.uint64(runs.strides[0])
        return rows + np.uint64(_address(runs))
    return np.array([_address(run) for run in runs], dtype=np.uint64)


def _segments(
    runs: Runs,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    scales: F32Array,
) -> NDArray[np.void]:
    segments = np.zeros(len(runs), dtype=_SEGMENT)
    segments["source"] = _addresses(runs)
    segments["count"] = runs.shape[1] if isinstance(runs, np.ndarray) else [r.size for r in runs]
    if len(codes):
        segments["codes"] = _addresses(codes)
    if block_scales:
        segments["scale"] = _addresses(block_scales)
    segments["tensor_scale"] = scales
    return segments


def _call(name: str, segments: NDArray[np.void], *rest: object, threads: int) -> None:
    """Call a function of cpu.h: segments, their count, integers and arrays, isa, threads."""
    library = loaded()
    arguments: list[object] = [ctypes.c_void_p(_address(segments)), ctypes.c_int64(len(segments))]
    for value in rest:
        if isinstance(value, np.ndarray):
            arguments.append(ctypes.c_void_p(_address(value)))
        else:
            arguments.append(ctypes.c_int(value))  # type: ignore[arg-type]
    isa = dispatch.isa_level()
    getattr(library, name)(*arguments, ctypes.c_int(isa), ctypes.c_int(threads))
