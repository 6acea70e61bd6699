"""compressed-tensors' own decompressor on nybble's output: same modules, same weights, in three versions of it.

The versions are those that engines use: 0.20 (transformers), 0.19 (llm-compressor), 0.17 (vLLM). Each parses the
configuration with its own strict model and matches targets and ignores itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Make, Peer, need
from numpy.typing import NDArray
from safetensors.numpy import load_file

pytestmark = pytest.mark.peer

LAYOUT = "compressed-tensors"
ENVIRONMENTS = {"compressed-tensors": "0.20.0", "llmcompressor": "0.19.0", "vllm": "0.17.0"}
MODELS = (
    "hybrid-chat-mtp",
    "stories-hybrid-moe",
    "qwen3_5",
    "qwen3_moe",
    "qwen3",
    "qwen2",
    "llama",
)
FORMATS = {
    "nvfp4": {"nvfp4-pack-quantized"},
    "nvfp4-all": {"nvfp4-pack-quantized"},
    "fp8": {"float-quantized"},
    "mxfp4": {"mxfp4-pack-quantized"},
    "mixed": {"float-quantized", "nvfp4-pack-quantized"},
}
CASES = [(model, recipe) for model in MODELS for recipe in FORMATS]

Decompressed = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def decompressed(
    request: pytest.FixtureRequest, peer: Peer, make: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Decompressed]]:
    """The library's version and, by checkpoint name, what one process of it made of every case."""
    need(request.param)
    out = tmp_path_factory.mktemp("decompressed")
    folders = [make(model, recipe, LAYOUT).path for model, recipe in CASES]
    rows = peer(request.param, "ct_decompress", out, *folders)
    found = {Path(r["checkpoint"]).name: (r, out / f"{Path(r['checkpoint']).name}.safetensors") for r in rows}
    return ENVIRONMENTS[request.param], found


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_the_library_decodes_what_nybble_decodes(
    decompressed: tuple[str, dict[str, Decompressed]], make: Make, model: str, recipe: str
) -> None:
    version, found = decompressed
    made = make(model, recipe, LAYOUT)
    row, file = found[made.path.name]
    assert row["ok"], row  # also: no module unclaimed, none claimed that is dense
    assert row["compressed_tensors"] == version
    formats = row["formats_stated_and_inferred"]
    assert all(stated == inferred for stated, inferred in formats)
    assert {stated for stated, _ in formats} == FORMATS[recipe]
    theirs = load_file(file)
    assert theirs.keys() == {f"{module}.weight" for module in made.weights}
    different = [m for m, ours in made.weights.items() if not is_equal(ours, theirs[f"{m}.weight"])]
    assert different == []


def is_equal(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> bool:
    """Bitwise, after the rounding to BF16 in which the library emits weights (NVFP4 and MXFP4 lose nothing by it)."""
    rounded = ours.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.array_equal(rounded.view(np.uint32), theirs.view(np.uint32))


def test_a_configuration_that_forgets_or_overreaches_is_noticed(
    peer: Peer, make: Make, tmp_path: Path
) -> None:
    """The comparison above would be empty if the runner could not fail."""
    source = make("qwen3", "mixed", LAYOUT).path
    for name, old, new in (
        ("forgets", r".*layers\\.\\d+\\.mlp\\.up_proj$", r".*layers\\.0\\.mlp\\.up_proj$"),
        ("overreaches", r".*layers\\.\\d+\\.mlp\\.up_proj$", r".*layers\\.\\d+\\.(mlp\\.up_proj|input_layernorm)$"),
    ):
        shutil.copytree(source, tmp_path / name)
        text = (source / "config.json").read_text("utf-8")
        assert old in text
        (tmp_path / name / "config.json").write_text(text.replace(old, new), "utf-8")
        json.loads((tmp_path / name / "config.json").read_text("utf-8"))
    out = tmp_path / "out"
    out.mkdir()
    forgets, overreaches = peer(
        "compressed-tensors", "ct_decompress", out, tmp_path / "forgets", tmp_path / "overreaches"
    )
    assert forgets["unclaimed"] == ["model.layers.1.mlp.up_proj"]
    assert overreaches["claimed_but_dense"] == [f"model.layers.{i}.input_layernorm" for i in (0, 1)]
