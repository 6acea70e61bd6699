"""Measured input scales: their arithmetic, what a run accepts, the tensors they become, and what
the audit finds in them.

The measurement itself is a function of the test: what a forward pass finds is tested where it is
made.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble.quantize.run as run_module
import tiny
from measured import MIXED, Pass, made_up, modules_of, without
from nybble.api.plan import LAYOUTS, as_json, data_free_form
from nybble.api.quantize import quantize
from nybble.calibrate.scales import FEWEST_TOKENS, HEADROOM, InputAmax, input_scales
from nybble.check.audit import audit
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import (
    CheckFailed,
    RecipeError,
)
from nybble.formats.block import FP8
from nybble.formats.search import quantize as define
from nybble.formats.search import tensor_scale
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import Recipe, load_recipe
from nybble.progress import Progress
from nybble.quantize.input_scales import InputScales, check_input_scales

LM = "model.language_model."
EXPERTS = LM + "layers.{}.mlp.experts."
RUNS = [
    ("nvfp4", "modelopt"),
    ("nvfp4", "compressed-tensors"),
    ("nvfp4-w4a4", "modelopt"),
    ("nvfp4-redhat", "compressed-tensors"),
    ("nvfp4-experts-fp8", "compressed-tensors"),
    (MIXED, "modelopt"),
    (MIXED, "compressed-tensors"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("source") / "m", "qwen3_5_moe", vision=True)


@pytest.fixture(scope="module")
def plan(source: Path) -> Iterator[Plan]:
    with Checkpoint.open(source) as checkpoint:
        yield make_plan(checkpoint, MIXED, LAYOUTS["modelopt"])


# ------------------------------------------------------------------------------- the arithmetic


def test_scales_are_amax_times_headroom_by_what_the_format_reaches(plan: Plan) -> None:
    measured = made_up(plan)
    found = input_scales(plan, measured, 3.0)
    assert found.values.keys() == set(modules_of(plan))
    assert (found.headroom, found.tokens, found.fallbacks) == (3.0, 77, ())
    kinds = set()
    for job in plan.jobs:
        if not job.scheme.needs_input_scale:
            continue
        largest = max(measured.amax[m.module] for m in job.members)
        divisor = {"nvfp4-w4a4": 6 * 448, "fp8-static": 448}[job.scheme.name]
        kinds.add((job.scheme.name, len(job.members)))
        for m in job.members:
            assert found.values[m.module] == np.float32(largest * 3 / divisor)
    assert kinds == {("nvfp4-w4a4", n) for n in (1, 2)} | {("fp8-static", n) for n in (1, 2, 3)}


def test_the_default_headroom_is_a_power_of_two_and_only_shifts_exponents(plan: Plan) -> None:
    exact = input_scales(plan, made_up(plan), 1.0).values
    wide = input_scales(plan, made_up(plan)).values
    assert HEADROOM == 2
    assert wide == {module: 2 * value for module, value in exact.items()}


@pytest.mark.parametrize("tokens", [None, FEWEST_TOKENS - 1])
def test_an_expert_without_tokens_takes_the_maximum_of_its_projection_and_layer(
    plan: Plan, tokens: int | None
) -> None:
    base = EXPERTS.format(1)
    silent = (f"{base}2.gate_proj", f"{base}2.up_proj", f"{base}0.down_proj")
    measured = made_up(plan)
    found = input_scales(plan, without(measured, *silent, tokens=tokens), 1.0)
    amax = measured.amax
    pair = max(amax[f"{base}{e}.{part}_proj"] for e in (0, 1) for part in ("gate", "up"))
    down = max(amax[f"{base}{e}.down_proj"] for e in (1, 2))
    assert len({pair, down, max(amax.values())}) == 3
    assert [found.values[m] for m in silent] == [np.float32(x / 2688) for x in (pair, pair, down)]
    assert sorted(found.fallbacks) == sorted(silent)
    assert found.fallbacks_by_layer == {base[:-1]: 3}
    whole = input_scales(plan, measured, 1.0)
    assert {m for m in whole.values if whole.values[m] != found.values[m]} <= set(silent)


def test_one_token_is_enough_for_an_expert_and_zeros_are_not(plan: Plan) -> None:
    module = EXPERTS.format(2) + "1.down_proj"
    measured = made_up(plan)
    rare = input_scales(plan, without(measured, module, tokens=FEWEST_TOKENS))
    assert rare == input_scales(plan, measured)
    dead = replace(measured, amax={**measured.amax, module: 0.0})
    assert input_scales(plan, dead).fallbacks == (module,)


DENSE = LM + "layers.1.self_attn.o_proj"
RARE = EXPERTS.format(0) + "1.down_proj"


@pytest.mark.parametrize(
    ("module", "amax", "said"),
    [
        (DENSE, 0.0, "zeros alone on 11 tokens"),
        (DENSE, np.nan, "measured as nan"),
        (DENSE, np.inf, "measured as inf"),
        (DENSE, -1.0, "measured as -1.0"),
        (DENSE, 1e-37, "normal number"),
        (DENSE, 1e300, "normal number"),
        (RARE, np.nan, "measured as nan"),
        (RARE, np.inf, "measured as inf"),
        ("lm_head", 0.0, "zeros alone"),
    ],
)
def test_magnitudes_that_are_none_are_refused_by_module(
    plan: Plan, module: str, amax: float, said: str
) -> None:
    measured = made_up(plan)
    with pytest.raises(RecipeError) as found:
        input_scales(plan, replace(measured, amax={**measured.amax, module: amax}))
    assert str(found.value).startswith(f"{module}: ")
    assert said in str(found.value)


def test_what_nothing_was_measured_of_is_refused_by_module(plan: Plan) -> None:
    measured = made_up(plan)
    with pytest.raises(RecipeError, match=rf"^{DENSE}: fp8-static .* no token at all; a made-up"):
        input_scales(plan, without(measured, DENSE))
    layer = [m for m in modules_of(plan) if m.startswith(EXPERTS.format(2)) and "down" in m]
    assert len(layer) == 3
    with pytest.raises(RecipeError, match=r"layers\.2.*\.down_proj: .*nor did any expert of its"):
        input_scales(plan, without(measured, *layer))


@pytest.mark.parametrize("headroom", [0.0, 0.999, 1025.0, np.nan, np.inf, -2.0])
def test_headroom_that_clips_or_leaves_nothing_is_refused(plan: Plan, headroom: float) -> None:
    with pytest.raises(RecipeError, match=r"headroom .*: expected 1 to 1024"):
        input_scales(plan, made_up(plan), headroom)


# ----------------------------------------------------------------------- what a run accepts, keeps


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop(RARE), f"{RARE}: nvfp4-w4a4 needs a measured .*not among those given"),
        (lambda v: v.update({"x.y": 1.0}), r"x\.y: an input_scale is given, and the plan stores"),
        (lambda v: v.update({DENSE: 0.0}), f"{DENSE}: an input_scale of 0.0 cannot be stored"),
        (lambda v: v.update({DENSE: -1.0}), f"{DENSE}: an input_scale of -1.0 cannot"),
        (lambda v: v.update({DENSE: np.nan}), f"{DENSE}: an input_scale of nan cannot"),
        (lambda v: v.update({DENSE: np.inf}), f"{DENSE}: an input_scale of inf cannot"),
        (lambda v: v.update({DENSE: 1e-40}), f"{DENSE}: an input_scale of 1e-40 cannot"),
        (lambda v: v.update({DENSE: 0.1}), f"{DENSE}: .* expected a float32"),
        (
            lambda v: v.update({LM + "layers.1.self_attn.k_proj": 0.5}),
            r"layers\.1\.self_attn:qkv: its members have different input scales",
        ),
    ],
)
def test_scales_that_are_not_the_plans_stop_a_run_before_it_begins(
    plan: Plan, tmp_path: Path, change: Callable[[dict[str, float]], object], said: str
) -> None:
    good = input_scales(plan, made_up(plan))
    assert check_input_scales(plan, good) == good.values
    values = dict(good.values)
    change(values)
    with pytest.raises(RecipeError, match=said):
        run_module.execute(
            plan,
            tmp_path / "out",
            run_module.Options(),
            version="1",
            progress=Progress(),
            input_scales=replace(good, values=values),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_needs_none_takes_none(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, load_recipe("nvfp4-all"), LAYOUTS["modelopt"])
    assert not plan.needs_data
    assert check_input_scales(plan, None) == {}
    with pytest.raises(RecipeError, match=r"^lm_head: an input_scale is given"):
        check_input_scales(plan, InputScales({"lm_head": 1.0}, (), 2.0, 5))


def test_the_hash_is_of_the_values_in_any_order(plan: Plan) -> None:
    found = input_scales(plan, made_up(plan))
    turned = replace(found, values=dict(sorted(found.values.items(), reverse=True)), headroom=7.0)
    assert turned.sha256 == found.sha256
    nudged = dict(found.values)
    nudged[DENSE] = float(np.nextafter(np.float32(nudged[DENSE]), np.float32(1)))
    assert replace(found, values=nudged).sha256 != found.sha256


# ------------------------------------------------------------------------------- what is written


def stored(written: dict[str, Any], module: str) -> tuple[str, tuple[int, ...], float]:
    """dtype, shape and the multiplying value of a module's input scale."""
    for leaf in ("input_scale", "input_global_scale"):
        if entry := written.get(f"{module}.{leaf}"):
            value = float(tiny.array(entry).reshape(()))
            return entry[0], entry[1], 1 / value if leaf == "input_global_scale" else value
    raise AssertionError(module)


