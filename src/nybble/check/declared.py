"""Rules about what the configuration files declare, against each other and the tensors (NB3xx)."""

from __future__ import annotations

from nybble.check import (
    declared_files,
    declared_groups,
    declared_inputs,
    declared_modules,
    declared_words,
)
from nybble.check.rule import Rule

RULES: tuple[Rule, ...] = (
    *declared_files.RULES,
    *declared_words.RULES,
    *declared_modules.RULES,
    *declared_inputs.RULES,
    *declared_groups.RULES,
)
