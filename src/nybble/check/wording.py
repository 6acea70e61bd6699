"""Counts and first examples in the sentences of findings."""

from __future__ import annotations

from collections.abc import Iterable


def first_of(names: Iterable[str], count: int) -> str:
    """ "X" or "the first of them X", for messages."""
    name = next(iter(names))
    return name if count == 1 else f"the first {name}"


def plural(count: int, noun: str) -> str:
    """ "1 tensor", "2 tensors"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("ry") else f"{count:,} {noun}s"
