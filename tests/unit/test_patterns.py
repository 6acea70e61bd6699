"""Patterns of a checkpoint: those that engines' files use are taken, those that hang are not."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from nybble.checkpoint.patterns import compile_pattern

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"


@pytest.mark.parametrize(
    "pattern",
    [
        r"^mtp.*",
        r".*layers\.\d+\.mlp\.up_proj$",
        r".*layers\.(5[6-9]|6[0-3])\.mlp\..*",
        r"model\.(language_model\.)?layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r"(?:[a-z_]+\.)+mlp",
        r"(\d+\.)*x",
        r".*\.(visual|mtp)\..*",
        r"[^.]+\.layers\.[0-9]+\.(linear_attn|self_attn)\.\w+",
        r"a{1,3}b",
        r"(a|b|c)*x",
        r"(\w|_)*!",  # one class
    ],
)
def test_ordinary_patterns_are_taken(pattern: str) -> None:
    assert compile_pattern(pattern).pattern == pattern


def test_every_published_pattern_is_taken() -> None:
    patterns = {
        entry[3:]
        for file in CONFIGS.rglob("*.json")
        for entry in _strings(json.loads(file.read_text()))
        if entry.startswith("re:")
    }
    assert patterns
    for pattern in patterns:
        compile_pattern(pattern)


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [s for v in value.values() for s in _strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(\w+\.?)*!",
        r"(.*)*x",
        r"(a|aa)*b",
        r"((a*)b*)*c",
        r"(?:(?:x+x+)+)+y",
        r".*.*.*.*.*.*x",
        r"(a|a)*b",
        r"([a-z.]+\.)+!",
        r"a" * 5000,
        "(" * 3000 + ")" * 3000,
    ],
)
def test_what_may_hang_is_refused(pattern: str) -> None:
    begun = time.monotonic()
    with pytest.raises(re.error):
        compile_pattern(pattern)
    assert time.monotonic() - begun < 60  # measured: under 1 ms; a pattern that hangs never ends


@pytest.mark.parametrize("pattern", ["(", "*", "[", "(?P<x", "a{2,1}", "\\"])
def test_malformed_patterns_are_errors(pattern: str) -> None:
    with pytest.raises(re.error):
        compile_pattern(pattern)
