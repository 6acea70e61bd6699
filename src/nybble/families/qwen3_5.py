"""Qwen3.5, 3.6 and 3.8 with a dense MLP: hybrid layers, MTP head, vision tower."""

from __future__ import annotations

from nybble.families import parts
from nybble.families.dimensions import HYBRID, MTP, VISION
from nybble.families.family import Family

_FEED_FORWARD = (*parts.mlp(), *parts.layer_norms())

FAMILY = Family(
    model_type="qwen3_5",
    title="Qwen3.5 / 3.6 / 3.8 dense",
    architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    prefixes=parts.LANGUAGE,
    claims=(
        *parts.ends(),
        *parts.attention("full_attention", query="gated_query"),
        *parts.attention_norms("full_attention"),
        *parts.attention_biases(layers="full_attention", query="gated_query"),
        *parts.gated_delta(),
        *_FEED_FORWARD,
        *parts.mtp(
            (*parts.attention(query="gated_query"), *parts.attention_norms(), *_FEED_FORWARD)
        ),
        *parts.vision(),
    ),
    reads=frozenset({HYBRID, MTP, VISION}),
)
