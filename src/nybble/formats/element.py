"""Element formats: what one code is. Knows nothing of blocks, tensors or files.

E2M1 (four bits, two per byte), E4M3 and E5M2 (OCP FP8, the `fn` and IEEE-like kinds), E8M0 (a power
of two), F32. Source: OCP Microscaling Formats (MX) v1.0, sections 5.1-5.4; OCP FP8 specification.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]

#: Magnitude of E2M1 code & 7; bit 3 is the sign.
E2M1_VALUES: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class ElementFormat:
    """One code: `bits` wide, largest finite magnitude `max`, smallest positive `min`."""

    name: str
    bits: int
    max: float
    min: float
    dtype: np.dtype[np.generic] | None  # the numpy storage type; None where codes are packed

    def __reduce__(self) -> str:
        return self.name.upper()  # formats are compared by identity: another process takes its own

    def __str__(self) -> str:
        return self.name


E2M1 = ElementFormat("e2m1", 4, 6.0, 0.5, None)
E4M3 = ElementFormat("e4m3", 8, 448.0, 2.0**-9, np.dtype(ml_dtypes.float8_e4m3fn))
E5M2 = ElementFormat("e5m2", 8, 57344.0, 2.0**-16, np.dtype(ml_dtypes.float8_e5m2))
E8M0 = ElementFormat("e8m0", 8, 2.0**127, 2.0**-127, np.dtype(ml_dtypes.float8_e8m0fnu))
F32 = ElementFormat("f32", 32, float(np.finfo(np.float32).max), 2.0**-149, np.dtype(np.float32))

_E2M1_TABLE = np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=np.float32)
_E2M1_TABLE[8] = -0.0
# An E2M1 code is the number of thresholds below the magnitude. They lie halfway between neighbours;
# a tie goes to the even code, so where that is the upper one the threshold is one float lower.
_E2M1_THRESHOLDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float32)
_E2M1_THRESHOLDS[1::2] = np.nextafter(_E2M1_THRESHOLDS[1::2], np.float32(0))


def encode(x: F32Array, fmt: ElementFormat) -> U8Array:
    """Round x to the nearest value of fmt, ties to the even code, saturating; one code per byte.

    Zeros keep their sign where the format has one. x must be finite. E8M0 takes positive values and
    rounds to the nearest power of two, at a tie to the larger.
    """
    codes: U8Array
    if fmt is E2M1:
        below = np.searchsorted(_E2M1_THRESHOLDS, np.abs(x))
        codes = (below + 8 * np.signbit(x)).astype(np.uint8)
    elif fmt is E8M0:
        mantissa, exponent = np.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
        codes = np.clip(exponent - (mantissa < 0.75) + 127, 0, 254).astype(np.uint8)
    elif fmt.dtype is None or fmt is F32:
        raise TypeError(f"{fmt} has no byte codes")
    else:
        codes = np.clip(x, -fmt.max, fmt.max).astype(fmt.dtype).view(np.uint8)
    return codes


def decode(codes: U8Array, fmt: ElementFormat) -> F32Array:
    """The float32 values of byte codes (one code per byte; E2M1 codes in the low nibble)."""
    if fmt is E2M1:
        values: F32Array = _E2M1_TABLE[codes & 15]
        return values
    if fmt.dtype is None or fmt is F32:
        raise TypeError(f"{fmt} has no byte codes")
    return codes.view(fmt.dtype).astype(np.float32)


def pack_nibbles(codes: U8Array) -> U8Array:
    """Pack codes [..., K] into bytes [..., K // 2]: 2j in the low nibble, 2j + 1 in the high."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def unpack_nibbles(packed: U8Array) -> U8Array:
    """Undo `pack_nibbles`: bytes [..., K // 2] into 4-bit codes [..., K]."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    out[..., 0::2] = packed & 15
    out[..., 1::2] = packed >> 4
    return out
