"""SGLang's replay: names, matching, acceptance by version, and what silently goes wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nybble.check.engines import Built, Replay, find_engine, sglang
from nybble.check.engines.matching import Unit
from nybble.check.survey import Survey
from nybble.errors import RecipeError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "zoo"))

from folder import Folder  # noqa: E402

CLEAN = ROOT / "zoo" / "clean"
LAYER = "model.language_model.layers"

Change = Callable[[Folder, dict[str, Any]], object]


def replay(
    base: str, change: Change | None, tmp_path: Path, version: str = "", hardware: str = ""
) -> Replay:
    """SGLang's replay of a clean base after a change of tensors or of its configuration."""
    if not (CLEAN / base).is_dir():
        pytest.skip(f"zoo/clean/{base} is not there; zoo/make.py makes it")
    folder = Folder.read(CLEAN / base)
    config = folder.document("config.json")
    if change is not None:
        change(folder, config.setdefault("quantization_config", {}))
    folder.put("config.json", config)
    folder.write(tmp_path / "c")
    return sglang.ENGINE.replay(Survey.open(tmp_path / "c"), version, hardware)


def named(found: Replay, name: str) -> Built:
    [built] = [b for b in found.built if b.name == name]
    return built


def uniform(algorithm: str, ignore: list[str] | None) -> Change:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        for key in ("quantized_layers", "config_groups"):
            said.pop(key, None)
        said["quant_algo"], said["ignore"] = algorithm, ignore
        folder.files.pop("hf_quant_config.json", None)

    return change


# ------------------------------------------------------------------------------- clean checkpoints


@pytest.mark.parametrize(
    ("base", "runs"),
    [
        ("source", {"BF16"}),
        ("nybble-modelopt", {"BF16", "W4A16"}),
        ("nybble-w4a4", {"BF16", "W4A4"}),
        ("nybble-ct", {"BF16", "W4A16"}),
        ("modelopt-moe", {"BF16", "W4A4"}),
        ("modelopt-dense", {"BF16", "W4A16"}),
        ("llmcompressor-dense", {"BF16", "W4A4"}),
        ("llmcompressor-moe", {"BF16", "W4A16"}),
    ],
)
def test_clean_checkpoints_load_and_run_as_declared(
    base: str, runs: set[str], tmp_path: Path
) -> None:
    found = replay(base, None, tmp_path)
    assert found.refusals == ()
    assert [b.problem for b in found.built if b.problem] == []
    assert {b.runs_as for b in found.built} == runs


def headers(folder: Path, name: str) -> Survey:
    source = tiny.CONFIGS / name / "config.json"
    config = json.loads(source.read_text("utf-8"))
    made = tiny.make_headers
    found = made.checkpoint(config, "modelopt", config["quantization_config"])
    beside = [str(source.with_name("hf_quant_config.json"))]
    made.write(folder, made.files(found, 10e9), source, beside, "none")
    return Survey.open(folder)


def test_the_published_27b_keeps_its_names(tmp_path: Path) -> None:
    found = sglang.ENGINE.replay(headers(tmp_path, "nvidia--Qwen3.6-27B-NVFP4"))
    assert found.loads
    assert found.notes == ()
    built = named(found, f"{LAYER}.0.linear_attn.in_proj_qkvz")
    assert (built.says, built.builds, built.runs_as) == ("FP8", "fp8", "W8A8")
    assert named(found, f"{LAYER}.0.mlp.gate_up_proj").runs_as == "W4A16"
    assert named(found, "lm_head").runs_as == "W4A16"
    assert {b.builds for b in found.built if b.name.startswith(("mtp.", "model.visual."))} == {
        "bf16"
    }


def test_dense_models_have_no_table_of_fused_names(tmp_path: Path) -> None:
    """A layer map names gate_proj and up_proj; Llama and dense Qwen3 then look for gate_up_proj."""
    found = replay("nybble-dense", None, tmp_path)
    built = named(found, "model.layers.0.mlp.gate_up_proj")
    assert (built.says, built.holds, built.builds) == ("unquantized", "nvfp4", "bf16")
    assert not found.loads
    assert named(found, "model.layers.0.mlp.down_proj").problem == ""


# ---------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(("version", "loads"), [("0.5.14", False), ("0.5.15", True), ("", True)])
def test_mixed_precision_came_for_nemotron_first(version: str, loads: bool, tmp_path: Path) -> None:
    assert replay("nybble-modelopt", None, tmp_path, version).loads is loads


