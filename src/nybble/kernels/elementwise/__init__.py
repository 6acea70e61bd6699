"""What happens between the matrix products: norms, sums, rotary embedding, gates, look-ups.

Everything is float32 and on the CPU; rows of the last dimension are contiguous, and may be parts of
wider ones where a function says "strided". A row's result is the same bits whatever its neighbours
and the number of threads. Knows nothing of layers, positions or caches. `reference.py` is the
definition, `cpu.py` calls the C kernels.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Literal

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.tensors import check_rows, check_tensor

Activation = Literal["silu", "sigmoid"]
ACTIVATIONS = ("silu", "sigmoid")
_TABLES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float,
    out: Tensor | None = None,
    compute: Compute,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, H: x's shape.

    x is [T, heads, H] or [T, H], strided; weight is [H]; offset is 1 for zero-centred weights, else
    0 (spec: RMSNorm, arXiv 1910.07467). With `out`, strided as x, which is [T, H] then, the
    result goes there. Raises EngineError for other shapes or dtypes.
    """
    check_rows(x, "rms_norm", "x", tuple(x.shape))
    check_tensor(weight, "rms_norm", "weight", tuple(x.shape[-1:]))
    if out is not None:
        if x.ndim != 2:
            raise EngineError(f"rms_norm: with out, x must be [T, H], found {list(x.shape)}")
        check_rows(out, "rms_norm", "out", tuple(x.shape))
    return _backend().rms_norm(x, weight, eps, offset, out, compute)  # type: ignore[no-any-return]


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, *, activation: Activation, compute: Compute
) -> Tensor:
    """rms_norm(x) * weight * activation(z), the norm first: x [T, Hv, Dv] -> [T, Hv, Dv].

    z is [T, Hv, Dv], or [T, Hv * Dv], strided, weight [Dv], shared by heads. Raises EngineError for
    other shapes or dtypes, and for another activation.
    """
    if activation not in ACTIVATIONS:
        raise EngineError(
            f"gated_rms_norm: activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if x.ndim != 3:
        raise EngineError(f"gated_rms_norm: x must be [T, Hv, Dv], found {list(x.shape)}")
    check_rows(x, "gated_rms_norm", "x", tuple(x.shape))
    if z.ndim == 2:
        check_rows(z, "gated_rms_norm", "z", (x.shape[0], x.shape[1] * x.shape[2]))
        z = z.view(x.shape)
    check_rows(z, "gated_rms_norm", "z", tuple(x.shape))
    check_tensor(weight, "gated_rms_norm", "weight", tuple(x.shape[-1:]))
    return _backend().gated_rms_norm(x, z, weight, eps, activation, compute)  # type: ignore[no-any-return]


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, *, offset: float, compute: Compute
) -> tuple[Tensor, Tensor]:
    """(x + y, rms_norm of it), both [T, H]: a residual and what the next half of a layer reads.

    x and y are [T, H], contiguous. Raises EngineError for other shapes or dtypes.
    """
    _check_sum(x, y)
    check_tensor(weight, "add_norm", "weight", tuple(x.shape[-1:]))
    return _backend().add_norm(x, y, weight, eps, offset, compute)  # type: ignore[no-any-return]


def add(x: Tensor, y: Tensor, compute: Compute) -> Tensor:
    """x + y, [T, H], contiguous. Raises EngineError for other shapes or dtypes."""
    _check_sum(x, y)
    return _backend().add(x, y, compute)  # type: ignore[no-any-return]


def rotary(x: Tensor, cos: Tensor, sin: Tensor, compute: Compute) -> None:
    """Rotate pairs (j, j + R/2) of the first R dims of each head, in place: x [T, heads, D],
    strided.

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
    check_rows(x, "rotary", "x", tuple(x.shape))
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
    """x * sigmoid(gate), elementwise; both [T, heads, D] or [T, H], strided: x's shape, contiguous.

    Raises EngineError for other shapes or dtypes.
    """
    check_rows(x, "sigmoid_mul", "x", tuple(x.shape))
    check_rows(gate, "sigmoid_mul", "gate", tuple(x.shape))
    return _backend().sigmoid_mul(x, gate, compute)  # type: ignore[no-any-return]


def look_up(table: NDArray[np.generic], index: Tensor, compute: Compute) -> Tensor:
    """Rows of a table [V, H] (BF16, F16 or F32; a view of a file) as float32 [T, H].

    index is int64 [T] from 0 to V - 1. Raises EngineError for other shapes or dtypes, and, unless
    the call is recorded, for an index outside.
    """
    if table.ndim != 2 or table.dtype not in _TABLES or table.strides[1] != table.itemsize:
        raise EngineError(
            f"look_up: expected a table [V, H] of BF16, F16 or F32 with contiguous rows, found "
            f"{table.dtype} {list(table.shape)}"
        )
    check_tensor(index, "look_up", "index", (len(index),), torch.int64)
    if compute.program is None and len(index):
        low, high = int(index.min()), int(index.max())
        if not 0 <= low <= high < len(table):
            raise EngineError(f"look_up: rows {low} to {high} of a table of {len(table)}")
    return _backend().look_up(table, index, compute)  # type: ignore[no-any-return]


def _check_sum(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2:
        raise EngineError(f"add: x must be [T, H], found {list(x.shape)}")
    check_tensor(x, "add", "x", tuple(x.shape))
    check_tensor(y, "add", "y", tuple(x.shape))


def _backend() -> ModuleType:
    return _load(dispatch.choose().backend)


@lru_cache(maxsize=2)  # an import statement costs more than some of these kernels
def _load(backend: str) -> ModuleType:
    if backend == "cpu":
        from nybble.kernels.elementwise import cpu

        return cpu
    from nybble.kernels.elementwise import reference

    return reference
