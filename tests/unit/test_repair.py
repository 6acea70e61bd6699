"""Repair: each mend takes its fault away, changes nothing it does not show, and can be undone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from folder import Folder
from nybble.check.contents import is_divisor
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.run import run_rules
from nybble.check.survey import Survey
from nybble.checkpoint.files import LocalFiles
from nybble.errors import CheckpointError, RecipeError
from nybble.progress import Progress
from nybble.rewrite.draft import Draft
from nybble.rewrite.mend_scales import multiplier, rebased, rounding_error
from nybble.rewrite.repair import (
    FOLDER,
    Repair,
    plan_repair,
    plan_undo,
    write_repair,
    write_undo,
)

CLEAN = Path(__file__).parents[2] / "zoo" / "clean"
E4M3 = ml_dtypes.float8_e4m3fn
GATE = "model.language_model.layers.1.mlp.experts.0.gate_proj"
UP = "model.language_model.layers.1.mlp.experts.0.up_proj"


def found(rule: str, *subjects: str, severity: Severity = Severity.ERROR) -> Finding:
    """A finding of that id, as a check would report it."""
    row = Rule(rule, "x", severity, "", "", "", lambda _: (), is_repairable=True)
    return row.finding(f"{rule} fires", subjects)


def planted(
    tmp_path: Path, base: str, plant: Callable[[Folder], object] | None = None, source: str = ""
) -> Survey:
    folder = Folder.read(CLEAN / base)
    if plant:
        plant(folder)
    folder.write(tmp_path / "broken")
    return Survey.open(tmp_path / "broken", CLEAN / source if source else None)


def repaired(
    tmp_path: Path, survey: Survey, *findings: Finding, only: tuple[str, ...] = ()
) -> Repair:
    repair = plan_repair(survey, findings, only=only, version="0")
    write_repair(repair, tmp_path / "out", progress=Progress())
    return repair


def decoded(folder: Folder, module: str) -> np.ndarray:
    """The weights of an NVFP4 module, by the definition, independent of nybble."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = folder.tensors.get(f"{module}.weight", folder.tensors.get(f"{module}.weight_packed"))
    assert packed is not None
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    scales = folder.tensors[f"{module}.weight_scale"].astype(np.float64).repeat(16, axis=1)
    if f"{module}.weight_scale_2" in folder.tensors:
        top = float(folder.tensors[f"{module}.weight_scale_2"].reshape(()))
    else:
        top = 1 / float(folder.tensors[f"{module}.weight_global_scale"].reshape(()))
    return table[codes] * scales * top


def skew(module: str, factor: float) -> Callable[[Folder], None]:
    """The tensor scale of one member made larger, its block scales smaller: unequal, as if the
    members had been quantized apart."""

    def plant(folder: Folder) -> None:
        name = f"{module}.weight_scale_2"
        if name in folder.tensors:
            folder.tensors[name] *= np.float32(factor)
        else:
            folder.tensors[f"{module}.weight_global_scale"] /= np.float32(factor)
        blocks = folder.tensors[f"{module}.weight_scale"].astype(np.float32) / factor
        folder.tensors[f"{module}.weight_scale"] = np.maximum(blocks, 2.0**-9).astype(E4M3)

    return plant


