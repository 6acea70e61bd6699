"""What happens between the matrix products: norms, rotary embedding, gated products.

Everything is float32, contiguous, and on the CPU. A row's result is the same bits whatever its
neighbours and the number of threads. Knows nothing of layers, positions or caches. `reference.py`
is the definition, `cpu.py` calls the C kernels.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Literal

from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.tensors import check_tensor

Activation = Literal["silu", "sigmoid"]
ACTIVATIONS = ("silu", "sigmoid")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, compute: Compute) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, H: x's shape.

    weight is [H]; offset is 1 for zero-centred weights, else 0 (spec: RMSNorm, arXiv 1910.07467).
    Raises EngineError for other shapes or dtypes.
    """
    check_tensor(x, "rms_norm", "x", tuple(x.shape))
    check_tensor(weight, "rms_norm", "weight", tuple(x.shape[-1:]))
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
    check_tensor(x, "gated_rms_norm", "x", tuple(x.shape))
    flat = (x.shape[0], x.shape[1] * x.shape[2])
    check_tensor(z, "gated_rms_norm", "z", flat if z.ndim == 2 else tuple(x.shape))
    check_tensor(weight, "gated_rms_norm", "weight", tuple(x.shape[-1:]))
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
    check_tensor(x, "rotary", "x", tuple(x.shape))
    check_tensor(cos, "rotary", "cos", (x.shape[0], half))
    check_tensor(sin, "rotary", "sin", (x.shape[0], half))
    _backend().rotary(x, cos, sin, compute)


def silu_mul(x: Tensor, compute: Compute) -> Tensor:
    """silu(first half) * second half of each row: x [M, 2 I] -> [M, I].

    Raises EngineError for other shapes or dtypes.
    """
    if x.ndim != 2 or x.shape[1] % 2:
        raise EngineError(f"silu_mul: x must be [M, 2 I], found {list(x.shape)}")
    check_tensor(x, "silu_mul", "x", tuple(x.shape))
    return _backend().silu_mul(x, compute)  # type: ignore[no-any-return]


def sigmoid_mul(x: Tensor, gate: Tensor, compute: Compute) -> Tensor:
    """x * sigmoid(gate), elementwise; both of one shape. Raises EngineError otherwise."""
    check_tensor(x, "sigmoid_mul", "x", tuple(x.shape))
    check_tensor(gate, "sigmoid_mul", "gate", tuple(x.shape))
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
