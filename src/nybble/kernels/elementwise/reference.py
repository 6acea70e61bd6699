"""The definitions in plain PyTorch, float32."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import silu

from nybble.kernels.compute import Compute


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None, compute: Compute
) -> Tensor:
    """See the package. `compute` changes nothing here, nor below."""
    found = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight)
    return found if out is None else out.copy_(found)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str, compute: Compute
) -> Tensor:
    """See the package."""
    gate = silu(z) if activation == "silu" else z.sigmoid()
    return rms_norm(x, weight, eps, 0.0, None, compute) * gate


def rotary(x: Tensor, cos: Tensor, sin: Tensor, compute: Compute) -> None:
    """See the package."""
    half = cos.shape[1]
    first, second = x[..., :half].clone(), x[..., half : 2 * half].clone()
    x[..., :half] = first * cos[:, None] - second * sin[:, None]
    x[..., half : 2 * half] = second * cos[:, None] + first * sin[:, None]


def silu_mul(x: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    gate, up = x.chunk(2, dim=1)
    return silu(gate) * up


def sigmoid_mul(x: Tensor, gate: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    return x * gate.sigmoid()


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, compute: Compute
) -> tuple[Tensor, Tensor]:
    """See the package."""
    return x + y, rms_norm(x + y, weight, eps, offset, None, compute)


def add(x: Tensor, y: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    return x + y


def look_up(table: NDArray[np.generic], index: Tensor, compute: Compute) -> Tensor:
    """See the package."""
    return torch.from_numpy(table[index.numpy()].astype(np.float32))
