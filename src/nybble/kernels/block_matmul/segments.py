"""Weights as the matmul kernels take them: the table of segments, with addresses taken once.

A *segment* is one weight matrix [N, K] (a member of a fused group, or of an expert) and the columns
of the output that it fills. Knows nothing of activations or of instruction sets; `SEGMENT` is the
struct of matmul.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, Shape
from nybble.formats.element import F32, F32Array
from nybble.formats.tensor import BlockScaledTensor

Weight = BlockScaledTensor | NDArray[np.generic]

# The enum and the struct of matmul.h.
_FORMATS = {NVFP4: 0, MXFP4: 1, FP8: 2, FP8_CHANNEL: 3, FP8_BLOCK: 4}
_PLAIN = {np.dtype(ml_dtypes.bfloat16): 5, np.dtype(np.float16): 6, np.dtype(np.float32): 7}
SEGMENT = np.dtype(
    [
        ("codes", np.uint64),
        ("scale", np.uint64),
        ("bias", np.uint64),
        ("rows", np.int64),
        ("row_bytes", np.int64),
        ("column", np.int64),
        ("tensor_scale", np.float32),
        ("format", np.int32),
    ]
)

#: The fields of one segment.
Row = tuple[int, int, int, int, int, int, float, int]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Groups of segments in memory: group g has `segments[first[g]:first[g + 1]]`.

    The addresses of the two arrays are taken once: that costs more than a small call.
    """

    segments: NDArray[np.void]
    first: NDArray[np.int64]
    segments_at: int
    first_at: int


def table_of(rows: Sequence[Row], first: Sequence[int]) -> Table:
    """The table of these segments, whose groups begin at `first` (with the end)."""
    segments, starts = np.array(rows, dtype=SEGMENT), np.array(first, dtype=np.int64)
    return Table(segments, starts, address(segments), address(starts))


def rows_of(
    weights: Sequence[Weight], biases: Sequence[F32Array | None], k: int, what: str
) -> tuple[list[Row], list[NDArray[np.generic]], int]:
    """The segments of members side by side, the arrays to keep alive, and their total N.

    Raises FormatError, naming `what`, for members that do not share K or that kernels cannot read.
    """
    rows: list[Row] = []
    kept: list[NDArray[np.generic]] = []
    column = 0
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        member = f"{what}, member {i}"
        n = _check_shape(weight, k, member)
        codes, scale, tensor_scale, fmt = _parts(weight, n, k, member)
        kept.append(codes)
        if scale is not None:
            kept.append(scale)
        if bias is not None:
            if bias.shape != (n,) or bias.dtype != np.float32 or not bias.flags.c_contiguous:
                raise FormatError(
                    f"{member}: the bias must be contiguous float32 [{n}], found {bias.dtype} "
                    f"{list(bias.shape)}"
                )
            kept.append(bias)
        rows.append(
            (
                address(codes),
                0 if scale is None else address(scale),
                0 if bias is None else address(bias),
                n,
                codes.strides[0] if n > 1 else codes.nbytes,
                column,
                tensor_scale,
                fmt,
            )
        )
        column += n
    return rows, kept, column


def address(array: NDArray[np.generic]) -> int:
    """Where an array begins; its owner keeps it alive."""
    return int(array.__array_interface__["data"][0])


def _check_shape(weight: Weight, k: int, what: str) -> int:
    shape: Shape = tuple(weight.shape)
    if len(shape) != 2 or 0 in shape or shape[1] != k:
        raise FormatError(
            f"{what}: expected a weight [N, {k}] (members share K), found {list(shape)}"
        )
    return shape[0]


def _parts(
    weight: Weight, n: int, k: int, what: str
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None, float, int]:
    """Codes, scales, what multiplies the result, and the format's number in matmul.h."""
    if isinstance(weight, np.ndarray):
        plain = _PLAIN.get(weight.dtype)
        if plain is None:
            raise FormatError(f"{what}: a plain weight is BF16, F16 or F32, found {weight.dtype}")
        return _rows_contiguous(weight, what), None, 1.0, plain
    fmt = weight.format
    if fmt not in _FORMATS:
        known = ", ".join(map(str, _FORMATS))
        raise FormatError(f"{what}: no matmul kernel reads {fmt}; known: {known}")
    fmt.check_shape(weight.shape, what)
    codes = _rows_contiguous(weight.codes, what)
    if codes.shape != fmt.codes_shape((n, k)) or codes.itemsize != 1:
        raise FormatError(
            f"{what}: {fmt} codes must be bytes {list(fmt.codes_shape((n, k)))}, found "
            f"{codes.dtype} {list(codes.shape)}"
        )
    scale = weight.scale
    width = fmt.scale.bits // 8
    is_right = scale.dtype == np.float32 if fmt.scale is F32 else scale.itemsize == width
    if scale.shape != fmt.scale_shape((n, k)) or not is_right or not scale.flags.c_contiguous:
        raise FormatError(
            f"{what}: {fmt} scales must be contiguous {fmt.scale} "
            f"{list(fmt.scale_shape((n, k)))}, found {scale.dtype} {list(scale.shape)}"
        )
    if fmt.has_tensor_scale != (weight.tensor_scale is not None):
        raise FormatError(f"{what}: {fmt} with tensor scale {weight.tensor_scale!r}")
    if fmt is FP8:
        return codes, None, float(scale.reshape(-1)[0]), _FORMATS[fmt]
    top = 1.0 if weight.tensor_scale is None else float(np.asarray(weight.tensor_scale).item())
    return codes, scale, top, _FORMATS[fmt]


def _rows_contiguous(array: NDArray[np.generic], what: str) -> NDArray[np.generic]:
    """Rows may lie apart (a slice of a stack); within a row elements follow each other."""
    if (array.shape[1] > 1 and array.strides[1] != array.itemsize) or array.strides[0] < 0:
        raise FormatError(f"{what}: the elements of a row must be contiguous in memory")
    return array
