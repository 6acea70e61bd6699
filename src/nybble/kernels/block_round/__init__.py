"""NVFP4 blocks of a strip of columns, rounded one after the other in a quadratic metric.

A *strip* is S columns of a weight in units of its tensor scale, S a multiple of 16 and at most 128.
Its metric is U diag(D) U^T with U unit upper triangular, as an LDL^T factorization of a Hessian
gives it: for errors E = Q - W a row loses sum_k D_k ((E U)_k)^2. So a column is rounded to what is
left of it once the errors of the columns before it are compensated (GPTQ, arXiv:2210.17323; LDLQ,
arXiv:2307.13304), and a block takes the scale that makes the least of this loss, with the codes
that follow. Rows know nothing of one another, strips nothing of the strips after them. With U the
identity and D one, this is the search `mse` of `formats.search`; with another D, a weighted one.
`reference.py` is the definition, `cpu.py` calls the C kernel; both give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.tensors import check_rows, check_tensor

BLOCK = 16
MOST_COLUMNS = 128
#: Scales whose codes coordinate descent may work on, for one block.
MOST_KEPT = 4
#: Scale codes E4M3 from 2^-9 to 448.
LEAST_SCALE, MOST_SCALE = 1, 126


@dataclass(frozen=True, slots=True)
class Strip:
    """A rounded strip: what was chosen and what it costs. All contiguous.

    `codes` uint8 [N, S], E2M1, one per byte, never -0; `scales` uint8 [N, S / 16], E4M3; `error`
    float32 [N, S], Q - W; `loss` float32 [N, S / 16], each block's sum of D_k ((E U)_k)^2, in which
    the errors of earlier strips count as far as the target holds them.
    """

    codes: Tensor
    scales: Tensor
    error: Tensor
    loss: Tensor


@dataclass(frozen=True, slots=True)
class Search:
    """Which scales and codes a block tries.

    Scale codes from `lowest` below to `highest` above the code that maps the largest target to 6.
    `passes` rounds of cyclic coordinate descent change the codes of the `kept` best of them, one
    code at a time, to whichever of the 15 values costs the block the least.
    """

    lowest: int
    highest: int
    passes: int
    kept: int


def round_strip(
    weight: Tensor,
    target: Tensor,
    upper: Tensor,
    importance: Tensor,
    *,
    lowest: int = -4,
    highest: int = 7,
    passes: int = 0,
    kept: int = 1,
    current: tuple[Tensor, Tensor] | None = None,
    threads: int = 1,
) -> Strip:
    """Round the strip W = `weight` to `target`: both float32 [N, S], rows may lie apart.

    `target` is W less what the errors of earlier strips ask for: W - sum_i E_i U_ik over their
    columns i. `upper` float32 [S, S] is U, of which only what lies above the diagonal is read, and
    `importance` float32 [S] is D > 0, both finite. A block of which every target is 0 gets codes 0
    and the scale 1. See `Search` for the next four. `current`, codes uint8 [N, S] and scales uint8
    [N, S / 16], stays wherever the block found nothing that costs strictly less.

    Raises EngineError for other shapes or dtypes, a NaN or an infinity in weight or target, and
    values of `current` that are no codes.
    """
    rows, columns = weight.shape if weight.ndim == 2 else (-1, -1)
    if columns % BLOCK or not BLOCK <= columns <= MOST_COLUMNS:
        raise EngineError(
            f"block_round: weight must be [N, S] with S a multiple of {BLOCK} and at most "
            f"{MOST_COLUMNS}, found {list(weight.shape)}"
        )
    check_rows(weight, "block_round", "weight", (rows, columns))
    check_rows(target, "block_round", "target", (rows, columns))
    check_tensor(importance, "block_round", "importance", (columns,))
    check_rows(upper, "block_round", "upper", (columns, columns))
    _check_finite("weight", weight)
    _check_finite("target", target)
    if not (lowest <= highest and passes >= 0 and 1 <= kept <= MOST_KEPT):
        raise EngineError(
            f"block_round: scales from {lowest} to {highest}, {passes} passes over {kept} of them; "
            f"expected an interval, no fewer than 0 and from 1 to {MOST_KEPT}"
        )
    if current is not None:
        _check_current(*current, rows, columns)
    lowest, highest = (min(max(o, -MOST_SCALE), MOST_SCALE) for o in (lowest, highest))
    kept = min(kept, highest - lowest + 1) if passes else 1
    search = Search(lowest, highest, passes, kept)
    found: Strip = _backend().round_strip(
        weight, target, upper, importance, search, current, threads
    )
    return found


def _check_finite(name: str, x: Tensor) -> None:
    if x.sum().isfinite() or bool(x.isfinite().all()):  # the sum of good ones may overflow
        return
    row, column = (int(i) for i in (~x.isfinite()).nonzero()[0])
    raise EngineError(
        f"block_round: {name} is {float(x[row, column])} at row {row}, column {column}; "
        "expected finite values"
    )


def _check_current(codes: Tensor, scales: Tensor, rows: int, columns: int) -> None:
    check_tensor(codes, "block_round", "current codes", (rows, columns), torch.uint8)
    shape = (rows, columns // BLOCK)
    check_tensor(scales, "block_round", "current scales", shape, torch.uint8)
    if not rows:
        return
    if int(codes.max()) > 15:
        raise EngineError(f"block_round: a current code is {int(codes.max())}; expected 0 to 15")
    if int(scales.min()) < LEAST_SCALE or int(scales.max()) > MOST_SCALE:
        raise EngineError(
            f"block_round: current scales go from {int(scales.min())} to {int(scales.max())}; "
            f"expected codes from {LEAST_SCALE} to {MOST_SCALE}"
        )


def _backend() -> ModuleType:
    return _load(dispatch.choose().backend)


@lru_cache(maxsize=2)
def _load(backend: str) -> ModuleType:
    if backend == "cpu":
        from nybble.kernels.block_round import cpu

        return cpu
    from nybble.kernels.block_round import reference

    return reference
