"""What happens between the matrix products: norms, rotary embedding, gated products.

Everything is float32, contiguous, and on the CPU. A row's result is the same bits whatever its
neighbours and the number of threads. Knows nothing of layers, positions or caches. `reference.py`
is the definition, `cpu.py` calls the C kernels.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute

Activation = Literal["silu", "sigmoid"]
ACTIVATIONS = ("silu", "sigmoid")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, compute: Compute) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, H: x's shape.

    weight is [H]; offset is 1 for zero-centred weights, else 0 (spec: RMSNorm, arXiv 1910.07467).
    Raises EngineError for other shapes or dtypes.
    """
    _check(x, "x", tuple(x.shape), "rms_norm")
    _check(weight, "weight", tuple(x.shape[-1:]), "rms_norm")
    return _backend().rms_norm(x, weight, eps, offset, compute)  # type: ignore[no-any-return]


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, *, activation: Activation, compute: Compute
) -> Tensor:
    """rms_norm(x) * weight * activation(z), the norm first: x [T, Hv, Dv] -> [T, Hv, Dv].

    z is [T, Hv, Dv] or [T, Hv * Dv], weight [Dv], shared by heads. Raises EngineError for other
    shapes or dtypes, and for another activation.
    """
    if activation not in ACTIVATIONS:
        raise EngineError(
            f"gated_rms_norm: activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if x.ndim != 3:
        raise EngineError(f"gated_rms_norm: x must be [T, Hv, Dv], found {list(x.shape)}")
    _check(x, "x", tuple(x.shape), "gated_rms_norm")
    flat = (x.shape[0], x.shape[1] * x.shape[2])
    _check(z, "z", flat if z.ndim == 2 else tuple(x.shape), "gated_rms_norm")
    _check(weight, "weight", tuple(x.shape[-1:]), "gated_rms_norm")
    return _backend().gated_rms_norm(  # type: ignore[no-any-return]
        x, z.reshape(x.shape), weight, eps, activation, compute
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor, compute: Compute) -> None:
    """Rotate pairs (j, j + R/2) of the first R dims of each head, in place: x [T, heads, D].

    cos and sin are [T, R/2] with R <= D; the dims from R on are left as they are. NeoX style
    (RoFormer, arXiv 2104.09864). Raises EngineError for other shapes or dtypes.
    """
    if x.ndim != 3 or cos.ndim != 2:
        raise EngineError(
            f"rotary: x must be [T, heads, D] and cos [T, R/2], found {list(x.shape)} and "
            f"{list(cos.shape)}"
        )
    half = cos.shape[1]
    if 2 * half > x.shape[2]:
        raise EngineError(f"rotary: {2 * half} rotated dims in heads of {x.shape[2]}")
    _check(x, "x", tuple(x.shape), "rotary")
    _check(cos, "cos", (x.shape[0], half), "rotary")
    _check(sin, "sin", (x.shape[0], half), "rotary")
    _backend().rotary(x, cos, sin, compute)


def silu_mul(x: Tensor, compute: Compute) -> Tensor:
    """silu(first half) * second half of each row: x [M, 2 I] -> [M, I].

    Raises EngineError for other shapes or dtypes.
    """
    if x.ndim != 2 or x.shape[1] % 2:
        raise EngineError(f"silu_mul: x must be [M, 2 I], found {list(x.shape)}")
    _check(x, "x", tuple(x.shape), "silu_mul")
    return _backend().silu_mul(x, compute)  # type: ignore[no-any-return]


def sigmoid_mul(x: Tensor, gate: Tensor, compute: Compute) -> Tensor:
    """x * sigmoid(gate), elementwise; both of one shape. Raises EngineError otherwise."""
    _check(x, "x", tuple(x.shape), "sigmoid_mul")
    _check(gate, "gate", tuple(x.shape), "sigmoid_mul")
    return _backend().sigmoid_mul(x, gate, compute)  # type: ignore[no-any-return]


def _backend() -> ModuleType:
    return _load(dispatch.choose().backend)


@lru_cache(maxsize=2)  # an import statement costs more than some of these kernels
def _load(backend: str) -> ModuleType:
    if backend == "cpu":
        from nybble.kernels.elementwise import cpu

        return cpu
    from nybble.kernels.elementwise import reference

    return reference


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], operation: str) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        raise EngineError(
            f"{operation}: {name} must be contiguous torch.float32 {list(shape)}, found "
            f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.device.type != "cpu":
        raise EngineError(f"{operation}: {name} must be on the CPU, found {tensor.device}")
