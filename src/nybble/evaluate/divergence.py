"""What quantization changed, from per-token figures: KL divergence, agreement, probabilities.

The figures and the words are those of llama.cpp's `--kl-divergence` (base = reference, Q =
candidate, Δp = candidate - reference probability of the text's token), so a reader can hold one
against the other. Two things differ. KL here is exact; llama.cpp stores the reference's
log-probabilities in 16 bits and leaves out tokens below exp(-16). And beside llama.cpp's "±",
which takes tokens for independent, every mean has an interval from whole windows.

Source: llama.cpp tools/perplexity/perplexity.cpp, `kl_divergence`. Knows no model: score.py makes
the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nybble.errors import EvaluationError
from nybble.evaluate.perplexity import Perplexity, measure_perplexity
from nybble.evaluate.significance import (
    Bootstrap,
    Comparison,
    Estimate,
    compare,
    mean_estimates,
    ratio_estimates,
    standard_error,
    sum_by_window,
)

#: llama.cpp's percentiles of KL and Δp, highest first.
KL_FRACTIONS = (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001)
DELTA_P_FRACTIONS = (0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)
#: "we do not wish to do statistics on so few values" (llama.cpp).
_FEWEST = 100

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class TokenFigures(Protocol):
    """One row per scored token; `score.TokenDivergence` is one."""

    @property
    def window(self) -> IntArray:
        """Number of the token's window."""
        ...

    @property
    def position(self) -> IntArray:
        """Place of the token in its window, from 1 on: as many tokens as it had to go by."""
        ...

    @property
    def kl(self) -> FloatArray:
        """KL(reference || candidate) over the whole vocabulary, nats."""
        ...

    @property
    def reference_nll(self) -> FloatArray:
        """Negative log-likelihood of the text's token, nats."""
        ...

    @property
    def candidate_nll(self) -> FloatArray:
        """The same of the candidate."""
        ...

    @property
    def reference_top(self) -> IntArray:
        """The likeliest token."""
        ...

    @property
    def candidate_top(self) -> IntArray:
        """The same of the candidate."""
        ...

    @property
    def reference_p(self) -> FloatArray:
        """Probability of the text's token."""
        ...

    @property
    def candidate_p(self) -> FloatArray:
        """The same of the candidate."""
        ...


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean with its interval from whole windows; `token_error` is llama.cpp's "±", the standard
    error if tokens were independent."""

    value: float
    estimate: Estimate
    token_error: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Extremes and percentiles over tokens: pairs (fraction, value), highest first."""

    maximum: float
    quantiles: tuple[tuple[float, float], ...]
    minimum: float

    def at(self, fraction: float) -> float:
        """One of the percentiles, by the fraction it was asked for with."""
        return dict(self.quantiles)[fraction]


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """Tokens at positions first..last of their windows."""

    first: int
    last: int
    tokens: int
    mean_kl: Estimate
    same_top: Estimate


@dataclass(frozen=True, slots=True)
class Divergence:
    """A candidate against its reference on one text. KL in nats; probabilities from 0 to 1.

    `ln_ratio` is ln(PPL(Q) / PPL(base)), `ratio` its exp, `difference` PPL(Q) - PPL(base) (no
    interval: it is a difference of exponentials, the ratio says the same), `correlation` that of
    the tokens' log-likelihoods, 0 where one of them does not vary. `same_top` is the share of
    tokens at which both find the same one likeliest; the others are the flips.
    """

    tokens: int
    windows: int
    kl: Figure
    kl_spread: Spread
    same_top: Figure
    delta_p: Figure
    rms_delta_p: Figure
    delta_p_spread: Spread
    reference: Perplexity
    candidate: Perplexity
    ln_ratio: Figure
    ratio: Figure
    difference: float
    difference_token_error: float
    correlation: float
    positions: tuple[PositionBucket, ...]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def summarize(figures: TokenFigures, bootstrap: Bootstrap | None = None) -> Divergence:
    """All figures of a candidate from its per-token arrays, each of length `tokens`.

    Raises EvaluationError if the arrays differ in length, are empty, or hold what is not finite or
    no probability.
    """
    _check(figures)
    kl, same, delta = figures.kl, figures.reference_top == figures.candidate_top, _delta_p(figures)
    change = figures.candidate_nll - figures.reference_nll
    columns = np.stack((kl, same, delta, delta**2, change), axis=1)
    means = mean_estimates(columns, figures.window, bootstrap)
    reference = measure_perplexity(figures.reference_nll, figures.window, bootstrap=bootstrap)
    candidate = measure_perplexity(figures.candidate_nll, figures.window, bootstrap=bootstrap)
    tokens, ln_ratio = len(kl), _figure(means[4], standard_error(change))
    ratio, share = math.exp(ln_ratio.value), means[1].value
    correlation, difference_error = _joint_errors(figures, reference, candidate)
    return Divergence(
        tokens=tokens,
        windows=reference.windows,
        kl=_figure(means[0], standard_error(kl)),
        kl_spread=_spread(kl, KL_FRACTIONS),
        same_top=_figure(means[1], math.sqrt(share * (1 - share) / max(1, tokens - 1))),
        delta_p=_figure(means[2], standard_error(delta)),
        rms_delta_p=_root(_figure(means[3], standard_error(delta**2))),
        delta_p_spread=_spread(delta, DELTA_P_FRACTIONS),
        reference=reference,
        candidate=candidate,
        ln_ratio=ln_ratio,
        ratio=_figure(ln_ratio.estimate.mapped(math.exp, ratio), ratio * ln_ratio.token_error),
        difference=candidate.value - reference.value,
        difference_token_error=difference_error,
        correlation=correlation,
        positions=_by_position(figures, bootstrap),
    )


