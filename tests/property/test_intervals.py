"""What intervals and p-values promise, by simulation: truth inside 95 % intervals, and 5 % of
differences where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.evaluate.significance import (
    Bootstrap,
    compare,
    mean_estimate,
    sign_flip_p_value,
    standard_error,
)

FIXED = settings(derandomize=True, deadline=None, max_examples=60)

#: Simulated texts per case. A share of 95 % of 500 has a standard error of 1 %.
REPEATS = 500
TOKENS = 24


def draw(rng: np.random.Generator, windows: int, is_skewed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with a common effect in each window, the last one ragged; their expectation is 1."""
    sizes = np.full(windows, TOKENS)
    sizes[-1] = 9
    which = np.repeat(np.arange(windows), sizes)
    common, own = rng.normal(size=windows)[which], rng.normal(size=len(which))
    if is_skewed:
        return np.exp(0.5 * common + 1.2 * own - (0.5**2 + 1.2**2) / 2), which
    return 1 + 0.5 * common + own, which


def coverage(windows: int, is_skewed: bool, method: str) -> tuple[float, float]:
    """Share of texts whose interval holds the truth; the same with tokens as if independent."""
    rng = np.random.default_rng(1000 + windows)
    inside = inside_naive = 0
    for seed in range(REPEATS):
        values, which = draw(rng, windows, is_skewed)
        bootstrap = Bootstrap(resamples=500, seed=seed, method=method)
        found = mean_estimate(values, which, bootstrap).interval
        assert found is not None
        inside += found.low <= 1 <= found.high
        inside_naive += abs(values.mean() - 1) <= 1.96 * standard_error(values)
    return inside / REPEATS, inside_naive / REPEATS


# Bounds: the coverage measured with 2,000 texts (table in significance.py), give or take three
# standard errors of REPEATS texts; with 16 windows intervals are known to be too narrow.
@pytest.mark.parametrize(
    ("windows", "is_skewed", "method", "low", "high"),
    [
        (16, False, "percentile", 0.89, 0.97),
        (16, True, "percentile", 0.85, 0.94),
        (16, True, "bca", 0.85, 0.95),
        (64, False, "percentile", 0.91, 0.98),
        (64, True, "percentile", 0.89, 0.97),
        (64, True, "bca", 0.89, 0.97),
        (600, True, "percentile", 0.92, 0.98),
    ],
)
def test_intervals_hold_the_truth_as_often_as_stated(
    windows: int, is_skewed: bool, method: str, low: float, high: float
) -> None:
    inside, inside_naive = coverage(windows, is_skewed, method)
    assert low <= inside <= high
    # Why windows are resampled, not tokens.
    assert inside_naive < 0.83


def test_intervals_of_a_paired_ratio_hold_the_truth() -> None:
    """Two candidates with the same hard windows and a true ratio of 0.88."""
    rng = np.random.default_rng(77)
    inside = 0
    for seed in range(REPEATS):
        b, which = draw(rng, 48, is_skewed=True)
        a = 0.88 * b * np.exp(0.3 * rng.normal(size=len(b)) - 0.045)
        found = compare(a, b, which, Bootstrap(resamples=500, seed=seed)).ratio.interval
        assert found is not None
        inside += found.low <= 0.88 <= found.high
    assert 0.89 <= inside / REPEATS <= 0.98


@pytest.mark.parametrize("windows", [8, 60])
def test_five_percent_of_equal_candidates_differ_at_five_percent(windows: int) -> None:
    rng = np.random.default_rng(windows)
    found = [sign_flip_p_value(rng.standard_t(3, windows), 400, seed) for seed in range(1000)]
    share = np.mean(np.array(found) <= 0.05)
    assert 0.03 <= share <= 0.07  # three standard errors of 1,000 texts


# --------------------------------------------------------------------------------------------- laws

texts = st.integers(2, 7).flatmap(
    lambda n: st.lists(
        st.tuples(st.integers(0, n), st.floats(0.01, 100)), min_size=n + 1, max_size=60
    )
)


@FIXED
@given(texts, st.sampled_from(("percentile", "bca")), st.floats(0.01, 100))
def test_intervals_scale_with_their_figures(
    tokens: list[tuple[int, float]], method: str, scale: float
) -> None:
    which, values = (np.array(x) for x in zip(*tokens, strict=True))
    bootstrap = Bootstrap(resamples=200, method=method)
    plain, scaled = (mean_estimate(x, which, bootstrap) for x in (values, values * scale))
    assert (plain.interval is None) == (len(np.unique(which)) == 1)
    if plain.interval is None or scaled.interval is None:
        return
    assert scaled.interval.low == pytest.approx(plain.interval.low * scale, rel=1e-6)
    assert scaled.interval.high == pytest.approx(plain.interval.high * scale, rel=1e-6)
    rounding = 1e-9 * float(values.max())
    assert values.min() - rounding <= plain.interval.low
    assert plain.interval.low <= plain.interval.high <= values.max() + rounding


@FIXED
@given(texts)
def test_p_values_are_probabilities_and_the_order_of_two_does_not_matter(
    tokens: list[tuple[int, float]],
) -> None:
    which, a = (np.array(x) for x in zip(*tokens, strict=True))
    b = np.roll(a, 1)
    one, other = (compare(x, y, which, Bootstrap(resamples=300)) for x, y in ((a, b), (b, a)))
    assert 0 < one.p_value <= 1
    assert one.p_value == other.p_value
    assert (one.wins, one.losses) == (other.losses, other.wins)
    assert one.difference.value == -other.difference.value
