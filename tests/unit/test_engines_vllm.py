"""vLLM's replay: names, matching, acceptance by version, and what silently goes wrong."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nybble.check.engines import Built, Replay, compressed, find_engine, matching, vllm
from nybble.check.engines.matching import FUSED
from nybble.check.engines.replayed import is_before, version_key
from nybble.check.survey import Survey
from nybble.errors import RecipeError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "zoo"))

from folder import Folder  # noqa: E402

CLEAN = ROOT / "zoo" / "clean"
LAYER = "model.language_model.layers"
INNER = "language_model.model.layers"

Change = Callable[[Folder, dict[str, Any]], object]


def clean(name: str) -> Folder:
    if not (CLEAN / name).is_dir():
        pytest.skip(f"zoo/clean/{name} is not there; zoo/make.py makes it")
    return Folder.read(CLEAN / name)


def replay(
    base: str, change: Change | None, tmp_path: Path, version: str = "", hardware: str = ""
) -> Replay:
    """vLLM's replay of a clean base after a change of tensors or of its quantization_config."""
    folder = clean(base)
    config = folder.document("config.json")
    if change is not None:
        change(folder, config.setdefault("quantization_config", {}))
    folder.put("config.json", config)
    folder.write(tmp_path / "c")
    return vllm.ENGINE.replay(Survey.open(tmp_path / "c"), version, hardware)


def named(found: Replay, name: str) -> Built:
    [built] = [b for b in found.built if b.name == name]
    return built


def uniform(algorithm: str, ignore: list[str] | None = None) -> Change:
    """Replace the layer map by one algorithm for everything."""

    def change(folder: Folder, said: dict[str, Any]) -> None:
        for key in ("quantized_layers", "config_groups"):
            said.pop(key, None)
        said["quant_algo"] = algorithm
        said["ignore"] = ignore or []
        folder.files.pop("hf_quant_config.json", None)

    return change


# ------------------------------------------------------------------------------- clean checkpoints


