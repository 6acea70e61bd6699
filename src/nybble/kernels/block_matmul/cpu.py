"""The C kernels of matmul.c, called or recorded: weights in place, interpreter lock released."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.block_matmul import Prepared
from nybble.kernels.block_matmul.segments import Table
from nybble.kernels.calls import Kernel, empty
from nybble.kernels.compute import Compute, Precision

# segments, first, counts, groups; x, its row stride, if BF16, M, K; y, N; precision, isa, threads
_MATMUL = Kernel(
    "nyb_matmul", "pppnpnitnpniii", fails="a matmul: no memory for the packed rows of its input"
)
#: The enum of matmul.h.
_PRECISIONS: dict[Precision, int] = {"f32": 0, "bf16": 1, "int8": 2}


def matmul(x: Tensor, weight: Prepared, compute: Compute, isa: int) -> Tensor:
    """See the package; isa is a level of isa.h."""
    return run(x, weight.table, None, 1, weight.n, compute, isa)


def run(
    x: Tensor, table: Table, counts: int | None, groups: int, n: int, compute: Compute, isa: int
) -> Tensor:
    """x [M, K] through the groups of a table, the next of `counts` rows through each.

    `counts` is the address of int64 [groups]; None: all rows go through the one group. Returns
    float32 [M, N]. Raises DoesNotFit.
    """
    m, k = x.shape
    y = empty(compute, (m, n))
    _MATMUL(
        compute,
        table.segments_at,
        table.first_at,
        counts,
        groups,
        x.data_ptr(),
        x.stride(0),
        x.dtype == torch.bfloat16,
        m,
        k,
        y.data_ptr(),
        n,
        _PRECISIONS[compute.precision],
        isa,
        compute.threads,
    )
    return y
