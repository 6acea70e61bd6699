"""Qwen3.5 and 3.6 with experts: gated DeltaNet and gated attention, routed and shared experts."""

from __future__ import annotations

from nybble.models.network import Architecture

ARCHITECTURE = Architecture(
    "qwen3_5_moe",
    norm_offset=1.0,
    has_head_norms=True,
    has_gated_attention=True,
    has_shared_expert=True,
)
