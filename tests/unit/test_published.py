"""The rules on declarations and names find in published files exactly what reading them found.

`tests/golden/published_findings.md` was written first, from the files; this is its list.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nybble.check import declared, naming
from nybble.check.rule import Finding
from nybble.check.survey import Survey

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
import make_headers  # noqa: E402

CONFIGS = TESTS / "fixtures" / "configs"
RULES = (*declared.RULES, *naming.RULES)
FEW = 8  # experts per layer, where their number plays no part


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))  # type: ignore[no-any-return]


def tensors(folder: Path, config: dict[str, Any], **options: Any) -> None:
    """The true tensor list of a release, as headers without data."""
    found = make_headers.checkpoint(config, quant=config["quantization_config"], **options)
    source = folder.parent / f"{folder.name}.json"
    source.write_text(json.dumps(config), "utf-8")
    make_headers.write(folder, make_headers.files(found, 10e9), source, [], "none")


def copy(name: str, folder: Path) -> Path:
    """The configuration files alone."""
    folder.mkdir()
    for file in (CONFIGS / name).glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def modelopt(name: str, folder: Path, experts: int = 0, **options: Any) -> Path:
    """A published ModelOpt pair with its tensors."""
    copy(name, folder)
    config = load(folder / "config.json")
    if experts:
        config["text_config"]["num_experts"] = experts
    tensors(folder, config, layout="modelopt", **options)
    return folder


def transcribed(name: str, original: str, folder: Path, **options: Any) -> Path:
    """A transcribed compressed-tensors section with the tensors that belong to it."""
    folder.mkdir()
    config = load(CONFIGS / original / "config.json") | load(CONFIGS / "transcribed" / name)
    if "num_experts" in config["text_config"]:
        config["text_config"]["num_experts"] = FEW
    tensors(folder, config, layout="compressed-tensors", **options)
    return folder


def look(folder: Path) -> list[Finding]:
    survey = Survey.open(folder)
    return [finding for rule in RULES for finding in rule.look(survey)]


def brief(folder: Path) -> list[tuple[str, str]]:
    return sorted((f.rule.id, str(f.severity)) for f in look(folder))


def of(findings: list[Finding], rule: str) -> list[Finding]:
    return [f for f in findings if f.rule.id == rule]


# ------------------------------------------------------------------------------------ with tensors


@pytest.fixture(scope="module")
def the_35b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "35b"
    return modelopt("nvidia--Qwen3.6-35B-A3B-NVFP4", folder)


def test_the_35b_contradicts_itself_in_three_places(the_35b: Path) -> None:
    found = look(the_35b)
    assert sorted((f.rule.id, str(f.severity)) for f in found) == [
        ("NB301", "note"),
        ("NB301", "warning"),
        ("NB302", "warning"),
        ("NB314", "note"),
        ("NB319", "note"),
    ]
    producer, cache = of(found, "NB301")
    assert "0.37.0" in producer.message
    assert "0.44.0" in producer.message
    assert "config.json says nothing, hf_quant_config.json says fp8" in cache.message
    (group,) = of(found, "NB302")
    assert len(group.subjects) == 161
    assert "group_1 gives 161 targets" in group.message
    assert "4-bit input activations; quantized_layers says W4A16_NVFP4" in group.message
    (residual,) = of(found, "NB314")
    assert len(residual.subjects) == 30_841
    assert "30,841 modules" in residual.message
    assert "no k_scale or v_scale is stored: engines use 1.0" in of(found, "NB319")[0].message


def test_no_rule_is_quadratic_on_a_35b(the_35b: Path) -> None:
    survey = Survey.open(the_35b)
    survey.contents  # noqa: B018  shared with every other subject
    began = time.process_time()
    found = [finding for rule in RULES for finding in rule.look(survey)]
    assert found
    assert time.process_time() - began < 30  # measured: 0.15 s; a quadratic rule takes minutes


def test_the_27b_is_consistent(tmp_path: Path) -> None:
    found = look(modelopt("nvidia--Qwen3.6-27B-NVFP4", tmp_path / "27b"))
    assert [(f.rule.id, str(f.severity)) for f in found] == [("NB314", "note"), ("NB319", "note")]
    assert len(found[0].subjects) == 193


def routers_and_cache(found: list[Finding], layers: int) -> None:
    (routers,) = (f for f in of(found, "NB310") if str(f.severity) == "note")
    assert len(routers.subjects) == layers
    assert all(name.endswith(".mlp.gate") for name in routers.subjects)
    assert "build these unquantized all the same" in routers.message
    assert [str(f.severity) for f in of(found, "NB319")] == ["note"]


def test_the_122b_leaves_out_its_routers(tmp_path: Path) -> None:
    folder = modelopt("nvidia--Qwen3.5-122B-A10B-NVFP4", tmp_path / "m", FEW, fused_mtp=False)
    found = look(folder)
    assert len(found) == 2
    routers_and_cache(found, 48)


@pytest.mark.slow
def test_the_122b_with_all_its_experts(tmp_path: Path) -> None:
    found = look(modelopt("nvidia--Qwen3.5-122B-A10B-NVFP4", tmp_path / "m", fused_mtp=False))
    assert len(found) == 2
    routers_and_cache(found, 48)


def test_the_397b_does_not_cover_mtp_fc(tmp_path: Path) -> None:
    folder = modelopt("nvidia--Qwen3.5-397B-A17B-NVFP4", tmp_path / "m", FEW, fused_mtp=False)
    found = look(folder)
    assert len(found) == 3
    routers_and_cache(found, 60)
    (fc,) = (f for f in of(found, "NB310") if str(f.severity) == "warning")
    assert fc.subjects == ("mtp.fc",)
    assert "AssertionError" in fc.message


@pytest.mark.parametrize(
    ("name", "original", "options"),
    [
        ("Qwen3.8-27B-compressed-tensors-mixed", "Qwen--Qwen3.5-27B", {"kv_scales": True}),
        ("Qwen3.6-35B-A3B-compressed-tensors-mixed", "Qwen--Qwen3.5-35B-A3B", {}),
        ("Qwen3.6-35B-A3B-compressed-tensors-w4a4", "Qwen--Qwen3.5-35B-A3B", {}),
    ],
)
def test_transcribed_compressed_tensors_are_sound(
    tmp_path: Path, name: str, original: str, options: dict[str, Any]
) -> None:
    assert brief(transcribed(f"{name}.json", original, tmp_path / "m", **options)) == []


# ------------------------------------------------------------------------ configuration files alone


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "nvidia--Qwen3.6-35B-A3B-NVFP4",
            [("NB301", "note"), ("NB301", "warning"), ("NB302", "warning")],
        ),
        ("nvidia--Qwen3.6-27B-NVFP4", []),
        ("nvidia--Qwen3.5-122B-A10B-NVFP4", []),
        ("nvidia--Qwen3.5-397B-A17B-NVFP4", []),
        ("nvidia--Qwen3-235B-A22B-NVFP4", [("NB312", "note")]),
        ("Qwen--Qwen3-32B-FP8-Static-PerTensor", [("NB313", "warning")]),
        ("Qwen--Qwen3-32B-FP8", []),
        ("Qwen--Qwen3-30B-A3B-FP8", []),
        ("Qwen--Qwen3-30B-A3B", []),
        ("Qwen--Qwen3.5-35B-A3B", []),
        ("Qwen--Qwen3.5-27B", []),
    ],
)
def test_without_tensors_the_files_are_still_held_against_each_other(
    tmp_path: Path, name: str, expected: list[tuple[str, str]]
) -> None:
    assert brief(copy(name, tmp_path / "m")) == expected


def test_the_235b_is_declared_in_the_nested_file_only(tmp_path: Path) -> None:
    (found,) = look(copy("nvidia--Qwen3-235B-A22B-NVFP4", tmp_path / "m"))
    assert "hf_quant_config.json alone declares NVFP4" in found.message
    assert "transformers" in found.message


def test_the_fp8_of_modelopt_0_31_has_no_quant_method(tmp_path: Path) -> None:
    (found,) = look(copy("Qwen--Qwen3-32B-FP8-Static-PerTensor", tmp_path / "m"))
    assert "no quant_method" in found.message
