"""What the rules about scales and values find, what they say, and what they leave alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from defects.scales import DEFECTS
from folder import Defect, write_shard
from make import make
from nybble.api.check import check
from nybble.api.quantize import quantize
from nybble.check import deep
from nybble.check.rule import Finding, Severity
from nybble.check.scales import RULES
from nybble.check.scales_scan import scan_of
from nybble.check.survey import Survey
from nybble.checkpoint.files import Habit, LocalFiles
from nybble.errors import CheckpointError

ZOO = Path(__file__).parents[2] / "zoo"
CLEAN = sorted(p.name for p in (ZOO / "clean").iterdir())
E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
Tensors = dict[str, NDArray[Any]]


def look(survey: Survey, *ids: str) -> list[Finding]:
    return [f for rule in RULES if not ids or rule.id in ids for f in rule.look(survey)]


def ids(findings: Iterable[Finding]) -> set[str]:
    return {f.rule.id for f in findings}


def write(path: Path, tensors: Tensors, config: dict[str, object] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    write_shard(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def survey(path: Path, tensors: Tensors, config: dict[str, object] | None = None) -> Survey:
    return Survey.open(write(path, tensors, config))


def nvfp4(name: str, seed: int = 0, n: int = 64, k: int = 128, top: float = 1e-4) -> Tensors:
    """An NVFP4 module of normal weights, as the absmax search leaves them."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((n, k // 16, 16))
    amax = np.abs(weights).max(axis=-1)
    scales = np.clip(amax / amax.max() * 448, 2.0**-9, 448).astype(E4M3)
    steps = weights / weights.__abs__().max() * 2688 / scales.astype(np.float64)[..., None]
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.abs(np.abs(steps)[..., None] - values).argmin(axis=-1).astype(np.uint8)
    codes |= np.where(steps < 0, 8, 0).astype(np.uint8)
    flat = codes.reshape(n, k)
    return {
        f"{name}.weight": flat[:, 0::2] | (flat[:, 1::2] << 4),
        f"{name}.weight_scale": scales,
        f"{name}.weight_scale_2": np.array(top, dtype=np.float32),
    }


def fp8(name: str, seed: int = 0, scale: NDArray[Any] | float = 1e-3) -> Tensors:
    weights = np.random.default_rng(seed).standard_normal((32, 256)) * 100
    stored = scale if isinstance(scale, np.ndarray) else np.array(scale, dtype=np.float32)
    return {f"{name}.weight": weights.astype(E4M3), f"{name}.weight_scale": stored}


# ------------------------------------------------------------------------------------------ the zoo


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("is_deep", [False, True])
def test_sound_checkpoints_have_no_finding(name: str, is_deep: bool) -> None:
    assert look(Survey.open(ZOO / "clean" / name, deep=is_deep)) == []


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_a_planted_defect_is_found_and_nothing_else(defect: Defect, tmp_path: Path) -> None:
    found = look(Survey.open(make(defect, tmp_path / "zoo"), deep=defect.deep))
    assert defect.rule in ids(found)
    assert ids(f for f in found if f.severity >= Severity.WARNING) <= {defect.rule, *defect.also}
    for finding in found:
        assert json.loads(json.dumps(finding.facts)) == finding.facts
        assert "expected" in finding.message or finding.severity == Severity.NOTE


@pytest.mark.parametrize("defect", [d for d in DEFECTS if not d.deep], ids=lambda d: d.name)
def test_a_deep_check_finds_what_a_sample_finds(defect: Defect, tmp_path: Path) -> None:
    path = make(defect, tmp_path / "zoo")
    sampled = {(f.rule.id, f.severity) for f in look(Survey.open(path))}
    assert {(f.rule.id, f.severity) for f in look(Survey.open(path, deep=True))} == sampled


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.deep], ids=lambda d: d.name)
def test_what_only_a_deep_check_finds(defect: Defect, tmp_path: Path) -> None:
    path = make(defect, tmp_path / "zoo")
    assert defect.rule not in ids(look(Survey.open(path)))
    assert defect.rule in ids(look(Survey.open(path, deep=True)))