@pytest.mark.parametrize(
    ("family", "recipe", "layout"),
    [("qwen3_5_moe", *run) for run in RUNS]
    + [("qwen3_5", *run) for run in RUNS if run[0] in ("nvfp4", "nvfp4-w4a4", "nvfp4-redhat")]
    + [("llama", "nvfp4", "compressed-tensors"), ("qwen3_moe", "nvfp4-redhat", "modelopt")],
)
def test_scales_are_written_in_the_convention_of_the_layout(
    tmp_path: Path, family: str, recipe: str | Recipe, layout: str
) -> None:
    path = tiny.checkpoint(tmp_path / "m", family)
    measure = Pass()
    result = quantize(path, tmp_path / "out", recipe, layout=layout, measure=measure)
    assert measure.calls == 1
    written = tiny.read(result.out)
    assert {n: v[:2] for n, v in written.items()} == {
        o.name: (o.dtype, o.shape) for o in result.plan.outputs
    }
    expected = input_scales(result.plan, made_up(result.plan)).values
    leaves = {n.rpartition(".")[0] for n in written if re.search(r"\.input_.*scale$", n)}
    assert leaves == expected.keys()
    for job in result.plan.jobs:
        for m in job.members if job.scheme.needs_input_scale else ():
            dtype, shape, value = stored(written, m.module)
            wanted = expected[m.module]
            if layout == "modelopt":
                assert (dtype, shape, value) == ("F32", (), wanted)
            elif job.scheme.name == "nvfp4-w4a4":
                assert (dtype, shape) == ("F32", (1,))
                entry = tiny.array(written[f"{m.module}.input_global_scale"])
                assert entry == np.float32(1) / np.float32(wanted)
                assert entry > 1 > wanted  # a divisor: the larger the smaller the inputs
            else:
                assert (dtype, shape) == ("BF16", (1,))
                assert value == float(np.float32(wanted).astype(ml_dtypes.bfloat16))
    assert result.audit is not None
    assert result.audit.input_scales == len(expected)
    assert result.audit.payload_bytes == result.plan.payload_bytes


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_static_fp8_weights_are_those_of_the_definition(
    tmp_path: Path, source: Path, layout: str, search: Any
) -> None:
    """No other recipe writes FP8 with one scale per tensor."""
    result = quantize(
        source, tmp_path / "out", "nvfp4", layout=layout, search=search, measure=Pass()
    )
    before, written = tiny.read(source), tiny.read(result.out)
    seen = 0
    for job in result.plan.jobs:
        if job.scheme.weight is not FP8:
            continue
        peaks = {
            m.module: np.abs(tiny.array(before[m.source]).astype(np.float32)).max()
            for m in job.members
        }
        for m in job.members:
            peak = peaks[m.module] if search == "absmax" else max(peaks.values())
            scale = tensor_scale(np.float32(peak), FP8, search)
            if layout == "compressed-tensors":
                scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
            entry = tiny.array(written[f"{m.module}.weight_scale"]).astype(np.float32)
            assert entry.reshape(()) == scale
            x = tiny.array(before[m.source])
            if layout == "compressed-tensors":
                x = x.astype(np.float32)  # ModelOpt alone divides in BF16
            codes = define(x, FP8, search, scale=scale.reshape(1, 1)).codes
            assert written[f"{m.module}.weight"][2] == codes.tobytes()
            seen += 1
    assert seen == 2 * 3 + 4


