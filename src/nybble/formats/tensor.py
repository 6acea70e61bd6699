"""`BlockScaledTensor`: codes, scales and tensor scale of one weight, and what they decode to.

One convention everywhere: value = code * scale * tensor_scale. Divisors exist only inside files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.formats.block import BlockFormat, Shape
from nybble.formats.element import (
    F32,
    F32Array,
    U8Array,
    decode,
    unpack_nibbles,
)


@dataclass(frozen=True, slots=True)
class BlockScaledTensor:
    """A weight [..., N, K] in a block format.

    codes         uint8, `format.codes_shape(shape)`: two E2M1 codes per byte, or one FP8 code.
    scale         `format.scale_shape(shape)`: uint8 codes of an 8-bit scale format, or float32.
    tensor_scale  float32 [...], one per matrix, or None where the format has none.
    """

    format: BlockFormat
    shape: Shape
    codes: U8Array
    scale: U8Array | F32Array
    tensor_scale: F32Array | None

    def scales(self) -> F32Array:
        """The float32 product scale * tensor_scale, [..., rows of blocks, columns of blocks].

        In float32: exact for a power-of-two tensor scale, otherwise rounded once, as engines do.
        """
        scale = self.scale
        values = (
            scale.view(np.float32)
            if self.format.scale is F32
            else decode(scale.view(np.uint8), self.format.scale)
        )
        if self.tensor_scale is None:
            return values
        return values * self.tensor_scale[..., None, None]

    def dequantize(self) -> F32Array:
        """The float32 weight [..., N, K]; a file's NaN scales and overflows show as NaN and inf."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.code_values() * expand(self.scales(), self.format, self.shape)

    def code_values(self) -> F32Array:
        """The float32 values of the codes alone, [..., N, K]."""
        codes = unpack_nibbles(self.codes) if self.format.is_packed else self.codes
        return decode(codes, self.format.element)


def expand(scales: F32Array, fmt: BlockFormat, shape: Shape) -> F32Array:
    """Repeat one value per block to one per element, [..., N, K]; ragged edges cut."""
    n, k = shape[-2:]
    rows, columns = fmt.block
    if rows != 1:
        scales = np.repeat(scales, rows or n, axis=-2)[..., :n, :]
    return np.repeat(scales, columns or k, axis=-1)[..., :k]
