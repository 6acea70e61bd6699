"""GPTQ-X on one group: losses by the definition, the guard, what happens for want of data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nybble.calibrate.rounding import EFFORTS, Effort, Evidence, Judge, round_group
from nybble.calibrate.statistics import Moments
from nybble.formats import search as definition
from nybble.formats.block import NVFP4
from nybble.formats.tensor import BlockScaledTensor

N, K = 40, 160


def weight(seed: int = 0, rows: int = N, columns: int = K) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((rows, columns), generator=draw) * 0.05


def evidence(seed: int = 0, columns: int = K, tokens: int = 1200, guard: int = 300) -> Evidence:
    """Correlated inputs with outlier channels, halves of one stream of tokens."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn((columns, columns // 2), generator=draw)
    x = torch.randn((tokens + guard, columns // 2), generator=draw) @ mix.T
    x += 0.3 * torch.randn(x.shape, generator=draw)
    x *= torch.rand(columns, generator=draw) ** 3 * 5 + 0.05
    fit, held = Moments(columns), Moments(columns)
    fit.add(x[:tokens])
    held.add(x[tokens:])
    return Evidence(fit.mixed(), held.mixed(), fit.tokens, held.tokens)


def scale_of(w: torch.Tensor) -> float:
    return float(definition.tensor_scale(np.float32(w.abs().max()), NVFP4, "mse"))


def decoded(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    tensor = BlockScaledTensor(
        NVFP4,
        tuple(w.shape),
        codes.contiguous().numpy(),
        scales.contiguous().numpy(),
        np.asarray(scale_of(w), dtype=np.float32),
    )
    return torch.from_numpy(tensor.dequantize())


def loss(w: torch.Tensor, made: torch.Tensor, h: torch.Tensor) -> float:
    d = (made - w).double()
    return float(((d @ h.double()) * d).sum() / ((w.double() @ h.double()) * w.double()).sum())


@pytest.mark.parametrize("name", ["fast", "default", "best"])
def test_the_stated_loss_is_that_of_what_is_returned(name: str) -> None:
    w, known = weight(), evidence()
    codes, scales, choice = round_group(w, scale_of(w), known, EFFORTS[name])
    assert known.guard is not None
    found = loss(w, decoded(w, codes, scales), known.guard)
    assert choice.losses[choice.method] == pytest.approx(found, rel=1e-3)
    assert choice.method == ("local" if name == "fast" else "gptq-x")
    assert choice.reason == ""


def test_each_step_up_loses_less() -> None:
    w, known = weight(), evidence()
    choice = round_group(w, scale_of(w), known, EFFORTS["default"])[2]
    losses = choice.losses
    assert losses["gptq-x"] < 0.6 * losses["local"]
    assert losses["local"] < 0.8 * losses["mse"] < losses["absmax"]
    best = round_group(w, scale_of(w), known, EFFORTS["best"])[2]
    assert best.losses["gptq-x"] < losses["gptq-x"]
    assert choice.won == pytest.approx(1 - losses["gptq-x"] / losses["absmax"])


def test_polish_never_raises_the_loss_that_it_lowers() -> None:
    w, known = weight(), evidence()
    same = replace(EFFORTS["default"], dampings=(0.01,))
    losses = []
    for sweeps in (0, 1, 3):
        codes, scales, _ = round_group(w, scale_of(w), known, replace(same, sweeps=sweeps))
        h = known.fit + 0.01 * torch.eye(K)
        losses.append(loss(w, decoded(w, codes, scales), h))
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1] * (1 + 1e-5)


def test_switches_of_the_ablation_change_something() -> None:
    w, known = weight(), evidence()
    whole = round_group(w, scale_of(w), known, EFFORTS["default"])
    for switch in ({"orders": False}, {"searches_in_loop": False}):
        effort = replace(EFFORTS["default"], **switch)
        codes, _, choice = round_group(w, scale_of(w), known, effort)
        assert not torch.equal(codes, whole[0])
        assert choice.losses["gptq-x"] > whole[2].losses["gptq-x"]


def test_the_guard_refuses_what_held_out_tokens_refute() -> None:
    w, known = weight(), evidence()
    # Fitted to other channels than those that judge: feedback moves errors to where they hurt.
    other = evidence(seed=9)
    misled = replace(known, fit=other.fit)
    codes, scales, choice = round_group(w, scale_of(w), misled, EFFORTS["default"])
    assert choice.method == min(("mse", "local", "gptq-x"), key=lambda m: choice.losses[m])
    assert choice.method == "mse"
    assert choice.reason == "gptq-x is not better on held-out tokens"
    blind = replace(EFFORTS["default"], guards=False)
    assert round_group(w, scale_of(w), misled, blind)[2].method == "gptq-x"
    expected = definition.quantize(
        w.numpy(), NVFP4, "mse", scale=np.asarray(scale_of(w), dtype=np.float32)
    )
    assert np.array_equal(codes.numpy(), expected.codes)
    assert np.array_equal(scales.numpy(), expected.scale)


@pytest.mark.parametrize("rung", ["local", "mse"])
def test_a_lower_rung_is_kept_to_and_explained(rung: str) -> None:
    w, known = weight(), evidence()
    held = replace(known, rung=rung, reason="40 tokens for 160 channels")
    choice = round_group(w, scale_of(w), held, EFFORTS["default"])[2]
    assert choice.method == rung
    assert "gptq-x" not in choice.losses
    assert choice.reason == "40 tokens for 160 channels"
    assert choice.damping is None


def test_without_tokens_that_judge_nothing_is_fitted() -> None:
    w = weight()
    nothing = Evidence(torch.zeros(0, 0), None, 0, 0, "mse", "no token came here")
    codes, _, choice = round_group(w, scale_of(w), nothing, EFFORTS["best"])
    assert choice.method == "mse"
    assert choice.reason == "no token came here"
    assert choice.won == 0
    unjudged = replace(evidence(), guard=None, guard_tokens=0)
    again, _, choice = round_group(w, scale_of(w), unjudged, EFFORTS["best"])
    assert torch.equal(codes, again)
    assert choice.reason == "no tokens to judge by"


def test_a_hessian_that_cannot_be_factorized_falls_back_and_is_counted() -> None:
    w, known = weight(), evidence()
    bad = known.fit.clone()
    bad[5, 5] = -50
    choice = round_group(w, scale_of(w), replace(known, fit=bad), EFFORTS["default"])[2]
    assert choice.method in ("mse", "local")
    assert "not positive definite" in choice.reason


def test_dead_rows_channels_and_weights_are_no_trouble() -> None:
    w, known = weight(), evidence()
    w[7] = 0
    w[:, 32:48] = 0
    fit, guard = known.fit.clone(), known.guard
    assert guard is not None
    for h in (fit, guard):
        h[:16] = 0
        h[:, :16] = 0
    for name in EFFORTS:
        got = round_group(w, scale_of(w), replace(known, fit=fit, guard=guard), EFFORTS[name])
        made = decoded(w, *got[:2])
        assert not bool(made[7].any())
        assert bool(torch.isfinite(made).all())
        assert got[2].losses[got[2].method] <= got[2].losses["mse"]
    flat = torch.zeros_like(w)
    codes, scales, choice = round_group(flat, 1.0, known, EFFORTS["default"])
    assert not bool(codes.any())
    assert set(scales.reshape(-1).tolist()) == {0x38}
    assert choice.won == 0


def test_rows_are_independent_of_their_neighbours() -> None:
    w, known = weight(rows=70), evidence()
    one = replace(EFFORTS["best"], dampings=(0.03,))
    whole = round_group(w, scale_of(w), known, one)
    part = round_group(w[10:31], scale_of(w), known, one)
    # A matmul of other sizes may round otherwise; a rare tie may then fall to the other side.
    same = (whole[0][10:31] == part[0]).float().mean()
    assert float(same) > 0.99


def test_judging_some_rows_is_judging_them_alone() -> None:
    w, known = weight(), evidence()
    assert known.guard is not None
    judge = Judge(w, known.guard)
    rows = torch.tensor([3, 8, 21])
    alone = Judge(w[rows], known.guard)
    error = 0.01 * weight(seed=4)[rows]
    assert judge.loss(error, rows) == pytest.approx(alone.loss(error), rel=1e-5)


def test_efforts_are_what_they_are_called() -> None:
    assert list(EFFORTS) == ["fast", "default", "best"]
    assert all(isinstance(e, Effort) and e.name == name for name, e in EFFORTS.items())
    assert not EFFORTS["fast"].gptq
    assert not EFFORTS["fast"].is_sequential
