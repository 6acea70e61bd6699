"""The self-audit finds what a writer could do wrong, and measures the error that is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble.check.audit as audit_module
import tiny
from nybble.api.quantize import quantize
from nybble.check.audit import Audit, audit, decibel
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckFailed
from nybble.plan.plan import Plan
from nybble.progress import Progress

LM = "model.language_model."
EXPERT = LM + "layers.1.mlp.experts.2"


class Made:
    """A quantized folder, its plan, and its tensors in memory; `write` puts changed ones into a new
    folder."""

    def __init__(self, folder: Path, recipe: str, layout: str) -> None:
        self.folder = folder
        self.source = tiny.checkpoint(folder / "m", "qwen3_5_moe", vision=True)
        self.plan: Plan = quantize(self.source, folder / "out", recipe, layout=layout).plan
        self.tensors = {
            name: tiny.array(entry).copy() for name, entry in tiny.read(folder / "out").items()
        }
        # `quantize` closes its source.
        self.plan = Plan(
            **{
                f: getattr(self.plan, f)
                for f in ("family", "dimensions", "recipe", "layout", "jobs", "copies", "notes")
            },
            checkpoint=Checkpoint.open(self.source),
        )

    def check(self, tensors: tiny.Tensors) -> Audit:
        out = self.folder / "changed"
        out.mkdir(exist_ok=True)
        tiny.write_safetensors(out / "model.safetensors", tensors)
        return audit(self.plan, out, threads=1, progress=Progress())

    def complaint(self, change: Callable[[tiny.Tensors], object]) -> str:
        tensors = {name: value.copy() for name, value in self.tensors.items()}
        change(tensors)
        with pytest.raises(CheckFailed) as found:
            self.check(tensors)
        assert found.value.exit_code == 3
        assert "Do not use this folder" in str(found.value)
        return str(found.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {
        name: Made(tmp_path_factory.mktemp(name), recipe, layout)
        for name, recipe, layout in (
            ("modelopt", "nvfp4-all", "modelopt"),
            ("compressed", "nvfp4-all", "compressed-tensors"),
            ("fp8", "fp8", "compressed-tensors"),
            ("mxfp4", "mxfp4", "compressed-tensors"),
        )
    }


ALL = ("modelopt", "compressed", "fp8", "mxfp4")
CODES = {
    "modelopt": "weight",
    "compressed": "weight_packed",
    "fp8": "weight",
    "mxfp4": "weight_packed",
}


@pytest.mark.parametrize("name", ALL)
def test_what_was_planned_passes_whatever_file_holds_it(made: dict[str, Made], name: str) -> None:
    m = made[name]
    found = m.check(m.tensors)
    assert found.problems == []
    assert found.tensors == len(m.tensors)
    assert found.payload_bytes == m.plan.payload_bytes
    assert found.copied == len(m.plan.copies)
    assert sum(found.copied_by_role.values()) == found.copied
    assert found.copied_by_role["mtp"] == 19
    assert found.copied_by_role["vision"] == 33


@pytest.mark.parametrize("name", ALL)
def test_a_missing_and_an_extra_tensor_are_named(made: dict[str, Made], name: str) -> None:
    tensor = f"{EXPERT}.up_proj.weight_scale"
    said = made[name].complaint(lambda t: t.pop(tensor))
    assert f"tensor {tensor} is missing" in said
    said = made[name].complaint(lambda t: t.update({"surprise": np.zeros(3, np.float32)}))
    assert "tensor surprise was not planned" in said
    assert f"found {made[name].plan.payload_bytes + 12}" in said


def test_other_dtypes_and_shapes_are_named_with_both(made: dict[str, Made]) -> None:
    tensor = f"{EXPERT}.up_proj.weight_scale_2"
    said = made["modelopt"].complaint(lambda t: t.update({tensor: t[tensor].reshape(1)}))
    assert f"tensor {tensor}: planned F32 [], found F32 [1]" in said
    tensor = LM + "layers.0.linear_attn.A_log"
    said = made["modelopt"].complaint(lambda t: t.update({tensor: t[tensor].astype(np.float32)}))
    assert f"tensor {tensor}: planned BF16 [6], found F32 [6]" in said


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize(
    "tensor", ["mtp.fc.weight", "model.visual.pos_embed.weight", LM + "embed_tokens.weight"]
)
def test_one_bit_of_a_copy_is_found(made: dict[str, Made], tensor: str, at: int) -> None:
    def flip(t: tiny.Tensors) -> None:
        t[tensor].reshape(-1).view(np.uint8)[at] ^= 1

    assert f"tensor {tensor} differs from its source" in made["modelopt"].complaint(flip)


def put(tensor: str, value: Any, at: Any = ...) -> Callable[[tiny.Tensors], None]:
    def change(t: tiny.Tensors) -> None:
        t[tensor][at] = value

    return change


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF, 0x80, 0xB8])
@pytest.mark.parametrize("name", ["modelopt", "compressed"])
def test_block_scales_that_are_zero_negative_or_nan_are_counted(
    made: dict[str, Made], name: str, byte: int
) -> None:
    tensor = f"{EXPERT}.down_proj.weight_scale"

    def change(t: tiny.Tensors) -> None:
        t[tensor].view(np.uint8)[1, 2] = byte
        t[tensor].view(np.uint8)[95, 3] = byte

    said = made[name].complaint(change)
    assert f"{EXPERT}.down_proj: 2 block scales are zero, negative or NaN" in said


def test_an_e8m0_scale_of_255_is_nan(made: dict[str, Made]) -> None:
    said = made["mxfp4"].complaint(put(f"{EXPERT}.down_proj.weight_scale", 255, (3, 1)))
    assert f"{EXPERT}.down_proj: 1 block scales are zero, negative or NaN" in said


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("modelopt", "weight_scale_2"),
        ("compressed", "weight_global_scale"),
        ("fp8", "weight_scale"),
    ],
)
def test_other_scales_must_be_finite_and_positive(
    made: dict[str, Made], name: str, leaf: str, value: float
) -> None:
    module = LM + "layers.1.self_attn.o_proj"
    at = (5, 0) if name == "fp8" else ...
    said = made[name].complaint(put(f"{module}.{leaf}", value, at))
    assert f"{module}: a scale is not finite and positive" in said


@pytest.mark.parametrize("name", ["modelopt", "compressed"])
@pytest.mark.parametrize(
    ("group", "member"),
    [
        ("layers.1.self_attn:qkv", "layers.1.self_attn.v_proj"),
        ("layers.0.linear_attn:qkvz", "layers.0.linear_attn.in_proj_z"),
        ("layers.1.mlp.experts.2:gate_up", "layers.1.mlp.experts.2.up_proj"),
        ("layers.2.mlp.shared_expert:gate_up", "layers.2.mlp.shared_expert.gate_proj"),
    ],
)
def test_fused_members_with_different_tensor_scales_are_found(
    made: dict[str, Made], name: str, group: str, member: str
) -> None:
    leaf = "weight_scale_2" if name == "modelopt" else "weight_global_scale"

    def double(t: tiny.Tensors) -> None:
        t[f"{LM}{member}.{leaf}"] *= np.float32(2)

    said = made[name].complaint(double)
    assert f"{LM}{group}: its members have different tensor scales" in said


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_codes_that_are_nan_are_found(made: dict[str, Made], byte: int) -> None:
    module = LM + "layers.0.linear_attn.out_proj"

    def change(t: tiny.Tensors) -> None:
        t[f"{module}.weight"].view(np.uint8)[7, 9] = byte

    said = made["fp8"].complaint(change)
    assert f"{module}: decodes to values that are not finite" in said


def test_many_problems_are_counted_and_the_first_shown(made: dict[str, Made]) -> None:
    def lose(t: tiny.Tensors) -> None:
        for e in range(3):
            for part in ("gate", "up", "down"):
                del t[f"{LM}layers.0.mlp.experts.{e}.{part}_proj.weight_scale_2"]

    said = made["modelopt"].complaint(lose)
    assert said.count(" is missing") == 5
    assert "(and 5 more)" in said  # four tensors and the bytes


# -------------------------------------------------------------------------------- the error itself


def decode(m: Made, name: str, module: str) -> Any:
    codes, scale = m.tensors[f"{module}.{CODES[name]}"], m.tensors[f"{module}.weight_scale"]
    if name == "fp8":
        return codes.astype(np.float64) * scale.astype(np.float64)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
    values = np.where(nibbles & 8, -1, 1) * table[nibbles & 7]
    if name == "mxfp4":
        return values * np.repeat(np.exp2(scale.astype(np.float64) - 127), 32, 1)
    top = (
        float(m.tensors[f"{module}.weight_scale_2"])
        if name == "modelopt"
        else 1 / float(m.tensors[f"{module}.weight_global_scale"][0])
    )
    return values * np.repeat(scale.astype(np.float64), 16, 1) * top


@pytest.mark.parametrize("name", ALL)
def test_the_error_of_every_role_is_that_of_the_decoded_file(
    made: dict[str, Made], name: str
) -> None:
    m = made[name]
    source = {n: tiny.array(e).astype(np.float64) for n, e in tiny.read(m.source).items()}
    expected: dict[str, dict[str, tuple[float, float]]] = {}
    for job in m.plan.jobs:
        for member in job.members:
            x = source[member.source]
            if member.expert is not None:
                x = x[member.expert]
            x = x[member.first_row : member.first_row + member.shape[0]]
            d = decode(m, name, member.module) - x
            expected.setdefault(job.role, {})[member.module] = ((d * d).sum(), (x * x).sum())
    found = m.check(m.tensors)
    assert {e.role for e in found.errors} == expected.keys()
    for role in found.errors:
        own = expected[role.role]
        assert role.modules == len(own)
        error, energy = (sum(v[i] for v in own.values()) for i in (0, 1))
        assert role.error == pytest.approx(error, rel=1e-4)
        assert role.energy == pytest.approx(energy, rel=1e-4)
        assert role.sqnr_db == pytest.approx(10 * np.log10(energy / error), abs=1e-3)
        worst = min(own, key=lambda n: own[n][1] / own[n][0])
        assert role.worst_module == worst
        assert role.worst_db == pytest.approx(decibel(own[worst][1], own[worst][0]), abs=1e-3)
    error, energy = (sum(v[i] for own in expected.values() for v in own.values()) for i in (0, 1))
    assert found.sqnr_db == pytest.approx(10 * np.log10(energy / error), abs=1e-3)


def test_small_batches_find_the_same(
    made: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    m = made["modelopt"]
    whole = m.check(m.tensors)
    monkeypatch.setattr(audit_module, "CHUNK", 1000)
    parts = m.check(m.tensors)
    assert [(e.role, e.modules) for e in parts.errors] == [
        (e.role, e.modules) for e in whole.errors
    ]
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-9)

    def flip(t: tiny.Tensors) -> None:
        t["mtp.fc.weight"].reshape(-1).view(np.uint8)[5001] ^= 1

    assert "tensor mtp.fc.weight differs" in m.complaint(flip)


def test_weights_without_error_and_without_energy_have_infinite_ratios() -> None:
    assert decibel(1.0, 0.0) == np.inf
    assert decibel(0.0, 0.0) == np.inf
    assert decibel(10.0, 1.0) == 10.0
    assert decibel(1.0, np.inf) == decibel(1.0, np.nan) == -np.inf


def test_weights_on_the_grid_come_back_exactly(tmp_path: Path) -> None:
    cfg = tiny.config("qwen3")
    values = tiny.tensors(cfg)
    grid = np.array([0, 0.5, 1, -1.5, 2, -3, 4, 6] * 2, np.float32)
    for value in values.values():
        if value.ndim == 2:
            value[:] = np.resize(grid, value.shape).astype(ml_dtypes.bfloat16)
    path = tiny.write(tmp_path / "m", cfg, values)
    result = quantize(path, tmp_path / "out", "nvfp4-all")
    assert result.audit is not None
    assert result.audit.sqnr_db == np.inf
    document = result.as_json()
    assert document["schema"] == "nybble.quantize/1"
