"""The C kernels of rows.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.build import loaded
from nybble.kernels.compute import Compute

_ACTIVATIONS = {"silu": 1, "sigmoid": 2}  # the enum of rows.c
_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_Argument = type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float | ctypes.c_int]
_SIGNATURES: dict[str, list[_Argument]] = {
    "nyb_rms_norm": [_P, _P, _P, _P, _N, _N, _F, _F, _I, _I, _I],
    "nyb_rotary": [_P, _P, _P, _N, _N, _N, _N, _I, _I],
    "nyb_silu_mul": [_P, _P, _N, _N, _I, _I],
    "nyb_sigmoid_mul": [_P, _P, _P, _N, _N, _I, _I],
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, compute: Compute) -> Tensor:
    """See the package."""
    return _norm(x, None, weight, eps, offset, 0, compute)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str, compute: Compute
) -> Tensor:
    """See the package."""
    return _norm(x, z, weight, eps, 0.0, _ACTIVATIONS[activation], compute)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, compute: Compute) -> None:
    """See the package."""
    _function("nyb_rotary")(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape, cos.shape[1], *_how(compute)
    )


def silu_mul(x: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty((rows, width), dtype=torch.float32)
    _function("nyb_silu_mul")(x.data_ptr(), y.data_ptr(), rows, width, *_how(compute))
    return y


def sigmoid_mul(x: Tensor, gate: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    y = torch.empty(x.shape, dtype=torch.float32)
    rows, width = _rows(x)
    _function("nyb_sigmoid_mul")(
        x.data_ptr(), gate.data_ptr(), y.data_ptr(), rows, width, *_how(compute)
    )
    return y


def _norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    activation: int,
    compute: Compute,
) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.float32)
    rows, width = _rows(x)
    _function("nyb_rms_norm")(
        x.data_ptr(),
        None if z is None else z.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        rows,
        width,
        eps,
        offset,
        activation,
        *_how(compute),
    )
    return y


def _rows(x: Tensor) -> tuple[int, int]:
    """A tensor as rows of its last dimension."""
    width = x.shape[-1] if x.ndim else 1
    return x.numel() // width if width else 0, width


def _how(compute: Compute) -> tuple[int, int]:
    return dispatch.isa_level(), compute.threads


@lru_cache(maxsize=len(_SIGNATURES))
def _function(name: str) -> ctypes._NamedFuncPointer:
    library = loaded()
    function: ctypes._NamedFuncPointer = getattr(library, name)
    function.restype = None
    function.argtypes = _SIGNATURES[name]
    return function
