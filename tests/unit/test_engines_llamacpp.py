"""llama.cpp's replay: the converter's names, what it refuses, and what it writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nybble.check.engines import find_engine
from nybble.check.engines.llamacpp import ENGINE, converted_name
from nybble.check.engines.replayed import Built, Replay
from nybble.check.survey import Survey
from nybble.errors import RecipeError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "zoo"))

from folder import Folder  # noqa: E402

Config = dict[str, Any]
Change = Callable[[Folder, Config], object]


def replay(base: str, tmp_path: Path, change: Change | None = None, hardware: str = "") -> Replay:
    """The replay of a clean folder, after a change of it and of its config.json."""
    folder = Folder.read(ROOT / "zoo" / "clean" / base)
    config = folder.document("config.json")
    if change:
        change(folder, config)
    folder.put("config.json", config)
    out = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
    folder.write(out)
    return ENGINE.replay(Survey.open(out), hardware=hardware)


def named(found: Replay, name: str) -> Built:
    [built] = [b for b in found.built if b.name == name]
    return built


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.language_model.layers.3.mlp.experts", "model.layers.3.mlp.experts"),
        ("mtp.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj"),
        ("mtp.fc", "model.layers.7.eh_proj"),
        ("mtp.norm.weight", "model.layers.7.shared_head.norm.weight"),
        ("model.mtp.pre_fc_norm_hidden", "model.layers.7.hnorm"),
        ("model.visual.blocks.0.attn.qkv", ""),
        ("lm_head", "lm_head"),
    ],
)
def test_names_are_the_converters(name: str, wanted: str) -> None:
    assert converted_name(name, 7) == wanted


def test_nvfp4_is_repacked_and_weight_only_is_tagged(tmp_path: Path) -> None:
    found = replay("nybble-modelopt", tmp_path)
    assert found.loads
    packed = [b for b in found.built if b.holds == "nvfp4"]
    assert {(b.builds, b.runs_as) for b in packed} == {("nvfp4", "W4A8")}
    assert named(found, "model.layers.0.mlp.experts").count > 1


def test_w4a4_needs_blackwell(tmp_path: Path) -> None:
    runs = {
        hardware: {b.runs_as for b in replay("nybble-w4a4", tmp_path, None, hardware).built}
        for hardware in ("", "sm120", "sm90", "cpu")
    }
    assert runs == {
        "": {"W4A4", "BF16"},
        "sm120": {"W4A4", "BF16"},
        "sm90": {"W4A8", "BF16"},
        "cpu": {"W4A8", "BF16"},
    }


def test_weight_only_groups_are_not_tagged(tmp_path: Path) -> None:
    found = replay("nybble-ct", tmp_path)
    assert found.loads
    assert {b.runs_as for b in found.built if b.builds == "nvfp4"} == {"W4A4"}
    assert any("not tagged" in note for note in found.notes)


def test_an_entry_must_be_a_module_or_a_container(tmp_path: Path) -> None:
    def change(folder: Folder, config: Config) -> None:
        layers = config["quantization_config"]["quantized_layers"]
        layers["model.language_model.layers.0"] = {"quant_algo": "NVFP4"}
        layers["model.language_model.norm"] = {"quant_algo": "NVFP4"}
        layers["model.visual.blocks.77"] = {"quant_algo": "NVFP4"}  # dropped before it is asked
        layers["lm_heads"] = {"quant_algo": "NVFP4"}

    [refusal] = replay("nybble-modelopt", tmp_path, change).refusals
    assert refusal == "quantized_layers entry 'lm_heads' is not in the model tensors"


def test_several_groups_are_refused_unless_all_are_packed(tmp_path: Path) -> None:
    def second(format_: str) -> Change:
        def change(folder: Folder, config: Config) -> None:
            section = config["quantization_config"]
            [(name, group)] = section["config_groups"].items()
            first = group | {"format": "nvfp4-pack-quantized"}
            other = first | {"targets": ["re:x"], "format": format_}
            section |= {"format": "mixed-precision", "config_groups": {name: first, "b": other}}

        return change

    assert replay("nybble-ct", tmp_path, second("nvfp4-pack-quantized")).loads
    [refusal] = replay("nybble-ct", tmp_path, second("float-quantized")).refusals
    assert "multiple config groups" in refusal


def test_hf_quant_config_alone_is_enough(tmp_path: Path) -> None:
    found = replay("nybble-w4a4", tmp_path, lambda f, c: c.pop("quantization_config"))
    assert found.loads
    assert "W4A4" in {b.runs_as for b in found.built}


def test_without_any_section_scales_have_no_name(tmp_path: Path) -> None:
    def change(folder: Folder, config: Config) -> None:
        del config["quantization_config"], folder.files["hf_quant_config.json"]

    found = replay("nybble-w4a4", tmp_path, change)
    assert not found.loads
    assert found.failing
    assert not found.silent


def test_a_missing_tensor_scale_is_silent(tmp_path: Path) -> None:
    found = replay("nybble-modelopt", tmp_path, lambda f, c: f.drop(r"down_proj\.weight_scale_2$"))
    assert found.loads
    assert all("computes with 1" in b.problem for b in found.silent)
    assert named(found, "model.layers.0.mlp.experts").is_silent


def test_half_superblocks_are_refused(tmp_path: Path) -> None:
    def change(folder: Folder, config: Config) -> None:
        for name in folder.matching(r"mlp\.down_proj\.(weight|weight_scale)$"):
            width = 3 if name.endswith("_scale") else 24
            folder.tensors[name] = np.ascontiguousarray(folder.tensors[name][:, :width])

    found = replay("nybble-dense", tmp_path, change)
    assert {b.problem for b in found.failing} == {"K is 48, and must be a multiple of 64"}


def test_an_expert_that_is_not_there_leaves_the_stack_incomplete(tmp_path: Path) -> None:
    found = replay(
        "nybble-modelopt", tmp_path, lambda f, c: f.drop(r"layers\.0\.mlp\.experts\.1\.")
    )
    [failing] = found.failing
    assert failing.problem == "1 of 2 experts have a gate_proj: the stack is not complete"


def test_no_architecture_is_refused(tmp_path: Path) -> None:
    found = replay("source-dense", tmp_path, lambda f, c: c.pop("architectures"))
    assert "architecture" in found.refusals[0]


def test_an_unknown_architecture_is_said_not_to_be_known(tmp_path: Path) -> None:
    found = replay("source-dense", tmp_path, lambda f, c: c.update(architectures=["Other"]))
    assert found.loads
    assert any("Other" in note for note in found.notes)


def test_builds_are_versions_and_older_ones_are_not_known() -> None:
    engine, version = find_engine("llamacpp@11500")
    assert (engine.name, version) == ("llamacpp", "11500")
    with pytest.raises(RecipeError, match="11434"):
        find_engine("llamacpp@9000")


def test_nothing_is_unfit_for_several_devices(tmp_path: Path) -> None:
    survey = Survey.open(ROOT / "zoo" / "clean" / "nybble-w4a4")
    assert ENGINE.unfit(survey, 7) == ()