def compare_candidates(
    a: TokenFigures, b: TokenFigures, bootstrap: Bootstrap | None = None
) -> Comparison:
    """Mean KL of candidate a against that of candidate b, paired on the same tokens.

    Raises EvaluationError unless both were scored on the same windows and positions.
    """
    if not (np.array_equal(a.window, b.window) and np.array_equal(a.position, b.position)):
        raise EvaluationError(
            f"candidates scored on different tokens ({len(a.kl)} and {len(b.kl)}); score both on "
            "the same windows of the same text"
        )
    return compare(a.kl, b.kl, a.window, bootstrap)


# ----------------------------------------------------------------------------------------- in parts


def _check(figures: TokenFigures) -> None:
    names = ("position", "kl", "reference_nll", "candidate_nll", "reference_top", "candidate_top")
    tokens = len(figures.window)
    for name in (*names, "reference_p", "candidate_p"):
        array = getattr(figures, name)
        if array.shape != (tokens,) or tokens == 0:
            raise EvaluationError(
                f"{name} has shape {array.shape}; expected one value for each of {tokens} tokens"
            )
        is_bad = ~np.isfinite(array)
        if name.endswith("_p"):
            is_bad |= (array < 0) | (array > 1 + 1e-6)  # a float32 softmax may exceed 1 by rounding
        if is_bad.any():
            at = int(is_bad.argmax())
            raise EvaluationError(
                f"{name} of token {at} (position {figures.position[at]} of window "
                f"{figures.window[at]}) is {array[at]}; look for NaN in the models' output"
            )
    if (figures.position < 1).any():
        raise EvaluationError("a scored token at position 0 of its window; nothing predicts it")


def _delta_p(figures: TokenFigures) -> FloatArray:
    return figures.candidate_p.astype(np.float64) - figures.reference_p


def _figure(estimate: Estimate, token_error: float) -> Figure:
    return Figure(estimate.value, estimate, token_error)


def _root(square: Figure) -> Figure:
    """RMS from the mean square; 0 has an error of 0."""
    value = math.sqrt(square.value)
    slope = 0.5 / value if value else 0.0
    return _figure(square.estimate.mapped(math.sqrt, slope), slope * square.token_error)


def _spread(values: FloatArray, fractions: tuple[float, ...]) -> Spread:
    """Percentiles between neighbours linearly, as llama.cpp has them."""
    found = np.quantile(values, fractions)
    pairs = tuple(zip(fractions, map(float, found), strict=True))
    return Spread(float(values.max()), pairs, float(values.min()))


def _joint_errors(
    figures: TokenFigures, reference: Perplexity, candidate: Perplexity
) -> tuple[float, float]:
    """Correlation of the log-likelihoods, and llama.cpp's "±" of PPL(Q) - PPL(base)."""
    ours, base = figures.candidate_nll, figures.reference_nll
    errors = standard_error(ours), standard_error(base)
    if len(ours) <= 10:  # where llama.cpp has no errors
        return 0.0, 0.0
    covariance = float(((ours - ours.mean()) * (base - base.mean())).mean()) / (len(ours) - 1)
    product = errors[0] * errors[1]
    variance = (
        candidate.standard_error**2
        + reference.standard_error**2
        - 2 * candidate.value * reference.value * covariance
    )
    return covariance / product if product else 0.0, math.sqrt(max(0.0, variance))


