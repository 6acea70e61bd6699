"""Sampling: the law is the softmax of what is kept, and equal keys give equal tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.request import SamplingParams
from nybble.engine.sampler import gumbel, keep
from nybble.engine.sampler import sample as choose
from nybble.errors import EngineError
from nybble.kernels.compute import Compute

COMPUTE = Compute("bf16", 1)
DRAWS = 4000
#: Chi-square of 6 degrees of freedom at a probability of 1e-6: a right sampler fails once in 1e6.
CHI_SQUARE_6 = 38.3


def sample(logits: torch.Tensor, params: SamplingParams, position: int, choice: int = 0) -> int:
    return choose(logits, params, position, COMPUTE, choice).token


def test_the_log_probability_is_the_model_s_own() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0])
    expected = torch.log_softmax(logits.double(), -1)
    for temperature in (0.0, 3.0):
        found = choose(logits, SamplingParams(temperature=temperature), 1, COMPUTE)
        assert found.logprob == pytest.approx(float(expected[found.token]), abs=1e-6)


def test_greedy_is_the_likeliest() -> None:
    assert sample(torch.tensor([0.1, 3.0, 2.9]), SamplingParams(temperature=0), 5) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.3, 1.5])
    params = SamplingParams(temperature=temperature, seed=11)
    drawn = np.bincount([sample(logits, params, p) for p in range(DRAWS)], minlength=7)
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * DRAWS
    assert ((drawn - expected) ** 2 / expected).sum() < CHI_SQUARE_6


def test_a_draw_depends_on_seed_choice_and_position_alone() -> None:
    logits = torch.zeros(500)
    params = SamplingParams(temperature=1.0, seed=3)
    tokens = [sample(logits, params, p) for p in range(20)]
    assert [sample(logits, params, p) for p in reversed(range(20))] == tokens[::-1]
    assert [sample(logits, params, p, choice=1) for p in range(20)] != tokens
    assert [sample(logits, SamplingParams(temperature=1.0, seed=4), p) for p in range(20)] != tokens


def test_the_noise_of_one_position_is_no_shifted_copy_of_the_next() -> None:
    a, b = gumbel(0, 0, 7, 1000), gumbel(0, 0, 8, 1000)
    assert abs(np.corrcoef(a[:-4], b[4:])[0, 1]) < 0.2
    assert len(np.intersect1d(a, b)) == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=30),
    st.integers(0, 12),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_what_is_kept(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    scaled = torch.tensor(values, dtype=torch.float64)
    kept = keep(scaled, SamplingParams(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p))
    assert kept[scaled.argmax()]
    assert scaled[kept].min() >= scaled[~kept].max() if (~kept).any() else True
    probabilities = torch.softmax(scaled, -1)
    if top_k == 0 and min_p == 0:
        assert float(probabilities[kept].sum()) >= top_p - 1e-12
    if top_k == 0 and top_p == 1:
        assert torch.equal(kept, probabilities >= min_p * probabilities.max())


def test_the_smallest_nucleus_is_taken() -> None:
    scaled = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))
    for params in (SamplingParams(top_p=0.7), SamplingParams(top_k=3, min_p=0.5)):
        assert keep(scaled, params).tolist() == [True, True, False, False]


def test_nan_is_refused() -> None:
    with pytest.raises(EngineError, match="NaN"):
        sample(torch.tensor([0.0, float("nan")]), SamplingParams(), 3)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 1.0},
        {"max_tokens": 0},
        {"seed": -1},
    ],
)
def test_bad_parameters_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(EngineError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
