"""Scale search: which scales a weight gets, and the codes that follow. Kernels agree with this.

Three searches, at the same bytes (methods and measured gains: docs/formats.md):

    absmax     a block's largest element maps to 6, the tensor's to 6 * 448; ModelOpt's bytes
    four-six   it maps to 6 or to 4, whichever costs less (four-over-six)
    mse        the scale with the least squared error among all 126 positive E4M3 values

`four-six` and `mse` use a power-of-two tensor scale that leaves the top block room to expand: then
every product code * scale is exact in BF16, its reciprocal is exact, and fused tensors can share it
at no cost.

A block's error is the float32 sum, element by element, of the squares of x - s * code in units of
the tensor scale, with codes from x * (1 / s); ties go to the smaller scale. The final codes come
from the quotient x / s.
"""

from __future__ import annotations

from typing import Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.formats.block import FP8, MXFP4, NVFP4, BlockFormat
from nybble.formats.element import (
    E2M1,
    E4M3,
    E8M0,
    F32,
    F32Array,
    U8Array,
    decode,
    encode,
    pack_nibbles,
)
from nybble.formats.tensor import BlockScaledTensor, expand

Search = Literal["absmax", "four-six", "mse"]
SEARCHES: tuple[Search, ...] = get_args(Search)

#: The tensor scale maps the largest element to 6 * 256 at most: its block may grow by 448 / 256.
TOP_BLOCK_SCALE = 256.0
#: Power-of-two tensor scales stay within: products with scales and codes are then normal floats.
MIN_TENSOR_SCALE, MAX_TENSOR_SCALE = 2.0**-116, 2.0**116

_ZERO_BLOCK = 0x38  # E4M3 1.0, as ModelOpt writes for a block of zeros
_MX_ZERO_BLOCK = 127  # E8M0 1.0
_MX_MAX = 252  # 6 * 2^125 is a finite float32, 4 * 2^126 is not


def power_of_two_at_least(x: F32Array) -> F32Array:
    """The smallest power of two that is not below x > 0, elementwise."""
    mantissa, exponent = np.frexp(x)
    power: F32Array = np.ldexp(np.ones_like(x), exponent - (mantissa == 0.5))
    return power


def tensor_scale(amax: F32Array | np.float32, fmt: BlockFormat, search: Search) -> F32Array:
    """The tensor scale of NVFP4, or the scale of FP8, for a largest magnitude amax (any shape).

    Shared by fused members through their common amax. A dead tensor (amax 0) has scale 1: ModelOpt
    would write 0 and NaN block scales, the one place where `absmax` differs from it on purpose.
    """
    most = np.float32(E2M1.max * E4M3.max if fmt is NVFP4 else E4M3.max)
    if search == "absmax":
        scale = np.asarray(amax / most, dtype=np.float32)
    else:
        reach = np.float32(E2M1.max * TOP_BLOCK_SCALE) if fmt is NVFP4 else most
        least = np.clip(amax / reach, MIN_TENSOR_SCALE, MAX_TENSOR_SCALE)
        scale = power_of_two_at_least(np.asarray(least, dtype=np.float32))
    return np.where((scale > 0) & (amax > 0), scale, np.float32(1))