def _by_position(figures: TokenFigures, bootstrap: Bootstrap | None) -> tuple[PositionBucket, ...]:
    """Positions 1, 2-3, 4-7, 8-15, ...: early tokens have little to go by and diverge more."""
    same = figures.reference_top == figures.candidate_top
    octave = np.frexp(figures.position.astype(np.float64))[1] - 1  # floor(log2)
    octaves = [int(k) for k in np.unique(octave)]
    top, bottom, counts = [], [], []
    for k in octaves:
        at = octave == k
        sums, _ = sum_by_window(np.stack((figures.kl * at, same & at, at), axis=1), figures.window)
        top.append(sums[:, :2])
        bottom.append(sums[:, [2, 2]])
        counts.append(int(at.sum()))
    found = ratio_estimates(np.hstack(top), np.hstack(bottom), bootstrap)
    longest = int(figures.position.max())
    return tuple(
        PositionBucket(2**k, min(2 ** (k + 1) - 1, longest), count, found[2 * i], found[2 * i + 1])
        for i, (k, count) in enumerate(zip(octaves, counts, strict=True))
    )


# -------------------------------------------------------------------------------- llama.cpp's words


def render_llamacpp(stats: Divergence) -> str:
    """The lines that `llama-perplexity --kl-divergence` ends with, in its words and formats.

    "±" is llama.cpp's, too. Raises EvaluationError below 100 tokens, where llama.cpp prints none.
    """
    if stats.tokens < _FEWEST:
        raise EvaluationError(
            f"llama.cpp's statistics need {_FEWEST} scored tokens, found {stats.tokens}"
        )
    lines = [*_perplexity_lines(stats), "", *_kl_lines(stats), "", *_probability_lines(stats)]
    return "\n".join(lines) + "\n"


def _perplexity_lines(s: Divergence) -> list[str]:
    rows: Sequence[tuple[str, float, float]] = (
        ("Mean PPL(Q)", s.candidate.value, s.candidate.standard_error),
        ("Mean PPL(base)", s.reference.value, s.reference.standard_error),
        ("Mean ln(PPL(Q)/PPL(base))", s.ln_ratio.value, s.ln_ratio.token_error),
        ("Mean PPL(Q)/PPL(base)", s.ratio.value, s.ratio.token_error),
        ("Mean PPL(Q)-PPL(base)", s.difference, s.difference_token_error),
    )
    lines = [f"{label:<30}: {value:10.6f} ± {error:10.6f}" for label, value, error in rows]
    correlation = f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * s.correlation:6.2f}%"
    return ["====== Perplexity statistics ======", *lines[:2], correlation, *lines[2:]]


def _kl_lines(s: Divergence) -> list[str]:
    return [
        "====== KL divergence statistics ======",
        f"Mean    KLD: {s.kl.value:10.6f} ± {s.kl.token_error:10.6f}",
        f"Maximum KLD: {s.kl_spread.maximum:10.6f}",
        *(f"{_label(f)} KLD: {value:10.6f}" for f, value in s.kl_spread.quantiles),
        f"Minimum KLD: {s.kl_spread.minimum:10.6f}",
    ]


def _probability_lines(s: Divergence) -> list[str]:
    mean, rms, same = (
        (100 * f.value, 100 * f.token_error) for f in (s.delta_p, s.rms_delta_p, s.same_top)
    )
    spread = s.delta_p_spread
    return [
        "====== Token probability statistics ======",
        f"Mean    Δp: {mean[0]:6.3f} ± {mean[1]:5.3f} %",
        f"Maximum Δp: {100 * spread.maximum:6.3f}%",
        *(f"{_label(f)} Δp: {100 * value:6.3f}%" for f, value in spread.quantiles),
        f"Minimum Δp: {100 * spread.minimum:6.3f}%",
        f"RMS Δp    : {rms[0]:6.3f} ± {rms[1]:5.3f} %",
        f"Same top p: {same[0]:6.3f} ± {same[1]:5.3f} %",
    ]


def _label(fraction: float) -> str:
    """Such as '99.9%  ', ' 5.0%  ' or 'Median '."""
    return "Median " if fraction == 0.5 else f"{100 * fraction:4.1f}%  "
