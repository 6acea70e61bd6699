"""What experts are known by, against plain loops over tokens in float64."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.calibrate import expert_tasks
from nybble.calibrate.expert_evidence import (
    PRIOR_TOKENS,
    Known,
    Routes,
    Seen,
    measured,
    shrunk,
)
from nybble.calibrate.rounding import EFFORTS, Evidence, round_group
from nybble.calibrate.statistics import PLAIN_SHARE

sys.path.insert(0, str(Path(__file__).parents[1]))

from expert_layers import EXPERTS as LAYER_EXPERTS
from expert_layers import WIDTH, Layer, open_layer

#: float32 sums of some hundred terms against float64.
CLOSE = 2e-5

TOKENS, EXPERTS, TOP, K = 53, 5, 2, 48


@pytest.fixture(params=[True, False], ids=["normalised", "plain"])
def routes(request: pytest.FixtureRequest) -> Routes:
    """Routes of a set that begins at row 7."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((TOKENS, EXPERTS), generator=generator) * 2
    return Routes(logits, 7, TOP, normalises=request.param)


def by_hand(routes: Routes) -> list[dict[int, float]]:
    """For each expert: row -> the weight that the token's router gives, chosen ones only; and the
    would-be weights of the others, negated."""
    found: list[dict[int, float]] = [{} for _ in range(EXPERTS)]
    for t, logits in enumerate(routes.logits.tolist()):
        whole = sum(math.exp(v) for v in logits)
        p = [math.exp(v) / whole for v in logits]
        chosen = sorted(range(EXPERTS), key=lambda e: -p[e])[:TOP]
        for e in range(EXPERTS):
            others = chosen if e in chosen else chosen[:-1]
            total = sum(p[o] for o in {*others, e}) if routes.normalises else 1.0
            found[e][7 + t] = p[e] / total * (1 if e in chosen else -1)
    return found


def hessian(x: Tensor, weights: dict[int, float]) -> NDArray[np.float64]:
    """1/2 by energy and 1/2 alike, mean diagonal 1; a loop over tokens."""
    plain, alike = np.zeros((K, K)), np.zeros((K, K))
    for row, weight in weights.items():
        v = x[row].numpy().astype(np.float64)
        if not v.any():
            continue
        plain += weight**2 * np.outer(v, v)
        alike += weight**2 * np.outer(v, v) / np.square(v).mean()
    found = plain / plain.diagonal().mean() + alike / alike.diagonal().mean()
    return found / 2


def test_routed_tokens_are_the_routers_and_weigh_p_squared(routes: Routes) -> None:
    for e, weights in enumerate(by_hand(routes)):
        seen = routes.routed(e)
        expected = {row: p**2 for row, p in weights.items() if p > 0}
        assert seen.rows.tolist() == list(expected)
        assert seen.weights.tolist() == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize("most", [0, 1, 9, TOKENS])
def test_near_misses_are_the_best_of_the_others(routes: Routes, most: int) -> None:
    for e, weights in enumerate(by_hand(routes)):
        seen = routes.near_misses(e, most)
        others = sorted((-p, row) for row, p in weights.items() if p < 0)
        expected = dict(sorted((row, p**2) for p, row in others[::-1][:most]))
        assert seen.rows.tolist() == list(expected)
        assert seen.weights.tolist() == pytest.approx(list(expected.values()), rel=1e-5)


def test_experts_hessians_equal_loops_over_tokens(routes: Routes) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((7 + TOKENS, K), generator=generator)
    x *= torch.linspace(0.1, 3, K)
    x[11] *= 40  # a massive token
    x[13] = 0
    for e, weights in enumerate(by_hand(routes)):
        seen = routes.routed(e)
        found = measured(x.__getitem__, seen, K, plain_share=0.5, module="m")
        expected = hessian(x, {row: p for row, p in weights.items() if p > 0})
        np.testing.assert_allclose(found.h.numpy(), expected, rtol=CLOSE, atol=CLOSE)
        assert float(found.h.diagonal().mean()) == pytest.approx(1, rel=1e-5)
        squares = [p**2 for p in weights.values() if p > 0]
        kish = sum(squares) ** 2 / sum(s**2 for s in squares)
        assert found.effective == pytest.approx(kish, rel=1e-5)
        assert found.tokens == len(squares)


