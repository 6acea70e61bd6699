"""Converted checkpoints in other projects' hands: the same modules and the same weights.

compressed-tensors decompresses what was converted to its layout, and must give the values of the
ModelOpt source; ModelOpt's own code decodes what was converted from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from peer_harness import Make, Peer, need, rounded
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import dialects
import tiny
from nybble.api.convert import convert

pytestmark = pytest.mark.peer

ENVIRONMENTS = ("compressed-tensors", "llmcompressor", "vllm")
MODELS = ("hybrid-chat-mtp", "qwen3_5", "qwen3_moe", "qwen3", "llama")
#: Sources in ModelOpt's dialects, written by hand.
BY_HAND = ("modelopt-nvfp4", "modelopt-mixed", "modelopt-fp8", "modelopt-pb-wo", "qwen-fp8")
#: compressed-tensors 0.17 cannot decompress blocks whose last one is not whole.
RAGGED = {"vllm": ("modelopt-pb-wo", "qwen-fp8")}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_library_decodes_the_source_s_values(
    environment: str, peer: Peer, make: Make, tmp_path: Path
) -> None:
    need(environment)
    sources = {name: make(name, "nvfp4", "modelopt").path for name in MODELS}
    by_hand = [name for name in BY_HAND if name not in RAGGED.get(environment, ())]
    sources |= {name: dialects.checkpoint(tmp_path / name, name) for name in by_hand}
    folders = []
    for name, source in sources.items():
        folders.append(tmp_path / f"{name}-ct")
        done = convert(source, folders[-1], "compressed-tensors")
        assert done.verdict.endswith(" 0 differing values")
    (tmp_path / "decompressed").mkdir()
    rows = peer(environment, "ct_decompress", tmp_path / "decompressed", *folders)
    for row, (name, source) in zip(rows, sources.items(), strict=True):
        assert row["ok"], row
        theirs = load_file(tmp_path / "decompressed" / f"{name}-ct.safetensors")
        ours = dialects.weights(source)
        assert theirs.keys() == {f"{module}.weight" for module in ours}
        different = [
            module
            for module, values in ours.items()
            if not np.array_equal(
                rounded(values).view(np.uint16), rounded(theirs[f"{module}.weight"]).view(np.uint16)
            )
        ]
        assert different == [], name


def test_modelopt_decodes_the_source_s_values(peer: Peer, make: Make, tmp_path: Path) -> None:
    need("modelopt")
    sources = {name: make(name, "nvfp4", "compressed-tensors").path for name in MODELS}
    sources |= {n: dialects.checkpoint(tmp_path / n, n) for n in ("ct-nvfp4", "ct-tensor")}
    folders = []
    for name, source in sources.items():
        folders.append(tmp_path / f"{name}-mo")
        done = convert(source, folders[-1], "modelopt")
        assert done.verdict.endswith(" 0 differing values")
    (tmp_path / "decoded").mkdir()
    rows = peer("modelopt", "modelopt_decode", tmp_path / "decoded", *folders)
    for row, (name, source) in zip(rows, sources.items(), strict=True):
        assert row["ok"], row
        theirs = load_file(tmp_path / "decoded" / f"{name}-mo.safetensors")
        ours = dialects.weights(source)
        assert theirs.keys() == {f"{module}.weight" for module in ours}
        different = [m for m in ours if not np.array_equal(ours[m], theirs[f"{m}.weight"])]
        assert different == [], name


def test_there_and_back_is_the_same_file(make: Make, tmp_path: Path) -> None:
    for name in MODELS:
        source = make(name, "nvfp4", "modelopt").path
        convert(source, tmp_path / f"{name}-ct", "compressed-tensors", exact=True)
        convert(tmp_path / f"{name}-ct", tmp_path / f"{name}-back", "modelopt", exact=True)
        assert tiny.read(source) == tiny.read(tmp_path / f"{name}-back")
