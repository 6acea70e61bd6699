"""transformers' loader on nybble's output: every key has a place, and every weight is ours.

Where transformers 5.23 is wrong itself, the test states what it does today, exactly, so that a
repaired version is noticed here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from peer_harness import Made, Make, Peer, need, rounded
from safetensors.numpy import load_file

pytestmark = pytest.mark.peer

ENVIRONMENT = "compressed-tensors"
LAYOUT = "compressed-tensors"
DENSE = ("qwen3_5", "qwen3", "qwen2", "llama")
EXPERTS = ("hybrid-chat-mtp", "stories-hybrid-moe", "qwen3_moe")
SOUND = [(n, r) for n in DENSE for r in ("nvfp4", "nvfp4-all", "fp8", "mxfp4")]
SOUND += [(n, r) for n in EXPERTS for r in ("fp8", "mxfp4")]
SCALE_LOST = [(n, "nvfp4-all") for n in EXPERTS]
REFUSED = [(n, "mixed") for n in ("hybrid-chat-mtp", *DENSE)]
IN_FORWARD = [(n, r) for n in DENSE for r in ("nvfp4", "mixed")] + [("llama", "fp8")]

EXPERT = re.compile(r".+\.experts\.\d+\.")

Loaded = tuple[dict[str, dict[str, Any]], Path]
Weights = dict[str, NDArray[Any]]


def load_all(
    peer: Peer, make: Make, cases: list[tuple[str, str]], out: Path, *options: str
) -> Loaded:
    """What one process makes of every case: its rows by checkpoint name, and where weights are."""
    need(ENVIRONMENT)
    folders = [make(name, recipe, LAYOUT).path for name, recipe in cases]
    rows = peer(ENVIRONMENT, "transformers_load", *folders, "--dump", out, *options)
    return {Path(row["checkpoint"]).name: row for row in rows}, out


@pytest.fixture(scope="module")
def while_loading(peer: Peer, make: Make, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """`dequantize=True`: weights are decompressed while they are read."""
    out = tmp_path_factory.mktemp("while_loading")
    return load_all(peer, make, SOUND + SCALE_LOST + REFUSED, out)


@pytest.fixture(scope="module")
def in_forward(peer: Peer, make: Make, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """transformers' default: modules stay compressed until the first forward pass."""
    out = tmp_path_factory.mktemp("in_forward")
    return load_all(peer, make, IN_FORWARD, out, "--as-stored", "--ids", "1,2,3")


def weights(loaded: Loaded, made: Made) -> Weights:
    """The effective weights after a load without a missing, unexpected or mismatched key."""
    rows, out = loaded
    row = rows[made.path.name]
    assert row["ok"], row
    assert (row["missing"], row["unexpected"], row["mismatched"]) == ([], [], [])
    held = load_file(out / f"{made.path.name}.safetensors")
    return {n: v for n, v in held.items() if not n.endswith("_scale")}  # stay after decompression


def expected(made: Made) -> Weights:
    """What the model should hold: our weights in BF16, experts stacked, no MTP head."""
    held = {n: v for n, v in made.dense.items() if not n.startswith("mtp.")}
    split = {n.removesuffix(".weight"): v for n, v in held.items() if EXPERT.match(n)}
    return {n: v for n, v in held.items() if not EXPERT.match(n)} | stack(split)


def stack(experts: Weights) -> Weights:
    """Per-expert modules as transformers holds them: gate over up in one stack, down in another."""
    found: dict[str, list[NDArray[Any]]] = {}
    for base in sorted(
        {m.rpartition(".")[0] for m in experts}, key=lambda b: int(b.split(".")[-1])
    ):
        container = base.rpartition(".")[0]
        both = np.concatenate([experts[f"{base}.gate_proj"], experts[f"{base}.up_proj"]])
        found.setdefault(f"{container}.gate_up_proj", []).append(both)
        found.setdefault(f"{container}.down_proj", []).append(experts[f"{base}.down_proj"])
    return {name: np.stack(parts) for name, parts in found.items()}


def differing(theirs: Weights, ours: Weights) -> list[str]:
    """The names whose values are not the same bits."""
    assert theirs.keys() == ours.keys()
    return [
        name
        for name, value in ours.items()
        if not np.array_equal(value.view(np.uint16), theirs[name].view(np.uint16))
    ]


@pytest.mark.parametrize(("name", "recipe"), SOUND)
def test_weights_decompressed_while_loading_are_ours(
    while_loading: Loaded, make: Make, name: str, recipe: str
) -> None:
    made = make(name, recipe, LAYOUT)
    assert differing(weights(while_loading, made), expected(made)) == []


@pytest.mark.parametrize(("name", "recipe"), SCALE_LOST)
def test_experts_in_nvfp4_lose_their_tensor_scale_and_nothing_else(
    while_loading: Loaded, make: Make, name: str, recipe: str
) -> None:
    """A defect of transformers: CompressedTensorsDequantize hands no weight_global_scale on."""
    made = make(name, recipe, LAYOUT)
    divisors = made.stored("weight_global_scale")
    experts = {m: rounded(made.weights[m] * d) for m, d in divisors.items() if EXPERT.match(m)}
    assert experts
    theirs = weights(while_loading, made)
    assert set(differing(theirs, expected(made))) == set(stack(experts))
    assert differing(theirs, expected(made) | stack(experts)) == []


@pytest.mark.parametrize(("name", "recipe"), REFUSED)
def test_a_mixed_checkpoint_does_not_load_that_way(
    while_loading: Loaded, make: Make, name: str, recipe: str
) -> None:
    """A defect of transformers: get_dense_scheme() takes one config group for all dense modules."""
    row = while_loading[0][make(name, recipe, LAYOUT).path.name]
    assert not row["ok"]
    assert "during automatic conversion of the weights" in row["error"]


@pytest.mark.parametrize(("name", "recipe"), IN_FORWARD)
def test_weights_decompressed_in_the_forward_pass_are_ours(
    in_forward: Loaded, make: Make, name: str, recipe: str
) -> None:
    made = make(name, recipe, LAYOUT)
    assert differing(weights(in_forward, made), expected(made)) == []


def test_the_modelopt_layout_is_refused_by_its_shapes(peer: Peer, make: Make) -> None:
    made = make("qwen3", "nvfp4", "modelopt")
    [row] = peer(ENVIRONMENT, "transformers_load", made.path)
    assert not row["ok"]
    assert "ignore_mismatched_sizes" in row["error"]
    assert "modelopt" in row["stderr"]  # "Unknown quantization type", as a warning
