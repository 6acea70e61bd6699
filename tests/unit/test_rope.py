"""Frequencies of every rope type, and positions of images, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen3_5Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model, Qwen3_5TextRotaryEmbedding

from nybble.errors import ModelError
from nybble.models.rope import Rope, image_positions, read_rope

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-tuned": {
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
}
#: The same float32 formula in another order of operations.
EXACT = 1e-6


@pytest.mark.parametrize("case", SCALED)
def test_frequencies_agree(case: str) -> None:
    kind = case.partition("-")[0]
    settings_ = {"rope_type": kind, "rope_theta": 50_000.0, **SCALED[case]}
    text = {"max_position_embeddings": 4096, "rope_parameters": settings_}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=settings_,
    )
    expected, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    found = read_rope(text, 64)
    assert torch.allclose(found.inverse, expected, rtol=EXACT, atol=0)
    assert found.scaling == pytest.approx(scaling)


def test_the_old_spelling_says_the_same() -> None:
    new = read_rope({"rope_parameters": {"rope_theta": 7e4, "partial_rotary_factor": 0.25}}, 64)
    old = read_rope({"rope_theta": 7e4, "partial_rotary_factor": 0.25, "rope_scaling": None}, 64)
    assert torch.equal(new.inverse, old.inverse)
    assert len(new.inverse) == 8


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"type": "su"}, "su"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor"),
        ({"mrope_section": [11, 11, 11]}, "sums to 33"),
        ({"mrope_section": [16, 8, 8], "mrope_interleaved": False}, "mrope_interleaved"),
    ],
)
def test_what_is_unknown_is_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_rope({"rope_parameters": settings_}, 64)


def qwen_config() -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e5,
        "partial_rotary_factor": 0.5,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    return Qwen3_5Config(
        text_config={"head_dim": 64, "rope_parameters": rope, "num_hidden_layers": 1},
        vision_config={"depth": 1, "spatial_merge_size": 2},
    )


def test_interleaved_tables_agree() -> None:
    config = qwen_config().text_config
    positions = torch.randint(0, 900, (3, 50), generator=torch.Generator().manual_seed(0))
    cos, sin = Qwen3_5TextRotaryEmbedding(config)(torch.zeros(1), positions[:, None])
    rope: Rope = read_rope({"rope_parameters": dict(config.rope_parameters)}, 64)
    found = rope.tables(positions)
    half = cos.shape[-1] // 2
    assert torch.allclose(found[0], cos[0, :, :half], atol=EXACT)
    assert torch.allclose(found[1], sin[0, :, :half], atol=EXACT)


PIECES = st.lists(
    st.one_of(
        st.integers(1, 9),
        st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(PIECES)
def test_image_positions_agree(pieces: list[Any]) -> None:
    """Texts and images in any order; two images side by side too, parted by a token as they are."""
    kinds: list[int] = []
    grids = []
    for piece in pieces:
        if isinstance(piece, int):
            kinds += [0] * piece
        else:
            kinds += [0] + [1] * (piece[1] * piece[2])
            grids.append((1, 2 * piece[1], 2 * piece[2]))
    positions, offset = image_positions([k == 1 for k in kinds], grids, 2)
    peer = Qwen3_5Model.get_rope_index(
        _Holder(qwen_config()),
        torch.zeros((1, len(kinds)), dtype=torch.int64),
        torch.tensor([kinds]),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    assert torch.equal(positions, peer[0][:, 0])
    assert offset == int(peer[1])


class _Holder:
    """What get_rope_index asks of its model."""

    def __init__(self, config: Any) -> None:
        self.config = config

    get_vision_position_ids = Qwen3_5Model.get_vision_position_ids


def test_marks_and_grids_must_fit() -> None:
    with pytest.raises(ModelError, match="fewer are marked"):
        image_positions([False, True, True], [(1, 4, 4)], 2)
    with pytest.raises(ModelError, match="only 0 grids"):
        image_positions([True], [], 2)
    with pytest.raises(ModelError, match="fewer images"):
        image_positions([False], [(1, 2, 2)], 2)
