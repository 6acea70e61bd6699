"""llama.cpp's own converter against its replay: accepted or refused, and every module's type.

Tiny checkpoints: those of the zoo, and what a line of change makes of them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from peer_harness import ROOT, Make, Peer, need
from test_llamacpp import environment  # noqa: F401  skips without the environment

from nybble.check.engines.llamacpp import ENGINE
from nybble.check.engines.replayed import Replay
from nybble.check.survey import Survey

pytestmark = pytest.mark.peer

ZOO = ROOT / "zoo" / "clean"
sys.path.insert(0, str(ROOT / "zoo"))
Config = dict[str, Any]


def _section(change: Callable[[Config], None]) -> Callable[[Path], None]:
    """Change quantization_config in config.json, and leave hf_quant_config.json out."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "hf_quant_config.json").unlink(missing_ok=True)

    return edit


def _rename_entry(section: Config) -> None:
    layers = section["quantized_layers"]
    layers["model.language_model.layers.9.mlp.down_proj"] = {"quant_algo": "NVFP4"}


def _second_group(section: Config) -> None:
    group = next(iter(section["config_groups"].values()))
    section["format"] = "mixed-precision"
    section["config_groups"]["other"] = group | {"format": "float-quantized", "targets": ["re:x"]}


def _two_packed_groups(section: Config) -> None:
    name, group = next(iter(section["config_groups"].items()))
    group = group | {"format": "nvfp4-pack-quantized"}
    section["format"] = "mixed-precision"
    section["config_groups"] = {name: group, "other": group | {"targets": ["re:x"]}}


def _no_section(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").unlink(missing_ok=True)


def _nested_only(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def _index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop(next(iter(index["weight_map"])))
    path.write_text(json.dumps(index))


def _no_mtp(folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if "mtp." not in k})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))


def _narrow(folder: Path) -> None:
    """K of the shared experts' down projection becomes 48: whole blocks, no whole superblock."""

    def edit(tensors: Config) -> Config:
        for name, values in tensors.items():
            if "shared_expert.down_proj" in name and values.ndim == 2:
                width = 24 if name.endswith(".weight") else 3
                tensors[name] = np.ascontiguousarray(values[:, :width])
        return tensors

    _edit_tensors(folder, edit)


def _no_tensor_scale(folder: Path) -> None:
    _edit_tensors(
        folder, lambda tensors: {k: v for k, v in tensors.items() if "weight_scale_2" not in k}
    )


def _fp8(scale_shape: Callable[[int, int], tuple[int, ...]]) -> Callable[[Path], None]:
    """All o_proj become FP8 in the map of layers, with a scale of this shape for [N, K]."""

    def plant(folder: Path) -> None:
        names = []

        def edit(tensors: Config) -> Config:
            for name in [n for n in tensors if n.endswith("layers.1.self_attn.o_proj.weight")]:
                names.append(name.removesuffix(".weight"))
                shape = tensors[name].shape
                tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
                tensors[f"{name}_scale"] = np.ones(scale_shape(*shape), np.float32)
            return tensors

        _edit_tensors(folder, edit)
        assert names
        layers = {name: {"quant_algo": "FP8"} for name in names}
        _section(lambda s: s["quantized_layers"].update(layers))(folder)

    return plant


def _edit_tensors(folder: Path, edit: Callable[[Config], Config]) -> None:
    from folder import Folder  # of zoo

    zoo = Folder.read(folder)
    zoo.tensors = edit(zoo.tensors)
    shutil.rmtree(folder)
    zoo.write(folder)


CLEAN = sorted(path.name for path in ZOO.iterdir()) if ZOO.is_dir() else []
CHANGED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "unknown-entry": ("nybble-modelopt", _section(_rename_entry)),
    "second-group": ("nybble-ct", _section(_second_group)),
    "two-packed-groups": ("nybble-ct", _section(_two_packed_groups)),
    "no-section": ("nybble-modelopt", _no_section),
    "nested-only": ("nybble-modelopt", _nested_only),
    "nested-only-uniform": ("modelopt-moe", _nested_only),
    "other-method": ("nybble-modelopt", _section(lambda s: s.update(quant_method="modelopt_fp4"))),
    "unknown-method": ("nybble-w4a4", _section(lambda s: s.update(quant_method="awq"))),
    "index": ("nybble-modelopt", _index),
    "no-mtp": ("source", _no_mtp),
    "narrow": ("nybble-modelopt", _narrow),
    "no-tensor-scale": ("nybble-modelopt", _no_tensor_scale),
    "fp8-tensor": ("nybble-modelopt", _fp8(lambda n, k: ())),
    "fp8-channel": ("nybble-modelopt", _fp8(lambda n, k: (n,))),
    "fp8-column": ("nybble-modelopt", _fp8(lambda n, k: (n, 1))),
    "fp8-block": ("nybble-modelopt", _fp8(lambda n, k: (1, 1, 1, 1))),
    "weight-only-groups": ("nybble-ct", _section(lambda s: None)),
}


#: Of nybble's own making: model, recipe, layout.
MADE = {
    f"{model}-{recipe}-{layout}": (model, recipe, layout)
    for model in ("qwen3_5", "qwen3_moe")
    for recipe, layout in (
        ("nvfp4-all", "modelopt"),
        *((recipe, "compressed-tensors") for recipe in ("nvfp4-all", "fp8", "mixed", "mxfp4")),
    )
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make: Make) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("llamacpp")
    found = {name: ZOO / name for name in CLEAN}
    found |= {name: make(*of).path for name, of in MADE.items()}
    for name, (base, change) in CHANGED.items():
        found[name] = out / name
        shutil.copytree(ZOO / base, found[name])
        change(found[name])
    return found


@pytest.fixture(scope="module")
def replays(folders: dict[str, Path]) -> dict[str, Replay]:
    return {name: ENGINE.replay(Survey.open(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def rows(
    peer: Peer,
    folders: dict[str, Path],
    replays: dict[str, Replay],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    need("llamacpp")
    request = tmp_path_factory.mktemp("request") / "request.json"
    names = {
        str(folders[name]): [built.name for built in replay.built]
        for name, replay in replays.items()
    }
    request.write_text(json.dumps(names))
    by_folder = {row["folder"]: row for row in peer("llamacpp", "llamacpp_replay", request)}
    return {name: by_folder[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", [*CLEAN, *MADE, *CHANGED])
def test_accepts_what_the_replay_says(
    name: str, rows: dict[str, dict[str, Any]], replays: dict[str, Replay]
) -> None:
    row, replay = rows[name], replays[name]
    assert row["ok"] == replay.loads, (row.get("error"), replay.refusals, replay.failing[:3])


@pytest.mark.parametrize("name", [*CLEAN, *MADE, *CHANGED])
def test_every_module_gets_the_type_that_the_replay_says(
    name: str, rows: dict[str, dict[str, Any]], replays: dict[str, Replay]
) -> None:
    if not rows[name]["ok"]:
        pytest.skip("refused")
    types = rows[name]["types"]
    assert replays[name].built
    differ = {}
    for built in replays[name].built:
        kind, takes_four_bits = types[built.name]
        wanted = ("NVFP4", built.runs_as == "W4A4") if built.builds == "nvfp4" else ("BF16", True)
        # Gates and routers of few rows stay in F32.
        found = "BF16" if kind in ("F32", "BF16") else kind
        if (found, takes_four_bits) != wanted:
            differ[built.name] = (kind, takes_four_bits, wanted)
    assert differ == {}
