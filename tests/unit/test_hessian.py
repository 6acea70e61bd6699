"""Factors of Hessians, their order of columns, and second moments, against their definitions."""

from __future__ import annotations

import pytest
import torch

from nybble.calibrate.hessian import (
    BLOCK,
    NotPositiveDefinite,
    blocks_of,
    column_order,
    damped,
    factorize,
    factorize_ordered,
)
from nybble.calibrate.statistics import Moments, Statistics
from nybble.errors import EngineError


def inputs(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Correlated rows of very different channels, with one massive token."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn((channels, channels), generator=draw)
    x = torch.randn((tokens, channels), generator=draw) @ mix
    x *= torch.linspace(0.1, 3, channels)
    x[tokens // 2] *= 300
    return x


def test_factors_multiply_to_the_matrix() -> None:
    h = inputs(200, 48).T @ inputs(200, 48)
    factors = factorize(h)
    u = factors.upper
    assert torch.equal(u.tril(-1), torch.zeros_like(u))
    assert torch.allclose(u.diagonal(), torch.ones(48))
    made = u @ torch.diag(factors.importance) @ u.T
    assert torch.allclose(made, h, rtol=1e-3, atol=1e-4 * float(h.abs().max()))


def test_the_loss_is_the_sum_over_columns_of_what_each_misses() -> None:
    h = damped(inputs(90, 32).T @ inputs(90, 32), 0.01)
    factors = factorize(h)
    e = torch.randn((5, 32), generator=torch.Generator().manual_seed(3))
    direct = ((e @ h) * e).sum(-1)
    assert torch.allclose(((e @ factors.upper) ** 2) @ factors.importance, direct, rtol=1e-3)


def test_an_order_may_be_given_with_the_matrix() -> None:
    h = damped(inputs(90, 48).T @ inputs(90, 48), 0.01)
    order = column_order(h.diagonal())
    one, other = factorize(h[order][:, order]), factorize_ordered(h, order)
    assert torch.equal(one.upper, other.upper)
    assert torch.equal(one.importance, other.importance)


def test_local_blocks_are_those_of_the_diagonal() -> None:
    h = damped(inputs(400, 64).T @ inputs(400, 64), 0.01)
    factors = blocks_of(h, 0.0)
    for b in range(4):
        u, d = factors.upper[b], factors.importance[b]
        own = h[b * BLOCK : (b + 1) * BLOCK, b * BLOCK : (b + 1) * BLOCK]
        made = u @ torch.diag(d) @ u.T
        assert torch.allclose(made, own, rtol=2e-3, atol=1e-4 * float(own.abs().max()))


def test_a_matrix_that_is_not_positive_definite_is_said_so() -> None:
    h = torch.eye(32)
    h[3, 3] = -1
    with pytest.raises(NotPositiveDefinite, match="32 channels is not positive definite"):
        factorize(h)


def test_a_nearly_singular_matrix_is_factorized_in_double() -> None:
    x = inputs(8, 64)  # rank 8
    h = x.T @ x
    factors = factorize(damped(h, 1e-5))
    assert bool(torch.isfinite(factors.upper).all())
    assert float(factors.importance.min()) > 0


def test_the_order_keeps_blocks_together_and_begins_with_what_matters() -> None:
    diagonal = torch.rand(80, generator=torch.Generator().manual_seed(1))
    diagonal[37] = 9
    order = column_order(diagonal)
    assert sorted(order.tolist()) == list(range(80))
    assert int(order[0]) == 37
    blocks = order.view(-1, BLOCK) // BLOCK
    assert bool((blocks == blocks[:, :1]).all())
    peaks = diagonal.view(-1, BLOCK).amax(-1)[blocks[:, 0]]
    assert bool((peaks[:-1] >= peaks[1:]).all())
    inside = diagonal[order].view(-1, BLOCK)
    assert bool((inside[:, :-1] >= inside[:, 1:]).all())


def test_moments_weigh_tokens_by_three_shares() -> None:
    x = inputs(60, 24).double()
    residuals = torch.linspace(0.5, 9, 60).double()
    energy = x.square().mean(-1)
    weights = 0.5 / energy + 0.2 / energy.mean() + 0.3 * residuals / residuals.mean() / energy
    expected = (x * weights[:, None]).T @ x
    expected /= expected.diagonal().mean()
    moments = Moments(24, plain_share=0.2, residual_share=0.3)
    moments.add(x.float(), residuals=residuals.float())
    assert torch.allclose(moments.mixed().double(), expected, rtol=1e-4, atol=1e-5)
    assert moments.tokens == 60
    assert moments.peak == pytest.approx(float(energy.max() / energy.median()), rel=1e-4)


def test_without_a_residual_stream_tokens_are_alike_in_it() -> None:
    x = inputs(60, 24)
    known, unknown = Moments(24), Moments(24)
    known.add(x, residuals=torch.full((60,), 7.0))
    unknown.add(x)
    assert torch.allclose(known.mixed(), unknown.mixed(), rtol=1e-4, atol=1e-5)


def test_a_massive_token_does_not_drown_the_others() -> None:
    x = inputs(60, 24)
    moments, textbook = Moments(24), Moments(24, plain_share=1.0, residual_share=0.0)
    for part in (moments, textbook):
        part.add(x)
    massive = x[30] / x[30].norm()
    share = [float(massive @ m.mixed() @ massive) / 24 for m in (moments, textbook)]
    assert share[1] > 0.99
    assert share[0] < 0.8


def test_a_token_that_stands_out_in_the_stream_counts_more() -> None:
    x = torch.eye(16).repeat(4, 1)  # all of one energy, as behind a norm
    residuals = torch.ones(64)
    residuals[3] = 1000.0
    moments, alike = Moments(16, residual_share=0.1), Moments(16, residual_share=0.0)
    moments.add(x, residuals=residuals)
    alike.add(x, residuals=residuals)
    weight = [float(m.mixed()[3, 3] / m.mixed()[4, 4]) for m in (moments, alike)]
    assert weight[0] > 2.5
    assert weight[1] == pytest.approx(1)


def test_massive_tokens_that_come_late_do_not_drown_the_others() -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn((8000, 32), generator=draw)
    sinks = torch.arange(4100, 8000, 500)
    x[sinks] = 0
    x[sinks, 5] = 1500.0
    late, at_once = Moments(32), Moments(32)
    for part in x.split(400):
        late.add(part)
    at_once.add(x)
    shares = [float(m.mixed()[5, 5]) / 32 for m in (late, at_once)]
    assert shares[1] == pytest.approx(0.27, abs=0.03)
    assert shares[0] < 0.5  # 0.9 and more by the first rows alone


def test_parts_measured_apart_are_added() -> None:
    x, residuals = inputs(90, 24), torch.linspace(0.5, 9, 90)
    whole, later = Moments(24), Moments(24)
    whole.add(x[:50], residuals=residuals[:50])
    later.add(x[50:], residuals=residuals[50:])
    expected = whole.sum + later.sum
    whole.merge(later)
    assert torch.equal(whole.sum, expected)
    assert whole.tokens == 90
    assert whole.energy == pytest.approx(float(x.square().mean()), rel=1e-5)
    assert whole.residual == pytest.approx(float(residuals.mean()), rel=1e-5)
    energies = x.square().mean(-1)
    assert whole.peak == pytest.approx(float(energies.max() / energies.median()), rel=1e-4)
    whole.merge(Moments(24))
    assert torch.equal(whole.sum, expected)


def test_what_judges_apart_is_measured_by_what_fits() -> None:
    x, hidden = inputs(30, 8), inputs(30, 5)
    both, fit = Statistics({"a"}, {"router"}), Statistics({"a"}, {"router"})
    for known in (both, fit):
        known.begin(is_guard=False, hidden=hidden[:20])
        known.linear(("a",), x[:20])
        known.linear(("router",), x[:20])
    apart = fit.empty()
    for known in (both, apart):
        known.begin(is_guard=True, hidden=hidden[20:])
        known.linear(("a",), x[20:])
        known.linear(("router",), x[20:])
    fit.merge(apart)
    assert torch.equal(fit.guard["a",].sum, both.guard["a",].sum)
    assert torch.equal(fit.fit["a",].sum, both.fit["a",].sum)
    assert torch.equal(torch.cat(fit.kept["router",]), x)


def test_weights_count_rows_several_times() -> None:
    x = inputs(12, 8)
    weights = torch.tensor([3.0, 0.0] * 6)
    weighted, repeated = Moments(8, 1.0), Moments(8, 1.0)
    weighted.add(x, weights)
    repeated.add(x[::2].repeat(3, 1))
    assert torch.allclose(weighted.sum, repeated.sum, rtol=1e-4)


def test_rows_of_zeros_say_nothing_and_nan_is_named() -> None:
    moments = Moments(8)
    moments.add(torch.zeros(3, 8))
    assert moments.tokens == 0
    assert not bool(moments.mixed().any())
    assert moments.peak == 1
    bad = torch.ones(4, 8)
    bad[2, 1] = float("nan")
    with pytest.raises(EngineError, match=r"layers\.3\.mlp\.down_proj: .* 1 of 4"):
        moments.add(bad, module="layers.3.mlp.down_proj")


def test_the_observer_keeps_fit_and_guard_apart() -> None:
    seen = Statistics({"a", "b"}, {"router"}, lambda modules, x: 2 * x)
    x = inputs(10, 8)
    seen.begin(is_guard=False, hidden=torch.ones(10, 5) * torch.arange(1, 11)[:, None])
    seen.linear(("a", "b"), x)
    seen.linear(("other",), x)
    seen.linear(("router",), x)
    seen.begin(is_guard=True, hidden=torch.ones(4, 5))
    seen.linear(("a", "b"), x[:4])
    assert set(seen.fit) == set(seen.guard) == {("a", "b")}
    assert seen.fit["a", "b"].tokens == 10
    assert seen.guard["a", "b"].tokens == 4
    assert seen.guard["a", "b"].energy == seen.fit["a", "b"].energy
    assert seen.guard["a", "b"].residual == seen.fit["a", "b"].residual == pytest.approx(38.5)
    assert seen.fit["a", "b"].energy == pytest.approx(4 * float(x.square().mean()), rel=1e-4)
    assert torch.equal(seen.kept["router",][0], x)
