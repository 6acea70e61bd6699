"""What each expert of a layer is known by: its tokens, their weights, and its Hessians.

An expert sees few tokens, and its output is multiplied by the router's weight p before it is added.
So its errors count by p^2, and its second moments are mixed with those of more tokens than chose
it, n and n0 being numbers of tokens:

    H = (n own + n0 prior) / (n + n0)

The prior of gate and up is what all tokens of the layer say. The input of down differs from expert
to expert, so its prior is made of near misses: the tokens that almost chose this expert, weighted
by the p that they would have given it. Knows nothing of files, jobs or rounding.

Source: docs/calibration.md; MoEQuant (Hu et al. 2025) for weights by affinity; the shrinkage is the
conjugate prior of a covariance (inverse Wishart) with n0 degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibrate.rounding import Evidence, Rung
from nybble.calibrate.statistics import Moments
from nybble.errors import EngineError
from nybble.kernels.compute import Compute
from nybble.kernels.routing import route

#: Tokens that the prior counts as, in channels: a covariance of K channels is poorly known by fewer
#: than about K tokens. Of 0, 1/4, 1/2, 1, 2, 4 and the prior alone, 1/2 was best or within 1 % of
#: it in gate and up of the carried hybrid's experts, from 1 to 8 tokens a channel (held-out loss
#: over that of the plain search, geometric mean: at 1 token a channel 0.522, without prior 0.586,
#: prior alone 0.553; at 4 tokens 0.359, 0.359, 0.422). In down, which has a quarter of the channels
#: and so four times the tokens, it makes no difference.
PRIOR_TOKENS = 0.5
#: Effective tokens a channel below which error feedback follows noise: the ladder's first step.
FEWEST_TOKENS = 1 / 8
#: Rows that are read, rounded and multiplied together: bounds memory where all choose one expert.
BAND_ROWS = 4096

#: Rows float32 [n, K] of an input, by their numbers int64 [n].
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Seen:
    """Tokens of one expert: their rows int64 [n], and the weight float32 [n] of each, the square of
    what the expert's output is multiplied by."""

    rows: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def effective(self) -> float:
        """The number of equally weighted tokens that would say as much (Kish): n at most."""
        weights = self.weights.double()
        squares = float(weights.square().sum())
        return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0


class Routes:
    """Which tokens of one set choose which expert, and which almost do.

    `logits` are the router's, float32 [T, E]; the set's rows begin at row `first` of the layer's.
    With `all_experts` every expert sees every token alike, and misses none.
    """

    def __init__(
        self,
        logits: Tensor,
        first: int,
        top: int,
        *,
        normalises: bool,
        all_experts: bool = False,
        threads: int = 1,
        name: str = "",
    ) -> None:
        """Raises EngineError, naming the layer, for logits that are NaN or infinite."""
        self.logits, self.first, self.normalises = logits, first, normalises
        self.all_experts = all_experts
        routing = route(logits, top, normalises, Compute("f32", threads))
        self.chosen, self.weights = routing.chosen, routing.weights
        self._whole = torch.logsumexp(logits, -1)
        if not bool(torch.isfinite(self._whole).all()):
            raise EngineError(
                f"{name}: the router is NaN or infinite for "
                f"{int((~torch.isfinite(self._whole)).sum())} of {len(logits)} calibration tokens; "
                "a weight before it is damaged (`nybble check` and `nybble inspect` show which)"
            )
        likeliest = logits.gather(1, self.chosen.long()[:, :-1])
        self._others = (likeliest - self._whole[:, None]).exp().sum(-1)  # all chosen but the last

    @property
    def tokens(self) -> int:
        """Tokens of the set."""
        return len(self.logits)

    def routed(self, expert: int) -> Seen:
        """The tokens that chose it, in their order."""
        if self.all_experts:
            return Seen(torch.arange(self.tokens) + self.first, torch.ones(self.tokens))
        rows, choices = (self.chosen == expert).nonzero(as_tuple=True)
        return Seen(rows + self.first, self.weights[rows, choices].square())

    def near_misses(self, expert: int, most: int) -> Seen:
        """The tokens that would have given it the largest weights of those that did not choose it,
        in their order; as if it had taken the place of the last one chosen."""
        if self.all_experts:
            return Seen(torch.empty(0, dtype=torch.int64), torch.empty(0))
        p = (self.logits[:, expert] - self._whole).exp()
        if self.normalises:
            p = p / (self._others + p)
        p = torch.where((self.chosen == expert).any(-1), torch.zeros_like(p), p)
        best = p.argsort(descending=True, stable=True)[:most].sort().values
        best = best[p[best] > 0]
        return Seen(best + self.first, p[best].square())


