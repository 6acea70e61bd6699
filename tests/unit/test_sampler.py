"""Draws follow the law of what each option leaves, options mean what their literal definition
says, and a row's choice is its own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.engine.request import Alternative, SamplingParams
from nybble.engine.sampler import BadWords, Choice, Row, Sampler
from nybble.errors import EngineError
from nybble.kernels.compute import Compute

Floats = NDArray[np.float64]

COMPUTE = Compute("bf16", 1)
LOGITS = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -0.3, 1.5, -np.inf, 0.5], dtype=np.float32)
SIZE = len(LOGITS)
#: So many draws see a shift of 2.5 percentage points of a token's probability in 19 of 20 runs at
#: the level below, as a test measures.
DRAWS = 8_000
#: Chi-square at a probability of 1e-6 by degrees of freedom: the draws are seeded, so a right
#: sampler passes always or, of a million choices of seeds, never once.
CHI_SQUARE = (0.0, 23.9, 27.6, 30.7, 33.4, 35.9, 38.3, 40.5, 42.7)


def draw(logits: NDArray[np.float32], rows: Sequence[Row]) -> list[Choice]:
    return Sampler(logits.shape[-1], COMPUTE).sample(
        torch.from_numpy(np.broadcast_to(logits, (len(rows), logits.shape[-1])).copy()), rows
    )


def one(logits: NDArray[np.float32], row: Row) -> Choice:
    return draw(logits, [row])[0]


# ------------------------------------------------------------------------- the literal definitions


def penalized(
    x: Floats, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> Floats:
    """vLLM's apply_penalties and logit_bias, token by token."""
    x = x.copy()
    for token in range(len(x)):
        if token in prompt or token in output:
            factor = params.repetition_penalty
            x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty * (token in output)
        x[token] += params.logit_bias.get(token, 0.0)
    return x


def softmax(x: Floats) -> Floats:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def top_k(p: Floats, k: int) -> Floats:
    if 0 < k < len(p):
        p = np.where(p >= sorted(p)[-k], p, 0)
    return p / p.sum()


def top_p(p: Floats, share: float) -> Floats:
    """The smallest set of the likeliest that has `share`, with those equal to its last."""
    total, last = 0.0, 1.0
    for value in sorted(p, reverse=True):
        if total >= share:
            break
        total, last = total + value, value
    p = np.where(p >= last, p, 0)
    return p / p.sum()


def min_p(p: Floats, share: float) -> Floats:
    p = np.where(p >= share * p.max(), p, 0)
    return p / p.sum()


def law(
    logits: NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> Floats:
    x = penalized(logits.astype(np.float64), params, prompt, output)
    p = softmax(x / params.temperature)
    return min_p(top_p(top_k(p, params.top_k), params.top_p), params.min_p)


# ------------------------------------------------------------------------------------ law of draws


def chi_square(drawn: Sequence[int], expected: Floats) -> tuple[float, int]:
    """The statistic, infinite if something impossible was drawn, and its degrees of freedom."""
    counts = np.bincount(drawn, minlength=len(expected)).astype(np.float64)
    possible = expected > 0
    if counts[~possible].any():
        return np.inf, 0
    wanted = expected[possible] * len(drawn)
    return float(((counts[possible] - wanted) ** 2 / wanted).sum()), int(possible.sum()) - 1


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 3},
    "top_k of equals": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "all filters": {"temperature": 1.4, "top_k": 6, "top_p": 0.8, "min_p": 0.25},
    "bias": {"logit_bias": {4: -2.0, 0: 1.5, 7: 5.0}},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.1},
    "frequency": {"frequency_penalty": 0.6},
    "frequency, negative": {"frequency_penalty": -0.6},
    "all": {
        "temperature": 0.8,
        "top_k": 6,
        "top_p": 0.95,
        "repetition_penalty": 0.8,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 0.7},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_the_law(name: str) -> None:
    prompt, output = [4, 2], [6, 1, 6]
    params = SamplingParams(**{"temperature": 1.0} | OPTIONS[name])
    rows = [Row(params, 11, 0, p, prompt, output) for p in range(DRAWS)]
    drawn = [choice.token for choice in draw(LOGITS, rows)]
    statistic, freedom = chi_square(drawn, law(LOGITS, params, prompt, output))
    assert statistic <= CHI_SQUARE[freedom]


