"""The C kernels of delta.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from nybble.errors import DoesNotFit
from nybble.kernels import dispatch
from nybble.kernels.build import loaded
from nybble.kernels.compute import Compute
from nybble.kernels.gated_delta import Heads

_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_Argument = type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float | ctypes.c_int]
_SIGNATURES: dict[str, list[_Argument]] = {
    "nyb_causal_conv": [_P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _I, _I],
    "nyb_decay": [_P, _P, _P, _P, _P, _P, _N, _N, _I],
    "nyb_gated_delta": [_P, _P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _I, _I, _I],
}


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    compute: Compute,
) -> Tensor:
    """See the package."""
    y = torch.empty(x.shape, dtype=torch.float32)
    _function("nyb_causal_conv")(
        *(t.data_ptr() for t in (x, weight, state, starts, lengths, slots, y)),
        len(lengths),
        *weight.shape,
        *_how(compute),
    )
    return y


def decay(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """See the package."""
    g, beta = torch.empty(a.shape, dtype=torch.float32), torch.empty(a.shape, dtype=torch.float32)
    _function("nyb_decay")(
        *(t.data_ptr() for t in (a, b, a_log, dt_bias, g, beta)),
        *a.shape,
        dispatch.isa_level(),
    )
    return g, beta


def gated_delta(
    mixed: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    heads: Heads,
    is_recurrent: bool,
    compute: Compute,
) -> Tensor:
    """See the package."""
    out = torch.empty((len(mixed), heads.value_heads, heads.value_dim), dtype=torch.float32)
    failed = _function("nyb_gated_delta")(
        *(t.data_ptr() for t in (mixed, g, beta, state, starts, lengths, slots, out)),
        len(lengths),
        heads.key_heads,
        heads.value_heads,
        heads.key_dim,
        heads.value_dim,
        is_recurrent,
        *_how(compute),
    )
    if failed:
        raise DoesNotFit(f"gated delta: no memory for the scratch of {compute.threads} threads")
    return out


def _how(compute: Compute) -> tuple[int, int]:
    return dispatch.isa_level(), compute.threads


@lru_cache(maxsize=len(_SIGNATURES))
def _function(name: str) -> ctypes._NamedFuncPointer:
    library = loaded()
    function: ctypes._NamedFuncPointer = getattr(library, name)
    function.restype = _I if name == "nyb_gated_delta" else None
    function.argtypes = _SIGNATURES[name]
    return function
