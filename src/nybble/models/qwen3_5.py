"""Qwen3.5, 3.6 and 3.8 with a dense MLP: gated DeltaNet and gated attention."""

from __future__ import annotations

from nybble.models.network import Architecture

ARCHITECTURE = Architecture(
    "qwen3_5", norm_offset=1.0, has_head_norms=True, has_gated_attention=True
)
