"""Qwen3 with experts: attention with head norms; config.json says if router weights sum to one."""

from __future__ import annotations

from nybble.models.network import Architecture

ARCHITECTURE = Architecture("qwen3_moe", has_head_norms=True, normalises_experts=None)