def test_mixed_precision_without_nvfp4_is_taken_for_another_method(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        for entry in said["quantized_layers"].values():
            entry["quant_algo"] = "FP8"

    [refusal] = replay("nybble-modelopt", change, tmp_path).refusals
    assert "w4afp8" in refusal


@pytest.mark.parametrize(
    ("algorithm", "before", "since"),
    [("NVFP4_AWQ", "0.5.16", "0.5.17"), ("W4A16_NVFP4", "0.5.18", "0.5.19")],
)
def test_uniform_algorithms_by_version(
    algorithm: str, before: str, since: str, tmp_path: Path
) -> None:
    change = uniform(algorithm, ["mtp*"])
    assert algorithm in replay("nybble-w4a4", change, tmp_path / "a", before).refusals[0]
    assert replay("nybble-w4a4", change, tmp_path / "b", since).refusals == ()


def test_spellings_count(tmp_path: Path) -> None:
    assert replay("nybble-w4a4", uniform("nvfp4", []), tmp_path / "a").refusals != ()
    assert replay("nybble-w4a4", uniform("NVFP4", None), tmp_path / "b").refusals != ()


def test_versions_before_the_rules_are_unknown() -> None:
    with pytest.raises(RecipeError, match=r"begin with sglang 0\.5\.9"):
        find_engine("sglang@0.5.8")


# ----------------------------------------------------------------------------------- configurations


def test_a_mixed_file_without_kv_cache_is_read_from_the_other_file(tmp_path: Path) -> None:
    def silence(folder: Folder, said: dict[str, Any]) -> None:
        said.pop("kv_cache_scheme", None)

    found = replay("nybble-modelopt", silence, tmp_path / "a")
    assert found.loads
    assert "hf_quant_config.json is read" in found.notes[0]

    def alone(folder: Folder, said: dict[str, Any]) -> None:
        silence(folder, said)
        del folder.files["hf_quant_config.json"]

    [refusal] = replay("nybble-modelopt", alone, tmp_path / "b").refusals
    assert "Cannot find the config file" in refusal


def test_the_nested_form_alone_needs_one_group_size(tmp_path: Path) -> None:
    def nested(*sizes: int) -> Change:
        def change(folder: Folder, said: dict[str, Any]) -> None:
            said.clear()
            section: dict[str, Any] = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
            section |= {"group_size": sizes[0]} if sizes else {}
            folder.put("hf_quant_config.json", {"quantization": section})
            config = folder.document("config.json")
            folder.put("config.json", config)

        return change

    def without_section(change: Change) -> Replay:
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        folder = Folder.read(CLEAN / "nybble-w4a4")
        change(folder, {})
        config = folder.document("config.json")
        del config["quantization_config"]
        folder.put("config.json", config)
        folder.write(where)
        return sglang.ENGINE.replay(Survey.open(where))

    assert "group_size" in without_section(nested()).refusals[0]
    assert without_section(nested(16)).refusals == ()


# ---------------------------------------------------------------------------------------- exclusion


def naive(path: str, entries: list[str], *, is_experts: bool) -> bool:
    """`is_layer_skipped` or `is_layer_excluded`, without fused modules."""
    whole = any(
        entry == path or path.startswith(entry + ".") or f".{entry}." in f".{path}."
        for entry in entries
    )
    if whole and not is_experts:
        return True
    for entry in entries:
        pattern = re.compile(entry.replace(".", r"\.").replace("*", ".*"))
        for each in (path, path.removeprefix("language_model.")):
            if pattern.fullmatch(each) or any(pattern.fullmatch(p) for p in each.split(".")):
                return True
    return False


PARTS = st.sampled_from(["language_model", "layers", "0", "mlp", "experts", "o_proj", "mtp"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
ENTRIES = st.lists(
    st.tuples(st.sampled_from(["", "*"]), PATHS, st.sampled_from(["", "*", ".*"])).map("".join),
    max_size=4,
)


@given(PATHS, ENTRIES, st.booleans())
def test_exclusion_is_that_of_sglang(path: str, entries: list[str], is_experts: bool) -> None:
    unit = Unit(path, "experts" if is_experts else "linear", "trunk", (), ())
    expected = naive(path, entries, is_experts=is_experts)
    assert sglang.Excluded(entries).covers(path, unit, {}) is expected


def test_no_substring_excludes(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"] = [*said["ignore"], "expert", "mlp.exp"]
        document = folder.document("hf_quant_config.json")
        document["quantization"]["exclude_modules"] = said["ignore"]
        folder.put("hf_quant_config.json", document)

    assert replay("nybble-w4a4", change, tmp_path).loads


def test_siblings_of_experts_do_not_count(tmp_path: Path) -> None:
    listed = {f"{LAYER}.0.mlp.shared_expert.up_proj": "NVFP4"}
    assert sglang.Algorithms(listed, sglang._candidates).of(f"{LAYER}.0.mlp.experts", {}) == ""
    assert (
        sglang.Algorithms(listed, sglang._candidates).of(f"{LAYER}.0.mlp.shared_expert", {})
        == "NVFP4"
    )


def test_paths_with_and_without_the_wrapper_are_one() -> None:
    algorithms = sglang.Algorithms(
        {"model.language_model.layers.0.mlp.down_proj": "FP8"}, sglang._candidates
    )
    assert algorithms.of("model.layers.0.mlp.down_proj", {}) == "FP8"
    assert algorithms.of("language_model.model.layers.0.mlp.down_proj", {}) == "FP8"


# ---------------------------------------------------------------------------------------- the draft


def test_the_draft_is_quantized_if_the_layer_map_lists_it(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        document = folder.document("hf_quant_config.json")
        for section, key in ((said, "ignore"), (document["quantization"], "exclude_modules")):
            section[key] = []
            section["quantized_layers"]["mtp.layers.0.mlp.experts"] = {"quant_algo": "NVFP4"}
        folder.put("hf_quant_config.json", document)

    path = "mtp.layers.0.mlp.experts"
    new = named(replay("nybble-w4a4", change, tmp_path / "a"), path)
    assert new.builds == "nvfp4"
    assert new.problem
    old = named(replay("nybble-w4a4", change, tmp_path / "b", "0.5.19"), path)
    assert (old.builds, old.problem) == ("bf16", "")


def test_the_draft_is_never_quantized_under_uniform_nvfp4(tmp_path: Path) -> None:
    found = replay("nybble-w4a4", uniform("NVFP4", []), tmp_path)
    assert {b.builds for b in found.built if b.name.startswith("mtp.")} == {"bf16"}


# ------------------------------------------------------------------------------------------ tensors


def test_fp8_bytes_in_an_unlisted_module_are_silent(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        name = f"{LAYER}.1.self_attn.o_proj"
        weight = folder.tensors[f"{name}.weight"]
        folder.tensors[f"{name}.weight"] = weight.astype(ml_dtypes.float8_e4m3fn)
        folder.tensors[f"{name}.weight_scale"] = np.ones((), np.float32)

    found = replay("nybble-w4a4", change, tmp_path)
    built = named(found, f"{LAYER}.1.self_attn.o_proj")
    assert built.is_silent
    assert "their scales dropped" in built.problem
    assert found.loads


def test_a_missing_input_scale_is_one(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        folder.drop(r"experts\.0\.down_proj\.input_scale$")

    built = named(replay("nybble-w4a4", change, tmp_path), f"{LAYER}.0.mlp.experts")
    assert built.is_silent
    assert "SGLang computes with 1" in built.problem


# ------------------------------------------------------------------------------- compressed-tensors


def test_a_linear_that_nothing_names_is_refused(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"] = [entry for entry in said["ignore"] if "in_proj_a" not in entry]

    built = named(replay("nybble-ct", change, tmp_path / "a"), f"{LAYER}.0.linear_attn.in_proj_ba")
    assert "shards" in built.problem

    def both(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"] = [entry for entry in said["ignore"] if "in_proj_" not in entry]

    built = named(replay("nybble-ct", both, tmp_path / "b"), f"{LAYER}.0.linear_attn.in_proj_ba")
    assert built.problem.startswith("Unable to find matching target")


def test_the_end_of_a_path_is_enough_to_ignore_it(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"].append("mlp.shared_expert.down_proj")

    built = named(replay("nybble-ct", change, tmp_path), f"{LAYER}.0.mlp.shared_expert.down_proj")
    assert built.builds == "bf16"


def test_weight_only_below_blackwell(tmp_path: Path) -> None:
    for base in ("llmcompressor-dense", "nybble-w4a4"):
        found = replay(base, None, tmp_path / base, hardware="sm90")
        assert "W4A4" not in {b.runs_as for b in found.built}
        assert "W4A16" in {b.runs_as for b in found.built}


def test_old_hardware_is_refused(tmp_path: Path) -> None:
    [refusal] = replay("nybble-w4a4", None, tmp_path, hardware="sm75").refusals
    assert "minimum capability 80, found 75" in refusal


def test_text_only_models_lose_the_wrapper(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        config = folder.document("config.json")
        config["architectures"] = ["Qwen3_5MoeForCausalLM"]
        folder.put("config.json", config)

    folder = Folder.read(CLEAN / "nybble-modelopt")
    change(folder, {})
    folder.write(tmp_path / "c")
    found = sglang.ENGINE.replay(Survey.open(tmp_path / "c"))
    assert found.loads
    assert named(found, "model.layers.0.mlp.experts").builds == "nvfp4"
