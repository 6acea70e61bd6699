"""Rules about completeness: what counts as there, what a finding lists, and what is no fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tiny
from defects import completeness as planted
from folder import Defect, Folder
from make import CLEAN, make
from nybble.check import completeness
from nybble.check.completeness_inventory import take_inventory
from nybble.check.rule import Finding, Severity
from nybble.check.survey import Survey

SOURCE = CLEAN / "source"
BY_NAME = {d.name: d for d in planted.DEFECTS}
MOE = ("nybble-modelopt", "nybble-w4a4", "nybble-ct", "modelopt-moe", "llmcompressor-moe")
DENSE = ("nybble-dense", "modelopt-dense", "llmcompressor-dense")
ALL = [*((name, "source") for name in MOE), *((name, "source-dense") for name in DENSE)]


def look(path: Path, source: Path | None = None, *, deep: bool = False) -> list[Finding]:
    survey = Survey.open(path, source, deep=deep)
    rules = [r for r in completeness.RULES if source or "source" not in r.needs]
    return [f for rule in rules for f in rule.look(survey)]


def found(path: Path, rule: str, source: Path | None = None) -> Finding:
    """The one finding of a rule."""
    (finding,) = [f for f in look(path, source) if f.rule.id == rule]
    return finding


def planted_in(tmp_path: Path, name: str) -> Path:
    return make(BY_NAME[name], tmp_path / name)


def written(tmp_path: Path, base: str, change: Callable[[Folder], object]) -> Path:
    """A changed copy of a clean base."""
    folder = Folder.read(CLEAN / base)
    change(folder)
    folder.write(tmp_path / "changed")
    return tmp_path / "changed"


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("base", "source"), ALL)
def test_sound_checkpoints_have_all_of_their_source(base: str, source: str, deep: bool) -> None:
    findings = look(CLEAN / base, CLEAN / source, deep=deep)
    # Foreign tools round what they copy, which is a warning and true.
    expected = {"NB113"} if "-moe" in base else set()
    assert {f.rule.id for f in findings} == expected
    assert all(f.severity == Severity.WARNING for f in findings)


@pytest.mark.parametrize("defect", planted.DEFECTS, ids=lambda d: d.name)
def test_planted_defects_are_found_and_not_in_their_base(defect: Defect, tmp_path: Path) -> None:
    source = CLEAN / defect.source if defect.source else None
    made = make(defect, tmp_path / "made")
    assert defect.rule in {f.rule.id for f in look(made, source, deep=defect.deep)}
    if not defect.origin.startswith("tool: "):
        before = look(CLEAN / defect.base, source, deep=defect.deep)
        # The foreign tools' own rounding apart.
        assert {f.rule.id for f in before} - {"NB113"} == set()


# ------------------------------------------------------------------------------------ the inventory


@pytest.mark.parametrize(("base", "source"), ALL)
def test_inventories_are_names_of_plain_weights(base: str, source: str) -> None:
    names = take_inventory(Survey.open(CLEAN / base)).names
    assert not any("scale" in name or "packed" in name for name in names)
    whole = take_inventory(Survey.open(CLEAN / source)).names
    stacks = {name for name in whole if name.endswith(("gate_up_proj", ".experts.down_proj"))}
    assert whole - names <= stacks
    assert all(".experts." in name for name in names - whole)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_is_complete_against_itself(family: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "model", family)
    assert look(path, path) == []


def test_stacked_and_split_experts_are_the_same_model(tmp_path: Path) -> None:
    stacked = tiny.checkpoint(tmp_path / "stacked", "qwen3_5_moe", stacked=True)
    split = tiny.checkpoint(tmp_path / "split", "qwen3_5_moe", stacked=False, mtp_stacked=False)
    assert look(split, stacked, deep=True) == []
    assert look(stacked, split, deep=True) == []


def test_prefixes_of_the_family_are_the_same_model(tmp_path: Path) -> None:
    wrapped = tiny.checkpoint(tmp_path / "wrapped", "qwen3_5")
    flat = tiny.checkpoint(tmp_path / "flat", "qwen3_5", prefix="model.")
    assert look(flat, wrapped, deep=True) == []
    assert look(wrapped, flat, deep=True) == []


def test_tensors_of_a_missing_shard_are_not_reported_again(tmp_path: Path) -> None:
    Folder.read(CLEAN / "nybble-modelopt").write(tmp_path / "made")
    (tmp_path / "made" / "model-00002-of-00002.safetensors").unlink()
    assert look(tmp_path / "made", SOURCE) == []


# ---------------------------------------------------------------------------------------- missing


def test_lost_tensors_are_listed_as_the_source_names_them(tmp_path: Path) -> None:
    made = planted_in(tmp_path, "export-lost-mtp")
    finding = found(made, "NB101", SOURCE)
    expected = sorted(n for n in Folder.read(SOURCE).tensors if n.startswith("mtp."))
    assert finding.subjects == tuple(expected)
    assert finding.facts["tensors"] == expected
    assert "19 tensors" in finding.message
    assert found(made, "NB103").facts["key"] == "text_config.mtp_num_hidden_layers"


def test_the_head_of_a_tied_model_may_be_absent(tmp_path: Path) -> None:
    def tie(folder: Folder) -> None:
        folder.drop(r"^lm_head\.")
        config = folder.document("config.json") | {"tie_word_embeddings": True}
        folder.put("config.json", config)

    findings = look(written(tmp_path, "modelopt-dense", tie), CLEAN / "source-dense")
    assert {f.rule.id for f in findings} == {"NB121"}  # the setting itself is not the source's


def test_extra_tensors_are_listed(tmp_path: Path) -> None:
    finding = found(planted_in(tmp_path, "leftover-smooth-factor"), "NB102", SOURCE)
    assert finding.severity == Severity.WARNING
    assert finding.subjects == (f"{planted.LAYER1}self_attn.q_proj.smooth_factor",)


def test_a_text_model_says_so_with_language_model_only(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        folder.drop(r"^model\.visual\.")
        folder.put("config.json", folder.document("config.json") | {"language_model_only": True})

    assert "NB107" not in {f.rule.id for f in look(written(tmp_path, "nybble-ct", change))}


def test_missing_experts_are_counted_by_layer(tmp_path: Path) -> None:
    finding = found(planted_in(tmp_path, "experts-of-a-layer-missing"), "NB109")
    assert "6 weights of experts missing in 1 layer" in finding.message
    assert len(finding.subjects) == 6


def test_unknown_families_are_asked_by_name_alone(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        folder.put(
            "config.json",
            {
                "model_type": "unheard_of",
                "num_hidden_layers": 2,
                "num_nextn_predict_layers": 1,
                "vision_config": {"depth": 1},
            },
        )

    made = written(tmp_path, "source-dense", change)
    assert {(f.rule.id, f.severity) for f in look(made)} == {
        ("NB103", Severity.WARNING),
        ("NB107", Severity.WARNING),
    }

    def with_both(folder: Folder) -> None:
        change(folder)
        for name in ("model.layers.2.eh_proj.weight", "vision_tower.proj.weight"):
            folder.tensors[name] = np.ones((4, 4), dtype=ml_dtypes.bfloat16)

    assert look(written(tmp_path, "source-dense", with_both)) == []


# ----------------------------------------------------------------------------------------- shapes


def test_shapes_are_compared_unpacked(tmp_path: Path) -> None:
    finding = found(planted_in(tmp_path, "projection-transposed"), "NB111")
    assert "expected [32, 64]" in finding.message
    assert "found [64, 32]" in finding.message
    finding = found(planted_in(tmp_path, "config-of-a-smaller-model"), "NB111")
    experts = [s for s in finding.subjects if ".experts." in s and not s.startswith("mtp.")]
    assert len(experts) == 12


def test_an_expert_beyond_the_last_contradicts(tmp_path: Path) -> None:
    finding = found(
        written(tmp_path, "nybble-w4a4", planted.in_text_config(num_experts=1)), "NB111"
    )
    split = [s for s in finding.subjects if ".experts.1." in s]
    assert len(split) == 6
    assert not [s for s in finding.subjects if ".experts.0." in s]


# ------------------------------------------------------------------------------------------ copies


def test_dtypes_that_lost_precision_are_named(tmp_path: Path) -> None:
    finding = found(planted_in(tmp_path, "state-in-bf16"), "NB113", SOURCE)
    assert finding.severity == Severity.WARNING
    assert "expected F32 [2], found BF16 [2]" in finding.message


def test_other_values_in_another_dtype_are_an_error(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        planted.lose_precision(folder)
        folder.tensors[f"{planted.LAYER0}linear_attn.A_log"] += np.float32(0.5)

    made = written(tmp_path, "nybble-modelopt", change)
    assert found(made, "NB113", SOURCE).severity == Severity.ERROR


def test_norms_rounded_around_one_are_told_from_other_values(tmp_path: Path) -> None:
    rounded = [
        f for f in look(CLEAN / "llmcompressor-moe", SOURCE) if "rounded as 1 + weight" in f.message
    ]
    assert [f.severity for f in rounded] == [Severity.WARNING]
    assert len(rounded[0].subjects) == 7
    shifted = found(planted_in(tmp_path, "norms-plus-one"), "NB113", SOURCE)
    assert shifted.severity == Severity.ERROR


def test_one_bit_is_found_by_deep_alone(tmp_path: Path) -> None:
    made = planted_in(tmp_path, "copy-with-one-flipped-bit")
    assert "NB113" not in {f.rule.id for f in look(made, SOURCE)}
    assert "NB113" in {f.rule.id for f in look(made, SOURCE, deep=True)}


def test_experts_that_stayed_plain_are_compared_with_their_stack(tmp_path: Path) -> None:
    split = tiny.checkpoint(tmp_path / "split", "qwen3_5_moe", stacked=False)
    stacked = tiny.checkpoint(tmp_path / "stacked", "qwen3_5_moe", stacked=True)
    folder = Folder.read(split)
    name = "model.language_model.layers.0.mlp.experts.2.up_proj.weight"
    folder.tensors[name] = -folder.tensors[name]
    folder.write(split)
    assert found(split, "NB113", stacked).subjects == (name,)


# ------------------------------------------------------------------------------------- quantized


def test_mtp_in_eight_bits_is_a_note(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        name = "mtp.fc.weight"
        folder.tensors[name] = folder.tensors[name].astype(ml_dtypes.float8_e4m3fn)
        folder.tensors[f"{name}_scale"] = np.array(1, dtype=np.float32)

    made = written(tmp_path, "nybble-modelopt", change)
    assert found(made, "NB105").severity == Severity.NOTE
    four = found(planted_in(tmp_path, "mtp-packed"), "NB105")
    assert four.severity == Severity.WARNING
    assert len(four.subjects) == 3


def test_lists_that_reach_mtp_are_graver_where_no_engine_helps(tmp_path: Path) -> None:
    lenient = found(planted_in(tmp_path, "mtp-layers-excluded-only"), "NB106")
    assert (lenient.severity, lenient.subjects) == (Severity.WARNING, ("mtp.fc",))
    strict = found(planted_in(tmp_path, "mtp-experts-not-ignored"), "NB106")
    assert strict.severity == Severity.ERROR
    assert "mtp.layers.0.mlp.experts" in strict.subjects


def test_half_modules_are_one_finding_per_kind(tmp_path: Path) -> None:
    finding = found(planted_in(tmp_path, "no-tensor-scales"), "NB118")
    assert len(finding.subjects) == 19  # 12 experts, 6 shared, lm_head
    assert "lacks weight_scale_2" in finding.message
    scales = found(planted_in(tmp_path, "scales-without-codes"), "NB118")
    assert "without a weight" in scales.message


def test_missing_input_scales_are_left_to_others() -> None:
    made = CLEAN.parent / "tool-made" / "modelopt-uncalibrated"
    assert "NB118" not in {f.rule.id for f in look(made)}


def test_scales_of_another_spelling_are_no_half(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        folder.tensors[name] = np.ones((128, 64), dtype=ml_dtypes.float8_e4m3fn)
        folder.tensors[name.removesuffix("weight") + "scale"] = np.ones(1, dtype=np.float32)

    made = written(tmp_path, "source-dense", change)
    assert "NB118" not in {f.rule.id for f in look(made)}


def test_what_is_declared_and_plain_as_a_whole_is_one_finding(tmp_path: Path) -> None:
    finding = found(planted_in(tmp_path, "declared-and-nothing-packed"), "NB114")
    assert "W4A16_NVFP4" in finding.message
    assert "not one is quantized" in finding.message


def test_embeddings_of_a_tower_are_no_linears_of_a_class() -> None:
    """llm-compressor declares every `Linear` and need not exclude a position embedding."""
    modules = Survey.open(CLEAN / "llmcompressor-moe").contents.by_name
    assert modules["model.visual.pos_embed"].declared is None
    assert all(module.kind.agrees for module in modules.values())
