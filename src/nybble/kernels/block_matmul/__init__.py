"""y = x W^T (+ bias) with weights read as they lie in the file: packed, or plain floats.

A matmul here takes a *group*: weights that share their input (q, k and v; gate and up), whose
outputs lie side by side. The definition is `reference.py`. The compiled kernels sum every output in
one order that depends on K and the instruction set alone: a row's result is the same bits alone, in
a batch, and whatever the number of threads. Knows nothing of files, layers or networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.element import F32Array
from nybble.kernels import dispatch
from nybble.kernels.block_matmul.segments import Table, Weight, rows_of, table_of
from nybble.kernels.compute import Compute

__all__ = ["Prepared", "Weight", "check_input", "matmul", "prepare"]

_INPUT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A group ready for `matmul`: K, the sum of its members' N, and where everything lies.

    `table` holds addresses into the arrays of `kept`, which this object keeps alive.
    """

    k: int
    n: int
    name: str
    weights: tuple[Weight, ...]
    biases: tuple[F32Array | None, ...]
    table: Table
    kept: tuple[NDArray[np.generic], ...]


def prepare(
    weights: Sequence[Weight],
    biases: Sequence[F32Array | None] | None = None,
    *,
    name: str = "",
) -> Prepared:
    """Members [N_i, K] as one matmul; formats may differ, nothing is copied.

    Plain weights are BF16, F16 or F32; all arrays may be read-only, unaligned views of a file.
    `biases` holds float32 [N_i] or None for each member; `name` is what errors call the group.
    Raises FormatError for members that do not share K, and arrays of the wrong shape or dtype.
    """
    what = name or "a matmul"
    if not weights:
        raise FormatError(f"{what}: a group needs at least one weight")
    if biases is None:
        biases = [None] * len(weights)
    if len(biases) != len(weights):
        raise FormatError(f"{what}: {len(weights)} weights and {len(biases)} biases")
    k = int(weights[0].shape[-1])
    rows, kept, n = rows_of(weights, biases, k, what)
    table = table_of(rows, [0, len(rows)])
    return Prepared(k, n, name, tuple(weights), tuple(biases), table, tuple(kept))


def matmul(x: Tensor, weight: Prepared, compute: Compute) -> Tensor:
    """x [M, K], float32 or bfloat16 with contiguous rows -> float32 [M, N], contiguous.

    Precision "bf16" rounds x to BF16, "int8" to INT8 with a scale per 16 elements of K where the
    weight is NVFP4 or MXFP4 (to BF16 elsewhere); weights and sums are not rounded. NaN or infinity
    in x shows in its row. Raises FormatError for another shape, dtype or device.
    """
    check_input(x, weight.k, weight.name)
    choice = dispatch.choose()
    if choice.backend == "cpu":
        return _compiled().matmul(x, weight, compute, dispatch.ISAS[choice.isa])  # type: ignore[no-any-return]
    from nybble.kernels.block_matmul import reference

    return reference.matmul(x, weight, compute)


@cache
def _compiled() -> ModuleType:
    """The module of the C kernels; an import statement per call would cost a microsecond."""
    from nybble.kernels.block_matmul import cpu

    return cpu


def check_input(x: Tensor, k: int, name: str) -> None:
    """Raise FormatError unless x is a CPU tensor [M, K] that kernels can read."""
    if x.ndim != 2 or x.shape[1] != k or x.dtype not in _INPUT_DTYPES or x.device.type != "cpu":
        raise FormatError(
            f"{name or 'a matmul'}: expected an input [M, {k}] in float32 or bfloat16 on the CPU, "
            f"found {list(x.shape)} {x.dtype} on {x.device}"
        )
    if k > 1 and len(x) and x.stride(1) != 1:
        raise FormatError(f"{name or 'a matmul'}: the rows of the input must be contiguous")