@pytest.mark.parametrize("key", ["seed", "choice"])
def test_seeds_and_choices_draw_by_the_same_law(key: str) -> None:
    params = SamplingParams(temperature=1.0)
    rows = [Row(params, i) if key == "seed" else Row(params, 0, i) for i in range(DRAWS)]
    statistic, freedom = chi_square([c.token for c in draw(LOGITS, rows)], law(LOGITS, params))
    assert statistic <= CHI_SQUARE[freedom]


def test_neighbours_in_any_key_are_independent() -> None:
    """Pairs of draws at neighbouring seeds, choices and positions: 4 x 4 equally likely cells."""
    params, flat = SamplingParams(temperature=1.0), np.zeros(4, dtype=np.float32)
    makers: list[Callable[[int], Row]] = [
        lambda i: Row(params, i),
        lambda i: Row(params, 0, choice=i),
        lambda i: Row(params, 0, position=i),
    ]
    for maker in makers:
        drawn = [c.token for c in draw(flat, [maker(i) for i in range(DRAWS)])]
        pairs = Counter(zip(drawn, drawn[1:], strict=False))
        wanted = (DRAWS - 1) / 16
        # 15 degrees of freedom at 1e-6.
        assert sum((pairs[a, b] - wanted) ** 2 for a in range(4) for b in range(4)) / wanted < 55.5


def test_the_test_of_draws_sees_a_wrong_law() -> None:
    """Its power: a sampler that moves 2.5 percentage points from one token to another fails."""
    right = law(LOGITS, SamplingParams(temperature=1.0))
    wrong = right.copy()
    wrong[0] -= 0.025
    wrong[1] += 0.025
    random_ = np.random.default_rng(1)
    caught = 0
    for _ in range(200):
        drawn = random_.choice(SIZE, size=DRAWS, p=wrong)
        statistic, freedom = chi_square(drawn.tolist(), right)
        caught += statistic > CHI_SQUARE[freedom]
    assert caught >= 190


# --------------------------------------------------------------------------- options, exactly


@st.composite
def situations(draw: st.DrawFn) -> tuple[NDArray[np.float32], SamplingParams, list[int], list[int]]:
    size = draw(st.integers(1, 40))
    values = draw(st.lists(st.integers(-40, 40), min_size=size, max_size=size))
    token = st.integers(0, size - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.3, 1.0, 2.5])),
        top_k=draw(st.sampled_from([0, 1, 3, 10, 50])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.37, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.04, 0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.6])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.45, -0.2])),
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-3.3, 1.7, 100.0]), max_size=3)),
    )
    lists = st.lists(token, max_size=12)
    return np.array(values, dtype=np.float32) / np.float32(7), params, draw(lists), draw(lists)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(situations())
def test_what_is_drawn_is_what_the_options_leave(
    found: tuple[NDArray[np.float32], SamplingParams, list[int], list[int]],
) -> None:
    logits, params, prompt, output = found
    p = law(logits, params, prompt, output)
    rows = [Row(params, 3, 0, position, prompt, output) for position in range(200)]
    drawn = {choice.token for choice in draw(logits, rows)}
    assert all(p[token] > 0 for token in drawn)
    # Missing each of 200 draws has a probability below e^-10 for what comes once in twenty.
    assert {int(t) for t in np.flatnonzero(p > 0.05)} <= drawn


def test_greedy_is_the_first_of_the_likeliest() -> None:
    logits = np.array([0.1, 3.0, 2.9, 3.0], dtype=np.float32)
    assert one(logits, Row(SamplingParams(temperature=0), 0)).token == 1
    biased = SamplingParams(temperature=0, logit_bias={2: 0.5})
    assert one(logits, Row(biased, 0)).token == 2


def test_log_probabilities_are_the_model_s_own() -> None:
    expected = torch.log_softmax(torch.from_numpy(LOGITS).double(), -1).numpy()
    order = np.argsort(-LOGITS, kind="stable")
    for changed in ({}, {"temperature": 0.0}, {"logit_bias": {2: 50.0}}, {"top_k": 1}):
        params = SamplingParams(**{"temperature": 1.0, "logprobs": 5} | changed)  # type: ignore[arg-type]
        found = one(LOGITS, Row(params, 0))
        assert found.logprob == pytest.approx(expected[found.token], abs=1e-9)
        assert [a.token for a in found.top] == order[:5].tolist()
        assert [a.logprob for a in found.top] == pytest.approx(expected[order[:5]], abs=1e-9)


def test_alternatives_are_as_many_as_asked_for_or_there() -> None:
    rows = [Row(SamplingParams(logprobs=n), 0) for n in (None, 0, 3, 20)]
    assert [len(c.top) for c in draw(LOGITS, rows)] == [0, 0, 3, 8]
    assert one(LOGITS, rows[2]).top[0] == Alternative(4, one(LOGITS, rows[0]).logprob)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 100), st.data())
