"""Factors of a Hessian: what error feedback needs of it.

With H = U D U^T, U unit upper triangular and D diagonal, the loss of a row's errors e is

    e H e^T = sum over k of D_k ((e U)_k)^2

so column k, rounded in order, should be rounded as w_k - sum over i < k of e_i U_ik, and what it
then misses costs D_k times its square: GPTQ's recursion without an inverse (LDLQ: Chee et al. 2023,
theorem 6: both are the same). One Cholesky decomposition of the flipped matrix gives both factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.errors import FormatError

BLOCK = 16


class NotPositiveDefinite(FormatError):
    """A Hessian that has no Cholesky decomposition even with its damping."""


@dataclass(frozen=True, slots=True)
class Factors:
    """H = upper diag(importance) upper^T: unit upper triangular [..., K, K] and [..., K] > 0."""

    upper: Tensor
    importance: Tensor


def damped(h: Tensor, damping: float) -> Tensor:
    """H + damping * (mean diagonal) * I, float32 [K, K]. A channel that was never alive gets the
    mean diagonal times the damping: its errors are not free."""
    found = h.clone()
    found.diagonal().add_(damping * float(h.diagonal().mean()))
    return found


def factorize(h: Tensor) -> Factors:
    """The factors of symmetric matrices [..., K, K].

    In float32, and again in float64 where that fails. Raises NotPositiveDefinite.
    """
    return _factors(h.flip(-1, -2))


def factorize_ordered(h: Tensor, order: Tensor) -> Factors:
    """The factors of h [K, K] with rows and columns in this order, int64 [K]: the same as
    `factorize(h[order][:, order])`, and a copy or two of h cheaper."""
    backwards = order.flip(0)
    return _factors(h.index_select(0, backwards).index_select(1, backwards))


def _factors(flipped: Tensor) -> Factors:
    lower, info = torch.linalg.cholesky_ex(flipped)
    if int(info.max()) > 0 or not bool(torch.isfinite(lower).all()):
        lower, info = torch.linalg.cholesky_ex(flipped.double())
        if int(info.max()) > 0 or not bool(torch.isfinite(lower).all()):
            raise NotPositiveDefinite(
                f"a Hessian of {flipped.shape[-1]} channels is not positive definite (its leading "
                f"minor of order {int(info.max())} is not); more calibration tokens or more "
                "damping help"
            )
        lower = lower.float()
    roots = lower.diagonal(dim1=-2, dim2=-1).clone()
    lower /= roots[..., None, :]
    return Factors(lower.flip(-1, -2).contiguous(), roots.flip(-1).square())


def blocks_of(h: Tensor, damping: float) -> Factors:
    """The factors of the 16 x 16 blocks on the diagonal, [K / 16, 16, 16] and [K / 16, 16]: the
    local Hessian, each damped by its own mean diagonal and a little of the whole's."""
    count = h.shape[0] // BLOCK
    view = h.view(count, BLOCK, count, BLOCK).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = view.contiguous()
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    floor = 1e-6 * float(h.diagonal().mean())
    diagonal += damping * diagonal.mean(-1, keepdim=True) + floor
    return factorize(blocks)


def column_order(diagonal: Tensor) -> Tensor:
    """The order in which columns are rounded, int64 [K]: blocks of 16 by their largest diagonal
    element, columns inside a block by theirs, largest first. What matters most is rounded while
    there is still much left to make up for it; a block's columns stay together, for they share a
    scale (Intel's group-aware reordering, GPTQModel)."""
    blocks = diagonal.view(-1, BLOCK)
    of_blocks = blocks.amax(-1).argsort(descending=True, stable=True)
    inside = blocks.argsort(dim=-1, descending=True, stable=True)
    return (inside + BLOCK * torch.arange(len(blocks))[:, None])[of_blocks].reshape(-1)