@pytest.mark.parametrize("base", ["nybble-w4a4", "nybble-ct"])
@pytest.mark.parametrize("factor", [2.0, 1.37, 0.5, 9.1])
def test_unifying_moves_block_scales_and_no_code(tmp_path: Path, base: str, factor: float) -> None:
    survey = planted(tmp_path, base, skew(UP, factor))
    repair = repaired(tmp_path, survey, found("NB210"))
    before, after = Folder.read(tmp_path / "broken"), Folder.read(tmp_path / "out")
    names = {n for n in before.tensors if not same(before, after, n)}
    assert names
    assert {n.rpartition(".")[2] for n in names} <= {
        "weight_scale",
        "weight_scale_2",
        "weight_global_scale",
    }
    leaf = "weight_scale_2" if base == "nybble-w4a4" else "weight_global_scale"
    assert after.tensors[f"{GATE}.{leaf}"] == after.tensors[f"{UP}.{leaf}"]
    assert {c.name for c in repair.changes} == names
    for module in (GATE, UP):
        old, new = decoded(before, module), decoded(after, module)
        moved = np.sqrt(((new - old) ** 2).sum() / (old**2).sum())
        assert moved < 0.04  # half a step of E4M3 is 1/16 at worst, 0.02 for most
        words = [c.words for c in repair.changes if c.name == f"{module}.weight_scale"]
        for line in words:
            stated = float(re.findall(r"([\d.]+)% of their rms", line)[0]) / 100
            assert moved == pytest.approx(stated, abs=6e-5)


def same(a: Folder, b: Folder, name: str) -> bool:
    x, y = a.tensors[name], b.tensors[name]
    return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@given(
    arrays(np.uint8, 64, elements=st.integers(1, 0x7E)),
    st.floats(2.0**-6, 1.0, exclude_max=False),
)
def test_a_rebased_scale_is_the_nearest(scales: np.ndarray, ratio: float) -> None:
    new = rebased(scales, ratio).view(E4M3).astype(np.float64)
    wanted = scales.view(E4M3).astype(np.float64) * ratio
    every = np.arange(1, 0x7F, dtype=np.uint8).view(E4M3).astype(np.float64)
    nearest = np.abs(wanted[:, None] - every[None]).min(axis=1)
    # The product is rounded to float32 first: a tie may go either way.
    assert np.all(np.abs(new - wanted) <= nearest * (1 + 1e-6) + 1e-12)


def test_a_power_of_two_moves_nothing() -> None:
    rng = np.random.default_rng(1)
    scales = rng.integers(0x40, 0x7F, 128).astype(np.uint8)  # far from the subnormals
    codes = rng.integers(0, 256, 128 * 8).astype(np.uint8)
    assert rounding_error(codes, scales, rebased(scales, 0.25), 0.25) == 0.0
    assert rounding_error(codes, scales, rebased(scales, 0.3), 0.3) > 0.0


def test_zero_and_nan_scales_stay_for_their_own_rules() -> None:
    scales = np.array([0x00, 0x7F, 0xFF, 0x80, 0x38], dtype=np.uint8)
    assert rebased(scales, 0.5)[:4].tolist() == scales[:4].tolist()


@pytest.mark.parametrize("bad", [None, 0.0, np.nan, np.inf, -1.0])
def test_input_scales_of_experts_are_filled_with_head_room(
    tmp_path: Path, bad: float | None
) -> None:
    def plant(folder: Folder) -> None:
        for module in (GATE, UP):
            if bad is None:
                folder.drop(re.escape(f"{module}.input_scale"))
            else:
                folder.tensors[f"{module}.input_scale"][...] = bad

    survey = planted(tmp_path, "nybble-w4a4", plant)
    repaired(tmp_path, survey, found("NB209"), found("NB201"))
    after = Folder.read(tmp_path / "out")
    others = [
        float(after.tensors[n])
        for n in after.matching(r"layers\.1\.mlp\.experts\.[1-9].*(gate|up)_proj\.input_scale")
    ]
    assert others
    for module in (GATE, UP):
        assert float(after.tensors[f"{module}.input_scale"]) == 2 * max(others)


