"""What is spared of four-bit inputs: the damage of each group, against a forward that is put
together by hand, and the recipe that comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from measured import made_up
from nybble.api.plan import LAYOUTS
from nybble.calibrate.activations import QuantizedInputs
from nybble.calibrate.promotion import Spot, measure_spots, promote, rounding_in
from nybble.calibrate.scales import input_scales
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import RecipeError
from nybble.formats.scheme import NVFP4_W4A4, NVFP4_W4A16
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import make_batch
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import load_recipe
from nybble.progress import Progress

LAYER = "model.language_model.layers.{}."
TOKENS = torch.randint(0, 131, (48,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    folder = tiny.checkpoint(tmp_path_factory.mktemp("m") / "m", "qwen3_5_moe")
    with Checkpoint.open(folder) as checkpoint:
        yield make_plan(checkpoint, load_recipe("nvfp4-redhat"), LAYOUTS["modelopt"])


@pytest.fixture(scope="module")
def scales(plan: Plan) -> dict[str, float]:
    return dict(input_scales(plan, made_up(plan)).values)


def judged(plan: Plan, scales: dict[str, float], *windows: Tensor) -> list[Spot]:
    return measure_spots(plan, scales, windows, threads=2, progress=Progress())


def test_every_group_is_judged_once_with_all_its_modules(
    plan: Plan, scales: dict[str, float]
) -> None:
    spots = judged(plan, scales, TOKENS[:20], TOKENS[20:])
    modules = [m for s in spots for m in s.modules]
    assert sorted(modules) == sorted(m.module for j in plan.jobs for m in j.members)
    names = [s.name for s in spots if s.role == "routed_expert"]
    assert names == [LAYER.format(i) + "mlp.experts" for i in range(3)]
    assert all(s.damage > 0 for s in spots)


def test_the_damage_is_that_of_a_forward_with_this_group_rounded(
    plan: Plan, scales: dict[str, float]
) -> None:
    model = Model(plan.checkpoint)
    quantized = QuantizedInputs(plan, scales)
    compute = Compute("bf16", 2)
    by_name = {s.name: s.damage for s in judged(plan, scales, TOKENS)}

    def through(number: int, x: Tensor, layer: Any, *, simulate: bool) -> Tensor:
        pages, states = model.page_pool(1, 64), model.state_pool(1)
        batch = make_batch(model.network, [TOKENS], [SequenceState([0], slots=[0])])
        cache = states.layers[number] if model.network.is_linear(number) else pages.layers[number]
        return layer(x.clone(), batch, cache, Mode(compute, simulate=simulate))  # type: ignore[no-any-return]

    x = model.embed(TOKENS, Mode(compute))
    for number in range(3):
        layer, base = model.weights.layer(number), LAYER.format(number)
        plain = through(number, x, layer, simulate=False)
        feed: Any = layer.feed_forward
        down = base + "mlp.shared_expert.down_proj"
        scale = scales[down]
        output = replace(feed.shared.down, activation=NVFP4_W4A4.input, input_scale=scale)
        other = replace(layer, feed_forward=replace(feed, shared=replace(feed.shared, down=output)))
        change = (through(number, x, other, simulate=True) - plain).square().sum(-1)
        expected = float((change / plain.square().sum(-1)).mean())
        assert by_name[down] == pytest.approx(expected, rel=1e-5)
        again = rounding_in(layer, frozenset([down]), quantized)
        assert torch.equal(
            through(number, x, again, simulate=True), through(number, x, other, simulate=True)
        )
        assert rounding_in(layer, frozenset(), quantized) is layer
        x = plain


def test_experts_have_the_scale_of_each(plan: Plan, scales: dict[str, float]) -> None:
    model = Model(plan.checkpoint)
    base = LAYER.format(0) + "mlp.experts."
    names = frozenset(m for m in scales if m.startswith(base))
    found: Any = rounding_in(model.weights.layer(0), names, QuantizedInputs(plan, scales))
    for stack, part in (
        (found.feed_forward.gate_up, "up_proj"),
        (found.feed_forward.down, "down_proj"),
    ):
        assert stack.activation == NVFP4_W4A4.input
        expected = torch.tensor([scales[f"{base}{e}.{part}"] for e in range(3)])
        assert torch.equal(stack.input_scales, expected)


def spots(*damages: float) -> list[Spot]:
    return [
        Spot(f"model.layers.{i}.mlp.down_proj", "mlp", (f"model.layers.{i}.mlp.down_proj",), 100, d)
        for i, d in enumerate(damages)
    ]


def test_a_share_takes_the_worst_and_no_more(plan: Plan) -> None:
    found = promote(plan, spots(1, 9, 2, 8, 3), 0.5)
    assert found.promoted == tuple(s.name for s in spots(1, 9, 2, 8, 3) if s.damage >= 8)
    assert (found.share, found.spared) == (0.4, 17 / 23)
    rows: Any = found.as_json()["groups"]
    assert [r["promoted"] for r in rows] == [True, True, False, False, False]
    assert all(a["damage"] >= b["damage"] for a, b in pairwise(rows))
    with pytest.raises(RecipeError, match="--promote 0"):
        promote(plan, spots(1), 0)


def test_alone_it_takes_what_is_out_of_proportion(plan: Plan) -> None:
    assert promote(plan, spots(*[1.0] * 20)).promoted == ()
    assert promote(plan, spots(*[1.0] * 20)).recipe is plan.recipe
    uneven = promote(plan, spots(*[1.0] * 19, 50.0))
    assert uneven.promoted == ("model.layers.19.mlp.down_proj",)
    # An eighth of the weights at most, whatever else is out of proportion.
    assert len(promote(plan, spots(*[1.0] * 92, *[50.0] * 8)).promoted) == 8
    assert len(promote(plan, spots(*[1.0] * 20, *[90.0] * 4)).promoted) == 3


def test_the_recipe_spares_just_these(plan: Plan, scales: dict[str, float]) -> None:
    measured = judged(plan, scales, TOKENS)
    chosen = [s for s in measured if s.role == "routed_expert"][:1]
    chosen += [s for s in measured if s.name.endswith(":qkv")]
    ranked = [replace(s, damage=1e3 * s.weights if s in chosen else s.damage) for s in measured]
    share = sum(s.weights for s in chosen) / sum(s.weights for s in measured)
    found = promote(plan, ranked, share)
    again = make_plan(plan.checkpoint, found.recipe, plan.layout)
    spared = {m for s in chosen for m in s.modules}
    for job in again.jobs:
        for m in job.members:
            assert job.scheme is (NVFP4_W4A16 if m.module in spared else NVFP4_W4A4)
    assert len(again.jobs) == len(plan.jobs)


def test_a_plan_without_four_bit_inputs_has_nothing_to_promote(tmp_path: Path) -> None:
    with Checkpoint.open(tiny.checkpoint(tmp_path / "m", "qwen3")) as checkpoint:
        plain = make_plan(checkpoint, load_recipe("nvfp4-all"), LAYOUTS["modelopt"])
        with pytest.raises(RecipeError, match="nothing to promote"):
            judged(plain, {}, TOKENS)
