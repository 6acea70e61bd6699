"""The list of all rules, in the order of their ids."""

from __future__ import annotations

from nybble.check import (
    behaviour,
    completeness,
    declared,
    files,
    files_lock,
    naming,
    replay,
    scales,
)
from nybble.check.rule import Rule

RULES: tuple[Rule, ...] = tuple(
    sorted(
        (
            *files.RULES,
            *files_lock.RULES,
            *completeness.RULES,
            *scales.RULES,
            *declared.RULES,
            *naming.RULES,
            *behaviour.RULES,
            *replay.RULES,
        ),
        key=lambda rule: rule.id,
    )
)
