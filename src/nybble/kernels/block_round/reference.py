"""The definition in plain PyTorch: float32, every product and sum rounded by itself, in this order.

Columns are rows here, so that what is done to a column is done to a vector: shapes trail the lines,
C candidates, N rows of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.formats.element import E2M1_VALUES
from nybble.kernels.block_round import BLOCK, LEAST_SCALE, MOST_SCALE, Search, Strip

_ZERO_BLOCK = 0x38  # E4M3 1.0, as formats.search has it for a block of zeros
_LEAST, _MOST = 2.0**-9, 448.0
# As in formats.element: a tie goes to the even code, so every other threshold is one float lower.
_THRESHOLDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_THRESHOLDS[1::2] = torch.nextafter(_THRESHOLDS[1::2], torch.tensor(0.0))
_MAGNITUDES = torch.tensor(E2M1_VALUES)


@dataclass(frozen=True, slots=True)
class _Block:
    """What a block is rounded to: the target before its own errors, and its part of the metric."""

    target: Tensor  # [16, N]
    weight: Tensor  # [16, N]
    upper: Tensor  # [16, 16]
    importance: Tensor  # [16]


@dataclass(frozen=True, slots=True)
class _Descent:
    """What coordinate descent needs of a block's metric, float32: M = U diag(D) U^T, U diag(D), and
    1 / diag(M)."""

    metric: Tensor  # [16, 16]
    slope: Tensor  # [16, 16]
    step: Tensor  # [16]


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Rounded blocks [16, ..., N]: codes int64, values Q, errors Q - W, misses Q - V, losses."""

    scale: Tensor  # int64 [..., N]
    codes: Tensor
    error: Tensor
    miss: Tensor
    loss: Tensor  # [..., N]


