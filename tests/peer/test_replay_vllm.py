"""The replay of vLLM against vLLM's own functions, module by module, on headers alone.

vLLM parses the configuration, maps its names and answers for every module path that the replay
has (peers/vllm_replay.py). A second test lets vLLM build whole models of tiny outputs: there the
paths themselves are vLLM's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peer_harness import Make, Peer, need

import make_headers
import tiny
from nybble.check.engines import vllm
from nybble.check.engines.matching import find_units
from nybble.check.survey import Survey

pytestmark = [pytest.mark.peer, pytest.mark.slow]

CONFIGS = Path(tiny.CONFIGS)
#: Configurations as published, whose tensor lists follow from them.
PUBLISHED = (
    "nvidia--Qwen3.6-35B-A3B-NVFP4",
    "nvidia--Qwen3.6-27B-NVFP4",
    "nvidia--Qwen3.5-122B-A10B-NVFP4",
    "nvidia--Qwen3.5-397B-A17B-NVFP4",
)
#: compressed-tensors configurations, and the originals that they belong to.
TRANSCRIBED = {
    "Qwen3.6-35B-A3B-compressed-tensors-w4a4": "Qwen--Qwen3.5-35B-A3B",
    "Qwen3.6-35B-A3B-compressed-tensors-mixed": "Qwen--Qwen3.5-35B-A3B",
    "Qwen3.8-27B-compressed-tensors-mixed": "Qwen--Qwen3.5-27B",
}
#: What vLLM never gives a configuration to; asking about it would mean nothing.
NEVER = ("gate", "embedding", "other")

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module", autouse=True)
def environment() -> str:
    """Skip before anything is made."""
    return need("vllm")


def headers(folder: Path, original: str, quantization: dict[str, Any], layout: str) -> Path:
    """A folder of the headers that a configuration implies, and that configuration."""
    config = json.loads((CONFIGS / original / "config.json").read_text("utf-8"))
    config["quantization_config"] = quantization
    folder.mkdir(parents=True)
    source = folder / "source.json"
    source.write_text(json.dumps(config), "utf-8")
    found = make_headers.checkpoint(config, layout, quantization)
    make_headers.write(folder, make_headers.files(found, 10e9), source, [], "none")
    source.unlink()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    nested = CONFIGS / original / "hf_quant_config.json"
    if nested.exists():
        (folder / nested.name).write_bytes(nested.read_bytes())
    return folder


def published(folder: Path, name: str, edit: Edit | None = None) -> Path:
    config = json.loads((CONFIGS / name / "config.json").read_text("utf-8"))
    path = headers(folder, name, config["quantization_config"], "modelopt")
    if edit is not None:
        config = json.loads((path / "config.json").read_text("utf-8"))
        edit(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


def differences(peer: Peer, folder: Path, tmp_path: Path) -> tuple[list[str], int]:
    """Every module of which vLLM and the replay say different things, and how many were asked."""
    survey = Survey.open(folder)
    replay = vllm.ENGINE.replay(survey)
    is_hybrid = str(survey.config.get("model_type")).startswith("qwen3_5")
    asked = [
        (vllm.engine_path(survey, unit), unit.sort, unit.part)
        for unit in find_units(survey)
        if unit.sort not in NEVER and not (unit.sort == "router" and is_hybrid)
    ]
    units = tmp_path / "units.json"
    units.write_text(json.dumps(asked), "utf-8")
    [row] = peer("vllm", "vllm_replay", folder, units)
    assert bool(row.get("refused")) == bool(replay.refusals), (row.get("refused"), replay.refusals)
    if replay.refusals:
        return [], len(asked)
    ours = {b.name: b for b in replay.built}
    found = []
    for path, theirs in row["modules"].items():
        mine = ours[path]
        if theirs[0].endswith("Error"):
            agree = not mine.builds and theirs[1][:40] == mine.problem[:40]
        else:
            agree = theirs == [mine.builds, mine.runs_as or theirs[1]]
        if not agree:
            found.append(f"{path}: vLLM {theirs}, replay {mine}")
    return found, len(row["modules"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_pairs_are_built_as_replayed(peer: Peer, tmp_path: Path, name: str) -> None:
    found, asked = differences(peer, published(tmp_path / "c", name), tmp_path)
    assert found == []
    assert asked > 300


@pytest.mark.parametrize("name", TRANSCRIBED)
def test_groups_are_matched_as_replayed(peer: Peer, tmp_path: Path, name: str) -> None:
    said = json.loads((CONFIGS / "transcribed" / f"{name}.json").read_text("utf-8"))
    said = said.get("quantization_config", said)
    folder = headers(tmp_path / "c", TRANSCRIBED[name], said, "compressed-tensors")
    found, asked = differences(peer, folder, tmp_path)
    assert found == []
    assert asked > 300


def _short_entries(said: dict[str, Any]) -> None:
    """A bare word is a substring; an entry for one member of a fused linear is an error."""
    said["ignore"] += ["o_proj", "model.language_model.layers.3.self_attn.q_proj"]


def _no_experts(said: dict[str, Any]) -> None:
    """Experts that nothing lists take the algorithm of the shared expert."""
    said["quantized_layers"] = {
        name: entry
        for name, entry in said["quantized_layers"].items()
        if not name.endswith(".experts")
    }


def _differing(said: dict[str, Any]) -> None:
    """Members of a fused linear with different algorithms; one that vLLM does not know."""
    layers = said["quantized_layers"]
    layers["model.language_model.layers.3.self_attn.k_proj"] = {"quant_algo": "NVFP4"}
    layers["model.language_model.layers.7.self_attn.o_proj"] = {"quant_algo": "W4A8_AWQ"}
    layers["model.language_model.layers.11.self_attn.o_proj"] = {"quant_algo": "fp8_pb_wo"}


def _unknown(said: dict[str, Any]) -> None:
    said["quant_algo"] = "NVFP4_AWQ"


def _flat_without_method(said: dict[str, Any]) -> None:
    del said["quant_method"]


@pytest.mark.parametrize(
    "edit", [_short_entries, _no_experts, _differing, _unknown, _flat_without_method]
)
def test_edited_configurations_are_read_as_replayed(peer: Peer, tmp_path: Path, edit: Edit) -> None:
    folder = published(tmp_path / "c", "nvidia--Qwen3.6-35B-A3B-NVFP4", edit)
    found, _ = differences(peer, folder, tmp_path)
    assert found == []


@pytest.mark.parametrize(
    ("family", "recipe", "layout"),
    [
        ("llama", "nvfp4", "modelopt"),
        ("qwen3_moe", "nvfp4", "modelopt"),
        ("qwen3", "nvfp4", "compressed-tensors"),
        ("qwen3_moe", "mixed", "compressed-tensors"),
    ],
)
def test_own_outputs_are_built_as_replayed(
    peer: Peer, make: Make, tmp_path: Path, family: str, recipe: str, layout: str
) -> None:
    found, asked = differences(peer, make(family, recipe, layout).path, tmp_path)
    assert found == []
    assert asked > 4


@pytest.mark.parametrize(
    ("family", "layout"), [("qwen3_5", "modelopt"), ("qwen3_moe", "compressed-tensors")]
)
def test_paths_are_those_of_the_built_model(
    peer: Peer,
    make: Make,
    ids: Callable[[str], Path],
    family: str,
    layout: str,
) -> None:
    """vLLM builds the model; every quantized linear of it is one that the replay names."""
    made = make(family, "nvfp4", layout)
    [row] = peer("vllm", "vllm_load", made.path, "--ids", ids(family), "--weight-only")
    assert row["ok"], row
    replay = vllm.ENGINE.replay(Survey.open(made.path))
    ours: dict[str, int] = {}
    for built in replay.built:
        if built.builds != "bf16" and not built.name.startswith("mtp."):
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", built.name)
            ours[pattern] = ours.get(pattern, 0) + 1
    theirs: dict[str, int] = {}
    for method, patterns in row["methods"].items():
        if "W4A16" in method:
            for pattern, count in patterns.items():
                theirs[pattern.removesuffix(".routed_experts")] = count
    assert theirs == ours
