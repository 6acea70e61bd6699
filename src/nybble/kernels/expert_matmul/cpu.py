"""The kernels of block_matmul/matmul.c with one group of weights per expert."""

from __future__ import annotations

from torch import Tensor

from nybble.kernels.block_matmul.cpu import run
from nybble.kernels.compute import Compute
from nybble.kernels.expert_matmul import PreparedExperts


def expert_matmul(
    x: Tensor, counts: Tensor, weight: PreparedExperts, compute: Compute, isa: int
) -> Tensor:
    """See the package."""
    experts = len(weight.experts)
    return run(x, weight.table, counts.data_ptr(), experts, weight.n, compute, isa)
