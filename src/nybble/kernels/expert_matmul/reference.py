"""The definition of an expert matmul: each expert's rows times its own weights, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.block_matmul.reference import product, round_input
from nybble.kernels.compute import Compute
from nybble.kernels.expert_matmul import PreparedExperts


def expert_matmul(x: Tensor, counts: Tensor, weight: PreparedExperts, compute: Compute) -> Tensor:
    """See the package."""
    rows = torch.split(x, counts.tolist())
    y = torch.empty((len(x), weight.n), dtype=torch.float32)
    parts = torch.split(y, counts.tolist())
    for mine, members, out in zip(rows, weight.experts, parts, strict=True):
        if len(mine):
            products = [
                product(round_input(mine, compute.precision, member), member) for member in members
            ]
            torch.cat(products, dim=1, out=out)
    return y
