"""The engine's log-probabilities of a text against vLLM's and llama.cpp's, on one checkpoint.

All three read the same NVFP4 codes and scales. What is compared is the mean negative
log-likelihood of over 500 tokens, as `LLM` tells it: through the scheduler, chunks, pages and the
recorded program. Single tokens are never compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from peer_harness import Make, Peer, need

from nybble import LLM, SamplingParams
from nybble.api.llm import Prompt
from nybble.checkpoint.reader import Checkpoint
from nybble.evaluate.windows import make_windows
from nybble.rewrite.to_gguf import write_gguf

pytestmark = pytest.mark.peer

#: vLLM computes in BF16 as the engine does, llama.cpp with activations of eight bits.
NLL_RTOL = 0.01
LEAST_TOKENS = 500
LENGTH = 256
STORY = Path(__file__).with_name("story.txt")
RECIPE = "nvfp4-all"


def open_llm(folder: Path) -> LLM:
    """With steps so small that every text goes in chunks, beside others."""
    return LLM(folder, memory=0.2, max_batched_tokens=200, max_sequences=4, kv_cache_dtype="bf16")


def nll(llm: LLM, texts: Sequence[Prompt], first: int) -> tuple[float, int]:
    """The mean over the tokens from the `first` of each text, and their number."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    found: list[float] = []
    for done in llm.generate(texts, params):
        assert done.prompt_logprobs is not None
        found += [-p for p in done.prompt_logprobs.logprobs[first:] if p is not None]
    return math.fsum(found) / len(found), len(found)


@pytest.mark.parametrize("name", ["hybrid-chat-mtp", "smollm2", "llama"])
def test_vllm_thinks_the_same_of_a_text(
    peer: Peer, make: Make, ids: Callable[[str], Path], name: str
) -> None:
    need("vllm")
    folder, file = make(name, RECIPE, "modelopt").path, ids(name)
    [row] = peer("vllm", "vllm_load", folder, "--ids", file, "--weight-only")
    assert row["ok"], row
    text = [int(word) for word in file.read_text().split(",")]
    with open_llm(folder) as llm:
        ours, tokens = nll(llm, [text], 1)
    assert tokens == row["nll_tokens"] >= LEAST_TOKENS
    assert math.isclose(ours, row["nll"], rel_tol=NLL_RTOL)


@pytest.mark.parametrize("name", ["hybrid-chat-mtp", "stories-hybrid-moe", "smollm2"])
def test_llamacpp_thinks_the_same_of_a_text(
    peer: Peer, make: Make, tmp_path: Path, name: str
) -> None:
    need("llamacpp")
    if not peer("llamacpp", "gguf_perplexity")[0]["is_built"]:
        pytest.skip("no llama-perplexity: run peers/gguf_perplexity.py --build in llamacpp")
    folder = make(name, RECIPE, "modelopt").path
    text = tmp_path / "text.txt"
    text.write_text(3 * STORY.read_text("utf-8"), encoding="utf-8")
    with Checkpoint.open(folder) as checkpoint:
        write_gguf(checkpoint, tmp_path / "x.gguf", threads=2)
    [row] = peer("llamacpp", "gguf_perplexity", tmp_path / "x.gguf", text, "--length", LENGTH)
    assert row["ok"], row
    with open_llm(folder) as llm:
        encoded = llm.tokenizer.encode(text.read_text("utf-8"))
        cut = make_windows(encoded, LENGTH, "llamacpp", bos=llm.tokenizer.bos_id)
        ours, tokens = nll(llm, [window.tokens.tolist() for window in cut], cut[0].first_scored)
    assert tokens == row["tokens"] >= LEAST_TOKENS
    assert math.isclose(ours, row["nll"], rel_tol=NLL_RTOL)
