"""The C kernels of decode.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from nybble.formats.block import MXFP4
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import dispatch
from nybble.kernels.block_decode import U16Array
from nybble.kernels.build import loaded


def decode_bf16(part: BlockScaledTensor, out: U16Array) -> None:
    """See the package."""
    n, k = part.shape
    fmt, isa = part.format, ctypes.c_int(dispatch.isa_level())
    codes = np.ascontiguousarray(part.codes.view(np.uint8))
    if fmt.is_packed:
        top = 1.0 if part.tensor_scale is None else float(part.tensor_scale.reshape(()))
        packed = np.ascontiguousarray(part.scale.view(np.uint8))
        loaded().nyb_decode_packed(
            _pointer(codes),
            _pointer(packed),
            ctypes.c_float(top),
            ctypes.c_int64(n * k),
            ctypes.c_int(fmt is MXFP4),
            _pointer(out),
            isa,
        )
        return
    height, width = fmt.block
    scale = np.ascontiguousarray(part.scale, dtype=np.float32)
    loaded().nyb_decode_fp8(
        _pointer(codes),
        _pointer(scale),
        *(ctypes.c_int64(extent) for extent in (n, k, height or n, width or k)),
        _pointer(out),
        isa,
    )


def _pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(int(array.__array_interface__["data"][0]))
