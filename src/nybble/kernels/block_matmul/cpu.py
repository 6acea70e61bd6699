"""The C kernels of matmul.c through ctypes: weights in place, the interpreter lock released."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from nybble.errors import DoesNotFit
from nybble.kernels.block_matmul import Prepared
from nybble.kernels.block_matmul.segments import Table
from nybble.kernels.build import loaded
from nybble.kernels.compute import Compute

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def matmul(x: Tensor, weight: Prepared, compute: Compute, isa: int) -> Tensor:
    """See the package; isa is a level of isa.h."""
    return run(x, weight.table, _SIZE(x.shape[0]), 1, weight.n, compute, isa)


def run(
    x: Tensor,
    table: Table,
    counts: int | ctypes.c_int64,
    groups: int,
    n: int,
    compute: Compute,
    isa: int,
) -> Tensor:
    """x [M, K] through the groups of a table, the next of `counts` rows through each.

    `counts` is the address of int64 [groups], or the one count itself. Returns float32 [M, N].
    """
    m, k = x.shape
    y = torch.empty((m, n), dtype=torch.float32)
    failed = _function()(
        table.segments_at,
        table.first_at,
        counts if isinstance(counts, int) else ctypes.byref(counts),
        groups,
        x.data_ptr(),
        x.stride(0),
        x.dtype == torch.bfloat16,
        m,
        k,
        y.data_ptr(),
        n,
        compute.precision == "bf16",
        isa,
        compute.threads,
    )
    if failed:
        raise DoesNotFit(f"a matmul of {m} rows of {k} elements: no memory for the packed rows")
    return y


@lru_cache(maxsize=1)
def _function() -> ctypes._NamedFuncPointer:
    library = loaded()
    function = library.nyb_matmul
    function.restype = _INT
    function.argtypes = [
        _POINTER, _POINTER, _POINTER, _SIZE,  # segments, first, counts, groups
        _POINTER, _SIZE, _INT, _SIZE, _SIZE,  # x, its row stride, if BF16, M, K
        _POINTER, _SIZE, _INT, _INT, _INT,  # y, N, if rounded to BF16, isa, threads
    ]  # fmt: skip
    return function
