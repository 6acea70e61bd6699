"""The C kernel chooses the token that the definition chooses, on every instruction set; noise is
Philox, and a row is chosen from alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.token_choice import (
    MOST_VOCABULARY,
    NAN,
    NOTHING_LEFT,
    RULE,
    Choices,
    Rules,
    choose,
    reference,
)

#: log_sum is good to 5e-12 relative in C, and logits here stay below 200.
ATOL = 1e-9
#: One token; around vectors, bytes of a mask, counters of two tokens, blocks of 64; more than 2048
#: blocks of 64, so that blocks are longer.
SIZES = (1, 2, 3, 7, 8, 9, 63, 64, 65, 130, 1001, 4097, 20_011, 140_001)

Logits = NDArray[np.float32]


@pytest.fixture(params=list(dispatch.ISAS))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn; one this machine lacks is skipped by name."""
    if request.param not in dispatch.machine_isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("NYBBLE_KERNELS", "cpu")
    monkeypatch.setenv("NYBBLE_ISA", request.param)
    return str(request.param)


def rule(**changed: Any) -> tuple[Any, ...]:
    values = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "alternatives": 0}
    values |= {"seed": 5, "choice": 0, "position": 9} | changed
    return tuple(values[name] for name in RULE.names or ())


def rules(
    records: Sequence[tuple[Any, ...]],
    edits: Sequence[Sequence[tuple[int, float, float]]] | None = None,
    masks: Sequence[bytes | None] | None = None,
) -> Rules:
    edits = edits or [[] for _ in records]
    flat = [edit for row in edits for edit in row]
    starts = np.cumsum([0, *(len(row) for row in edits)]).astype(np.int64)
    tokens = np.array([t for t, _, _ in flat], dtype=np.int32)
    factors, shifts = (np.array([e[i] for e in flat], dtype=np.float64) for i in (1, 2))
    made = np.array(list(records), dtype=RULE)
    return Rules(made, starts, tokens, factors, shifts, masks or [None] * len(records))


def found(logits: Logits, asked: Rules, threads: int = 2) -> Choices:
    return choose(torch.from_numpy(logits.copy()), asked, Compute(threads=threads))


def check(logits: Logits, asked: Rules) -> None:
    """C and the definition agree: bit for bit in tokens."""
    wanted = reference.choose(torch.from_numpy(logits.copy()), asked, Compute(threads=1))
    got = found(logits, asked)
    np.testing.assert_array_equal(got.token, wanted.token)
    np.testing.assert_array_equal(got.top_tokens, wanted.top_tokens)
    for mine, theirs in ((got.logprob, wanted.logprob), (got.top_logprobs, wanted.top_logprobs)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=ATOL)


