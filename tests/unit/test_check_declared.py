"""Rules on what the configuration files declare: messages, levels and edge cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from folder import Folder
from nybble.check import declared
from nybble.check.rule import Finding, Severity
from nybble.check.survey import Survey

CLEAN = Path(__file__).resolve().parents[2] / "zoo" / "clean"
LAYER = "model.language_model.layers.1"
NVFP4 = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
FP8 = {"num_bits": 8, "type": "float", "dynamic": False}


def look(folder: Path, rule: str) -> list[Finding]:
    survey = Survey.open(folder)
    return [f for r in declared.RULES if r.id == rule for f in r.look(survey)]


def found(folder: Path) -> set[str]:
    survey = Survey.open(folder)
    return {f.rule.id for r in declared.RULES for f in r.look(survey)}


def files(path: Path, flat: dict[str, Any] | None, nested: dict[str, Any] | None = None) -> Path:
    """A folder with configuration files alone."""
    path.mkdir(exist_ok=True)
    config: dict[str, Any] = {"model_type": "unknown_to_us"}
    if flat is not None:
        config["quantization_config"] = flat
    (path / "config.json").write_text(json.dumps(config))
    if nested is not None:
        producer = nested.pop("producer", {"name": "modelopt", "version": "0.44.0"})
        document = {"producer": producer, "quantization": nested}
        (path / "hf_quant_config.json").write_text(json.dumps(document))
    return path


def modelopt(**more: object) -> dict[str, Any]:
    producer = {"name": "modelopt", "version": "0.44.0"}
    return {"quant_method": "modelopt", "producer": producer, **more}


def planted(path: Path, base: str, change: Callable[[Folder], object]) -> Path:
    """A clean folder of the zoo with one change."""
    folder = Folder.read(CLEAN / base)
    change(folder)
    folder.write(path)
    return path


def section(folder: Folder, change: Callable[[dict[str, Any]], object]) -> None:
    """Change both files' sections."""
    config = folder.document("config.json")
    change(config["quantization_config"])
    folder.put("config.json", config)
    if "hf_quant_config.json" in folder.files:
        nested = folder.document("hf_quant_config.json")
        change(nested["quantization"])
        folder.put("hf_quant_config.json", nested)


# ------------------------------------------------------------------------------------- no evidence


def test_nothing_is_found_where_nothing_is_declared(tmp_path: Path) -> None:
    assert found(files(tmp_path / "a", None)) == set()
    (tmp_path / "b").mkdir()
    assert found(tmp_path / "b") == set()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"quantization_config": []}',
        '{"quantization_config": {"quant_method": "modelopt", "quantized_layers": 3}}',
        '{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}',
        '{"quantization_config": {"quant_method": 7, "quant_algo": ["NVFP4"]}}',
        '{"quantization_config": {"quant_method": "compressed-tensors", "ignore": "lm_head"}}',
    ],
)
def test_a_broken_section_is_a_fault_and_no_crash(tmp_path: Path, text: str) -> None:
    folder = planted(tmp_path / "m", "nybble-ct", lambda f: f.files.update({"config.json": b""}))
    (folder / "config.json").write_text(text)
    survey = Survey.open(folder)
    findings = [f for r in declared.RULES for f in r.look(survey)]
    assert survey.faults or findings


# ------------------------------------------------------------------------------------ both files


def test_twins_that_say_the_same_in_their_own_words_agree(tmp_path: Path) -> None:
    flat = modelopt(
        quant_algo="NVFP4",
        ignore=["lm_head"],
        kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False},
        config_groups={"group_0": {"weights": NVFP4, "input_activations": NVFP4}},
    )
    nested = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    assert found(files(tmp_path / "m", flat, nested)) == set()


def test_every_difference_of_the_twins_is_a_finding_of_its_own(tmp_path: Path) -> None:
    flat = modelopt(quant_algo="NVFP4", ignore=["lm_head"], group_size=16)
    nested = {
        "producer": {"name": "modelopt", "version": "0.1"},
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "group_size": 32,
        "exclude_modules": ["lm_head", "head*"],
    }
    findings = look(files(tmp_path / "m", flat, nested), "NB301")
    assert {(f.facts["what"], f.severity) for f in findings} == {
        ("producer", Severity.NOTE),
        ("quant_algo", Severity.ERROR),
        ("the KV cache", Severity.WARNING),
        ("group size", Severity.ERROR),
        ("excluded", Severity.WARNING),  # no tensors tell whether it matters
    }


