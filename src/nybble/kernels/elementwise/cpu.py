"""The C kernels of rows.c and lookup.c: no copies, the interpreter lock released."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.calls import Kernel, empty
from nybble.kernels.compute import Compute

_ACTIVATIONS = {"silu": 1, "sigmoid": 2}  # the enum of rows.c
_DTYPES = {  # the enum of lookup.c
    np.dtype(np.float32): 0,
    np.dtype(ml_dtypes.bfloat16): 1,
    np.dtype(np.float16): 2,
}
_RMS_NORM = Kernel("nyb_rms_norm", "pnnpnnppntnnffiii")
_ADD_NORM = Kernel("nyb_add_norm", "ppppptnffii")
_ROTARY = Kernel("nyb_rotary", "pnnpptnnii")
_SILU_MUL = Kernel("nyb_silu_mul", "pptnii")
_SIGMOID_MUL = Kernel("nyb_sigmoid_mul", "pnnpnnptnnii")
_LOOK_UP = Kernel("nyb_look_up", "pnipptni")

_Place = tuple[int | None, int, int]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None, compute: Compute
) -> Tensor:
    """See the package."""
    y = empty(compute, x.shape) if out is None else out
    return _norm(x, (None, 0, 0), weight, eps, offset, 0, y, compute)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str, compute: Compute
) -> Tensor:
    """See the package."""
    y = empty(compute, x.shape)
    return _norm(x, _place(z), weight, eps, 0.0, _ACTIVATIONS[activation], y, compute)


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, compute: Compute
) -> tuple[Tensor, Tensor]:
    """See the package."""
    total, normed = empty(compute, x.shape), empty(compute, x.shape)
    places = (t.data_ptr() for t in (x, y, weight, total, normed))
    _ADD_NORM(compute, *places, *x.shape, eps, offset, *_how(compute))
    return total, normed


def add(x: Tensor, y: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    total = empty(compute, x.shape)
    places = (x.data_ptr(), y.data_ptr(), None, total.data_ptr(), None)
    _ADD_NORM(compute, *places, *x.shape, 0.0, 0.0, *_how(compute))
    return total


def rotary(x: Tensor, cos: Tensor, sin: Tensor, compute: Compute) -> None:
    """See the package."""
    tokens, heads, _ = x.shape
    tables = (cos.data_ptr(), sin.data_ptr())
    _ROTARY(compute, *_place(x), *tables, tokens, heads, cos.shape[1], *_how(compute))


def silu_mul(x: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = empty(compute, (rows, width))
    _SILU_MUL(compute, x.data_ptr(), y.data_ptr(), rows, width, *_how(compute))
    return y


def sigmoid_mul(x: Tensor, gate: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    y = empty(compute, x.shape)
    _SIGMOID_MUL(compute, *_place(x), *_place(gate), y.data_ptr(), *_sizes(x), *_how(compute))
    return y


def look_up(table: NDArray[np.generic], index: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    y = empty(compute, (len(index), table.shape[1]))
    _LOOK_UP(
        compute,
        table.__array_interface__["data"][0],
        table.strides[0],
        _DTYPES[table.dtype],
        index.data_ptr(),
        y.data_ptr(),
        *y.shape,
        compute.threads,
    )
    return y


def _norm(
    x: Tensor,
    z: _Place,
    weight: Tensor,
    eps: float,
    offset: float,
    activation: int,
    y: Tensor,
    compute: Compute,
) -> Tensor:
    _RMS_NORM(
        compute,
        *_place(x),
        *z,
        weight.data_ptr(),
        *_place(y)[:2],
        *_sizes(x),
        eps,
        offset,
        activation,
        *_how(compute),
    )
    return y


def _place(x: Tensor) -> _Place:
    """The address of rows, and how far apart tokens and heads lie."""
    if x.ndim == 3:
        return x.data_ptr(), x.stride(0), x.stride(1)
    return x.data_ptr(), x.stride(0) if x.ndim == 2 else 0, 0


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Tokens, heads, width."""
    if x.ndim == 3:
        return x.shape[0], x.shape[1], x.shape[2]
    return (x.shape[0], 1, x.shape[1]) if x.ndim == 2 else (1, 1, x.shape[0])


def _how(compute: Compute) -> tuple[int, int]:
    return dispatch.isa_level(), compute.threads
