"""Llama and what is built like it: biases by configuration, rotary tables in old exports."""

from __future__ import annotations

from nybble.families import parts
from nybble.families.dimensions import CLASSIC_HEADS
from nybble.families.family import Family

FAMILY = Family(
    model_type="llama",
    title="Llama",
    architectures=("LlamaForCausalLM",),
    prefixes=parts.TEXT,
    claims=(
        *parts.ends(),
        *parts.attention(),
        *parts.attention_biases(),
        *parts.mlp(),
        *parts.mlp_biases(),
        *parts.layer_norms(),
        *parts.rotary_tables(),
    ),
    reads=frozenset({CLASSIC_HEADS}),
)
