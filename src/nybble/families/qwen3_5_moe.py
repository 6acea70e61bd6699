"""Qwen3.5 and 3.6 with experts: hybrid layers, 3-D expert stacks, MTP head, vision tower.

Published BF16 checkpoints stack the experts; quantized ones, and what transformers saves of a model
built from a config, have them one by one.
"""

from __future__ import annotations

from nybble.families import parts
from nybble.families.dimensions import EXPERTS, HYBRID, MTP, SHARED_EXPERT, VISION
from nybble.families.family import Family

_FEED_FORWARD = (
    *parts.stacked_experts(),
    *parts.split_experts(),
    *parts.router(),
    *parts.shared_expert(),
    *parts.layer_norms(),
)

FAMILY = Family(
    model_type="qwen3_5_moe",
    title="Qwen3.5 / 3.6 mixture of experts",
    architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
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
    reads=frozenset({HYBRID, EXPERTS, SHARED_EXPERT, MTP, VISION}),
)
