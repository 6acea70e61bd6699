"""An LLM's log-probabilities against transformers: those of prompts, and of what it generates.

The models and the tolerance are those of test_models.py; here they go through tokens, chunks,
pages, programs and the sampler, as callers get them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from fake_runner import letters
from nybble import LLM, SamplingParams
from nybble.kernels import dispatch

#: Of the largest logit: sums of a few hundred products in two orders, in float32.
TOLERANCE = 1e-4
CONTEXT = 400
ROPE = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
PLAIN = {"dtype": "F32", "max_position_embeddings": CONTEXT}
HYBRID = PLAIN | {"rope_parameters": ROPE, "rope_theta": None}
CASES: dict[str, dict[str, Any]] = {
    "llama": PLAIN | {"hidden_size": 160},
    "qwen2": PLAIN | {"head_dim": None, "hidden_size": 160},
    "qwen3": PLAIN,
    "qwen3_moe": PLAIN | {"norm_topk_prob": True, "num_experts": 5},
    "qwen3_5": HYBRID,
    "qwen3_5_moe": HYBRID | {"num_experts": 7, "num_experts_per_tok": 3},
}
LENGTHS = (1, 2, 64, 150, 65, 300)
NEW = 9

needs_library = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")


def random_model(folder: Path, family: str) -> Path:
    """Matrices that keep the size of what goes through, so that float32 suffices."""
    cfg = tiny.config(family, **CASES[family])
    values = tiny.tensors(cfg, seed=3)
    rng = np.random.default_rng(5)
    for name, value in values.items():
        if value.ndim > 1:
            size = np.float32(value.shape[-1] ** -0.5)
            values[name] = rng.standard_normal(value.shape, dtype=np.float32) * size
    tiny.write(folder, cfg, values)
    letters(folder)
    return folder


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "m", request.param)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    sizes: dict[str, Any] = {"max_sequences": 4, "max_batched_tokens": 200, "memory": 0.01}
    with LLM(folder, precision="f32", kv_cache_dtype="f32", threads=2, **sizes) as made:
        yield made


@pytest.fixture(scope="module")
def other(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder).get_text_config()
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    made = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **plain)
    made.generation_config.eos_token_id = None  # it would have to be banned
    return made.eval()


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def close(found: Any, expected: Any, logits: torch.Tensor) -> None:
    size = max(1.0, float(logits.abs().max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * size)


@needs_library
def test_of_prompts(llm: LLM, other: Any) -> None:
    asked = prompts(llm.limits.vocab)
    done = llm.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=3))
    for ids, completion in zip(asked, done, strict=True):
        found = completion.prompt_logprobs
        assert found is not None
        assert found.logprobs[0] is None
        if len(ids) == 1:
            continue
        with torch.inference_mode():
            logits = other(torch.tensor([ids])).logits[0, :-1].double()
        expected = torch.log_softmax(logits, -1)
        wanted = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        close(np.array(found.logprobs[1:], dtype=float), wanted, logits)
        top = torch.tensor([[a.logprob for a in three] for three in found.top[1:]])
        close(top, expected.topk(3).values, logits)


@needs_library
def test_of_what_is_generated(llm: LLM, other: Any) -> None:
    """Greedily, against transformers' own `generate`: a cache against a cache."""
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=2)
    asked = prompts(llm.limits.vocab)
    for ids, completion in zip(asked, llm.generate(asked, params), strict=True):
        with torch.inference_mode():
            made = other.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        theirs = made.sequences[0, len(ids) :].tolist()
        logits = torch.cat(made.logits).double()
        rows = torch.log_softmax(logits, -1)
        alternatives = completion.choices[0].top
        for i, (token, row) in enumerate(zip(completion.tokens, rows, strict=True)):
            close(completion.logprobs[i], row[token], logits)
            close([a.logprob for a in alternatives[i]], row.topk(2).values, logits)
            if token != theirs[i]:  # a tie, after which the texts are others
                close(row[theirs[i]], row[token], logits)
                break