def test_every_rule_has_a_defect_and_text() -> None:
    assert {d.rule for d in DEFECTS} == {rule.id for rule in RULES}
    for rule in RULES:
        assert rule.id.startswith("NB2")
        assert rule.fix.endswith(".")
        assert len(rule.explanation) > 100


# --------------------------------------------------------------------------------- scalars, vectors


@pytest.mark.parametrize(
    ("value", "rule"), [(0.0, "NB201"), (-1e-4, "NB202"), (np.nan, "NB203"), (np.inf, "NB204")]
)
def test_an_unusable_tensor_scale_is_named(tmp_path: Path, value: float, rule: str) -> None:
    tensors = nvfp4("a.one") | nvfp4("a.two", 1, top=value)
    (found,) = look(survey(tmp_path, tensors), "NB201", "NB202", "NB203", "NB204")
    assert (found.rule.id, found.severity) == (rule, Severity.ERROR)
    assert found.subjects == ("a.two.weight_scale_2",)
    assert found.message.startswith("1 of 2 tensor scales")


def test_zero_input_scales_that_nothing_reads_are_a_warning(tmp_path: Path) -> None:
    config = {
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4",
            "ignore": [],
            "group_size": 16,
        }
    }
    tensors = nvfp4("a.one") | {"a.one.input_scale": np.zeros((), dtype=np.float32)}
    (found,) = look(survey(tmp_path, tensors, config), "NB201")
    assert found.severity == Severity.WARNING


