"""transformers' replay: which group a module gets, and what is filled at random."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.check.engines.replayed import Built, Replay
from nybble.check.engines.transformers import (
    ENGINE,
    LOST_SCALE,
    Group,
    Matching,
    experts_group,
    read_groups,
)
from nybble.check.survey import Survey

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "zoo"))

from folder import Folder  # noqa: E402

Config = dict[str, Any]
Change = Callable[[Folder, Config], object]
LINEAR = ("Linear", "Module")


def replay(base: str, tmp_path: Path, change: Change | None = None) -> Replay:
    folder = Folder.read(ROOT / "zoo" / "clean" / base)
    config = folder.document("config.json")
    if change:
        change(folder, config)
    folder.put("config.json", config)
    out = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
    folder.write(out)
    return ENGINE.replay(Survey.open(out))


def named(found: Replay, name: str) -> Built:
    [built] = [b for b in found.built if b.name == name]
    return built


def groups(*targets: list[str]) -> tuple[Group, ...]:
    four = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    said = {f"g{i}": {"targets": entries, "weights": four} for i, entries in enumerate(targets)}
    return read_groups({"format": "nvfp4-pack-quantized", "config_groups": said})


def found(path: str, *targets: list[str], ignore: tuple[str, ...] = ()) -> str:
    group = Matching(groups(*targets), ignore).find(path, LINEAR)
    return group.name if group else ""


def test_regular_expressions_count_by_alphabet_not_by_group() -> None:
    assert found("a.layers.1.mlp.up", ["re:.*mlp.*"], ["re:.*layers.*"]) == "g1"
    assert found("a.layers.1.mlp.up", ["re:.*layers.*"], ["re:.*mlp.*"]) == "g0"


def test_a_path_counts_before_patterns_and_a_class_after_them() -> None:
    assert found("a.b", ["re:a.*"], ["a.b"]) == "g1"
    assert found("a.b", ["Linear"], ["re:a.*"]) == "g1"
    assert found("a.c", ["Linear"], ["a.b"]) == "g0"


def test_the_last_of_equal_targets_counts() -> None:
    assert found("a.b", ["Linear"], ["Linear"]) == "g1"


def test_an_ignored_path_is_one_module_and_no_prefix() -> None:
    assert found("a.b", ["Linear"], ignore=("a",)) == "g0"
    assert found("a.b", ["Linear"], ignore=("a.b",)) == ""
    assert found("mtp.fc", ["Linear"], ignore=("re:^mtp",)) == ""
    assert found("a.b", ["Linear"], ignore=("Linear",)) == ""


def test_a_pattern_is_anchored_at_the_start_alone() -> None:
    assert found("a.b.c", ["re:b"]) == ""
    assert found("a.b.c", ["re:a"]) == "g0"


@given(st.permutations(["re:.*q", "re:.*a", "m.q", "Linear"]))
def test_the_order_of_distinct_targets_decides_nothing(order: list[str]) -> None:
    by_target = Matching(groups(*([t] for t in order)), ()).find("m.q", LINEAR)
    assert by_target is not None
    assert by_target.targets == ("m.q",)


def test_experts_take_the_group_that_mentions_them_else_a_plain_target() -> None:
    assert experts_group(groups(["Linear"], ["re:.*experts.*"])).name == "g1"
    assert experts_group(groups(["re:.*mlp.*"], ["Linear"])).name == "g1"
    assert experts_group(groups(["re:.*mlp.*"], ["re:x"])).name == "g0"


def test_dense_modules_run_as_declared_and_experts_lose_their_scale(tmp_path: Path) -> None:
    found = replay("nybble-ct", tmp_path)
    assert found.loads
    assert {b.problem for b in found.silent} == {LOST_SCALE}
    assert all(b.name.endswith(".experts") for b in found.silent)
    linear = named(found, "model.language_model.layers.0.mlp.shared_expert.down_proj")
    assert (linear.builds, linear.runs_as) == ("nvfp4", "W4A16")


def test_plain_experts_one_by_one_stop_the_load(tmp_path: Path) -> None:
    """As transformers 5.23.0 does: their converter expects what the group says, ignored or not."""
    import ml_dtypes
    import numpy as np

    def change(folder: Folder, config: Config) -> None:
        for codes in folder.matching(r"language_model.*mlp\.experts\.\d+\.\w+\.weight_packed$"):
            module, (n, k) = codes.removesuffix(".weight_packed"), folder.tensors[codes].shape
            shard = folder.shard_of[codes]
            folder.drop(rf"^{module}\.")
            folder.tensors[f"{module}.weight"] = np.zeros((n, 2 * k), ml_dtypes.bfloat16)
            folder.shard_of[f"{module}.weight"] = shard
        config["quantization_config"]["ignore"].append("re:.*mlp.experts.*")

    found = replay("nybble-ct", tmp_path, change)
    assert not found.loads
    assert {b.name.rpartition(".")[2] for b in found.failing} == {"experts"}


def test_mtp_is_never_built(tmp_path: Path) -> None:
    found = replay("nybble-ct", tmp_path)
    assert not [b for b in found.built if b.name.startswith("mtp")]
    assert any("mtp" in note for note in found.notes)


def test_modelopt_is_not_known(tmp_path: Path) -> None:
    found = replay("nybble-modelopt", tmp_path)
    assert not found.loads
    assert found.refusals[0].startswith("Unknown quantization type, got modelopt")


def test_no_method_is_refused(tmp_path: Path) -> None:
    found = replay("nybble-ct", tmp_path, lambda f, c: c["quantization_config"].pop("quant_method"))
    assert "no quant_method" in found.refusals[0]


def test_hf_quant_config_is_not_read(tmp_path: Path) -> None:
    found = replay("nybble-w4a4", tmp_path, lambda f, c: c.pop("quantization_config"))
    assert found.refusals == ()
    assert {b.problem for b in found.failing} == {
        "holds nvfp4 codes: the shapes of the stack differ"
    }


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    def change(folder: Folder, config: Config) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["weights"]["bits"] = 4

    assert "'bits'" in replay("nybble-ct", tmp_path, change).refusals[0]


def test_what_no_target_reaches_is_filled_at_random_without_a_word(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    found = replay(
        "llmcompressor-dense",
        tmp_path,
        lambda f, c: c["quantization_config"]["ignore"].append(name),
    )
    assert found.loads
    assert "at random" in named(found, name).problem
    assert [b.name for b in found.silent] == [name]


def test_a_class_reaches_what_the_file_holds_plain(tmp_path: Path) -> None:
    """lm_head is a Linear here, which it is not in vLLM."""
    found = replay(
        "llmcompressor-dense",
        tmp_path,
        lambda f, c: c["quantization_config"].update(ignore=[]),
    )
    assert named(found, "lm_head").problem.startswith("weight_packed is filled at random")


def test_fp8_without_its_section_is_read_as_numbers(tmp_path: Path) -> None:
    import ml_dtypes
    import numpy as np

    name = "model.layers.0.self_attn.q_proj"

    def change(folder: Folder, config: Config) -> None:
        codes = folder.tensors[f"{name}.weight"].astype(ml_dtypes.float8_e4m3fn)
        folder.tensors[f"{name}.weight"] = codes
        folder.tensors[f"{name}.weight_scale"] = np.ones((), np.float32)
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}

    found = replay("source-dense", tmp_path, change)
    assert found.loads
    assert named(found, name).is_silent


@pytest.mark.parametrize("base", ["source", "source-dense"])
def test_plain_files_have_no_problem(base: str, tmp_path: Path) -> None:
    found = replay(base, tmp_path)
    assert found.built
    assert not [b for b in found.built if b.problem or b.builds != "bf16"]
