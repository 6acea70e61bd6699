"""Qwen2 and Qwen2.5 dense: biases on q, k and v, always, and on nothing else."""

from __future__ import annotations

from nybble.families import parts
from nybble.families.dimensions import CLASSIC_HEADS
from nybble.families.family import Family

FAMILY = Family(
    model_type="qwen2",
    title="Qwen2 / 2.5 dense",
    architectures=("Qwen2ForCausalLM",),
    prefixes=parts.TEXT,
    claims=(
        *parts.ends(),
        *parts.attention(),
        *parts.attention_biases(needed="always", output=False),
        *parts.mlp(),
        *parts.layer_norms(),
        *parts.rotary_tables(),
    ),
    reads=frozenset({CLASSIC_HEADS}),
)