def round_strip(
    weight: Tensor,
    target: Tensor,
    upper: Tensor,
    importance: Tensor,
    search: Search,
    current: tuple[Tensor, Tensor] | None,
    threads: int,
) -> Strip:
    """See the package; `threads` changes nothing here."""
    rows, columns = weight.shape
    originals = weight.t()  # [S, N]
    left = target.t().clone()  # of one row, a contiguous copy would be no copy
    blocks = []
    for at in range(0, columns, BLOCK):
        mine = slice(at, at + BLOCK)
        block = _Block(left[mine], originals[mine], upper[mine, mine], importance[mine])
        found = _round_block(block, search)
        if current is not None:
            codes, scales = current
            kept = _evaluate(block, scales[:, at // BLOCK].long(), codes[:, mine].t().long())
            found = _better(found, kept, found.loss < kept.loss)
        blocks.append(found)
        for i in range(BLOCK):  # one column after the other: a sum in the order of the columns
            left[at + BLOCK :] -= found.error[i] * upper[at + i, at + BLOCK :, None]
    return Strip(
        torch.cat([b.codes for b in blocks]).t().to(torch.uint8).contiguous(),
        torch.stack([b.scale for b in blocks], dim=1).to(torch.uint8),
        torch.cat([b.error for b in blocks]).t().contiguous(),
        torch.stack([b.loss for b in blocks], dim=1),
    )


def _round_block(block: _Block, search: Search) -> _Rounded:
    amax = block.target.abs().amax(dim=0)  # [N]
    first = (amax / 6).clamp(_LEAST, _MOST).to(torch.float8_e4m3fn).view(torch.uint8).long()
    offsets = torch.arange(search.lowest, search.highest + 1)[:, None]
    tried = (first + offsets).clamp(LEAST_SCALE, MOST_SCALE)  # [C, N], from small to large
    inverse = 1 / _scale(tried)
    losses = _settle(block, tried, lambda v: v * inverse).loss  # [C, N]
    # A stable sort puts the smaller scale first among equals.
    best = losses.sort(dim=0, stable=True).indices[: search.kept]
    finished = [_finish(block, tried.gather(0, i[None])[0], search.passes) for i in best]
    chosen = finished[0]
    for found in finished[1:]:
        chosen = _better(found, chosen, found.loss < chosen.loss)
    dead = _evaluate(block, torch.full_like(first, _ZERO_BLOCK), torch.zeros_like(chosen.codes))
    return _better(dead, chosen, amax == 0)


def _finish(block: _Block, scale: Tensor, passes: int) -> _Rounded:
    """The codes of a scale [N], from quotients as in formats.search, and descent from there."""
    s = _scale(scale)
    found = _settle(block, scale, lambda v: v / s)
    if not passes:
        return found
    of = _descent(block)
    q = _value(found.codes) * s  # [16, N]
    gradient = torch.zeros_like(q)
    for k in range(BLOCK):
        gradient[: k + 1] += of.slope[: k + 1, k, None] * found.miss[k]
    inverse = 1 / s
    codes = found.codes.clone()
    for _ in range(passes):
        for i in range(BLOCK):
            codes[i] = _codes((q[i] - gradient[i] * of.step[i]) * inverse)
            new = _value(codes[i]) * s
            gradient += (new - q[i]) * of.metric[i, :, None]
            q[i] = new
    descended = _evaluate(block, scale, codes)
    return _better(descended, found, descended.loss < found.loss)


def _descent(block: _Block) -> _Descent:
    upper = block.upper.triu(1) + torch.eye(BLOCK)
    slope = upper * block.importance
    metric = torch.zeros(BLOCK, BLOCK, dtype=torch.float64)
    for k in range(BLOCK):  # a sum in this order has the same bits wherever it is taken
        metric += slope[:, k, None].double() * upper[:, k].double()
    return _Descent(metric.float(), slope, (1 / metric.diagonal()).float())


def _settle(block: _Block, scale: Tensor, quotient: Callable[[Tensor], Tensor]) -> _Rounded:
    """Round the columns in turn, scale [..., N]: each to what the ones before it leave to do."""
    return _run(block, scale, lambda k, v: _codes(quotient(v)))


def _evaluate(block: _Block, scale: Tensor, codes: Tensor) -> _Rounded:
    """What given codes [16, N] cost at scales [N]; -0 becomes 0."""
    return _run(block, scale, lambda k, v: torch.where(codes[k] == 8, 0, codes[k]))


def _run(block: _Block, scale: Tensor, choose: Callable[[int, Tensor], Tensor]) -> _Rounded:
    s = _scale(scale)
    left = [t.expand_as(s).clone() for t in block.target]
    loss = torch.zeros_like(s)
    codes, errors, misses = [], [], []
    for k in range(BLOCK):
        v = left[k]
        codes.append(choose(k, v))
        q = _value(codes[k]) * s  # exact: at most 2 + 4 significant bits
        errors.append(q - block.weight[k])
        misses.append(q - v)
        loss = loss + misses[k] * misses[k] * block.importance[k]
        for j in range(k + 1, BLOCK):
            left[j] -= errors[k] * block.upper[k, j]
    return _Rounded(scale, torch.stack(codes), torch.stack(errors), torch.stack(misses), loss)


def _better(a: _Rounded, b: _Rounded, is_a: Tensor) -> _Rounded:
    pairs = ((getattr(a, n), getattr(b, n)) for n in ("scale", "codes", "error", "miss", "loss"))
    return _Rounded(*(torch.where(is_a, x, y) for x, y in pairs))


def _codes(x: Tensor) -> Tensor:
    """E2M1 codes of x, ties to the even one, saturating at 6, without -0."""
    below = torch.bucketize(x.abs(), _THRESHOLDS)
    return below + 8 * ((x < 0) & (below > 0))


def _value(codes: Tensor) -> Tensor:
    magnitude = _MAGNITUDES[codes & 7]
    return torch.where(codes > 7, -magnitude, magnitude)


def _scale(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
