"""Second moments of the inputs of linears: what decides which errors of a weight matter.

The error of a linear's output is (W' - W) x, so its expected square is tr(D H D^T) with D = W' - W
and H = E[x x^T]. But tokens do not count alike. A few (attention sinks) may hold 10^5 times the
energy of the others inside an MLP, and a plain H would describe them alone. And every later token
looks at the sinks: what is wrong with them is wrong everywhere, though behind a norm their energy
is that of any other token. So the weight of a token is the sum of three:

    w = (1 - p - s) / e  +  p / mean(e)  +  s * (r / mean(r)) / e

with e the energy (mean square) of its input x, and r that of the residual stream that goes into the
layer: most tokens alike, some share p by what they weigh here, some share s by what they weigh in
the stream, which is where sinks stand out. H = sum of w x x^T is scaled to a mean diagonal of 1.
One matrix is kept, so a batch is measured by the means of all rows of its shard up to its own:
where massive tokens come late they do not weigh what they would against the first rows alone.
Shards are measured apart, wherever that is done, and added in their order.

Source: GPTQ (Frantar et al. 2022) for H; docs/calibration.md for the weights of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from nybble.errors import EngineError

#: p and s above, chosen on SmolLM2-135M by the divergence of the whole model (docs/numbers.md).
PLAIN_SHARE = 0.25
RESIDUAL_SHARE = 0.1
#: The mean energies of an input and of the residual stream, None: unknown.
Means = tuple[float | None, float | None]
#: The function that an engine rounds a linear's input with: (modules, x) -> x.
Rounding = Callable[[tuple[str, ...], Tensor], Tensor]


class _Mean:
    """A mean that is known, or that of all values seen."""

    def __init__(self, known: float | None) -> None:
        self.known = known
        self._sum = 0.0
        self._count = 0

    def with_rows(self, values: Tensor) -> float:
        """The mean with these among the values."""
        if self.known is not None:
            return self.known
        self._sum += float(values.double().sum())
        self._count += len(values)
        return self._sum / self._count

    def with_others(self, other: _Mean) -> float | None:
        """The mean with those of another among the values; None where neither has any."""
        if self.known is not None:
            return self.known
        self._sum += other._sum
        self._count += other._count
        return self._sum / self._count if self._count else None


class Moments:
    """The weighted second moments of one shared input of `channels` channels.

    `energy` and `residual` are the means that tokens are measured by, over x^2 and over the
    squares of the residual stream; None: those of the rows so far. `plain_share` 1 with
    `residual_share` 0 is the textbook Hessian.
    """

    def __init__(
        self,
        channels: int,
        energy: float | None = None,
        *,
        residual: float | None = None,
        plain_share: float = PLAIN_SHARE,
        residual_share: float = RESIDUAL_SHARE,
    ) -> None:
        self.energy, self.residual = energy, residual
        self._energy = _Mean(energy)
        self._residual = _Mean(residual)
        self.plain_share, self.residual_share = plain_share, residual_share
        self.sum = torch.zeros((channels, channels))
        self.tokens = 0
        self._energies: list[Tensor] = []

    def add(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        *,
        residuals: Tensor | None = None,
        module: str = "",
    ) -> None:
        """Count the rows x float32 [M, K], each `weights` [M] times (a router's squared weights).

        `residuals` [M] are the energies of their tokens in the residual stream; None: all alike.
        Rows of zeros say nothing and are left out. Raises EngineError, naming `module`, for NaN and
        infinities.
        """
        energies = x.square().mean(-1)
        if not bool(torch.isfinite(energies).all()):
            raise EngineError(
                f"{module}: its input is NaN or infinite for "
                f"{int((~torch.isfinite(energies)).sum())} of {len(x)} calibration tokens; a "
                "weight before it is damaged (`nybble check` and `nybble inspect` show which)"
            )
        alive = energies > 0
        if not bool(alive.all()):
            x, energies = x[alive], energies[alive]
            weights = None if weights is None else weights[alive]
            residuals = None if residuals is None else residuals[alive]
        if not len(x):
            return
        self.energy = self._energy.with_rows(energies)
        scale = self.plain_share / self.energy + self._alike(residuals) / energies
        rows = x * (scale if weights is None else scale * weights).sqrt()[:, None]
        self.sum.addmm_(rows.T, rows)
        self.tokens += len(rows)
        self._energies.append(energies)

    def _alike(self, residuals: Tensor | None) -> Tensor | float:
        """What a token of the mean energy weighs, [M] or the same for all."""
        rest = 1 - self.plain_share - self.residual_share
        if residuals is None:
            return rest + self.residual_share
        self.residual = self._residual.with_rows(residuals)
        return rest + self.residual_share * residuals / self.residual

    def merge(self, later: Moments) -> None:
        """Add what was measured of rows that come later."""
        self.sum += later.sum
        self.tokens += later.tokens
        self._energies += later._energies
        self.energy = self._energy.with_others(later._energy)
        self.residual = self._residual.with_others(later._residual)

    def mixed(self) -> Tensor:
        """H float32 [K, K], mean diagonal 1; zeros where nothing was seen."""
        mean = float(self.sum.diagonal().mean())
        return self.sum / mean if mean > 0 else torch.zeros_like(self.sum)

    @property
    def peak(self) -> float:
        """The largest energy of a token over the median; 1 where none was seen."""
        if not self._energies:
            return 1.0
        energies = torch.cat(self._energies)
        return float(energies.max() / energies.median())


class Statistics:
    """Who measures while a layer runs (models.linear.Observer).

    `wanted` are the modules whose inputs count, `kept` those whose input is kept row by row (the
    router's: what a mixture's experts see is made of it). `rounded` is what an engine does to an
    input before the matmul, where a scheme quantizes activations. `means` are the energies, of an
    input and of the residual stream, that rows which judge are measured by where none here fit.
    """

    def __init__(
        self,
        wanted: Collection[str],
        kept: Collection[str] = (),
        rounded: Rounding | None = None,
        *,
        plain_share: float = PLAIN_SHARE,
        residual_share: float = RESIDUAL_SHARE,
        means: Mapping[tuple[str, ...], Means] | None = None,
    ) -> None:
        self.means = dict(means or {})
        self.wanted, self.kept_modules = frozenset(wanted), frozenset(kept)
        self.rounded = rounded
        self.plain_share, self.residual_share = plain_share, residual_share
        self.fit: dict[tuple[str, ...], Moments] = {}
        self.guard: dict[tuple[str, ...], Moments] = {}
        self.kept: dict[tuple[str, ...], list[Tensor]] = {}
        self._is_guard = False
        self._residuals: Tensor | None = None

    def begin(self, *, is_guard: bool, hidden: Tensor | None = None) -> None:
        """The rows that follow judge (`is_guard`) or fit. `hidden` [M, H] is what goes into the
        layer, a row for each; None where there is no layer."""
        self._is_guard = is_guard
        self._residuals = None if hidden is None else hidden.square().mean(-1)

    def linear(self, modules: tuple[str, ...], x: Tensor) -> None:
        """See models.linear.Observer."""
        if not len(x):
            return
        if not self.kept_modules.isdisjoint(modules):
            self.kept.setdefault(modules, []).append(x.clone())
        if self.wanted.isdisjoint(modules):
            return
        if self.rounded is not None:
            x = self.rounded(modules, x)
        known = self.guard if self._is_guard else self.fit
        if modules not in known:
            energy, residual = self._means(modules) if self._is_guard else (None, None)
            known[modules] = Moments(
                x.shape[1],
                energy,
                residual=residual,
                plain_share=self.plain_share,
                residual_share=self.residual_share,
            )
        known[modules].add(x, residuals=self._residuals, module=modules[0])

    def experts(self, modules: Sequence[tuple[str, ...]], x: Tensor, counts: Tensor) -> None:
        """See models.linear.Observer: experts are measured from the router's input instead."""

    def empty(self) -> Statistics:
        """Who measures rows that come later apart from these, to be merged."""
        return Statistics(
            self.wanted,
            self.kept_modules,
            self.rounded,
            plain_share=self.plain_share,
            residual_share=self.residual_share,
            means={**self.means, **{m: (x.energy, x.residual) for m, x in self.fit.items()}},
        )

    @property
    def is_idle(self) -> bool:
        """Whether no input is measured or kept."""
        return not self.wanted and not self.kept_modules

    def merge(self, later: Statistics) -> None:
        """Add what was measured of rows that come later; its matrices may be taken over."""
        for mine, others in ((self.fit, later.fit), (self.guard, later.guard)):
            for modules, moments in others.items():
                if modules in mine:
                    mine[modules].merge(moments)
                else:
                    mine[modules] = moments
        for modules, rows in later.kept.items():
            self.kept.setdefault(modules, []).extend(rows)

    def _means(self, modules: tuple[str, ...]) -> Means:
        """What judges weighs tokens as what is judged by it."""
        fitted = self.fit.get(modules)
        if fitted is None:
            return self.means.get(modules, (None, None))
        return fitted.energy, fitted.residual
