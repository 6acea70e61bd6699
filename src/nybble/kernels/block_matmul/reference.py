"""The definition of a matmul with block-scaled weights, in PyTorch and float32.

y = (x Q^T) * t + b, where Q = code * block scale and t is the tensor scale (of NVFP4) or the scale
of a tensor or channel (of FP8). Only x is rounded, and only as the precision says: to BF16, or for
four-bit weights to INT8.
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

#: Of an INT8 block: below, float32 has no room for the scale times that of a block of the weight.
SMALLEST_SCALE = 2.0**-120


def matmul(x: Tensor, weight: Prepared, compute: Compute) -> Tensor:
    """See the package."""
    parts = []
    for member, bias in zip(weight.weights, weight.biases, strict=True):
        y = product(round_input(x, compute.precision, member), member)
        parts.append(y if bias is None else y + torch.from_numpy(bias.copy()))
    return torch.cat(parts, dim=1)


def round_input(x: Tensor, precision: Precision, weight: Weight) -> Tensor:
    """x as the kernel multiplies it with this weight, float32."""
    if precision == "f32":
        return x.float()
    is_packed = isinstance(weight, BlockScaledTensor) and weight.format.is_packed
    return round_int8(x) if precision == "int8" and is_packed else x.bfloat16().float()


def round_int8(x: Tensor) -> Tensor:
    """x [M, K] rounded to INT8 with a scale for each 16 elements of K: float32 [M, K].

    The scale is the largest magnitude / 127, and a value becomes the nearest integer to its product
    with 1 / scale, ties to even. A block whose scale is below 2^-120 becomes zeros; one that is not
    finite becomes NaN.
    """
    blocks = x.float().reshape(len(x), x.shape[1] // 16, 16)
    most = blocks.abs().amax(dim=2, keepdim=True)
    scale = most / 127
    is_used = (scale >= SMALLEST_SCALE) & most.isfinite()
    integers = torch.round(blocks * torch.where(is_used, 1 / scale, 0))
    rounded = torch.where(is_used, integers * scale, 0)
    return torch.where(most.isfinite(), rounded, torch.nan).flatten(1)


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
