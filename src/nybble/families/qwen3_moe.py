"""Qwen3 with experts (30B-A3B, 235B-A22B): no shared expert; the config may make layers dense."""

from __future__ import annotations

from nybble.families import parts
from nybble.families.dimensions import EXPERTS, SPARSE_STEP
from nybble.families.family import Family

FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3 mixture of experts",
    architectures=("Qwen3MoeForCausalLM",),
    prefixes=parts.TEXT,
    claims=(
        *parts.ends(),
        *parts.attention(),
        *parts.attention_norms(),
        *parts.attention_biases(),
        *parts.split_experts("sparse"),
        *parts.stacked_experts("sparse"),
        *parts.router("sparse"),
        *parts.mlp("dense"),
        *parts.layer_norms(),
    ),
    reads=frozenset({EXPERTS, SPARSE_STEP}),
)