def test_a_recipe_whose_static_roles_are_absent_needs_no_measurement(tmp_path: Path) -> None:
    """`--generic` has linears of one role: the FP8 rule of nvfp4 names none of them."""
    cfg = {**tiny.config("llama"), "model_type": "neverseen"}
    path = tiny.write(tmp_path / "m", cfg, tiny.tensors(tiny.config("llama")))
    measure = Pass()
    result = quantize(path, tmp_path / "out", "nvfp4", generic=True, measure=measure)
    assert (measure.calls, result.input_scales) == (0, None)
    assert data_free_form(result.plan) is result.plan
    assert as_json(result.plan, None)["needs_data"] is False
    free = quantize(path, tmp_path / "free", "nvfp4", generic=True, data_free=True)
    assert free.plan.notes == ()
    assert tiny.read(tmp_path / "free") == tiny.read(tmp_path / "out")


def test_the_result_says_how_the_scales_were_measured(tmp_path: Path, source: Path) -> None:
    silent = EXPERTS.format(1) + "0."

    def measure(plan: Plan, progress: Progress) -> InputAmax:
        return without(made_up(plan), silent + "gate_proj", silent + "up_proj")

    result = quantize(source, tmp_path / "out", "nvfp4-w4a4", measure=measure, headroom=4)
    document = json.loads(json.dumps(result.as_json()))
    assert result.input_scales is not None
    values = result.input_scales.values.values()
    assert document["input_scales"] == {
        "modules": 3 * 3 * 3,
        "smallest": min(values),
        "largest": max(values),
        "headroom": 4.0,
        "tokens": 77,
        "calibration": "8,192 tokens of the project's mixture",
        "fallbacks": 2,
        "fallbacks_by_layer": {EXPERTS.format(1)[:-1]: 2},
        "sha256": result.input_scales.sha256,
    }
    assert document["audit"]["input_scales"] == 27
    free = quantize(source, tmp_path / "free", "nvfp4", data_free=True).as_json()
    assert (free["input_scales"], free["measure_seconds"]) == (None, 0)