@dataclass(frozen=True, slots=True)
class Known:
    """A Hessian float32 [K, K] of mean diagonal 1 (zeros: of nothing), and how much is behind it:
    tokens, and how many equally weighted ones they are worth. `energy` is that of
    statistics.Moments, by which what judges is weighted too."""

    h: Tensor
    tokens: int
    effective: float
    energy: float | None = None


def measured(
    read: Read,
    seen: Seen,
    channels: int,
    *,
    plain_share: float,
    module: str,
    energy: float | None = None,
) -> Known:
    """What an input of `channels` channels is on the tokens seen, each counted by its weight.

    `energy` None: the weighted mean of these tokens. Raises EngineError, naming `module`, for NaN.
    """
    if not len(seen):
        return Known(torch.zeros((channels, channels)), 0, 0.0, energy)
    bands = list(
        zip(torch.split(seen.rows, BAND_ROWS), torch.split(seen.weights, BAND_ROWS), strict=True)
    )
    if len(bands) == 1:
        only = read(seen.rows)
        read = lambda _: only  # noqa: E731 - the common case: nothing is read twice
    if energy is None:
        energy = _mean_energy(read, bands)
    moments = Moments(channels, energy, plain_share=plain_share)
    for rows, weights in bands:
        moments.add(read(rows), weights, module=module)
    effective = seen.effective if float(moments.sum.diagonal().sum()) > 0 else 0.0
    return Known(moments.mixed(), len(seen), effective, energy)


def _mean_energy(read: Read, bands: list[tuple[Tensor, Tensor]]) -> float | None:
    """The weighted mean of x^2 over the tokens that are not zero, and channels; None without."""
    energy = total = 0.0
    for rows, weights in bands:
        energies, counted = read(rows).square().mean(-1).double(), weights.double()
        energy += float((energies * counted).sum())
        total += float(counted[energies > 0].sum())
    return energy / total if energy > 0 and total > 0 else None


def shrunk(own: Known, prior: Known, most: float) -> Tensor:
    """The mixture of both float32 [K, K]; the prior counts as what it is worth, at most `most`
    tokens. Zeros where neither knows anything."""
    n, n0 = own.effective, min(prior.effective, most)
    if n + n0 == 0:
        return torch.zeros_like(own.h)
    return own.h * (n / (n + n0)) + prior.h * (n0 / (n + n0))


def ladder(own: Known, channels: int) -> tuple[Rung, str]:
    """The highest method that an expert's own tokens allow, and why not a higher one."""
    if own.tokens == 0:
        return "mse", "no calibration token was routed to it"
    if own.effective == 0:
        return "mse", f"its input, or its weight, is zero on all {own.tokens} tokens routed to it"
    needed = channels * FEWEST_TOKENS
    if own.effective < needed:
        return "local", (
            f"{own.tokens} tokens routed to it are worth {own.effective:.1f} of equal weight; "
            f"gptq-x needs {needed:g} for {channels} channels"
        )
    return "gptq-x", ""


def evidence(fit: Known, fit_prior: Known, guard: Known, guard_prior: Known) -> Evidence:
    """What an expert's linear is rounded by: shrunk Hessians, and the rung that its tokens allow.

    Where no guard token chose the expert its prior judges alone, and its tokens are the ones named.
    """
    channels = len(fit.h)
    most = PRIOR_TOKENS * channels
    rung, reason = ladder(fit, channels)
    judge = None
    if guard.effective or guard_prior.effective:
        judge = shrunk(guard, guard_prior, most)
    return Evidence(
        shrunk(fit, fit_prior, most),
        judge,
        fit.tokens,
        guard.tokens if guard.effective else guard_prior.tokens,
        rung,
        reason,
    )
