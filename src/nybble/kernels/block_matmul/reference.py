"""The definition of a matmul with block-scaled weights, in PyTorch and float32.

y = (x Q^T) * t + b, where Q = code * block scale and t is the tensor scale (of NVFP4) or the scale
of a tensor or channel (of FP8). Only x is rounded, to BF16, and only if the precision says so.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nybble.formats.block import FP8, FP8_CHANNEL
from nybble.formats.element import F32, F32Array, decode
from nybble.formats.tensor import BlockScaledTensor, expand
from nybble.kernels.block_matmul import Prepared
from nybble.kernels.block_matmul.segments import Weight
from nybble.kernels.compute import Compute, Precision


def matmul(x: Tensor, weight: Prepared, compute: Compute) -> Tensor:
    """See the package."""
    rounded = round_input(x, compute.precision)
    parts = []
    for member, bias in zip(weight.weights, weight.biases, strict=True):
        y = product(rounded, member)
        parts.append(y if bias is None else y + torch.from_numpy(bias.copy()))
    return torch.cat(parts, dim=1)


def round_input(x: Tensor, precision: Precision) -> Tensor:
    """x as the kernel multiplies it, float32."""
    return (x.bfloat16() if precision == "bf16" else x).float()


def product(x: Tensor, weight: Weight) -> Tensor:
    """x [M, K] times the transpose of one weight [N, K], float32 [M, N]."""
    if not isinstance(weight, BlockScaledTensor):
        return x @ torch.from_numpy(weight.astype(np.float32)).T
    values, top = split(weight)
    return (x @ torch.from_numpy(values).T) * torch.from_numpy(top)


def split(weight: BlockScaledTensor) -> tuple[F32Array, F32Array]:
    """What is summed, float32 [N, K], and what multiplies the sums, float32 [1] or [N]."""
    fmt = weight.format
    if fmt in (FP8, FP8_CHANNEL):
        return weight.code_values(), np.array(weight.scale, dtype=np.float32).reshape(-1)
    scale = np.asarray(weight.scale)
    block = scale.view(np.float32) if fmt.scale is F32 else decode(scale.view(np.uint8), fmt.scale)
    with np.errstate(over="ignore", invalid="ignore"):
        values = weight.code_values() * expand(block, fmt, weight.shape)
    top = weight.tensor_scale
    one = np.ones(1, dtype=np.float32)
    return values, one if top is None else np.array(top, dtype=np.float32).reshape(-1)