def test_what_is_read_in_bands_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn((100, K), generator=torch.Generator().manual_seed(5))
    seen = Seen(torch.arange(3, 99), torch.rand(96, generator=torch.Generator().manual_seed(6)))
    whole = measured(x.__getitem__, seen, K, plain_share=0.5, module="m")
    monkeypatch.setattr("nybble.calibrate.expert_evidence.BAND_ROWS", 10)
    bands = measured(x.__getitem__, seen, K, plain_share=0.5, module="m")
    assert bands.energy == pytest.approx(whole.energy, rel=1e-6)
    torch.testing.assert_close(bands.h, whole.h, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    ("n", "n0", "share"), [(0, 10, 0.0), (10, 0, 1.0), (30, 10, 0.75), (48, 1000, 0.5)]
)
def test_shrinkage_is_by_tokens_up_to_what_the_prior_counts_as(
    n: int, n0: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(7)
    own, prior = torch.rand((2, K, K), generator=generator)
    found = shrunk(Known(own, n, n), Known(prior, n0, n0), 48)
    torch.testing.assert_close(found, share * own + (1 - share) * prior, rtol=1e-6, atol=0)


def mixed(x: NDArray[np.float64], weights: NDArray[np.float64], base: float) -> tuple[object, ...]:
    """Hessian of rows x by their weights (squares of p), in float64, and how many tokens it is
    worth; `base` is the energy that the plain share is measured by."""
    h = np.zeros((x.shape[1], x.shape[1]))
    for row, weight in zip(x, weights, strict=True):
        energy = np.square(row).mean()
        h += weight * np.outer(row, row) * (PLAIN_SHARE / base + (1 - PLAIN_SHARE) / energy)
    return h / h.diagonal().mean(), weights.sum() ** 2 / np.square(weights).sum()


def mean_energy(x: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float((np.square(x).mean(-1) * weights).sum() / weights.sum())


def both(own: tuple[object, ...], prior: tuple[object, ...], channels: int) -> NDArray[np.float64]:
    (h, n), (h0, n0) = own, prior
    n0 = min(n0, PRIOR_TOKENS * channels)  # type: ignore[call-overload]
    return (n * h + n0 * h0) / (n + n0)  # type: ignore[operator, no-any-return]


class ByHand:
    """One set's view of a layer's experts, in float64: `first` to `last` of the inputs `x`."""

    def __init__(self, layer: Layer, x: NDArray[np.float64]) -> None:
        self.layer, self.x = layer, x
        router = layer.weights.weight("model.layers.1.mlp.gate", (LAYER_EXPERTS, x.shape[1]))
        logits = x @ np.asarray(router, dtype=np.float64).T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        order = np.argsort(-p, axis=-1)[:, :2]
        self.chosen = np.zeros(p.shape, dtype=bool)
        np.put_along_axis(self.chosen, order, True, -1)
        top = np.take_along_axis(p, order, -1)
        # normalised by the two chosen; of another expert, by the first and itself
        if layer.mixture.normalises:
            p = np.where(self.chosen, p / top.sum(-1, keepdims=True), p / (top[:, :1] + p))
        self.p = p

    def routed(self, expert: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        rows = np.flatnonzero(self.chosen[:, expert])
        return rows, self.p[rows, expert] ** 2

    def missed(self, expert: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        rows = np.flatnonzero(~self.chosen[:, expert])
        rows = rows[np.argsort(-self.p[rows, expert])][:most]
        return rows, self.p[rows, expert] ** 2

    def inner(self, expert: int) -> NDArray[np.float64]:
        base = f"model.layers.1.mlp.experts.{expert}."
        gate, up = (
            self.layer.matrices[f"{base}{part}_proj"].astype(np.float64) for part in ("gate", "up")
        )
        g = self.x @ gate.T
        return g / (1 + np.exp(-g)) * (self.x @ up.T)


@pytest.mark.parametrize(("stacked", "normalised"), [(True, True), (False, True), (True, False)])
def test_each_job_is_rounded_by_its_own_evidence(
    stacked: bool, normalised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the files of a task to `round_group`: tokens, weights, inputs, priors and both sets."""
    seen: dict[bytes, Evidence] = {}

    def spy(weight: Tensor, scale: float, evidence: Evidence, *rest: object) -> object:
        seen[weight.numpy().tobytes()] = evidence
        return round_group(weight, scale, evidence, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(expert_tasks, "round_group", spy)
    with open_layer(tmp_path, stacked=stacked, norm_topk_prob=normalised) as layer:
        assert layer.mixture.normalises == normalised
        layer.round(EFFORTS["fast"])
        sets = [
            ByHand(layer, torch.cat(parts).numpy().astype(np.float64))
            for parts in (layer.fit, layer.guard)
        ]
        whole = [np.ones(len(s.x)) for s in sets]
        of_all = mean_energy(sets[0].x, whole[0])
        priors = [mixed(s.x, w, of_all) for s, w in zip(sets, whole, strict=True)]
        for job in layer.jobs:
            weight = np.concatenate([layer.matrices[m.module] for m in job.members])
            found = seen.pop(weight.astype(np.float32).tobytes())
            expert = int(job.members[0].module.split(".experts.")[1].split(".")[0])
            base = None
            for s, prior, h in zip(sets, priors, (found.fit, found.guard), strict=True):
                rows, weights = s.routed(expert)
                x, channels = s.x, s.x.shape[1]
                if len(job.members) == 1:
                    x, channels = s.inner(expert), WIDTH
                base = base or mean_energy(x[rows], weights)
                if len(job.members) == 1:
                    near, p = s.missed(expert, round(PRIOR_TOKENS * WIDTH))
                    prior = mixed(x[near], p, base)
                expected = both(mixed(x[rows], weights, base), prior, channels)
                assert h is not None
                np.testing.assert_allclose(h.numpy(), expected, rtol=2e-4, atol=2e-4)
            assert found.tokens == sets[0].chosen[:, expert].sum()
            assert found.guard_tokens == sets[1].chosen[:, expert].sum()
        assert not seen
