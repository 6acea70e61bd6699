"""Bootstrap intervals and permutation p-values, against plain loops and known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nybble.errors import EvaluationError
from nybble.evaluate.perplexity import measure_perplexity
from nybble.evaluate.significance import (
    Bootstrap,
    compare,
    mean_estimate,
    mean_estimates,
    ratio_estimates,
    sign_flip_p_value,
    standard_error,
    sum_by_window,
)

#: Sums in another order.
ROUNDING = 1e-12


def ragged(seed: int, windows: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Values and window numbers, 2 to 12 tokens a window, numbers with gaps and out of order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 13, windows)
    which = np.repeat(rng.permutation(windows) * 3, sizes)
    return rng.gamma(0.5, 2.0, len(which)), which


def looped_resamples(values: np.ndarray, which: np.ndarray, seed: int, n: int) -> list[float]:
    """The bootstrap as the book has it: draw windows, put their tokens together, take the mean."""
    groups = [values[which == w] for w in np.unique(which)]
    drawn = np.random.default_rng(seed).integers(0, len(groups), (n, len(groups)))
    return [float(np.concatenate([groups[i] for i in row]).mean()) for row in drawn]


def test_the_interval_is_that_of_resampled_whole_windows() -> None:
    values, which = ragged(1)
    means = looped_resamples(values, which, seed=5, n=200)
    found = mean_estimate(values, which, Bootstrap(level=0.9, resamples=200, seed=5))
    assert found.value == pytest.approx(values.mean(), rel=ROUNDING)
    assert found.interval is not None
    assert found.interval.level == 0.9
    assert found.interval.low == pytest.approx(np.quantile(means, 0.05), rel=ROUNDING)
    assert found.interval.high == pytest.approx(np.quantile(means, 0.95), rel=ROUNDING)
    assert found.standard_error == pytest.approx(np.std(means, ddof=1), rel=1e-9)


def test_bca_is_the_published_formula() -> None:
    """Efron and Tibshirani 14.9 to 14.15, over a table of the normal distribution."""
    values, which = ragged(2)
    means = np.array(looped_resamples(values, which, seed=0, n=400))
    groups = [values[which == w] for w in np.unique(which)]
    jackknife = np.array(
        [np.concatenate(groups[:i] + groups[i + 1 :]).mean() for i in range(len(groups))]
    )
    gap = jackknife.mean() - jackknife
    acceleration = (gap**3).sum() / (6 * (gap**2).sum() ** 1.5)
    # Phi and its inverse by a table fine enough for the quantiles of 400 draws.
    grid = np.linspace(-6, 6, 1_200_001)
    density = np.exp(-grid * grid / 2) / np.sqrt(2 * np.pi)
    phi = np.cumsum(density) * (grid[1] - grid[0])
    bias = np.interp((means < values.mean()).mean(), phi, grid)
    z = bias + np.array([-1.959964, 1.959964])
    tails = np.interp(bias + z / (1 - acceleration * z), grid, phi)
    expected = np.quantile(means, tails)
    found = mean_estimate(values, which, Bootstrap(resamples=400, method="bca")).interval
    assert found is not None
    assert [found.low, found.high] == pytest.approx(expected.tolist(), rel=1e-4)
    plain = mean_estimate(values, which, Bootstrap(resamples=400)).interval
    assert plain is not None
    assert abs(found.low - plain.low) > 100 * 1e-4 * found.low  # so the comparison can fail


def test_results_do_not_depend_on_how_many_resamples_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, which = ragged(3)
    whole = mean_estimate(values, which, Bootstrap(resamples=1000))
    monkeypatch.setattr("nybble.evaluate.significance._CHUNK", 100)
    assert mean_estimate(values, which, Bootstrap(resamples=1000)) == whole


def test_a_seed_repeats_and_another_one_differs() -> None:
    values, which = ragged(4)
    first, again, other = (
        mean_estimate(values, which, Bootstrap(resamples=500, seed=s)) for s in (1, 1, 2)
    )
    assert first == again
    assert first.interval != other.interval


def test_columns_share_their_resamples() -> None:
    """A constant apart stays a constant apart in every resample, so intervals move along."""
    values, which = ragged(5)
    a, b = mean_estimates(np.stack((values, values + 7), axis=1), which, Bootstrap(resamples=300))
    assert a.interval is not None
    assert b.interval is not None
    assert b.interval.low - a.interval.low == pytest.approx(7, rel=ROUNDING)
    assert b.interval.high - a.interval.high == pytest.approx(7, rel=ROUNDING)


def test_one_window_has_a_mean_and_no_interval() -> None:
    found = mean_estimate([1.0, 2.0, 6.0], [4, 4, 4])
    assert (found.value, found.interval, found.standard_error) == (3.0, None, None)


def test_a_figure_that_some_resamples_lack_has_no_interval() -> None:
    """Tokens of one window only: a resample without it has none."""
    present, absent = ratio_estimates(
        [[1.0, 2.0], [3.0, 0.0], [2.0, 0.0]], [[1, 1], [1, 0], [1, 0]], Bootstrap(resamples=200)
    )
    assert present.interval is not None
    assert (absent.value, absent.interval) == (2.0, None)


def test_sums_are_those_of_each_window() -> None:
    sums, sizes = sum_by_window([1.0, 2.0, 4.0, 8.0], [7, 3, 7, 3])
    assert sums[:, 0].tolist() == [10.0, 5.0]
    assert sizes.tolist() == [2.0, 2.0]


def test_the_token_error_is_the_textbook_one() -> None:
    values, _ = ragged(6)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / len(values) ** 0.5)
    assert standard_error(values[:10]) == 0  # as llama.cpp


# ------------------------------------------------------------------------------------------- paired


def test_a_paired_difference_is_narrower_than_the_two_apart() -> None:
    rng = np.random.default_rng(8)
    which = np.repeat(np.arange(40), 16)
    b = rng.gamma(1, 1, len(which)) * np.exp(rng.normal(0, 0.7, 40))[which]
    a = 0.88 * b * np.exp(rng.normal(0, 0.05, len(which)))
    found = compare(a, b, which, Bootstrap(resamples=1000))
    apart = [mean_estimate(x, which, Bootstrap(resamples=1000)).standard_error for x in (a, b)]
    assert found.difference.value == pytest.approx(a.mean() - b.mean(), rel=1e-9)
    assert found.ratio.value == pytest.approx(a.mean() / b.mean(), rel=ROUNDING)
    assert found.ratio.interval is not None
    assert 0.85 < found.ratio.interval.low < found.ratio.value < found.ratio.interval.high < 0.9
    assert found.difference.standard_error is not None
    assert found.difference.standard_error < 0.3 * max(x for x in apart if x is not None)
    assert (found.wins, found.losses, found.windows) == (40, 0, 40)
    assert found.p_value == pytest.approx(1 / 1001)


def test_the_p_value_of_few_windows_is_exact() -> None:
    gaps = np.array([0.5, 1.25, -0.25, 2.0, 0.75])
    sums = [abs(np.dot(s, gaps)) for s in itertools.product((1, -1), repeat=5)]
    assert sign_flip_p_value(gaps) == np.mean(np.array(sums) >= gaps.sum() - 1e-9)
    assert sign_flip_p_value(-gaps) == sign_flip_p_value(gaps)


def test_the_p_value_of_many_windows_approaches_the_exact_one() -> None:
    gaps = np.random.default_rng(9).normal(0.35, 1, 12)
    exact = sign_flip_p_value(gaps, resamples=4096)
    sampled = sign_flip_p_value(gaps, resamples=4095)
    assert 0.02 < exact < 0.98
    # Three standard errors of a share of 4095 draws.
    assert sampled == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 4095) ** 0.5 + 1 / 4095)


def test_candidates_that_do_not_differ_have_a_p_value_of_one() -> None:
    values, which = ragged(10)
    found = compare(values, values, which, Bootstrap(resamples=200))
    assert found.p_value == 1
    assert (found.difference.value, found.ratio.value) == (0, 1)
    assert (found.wins, found.losses) == (0, 0)
    many = np.zeros(40)
    assert sign_flip_p_value(many, 200) == 1


# --------------------------------------------------------------------------------------- perplexity


def test_perplexity_is_the_exp_of_the_mean_over_all_tokens() -> None:
    nll, which = ragged(11)
    found = measure_perplexity(nll, which, scored_bytes=1000, bootstrap=Bootstrap(resamples=300))
    mean = mean_estimate(nll, which, Bootstrap(resamples=300))
    assert mean.interval is not None
    assert found.interval is not None
    assert found.nll == pytest.approx(nll.mean(), rel=ROUNDING)
    assert found.value == pytest.approx(np.exp(nll.mean()), rel=ROUNDING)
    assert found.interval.low == pytest.approx(np.exp(mean.interval.low), rel=ROUNDING)
    assert found.interval.high == pytest.approx(np.exp(mean.interval.high), rel=ROUNDING)
    assert found.standard_error == pytest.approx(found.value * standard_error(nll))
    assert found.bits_per_byte == pytest.approx(np.log2(np.e) * nll.sum() / 1000)
    assert (found.tokens, found.windows) == (len(nll), 9)


def test_perplexity_of_one_window_has_no_interval() -> None:
    found = measure_perplexity([1.0, 3.0], [0, 0])
    assert found.value == pytest.approx(np.exp(2.0))
    assert found.interval is None
    assert found.bits_per_byte is None


@pytest.mark.parametrize(
    ("nll", "message"),
    [
        ([], "shape"),
        ([1.0, np.nan], "value 1"),
        ([np.inf, 1.0], "value 0"),
        ([800.0, 800.0], "exp"),
    ],
)
def test_a_perplexity_that_cannot_be_is_refused(nll: list[float], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure_perplexity(nll, np.arange(len(nll)))


# ------------------------------------------------------------------------------------------ refused


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(EvaluationError, match="expected 3 integers"):
        mean_estimate([1.0, 2.0, 3.0], [0, 1])
    with pytest.raises(EvaluationError, match="only figures of the same tokens"):
        compare([1.0, 2.0], [1.0], [0, 1])
    with pytest.raises(EvaluationError, match="compare by difference"):
        compare([1.0, 2.0], [1.0, -1.0], [0, 1])
    with pytest.raises(EvaluationError, match="totals be positive"):
        ratio_estimates([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(EvaluationError, match="method one of percentile, bca"):
        Bootstrap(method="basic")