def test_masks_and_bans_leave_the_rest(size: int, data: st.DataObject) -> None:
    mask = data.draw(st.none() | st.binary(max_size=(size + 7) // 8))
    banned = data.draw(st.sets(st.integers(0, size - 1)))
    allowed = {
        t
        for t in range(size)
        if t not in banned and (mask is None or (t // 8 < len(mask) and mask[t // 8] >> t % 8 & 1))
    }
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32)
    for temperature in (0.0, 1.0):
        row = Row(SamplingParams(temperature=temperature), 0, banned=banned, mask=mask, position=7)
        found = one(logits, row)
        if not allowed:
            assert found.token == -1
            assert "no token is left to follow 7 tokens" in found.error
        elif temperature == 0:
            assert found.token == max(sorted(allowed), key=lambda t: logits[t])
        else:
            assert found.token in allowed


def test_bad_words_are_banned_where_they_would_end() -> None:
    words = BadWords([(3,), (1, 2), (5, 1, 4), ()])
    for output, banned in (
        ([], {3}),
        ([1], {3, 2}),
        ([5, 1], {3, 2, 4}),
        ([1, 5], {3}),
        ([9, 5, 1], {3, 2, 4}),
    ):
        assert set(words.banned(output)) == banned
    row = Row(SamplingParams(), 0, output=[1], bad_words=words)
    logits = np.array([0, 0, 9, 8, 1], dtype=np.float32)
    assert one(logits, row).token == 4


# ------------------------------------------------------------------------------- rows by themselves


def mixed_rows() -> list[Row]:
    rows = []
    for i, options in enumerate(OPTIONS.values()):
        params = SamplingParams(**{"temperature": 1.0, "logprobs": i % 3} | options)
        rows.append(Row(params, 40 + i, i % 2, 100 + i, [4, 2], [6, 1, 6], mask=b"\xff\xff"))
    return rows


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_choice_does_not_depend_on_its_company(threads: int) -> None:
    rows = mixed_rows()
    alone = [one(LOGITS, row) for row in rows]
    order = list(range(len(rows)))
    random.Random(threads).shuffle(order)
    sampler = Sampler(SIZE, Compute(threads=threads))
    logits = torch.from_numpy(np.broadcast_to(LOGITS, (len(rows), SIZE)).copy())
    assert sampler.sample(logits, [rows[i] for i in order]) == [alone[i] for i in order]


def test_a_kept_row_counts_as_a_new_one_does() -> None:
    """What penalties need is brought up to date with the output, not counted anew."""
    params = SamplingParams(temperature=1.0, frequency_penalty=1.2, repetition_penalty=1.5, seed=1)
    prompt, output = (4, 2, 4), [1]
    kept = Row(params, 1, prompt=prompt, output=output)
    for position in range(30):
        kept.position = position
        new = Row(params, 1, 0, position, prompt, tuple(output))
        found = one(LOGITS, kept)
        assert found == one(LOGITS, new)
        output.append(found.token)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_row_fails_alone(value: float) -> None:
    rows = mixed_rows()[:3]
    logits = np.broadcast_to(LOGITS, (3, SIZE)).copy()
    wanted = draw(logits, rows)
    logits[1, 3] = value
    found = draw(logits, rows)
    assert "after 101 tokens are NaN or infinite" in found[1].error
    assert found[1].token == -1
    assert [found[0], found[2]] == [wanted[0], wanted[2]]


def test_a_token_that_is_not_there_fails_its_row_alone() -> None:
    rows = mixed_rows()[:2]
    wanted = draw(LOGITS, rows)
    for bad in (
        Row(SamplingParams(logit_bias={SIZE: 1.0}), 0),
        Row(SamplingParams(), 0, banned=[SIZE]),
        Row(SamplingParams(), 0, bad_words=BadWords([(SIZE,)])),
    ):
        found = draw(LOGITS, [rows[0], bad, rows[1]])
        assert f"token {SIZE} is not in the vocabulary" in found[1].error
        assert [found[0], found[2]] == wanted


def test_logits_of_another_shape_are_refused() -> None:
    for shape in ((2, SIZE), (1, SIZE + 1)):
        with pytest.raises(EngineError, match="for 1 rows of 9"):
            Sampler(SIZE, COMPUTE).sample(torch.zeros(shape), [Row(SamplingParams(), 0)])


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