def quantize(
    x: NDArray[np.generic],
    fmt: BlockFormat,
    search: Search = "mse",
    *,
    scale: F32Array | None = None,
) -> BlockScaledTensor:
    """Round x [..., N, K] to fmt with the scales that `search` finds, in float32 arithmetic.

    `scale` gives the tensor scale of NVFP4 [...] or the scales of FP8 (`fmt.scale_shape`) instead
    of taking them from x: members of a fused group pass their common one. FP8 has no scales to
    search: under `mse` and `four-six` they are powers of two. Raises FormatError for NaN or
    infinities, a shape that does not divide into blocks, and `four-six` on MXFP4.
    """
    fmt.check_shape(x.shape, "quantize")
    check_search(fmt, search)
    exact = np.ascontiguousarray(x).astype(np.float32)
    if not np.isfinite(exact).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(exact))[0])
        raise FormatError(f"quantize: value {exact[index]} at index {list(index)} is not finite")
    if fmt.scale is F32:
        return _quantize_fp8(exact, fmt, search, scale, bf16_quotient=x.dtype == ml_dtypes.bfloat16)
    blocks = exact.reshape(-1, fmt.block[1])
    if fmt is MXFP4:
        codes_of_scale = _mx_scale(blocks, search)
        scales, top = decode(codes_of_scale, E8M0), None
    else:
        top = scale
        if top is None:
            top = tensor_scale(np.abs(exact).max(axis=(-2, -1)), fmt, search)
        each = np.broadcast_to(
            top[..., None, None], (*exact.shape[:-1], exact.shape[-1] // 16)
        ).reshape(-1)
        codes_of_scale = nvfp4_scale_codes(blocks, each, search)
        scales = decode(codes_of_scale, E4M3) * each
    quotient = blocks / scales[:, None]
    codes = encode(quotient, E2M1)
    codes &= np.where(quotient < 0, 15, 7).astype(np.uint8)  # -0 loses its sign, as in ModelOpt
    return BlockScaledTensor(
        fmt,
        x.shape,
        pack_nibbles(codes.reshape(x.shape)),
        codes_of_scale.reshape(fmt.scale_shape(x.shape)),
        top,
    )


def check_search(fmt: BlockFormat, search: str) -> None:
    """Raise FormatError if `search` is unknown or means nothing for fmt."""
    if search not in SEARCHES:
        raise FormatError(f"unknown scale search {search!r}: choose one of {', '.join(SEARCHES)}")
    if search == "four-six" and fmt is MXFP4:
        raise FormatError(
            "four-six chooses between two E4M3 scales, and MXFP4 scales are powers of two: "
            "use absmax or mse"
        )


def nvfp4_scale_codes(blocks: F32Array, top: F32Array, search: Search) -> U8Array:
    """E4M3 scale codes of blocks [B, 16] under tensor scales top [B]."""
    magnitude = np.abs(blocks)
    amax = magnitude.max(axis=1)
    if search == "absmax":
        ratio = amax / (np.float32(6) * top)
        codes = encode(np.clip(ratio, E4M3.min, E4M3.max).astype(np.float32), E4M3)
        return np.where(ratio > 0, codes, np.uint8(_ZERO_BLOCK)).astype(np.uint8)
    x = (magnitude / top[:, None]).astype(np.float32)
    amax = x.max(axis=1)
    if search == "four-six":
        six, four = (
            encode(np.clip(amax / np.float32(m), E4M3.min, E4M3.max).astype(np.float32), E4M3)
            for m in (6, 4)
        )
        worse = block_error(x, decode(four, E4M3)) < block_error(x, decode(six, E4M3))
        codes = np.where(worse, four, six)
    else:
        codes = np.zeros(len(x), dtype=np.uint8)
        best = np.full(len(x), np.inf, dtype=np.float32)
        for code in range(1, 127):
            error = block_error(x, decode(np.full(len(x), code, dtype=np.uint8), E4M3))
            codes[error < best] = code
            best = np.minimum(best, error)
    return np.where(amax > 0, codes, np.uint8(_ZERO_BLOCK)).astype(np.uint8)


def block_error(x: F32Array, s: F32Array) -> F32Array:
    """Squared error [B] of magnitudes x [B, block] at scales s [B]: a float32 sum, in order."""
    reciprocal = np.float32(1) / s
    total = np.zeros(len(x), dtype=np.float32)
    for i in range(x.shape[1]):
        value = decode(encode(x[:, i] * reciprocal, E2M1), E2M1)
        d = x[:, i] - s * value  # the product is exact: at most 4 + 2 significant bits
        total += d * d
    return total


def _mx_scale(blocks: F32Array, search: Search) -> U8Array:
    """E8M0 exponent fields of MXFP4 blocks [B, 32].

    absmax: floor(log2(amax, rounded up to a power of two from mantissa 1.75 on)) - 2, the rule of
    compressed-tensors, the container for MXFP4. mse: the best of all, in units of a block's first.
    """
    magnitude = np.abs(blocks)
    amax = magnitude.max(axis=1)
    field = ((amax.view(np.uint32) + np.uint32(0x00200000)) >> 23).astype(np.int64) - 2
    field = np.clip(field, 1, _MX_MAX)
    if search == "mse":
        top = np.minimum(field + 1, _MX_MAX)
        x = magnitude * np.ldexp(np.float32(1), 127 - top).astype(np.float32)[:, None]
        best = np.full(len(x), np.inf, dtype=np.float32)
        # Three octaves below the top the largest element is clipped to an eighth: never the best.
        for step in range(8):
            code = np.maximum(top - step, 1)
            error = block_error(x, np.ldexp(np.float32(1), code - top).astype(np.float32))
            field = np.where(error <= best, code, field)
            best = np.minimum(best, error)
    return np.where(amax > 0, field, _MX_ZERO_BLOCK).astype(np.uint8)


def _quantize_fp8(
    x: F32Array, fmt: BlockFormat, search: Search, scale: F32Array | None, *, bf16_quotient: bool
) -> BlockScaledTensor:
    if scale is None:
        scale = tensor_scale(block_amax(x, fmt), fmt, search)
    quotient = x / expand(scale, fmt, x.shape)
    if fmt is FP8 and search == "absmax" and bf16_quotient:
        # ModelOpt divides a BF16 weight by a 0-d scale, and torch rounds that quotient to BF16.
        quotient = quotient.astype(ml_dtypes.bfloat16).astype(np.float32)
    return BlockScaledTensor(fmt, x.shape, encode(quotient, E4M3), scale, None)


def block_amax(x: F32Array, fmt: BlockFormat) -> F32Array:
    """Largest magnitude of each block of x [..., N, K], ragged edges too: `fmt.scale_shape`."""
    n, k = x.shape[-2:]
    rows, columns = (size or whole for size, whole in zip(fmt.block, (n, k), strict=True))
    magnitude = np.abs(x)
    by_rows = np.maximum.reduceat(magnitude, np.arange(0, n, rows), axis=-2)
    return np.maximum.reduceat(by_rows, np.arange(0, k, columns), axis=-1)
