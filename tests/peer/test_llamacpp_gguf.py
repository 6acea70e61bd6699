"""nybble's GGUF files against llama.cpp: its converter's file, and its run of ours.

The converter gets the same checkpoint; every tensor must have the same name, type, shape and bytes,
and every key the same value, but for what is listed here with its reason.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from peer_harness import Make, Peer, need

from nybble.api.evaluate import Protocol, perplexity
from nybble.checkpoint.gguf import GGUFFile
from nybble.checkpoint.reader import Checkpoint
from nybble.rewrite.from_gguf import GGUFModel, write_bf16_from_gguf
from nybble.rewrite.to_gguf import write_gguf

pytestmark = pytest.mark.peer

CASES = [
    ("hybrid-chat-mtp", "nvfp4", "modelopt"),
    ("hybrid-chat-mtp", "nvfp4-all", "modelopt"),
    ("hybrid-chat-mtp", "nvfp4-all", "compressed-tensors"),
    ("stories-hybrid-moe", "nvfp4-all", "modelopt"),
    ("qwen3_5", "nvfp4-all", "modelopt"),
    ("qwen3_5", "fp8", "compressed-tensors"),
    ("qwen3_moe", "nvfp4-all", "modelopt"),
    ("qwen3", "nvfp4", "modelopt"),
    ("qwen2", "nvfp4", "modelopt"),
    ("llama", "nvfp4-all", "modelopt"),
    ("llama", "fp8", "compressed-tensors"),
]
TOOL_MADE = ("modelopt-moe", "modelopt-dense", "llmcompressor-moe", "llmcompressor-dense")
# The test models' vocabularies are their own: the runner lets the converter take them for qwen2's,
# while nybble finds the rule by itself. Names are guesses from the folder's name.
GUESSED = {"tokenizer.ggml.pre", "general.basename", "general.finetune", "general.version"}
GUESSED |= {"general.name", "general.size_label", "general.organization"}
# The converter does not look whether compressed-tensors modules are weight-only.
TAGS = {"general.tensor_extra.name", "general.tensor_extra.prec_a4"}
# -exp(A_log): libraries round exp differently in the last place.
EXP_RTOL = 2.0**-22
# llama.cpp rounds activations to eight bits; the issue allows 1 %.
NLL_RTOL = 0.01
LEAST_TOKENS = 500

ZOO = Path(__file__).parents[2] / "zoo" / "clean"
STORY = Path(__file__).with_name("story.txt")


@pytest.fixture(scope="module", autouse=True)
def environment() -> str:
    """Skip before anything is made."""
    return need("llamacpp")


def convert(folder: Path, out: Path) -> Path:
    with Checkpoint.open(folder) as checkpoint:
        write_gguf(checkpoint, out, threads=2)
    return out


def compare(peer: Peer, folder: Path, work: Path, *, has_tags: bool) -> None:
    [row] = peer("llamacpp", "llamacpp_convert", folder, work / "theirs.gguf")
    assert row["ok"], row
    convert(folder, work / "ours.gguf")
    with GGUFFile.open(work / "ours.gguf") as ours, GGUFFile.open(work / "theirs.gguf") as theirs:
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, tensor in ours.tensors.items():
            other = theirs.tensors[name]
            assert (tensor.type, tensor.shape) == (other.type, other.shape), name
            if name.endswith("ssm_a"):
                assert np.allclose(ours.values(name), theirs.values(name), rtol=EXP_RTOL, atol=0)
            else:
                assert np.array_equal(ours.raw(name), theirs.raw(name)), name
        passed_over = GUESSED if has_tags else GUESSED | TAGS
        assert ours.fields.keys() - passed_over == theirs.fields.keys() - passed_over
        for key in ours.fields.keys() - passed_over:
            assert ours.fields[key].kind == theirs.fields[key].kind, key
            assert np.array_equal(ours.metadata[key], theirs.metadata[key]), key  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "recipe", "layout"), CASES)
def test_the_file_is_the_converters(
    peer: Peer, make: Make, tmp_path: Path, name: str, recipe: str, layout: str
) -> None:
    compare(peer, make(name, recipe, layout).path, tmp_path, has_tags=layout == "modelopt")


@pytest.mark.parametrize("base", TOOL_MADE)
def test_the_file_is_the_converters_for_other_tools_checkpoints(
    peer: Peer, tmp_path: Path, base: str
) -> None:
    compare(peer, ZOO / base, tmp_path, has_tags=not base.startswith("llmcompressor"))


@pytest.mark.parametrize(
    "name",
    [
        "hybrid-chat-mtp",
        "stories-hybrid-moe",
        pytest.param("smollm2", marks=pytest.mark.slow),
    ],
)
def test_llamacpp_computes_what_nybble_does(
    peer: Peer, make: Make, tmp_path: Path, name: str
) -> None:
    built = peer("llamacpp", "gguf_perplexity")[0]
    if not built["is_built"]:
        pytest.skip("no llama-perplexity: run peers/gguf_perplexity.py --build in llamacpp")
    made = make(name, "nvfp4", "modelopt")
    text = tmp_path / "text.txt"
    text.write_text(3 * STORY.read_text("utf-8"), encoding="utf-8")  # 500 tokens count
    file = convert(made.path, tmp_path / "x.gguf")
    [row] = peer("llamacpp", "gguf_perplexity", file, text, "--length", 256)
    assert row["ok"], row
    ours = perplexity(made.path, Protocol(text=text, convention="llamacpp", length=256))
    assert row["tokens"] >= LEAST_TOKENS
    assert ours.perplexity.tokens == row["tokens"]
    assert math.isclose(row["nll"], ours.perplexity.nll, rel_tol=NLL_RTOL)


def test_the_converters_file_comes_back(peer: Peer, make: Make, tmp_path: Path) -> None:
    """A GGUF that nybble did not write becomes the BF16 model that its source decodes to."""
    made = make("hybrid-chat-mtp", "nvfp4-all", "modelopt")
    [row] = peer("llamacpp", "llamacpp_convert", made.path, tmp_path / "theirs.gguf")
    assert row["ok"], row
    result = write_bf16_from_gguf(tmp_path / "theirs.gguf", tmp_path / "back", threads=2)
    assert result.rounded == {}
    model = GGUFModel.open(tmp_path / "theirs.gguf")
    for module, weight in made.weights.items():
        assert np.array_equal(model.read(f"{module}.weight"), weight), module
