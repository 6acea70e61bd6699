"""compressed-tensors' own decompressor on nybble's output: the same modules and the same weights.

In the three versions that engines use: 0.20 (transformers), 0.19 (llm-compressor), 0.17 (vLLM).
Each parses the configuration with its own strict model and matches targets and ignores itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from peer_harness import Make, Peer, need, rounded
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
CASES = [(name, recipe) for name in MODELS for recipe in FORMATS]

Row = dict[str, Any]


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def decompressed(
    request: pytest.FixtureRequest, peer: Peer, make: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Row], Path]:
    """What one process of one version makes of every case: its rows, and the folder of weights."""
    need(request.param)
    out = tmp_path_factory.mktemp("decompressed")
    folders = [make(name, recipe, LAYOUT).path for name, recipe in CASES]
    rows = peer(request.param, "ct_decompress", out, *folders)
    assert {row.get("compressed_tensors") for row in rows} == {ENVIRONMENTS[request.param]}, rows[0]
    return {Path(row["checkpoint"]).name: row for row in rows}, out


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_library_decodes_what_nybble_decodes(
    decompressed: tuple[dict[str, Row], Path], make: Make, name: str, recipe: str
) -> None:
    rows, out = decompressed
    made = make(name, recipe, LAYOUT)
    row = rows[made.path.name]
    assert row["ok"], row  # no quantized module unclaimed, no dense one claimed
    formats = row["formats_stated_and_inferred"]
    assert all(stated == inferred for stated, inferred in formats)
    assert {stated for stated, _ in formats} == FORMATS[recipe]
    theirs = load_file(out / f"{made.path.name}.safetensors")
    assert theirs.keys() == {f"{module}.weight" for module in made.weights}
    different = [m for m, ours in made.weights.items() if not is_equal(ours, theirs[f"{m}.weight"])]
    assert different == []


def is_equal(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> bool:
    """Bitwise, after the rounding to BF16 in which the library emits every weight."""
    return np.array_equal(
        rounded(ours).view(np.uint16), rounded(theirs).view(np.uint16)
    ) and np.array_equal(rounded(theirs).astype(np.float32), theirs)


def test_a_configuration_that_forgets_or_overreaches_is_noticed(
    peer: Peer, make: Make, tmp_path: Path
) -> None:
    """The comparison above would be empty if the runner could not fail."""
    source = make("qwen3", "mixed", LAYOUT).path
    rule = r".*layers\\.\\d+\\.mlp\\.up_proj$"
    changed = {
        "forgets": rule.replace("d+", "b0", 1).replace(r"\\b", ""),
        "overreaches": rule.replace(r"mlp\\.up_proj", r"(mlp\\.up_proj|input_layernorm)"),
    }
    text = (source / "config.json").read_text("utf-8")
    assert text.count(rule) == 1
    for name, other in changed.items():
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "config.json").write_text(text.replace(rule, other), "utf-8")
    rows = peer("compressed-tensors", "ct_decompress", tmp_path, *(tmp_path / n for n in changed))
    assert rows[0]["unclaimed"] == ["model.layers.1.mlp.up_proj"]
    assert rows[1]["claimed_but_dense"] == [f"model.layers.{i}.input_layernorm" for i in (0, 1)]
