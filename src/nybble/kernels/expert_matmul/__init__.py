"""Matmuls of routed experts: every row goes through the weights of its own expert, in one call.

Rows come sorted by expert. All experts of a projection share one call, so that a crowded expert is
worked on by all threads and an idle one costs nothing. The kernels and the order of their sums are
those of `block_matmul`: a row's result is the same bits as through its expert alone. Knows nothing
of routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import FormatError
from nybble.kernels import dispatch
from nybble.kernels.block_matmul import check_input
from nybble.kernels.block_matmul.segments import Row, Table, Weight, rows_of, table_of
from nybble.kernels.compute import Compute

__all__ = ["PreparedExperts", "expert_matmul", "prepare_experts"]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedExperts:
    """Experts ready for `expert_matmul`: K and N of each, and where everything lies.

    `table` has a group per expert; it holds addresses into the arrays of `kept`, which this object
    keeps alive.
    """

    k: int
    n: int
    name: str
    experts: tuple[tuple[Weight, ...], ...]
    table: Table
    kept: tuple[NDArray[np.generic], ...]


def prepare_experts(experts: Sequence[Sequence[Weight]], *, name: str = "") -> PreparedExperts:
    """Members (such as [gate, up], or [down]) of each expert, side by side; nothing is copied.

    Raises FormatError unless all experts have the same K and N, and for what `prepare` refuses.
    """
    what = name or "an expert matmul"
    if not experts or not all(experts):
        raise FormatError(f"{what}: expected experts with at least one weight each")
    k = int(experts[0][0].shape[-1])
    rows: list[Row] = []
    kept: list[NDArray[np.generic]] = []
    first = [0]
    widths = []
    for e, members in enumerate(experts):
        found, arrays, n = rows_of(members, [None] * len(members), k, f"{what}, expert {e}")
        rows += found
        kept += arrays
        first.append(len(rows))
        widths.append(n)
    if len(set(widths)) > 1:
        odd = next(e for e, n in enumerate(widths) if n != widths[0])
        raise FormatError(
            f"{what}: expert {odd} has {widths[odd]} outputs, expert 0 has {widths[0]}"
        )
    return PreparedExperts(
        k,
        widths[0],
        name,
        tuple(tuple(members) for members in experts),
        table_of(rows, first),
        tuple(kept),
    )


def expert_matmul(x: Tensor, counts: Tensor, weight: PreparedExperts, compute: Compute) -> Tensor:
    """x [M, K] sorted by expert, counts int64 [E] (rows of each, sum M) -> float32 [M, N].

    Dtypes and rounding as in `block_matmul.matmul`. Raises FormatError for other shapes or dtypes,
    and for counts that are negative or do not add up to M; a recorded call reads the counts of its
    replay, which whoever replays answers for.
    """
    check_input(x, weight.k, weight.name)
    experts = len(weight.experts)
    if counts.shape != (experts,) or counts.dtype != torch.int64 or not counts.is_contiguous():
        raise FormatError(
            f"{weight.name or 'an expert matmul'}: expected counts int64 [{experts}], found "
            f"{counts.dtype} {list(counts.shape)}"
        )
    if compute.program is None:
        _check_counts(counts, len(x), weight.name)
    choice = dispatch.choose()
    if choice.backend == "cpu":
        from nybble.kernels.expert_matmul import cpu

        return cpu.expert_matmul(x, counts, weight, compute, dispatch.ISAS[choice.isa])
    from nybble.kernels.expert_matmul import reference

    return reference.expert_matmul(x, counts, weight, compute)


def _check_counts(counts: Tensor, rows: int, name: str) -> None:
    numbers = counts.numpy()
    if int(numbers.sum()) != rows or int(numbers.min()) < 0:
        raise FormatError(
            f"{name or 'an expert matmul'}: counts from {numbers.min()} to {numbers.max()} "
            f"with sum {numbers.sum()} for {rows} rows"
        )
