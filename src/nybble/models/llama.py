"""Llama and what shares its code: plain attention, a dense MLP."""

from __future__ import annotations

from nybble.models.network import Architecture

ARCHITECTURE = Architecture("llama")
