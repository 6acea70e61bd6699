"""TensorRT-LLM's replay: names, promotion to W4A4, and what its configuration readers refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from nybble.check.engines.replayed import Built, Replay
from nybble.check.engines.trtllm import ENGINE, module_name
from nybble.check.survey import Survey

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "zoo"))

from folder import Folder  # noqa: E402

Config = dict[str, Any]
Change = Callable[[Folder, Config], object]
CLEAN = ROOT / "zoo" / "clean"
EXPERTS = "model.layers.0.mlp.experts"


def replay(base: str, tmp_path: Path, change: Change | None = None, hardware: str = "") -> Replay:
    folder = Folder.read(CLEAN / base)
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


def nested(change: Callable[[Config], object]) -> Change:
    """Change hf_quant_config.json, which counts."""

    def edit(folder: Folder, config: Config) -> None:
        document = folder.document("hf_quant_config.json")
        change(document["quantization"])
        folder.put("hf_quant_config.json", document)

    return edit


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("model.language_model.layers.3.mlp.experts", "model.layers.3.mlp.experts"),
        ("mtp.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj"),
        ("mtp.layers.0*", "model.layers.9*"),
        ("mtp.fc", "model.layers.9.fc"),
        ("mtp.norm", "model.layers.9.shared_head.norm"),
        ("mtp.fc*", "model.layers.9.fc*"),
        ("mtp.other", ""),
        ("mtp.layers.x", ""),
        ("lm_head", "lm_head"),
    ],
)
def test_names_drop_the_wrapper_and_append_mtp(path: str, wanted: str) -> None:
    assert module_name(path, 9) == wanted


def residual(folder: Folder, config: Config) -> None:
    """Input scales beside weight-only experts, as the published files have them."""
    import numpy as np

    for name in folder.matching(r"experts\.\d+\.\w+\.weight_scale_2$"):
        folder.tensors[name.replace("weight_scale_2", "input_scale")] = np.float32(1).reshape(())


@pytest.mark.parametrize(
    ("hardware", "runs"), [("", "W4A4"), ("sm100", "W4A4"), ("sm103", "W4A4"), ("sm120", "W4A16")]
)
def test_weight_only_experts_with_input_scales_are_promoted(
    hardware: str, runs: str, tmp_path: Path
) -> None:
    found = replay("nybble-modelopt", tmp_path, residual, hardware)
    assert found.loads
    assert named(found, EXPERTS).runs_as == runs
    assert any("promoted" in note for note in found.notes) == (runs == "W4A4")


def test_promotion_needs_the_input_scales(tmp_path: Path) -> None:
    """Named hardware promotes whatever the file holds; unnamed is taken for one that does not."""
    assert named(replay("nybble-modelopt", tmp_path), EXPERTS).runs_as == "W4A16"
    experts = named(replay("nybble-modelopt", tmp_path, None, "sm100"), EXPERTS)
    assert not experts.runs_as
    assert "input_scale" in experts.problem


def test_w4a4_becomes_weight_only_on_hopper(tmp_path: Path) -> None:
    assert named(replay("nybble-w4a4", tmp_path), EXPERTS).runs_as == "W4A4"
    assert named(replay("nybble-w4a4", tmp_path, None, "sm90"), EXPERTS).runs_as == "W4A16"


def test_spellings_are_exact(tmp_path: Path) -> None:
    lower = nested(lambda q: q["quantized_layers"].update(lm_head={"quant_algo": "fp8_pb_wo"}))
    assert replay("nybble-w4a4", tmp_path, lower).refusals == (
        "'fp8_pb_wo' is not a valid QuantAlgo",
    )
    other = nested(lambda q: q.update(quant_algo="nvfp4"))
    assert replay("modelopt-moe", tmp_path, other).refusals == ("'nvfp4' is not a valid QuantAlgo",)


def test_one_alias_is_known_for_a_whole_file(tmp_path: Path) -> None:
    alias = nested(lambda q: q.update(quant_algo="fp8_pb_wo"))
    assert replay("modelopt-dense", tmp_path, alias).refusals == ()


def test_a_map_of_layers_must_be_there(tmp_path: Path) -> None:
    found = replay("nybble-w4a4", tmp_path, nested(lambda q: q.pop("quantized_layers")))
    assert "without quantized_layers" in found.refusals[0]


def test_hf_quant_config_counts_before_config(tmp_path: Path) -> None:
    found = replay("modelopt-dense", tmp_path, nested(lambda q: q.update(quant_algo="OTHER")))
    assert found.refusals


def test_config_is_enough_without_it(tmp_path: Path) -> None:
    found = replay("nybble-w4a4", tmp_path, lambda f, c: f.files.pop("hf_quant_config.json"))
    assert found.loads
    assert named(found, EXPERTS).runs_as == "W4A4"
    assert any("older versions" in note for note in found.notes)


def test_a_bare_glob_leaves_mtp_packed(tmp_path: Path) -> None:
    """Only entries that begin with mtp. are translated; mtp* matches none of its modules."""
    found = replay("modelopt-moe", tmp_path)
    assert {b.modules[0].split(".")[0] for b in found.failing} == {"mtp"}

    def dotted(quantization: Config) -> None:
        entries = quantization["exclude_modules"]
        entries[:] = [e for e in entries if e != "mtp*"] + ["mtp.layers.0*"]

    assert replay("modelopt-moe", tmp_path, nested(dotted)).loads


def compressed(change: Callable[[Config], object]) -> Change:
    return lambda folder, config: change(config["quantization_config"])


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"group_size": 32}, "Unsupported group_size"),
        ({"num_bits": 8, "strategy": "tensor"}, "Unsupported weights_quant_strategy"),
        ({"type": "int", "strategy": "group"}, "Unsupported quant_bits"),
    ],
)
def test_groups_that_are_refused(weights: Config, reason: str, tmp_path: Path) -> None:
    def change(section: Config) -> None:
        for group in section["config_groups"].values():
            group["weights"] |= weights

    assert reason in replay("nybble-ct", tmp_path, compressed(change)).refusals[0]


def test_a_class_is_no_target_where_there_are_several_groups(tmp_path: Path) -> None:
    def change(section: Config) -> None:
        [(name, group)] = section["config_groups"].items()
        section["config_groups"]["other"] = group | {"targets": ["Linear"]}

    [refusal] = replay("nybble-ct", tmp_path, compressed(change)).refusals
    assert "matched no checkpoint module: ['Linear']" in refusal


def test_groups_run_as_declared(tmp_path: Path) -> None:
    found = replay("nybble-ct", tmp_path)
    assert found.loads
    assert {b.runs_as for b in found.built if b.builds == "nvfp4"} == {"W4A16"}
    other = replay("llmcompressor-dense", tmp_path)
    assert {b.runs_as for b in other.built if b.builds == "nvfp4"} == {"W4A4"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers of the published 35B, from its configuration pair."""
    folder = tmp_path_factory.mktemp("35b")
    source = tiny.CONFIGS / "nvidia--Qwen3.6-35B-A3B-NVFP4" / "config.json"
    config = json.loads(source.read_text("utf-8"))
    found = tiny.make_headers.checkpoint(config, "modelopt", config["quantization_config"])
    parts = tiny.make_headers.files(found, 10e9)
    beside = [str(source.with_name("hf_quant_config.json"))]
    tiny.make_headers.write(folder, parts, source, beside, "none")
    return folder


def test_the_published_35b_runs_its_experts_in_w4a4(published: Path) -> None:
    """TensorRT-LLM#15680: config.json says W4A16 of the same experts."""
    found = ENGINE.replay(Survey.open(published))
    assert found.loads
    experts = [b for b in found.built if b.name.endswith(".mlp.experts") and b.builds == "nvfp4"]
    assert len(experts) == 40
    assert {b.runs_as for b in experts} == {"W4A4"}
    fused = [b for b in found.built if b.name.endswith("in_proj_qkvz")]
    assert {(b.builds, b.runs_as) for b in fused} == {("fp8", "W8A8")}


def test_heads_that_do_not_divide_are_named() -> None:
    survey = Survey.open(CLEAN / "nybble-w4a4")
    assert ENGINE.unfit(survey, 1) == ()
    assert any("heads" in unfit.reason for unfit in ENGINE.unfit(survey, 64))
