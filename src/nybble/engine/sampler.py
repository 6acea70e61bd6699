"""Choosing a token: noise keyed by (seed, choice, position), so that it is the same however the
logits were computed beside others.

Gumbel-max: argmax of logit / temperature + Gumbel noise is a draw from the softmax. The noise of a
position does not depend on what was drawn before, nor on how often.

Source: Philox (Salmon et al., SC 2011), numpy's implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.request import SamplingParams
from nybble.errors import EngineError
from nybble.kernels.compute import Compute
from nybble.kernels.vocabulary import log_likelihood


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and its log-probability under the model itself, without temperature or filters."""

    token: int
    logprob: float


def sample(
    logits: Tensor, params: SamplingParams, position: int, compute: Compute, choice: int = 0
) -> Choice:
    """The token that follows `position` tokens of a sequence; logits float32 [V].

    Raises EngineError if they are NaN.
    """
    found = log_likelihood(logits[None], torch.zeros(1, dtype=torch.int64), compute)
    log_sum, top = float(found.log_sum[0]), int(found.top[0])
    if log_sum != log_sum:
        raise EngineError(f"the logits after {position} tokens are NaN; the checkpoint is damaged")
    if params.temperature > 0:
        scaled = logits.double() / params.temperature
        kept = keep(scaled, params)
        noise = torch.from_numpy(gumbel(params.seed, choice, position, len(logits)))
        top = int(torch.where(kept, scaled + noise, -torch.inf).argmax())
    return Choice(top, float(logits[top]) - log_sum)


def keep(scaled: Tensor, params: SamplingParams) -> Tensor:
    """Which tokens stay in, bool [V]: of the top k, the nucleus of top p, those of min p.

    One after the other, each on the softmax of what is left; ties at a boundary stay in.
    """
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < params.top_k < len(scaled):
        kept &= scaled >= torch.topk(scaled, params.top_k).values[-1]
    if params.top_p < 1:
        probabilities = torch.softmax(torch.where(kept, scaled, -torch.inf), -1)
        ordered = probabilities.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered
        kept &= probabilities >= ordered[before < params.top_p][-1]
    if params.min_p > 0:
        probabilities = torch.softmax(torch.where(kept, scaled, -torch.inf), -1)
        kept &= probabilities >= params.min_p * probabilities.max()
    return kept


def gumbel(seed: int, choice: int, position: int, size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise float64 [size] of one position."""
    key = np.array([seed, choice], dtype=np.uint64)
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return generator.gumbel(size=size)
