"""Rules about scales and other values (NB2xx); those of each kind stand in a file of their own."""

from __future__ import annotations

from nybble.check import (
    scales_blocks,
    scales_fused,
    scales_plausible,
    scales_unusable,
    scales_weights,
)
from nybble.check.rule import Rule

RULES: tuple[Rule, ...] = (
    *scales_unusable.RULES,
    *scales_blocks.RULES,
    *scales_fused.RULES,
    *scales_plausible.RULES,
    *scales_weights.RULES,
)