# ----------------------------------------------------------------------------------------- audit


def change(folder: Path, tensor: str, value: float) -> None:
    """Put another value into a scalar of a lone shard."""
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[tensor]
    begin, end = (8 + length + at for at in entry["data_offsets"])
    data[begin:end] = np.asarray(value, tiny.DTYPES[entry["dtype"]]).tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("layout", "tensor", "value", "said", "is_seen_later"),
    [
        ("modelopt", DENSE + ".input_scale", 0.0, "not finite and positive", True),
        ("modelopt", DENSE + ".input_scale", np.nan, "not finite and positive", True),
        ("modelopt", DENSE + ".input_scale", -1.0, "not finite and positive", True),
        ("modelopt", DENSE + ".input_scale", 1.5, "input scale of 1.5, measured was", False),
        ("modelopt", RARE + ".input_scale", 1.5, "input scale of 1.5, measured was", False),
        ("compressed-tensors", RARE + ".input_global_scale", 0.0, "not finite", True),
        ("compressed-tensors", RARE + ".input_global_scale", np.inf, "not finite", True),
        ("compressed-tensors", RARE + ".input_global_scale", 4.0, "of 0.25, measured was", False),
        ("compressed-tensors", DENSE + ".input_scale", 4.0, "scale of 4, measured was", False),
        (
            "modelopt",
            EXPERTS.format(1) + "1.up_proj.input_scale",
            0.5,
            "experts.1:gate_up: its members have different input scales",
            True,
        ),
        (
            "modelopt",
            LM + "layers.0.linear_attn.in_proj_z.input_scale",
            0.5,
            "linear_attn:qkvz: its members have different input scales",
            True,
        ),
    ],
)
def test_the_audit_finds_scales_that_are_not_those_measured(
    tmp_path: Path,
    source: Path,
    layout: str,
    tensor: str,
    value: float,
    said: str,
    is_seen_later: bool,
) -> None:
    result = quantize(source, tmp_path / "out", MIXED, layout=layout, measure=Pass())
    assert result.input_scales is not None
    change(result.out, tensor, value)
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, MIXED, LAYOUTS[layout])
        values = result.input_scales.values
        with pytest.raises(CheckFailed) as found:
            audit(plan, result.out, threads=1, progress=Progress(), input_scales=values)
        assert tensor.rpartition(".")[0] in str(found.value)
        assert said in str(found.value)
    if is_seen_later:  # without the values that were given
        with pytest.raises(CheckFailed):
            quantize(source, result.out, MIXED, layout=layout, resume=True)
    else:
        again = quantize(source, result.out, MIXED, layout=layout, resume=True)
        assert again.input_scales is None
        assert again.audit is not None
        assert again.audit.input_scales == len(values)