@pytest.mark.parametrize("shape", [(32, 1), (32,), (1, 1, 2, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_scales_of_channels_and_blocks_are_looked_at(
    tmp_path: Path, shape: tuple[int, ...], dtype: type
) -> None:
    scale = np.linspace(1e-3, 2e-3, int(np.prod(shape))).reshape(shape).astype(dtype)
    assert look(survey(tmp_path / "good", fp8("a.b", 0, scale))) == []
    scale.reshape(-1)[-1] = np.nan
    (found,) = look(survey(tmp_path / "bad", fp8("a.b", 0, scale)))
    assert (found.rule.id, found.subjects) == ("NB203", ("a.b.weight_scale",))


def test_one_zero_channel_is_a_note_and_only_zeros_an_error(tmp_path: Path) -> None:
    scale = np.linspace(1e-3, 2e-3, 32, dtype=np.float32).reshape(32, 1)
    scale[3] = 0
    (found,) = look(survey(tmp_path / "one", fp8("a.b", 0, scale)))
    assert (found.rule.id, found.severity) == ("NB201", Severity.NOTE)
    (found,) = look(survey(tmp_path / "all", fp8("a.b", 0, scale * 0)))
    assert (found.rule.id, found.severity) == ("NB201", Severity.ERROR)


def test_scalars_cut_off_are_not_judged(tmp_path: Path) -> None:
    write(tmp_path, nvfp4("a.b"))
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(data[: 8 + length + 2])
    assert look(Survey.open(tmp_path)) == []


@pytest.mark.parametrize("is_deep", [False, True])
def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, is_deep: bool) -> None:
    write(tmp_path, nvfp4("a.b"))
    opened = Survey.open(tmp_path, deep=is_deep)
    os.truncate(tmp_path / "model.safetensors", 400)
    with pytest.raises(CheckpointError, match="shorter"):
        look(opened, "NB205" if is_deep else "NB201")


# ----------------------------------------------------------------------------------- missing scales


def test_missing_input_scales_are_counted_by_layer(tmp_path: Path) -> None:
    (defect,) = (d for d in DEFECTS if d.name == "missing-expert-input-scale")
    (found,) = look(Survey.open(make(defect, tmp_path / "zoo")), "NB209")
    place = "model.language_model.layers.1.mlp.experts.#."
    experts = {place + p: [1] for p in ("gate_proj", "up_proj", "down_proj")}
    assert found.facts["experts"] == experts
    assert "1 experts of 1 layers" in found.message


def test_residual_input_scales_of_some_experts_are_a_note(tmp_path: Path) -> None:
    config = {
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4",
            "ignore": [],
            "group_size": 16,
        }
    }
    tensors: Tensors = {}
    for e in range(3):
        tensors |= nvfp4(f"layers.0.mlp.experts.{e}.down_proj", e)
    tensors["layers.0.mlp.experts.0.down_proj.input_scale"] = np.array(0.1, dtype=np.float32)
    (found,) = look(survey(tmp_path, tensors, config), "NB209")
    assert (found.severity, len(found.subjects)) == (Severity.NOTE, 2)


# ----------------------------------------------------------------------------------- fused modules


def gate_up(up: float, gate: float = 1e-4, layers: int = 1) -> Tensors:
    tensors: Tensors = {}
    for i in range(layers):
        tensors |= nvfp4(f"layers.{i}.mlp.gate_proj", i, top=gate)
        tensors |= nvfp4(f"layers.{i}.mlp.up_proj", 50 + i, top=up)
    return tensors


@pytest.mark.parametrize(
    ("ratio", "severity", "kind"),
    [
        (1.005, Severity.WARNING, "<1.01"),
        (1.25, Severity.ERROR, "<1.5"),
        (12.0, Severity.ERROR, ">=10"),
    ],
)
def test_unequal_fused_scales_are_graded(
    tmp_path: Path, ratio: float, severity: Severity, kind: str
) -> None:
    (found,) = look(survey(tmp_path, gate_up(1e-4 * ratio)), "NB210")
    assert found.severity == severity
    assert found.facts["histogram"] == {kind: 1}
    assert found.facts["max_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert found.subjects == ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")


def test_every_unequal_group_is_counted_once(tmp_path: Path) -> None:
    tensors = (
        gate_up(3e-4, layers=3) | nvfp4("layers.7.mlp.gate_proj") | nvfp4("layers.7.mlp.up_proj")
    )
    (found,) = look(survey(tmp_path, tensors), "NB210")
    assert (found.facts["groups"], found.facts["of"]) == (3, 4)
    assert found.facts["places"] == {"layers.#.mlp": 3}


def test_divisors_are_compared_as_factors(tmp_path: Path) -> None:
    def named(tensors: Tensors) -> Tensors:
        words = {"weight_scale_2": "weight_global_scale", "weight": "weight_packed"}
        out: Tensors = {}
        for name, values in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_scale_2":
                values = (1 / values).astype(np.float32).reshape(1)
            out[f"{module}.{words.get(leaf, leaf)}"] = values
        return out

    (found,) = look(survey(tmp_path / "a", named(gate_up(2e-4))), "NB210")
    assert found.facts["max_ratio"] == pytest.approx(2, rel=1e-5)
    assert look(survey(tmp_path / "b", named(gate_up(1e-4)))) == []


def test_fp8_members_may_differ(tmp_path: Path) -> None:
    tensors = fp8("layers.0.self_attn.q_proj", 0, 1e-3) | fp8("layers.0.self_attn.k_proj", 1, 5e-3)
    assert look(survey(tmp_path, tensors)) == []


def test_modules_that_share_no_matmul_may_differ(tmp_path: Path) -> None:
    tensors = nvfp4("layers.0.mlp.up_proj") | nvfp4("layers.0.mlp.down_proj", 1, top=3e-4)
    tensors |= nvfp4("layers.1.mlp.gate_proj", 2, top=2e-4)
    assert look(survey(tmp_path, tensors), "NB210") == []


# ------------------------------------------------------------------------------------- block scales


@pytest.mark.parametrize(
    ("zeros", "codes_too", "severity"),
    [(1, True, Severity.NOTE), (1, False, Severity.WARNING), (40, False, Severity.ERROR)],
)
@pytest.mark.parametrize("is_deep", [False, True])
def test_zero_block_scales_are_graded(
    tmp_path: Path, zeros: int, codes_too: bool, severity: Severity, is_deep: bool
) -> None:
    tensors = nvfp4("a.b", n=64, k=256)
    tensors["a.b.weight_scale"].view(np.uint8).reshape(-1)[:zeros] = 0
    if codes_too:
        tensors["a.b.weight"].reshape(-1)[: 8 * zeros] = 0x80
    write(tmp_path, tensors)
    (found,) = look(Survey.open(tmp_path, deep=is_deep))
    assert (found.rule.id, found.severity) == ("NB207", severity)
    if not codes_too:
        assert found.facts["blocks"] == zeros


def mxfp4(scales: NDArray[np.uint8]) -> Tensors:
    codes = np.random.default_rng(1).integers(0, 256, (32, 64), dtype=np.uint8)
    return {"a.b.weight_packed": codes, "a.b.weight_scale": scales}


def test_exponents_have_a_nan_of_their_own(tmp_path: Path) -> None:
    scales = np.random.default_rng(0).integers(118, 124, (32, 4)).astype(np.uint8)
    assert look(survey(tmp_path / "good", mxfp4(scales))) == []
    scales[0, 0] = 0x7F  # 1, and NaN in E4M3 only
    assert look(survey(tmp_path / "one", mxfp4(scales))) == []
    scales[0, 0] = 0xFF
    assert ids(look(survey(tmp_path / "nan", mxfp4(scales)), "NB205")) == {"NB205"}


def test_signed_zeros_and_nan_are_told_apart(tmp_path: Path) -> None:
    tensors = nvfp4("a.b")
    tensors["a.b.weight_scale"].view(np.uint8).reshape(-1)[3:5] = 0xFF
    assert ids(look(survey(tmp_path, tensors))) == {"NB205"}


def test_uniform_weights_are_not_called_clipped(tmp_path: Path) -> None:
    """Half of their blocks reach 448, by rounding and not by clipping."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(-1, 1, (64, 16, 16))
    scales = (np.abs(weights).max(axis=-1) * 448).astype(E4M3)
    steps = weights * 2688 / scales.astype(np.float64)[..., None]
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.abs(np.abs(steps)[..., None] - values).argmin(axis=-1).astype(np.uint8)
    codes |= np.where(steps < 0, 8, 0).astype(np.uint8)
    flat = codes.reshape(64, 256)
    tensors = nvfp4("a.b", n=64, k=256)
    tensors["a.b.weight"] = flat[:, 0::2] | (flat[:, 1::2] << 4)
    tensors["a.b.weight_scale"] = scales
    assert (scales.astype(np.float32) == 448).mean() > 0.3
    assert look(survey(tmp_path, tensors)) == []


def test_clipped_fp8_is_found(tmp_path: Path) -> None:
    tensors = fp8("a.b")
    clipped = np.clip(tensors["a.b.weight"].astype(np.float32) * 8, -448, 448).astype(E4M3)
    (found,) = look(survey(tmp_path, tensors | {"a.b.weight": clipped}))
    assert (found.rule.id, found.subjects) == ("NB215", ("a.b",))


# ------------------------------------------------------------------------- defaults and magnitudes


def experts(layers: int, count: int, scale: Callable[[int, int], float]) -> Tensors:
    tensors: Tensors = {}
    for layer in range(layers):
        for e in range(count):
            name = f"layers.{layer}.mlp.experts.{e}.down_proj"
            tensors |= nvfp4(name, 7 * layer + e, n=16, k=64, top=1e-4 * (1 + 0.01 * e + layer))
            tensors[f"{name}.input_scale"] = np.array(scale(layer, e), dtype=np.float32)
    return tensors


def test_experts_of_one_layer_may_share_an_input_scale(tmp_path: Path) -> None:
    assert look(survey(tmp_path, experts(8, 3, lambda layer, e: 0.1 + layer))) == []


def test_one_input_scale_in_every_layer_is_a_default(tmp_path: Path) -> None:
    (found,) = look(survey(tmp_path, experts(8, 3, lambda layer, e: 0.123)))
    assert (found.rule.id, found.facts["count"]) == ("NB208", 24)


@pytest.mark.parametrize(("top", "fires"), [(2.0**-13, False), (1.1e-4, True)])
def test_only_powers_of_two_may_repeat(tmp_path: Path, top: float, fires: bool) -> None:
    tensors: Tensors = {}
    for i in range(8):
        tensors |= nvfp4(f"layers.{i}.mlp.down_proj", i, top=top)
    assert ids(look(survey(tmp_path, tensors))) == ({"NB208"} if fires else set())


def test_an_expert_below_its_layer_is_a_warning_and_one_above_a_note(tmp_path: Path) -> None:
    def scale(layer: int, e: int) -> float:
        return {(0, 1): 1e-4, (1, 2): 30.0}.get((layer, e), 0.1 + 0.01 * layer + 0.001 * e)

    found = look(survey(tmp_path, experts(2, 5, scale)))
    assert [(f.rule.id, f.severity, f.subjects) for f in found] == [
        ("NB219", Severity.WARNING, ("layers.0.mlp.experts.1.down_proj.input_scale",)),
        ("NB219", Severity.NOTE, ("layers.1.mlp.experts.2.down_proj.input_scale",)),
    ]


def test_single_level_scales_under_a_one_are_sound(tmp_path: Path) -> None:
    """Block scales that hold the magnitude themselves, and a tensor scale of 1."""
    tensors = nvfp4("a.b", top=1.0)
    small = tensors["a.b.weight_scale"].astype(np.float32) * 2.0**-10
    tensors["a.b.weight_scale"] = np.maximum(small, 2.0**-9).astype(E4M3)
    assert look(survey(tmp_path, tensors), "NB212", "NB218") == []


def test_reciprocal_fp8_scales_are_found(tmp_path: Path) -> None:
    tensors = fp8("a.b", 0, 1e-3) | fp8("a.c", 1, 1e3)
    (found,) = look(survey(tmp_path, tensors), "NB212")
    assert found.subjects == ("a.c.weight_scale",)


def test_reciprocal_input_scales_are_found(tmp_path: Path) -> None:
    found = look(survey(tmp_path, experts(3, 4, lambda layer, e: 100 + layer + e)), "NB212")
    assert [len(f.subjects) for f in found] == [12]


# -------------------------------------------------------------------------------- weights and zeros


def test_a_dead_expert_is_no_zero_filled_file(tmp_path: Path) -> None:
    tensors = nvfp4("a.experts.0.down_proj") | nvfp4("a.experts.1.down_proj", 1)
    tensors["a.experts.1.down_proj.weight"][:] = 0
    (found,) = look(survey(tmp_path, tensors))
    assert (found.rule.id, found.severity) == ("NB214", Severity.WARNING)


def test_a_dead_expert_may_have_scales_of_zero(tmp_path: Path) -> None:
    """As kernels that quantize on the fly write it: it decodes to the zeros that it stands for."""
    tensors = experts(4, 6, lambda layer, e: 0.1 + layer + e / 100)
    name = "layers.2.mlp.experts.3.down_proj"
    tensors[f"{name}.weight"][:] = 0
    tensors[f"{name}.weight_scale"].view(np.uint8)[:] = 0
    found = look(survey(tmp_path, tensors))
    assert {(f.rule.id, f.severity) for f in found} == {
        ("NB207", Severity.NOTE),
        ("NB214", Severity.WARNING),
    }


def test_many_experts_of_zeros_are_an_unfinished_file(tmp_path: Path) -> None:
    tensors = experts(4, 6, lambda layer, e: 0.1 + layer + e / 100)
    for e in range(6):
        tensors[f"layers.2.mlp.experts.{e}.down_proj.weight"][:] = 0
        tensors[f"layers.2.mlp.experts.{e}.down_proj.weight_scale"].view(np.uint8)[:] = 0
    found = look(survey(tmp_path, tensors))
    assert {(f.rule.id, f.severity, len(f.subjects)) for f in found} == {
        ("NB207", Severity.ERROR, 6),
        ("NB221", Severity.ERROR, 6),
    }


def test_a_dead_expert_at_the_end_of_a_shard_is_no_zero_tail(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for e in range(4):
        for part in ("gate_proj", "up_proj"):
            tensors |= nvfp4(f"layers.0.mlp.experts.{e}.{part}", e, n=128, k=128)
    for part in ("gate_proj", "up_proj"):
        tensors[f"layers.0.mlp.experts.3.{part}.weight"][:] = 0
    # Data of one width in the order of names, so that weights are last.
    ordered = sorted(
        tensors, key=lambda name: (-tensors[name].itemsize, name.endswith("weight"), name)
    )
    opened = survey(tmp_path, {name: tensors[name] for name in ordered})
    assert {f.rule.id for f in look(opened)} == {"NB214"}
    for part in ("gate_proj", "up_proj"):
        tensors[f"layers.0.mlp.experts.2.{part}.weight"][:] = 0
    opened = survey(tmp_path, {name: tensors[name] for name in ordered})
    assert "NB221" in {f.rule.id for f in look(opened)}


@pytest.mark.parametrize(("value", "rule"), [(0.0, "NB201"), (np.nan, "NB203")])
@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
def test_scales_of_stacked_experts_are_looked_at(
    tmp_path: Path, value: float, rule: str, leaf: str
) -> None:
    parts = [nvfp4("a.experts", e) for e in range(3)]
    tensors: Tensors = {name: np.stack([part[name] for part in parts]) for name in parts[0]} | {
        "a.experts.input_scale": np.full(3, 0.1, dtype=np.float32)
    }
    assert look(survey(tmp_path / "good", tensors)) == []
    tensors[f"a.experts.{leaf}"][1] = value
    (found,) = look(survey(tmp_path / "bad", tensors))
    assert (found.rule.id, found.severity) == (rule, Severity.ERROR)
    assert found.subjects == (f"a.experts.{leaf}",)


def test_biases_of_zeros_are_sound_and_matrices_of_zeros_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: Tensors = {
        "a.weight": rng.standard_normal((64, 64)).astype(BF16),
        "a.bias": np.zeros(4096, dtype=BF16),
        "b.weight": rng.standard_normal((64, 64)).astype(BF16),
    }
    assert look(survey(tmp_path / "good", tensors)) == []
    tensors["b.weight"][:] = 0
    (found,) = look(survey(tmp_path / "bad", tensors))
    assert (found.rule.id, found.subjects) == ("NB221", ("b.weight",))


def test_a_hole_within_a_tensor_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: Tensors = {"a.weight": rng.standard_normal((2048, 1024)).astype(np.float32)}
    write(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    with path.open("wb") as file:
        file.write(data[: 2 << 20])
        file.seek(5 << 20)
        file.write(data[5 << 20 :])
    if path.stat().st_blocks * 512 >= path.stat().st_size:
        pytest.skip("this file system makes no holes")
    (found,) = look(Survey.open(tmp_path), "NB221")
    assert found.subjects == ("a.weight",)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_plain_weights_must_be_finite(tmp_path: Path, value: float, dtype: type) -> None:
    weights = np.ones((8, 8), dtype=dtype)
    weights[7, 7] = value
    (found,) = look(survey(tmp_path, {"norm.weight": weights}))
    assert (found.rule.id, found.facts["values"]) == ("NB217", 1)


# ------------------------------------------------------------------------------------------ reading


class Remote:
    """A folder that says it is elsewhere, and counts what is read."""

    def __init__(self, path: Path) -> None:
        self.inner = LocalFiles(path)
        self.reads: list[int] = []

    @property
    def where(self) -> str:
        return "https://example.org/model"

    @property
    def local(self) -> Path | None:
        return None

    @property
    def habit(self) -> Habit:
        return Habit(gap_bytes=1 << 16, at_once=4)

    def names(self) -> tuple[str, ...]:
        return self.inner.names()

    def size(self, name: str) -> int:
        return self.inner.size(name)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        data = self.inner.read(name, start, length)
        self.reads.append(len(data))
        return data


@pytest.mark.parametrize("is_deep", [False, True])
def test_a_remote_folder_gives_the_same_findings(tmp_path: Path, is_deep: bool) -> None:
    tensors = gate_up(1e-3, layers=4) | {"norm.weight": np.full(64, np.nan, dtype=BF16)}
    write(tmp_path, tensors)
    local = look(Survey.open(tmp_path, deep=is_deep))
    found = look(Survey(Remote(tmp_path), deep=is_deep))
    assert [(f.rule.id, f.message) for f in found] == [(f.rule.id, f.message) for f in local]
    assert ids(found) == {"NB210", "NB217"}


def test_little_is_read_of_a_remote_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    for i in range(4):
        tensors |= nvfp4(f"layers.{i}.mlp.down_proj", i, n=16, k=64, top=1e-4 * (1 + i / 50))
        tensors[f"layers.{i}.b.weight"] = rng.standard_normal((1024, 1024)).astype(BF16)
    files = Remote(write(tmp_path, tensors))
    opened = Survey(files)
    files.reads.clear()
    assert look(opened) == []
    assert sum(files.reads) < 0.1 * files.size("model.safetensors")


@pytest.mark.parametrize("chunk", [64, 1 << 10, 1 << 21])
def test_whole_tensors_are_counted_whatever_the_reads(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    tensors: Tensors = {"a.weight": rng.standard_normal((31, 77)).astype(np.float32)}
    tensors["a.weight"][rng.random((31, 77)) < 0.1] = 0
    tensors |= {
        "b.weight": rng.integers(0, 256, (3, 111), dtype=np.uint8),
        "c.weight": np.ones(0, BF16),
    }
    monkeypatch.setattr(deep, "CHUNK", chunk)
    opened = survey(tmp_path, tensors)
    infos = [opened.tensors[n] for n in ("b.weight", "a.weight", "c.weight")]
    counts = deep.count_all(opened, infos, ["e4m3", "f32", "bf16"])
    codes = tensors["b.weight"].view(E4M3).astype(np.float32)
    assert counts["size"].tolist() == [333, 31 * 77, 0]
    assert counts["zero"].tolist() == [(codes == 0).sum(), (tensors["a.weight"] == 0).sum(), 0]
    assert counts["nan"][0] == np.isnan(codes).sum()
    largest = np.abs(tensors["a.weight"]).max().view(np.uint32)
    assert counts["largest"][1] == largest


def test_samples_of_one_ratio_correspond(tmp_path: Path) -> None:
    """Scales and codes of a module are sampled at the same blocks."""
    scales = np.arange(1000, dtype=np.uint8).reshape(10, 100) % 120 + 1
    tensors = {"a.weight": np.repeat(scales, 8, axis=1), "a.weight_scale": scales.view(E4M3)}
    opened = survey(tmp_path, tensors)
    infos = [opened.tensors["a.weight_scale"], opened.tensors["a.weight"]]
    some, codes = deep.read_some(opened, infos, [100, 800])
    assert some.size == 300
    assert np.array_equal(np.repeat(some, 8), codes)


def test_many_modules_are_sampled_across_layers_and_experts(tmp_path: Path) -> None:
    tensors = experts(6, 100, lambda layer, e: 0.1 + layer + e / 1000)
    opened = survey(tmp_path, tensors)
    chosen = [m.name.split(".") for m in scan_of(opened).chosen]
    assert {name[1] for name in chosen} == set("012345")
    assert len({name[4] for name in chosen}) > 60
    assert 350 <= len(chosen) <= 384 + 64
    assert look(opened) == []
    assert scan_of(opened).blocks.looked == f"{len(chosen)} of 600 looked at in pieces"


@pytest.mark.slow
def test_zeros_of_a_35b_are_all_found(tmp_path: Path) -> None:
    """True headers over files without data: every scalar is 0, and so is all else."""
    import subprocess
    import sys

    tests = Path(__file__).parents[1]
    config = tests / "fixtures" / "configs" / "nvidia--Qwen3.6-35B-A3B-NVFP4" / "config.json"
    command = [sys.executable, str(tests / "make_headers.py"), str(config)]
    subprocess.run([*command, "--nvfp4-layout", "modelopt", "--out", str(tmp_path)], check=True)
    found = look(Survey.open(tmp_path))
    counts = {(f.rule.id, f.severity): f.facts["count"] for f in found}
    assert counts[("NB201", Severity.WARNING)] == 30_841  # input scales that nothing reads
    assert ("NB207", Severity.ERROR) in counts
    assert ("NB221", Severity.ERROR) in counts
    scales = [f for f in found if f.rule.id == "NB201" and "tensor scales" in f.message]
    assert [len(f.subjects) for f in scales] == [30_841 + 130]


# ------------------------------------------------------------------------- dtypes and our own files


@pytest.mark.parametrize("dtype", ["BOOL", "I8", "F8_E5M2"])
@pytest.mark.parametrize("is_deep", [False, True])
def test_scales_of_a_foreign_dtype_are_passed_over(
    tmp_path: Path, dtype: str, is_deep: bool
) -> None:
    """No number is made of them here; that they are foreign is a rule of completeness."""
    write(tmp_path, nvfp4("a.one") | nvfp4("a.two", 1))
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a.one.weight_scale"]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    found = Survey.open(tmp_path, deep=is_deep)
    assert look(found) == []
    assert [s.module.name for s in scan_of(found).sampled] == ["a.two"]
    assert "expected F8_E4M3" in found.contents.by_name["a.one"].kind.problem


@pytest.mark.parametrize(("scale", "fires"), [(2.0**-10, False), (1.0, True)])
def test_channels_of_one_scale_are_a_default_only_if_it_does_not_fit(
    tmp_path: Path, scale: float, fires: bool
) -> None:
    """Rows of one size under powers of two have one scale, and codes up to 448."""
    weights = np.random.default_rng(3).uniform(-0.4, 0.4, (128, 256))
    tensors = {
        "a.b.weight": (weights / scale).astype(E4M3),
        "a.b.weight_scale": np.full((128, 1), scale, dtype=BF16),
    }
    assert ids(look(survey(tmp_path, tensors))) == ({"NB208"} if fires else set())


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("fp8", "compressed-tensors"),
        ("mxfp4", "compressed-tensors"),
        ("nvfp4", "compressed-tensors"),
        ("nvfp4", "modelopt"),
        ("nvfp4-all", "compressed-tensors"),
        ("nvfp4-all", "modelopt"),
    ],
)
def test_what_nybble_writes_without_data_has_no_warning(
    recipe: str, layout: str, tmp_path: Path
) -> None:
    source = ZOO.parent / "models" / "hybrid-chat-mtp"
    quantize(source, tmp_path / "out", recipe, layout=layout, data_free=True)
    found = check(tmp_path / "out", source=source)
    assert [f.message for f in found.findings if f.severity > Severity.NOTE] == []


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_head_in_four_bits_is_warned_of_and_nothing_else(layout: str, tmp_path: Path) -> None:
    source = ZOO.parent / "models" / "hybrid-chat-mtp"
    quantize(source, tmp_path / "out", "nvfp4-mtp", layout=layout, data_free=True)
    found = check(tmp_path / "out", source=source)
    (warning,) = (f.message for f in found.findings if f.severity > Severity.NOTE)
    assert "modules of the MTP head quantized to four bits" in warning


def test_every_data_free_pair_of_recipe_and_layout_is_among_these() -> None:
    names = {p.stem for p in (ZOO.parent / "src/nybble/plan/recipes").glob("*.toml")}
    measured = {"nvfp4-experts-fp8", "nvfp4-redhat", "nvfp4-w4a4"}  # have no data-free form
    assert names - measured == {"fp8", "mxfp4", "nvfp4", "nvfp4-all", "nvfp4-mtp"}
