"""The ladder of methods by tokens seen: every rung is reached, in order; tokens are conserved."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.calibrate.expert_evidence import (
    Known,
    Routes,
    Seen,
    evidence,
    ladder,
    measured,
)
from nybble.calibrate.rounding import EFFORTS, round_group

FIXED = settings(derandomize=True, deadline=None, max_examples=60)
RUNGS = ["mse", "local", "gptq-x"]
K = 32


@FIXED
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    top=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    normalises=st.booleans(),
    levels=st.sampled_from([1, 2, 1000]),
)
def test_tokens_are_conserved(
    tokens: int, experts: int, top: int, seed: int, normalises: bool, levels: int
) -> None:
    """Each token is routed `top` times and misses the other experts, ties and certain routers
    included."""
    top = min(top, experts)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (tokens, experts), generator=generator).float() / levels * 8
    routes = Routes(logits, 0, top, normalises=normalises)
    seen = [routes.routed(e) for e in range(experts)]
    missed = [routes.near_misses(e, tokens) for e in range(experts)]
    assert sum(map(len, seen)) == top * tokens
    for mine, others in zip(seen, missed, strict=True):
        assert sorted([*mine.rows.tolist(), *others.rows.tolist()]) == list(range(tokens))
    whole = torch.zeros(tokens)
    for mine in seen:
        whole[mine.rows] += mine.weights.sqrt()
    assert bool((whole <= 1 + 1e-5).all())
    if normalises and tokens:
        torch.testing.assert_close(whole, torch.ones(tokens))


@FIXED
@given(weights=st.lists(st.floats(2.0**-20, 1.0, width=32), min_size=1, max_size=60))
def test_effective_tokens_are_between_one_and_all(weights: list[float]) -> None:
    effective = Seen(torch.arange(len(weights)), torch.tensor(weights)).effective
    assert 1 - 1e-6 <= effective <= len(weights) * (1 + 1e-6)


@FIXED
@given(
    tokens=st.integers(0, 12), more=st.integers(0, 12), channels=st.sampled_from([16, 32, 48, 96])
)
def test_more_tokens_never_lower_the_rung(tokens: int, more: int, channels: int) -> None:
    h = torch.eye(channels)
    one, other = (RUNGS.index(ladder(Known(h, n, n), channels)[0]) for n in (tokens, tokens + more))
    assert one <= other
    assert (one == 0) == (tokens == 0)
    assert (one == 2) == (tokens * 8 >= channels)


def crowded(share: list[int]) -> Routes:
    """A router of one choice that sends `share[e]` tokens to expert e."""
    chosen = torch.repeat_interleave(torch.arange(len(share)), torch.tensor(share))
    return Routes(torch.eye(len(share))[chosen] * 9, 0, 1, normalises=True)


def test_a_router_reaches_every_rung_and_each_is_taken() -> None:
    """Experts with 0, 1, K/8 - 1, K/8 and many tokens: what is allowed, and what becomes of it."""
    share = [0, 1, K // 8 - 1, K // 8, 400]
    routes = crowded(share)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((routes.tokens, K), generator=generator) * torch.linspace(0.05, 4, K)
    weight = torch.randn((24, K), generator=generator) * 0.02
    everyone = Seen(torch.arange(routes.tokens), torch.ones(routes.tokens))
    layer = measured(x.__getitem__, everyone, K, plain_share=0.5, module="layer")
    allowed, taken, reasons = [], [], []
    for e, count in enumerate(share):
        own = measured(x.__getitem__, routes.routed(e), K, plain_share=0.5, module=str(e))
        assert own.tokens == count
        found = evidence(own, layer, own, layer)
        assert abs(float(found.fit.diagonal().mean()) - 1) < 1e-5
        *_, choice = round_group(weight, 2.0**-9, found, EFFORTS["default"])
        allowed.append(found.rung)
        taken.append(choice.method)
        reasons.append(choice.reason)
        assert set(choice.losses) >= {"absmax", "mse"}
        assert choice.tokens == count
    assert allowed == ["mse", "local", "local", "gptq-x", "gptq-x"]
    assert taken == allowed
    assert "no calibration token" in reasons[0]
    assert "1 tokens" in reasons[1]
    assert reasons[3:] == ["", ""]


def test_certain_routers_leave_no_weight_to_a_chosen_expert() -> None:
    """A weight that underflows counts as nothing: no division by it, and the reason says so."""
    logits = torch.tensor([[0.0, 300.0, -300.0]] * 5)
    routes = Routes(logits, 0, 2, normalises=True)
    seen = routes.routed(0)
    assert len(seen) == 5
    assert seen.effective == 0
    own = measured(torch.ones((5, K)).__getitem__, seen, K, plain_share=0.5, module="m")
    rung, reason = ladder(own, K)
    assert rung == "mse"
    assert "weight" in reason
    assert not len(routes.near_misses(2, 5))


def test_where_nothing_is_known_at_all_the_search_without_data_answers() -> None:
    nothing = Known(torch.zeros((K, K)), 0, 0.0)
    found = evidence(nothing, nothing, nothing, nothing)
    assert found.rung == "mse"
    assert found.guard is None
    *_, choice = round_group(torch.ones((4, K)), 1.0, found, EFFORTS["best"])
    assert choice.method == "mse"
    assert choice.reason
