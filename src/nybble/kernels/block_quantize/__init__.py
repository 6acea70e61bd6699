"""amax, block quantization, decoding and comparison of runs of a weight.

A *run* is a contiguous piece of a weight with one tensor scale: a matrix, or some rows of it. All
runs of a call are worked on together by one set of threads. The definition is `formats.search`;
`reference.py` applies it to runs, and `cpu.py` calls the C kernels. Both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.formats.block import BlockFormat
from nybble.formats.element import F32Array, U8Array
from nybble.formats.search import Search, check_search
from nybble.kernels import dispatch

#: Runs one by one, or a matrix that stands for its rows: per-channel scales make millions of runs.
Runs = Sequence[NDArray[np.generic]] | NDArray[np.generic]
Buffers = Sequence[U8Array] | U8Array

SOURCE_DTYPES = tuple(np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one run: squared error, the source's energy, and scale bytes zero, negative or NaN."""

    error: float
    energy: float
    bad_scales: int


def amax(runs: Runs, threads: int = 1) -> F32Array:
    """The largest magnitude of each run, float32 [runs]; infinity or NaN where a run holds one."""
    dtype = _check_runs(runs)
    return _backend().amax(runs, dtype, threads)  # type: ignore[no-any-return]


def quantize(
    runs: Runs,
    fmt: BlockFormat,
    search: Search,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int = 1,
    *,
    bf16_quotient: bool = False,
) -> None:
    """Quantize each run into codes[i] and block_scales[i] (contiguous uint8, filled in place).

    `scales` is float32 [runs]: the tensor scale of NVFP4 (a power of two unless `search` is
    absmax), the one scale of the run for FP8, unused for MXFP4. FP8 needs no block_scales. Values
    must be finite: see `amax`. `bf16_quotient` rounds FP8 quotients of BF16 runs to BF16 first, as
    ModelOpt does for one scale per tensor.
    """
    check_search(fmt, search)
    dtype = _check_runs(runs)
    _check_buffers(_sizes(runs), fmt, scales, codes, block_scales)
    buffers = [codes] if isinstance(codes, np.ndarray) else codes
    if not all(o.flags.writeable for o in (*buffers, *(block_scales if fmt.is_packed else ()))):
        raise FormatError("quantize: an output buffer is read-only")
    _backend().quantize(
        runs,
        dtype,
        fmt,
        search,
        scales,
        codes,
        block_scales,
        threads,
        bf16_quotient and dtype == ml_dtypes.bfloat16,
    )


def decode(
    fmt: BlockFormat,
    scales: F32Array,
    codes: Sequence[U8Array],
    block_scales: Sequence[U8Array],
    threads: int = 1,
) -> list[F32Array]:
    """The float32 values of quantized runs, flat."""
    sizes = [c.size * (2 if fmt.is_packed else 1) for c in codes]
    _check_buffers(sizes, fmt, scales, codes, block_scales)
    return _backend().decode(fmt, scales, codes, block_scales, threads)  # type: ignore[no-any-return]


def compare(
    runs: Runs,
    fmt: BlockFormat,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int = 1,
) -> list[Comparison]:
    """Decode each run and hold it against its source; a matrix of rows gives one sum."""
    dtype = _check_runs(runs)
    _check_buffers(_sizes(runs), fmt, scales, codes, block_scales)
    return _backend().compare(  # type: ignore[no-any-return]
        runs, dtype, fmt, scales, codes, block_scales, threads
    )


def _backend() -> ModuleType:
    if dispatch.choose().backend == "cpu":
        from nybble.kernels.block_quantize import cpu

        return cpu
    from nybble.kernels.block_quantize import reference

    return reference


def _sizes(runs: Runs) -> list[int]:
    return [runs.shape[1]] * len(runs) if isinstance(runs, np.ndarray) else [r.size for r in runs]


def _check_runs(runs: Runs) -> np.dtype[np.generic]:
    if isinstance(runs, np.ndarray):
        if runs.ndim != 2:
            raise FormatError(f"a matrix of runs must be [N, K], found {list(runs.shape)}")
        runs = [runs]
    dtypes = {r.dtype for r in runs}
    if len(dtypes) > 1:
        raise FormatError(f"one call takes runs of one dtype, found {sorted(map(str, dtypes))}")
    dtype = dtypes.pop() if dtypes else np.dtype(np.float32)
    if dtype not in SOURCE_DTYPES:
        raise FormatError(f"weights must be BF16, F16 or F32 to be quantized, found {dtype}")
    for run in runs:
        if not run.flags.c_contiguous:
            raise FormatError("a run must be contiguous")
    return dtype


def _check_buffers(
    sizes: Sequence[int],
    fmt: BlockFormat,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
) -> None:
    """The kernels trust sizes: a short buffer would be read or written past its end."""
    if isinstance(codes, np.ndarray):  # rows
        if fmt.is_packed or len(scales) != len(sizes) or codes.dtype != np.uint8:
            raise FormatError(f"rows of {fmt} need one scale and one row of uint8 codes each")
        if codes.shape != (len(sizes), sizes[0] if sizes else 0) or not codes.flags.c_contiguous:
            raise FormatError(f"codes: expected {len(sizes)} rows, found {list(codes.shape)}")
        return
    counts = {"scales": len(scales), "codes": len(codes)}
    if fmt.is_packed:
        counts["block_scales"] = len(block_scales)
    for what, count in counts.items():
        if count != len(sizes):
            raise FormatError(f"expected {what} for {len(sizes)} runs, found {count}")
    for i, size in enumerate(sizes):
        if fmt.is_packed and size % fmt.block[1]:
            raise FormatError(f"a {fmt} run must be whole blocks of {fmt.block[1]}: {size}")
        buffers = {"codes": (codes[i], size // 2 if fmt.is_packed else size)}
        if fmt.is_packed:
            buffers["block_scales"] = (block_scales[i], size // fmt.block[1])
        for what, (found, wanted) in buffers.items():
            if found.size != wanted or found.dtype != np.uint8 or not found.flags.c_contiguous:
                raise FormatError(
                    f"{what} of run {i}: expected {wanted} contiguous uint8, found {found.size} "
                    f"{found.dtype}{'' if found.flags.c_contiguous else ', not contiguous'}"
                )
