"""The rules of the replays: who is told what, at which severity, and how often."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from nybble.check.engines import NAMES, engines
from nybble.check.engines.spellings import SPELLINGS
from nybble.check.replay import RULES
from nybble.check.replay_modules import replays
from nybble.check.rule import Finding, Severity
from nybble.check.survey import Survey, Target
from nybble.checkpoint.files import LocalFiles

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "zoo"))

from folder import Folder  # noqa: E402

CLEAN = ROOT / "zoo" / "clean"
Config = dict[str, Any]
Change = Callable[[Folder, Config], object]


def survey(folder: Path, engine: str = "", ranks: int = 0, hardware: str = "") -> Survey:
    return Survey(LocalFiles(folder), target=Target(engine, "", ranks, hardware))


def look(found: Survey) -> list[Finding]:
    return [finding for rule in RULES for finding in rule.look(found)]


def findings(
    base: str, tmp_path: Path, change: Change | None = None, engine: str = "", ranks: int = 0
) -> list[Finding]:
    folder = Folder.read(CLEAN / base)
    config = folder.document("config.json")
    if change:
        change(folder, config)
    folder.put("config.json", config)
    out = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
    folder.write(out)
    return look(survey(out, engine, ranks))


def ids(found: list[Finding]) -> list[str]:
    return sorted({f.rule.id for f in found})


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


@pytest.mark.parametrize("base", sorted(p.name for p in CLEAN.iterdir()))
def test_clean_folders_have_notes_at_most(base: str) -> None:
    assert {f.severity for f in look(survey(CLEAN / base))} <= {Severity.NOTE}


@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
@pytest.mark.parametrize("base", sorted(p.name for p in CLEAN.iterdir()))
def test_clean_folders_are_fit_for_what_they_were_made_for(base: str, engine: str) -> None:
    found = look(survey(CLEAN / base, engine))
    assert [f.message for f in found if f.severity == Severity.ERROR] == []


def test_a_refusal_is_a_note_until_that_engine_is_asked_for(tmp_path: Path) -> None:
    [note] = [f for f in look(survey(CLEAN / "nybble-modelopt")) if f.rule.id == "NB601"]
    assert (note.severity, note.engine) == (Severity.NOTE, "transformers")
    [error] = look(survey(CLEAN / "nybble-modelopt", "transformers"))
    assert (error.severity, error.rule.id) == (Severity.ERROR, "NB601")
    assert "modelopt" in error.message


def test_other_engines_are_left_out(tmp_path: Path) -> None:
    found = findings("nybble-ct", tmp_path, engine="vllm")
    assert {f.engine for f in found} == {"vllm"}
    assert ids(found) == ["NB603"]


def test_no_engine_left_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"transformers": engines()["transformers"], "llamacpp": engines()["llamacpp"]}
    monkeypatch.setattr("nybble.check.replay_modules.engines", lambda: only)

    def change(folder: Folder, config: Config) -> None:
        del config["architectures"]

    found = findings("nybble-modelopt", tmp_path, change)
    [error] = [f for f in found if f.severity == Severity.ERROR]
    assert error.rule.id == "NB601"
    assert error.message.startswith("no engine loads this. ")
    assert "llama.cpp" in error.message


def drop_input_scales(folder: Folder, config: Config) -> None:
    folder.drop(r"layers\.\d\.mlp\.experts\.1\.\w+\.input_scale$")


def test_what_is_silent_is_a_warning_until_asked_for(tmp_path: Path) -> None:
    free = [f for f in findings("nybble-w4a4", tmp_path, drop_input_scales) if f.engine == "vllm"]
    assert [(f.rule.id, f.severity) for f in free] == [("NB608", Severity.WARNING)]
    asked = findings("nybble-w4a4", tmp_path, drop_input_scales, "vllm")
    assert [(f.rule.id, f.severity) for f in asked] == [("NB608", Severity.ERROR)]


def test_modules_that_fail_alike_are_one_finding(tmp_path: Path) -> None:
    [found] = findings("nybble-w4a4", tmp_path, drop_input_scales, "vllm")
    assert len(found.subjects) == 2  # two layers
    assert found.facts == {"says": "NVFP4", "holds": "nvfp4", "builds": "nvfp4"}
    for word in ("vLLM", "the configuration says", "the file holds", "it builds"):
        assert word in found.message


def test_an_engine_that_refuses_says_nothing_of_modules(tmp_path: Path) -> None:
    found = findings("nybble-modelopt", tmp_path, engine="transformers")
    assert ids(found) == ["NB601"]


def test_runs_as_is_said_of_the_engine_asked_for(tmp_path: Path) -> None:
    assert "NB603" not in ids(findings("nybble-modelopt", tmp_path))
    assert ids(findings("nybble-modelopt", tmp_path, engine="vllm")) == ["NB603"]
    assert ids(findings("nybble-w4a4", tmp_path, engine="vllm")) == []


def test_hardware_decides_how_it_runs() -> None:
    assert ids(look(survey(CLEAN / "nybble-w4a4", "vllm", hardware="sm90"))) == ["NB603"]


def test_too_many_ranks_are_a_warning_or_an_error(tmp_path: Path) -> None:
    free = [f for f in findings("nybble-w4a4", tmp_path, ranks=64) if f.rule.id == "NB605"]
    assert {f.severity for f in free} == {Severity.WARNING}
    assert "64" in free[0].message
    asked = findings("nybble-w4a4", tmp_path, engine="vllm", ranks=64)
    assert {f.severity for f in asked if f.rule.id == "NB605"} == {Severity.ERROR}
    assert "NB605" not in ids(findings("nybble-w4a4", tmp_path, ranks=1))


def test_a_version_in_the_engines_name_counts(tmp_path: Path) -> None:
    found = survey(CLEAN / "nybble-modelopt", "vllm@0.16.0")
    assert list(replays(found)) == ["vllm"]
    [error] = look(found)
    assert "vLLM 0.16.0 refuses this" in error.message
    assert "MIXED_PRECISION" in error.message


def test_an_engine_is_replayed_once() -> None:
    found = survey(CLEAN / "nybble-modelopt")
    first = replays(found)
    assert list(first) == list(NAMES)
    assert all(replays(found)[name] is replay for name, replay in first.items())


def test_a_word_says_which_version_reads_it(tmp_path: Path) -> None:
    def change(folder: Folder, config: Config) -> None:
        for entry in config["quantization_config"]["quantized_layers"].values():
            entry["quant_algo"] = "MXFP8"
        del folder.files["hf_quant_config.json"]

    found = findings("nybble-w4a4", tmp_path, change, "vllm@0.24.0")
    [word] = [f for f in found if f.rule.id == "NB606"]
    assert "expected one of FP8, NVFP4, W4A16_NVFP4, or version 0.25.0" in word.message
    assert "NB602" not in ids(found)


def test_the_table_of_words_is_of_known_engines() -> None:
    assert SPELLINGS.keys() <= NAMES.keys()
    assert SPELLINGS["vllm"].knows("nvfp4", False, "")
    assert not SPELLINGS["trtllm"].knows("nvfp4", False, "")
    assert not SPELLINGS["vllm"].knows("W4A16_NVFP4", True, "0.21.0")


def test_the_published_35b_runs_differently_in_two_engines(published: Path) -> None:
    """Its residual input scales make TensorRT-LLM run it in W4A4; its map says W4A16."""
    found = look(survey(published))
    assert {f.severity for f in found} == {Severity.NOTE}
    [differ] = [f for f in found if f.rule.id == "NB609"]
    assert len(differ.subjects) == 41  # 40 layers' experts, and lm_head
    assert "vLLM 0.32.0 W4A16" in differ.message
    assert "TensorRT-LLM 1.3 W4A4" in differ.message


def test_a_35b_is_not_quadratic(published: Path) -> None:
    found = survey(published)
    assert len(found.modules) > 31_000
    began = time.process_time()
    look(found)
    assert time.process_time() - began < 30  # 0.3 s alone; a quadratic search takes minutes


def test_every_rule_has_text_and_an_own_id() -> None:
    assert [rule.id for rule in RULES] == [f"NB6{i:02}" for i in range(1, 13)]
    for rule in RULES:
        assert "" not in (rule.summary, rule.explanation, rule.fix)
        assert all(thread.startswith("https://github.com/") for thread in rule.threads)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("text_config", "num_experts"), "two"),
        (("text_config", "num_hidden_layers"), -1),
        (("text_config", "num_attention_heads"), 0),
        (("model_type",), ["a"]),
        (("text_config",), []),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_read_is_loaded_by_no_engine(
    keys: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    def change(folder: Folder, config: Config) -> None:
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    found = findings("nybble-modelopt", tmp_path, change)
    refused = [f for f in found if f.engine and f.rule.id == "NB601"]
    assert {f.engine for f in refused} == set(NAMES)
    assert all("config.json cannot be read as this architecture: " in f.message for f in refused)
    assert all(keys[-1] in f.message for f in refused)
    (fault,) = survey(tmp_path / "c0").faults_of("values", "dimensions")
    assert fault.kind == "values"


def test_a_missing_size_is_no_refusal_and_is_noted(tmp_path: Path) -> None:
    def change(folder: Folder, config: Config) -> None:
        del config["text_config"]["moe_intermediate_size"]

    findings("nybble-modelopt", tmp_path, change)
    for replay in replays(survey(tmp_path / "c0")).values():
        assert not any("cannot be read" in reason for reason in replay.refusals)
        assert any("moe_intermediate_size is missing" in note for note in replay.notes)