def logits_of(kind: str, rows: int, size: int, seed: int) -> Logits:
    """Smooth, flat, peaked, full of ties, with holes, of zeros of both signs, far apart."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, size)) * random.choice([0.01, 1.0, 5.0, 30.0])
    if kind == "ties":
        x = np.round(x)
    if kind == "flat":
        x[:] = 3.25
    if kind == "holes":
        x[random.random(x.shape) < 0.5] = -np.inf
    if kind == "zeros":
        x = np.where(random.random(x.shape) < 0.5, -0.0, 0.0)
    if kind == "peaked":
        x[random.random(x.shape) < 0.01] += 12
    if kind == "far":
        x = np.sign(x) * 10.0 ** random.uniform(-30, 30, x.shape)
    return x.astype(np.float32)


KINDS = ("smooth", "ties", "flat", "holes", "zeros", "peaked", "far")
RECORDS = st.builds(
    rule,
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 0.7, 1.0, 3.0, 100.0]),
    top_p=st.sampled_from([1.0, 0.999999, 0.95, 0.5, 0.01, 1e-12]),
    min_p=st.sampled_from([0.0, 1e-310, 0.05, 0.5, 0.999]),
    top_k=st.sampled_from([0, 1, 5, 20, 300, 3000, 2**31 - 1]),
    alternatives=st.integers(0, 20),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 127),
    position=st.integers(0, 2**20),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from(SIZES), st.sampled_from(KINDS), st.lists(RECORDS, min_size=1, max_size=3),
       st.data())  # fmt: skip
def test_the_definition_s_token(
    isa: str, size: int, kind: str, records: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    edit = st.tuples(
        st.integers(0, size - 1),
        st.sampled_from([1.0, 1.3, 0.5, 100.0]),
        st.sampled_from([0.0, 2.5, -1.0, 100.0, -np.inf]),
    )
    edits = [data.draw(st.lists(edit, max_size=6)) for _ in records]
    mask = st.none() | st.binary(max_size=min((size + 7) // 8 + 1, 300))
    masks = [data.draw(mask) for _ in records]
    seed = data.draw(st.integers(0, 99))
    check(logits_of(kind, len(records), size, seed), rules(records, edits, masks))


@pytest.mark.parametrize(
    ("kind", "size"), [("smooth", 248_320), ("peaked", 151_936), ("flat", 151_936)]
)
def test_published_vocabularies(isa: str, kind: str, size: int) -> None:
    records = [
        rule(alternatives=20),
        rule(top_k=20, top_p=0.95),
        rule(top_p=0.95, temperature=0.6),
        rule(top_k=50_000, min_p=0.01),
        rule(temperature=0),
    ]
    check(logits_of(kind, len(records), size, size), rules(records))


FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 40},
    {"top_p": 0.02},
    {"top_p": 0.4},
    {"top_p": 0.7},
    {"top_p": 0.99},
    {"min_p": 0.3},
    {"min_p": 0.9},
    {"top_k": 30, "top_p": 0.6, "min_p": 0.2},
)


@pytest.mark.parametrize("size", [2, 3, 9, 65, 131, 1001])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_many_draws(isa: str, size: int, spread: float) -> None:
    """A token more or less, or the noise of one, shows only when it wins."""
    random = np.random.default_rng(size)
    logits = (spread * random.normal(size=(330, size))).astype(np.float32)
    check(logits, rules([rule(position=i, **FILTERS[i % len(FILTERS)]) for i in range(330)]))


def test_many_equals(isa: str) -> None:
    """The winner of 20,000 is seldom alone: what is skipped as hopeless must be."""
    records = [rule(position=i, **FILTERS[8 * (i % 2)]) for i in range(60)]
    check(np.zeros((60, 20_011), dtype=np.float32), rules(records))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_nuclei_that_end_in_a_long_flat_tail(isa: str, top_p: float) -> None:
    """The lightest tokens make up most of the weight, or all of it."""
    logits = np.zeros((40, 3001), dtype=np.float32)
    logits[:, ::1000] = np.linspace(0, 8, 40)[:, None]
    logits[:, 1::2] -= np.linspace(0, 0.1, 1500, dtype=np.float32)
    check(logits, rules([rule(position=i, top_p=top_p) for i in range(40)]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_row_leaves_the_others(isa: str, value: float) -> None:
    logits = logits_of("smooth", 3, 1001, 1)
    whole = found(logits, rules([rule()] * 3))
    logits[1, 700] = value
    got = found(logits, rules([rule()] * 3))
    assert got.token[1] == NAN
    assert got.token[[0, 2]].tolist() == whole.token[[0, 2]].tolist()


def test_nothing_left(isa: str) -> None:
    logits = logits_of("smooth", 4, 65, 1)
    logits[3] = -np.inf
    banned = [(t, 1.0, -np.inf) for t in range(65)]
    masks = [b"", bytes(9), None, None]
    got = found(logits, rules([rule()] * 4, [[], [], banned, []], masks))
    assert got.token.tolist() == [NOTHING_LEFT] * 4


def test_a_token_behind_the_mask_is_not_allowed(isa: str) -> None:
    logits = np.zeros((1, 130), dtype=np.float32)
    logits[0, 129] = 50
    assert found(logits, rules([rule(temperature=0)], None, [b"\xff" * 16])).token[0] == 0
    assert found(logits, rules([rule(temperature=0)], None, [b"\xff" * 17])).token[0] == 129


def test_company_and_threads_change_no_bit(isa: str) -> None:
    logits = logits_of("smooth", 9, 4097, 3)
    records = [rule(position=i, top_p=0.9, alternatives=i % 4) for i in range(9)]
    together = [found(logits, rules(records), threads) for threads in (1, 2, 3)]
    for i in range(9):
        alone = found(logits[i : i + 1], rules(records[i : i + 1]), 1)
        for batch in together:
            assert batch.token[i] == alone.token[0]
            assert batch.logprob[i].tobytes() == alone.logprob[0].tobytes()


def test_philox_is_the_published_one() -> None:
    """Known answers of Random123, kat_vectors."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822 | 0x299F31D0 << 32)
    ones = (*[0xFFFFFFFF] * 4, 2**64 - 1)
    wanted = {
        (0, 0, 0, 0, 0): "6627e8d5e169c58dbc57ac4c9b00dbd8",
        ones: "408f276d41c83b0ea20bc7c66d5451fd",
        pi: "d16cfe0994fdcceb5001e42024126ea1",
    }
    for (a, b, c, d, key), words in wanted.items():
        got = reference.philox((np.array([a], dtype=np.uint64), b, c, d), key)
        assert "".join(f"{int(word[0]):08x}" for word in got) == words


def test_weights_and_logarithms_are_right() -> None:
    x = -np.geomspace(1e-12, 40, 5000)
    # Half a unit of rounding, and the fit's 4e-14 of 2^40 units.
    error = np.abs(reference.weights(x).astype(np.float64) - np.exp(x) * 2.0**40)
    assert error.max() < 0.5 + 4e-14 * 2.0**40 * 1.1
    u = np.concatenate(
        [np.geomspace(2.0**-53, 1, 5000, endpoint=False), 1 - 2.0 ** -np.arange(2, 54)]
    )
    np.testing.assert_allclose(reference.log(u), np.log(u), rtol=4e-16, atol=0)


def test_the_extremes_of_the_noise_are_finite() -> None:
    bits = np.array([0, 2**52 - 1], dtype=np.float64)
    noise = -reference.log(-reference.log((bits + 0.5) * 2.0**-52))
    assert noise == pytest.approx([-3.61, 36.74], abs=0.01)


def test_what_does_not_fit_is_refused() -> None:
    good = torch.zeros(1, 5)
    one = rules([rule()])
    for logits in (good.double(), good[:, ::2], good[0], torch.zeros(1, 0)):
        with pytest.raises(EngineError, match="logits must be"):
            choose(logits, one, Compute(threads=1))
    with pytest.raises(EngineError, match=f"{MOST_VOCABULARY:,}"):
        choose(torch.empty(1, MOST_VOCABULARY + 1), one, Compute(threads=1))
    with pytest.raises(EngineError, match="rows of logits"):
        choose(torch.zeros(2, 5), one, Compute(threads=1))
    for token in (-1, 5):
        with pytest.raises(EngineError, match="vocabulary of 5"):
            choose(good, rules([rule()], [[(token, 1.0, 0.0)]]), Compute(threads=1))
