"""The definition in `formats.tensor`, rounded to BF16: what the kernels are tested against."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels.block_decode import U16Array

_ELEMENTS = 1 << 20  # at a time: numpy's temporaries stay small


def decode_bf16(part: BlockScaledTensor, out: U16Array) -> None:
    """See the package."""
    n, k = part.shape
    height = part.format.block[0] or n
    step = max(1, _ELEMENTS // k // height) * height
    for first in range(0, n, step):
        last = min(first + step, n)
        scale = part.scale[first // height : -(-last // height)]
        codes = part.codes[first:last]
        rows = BlockScaledTensor(part.format, (last - first, k), codes, scale, part.tensor_scale)
        values = rows.dequantize()
        with np.errstate(over="ignore", invalid="ignore"):
            bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        out[first:last] = np.where(np.isnan(values), np.uint16(0x7FC0), bits)
