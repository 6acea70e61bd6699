"""The definition in plain PyTorch, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.compute import Compute
from nybble.kernels.vocabulary import Divergence, LogLikelihood

#: Rows at a time: float64 copies of 32 rows of 248,320 are 64 MB each.
ROWS = 32


def log_likelihood(logits: Tensor, targets: Tensor, compute: Compute) -> LogLikelihood:
    """See the package."""
    parts = [_scores(x, t) for x, t in zip(_tiles(logits), _tiles(targets), strict=True)]
    return LogLikelihood(*(torch.cat(column) for column in zip(*parts, strict=True)))


def divergence(
    reference: Tensor, candidate: Tensor, targets: Tensor, compute: Compute
) -> Divergence:
    """See the package."""
    kl = [_kl(r, c) for r, c in zip(_tiles(reference), _tiles(candidate), strict=True)]
    ours = log_likelihood(reference, targets, compute)
    theirs = log_likelihood(candidate, targets, compute)
    return Divergence(
        torch.cat(kl),
        ours.nll,
        theirs.nll,
        ours.top,
        theirs.top,
        (-ours.nll).exp(),
        (-theirs.nll).exp(),
    )


def likeliest(logits: Tensor, out: Tensor, compute: Compute) -> None:
    """See the package."""
    best = logits.where(~logits.isnan(), -torch.inf).amax(dim=-1, keepdim=True)
    out.copy_((logits == best).int().argmax(dim=-1))  # the first of equals


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, ROWS)


def _scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.double()
    log_sum = wide.logsumexp(dim=-1)
    # +infinity is no logit: softmax has no value there, and logsumexp hides it.
    log_sum[(wide == torch.inf).any(dim=-1)] = torch.nan
    nll = log_sum - wide.gather(1, targets[:, None])[:, 0]
    return nll, logits.argmax(dim=-1), log_sum  # the first of equals, and NaN before all


def _kl(reference: Tensor, candidate: Tensor) -> Tensor:
    ours, theirs = reference.double().log_softmax(dim=-1), candidate.double().log_softmax(dim=-1)
    p = ours.exp()
    terms = torch.where(p == 0, torch.zeros_like(p), p * (ours - theirs))
    return terms.sum(dim=-1)
