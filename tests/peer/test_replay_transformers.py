"""compressed-tensors' own matching, on transformers' own models, against its replay: per module.

The published mixed files are headers and their transcribed configurations; the small ones are those
of the zoo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from peer_harness import ROOT, Peer, need

import tiny
from nybble.check.engines.replayed import Replay
from nybble.check.engines.transformers import (
    ENGINE,
    LOST_SCALE,
    experts_group,
    read_groups,
)
from nybble.check.survey import Survey

sys.path.insert(0, str(ROOT / "zoo"))

from folder import Folder

pytestmark = pytest.mark.peer

CONFIGS = tiny.CONFIGS
ZOO = ROOT / "zoo" / "clean"
PUBLISHED = {
    "35b-mixed": ("Qwen--Qwen3.5-35B-A3B", "Qwen3.6-35B-A3B-compressed-tensors-mixed"),
    "35b-w4a4": ("Qwen--Qwen3.5-35B-A3B", "Qwen3.6-35B-A3B-compressed-tensors-w4a4"),
    "27b-mixed": ("Qwen--Qwen3.5-27B", "Qwen3.8-27B-compressed-tensors-mixed"),
}
SMALL = ("nybble-ct", "llmcompressor-dense", "llmcompressor-moe")
#: The order of the groups decides nothing, that of the alphabet does; ignore knows classes too.
TRICKY: dict[str, dict[str, Any]] = {
    "alphabet": {"targets": (["re:.*layers.*"], ["re:.*(q|k|v)_proj$"]), "ignore": []},
    "class-last": {"targets": (["Linear"], ["re:.*mlp.*"]), "ignore": ["lm_head"]},
    "exact-first": {
        "targets": (["re:.*self_attn.*"], ["model.layers.0.self_attn.q_proj"]),
        "ignore": [],
    },
    "ignored-class": {"targets": (["re:.*proj$"], ["Linear"]), "ignore": ["Linear"]},
    "same-target": {"targets": (["Linear"], ["Linear"]), "ignore": ["re:.*down"]},
    "container": {"targets": (["Linear"], ["re:x"]), "ignore": ["model.layers.0.mlp"]},
    "embedding": {"targets": (["Embedding"], ["Linear"]), "ignore": []},
    "base-class": {"targets": (["Module"], ["re:.*o_proj"]), "ignore": []},
}


def published(folder: Path, base: str, transcribed: str) -> Path:
    """Headers of a compressed-tensors file."""
    config = json.loads((CONFIGS / base / "config.json").read_text())
    said = json.loads((CONFIGS / "transcribed" / f"{transcribed}.json").read_text())
    config["quantization_config"] = said["quantization_config"]
    source = folder.with_suffix(".json")
    source.write_text(json.dumps(config))
    layout = "compressed-tensors"
    tensors = tiny.make_headers.checkpoint(config, layout, said["quantization_config"])
    parts = tiny.make_headers.files(tensors, 50e9, layout)
    tiny.make_headers.write(folder, parts, source, [], "none")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tricky(folder: Path, targets: tuple[list[str], list[str]], ignore: list[str]) -> Path:
    """A small dense file whose two groups overlap."""
    folder.mkdir()
    for file in (ZOO / "llmcompressor-dense").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    group = next(iter(section["config_groups"].values()))
    section["config_groups"] = {
        f"group_{i}": group | {"targets": entries} for i, entries in enumerate(targets)
    }
    section["ignore"] = ignore
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("transformers")
    found = {name: ZOO / name for name in SMALL}
    found |= {name: published(out / name, *of) for name, of in PUBLISHED.items()}
    found |= {name: tricky(out / name, **of) for name, of in TRICKY.items()}
    return found


@pytest.fixture(scope="module")
def rows(peer: Peer, folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    need("compressed-tensors")
    found = peer("compressed-tensors", "transformers_replay", *folders.values())
    by_folder = {row["folder"]: row for row in found}
    return {name: by_folder[str(folder)] for name, folder in folders.items()}


def replayed_groups(replay: Replay) -> dict[str, str]:
    """Module -> group, of everything but routed experts."""
    found = {}
    for built in replay.built:
        if not built.name.endswith(".experts"):
            _, _, group = built.says.rpartition(" (")
            found[built.name] = "" if built.says == "unquantized" else group.rstrip(")")
    return found


@pytest.mark.parametrize("name", [*SMALL, *PUBLISHED, *TRICKY])
def test_every_module_gets_the_group_that_the_replay_says(
    name: str, folders: dict[str, Path], rows: dict[str, dict[str, Any]]
) -> None:
    assert rows[name]["ok"], rows[name]
    theirs = rows[name]["groups"]
    ours = replayed_groups(ENGINE.replay(Survey.open(folders[name])))
    assert {m: theirs[m] for m in theirs.keys() & ours} == {
        m: ours[m] for m in theirs.keys() & ours
    }
    # What only transformers has is no linear with a group, or an embedding that stays as it is;
    # what only the replay has are routers, which are no linears there.
    assert {m for m in theirs.keys() - ours.keys() if theirs[m]} == set()
    assert {m for m in ours.keys() - theirs.keys() if ours[m]} == set()
    assert len(theirs.keys() & ours) >= 10


def plain_experts(folder: Path) -> Path:
    """Routed experts in BF16, one by one and ignored, beside packed shared experts."""
    zoo = Folder.read(ZOO / "nybble-ct")
    for codes in zoo.matching(r"language_model.*mlp\.experts\.\d+\.\w+\.weight_packed$"):
        module, (n, k) = codes.removesuffix(".weight_packed"), zoo.tensors[codes].shape
        shard = zoo.shard_of[codes]
        zoo.drop(rf"^{module}\.")
        zoo.tensors[f"{module}.weight"] = np.zeros((n, 2 * k), ml_dtypes.bfloat16)
        zoo.shard_of[f"{module}.weight"] = shard
    config = zoo.document("config.json")
    config["quantization_config"]["ignore"].append("re:.*mlp.experts.*")
    zoo.put("config.json", config)
    zoo.write(folder)
    return folder


def ignored_though_packed(folder: Path) -> Path:
    zoo = Folder.read(ZOO / "llmcompressor-dense")
    config = zoo.document("config.json")
    config["quantization_config"]["ignore"].append("model.layers.0.self_attn.q_proj")
    zoo.put("config.json", config)
    zoo.write(folder)
    return folder


def test_it_loads_or_fills_at_random_as_the_replay_says(peer: Peer, tmp_path: Path) -> None:
    need("compressed-tensors")
    folders = [
        ZOO / "llmcompressor-dense",
        ZOO / "nybble-ct",
        ZOO / "nybble-modelopt",
        plain_experts(tmp_path / "plain"),
        ignored_though_packed(tmp_path / "ignored"),
    ]
    rows = peer(
        "compressed-tensors", "transformers_load", *folders, "--as-stored", "--ids", "1,2,3"
    )
    theirs = {Path(row["checkpoint"]).name: row for row in rows}
    for folder in folders:
        replay, row = ENGINE.replay(Survey.open(folder)), theirs[folder.name]
        assert ("error" not in row) == replay.loads, (folder.name, row.get("error"))
        if replay.loads:
            at_random = [b for b in replay.silent if b.problem != LOST_SCALE]
            assert bool(row["missing"]) == bool(at_random), folder.name


def test_experts_take_the_group_that_names_them() -> None:
    """`get_experts_scheme`, which asks no ignore list."""
    said = json.loads(
        (CONFIGS / "transcribed" / "Qwen3.6-35B-A3B-compressed-tensors-mixed.json").read_text()
    )
    groups = read_groups(said["quantization_config"])
    assert experts_group(groups).weights.is_nvfp4