@pytest.mark.parametrize(
    ("base", "runs"),
    [
        ("source", {"BF16"}),
        ("source-dense", {"BF16"}),
        ("nybble-modelopt", {"BF16", "W4A16"}),
        ("nybble-w4a4", {"BF16", "W4A4"}),
        ("nybble-ct", {"BF16", "W4A16"}),
        ("nybble-dense", {"BF16", "W4A16"}),
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


@pytest.fixture(scope="module")
def published_35b(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """Headers of the published pair, which follow from its configuration."""
    folder = tmp_path_factory.mktemp("35b")
    source = tiny.CONFIGS / "nvidia--Qwen3.6-35B-A3B-NVFP4" / "config.json"
    config = json.loads(source.read_text("utf-8"))
    headers = tiny.make_headers
    found = headers.checkpoint(config, "modelopt", config["quantization_config"])
    beside = [str(source.with_name("hf_quant_config.json"))]
    headers.write(folder, headers.files(found, 10e9), source, beside, "none")
    return Survey.open(folder)


def test_the_published_35b_runs_w4a16_and_its_groups_say_otherwise(published_35b: Survey) -> None:
    survey = published_35b
    found = vllm.ENGINE.replay(survey)
    experts = [b for b in found.built if b.name.endswith(".mlp.experts") and "mtp" not in b.name]
    assert len(experts) == 40
    assert {(b.says, b.runs_as, b.count) for b in experts} == {("W4A16_NVFP4", "W4A16", 768)}
    assert {b.builds for b in found.built if "visual" in b.name or "mtp." in b.name} == {"bf16"}
    assert named(found, "language_model.lm_head").builds == "nvfp4"
    assert named(found, f"{INNER}.3.self_attn.qkv_proj").modules == tuple(
        f"{LAYER}.3.self_attn.{p}_proj" for p in "qkv"
    )
    assert found.loads
    said = "\n".join(survey.declaration.disagreements)
    assert "4-bit input activations" in said
    assert "KV cache: config.json says nothing" in said


def test_a_35b_is_not_quadratic(published_35b: Survey) -> None:
    assert len(published_35b.modules) > 31_000  # reading them is not the replay's
    matching._units.pop(published_35b, None)
    begin = time.process_time()
    vllm.ENGINE.replay(published_35b)
    # 0.1 s on an idle core; a quadratic search takes minutes.
    assert time.process_time() - begin < 30


# ---------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("version", "loads"), [("0.16.0", False), ("0.17", False), ("0.21", False), ("0.22", True)]
)
def test_w4a16_per_layer_came_late(version: str, loads: bool, tmp_path: Path) -> None:
    assert replay("nybble-modelopt", None, tmp_path, version).loads is loads


def test_mixed_precision_is_refused_by_name_before_0_17(tmp_path: Path) -> None:
    [refusal] = replay("nybble-w4a4", None, tmp_path, "0.16.0").refusals
    assert "found MIXED_PRECISION" in refusal


def test_an_algorithm_without_a_method_is_built_unquantized(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        name = f"{LAYER}.1.self_attn.o_proj"
        said["quantized_layers"][name] = {"quant_algo": "FP8_PB_WO"}
        shape = folder.tensors[f"{name}.weight"].shape
        folder.tensors[f"{name}.weight"] = np.zeros(shape, ml_dtypes.float8_e4m3fn)
        folder.tensors[f"{name}.weight_scale"] = np.ones((1, 1, 1, 1), np.float32)

    path = f"{INNER}.1.self_attn.o_proj"
    silent = named(replay("nybble-w4a4", change, tmp_path / "a", "0.22.1"), path)
    assert silent.is_silent
    assert "read as BF16 weights" in silent.problem
    loud = named(replay("nybble-w4a4", change, tmp_path / "b", "0.29.0"), path)
    assert not loud.is_silent
    assert "weight_scale has no parameter to go to" in loud.problem
    built = named(replay("nybble-w4a4", change, tmp_path / "c", "0.30.0"), path)
    assert (built.builds, built.runs_as) == ("fp8_block", "W8A8")


def test_nvfp4_without_activations_in_its_groups_is_weight_only(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        uniform("NVFP4", ["lm_head", "*linear_attn*", "*self_attn*", "*visual*", "mtp*"])(
            folder, said
        )
        said["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}

    path = f"{INNER}.0.mlp.experts"
    new = named(replay("nybble-modelopt", change, tmp_path / "a"), path)
    assert (new.says, new.runs_as, new.problem) == ("W4A16_NVFP4", "W4A16", "")
    old = named(replay("nybble-modelopt", change, tmp_path / "b", "0.28.0"), path)
    assert (old.runs_as, old.is_silent) == ("W4A4", True)
    assert "input_scale missing" in old.problem


def test_versions_compare_as_numbers() -> None:
    assert version_key("0.22.0") == version_key("0.22") == version_key("0.22.0rc1")
    assert is_before("0.9.2", "0.15")
    assert is_before("0.5.12", "0.5.12.post1")
    assert not is_before("", "99")


def test_a_version_newer_than_the_rules_is_said_to_be(tmp_path: Path) -> None:
    found = replay("nybble-w4a4", None, tmp_path, "99.0")
    assert found.loads
    assert found.notes == ("vllm 99.0 is newer than 0.32.0, which the rules were read of",)


def test_engines_are_found_by_name_and_version() -> None:
    engine, version = find_engine("vllm@0.31")
    assert (engine.name, version) == ("vllm", "0.31")
    assert find_engine("VLLM")[1] == ""
    for spelling, what in (("vlm", "vllm, sglang"), ("vllm@", "after @"), ("vllm@0.3", "0.15")):
        with pytest.raises(RecipeError, match=what):
            find_engine(spelling)


# -------------------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "W4A8_NVFP4_FP8", "mxfp4", ""])
def test_unknown_algorithms_are_refused(algorithm: str, tmp_path: Path) -> None:
    found = replay("nybble-modelopt", uniform(algorithm), tmp_path)
    assert "currently only supports" in found.refusals[0]
    assert found.built == ()
    assert not found.loads


def test_lower_case_is_read(tmp_path: Path) -> None:
    assert replay("nybble-modelopt", uniform("w4a16_nvfp4"), tmp_path).refusals == ()


def nested_only(section: dict[str, Any]) -> Change:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said.clear()
        document = {"producer": {"name": "modelopt"}, "quantization": section}
        folder.put("hf_quant_config.json", document)

    return change


def test_the_nested_form_alone_needs_all_its_fields(tmp_path: Path) -> None:
    section = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    [refusal] = replay("nybble-modelopt", nested_only(section), tmp_path / "a").refusals
    assert "kv_cache_quant_algo" in refusal
    section["kv_cache_quant_algo"] = None
    found = replay("nybble-modelopt", nested_only(section), tmp_path / "b")
    assert found.refusals == ()
    assert "config.json says nothing" in found.notes[0]
    section["quant_algo"] = "W4A16_NVFP4"
    [refusal] = replay("nybble-modelopt", nested_only(section), tmp_path / "c").refusals
    assert "Unknown ModelOpt quant algo" in refusal


def test_a_flat_form_without_quant_method_is_loaded_as_unquantized(tmp_path: Path) -> None:
    found = replay("nybble-modelopt", lambda f, said: said.pop("quant_method"), tmp_path)
    assert "no quant_method" in found.notes[0]
    assert not found.loads
    assert named(found, f"{INNER}.0.mlp.experts").builds == "bf16"


def test_layers_may_stand_in_the_other_file(tmp_path: Path) -> None:
    found = replay("nybble-modelopt", lambda f, said: said.pop("quantized_layers"), tmp_path / "a")
    assert found.loads
    assert "hf_quant_config.json" in found.notes[0]

    def neither(folder: Folder, said: dict[str, Any]) -> None:
        del said["quantized_layers"]
        del folder.files["hf_quant_config.json"]

    assert "non-empty" in replay("nybble-modelopt", neither, tmp_path / "b").refusals[0]


def test_hardware_decides_what_runs(tmp_path: Path) -> None:
    path = f"{INNER}.0.mlp.experts"
    for hardware, runs in (("", "W4A4"), ("sm100", "W4A4"), ("sm90", "W4A16"), ("sm121", "W4A4")):
        found = replay("nybble-w4a4", None, tmp_path / f"h{hardware}", hardware=hardware)
        assert named(found, path).runs_as == runs
    [refusal] = replay("nybble-w4a4", None, tmp_path / "old", hardware="sm70").refusals
    assert "minimum capability 75, found 70" in refusal
    on_cpu = replay("nybble-w4a4", None, tmp_path / "cpu", hardware="cpu")
    assert "kernel" in named(on_cpu, path).problem
    assert not on_cpu.loads


# ------------------------------------------------------------------------------- names and matching


def naive(path: str, entries: list[str]) -> bool:
    """`is_layer_excluded`, as vLLM spells it, without fused modules."""
    if "experts" in path:
        if any(path in entry for entry in entries if "experts" in entry):
            return True
    elif path in entries:
        return True
    return any(e != path and e in path for e in entries) or any(fnmatch(path, e) for e in entries)


PARTS = st.sampled_from(["model", "layers", "0", "1", "mlp", "experts", "gate", "o_proj", "mtp"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
ENTRIES = st.lists(
    st.tuples(st.sampled_from(["", "*", "*."]), PATHS, st.sampled_from(["", "*", ".*"])).map(
        "".join
    ),
    max_size=4,
)


@given(PATHS, ENTRIES)
def test_exclusion_is_that_of_vllm(path: str, entries: list[str]) -> None:
    assert vllm.Excluded(entries).covers(path, {}) is naive(path, entries)


def test_exclusion_of_one_member_of_a_fused_linear_raises() -> None:
    excluded = vllm.Excluded(["m.q_proj", "m.k_proj", "m.v_proj", "n.q_proj"])
    assert excluded.covers("m.qkv_proj", FUSED)
    with pytest.raises(ValueError, match="some but not all"):
        excluded.covers("n.qkv_proj", FUSED)


def test_a_short_entry_excludes_every_path_that_contains_it(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"].append("experts")

    found = named(replay("nybble-w4a4", change, tmp_path), f"{INNER}.0.mlp.experts")
    assert found.builds == "bf16"
    assert "the shapes of weight differ" in found.problem


def test_members_of_a_fused_linear_must_agree(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["quantized_layers"] |= {
            f"{LAYER}.1.self_attn.q_proj": {"quant_algo": "FP8"},
            f"{LAYER}.1.self_attn.k_proj": {"quant_algo": "NVFP4"},
        }

    built = named(replay("nybble-w4a4", change, tmp_path), f"{INNER}.1.self_attn.qkv_proj")
    assert "Mixed quant_algo within fused layer" in built.problem
    assert not built.is_silent
    assert built.runs_as == ""


def test_experts_that_nothing_lists_take_after_their_siblings(tmp_path: Path) -> None:
    """BF16 experts beside a quantized shared expert are built as quantized, since 0.23."""

    def change(folder: Folder, said: dict[str, Any]) -> None:
        layers = said["quantized_layers"]
        del layers[f"{LAYER}.0.mlp.experts"]
        layers[f"{LAYER}.0.mlp.shared_expert.gate_proj"] = {"quant_algo": "NVFP4"}
        layers[f"{LAYER}.0.mlp.shared_expert.up_proj"] = {"quant_algo": "NVFP4"}

    path = f"{INNER}.0.mlp.experts"
    assert named(replay("nybble-w4a4", change, tmp_path / "a"), path).says == "NVFP4"
    old = named(replay("nybble-w4a4", change, tmp_path / "b", "0.22.1"), path)
    assert old.says == "unquantized"


def test_the_router_is_quantized_in_qwen3_moe_unless_excluded(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "c", "qwen3_moe")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    built = named(vllm.ENGINE.replay(Survey.open(folder)), "model.layers.0.mlp.gate")
    assert built.builds == "nvfp4"
    assert "the shapes of weight differ" in built.problem


def test_block_fp8_of_qwen_and_deepseek_leaves_the_head_alone(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said |= {"quant_method": "fp8", "activation_scheme": "dynamic"}
        said |= {"weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.0.mlp"]}
        for name in folder.matching(r"proj\.weight$"):
            weight = folder.tensors[name].astype(ml_dtypes.float8_e4m3fn)
            folder.tensors[name] = weight
            blocks = tuple(-(-n // 128) for n in weight.shape)
            folder.tensors[f"{name}_scale_inv"] = np.ones(blocks, np.float32)

    found = replay("source-dense", change, tmp_path)
    assert [b.problem for b in found.built if b.problem] == []
    assert named(found, "lm_head").builds == "bf16"
    assert named(found, "model.layers.1.self_attn.qkv_proj").builds == "fp8_block"


def test_an_unknown_model_is_said_to_be_one(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "c", "llama")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "novel"}), "utf-8")
    found = vllm.ENGINE.replay(Survey.open(folder))
    assert "'novel' is not known here" in found.notes[0]
    assert any(b.name == "model.layers.0.self_attn.qkv_proj" for b in found.built)


# ---------------------------------------------------------------------------------------- the draft


def test_only_fc_of_the_draft_is_forced_unquantized(tmp_path: Path) -> None:
    everything_else = [
        "lm_head",
        "*linear_attn*",
        "*self_attn*",
        "*visual*",
        "*.mlp.shared_expert*",
    ]
    found = replay("nybble-w4a4", uniform("NVFP4", everything_else), tmp_path / "a")
    assert named(found, "mtp.fc").builds == "bf16"
    draft = named(found, "mtp.layers.0.mlp.experts")
    assert "3-D bf16 experts do not fit" in draft.problem or "shapes" in draft.problem
    assert not draft.is_silent
    old = replay("nybble-w4a4", uniform("NVFP4", everything_else), tmp_path / "b", "0.19.1")
    assert named(old, "mtp.fc").builds == "nvfp4"


def test_a_draft_that_ignore_forgets_does_not_load(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"] = [e for e in said["ignore"] if "mtp" not in e]
        said["config_groups"]["group_0"]["targets"].append("Linear")

    found = replay("nybble-ct", change, tmp_path)
    assert named(found, "mtp.fc").builds == "nvfp4"
    assert not found.loads


# ------------------------------------------------------------------------------------------ tensors


def drop(pattern: str) -> Change:
    return lambda folder, said: folder.drop(pattern)


def test_a_missing_input_scale_is_silent(tmp_path: Path) -> None:
    change = drop(r"layers\.0\.mlp\.experts\.\d+\.down_proj\.input_scale$")
    found = replay("nybble-w4a4", change, tmp_path)
    built = named(found, f"{INNER}.0.mlp.experts")
    assert built.is_silent
    assert "modules like" in built.problem
    assert "input_scale missing" in built.problem
    assert found.loads
    assert found.silent == (built,)


def test_a_missing_weight_scale_is_noticed_in_linears_alone(tmp_path: Path) -> None:
    change = drop(r"(shared_expert\.up_proj|experts\.1\.up_proj)\.weight_scale$")
    found = replay("nybble-modelopt", change, tmp_path / "a")
    assert (
        "notices and refuses" in named(found, f"{INNER}.0.mlp.shared_expert.gate_up_proj").problem
    )
    assert named(found, f"{INNER}.0.mlp.experts").is_silent
    old = replay("nybble-modelopt", change, tmp_path / "b", "0.29.0")
    assert named(old, f"{INNER}.0.mlp.shared_expert.gate_up_proj").is_silent


def test_bf16_where_fp8_is_declared_is_silent(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["quantized_layers"][f"{LAYER}.1.self_attn.o_proj"] = {"quant_algo": "FP8"}

    built = named(replay("nybble-w4a4", change, tmp_path), f"{INNER}.1.self_attn.o_proj")
    assert (built.says, built.holds, built.builds) == ("FP8", "bf16", "fp8")
    assert built.is_silent


def test_an_absent_partner_leaves_rows_unfilled(tmp_path: Path) -> None:
    found = replay("nybble-w4a4", drop(r"layers\.1\.self_attn\.k_proj\."), tmp_path)
    built = named(found, f"{INNER}.1.self_attn.qkv_proj")
    assert "k_proj missing" in built.problem
    assert built.is_silent


def test_a_quantized_router_has_no_parameters(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        name = f"{LAYER}.0.mlp.gate"
        folder.tensors[f"{name}.weight_scale"] = np.ones((), np.float32)
        weight = folder.tensors[f"{name}.weight"]
        folder.tensors[f"{name}.weight"] = weight.astype(ml_dtypes.float8_e4m3fn)

    built = named(replay("nybble-w4a4", change, tmp_path), f"{INNER}.0.mlp.gate")
    assert built.problem.startswith("weight_scale has no parameter to go to")


# ------------------------------------------------------------------------------- compressed-tensors


def test_a_plain_entry_is_one_module_and_a_pattern_sees_inner_names(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"] += [f"{LAYER}.0.mlp.shared_expert", r"re:^model\.language_model.*experts.*"]

    found = replay("nybble-ct", change, tmp_path / "a")
    assert found.loads
    assert named(found, f"{INNER}.0.mlp.shared_expert.down_proj").builds == "nvfp4"

    def inner(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"].append(r"re:^language_model\.model.*experts.*")

    assert (
        named(replay("nybble-ct", inner, tmp_path / "b"), f"{INNER}.0.mlp.experts").builds == "bf16"
    )


def test_engines_look_at_the_first_expert_alone(tmp_path: Path) -> None:
    def second(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"].append(r"re:.*layers\.0\.mlp\.experts\.1\..*")

    def half(folder: Folder, said: dict[str, Any]) -> None:
        said["ignore"].append(r"re:.*layers\.0\.mlp\.experts\.0\.up_proj")

    path = f"{INNER}.0.mlp.experts"
    assert named(replay("nybble-ct", second, tmp_path / "a"), path).builds == "nvfp4"
    assert "All MoE projections" in named(replay("nybble-ct", half, tmp_path / "b"), path).problem


def test_a_class_name_never_means_the_head(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["config_groups"]["group_0"]["targets"] = ["Linear"]

    found = replay("nybble-ct", change, tmp_path)
    assert named(found, "language_model.lm_head").builds == "bf16"
    assert named(found, f"{INNER}.0.mlp.experts").builds == "nvfp4"


def test_a_leftover_activation_scale_is_refused_by_weight_only_linears(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        for name in folder.matching(r"down_proj\.weight_global_scale$"):
            scale = name.replace("weight_global_scale", "input_global_scale")
            folder.tensors[scale] = np.ones(1, np.float32)

    found = replay("nybble-ct", change, tmp_path)
    problem = named(found, f"{INNER}.0.mlp.shared_expert.down_proj").problem
    assert problem.startswith("input_global_scale has no parameter")
    assert named(found, f"{INNER}.0.mlp.experts").problem == ""


def test_an_unknown_field_of_a_group_is_refused(tmp_path: Path) -> None:
    def change(folder: Folder, said: dict[str, Any]) -> None:
        said["config_groups"]["group_0"]["weights"]["colour"] = "red"

    [refusal] = replay("nybble-ct", change, tmp_path).refusals
    assert "'colour'" in refusal


def group(**weights: object) -> compressed.Group:
    said = {
        "config_groups": {
            "g": {"targets": ["Linear"], "weights": weights, "format": weights.pop("format")}
        }
    }
    [found], refusals = compressed.read_groups(said, compressed.VLLM)
    assert refusals == ()
    return found


def test_a_group_without_its_format_finds_no_fp8_scheme() -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    for format_, builds in (("float-quantized", "fp8_channel"), ("mixed-precision", "")):
        scheme = compressed.scheme_of(group(format=format_, **fp8), compressed.VLLM, 0, False)
        assert scheme.builds == builds
    assert "No compressed-tensors compatible scheme" in scheme.error


def test_the_first_entry_that_matches_counts() -> None:
    entries = compressed.Entries(["re:.*late", "a.late", "re:a.*"])
    assert entries.find("a.late") == 0
    assert entries.find("a.b") == 2
    assert entries.find("b") is None
    assert compressed.Entries(["re:x", "b.c"], suffixes=True).find("a.b.c") == 1


# --------------------------------------------------------------------------------- tensor parallel


def test_ranks_that_do_not_divide_are_named(published_35b: Survey, tmp_path: Path) -> None:
    assert vllm.ENGINE.unfit(published_35b, 1) == ()
    assert vllm.ENGINE.unfit(published_35b, 8) == ()
    heads, *others = vllm.ENGINE.unfit(published_35b, 3)
    assert "num_attention_heads 16 does not divide over 3" in heads.reason
    assert any("N 8192 does not divide over 3" in u.reason for u in others)
    weight_only = [u.module for u in vllm.ENGINE.unfit(published_35b, 64)]
    assert f"{LAYER}.0.mlp.experts" in weight_only  # K 512 over 64 is half a block

    clean("nybble-w4a4").write(tmp_path / "c")
    tiny_w4a4 = Survey.open(tmp_path / "c")
    experts = [u for u in vllm.ENGINE.unfit(tiny_w4a4, 2) if u.module.endswith(".mlp.experts")]
    assert len(experts) == 2
    assert "no multiple of 64" in experts[0].reason
