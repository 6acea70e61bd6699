"""A recipe may quantize the MTP head: its layer, with or without fc, in every layout that carries
the scheme; and what the configuration says of the rest of the head."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from nybble.api.plan import LAYOUTS
from nybble.api.quantize import quantize
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import ModelError, RecipeError
from nybble.formats.tensor import BlockScaledTensor
from nybble.models.model import Model
from nybble.plan.plan import make_plan
from nybble.plan.recipe import Recipe, load_recipe, parse_recipe

TRUNK = '[[rule]]\nroles = ["attention"]\nscheme = "nvfp4-w4a16"\n'
LAYER = '[[rule]]\nroles = ["mtp"]\nmodules = ["*mtp.layers.*"]\nscheme = "{}"\n'
ENGINES_BUILD = re.compile(r"NB(30\d|6\d\d)")


def recipe(scheme: str, *, with_trunk: bool = True) -> Recipe:
    return parse_recipe("mine", (TRUNK if with_trunk else "") + LAYER.format(scheme))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sources")
    return {f: tiny.checkpoint(base / f, f) for f in tiny.HYBRIDS}


@pytest.mark.parametrize("family", tiny.HYBRIDS)
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("modelopt", "nvfp4-mtp"),
        ("compressed-tensors", "nvfp4-mtp"),
        ("compressed-tensors", "fp8-dynamic"),
    ],
)
def test_a_quantized_head_is_read_and_engines_build_what_the_file_holds(
    family: str, layout: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    chosen = load_recipe(name) if name == "nvfp4-mtp" else recipe(name)
    result = quantize(folders[family], tmp_path / "out", chosen, layout=layout, jobs=1)
    said = [f for f in result.findings if f.engine in ("vllm", "sglang")]
    assert not [f for f in said if ENGINES_BUILD.match(f.rule.id)], said
    assert "NB105" in {f.rule.id for f in result.findings}  # that it is quantized is said
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        head = Model(checkpoint).mtp
        assert head is not None
        mixer: Any = head.layer.mixer
        kinds = [type(w) for x in (mixer.qkv, mixer.output) for w in x.weight.weights]
        assert set(kinds) == {BlockScaledTensor}
        assert mixer.qkv.activation == chosen.rules[-1].scheme.input
        assert isinstance(head.fc.weight.weights[0], np.ndarray)


def test_the_members_of_its_fused_groups_share_a_scale(folders: dict[str, Path]) -> None:
    with Checkpoint.open(folders["qwen3_5_moe"]) as checkpoint:
        plan = make_plan(checkpoint, load_recipe("nvfp4-mtp"), LAYOUTS["modelopt"])
    groups = {j.name: [m.module.rpartition(".")[2] for m in j.members] for j in plan.jobs}
    base = "mtp.layers.0."
    assert groups[base + "self_attn:qkv"] == ["q_proj", "k_proj", "v_proj"]
    assert groups[base + "mlp.shared_expert:gate_up"] == ["gate_proj", "up_proj"]
    assert groups[base + "mlp.experts.2:gate_up"] == ["gate_proj", "up_proj"]
    roles = {j.role for j in plan.jobs if j.name.startswith("mtp.")}
    assert roles == {"mtp"}
    kept = {c.tensor.name for c in plan.copies if c.role == "mtp"}
    assert {"mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"} <= kept


def test_heads_and_trunk_of_two_schemes_have_patterns_of_their_own(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    quantize(folders["qwen3_5"], tmp_path / "o", recipe("fp8-dynamic"), layout="compressed-tensors")
    section = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    targets = {g["format"]: g["targets"] for g in section["config_groups"].values()}

    def groups_of(module: str) -> list[str]:
        return [f for f, ts in targets.items() if any(re.match(t[3:], module) for t in ts)]

    for prefix in ("model.language_model.", "language_model.model."):
        assert groups_of(prefix + "layers.1.self_attn.q_proj") == ["nvfp4-pack-quantized"]
    assert groups_of("mtp.layers.0.self_attn.q_proj") == ["float-quantized"]
    assert groups_of("model.mtp.layers.0.self_attn.q_proj") == ["float-quantized"]
    assert "mtp.fc" in section["ignore"]


def test_a_head_that_contradicts_its_configuration_is_copied_but_not_quantized(
    tmp_path: Path,
) -> None:
    cfg = tiny.config("qwen3_5")
    values = tiny.tensors(cfg)
    values["mtp.fc.weight"] = np.ascontiguousarray(values["mtp.fc.weight"][:, :96])
    folder = tiny.write(tmp_path / "m", cfg, values)
    with Checkpoint.open(folder) as checkpoint:
        plan = make_plan(checkpoint, load_recipe("nvfp4-all"), LAYOUTS["modelopt"])
        assert any("copied as it is" in note for note in plan.notes)
        with pytest.raises(ModelError, match=r"mtp\.fc\.weight: expected \[96, 192\]"):
            make_plan(checkpoint, load_recipe("nvfp4-mtp"), LAYOUTS["modelopt"])


def test_experts_of_the_head_have_one_scheme(folders: dict[str, Path]) -> None:
    split = '[[rule]]\nroles = ["mtp"]\nmodules = ["*experts.*down_proj"]\nscheme = "nvfp4-w4a16"\n'
    with (
        Checkpoint.open(folders["qwen3_5_moe"]) as checkpoint,
        pytest.raises(RecipeError, match=r"experts of mtp\.layers\.0\.mlp would be quantized"),
    ):
        make_plan(checkpoint, parse_recipe("split", split), LAYOUTS["modelopt"])


def test_what_is_not_named_is_copied_byte_for_byte(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    result = quantize(folders["qwen3_5_moe"], tmp_path / "out", "nvfp4-all", jobs=1)
    copied = {c.tensor.name for c in result.plan.copies if c.role == "mtp"}
    with Checkpoint.open(folders["qwen3_5_moe"]) as checkpoint:
        assert copied == {n for n in checkpoint.tensors if n.startswith("mtp.")}
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["mtp*", "mtp.layers.0*"]
