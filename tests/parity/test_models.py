"""Every architecture against transformers: logits of prefill and decode, in float32.

Random small models whose dimensions all differ, random norm weights, value heads twice and three
times the key heads, prompts of more than one 64-token chunk with a ragged tail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from nybble.checkpoint.reader import Checkpoint
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.rope import image_positions
from nybble.models.sequence import SequenceState
from nybble.models.state import make_batch

#: The issue of parity in float32: sums of a few hundred products in two orders, logits of size 1.
TOLERANCE = 1e-4
F32 = Mode(Compute("f32", 2))
ROPE = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
HYBRID = {"dtype": "F32", "rope_parameters": ROPE, "rope_theta": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"dtype": "F32", "num_key_value_heads": 5, "hidden_size": 160}),
    "llama-biased-tied": (
        "llama",
        {"dtype": "F32", "attention_bias": True, "tie_word_embeddings": True, "hidden_size": 160},
    ),
    "llama3-rope": (
        "llama",
        {
            "dtype": "F32",
            "hidden_size": 160,
            "max_position_embeddings": 512,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": ("qwen2", {"dtype": "F32", "head_dim": None, "hidden_size": 160}),
    "qwen2-sliding": (
        "qwen2",
        {
            "dtype": "F32",
            "head_dim": None,
            "hidden_size": 160,
            "use_sliding_window": True,
            "sliding_window": 37,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"dtype": "F32"}),
    "qwen3-yarn": (
        "qwen3",
        {
            "dtype": "F32",
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "max_position_embeddings": 256,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"dtype": "F32", "norm_topk_prob": True, "mlp_only_layers": [1], "num_experts": 5},
    ),
    "qwen3_moe-unnormalised": ("qwen3_moe", {"dtype": "F32", "norm_topk_prob": False}),
    "qwen3_5-ratio-3": ("qwen3_5", HYBRID),
    "qwen3_5_moe-ratio-3": ("qwen3_5_moe", HYBRID),
    "qwen3_5_moe-ratio-2": (
        "qwen3_5_moe",
        {**HYBRID, "linear_num_value_heads": 4, "num_experts": 7, "num_experts_per_tok": 3},
    ),
    "qwen3_5-tied": ("qwen3_5", {**HYBRID, "tie_word_embeddings": True}),
}
LENGTHS = (1, 63, 64, 65, 150)


def peer(folder: Path) -> Any:
    """The model of transformers, float32, experts and attention in their plain form."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config.get_text_config(),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval()


def random_model(folder: Path, family: str, options: dict[str, Any]) -> Path:
    """Norm weights and decays as `tiny` makes them; matrices keep the size of what goes through,
    so that no router saturates and float32 suffices to tell right from wrong."""
    cfg = tiny.config(family, **options)
    values = tiny.tensors(cfg, seed=3)
    rng = np.random.default_rng(5)
    for name, value in values.items():
        if value.ndim > 1:
            size = np.float32(value.shape[-1] ** -0.5)
            values[name] = rng.standard_normal(value.shape, dtype=np.float32) * size
    return tiny.write(folder, cfg, values)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, options = CASES[request.param]
    folder = random_model(tmp_path_factory.mktemp("model"), family, options)
    with Checkpoint.open(folder) as checkpoint:
        yield Model(checkpoint), peer(folder)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 131, (count,), generator=torch.Generator().manual_seed(seed))


def pools(model: Model, sequences: int, page_tokens: int) -> Any:
    pages = model.page_pool(sequences, page_tokens, "f32")
    states = model.state_pool(sequences)
    held = [
        SequenceState(pages.numbers.take(), slots=states.numbers.take()) for _ in range(sequences)
    ]
    return pages, states, held


def run(
    model: Model,
    parts: list[torch.Tensor],
    held: list[SequenceState],
    pages: Any,
    states: Any,
    *,
    is_decode: bool = False,
) -> torch.Tensor:
    batch = make_batch(model.network, parts, held, is_decode=is_decode)
    logits = model.logits(model.forward(batch, pages, states, F32), F32)
    for state, part in zip(held, parts, strict=True):
        state.commit(len(part))
    return logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    size = float(expected.abs().max())
    assert size > 0.01, "the logits are too small to tell anything"
    difference = float((found - expected).abs().max())
    assert difference <= TOLERANCE * max(size, 1.0), (difference, size)


def test_prefill_agrees(pair: Any) -> None:
    model, other = pair
    for length in LENGTHS:
        ids = tokens(length, length)
        pages, states, held = pools(model, 1, length)
        found = run(model, [ids], held, pages, states)
        with torch.inference_mode():
            expected = other(ids[None]).logits[0]
        close(found, expected)


def test_decode_after_prefill_agrees(pair: Any) -> None:
    """Prompt of 70, then 5 tokens one by one through the decode kernels, cache against cache."""
    model, other = pair
    ids = tokens(75)
    pages, states, held = pools(model, 1, 80)
    found = [run(model, [ids[:70]], held, pages, states)]
    for i in range(70, 75):
        found.append(run(model, [ids[i : i + 1]], held, pages, states, is_decode=True))
    with torch.inference_mode():
        cached = other(ids[None, :70], use_cache=True)
        expected = [cached.logits[0]]
        for i in range(70, 75):
            cached = other(
                ids[None, i : i + 1], past_key_values=cached.past_key_values, use_cache=True
            )
            expected.append(cached.logits[0])
    close(torch.cat(found), torch.cat(expected))


def test_positions_of_images_agree(pair: Any) -> None:
    """Three streams of positions, as a prompt with an image of 3 x 4 tokens has them."""
    model, other = pair
    if not model.network.rope.sections:
        expected_error = model.network.architecture.has_gated_attention
        assert not expected_error, "all hybrids here have sections"
        return
    marks = [False] * 20 + [True] * 12 + [False] * 40
    positions, offset = image_positions(marks, [(1, 6, 8)], 2)
    assert offset == 4 - 12
    ids = tokens(len(marks))
    pages, states, held = pools(model, 1, len(marks))
    batch = make_batch(model.network, [ids], held, positions=positions)
    found = model.logits(model.forward(batch, pages, states, F32), F32)
    with torch.inference_mode():
        expected = other(ids[None], position_ids=positions[:, None]).logits[0]
        plain = other(ids[None]).logits[0]
    close(found, expected)
    assert float((expected - plain).abs().max()) > 10 * TOLERANCE


def test_a_ragged_batch_is_its_sequences_bitwise(pair: Any) -> None:
    model, _ = pair
    parts = [tokens(n, n) for n in (3, 130, 64, 1)]
    pages, states, held = pools(model, 4, 140)
    together = run(model, parts, held, pages, states).split([len(p) for p in parts])
    for part, found in zip(parts, together, strict=True):
        pages, states, held = pools(model, 1, 140)
        alone = run(model, [part], held, pages, states)
        assert torch.equal(found, alone)


def test_chunks_at_multiples_of_64_are_the_whole_bitwise(pair: Any) -> None:
    model, _ = pair
    ids = tokens(150)
    pages, states, held = pools(model, 1, 150)
    whole = run(model, [ids], held, pages, states)
    pages, states, held = pools(model, 1, 150)
    parts = [run(model, [p], held, pages, states) for p in (ids[:64], ids[64:128], ids[128:])]
    assert torch.equal(torch.cat(parts), whole)