def test_exclusions_that_differ_for_no_module_are_a_note(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        nested = folder.document("hf_quant_config.json")
        nested["quantization"]["exclude_modules"].append("mtp.layers.0*")
        folder.put("hf_quant_config.json", nested)

    (finding,) = look(planted(tmp_path / "m", "modelopt-moe", change), "NB301")
    assert finding.severity == Severity.NOTE
    assert "no module of the files is affected" in finding.message


def test_a_map_in_one_file_alone_is_a_warning(tmp_path: Path) -> None:
    layers = {"a.b": {"quant_algo": "FP8"}}
    flat = modelopt(quant_algo="MIXED_PRECISION")
    nested = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (finding,) = look(files(tmp_path / "m", flat, nested), "NB301")
    assert finding.severity == Severity.WARNING
    assert "hf_quant_config.json lists 1 modules, config.json has no map" in finding.message


def test_groups_with_other_bits_contradict_the_map(tmp_path: Path) -> None:
    flat = modelopt(
        quant_algo="MIXED_PRECISION",
        quantized_layers={"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}},
        config_groups={
            "group_0": {"targets": ["a", "b"], "weights": FP8, "input_activations": FP8}
        },
    )
    (finding,) = look(files(tmp_path / "m", flat), "NB302")
    assert finding.subjects == ("a",)
    assert "gives target 'a', 8-bit weights; quantized_layers says NVFP4" in finding.message


def test_targets_beside_the_map_are_named(tmp_path: Path) -> None:
    flat = modelopt(
        quant_algo="MIXED_PRECISION",
        quantized_layers={"a": {"quant_algo": "FP8"}},
        config_groups={
            "group_0": {"targets": ["a", "z"], "weights": FP8, "input_activations": FP8}
        },
    )
    (finding,) = look(files(tmp_path / "m", flat), "NB302")
    assert finding.subjects == ("z",)
    assert finding.severity == Severity.WARNING


def test_an_exclusion_above_a_listed_module_counts_too(tmp_path: Path) -> None:
    layers = {"mtp.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}}
    flat = modelopt(quant_algo="MIXED_PRECISION", quantized_layers=layers, ignore=["mtp*"])
    (finding,) = look(files(tmp_path / "m", flat), "NB303")
    assert "by 'mtp*'" in finding.message
    assert finding.severity == Severity.ERROR


def test_an_exclusion_below_a_listed_container_is_no_contradiction(tmp_path: Path) -> None:
    layers = {"a.mlp": {"quant_algo": "NVFP4", "group_size": 16}}
    flat = modelopt(quant_algo="MIXED_PRECISION", quantized_layers=layers, ignore=["a.mlp.gate"])
    assert look(files(tmp_path / "m", flat), "NB303") == []


# ------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("word", "severity"),
    [
        ("NVFP4", None),
        ("FP8_PB_WO", None),
        ("fp8_pb_wo", Severity.NOTE),
        ("nvfp4", Severity.WARNING),
        ("FP8_BLOCK_SCALES", Severity.WARNING),
        ("NVFP4_AWQ", Severity.WARNING),
        ("W4A4_NVFP4", Severity.ERROR),
    ],
)
def test_a_word_is_judged_by_who_knows_it(
    tmp_path: Path, word: str, severity: Severity | None
) -> None:
    findings = look(files(tmp_path / "m", modelopt(quant_algo=word)), "NB306")
    assert [f.severity for f in findings] == ([] if severity is None else [severity])


@pytest.mark.parametrize(
    ("word", "module", "severity"),
    [
        ("FP8", "a.q_proj", None),
        ("NVFP4", "a.q_proj", None),
        ("W4A16_NVFP4", "a.q_proj", None),
        ("FP8_PB_WO", "a.q_proj", Severity.WARNING),
        ("MXFP8", "a.q_proj", Severity.WARNING),
        ("FP8_PER_CHANNEL_PER_TOKEN", "a.q_proj", Severity.WARNING),
        ("FP8_BLOCK_SCALES", "a.mlp.experts", Severity.WARNING),
        ("FP8_BLOCK_SCALES", "a.q_proj", Severity.ERROR),
        ("W4A8_AWQ", "a.q_proj", Severity.ERROR),
    ],
)
def test_what_engines_dispatch_per_layer(
    tmp_path: Path, word: str, module: str, severity: Severity | None
) -> None:
    flat = modelopt(quant_algo="MIXED_PRECISION", quantized_layers={module: {"quant_algo": word}})
    findings = look(files(tmp_path / "m", flat), "NB316")
    assert [f.severity for f in findings] == ([] if severity is None else [severity])


def test_nested_only_names_what_vllm_knows(tmp_path: Path) -> None:
    nested = {
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "exclude_modules": [],
    }
    (finding,) = look(files(tmp_path / "m", None, nested), "NB312")
    assert (finding.severity, finding.engine) == (Severity.WARNING, "vllm")
    assert "Unknown ModelOpt quant algo" in finding.message


def test_flat_only_is_a_note_for_tensorrt(tmp_path: Path) -> None:
    (finding,) = look(files(tmp_path / "m", modelopt(quant_algo="FP8")), "NB312")
    assert finding.severity == Severity.NOTE
    assert "TensorRT-LLM" in finding.message


def test_keys_that_vllm_wants_are_an_error_only_where_it_reads_them(tmp_path: Path) -> None:
    nested = {"quant_algo": "NVFP4", "exclude_modules": []}
    (finding,) = look(files(tmp_path / "a", None, dict(nested)), "NB313")
    assert finding.severity == Severity.ERROR
    assert finding.facts["missing"] == ["group_size", "kv_cache_quant_algo"]
    both = files(tmp_path / "b", modelopt(quant_algo="NVFP4"), dict(nested))
    assert [f.severity for f in look(both, "NB313")] == [Severity.NOTE]


def test_a_section_without_any_algorithm_is_an_error(tmp_path: Path) -> None:
    (finding,) = look(files(tmp_path / "m", modelopt()), "NB313")
    assert "no quant_algo" in finding.message


# ---------------------------------------------------------- spellings of other published families


def test_a_map_beside_groups_by_class_is_a_note(tmp_path: Path) -> None:
    """As in nvidia/DeepSeek-V4-Flash-NVFP4, abridged."""
    layers = {f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in (0, 1)}
    flat = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": NVFP4, "input_activations": NVFP4}
        },
        "quantized_layers": layers,
        "ignore": ["*.attn.*", "head", "mtp.*"],
        "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
    }
    nested = {
        "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "quantized_layers": layers,
        "exclude_modules": ["*.attn.*", "head", "mtp.*"],
    }
    folder = files(tmp_path / "m", flat, nested)
    assert found(folder) == {"NB302", "NB322"}
    (groups,), (method,) = look(folder, "NB302"), look(folder, "NB322")
    assert (groups.severity, method.severity) == (Severity.NOTE, Severity.NOTE)
    assert "every Linear, quantized_layers lists 2 modules" in groups.message
    assert "moe_quant_algo 'NVFP4'" in method.message


