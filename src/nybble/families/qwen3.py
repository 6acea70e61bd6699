"""Qwen3 dense: query and key norms, no biases in the published models."""

from __future__ import annotations

from nybble.families import parts
from nybble.families.family import Family

FAMILY = Family(
    model_type="qwen3",
    title="Qwen3 dense",
    architectures=("Qwen3ForCausalLM",),
    prefixes=parts.TEXT,
    claims=(
        *parts.ends(),
        *parts.attention(),
        *parts.attention_norms(),
        *parts.attention_biases(),
        *parts.mlp(),
        *parts.layer_norms(),
    ),
)
