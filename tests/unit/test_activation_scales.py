"""How inputs are rounded and scaled: which rounding a module gets, how blocks are counted, and how
much room a scale leaves above what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from measured import MIXED, made_up
from nybble.api.plan import LAYOUTS
from nybble.calibrate.activations import QuantizedInputs
from nybble.calibrate.amax import AmaxObserver
from nybble.calibrate.block_amax import BlockAmax
from nybble.calibrate.scales import ANCHOR, MOST_ROOM, InputAmax, input_scales
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import RecipeError
from nybble.formats.scheme import FP8_STATIC, NVFP4_W4A4
from nybble.models.simulate import fake_quantize
from nybble.plan.plan import Plan, make_plan

LAYER = "model.language_model.layers.1."
SHARED = (LAYER + "mlp.shared_expert.gate_proj", LAYER + "mlp.shared_expert.up_proj")
QKV = tuple(LAYER + f"self_attn.{n}_proj" for n in "qkv")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    folder = tiny.checkpoint(tmp_path_factory.mktemp("m") / "m", "qwen3_5_moe")
    with Checkpoint.open(folder) as checkpoint:
        yield make_plan(checkpoint, MIXED, LAYOUTS["modelopt"])


def counted(*maxima: float) -> BlockAmax:
    found = BlockAmax()
    found.add(np.array(maxima, dtype=np.float32))
    return found


# ----------------------------------------------------------------------------------------- rounding


def test_a_module_is_rounded_as_its_scheme_says_and_others_are_left(plan: Plan) -> None:
    scales = input_scales(plan, made_up(plan)).values
    rounding = QuantizedInputs(plan, scales)
    x = torch.randn((7, 96), generator=torch.Generator().manual_seed(0))
    for modules, scheme in ((SHARED, NVFP4_W4A4), (QKV, FP8_STATIC)):
        assert scheme.input is not None
        expected = fake_quantize(x, scheme.input, scales[modules[0]], "m")
        assert torch.equal(rounding(modules, x), expected)
        assert not torch.equal(expected, x)
    router = (LAYER + "mlp.gate",)
    assert rounding(router, x) is x
    assert rounding.of(router[0]) is None


def test_fused_modules_are_rounded_by_the_largest_of_their_scales(plan: Plan) -> None:
    """As engines do that find them different, in files of others."""
    scales = dict(input_scales(plan, made_up(plan)).values)
    scales[QKV[1]] = 2 * scales[QKV[0]]
    x = torch.randn((3, 96), generator=torch.Generator().manual_seed(1))
    assert FP8_STATIC.input is not None
    expected = fake_quantize(x, FP8_STATIC.input, scales[QKV[1]], "m")
    assert torch.equal(QuantizedInputs(plan, scales)(QKV, x), expected)


def test_a_missing_scale_is_named(plan: Plan) -> None:
    with pytest.raises(RecipeError, match=r"needs|rounds its input by a measured scale"):
        QuantizedInputs(plan, {})


# ------------------------------------------------------------------------------------------- blocks


@given(
    st.lists(st.floats(2.0**-30, 2.0**30, width=32), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_a_quantile_is_right_within_an_eighth_of_an_octave(
    values: list[float], share: float
) -> None:
    found = counted(*values)
    exact = sorted(values)[min(int(share * len(values)), len(values) - 1)]
    assert exact / 2 ** (1 / 8) * (1 - 1e-6) <= found.quantile(share) <= exact * (1 + 1e-6)
    assert found.blocks == len(values)


def test_zeros_and_what_is_not_finite_are_not_counted() -> None:
    found = counted(0.0, float("nan"), float("inf"), 2.0)
    assert (found.blocks, found.quantile(0.5)) == (1, 2.0)
    assert BlockAmax().quantile(0.01) == 0
    with pytest.raises(RecipeError, match=r"quantile of 1\.5"):
        found.quantile(1.5)


def test_blocks_are_sixteen_channels_of_a_token_and_experts_share_theirs() -> None:
    observer = AmaxObserver({"a", "b", "c", "e.0", "e.1"}, {"a", "b", "e.0", "e.1"})
    x = torch.zeros((2, 32))
    x[0, 3], x[0, 20], x[1, 31] = -4.0, 1.0, 0.25
    observer.linear(("a", "b"), x)
    assert observer.blocks["a"] is observer.blocks["b"]
    assert [observer.blocks["a"].quantile(q) for q in (0, 0.5, 1)] == [0.25, 1.0, 4.0]
    observer.linear(("c",), x)
    observer.experts([("e.0",), ("e.1",)], x, torch.tensor([1, 1]))
    assert "c" not in observer.blocks
    assert observer.blocks["e.0"] is observer.blocks["e.1"]
    assert observer.blocks["e.0"].blocks == 3


# --------------------------------------------------------------------------------------------- room


def test_room_goes_as_far_as_a_small_block_lets_it(plan: Plan) -> None:
    """In powers of two, so that what was measured is rounded as with the least headroom."""
    measured = made_up(plan)
    least = input_scales(plan, measured).values
    peak = max(measured.amax[m] for m in SHARED)
    for small, factor in (
        (peak / 900, 8),
        (peak / 8192, 1),
        (peak / 1e6, 1),
        (peak, MOST_ROOM / 2),
    ):
        blocks = counted(small, *[peak] * 5)
        found = input_scales(plan, replace(measured, blocks=dict.fromkeys(SHARED, blocks))).values
        ratio = found[SHARED[0]] / least[SHARED[0]]
        assert ratio == factor
        assert found[SHARED[0]] == found[SHARED[1]]
        # The small block's scale, in E4M3, is a normal number wherever more than the least is left.
        if factor > 1:
            assert small / 6 / found[SHARED[0]] >= 2**-6
        others = set(least) - set(SHARED)
        assert all(found[m] == least[m] for m in others)


def test_fp8_inputs_have_no_blocks_and_keep_their_headroom(plan: Plan) -> None:
    measured = made_up(plan)
    blocks = dict.fromkeys(measured.amax, counted(1.0))
    least = input_scales(plan, measured).values
    found = input_scales(plan, replace(measured, blocks=blocks)).values
    assert all(found[m] == least[m] for m in QKV)


def test_experts_of_a_layer_move_together(plan: Plan) -> None:
    """Engines take the largest scale of a layer: an expert with small inputs must bear it."""
    measured = made_up(plan)
    base = LAYER + "mlp.experts."
    names = [m for m in measured.amax if m.startswith(base) and not m.endswith("down_proj")]
    peak = max(measured.amax[m] for m in names)
    blocks = dict.fromkeys(names, counted(*[peak / 500] * 9, peak))
    least = input_scales(plan, measured).values
    found = input_scales(plan, replace(measured, blocks=blocks)).values
    ratios = {found[m] / least[m] for m in names}
    assert ratios == {2.0 ** np.floor(np.log2(ANCHOR * blocks[names[0]].quantile(0.01) / peak)) / 2}
    assert min(ratios) > 1


def test_nothing_measured_saturates(plan: Plan) -> None:
    measured = made_up(plan)
    for small in (1e-30, 1e-3, 1.0, 1e6):
        blocks = dict.fromkeys(measured.amax, counted(small))
        found = input_scales(plan, InputAmax(measured.amax, measured.tokens, 77, blocks)).values
        for module, value in found.items():
            reach = 448 if "self_attn" in module or "linear_attn" in module else 2688
            assert measured.amax[module] <= value * reach
