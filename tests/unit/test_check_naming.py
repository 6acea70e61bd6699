"""Rules on names: in the tensors, in lists, and as engines match the one with the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from folder import Folder
from nybble.check import naming
from nybble.check.naming_entries import representatives
from nybble.check.rule import Finding, Severity
from nybble.check.survey import Survey

CLEAN = Path(__file__).resolve().parents[2] / "zoo" / "clean"
HUB = "model.language_model."
LAYER = f"{HUB}layers.1"


def look(folder: Path, rule: str) -> list[Finding]:
    survey = Survey.open(folder)
    return [f for r in naming.RULES if r.id == rule for f in r.look(survey)]


def planted(path: Path, base: str, change: Callable[[Folder], object]) -> Path:
    """A clean folder of the zoo with one change."""
    folder = Folder.read(CLEAN / base)
    change(folder)
    folder.write(path)
    return path


def ignoring(path: Path, base: str, *entries: str, without: str = "\0") -> Path:
    """A clean folder with more exclusions, and without those that contain a word."""

    def change(folder: Folder) -> None:
        for file, key in (("config.json", "ignore"), ("hf_quant_config.json", "exclude_modules")):
            if file in folder.files:
                document = folder.document(file)
                said = document["quantization_config" if key == "ignore" else "quantization"]
                said[key] = [e for e in said[key] if without not in e] + list(entries)
                folder.put(file, document)

    return planted(path, base, change)


def configured(path: Path, base: str, change: Callable[[dict[str, Any]], object]) -> Path:
    def plant(folder: Folder) -> None:
        config = folder.document("config.json")
        change(config)
        folder.put("config.json", config)

    return planted(path, base, plant)


# ------------------------------------------------------------------------------------- no evidence


def test_nothing_is_found_in_a_folder_without_tensors(tmp_path: Path) -> None:
    config = json.loads((CLEAN / "nybble-ct" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    survey = Survey.open(tmp_path)
    assert [f for r in naming.RULES for f in r.look(survey)] == []


@pytest.mark.parametrize("base", sorted(p.name for p in CLEAN.iterdir() if p.is_dir()))
def test_clean_folders_have_no_finding_above_a_note(base: str) -> None:
    survey = Survey.open(CLEAN / base)
    assert {f.severity for r in naming.RULES for f in r.look(survey)} <= {Severity.NOTE}


def test_of_the_experts_of_a_layer_one_is_looked_at() -> None:
    names = [m.name for m in representatives(Survey.open(CLEAN / "nybble-modelopt"))]
    experts = [n for n in names if n.startswith(f"{LAYER}.mlp.experts.")]
    assert sorted(n.rpartition(".")[2] for n in experts) == ["down_proj", "gate_proj", "up_proj"]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------------------------ NB401


@pytest.mark.parametrize(
    ("base", "entry", "severity"),
    [
        ("modelopt-moe", f"{HUB}layers.7.mlp.gate", Severity.WARNING),
        ("modelopt-moe", "model.audio_tower*", Severity.NOTE),
        ("modelopt-moe", "*.indexer.*", Severity.NOTE),
        ("modelopt-moe", f"{LAYER}.self_attn*", None),
        ("modelopt-moe", "*.mlp.shared_expert.*", None),
        ("modelopt-moe", f"{LAYER}.self_attn", None),  # a container
        ("llmcompressor-moe", f"{HUB}layers.7.mlp.gate", Severity.WARNING),
        ("llmcompressor-moe", "re:.*audio_tower.*", Severity.NOTE),
        ("llmcompressor-moe", "re:.*experts\\.1\\.up_proj", None),
        ("llmcompressor-moe", "Conv2d", None),  # a class
        ("llmcompressor-moe", f"{HUB}layers.0.linear_attn", None),  # holds A_log itself
        ("llmcompressor-moe", f"{LAYER}.self_attn", Severity.NOTE),  # nothing of its own
    ],
)
def test_an_idle_exclusion(
    tmp_path: Path, base: str, entry: str, severity: Severity | None
) -> None:
    findings = look(ignoring(tmp_path / "m", base, entry), "NB401")
    assert [f.severity for f in findings] == ([] if severity is None else [severity])
    assert all(f.subjects == (entry,) for f in findings)


def test_a_tied_head_may_be_excluded(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        folder.drop(r"^lm_head\.")
        config = folder.document("config.json")
        folder.put("config.json", config | {"tie_word_embeddings": True})

    assert look(planted(tmp_path / "m", "modelopt-dense", change), "NB401") == []


# ------------------------------------------------------------------------------------------ NB402


@pytest.mark.parametrize(
    ("entry", "taken"),
    [
        ("model.layers.0.mlp.gate", {"gate_proj", "up_proj"}),  # in gate_up_proj, which holds both
        ("model.layers.0.mlp.gate*", {"up_proj"}),  # gate_proj it names, as a glob
        ("model.layers.1.self_attn.q", {"q_proj", "k_proj", "v_proj"}),  # in q_proj and qkv_proj
        ("layers.0.mlp.down_proj", {"down_proj"}),
        ("model.layers.1.mlp.*", set()),
        ("lm_head", set()),
    ],
)
def test_vllm_looks_for_substrings(tmp_path: Path, entry: str, taken: set[str]) -> None:
    findings = look(ignoring(tmp_path / "m", "modelopt-dense", entry), "NB402")
    assert {s.rpartition(".")[2] for f in findings for s in f.subjects} == taken
    assert {f.engine for f in findings} <= {"vllm"}


# ------------------------------------------------------------------------------------ NB403, NB404


@pytest.mark.parametrize("prefix", ["language_model.model.", f"{HUB}model.language_model."])
def test_a_prefix_is_named_that_loaders_do_not_know(tmp_path: Path, prefix: str) -> None:
    folder = planted(
        tmp_path / "m", "nybble-modelopt", lambda f: f.rename(r"^model\.language_model\.", prefix)
    )
    (finding,) = look(folder, "NB403")
    assert finding.severity == Severity.ERROR
    assert prefix.startswith(str(finding.facts["prefix"]))
    assert look(folder, "NB404") == []


def test_other_families_may_begin_with_language_model(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        folder.rename(r"^model\.", "language_model.model.")
        config = folder.document("config.json")
        folder.put("config.json", config | {"model_type": "some_wrapper"})

    assert look(planted(tmp_path / "m", "modelopt-dense", change), "NB403") == []


def test_two_known_prefixes_in_one_model_are_one_too_many(tmp_path: Path) -> None:
    folder = planted(
        tmp_path / "m",
        "nybble-modelopt",
        lambda f: f.rename(r"^model\.language_model\.layers\.1\.", "model.layers.1."),
    )
    (finding,) = look(folder, "NB404")
    assert all(s.startswith("model.layers.1.") for s in finding.subjects)
    assert set(finding.facts["prefixes"]) == {HUB, "model."}  # type: ignore[call-overload]


# ------------------------------------------------------------------------------------------ NB405


def test_the_right_spelling_is_given(tmp_path: Path) -> None:
    entry = "language_model.model.layers.1.mlp.gate"
    folder = ignoring(tmp_path / "m", "modelopt-moe", entry, without=f"{LAYER}.mlp.gate")
    (finding,) = look(folder, "NB405")
    assert finding.facts["names"] == {entry: f"{LAYER}.mlp.gate"}
    assert look(folder, "NB401") == []


def test_globs_are_rewritten_by_their_beginning(tmp_path: Path) -> None:
    folder = ignoring(tmp_path / "m", "modelopt-moe", "visual*", without="visual")
    (finding,) = look(folder, "NB405")
    assert finding.facts["names"] == {"visual*": "model.visual*"}


# ------------------------------------------------------------------------------------------ NB406


def test_packed_stacks_of_experts_are_named(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        folder.drop(r"layers\.1\.mlp\.experts\.")
        stack = np.zeros((2, 64, 32), np.uint8)
        folder.tensors[f"{LAYER}.mlp.experts.down_proj"] = stack

    findings = look(planted(tmp_path / "m", "nybble-modelopt", change), "NB406")
    assert [f.facts["kind"] for f in findings] == ["stacked"]


def test_a_family_that_fuses_on_disk_is_left_alone(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        folder.rename(r"self_attn\.q_proj\.", "self_attn.qkv_proj.")
        config = folder.document("config.json")
        folder.put("config.json", config | {"model_type": "phi3"})

    assert look(planted(tmp_path / "m", "modelopt-dense", change), "NB406") == []


# ------------------------------------------------------------------------------------------ NB407


@pytest.mark.parametrize(
    ("pattern", "is_lost"),
    [
        (r"re:.*linear_attn\.in_proj_a$", False),
        (r"re:^model\.language_model\.layers\.\d+\.linear_attn\.in_proj_a$", True),
        (r"re:model\.language_model\..*in_proj_a$", True),
        (r"re:(model\.)?language_model\..*in_proj_a$", False),
    ],
)
def test_patterns_are_matched_on_vllms_path_too(
    tmp_path: Path, pattern: str, is_lost: bool
) -> None:
    folder = ignoring(tmp_path / "m", "nybble-ct", pattern, without="in_proj_a")
    assert bool(look(folder, "NB407")) is is_lost


def test_an_anchored_head_is_lost(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["targets"] = [t.replace("re:.*lm_head", "re:^lm_head") for t in group["targets"]]

    (finding,) = look(configured(tmp_path / "m", "nybble-ct", change), "NB407")
    assert finding.subjects == ("lm_head",)
    assert "'language_model.lm_head'" in finding.message


def test_a_pattern_that_does_not_compile_is_named(tmp_path: Path) -> None:
    (finding,) = look(ignoring(tmp_path / "m", "nybble-ct", "re:(mtp"), "NB407")
    assert finding.subjects == ("re:(mtp",)


# ------------------------------------------------------------------------------------ NB408, NB409


def fp8_block(dialect: str) -> Callable[[Folder], None]:
    """One projection in block FP8, with the scales of the layout, or of another."""

    def change(folder: Folder) -> None:
        at = "model.layers.0.self_attn.o_proj"
        weight = np.zeros((64, 64), ml_dtypes.float8_e4m3fn)
        folder.drop(r"layers\.0\.self_attn\.o_proj\.")
        folder.tensors[f"{at}.weight"] = weight
        leaf, shape = {
            "modelopt": ("weight_scale", (1, 1, 1, 1)),
            "compressed-tensors": ("weight_scale", (1, 1)),
            "fp8": ("weight_scale_inv", (1, 1)),
        }[dialect]
        folder.tensors[f"{at}.{leaf}"] = np.ones(shape, np.float32)
        config = folder.document("config.json")
        group = {
            "targets": ["re:.*layers.0.self_attn.o_proj$"],
            "format": "float-quantized",
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "block",
                "block_structure": [128, 128],
            },
            "input_activations": None,
        }
        groups = config["quantization_config"]["config_groups"]
        config["quantization_config"]["config_groups"] = {"group_9": group, **groups}
        folder.put("config.json", config)

    return change


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("compressed-tensors", ""),
        ("modelopt", "expected a weight_scale of two dimensions"),
        ("fp8", "found weight_scale_inv"),
    ],
)
def test_block_scales_are_spelled_as_the_layout_does(
    tmp_path: Path, spelled: str, expected: str
) -> None:
    folder = planted(tmp_path / "m", "llmcompressor-dense", fp8_block(spelled))
    findings = look(folder, "NB408")
    assert len(findings) == bool(expected)
    assert all(expected in f.message for f in findings)


def test_both_layouts_without_a_section_are_told_apart_by_number(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        at = "model.layers.0.mlp.down_proj"
        folder.tensors[f"{at}.weight_packed"] = folder.tensors.pop(f"{at}.weight")
        folder.tensors.pop(f"{at}.weight_scale_2")
        folder.tensors[f"{at}.weight_global_scale"] = np.ones(1, np.float32)
        config = folder.document("config.json")
        del config["quantization_config"]
        folder.put("config.json", config)
        del folder.files["hf_quant_config.json"]

    (finding,) = look(planted(tmp_path / "m", "modelopt-dense", change), "NB409")
    assert finding.subjects == ("model.layers.0.mlp.down_proj",)


# ------------------------------------------------------------------------------------ NB410, NB411


def test_biases_and_kv_offsets_are_known(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        for leaf in ("bias", "k_bias"):
            name = f"model.layers.0.self_attn.k_proj.{leaf}"
            folder.tensors[name] = np.zeros(32, ml_dtypes.bfloat16)

    assert look(planted(tmp_path / "m", "modelopt-dense", change), "NB410") == []


def test_a_fused_name_over_packed_parts_is_an_error(tmp_path: Path) -> None:
    entry = "model.layers.0.self_attn.qkv_proj"
    (finding,) = look(ignoring(tmp_path / "a", "llmcompressor-dense", entry), "NB411")
    assert finding.severity == Severity.ERROR
    plain = f"{HUB}layers.0.linear_attn.in_proj_qkvz"
    (finding,) = look(ignoring(tmp_path / "b", "llmcompressor-moe", plain), "NB411")
    assert finding.severity == Severity.WARNING


# ------------------------------------------------------------------------------------------ NB412


def test_a_container_with_a_star_is_fine(tmp_path: Path) -> None:
    bare = ignoring(tmp_path / "a", "modelopt-moe", "model.visual", without="visual")
    assert len(look(bare, "NB412")) == 1
    both = ignoring(tmp_path / "b", "modelopt-moe", "model.visual")
    assert look(both, "NB412") == []


def test_in_a_map_exclusions_are_not_needed(tmp_path: Path) -> None:
    folder = ignoring(tmp_path / "m", "nybble-modelopt", f"{LAYER}.self_attn")
    assert look(folder, "NB412") == []


def test_rules_are_well_formed() -> None:
    ids = [rule.id for rule in naming.RULES]
    assert len(set(ids)) == len(ids)
    for rule in naming.RULES:
        assert rule.id.startswith("NB4")
        assert rule.fix.endswith(".")
        assert all(thread.startswith("https://github.com/") for thread in rule.threads)
