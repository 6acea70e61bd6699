"""Rows of a block format as BF16: what plain weights of a quantized checkpoint are.

Knows a `BlockScaledTensor` of two dimensions and the bits of BF16; refuses to know names and files.
`reference.py` is the definition, `cpu.py` calls the C kernels; both give the same bits.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import dispatch

U16Array = NDArray[np.uint16]


def decode_bf16(part: BlockScaledTensor, out: U16Array) -> None:
    """Fill `out`, contiguous uint16 [N, K], with the nearest BF16 number of each value of `part`.

    Ties go to even; every NaN is 0x7FC0. Works on the calling thread alone, with the interpreter
    lock released. Raises FormatError for shapes that do not agree.
    """
    fmt, shape = part.format, part.shape
    fmt.check_shape(shape, "decode_bf16")
    found = (part.codes.shape, part.scale.shape, out.shape)
    expected = (fmt.codes_shape(shape), fmt.scale_shape(shape), shape)
    if len(shape) != 2 or found != expected:
        raise FormatError(
            f"decode_bf16: codes, scales and output of {fmt} {list(shape)} are {found}, expected "
            f"{expected}"
        )
    if fmt.has_tensor_scale and (part.tensor_scale is None or part.tensor_scale.size != 1):
        raise FormatError(f"decode_bf16: {fmt} needs one tensor scale")
    if out.dtype != np.uint16 or not out.flags.c_contiguous or not out.flags.writeable:
        raise FormatError(f"decode_bf16: the output must be contiguous uint16, is {out.dtype}")
    _backend().decode_bf16(part, out)


def _backend() -> ModuleType:
    if dispatch.choose().backend == "cpu":
        from nybble.kernels.block_decode import cpu

        return cpu
    from nybble.kernels.block_decode import reference

    return reference
