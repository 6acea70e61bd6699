"""Qwen2 and 2.5: attention with biases on query, key and value, a dense MLP."""

from __future__ import annotations

from nybble.models.network import Architecture

ARCHITECTURE = Architecture("qwen2", qkv_bias=True)