def test_a_fused_partner_gives_its_input_scale_exactly(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-w4a4", lambda f: f.drop(re.escape(f"{UP}.input_scale")))
    repaired(tmp_path, survey, found("NB209"))
    after = Folder.read(tmp_path / "out")
    assert after.tensors[f"{UP}.input_scale"] == after.tensors[f"{GATE}.input_scale"]


def test_without_any_input_scale_nothing_is_invented(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-w4a4", lambda f: f.drop(r"input_scale$"))
    repaired(tmp_path, survey, found("NB315"))
    after = Folder.read(tmp_path / "out")
    assert not after.matching(r"input_scale$")
    layers = after.document("config.json")["quantization_config"]["quantized_layers"]
    assert {entry["quant_algo"] for entry in layers.values()} == {"W4A16_NVFP4"}


def test_the_mtp_head_comes_back_byte_for_byte_and_is_excluded(tmp_path: Path) -> None:
    def plant(folder: Folder) -> None:
        folder.drop(r"^mtp\.")
        nested, config = folder.document("hf_quant_config.json"), folder.document("config.json")
        nested["quantization"]["exclude_modules"] = []
        config["quantization_config"]["ignore"] = []
        folder.put("hf_quant_config.json", nested)
        folder.put("config.json", config)

    survey = planted(tmp_path, "nybble-modelopt", plant, "source")
    repaired(tmp_path, survey, found("NB103"))
    source, after = Folder.read(CLEAN / "source"), Folder.read(tmp_path / "out")
    names = source.matching(r"^mtp\.")
    assert names
    assert all(same(source, after, n) for n in names)
    assert "mtp*" in after.document("config.json")["quantization_config"]["ignore"]
    assert "mtp*" in after.document("hf_quant_config.json")["quantization"]["exclude_modules"]


def test_without_the_source_a_restoring_mend_says_what_it_needs(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-modelopt", lambda f: f.drop(r"^mtp\."))
    repair = plan_repair(survey, [found("NB103", severity=Severity.ERROR)], version="0")
    assert (repair.unmended[0][0].rule.id, repair.unmended[0][1]) == ("NB103", "needs --source")


def test_the_vision_tower_comes_back(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-ct", lambda f: f.drop(r"visual\."), "source")
    repaired(tmp_path, survey, found("NB107"))
    source, after = Folder.read(CLEAN / "source"), Folder.read(tmp_path / "out")
    assert all(same(source, after, n) for n in source.matching(r"visual\."))


@pytest.mark.parametrize("base", ["nybble-modelopt", "nybble-ct", "nybble-w4a4", "nybble-dense"])
def test_a_rewritten_configuration_says_what_ours_said(tmp_path: Path, base: str) -> None:
    """The section made from the tensors equals the one that the plan made."""

    def plant(folder: Folder) -> None:
        config = folder.document("config.json")
        section = config["quantization_config"]
        section["ignore"] = [*section["ignore"], "nothing.matches.this"]
        folder.put("config.json", config)

    survey = planted(tmp_path, base, plant)
    repaired(tmp_path, survey, found("NB401"))
    clean, after = Folder.read(CLEAN / base), Folder.read(tmp_path / "out")
    mine, theirs = (f.document("config.json")["quantization_config"] for f in (after, clean))
    for section in (mine, theirs):
        section.pop("producer", None)
    assert mine == theirs


def test_names_are_turned_back(tmp_path: Path) -> None:
    survey = planted(
        tmp_path,
        "nybble-modelopt",
        lambda f: f.rename(r"^model\.language_model\.", "language_model.model."),
    )
    repaired(tmp_path, survey, found("NB403"))
    clean, after = Folder.read(CLEAN / "nybble-modelopt"), Folder.read(tmp_path / "out")
    assert clean.tensors.keys() == after.tensors.keys()
    assert all(same(clean, after, n) for n in clean.tensors)


def test_a_negative_scale_gives_its_sign_to_the_codes(tmp_path: Path) -> None:
    def plant(folder: Folder) -> None:
        blocks = folder.tensors[f"{UP}.weight_scale"].view(np.uint8)
        blocks[3, 1] |= 0x80
        codes = folder.tensors[f"{UP}.weight"]
        codes[3, 8:16] ^= 0x88

    survey = planted(tmp_path, "nybble-w4a4", plant)
    repaired(tmp_path, survey, found("NB206"))
    clean, after = Folder.read(CLEAN / "nybble-w4a4"), Folder.read(tmp_path / "out")
    assert all(same(clean, after, n) for n in clean.tensors)


@pytest.mark.parametrize("base", ["nybble-w4a4", "nybble-ct"])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_dead_tensor_gets_scale_one(tmp_path: Path, base: str, bad: float) -> None:
    codes = "weight" if base == "nybble-w4a4" else "weight_packed"
    leaf = "weight_scale_2" if base == "nybble-w4a4" else "weight_global_scale"

    def plant(folder: Folder) -> None:
        folder.tensors[f"{UP}.{codes}"][...] = 0x80
        folder.tensors[f"{UP}.{leaf}"][...] = bad

    survey = planted(tmp_path, base, plant)
    repaired(tmp_path, survey, found("NB201"))
    assert Folder.read(tmp_path / "out").tensors[f"{UP}.{leaf}"] == 1.0


def test_a_live_tensor_without_a_scale_is_left(tmp_path: Path) -> None:
    def plant(folder: Folder) -> None:
        folder.tensors[f"{UP}.weight_scale_2"][...] = 0

    survey = planted(tmp_path, "nybble-w4a4", plant)
    assert plan_repair(survey, [found("NB201")], version="0").changes == []


def test_reciprocals_are_turned_back(tmp_path: Path) -> None:
    names: list[str] = []

    def plant(folder: Folder) -> None:
        names.extend(folder.matching(r"weight_scale_2$"))
        for name in names:
            folder.tensors[name] = (1 / folder.tensors[name]).astype(np.float32)

    survey = planted(tmp_path, "nybble-w4a4", plant)
    repaired(tmp_path, survey, found("NB212", *names))
    clean, after = Folder.read(CLEAN / "nybble-w4a4"), Folder.read(tmp_path / "out")
    assert all(same(clean, after, n) for n in clean.tensors)


def test_tokenizer_template_and_generation_config_come_from_the_source(tmp_path: Path) -> None:
    def plant(folder: Folder) -> None:
        del folder.files["tokenizer.json"], folder.files["generation_config.json"]
        folder.files["chat_template.jinja"] = b"{{ 1 / 0 }}"

    survey = planted(tmp_path, "nybble-modelopt", plant, "source")
    repair = repaired(tmp_path, survey, found("NB504"), found("NB508"), found("NB515"))
    source, after = Folder.read(CLEAN / "source"), Folder.read(tmp_path / "out")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert after.files[name] == source.files[name]
    assert {c.name for c in repair.changes} == {
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    }


def test_code_hooks_and_pickles_stay_behind(tmp_path: Path) -> None:
    def plant(folder: Folder) -> None:
        config = folder.document("config.json")
        config["auto_map"] = {"AutoModel": "modeling.Evil"}
        folder.put("config.json", config)
        folder.files["modeling.py"] = b"raise SystemExit"
        folder.files["pytorch_model.bin"] = b"pickle"

    survey = planted(tmp_path, "nybble-modelopt", plant)
    repaired(tmp_path, survey, found("NB501"), found("NB011"))
    after = Folder.read(tmp_path / "out")
    assert "auto_map" not in after.document("config.json")
    assert "modeling.py" not in after.files
    assert "pytorch_model.bin" not in after.files


def test_orphans_stay_behind_and_the_index_is_new(tmp_path: Path) -> None:
    folder = Folder.read(CLEAN / "nybble-modelopt")
    folder.write(tmp_path / "broken")
    stray = Folder({"stray.weight": np.ones((2, 2), np.float32)}, {}, {}, has_index=False)
    stray.shard_of["stray.weight"] = "stray.safetensors"
    stray.write(tmp_path / "broken")
    survey = Survey.open(tmp_path / "broken")
    repair = repaired(tmp_path, survey, found("NB005"))
    assert "stray.safetensors" in {c.name for c in repair.changes}
    assert not (tmp_path / "out" / "stray.safetensors").exists()
    assert Survey.open(tmp_path / "out").faults == ()


def test_what_is_lost_is_not_repaired_away(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-modelopt")
    shard = sorted((tmp_path / "broken").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    survey = Survey.open(tmp_path / "broken")
    repair = plan_repair(survey, [found("NB012")], version="0")
    with pytest.raises(CheckpointError, match="cut off or absent"):
        write_repair(repair, tmp_path / "out", progress=Progress())
    assert not (tmp_path / "out").exists()


def plant_all(folder: Folder) -> None:
    """Changed, added, dropped and renamed tensors, changed and added files."""
    skew(UP, 1.7)(folder)
    folder.drop(r"layers\.0\.mlp\.experts\.1\.down_proj\.input_scale$")
    folder.drop(r"^mtp\.")
    folder.rename(r"^model\.language_model\.", "language_model.model.")
    del folder.files["tokenizer.json"]


ALL = ("NB403", "NB210", "NB209", "NB103", "NB504")


def test_undo_gives_back_every_tensor_and_file(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-w4a4", plant_all, "source")
    repair = repaired(tmp_path, survey, *(found(rule) for rule in ALL))
    assert {c.action for c in repair.changes} == {"changed", "added", "renamed"}
    draft, _ = plan_undo(Survey.open(tmp_path / "out"), "0")
    write_undo(draft, tmp_path / "back", progress=Progress())
    before, back = Folder.read(tmp_path / "broken"), Folder.read(tmp_path / "back")
    assert list(before.tensors) == list(back.tensors) or set(before.tensors) == set(back.tensors)
    assert all(same(before, back, n) for n in before.tensors)
    assert before.files == back.files


def test_only_what_is_shown_changes(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-w4a4", plant_all, "source")
    repair = repaired(tmp_path, survey, *(found(rule) for rule in ALL))
    before, after = Folder.read(tmp_path / "broken"), Folder.read(tmp_path / "out")
    shown = {c.name for c in repair.changes} | {c.old_name for c in repair.changes}
    for name in before.tensors.keys() | after.tensors.keys():
        if name not in shown:
            assert same(before, after, name)
    ours = {n: data for n, data in after.files.items() if not n.startswith(FOLDER)}
    for name in before.files.keys() | ours.keys():
        if name not in shown:
            assert before.files[name] == ours[name]


def test_a_repaired_folder_can_be_repaired_again(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-w4a4", skew(UP, 1.7))
    repaired(tmp_path, survey, found("NB210"))
    again = plan_repair(Survey.open(tmp_path / "out"), [found("NB210")], version="0")
    assert again.changes == []


def test_notes_are_mended_only_when_named(tmp_path: Path) -> None:
    def plant(folder: Folder) -> None:
        for module in (GATE, UP):
            name = module.replace(".0.", ".0.") + ".input_scale"
            folder.tensors[name] = np.float32(0.01).reshape(())

    survey = planted(tmp_path, "nybble-modelopt", plant)
    note = found("NB314", severity=Severity.NOTE)
    assert plan_repair(survey, [note], version="0").changes == []
    named = plan_repair(survey, [note], only=("NB314",), version="0")
    assert {c.name for c in named.changes} == {f"{GATE}.input_scale", f"{UP}.input_scale"}


def test_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no rule"):
        plan_repair(planted(tmp_path, "nybble-dense"), [], only=("NB999",), version="0")


def test_undo_needs_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no repair of ours"):
        plan_undo(planted(tmp_path, "nybble-dense"), "0")


def test_a_draft_without_changes_is_the_checkpoint(tmp_path: Path) -> None:
    draft = Draft(Survey(LocalFiles(CLEAN / "nybble-ct")), "0")
    write_repair(Repair(draft, draft.changes), tmp_path / "out", progress=Progress())
    clean, after = Folder.read(CLEAN / "nybble-ct"), Folder.read(tmp_path / "out")
    assert all(same(clean, after, n) for n in clean.tensors)
    assert clean.files == {n: d for n, d in after.files.items() if not n.startswith(FOLDER)}


def test_a_divisor_of_zero_is_infinite() -> None:
    survey = Survey.open(CLEAN / "nybble-ct")
    info = next(i for i in survey.tensors.values() if is_divisor(i))
    assert multiplier(info, np.zeros(1, np.float32)) == float("inf")


def test_a_scale_that_no_rounding_can_follow_is_left(tmp_path: Path) -> None:
    """2^24 times its partner's: one of the two is wrong, and unifying would ruin the weights."""

    def plant(folder: Folder) -> None:
        folder.tensors[f"{GATE}.weight_scale_2"] /= np.float32(2**24)

    repair = plan_repair(planted(tmp_path, "nybble-w4a4", plant), [found("NB210")], version="0")
    assert repair.changes == []
    assert "one of the tensor scales is wrong" in repair.unmended[0][1]


def test_a_source_decides_which_scale_is_wrong(tmp_path: Path) -> None:
    """Not the largest: the one that the weights do not ask for gets its partner's, exactly."""

    def plant(folder: Folder) -> None:
        folder.tensors[f"{UP}.weight_scale_2"] *= np.float32(3)

    survey = planted(tmp_path, "nybble-w4a4", plant, "source")
    repaired(tmp_path, survey, found("NB120"), found("NB210"))
    clean, after = Folder.read(CLEAN / "nybble-w4a4"), Folder.read(tmp_path / "out")
    assert all(same(clean, after, n) for n in clean.tensors)


def test_another_model_is_no_source(tmp_path: Path) -> None:
    survey = planted(tmp_path, "nybble-dense", source="source")
    with pytest.raises(CheckpointError, match="is not the source"):
        plan_repair(survey, [found("NB101")], version="0")


def test_a_fine_tune_is_not_mixed_with_its_base(tmp_path: Path) -> None:
    def plant(folder: Folder) -> None:
        for name, values in folder.tensors.items():
            if values.dtype == ml_dtypes.bfloat16:
                folder.tensors[name] = (values.astype(np.float32) * 1.05).astype(values.dtype)

    survey = planted(tmp_path, "nybble-modelopt", plant, "source")
    (finding,) = [f for f in run_rules(survey).findings if f.rule.id == "NB113"]
    repair = plan_repair(survey, [finding], version="0")
    assert repair.changes == []
    assert "fine-tune" in repair.unmended[0][1]


def test_pickles_that_are_the_only_weights_are_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_bytes(
        Folder.read(CLEAN / "source-dense").files["config.json"]
    )
    (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"weights")
    survey = Survey.open(tmp_path / "p", CLEAN / "source-dense")
    repair = plan_repair(survey, [found("NB011"), found("NB110")], version="0")
    assert "pytorch_model.bin" not in {c.name for c in repair.changes}
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        write_repair(repair, tmp_path / "out", progress=Progress())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"changes": [1]},
        {"files": []},
        {"files": {"a": 3}},
        {"files": {"a": "!!!"}},
        {"order": []},
        {"tensors": {}},
        {"schema": "x"},
        {"changes": None},
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(tmp_path: Path, change: dict) -> None:  # type: ignore[type-arg]
    survey = planted(tmp_path, "nybble-w4a4", skew(UP, 1.7))
    repaired(tmp_path, survey, found("NB210"))
    manifest = tmp_path / "out" / FOLDER / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(CheckpointError, match="manifest"):
        plan_undo(Survey.open(tmp_path / "out"), "0")


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = planted(tmp_path, "nybble-w4a4", skew(UP, 1.7))
    repair = plan_repair(survey, [found("NB210")], version="0")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Draft, "pieces", stop)
    with pytest.raises(KeyboardInterrupt):
        write_repair(repair, tmp_path / "out", progress=Progress())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]
