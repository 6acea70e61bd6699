"""Qwen3: attention with head norms, a dense MLP."""

from __future__ import annotations

from nybble.models.network import Architecture

ARCHITECTURE = Architecture("qwen3", has_head_norms=True)