def test_a_foreign_method_without_a_class_that_reads_it_is_a_warning(tmp_path: Path) -> None:
    flat = {"quant_method": "fp8", "quant_algo": "NVFP4", "group_size": 16}
    (finding,) = look(files(tmp_path / "m", flat), "NB322")
    assert finding.severity == Severity.WARNING


def test_a_mixed_map_in_the_nested_file_alone_is_a_note(tmp_path: Path) -> None:
    """As in nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4, abridged."""
    nested = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": "FP8",
        "quantized_layers": {
            "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
            "backbone.layers.1.mixer.experts.0.down_proj": {
                "quant_algo": "W4A16_NVFP4",
                "group_size": 16,
            },
        },
        "exclude_modules": ["backbone.layers.1.mixer.gate", "mtp*"],
    }
    folder = files(tmp_path / "m", None, nested)
    assert found(folder) == {"NB312"}
    assert look(folder, "NB312")[0].severity == Severity.NOTE


def test_a_section_in_text_config_is_a_note(tmp_path: Path) -> None:
    """As in moonshotai/Kimi-K2.5, abridged: its group has no format, which is allowed."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    inner = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*"],
    }
    folder = files(tmp_path / "m", None)
    config = {"model_type": "kimi_k25", "text_config": {"quantization_config": inner}}
    (folder / "config.json").write_text(json.dumps(config))
    assert found(folder) == {"NB321"}


# ------------------------------------------------------------------------------ against the tensors


def test_fp8_of_another_kind_is_another_format(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        name = f"{LAYER}.self_attn.o_proj"
        rows = folder.tensors[f"{name}.weight"].shape[0]
        weight = folder.tensors[f"{name}.weight"].astype(ml_dtypes.float8_e4m3fn)
        folder.tensors[f"{name}.weight"] = weight
        folder.tensors[f"{name}.weight_scale"] = np.ones(rows, np.float32)
        folder.tensors[f"{name}.input_scale"] = np.array(1, np.float32)
        section(folder, lambda s: s["quantized_layers"].update({name: {"quant_algo": "FP8"}}))

    (finding,) = look(planted(tmp_path / "m", "nybble-modelopt", change), "NB307")
    assert "declared FP8, expected fp8, found fp8_channel" in finding.message


def test_only_the_experts_of_all_layers_are_spoken_of(tmp_path: Path) -> None:
    """Some experts without an input scale are the business of another rule."""
    pattern = r"layers\.0\.mlp\.experts\.1\..*input_scale$"
    folder = planted(tmp_path / "m", "nybble-w4a4", lambda f: f.drop(pattern))
    assert look(folder, "NB315") == []


def test_a_single_projection_without_input_scale_is_named(tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.o_proj"
    folder = planted(tmp_path / "m", "modelopt-moe", lambda f: f.drop(rf"{name}\.input_scale$"))
    (finding,) = look(folder, "NB315")
    assert finding.subjects == (name,)


def test_a_missing_router_entry_is_a_note_in_this_family(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        section(folder, _without(".mlp.gate"))

    (finding,) = look(planted(tmp_path / "m", "modelopt-moe", change), "NB310")
    assert finding.severity == Severity.NOTE
    assert len(finding.subjects) == 2


def _without(*words: str) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        for key in ("ignore", "exclude_modules"):
            if key in said:
                said[key] = [e for e in said[key] if not e.endswith(words)]

    return change


def test_the_output_head_is_reached_by_a_glob_declaration_and_not_by_class_linear(
    tmp_path: Path,
) -> None:
    for base, expected in (("modelopt-dense", {"lm_head"}), ("llmcompressor-dense", set())):
        folder = planted(tmp_path / base, base, lambda f: section(f, _without("lm_head")))
        assert {s for f in look(folder, "NB310") for s in f.subjects} == expected


def test_a_plain_module_in_an_unknown_family_is_only_a_warning(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        section(folder, _without("lm_head"))
        config = folder.document("config.json")
        folder.put("config.json", config | {"model_type": "unheard_of"})

    findings = look(planted(tmp_path / "m", "modelopt-dense", change), "NB310")
    assert [f.severity for f in findings] == [Severity.WARNING]


def add(*names: str) -> Callable[[Folder], None]:
    """Store scalars."""
    return lambda f: f.tensors.update({name: np.array(0.5, np.float32) for name in names})


def test_keys_scales_alone_are_milder_than_values_scales_alone(tmp_path: Path) -> None:
    levels = {}
    for part in "kv":
        name = f"{LAYER}.self_attn.{part}_proj.{part}_scale"
        change = add(name)
        folder = planted(tmp_path / part, "nybble-modelopt", change)
        (finding,) = look(folder, "NB319")
        levels[part] = finding.severity
    assert levels == {"k": Severity.WARNING, "v": Severity.ERROR}


def test_both_kv_scales_with_a_declaration_are_nothing(tmp_path: Path) -> None:
    both = (f"{LAYER}.self_attn.{p}_proj.{p}_scale" for p in "kv")
    folder = planted(tmp_path / "m", "nybble-modelopt", add(*both))
    assert look(folder, "NB319") == []


def test_a_declared_smoothing_is_a_warning(tmp_path: Path) -> None:
    def change(folder: Folder) -> None:
        section(folder, lambda s: s.update(quant_algo="NVFP4_AWQ"))
        name = "model.layers.0.mlp.down_proj.pre_quant_scale"
        folder.tensors[name] = np.ones(128, ml_dtypes.bfloat16)

    (finding,) = look(planted(tmp_path / "m", "modelopt-dense", change), "NB320")
    assert finding.severity == Severity.WARNING


@pytest.mark.parametrize("actorder", [None, "static", "weight", False])
def test_orders_that_readers_take(tmp_path: Path, actorder: object) -> None:
    def change(said: dict[str, Any]) -> None:
        said["config_groups"]["group_0"]["weights"]["actorder"] = actorder

    folder = planted(tmp_path / "m", "llmcompressor-dense", lambda f: section(f, change))
    assert look(folder, "NB318") == []


@pytest.mark.parametrize(
    ("sparsity", "is_refused"),
    [
        ({}, False),
        ({"format": "dense", "targets": []}, False),
        ({"format": "sparse-24-bitmask", "targets": ["Linear"]}, True),
    ],
)
def test_sparsity_is_refused_where_it_has_targets(
    tmp_path: Path, sparsity: dict[str, Any], is_refused: bool
) -> None:
    folder = planted(
        tmp_path / "m",
        "llmcompressor-dense",
        lambda f: section(f, lambda said: said.update(sparsity_config=sparsity)),
    )
    assert [f.facts["kind"] for f in look(folder, "NB318")] == ["sparsity"] * is_refused


def test_a_group_without_targets_is_refused(tmp_path: Path) -> None:
    def change(said: dict[str, Any]) -> None:
        del said["config_groups"]["group_0"]["targets"]

    folder = planted(tmp_path / "m", "llmcompressor-dense", lambda f: section(f, change))
    (finding,) = look(folder, "NB318")
    assert finding.subjects == ("group_0",)


def test_rules_are_well_formed() -> None:
    ids = [rule.id for rule in declared.RULES]
    assert len(set(ids)) == len(ids)
    for rule in declared.RULES:
        assert rule.id.startswith("NB3")
        assert rule.fix.endswith(".")
        assert all(thread.startswith("https://github.com/") for thread in rule.threads)
