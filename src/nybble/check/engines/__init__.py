"""Replays of what engines do when they load a checkpoint: one file per engine.

Headers and configurations are enough. An engine is a row of `ENGINES`; its file names the version
that its rules were read of, and the functions they were read in. Nothing of an engine is imported.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from nybble.check.engines.replayed import (
    Built,
    Change,
    Engine,
    Replay,
    Unfit,
    is_before,
    version_key,
)
from nybble.errors import RecipeError

__all__ = ["NAMES", "Built", "Change", "Engine", "Replay", "Unfit", "engines", "find_engine"]

#: Engine -> the module of this package that replays it; each of them has an `ENGINE`.
NAMES: dict[str, str] = {
    "vllm": "vllm",
    "sglang": "sglang",
    "trtllm": "trtllm",
    "llamacpp": "llamacpp",
    "transformers": "transformers",
}


@cache
def engines() -> dict[str, Engine]:
    """All engines by name, in the order of `NAMES`."""
    found = {}
    for name, module in NAMES.items():
        if find_spec(f"{__name__}.{module}") is not None:
            engine: Engine = import_module(f"{__name__}.{module}").ENGINE
            found[name] = engine
    return found


def find_engine(spelling: str) -> tuple[Engine, str]:
    """The engine and version that "vllm" or "vllm@0.31" mean; version "" is the newest known.

    Raises RecipeError for an unknown engine, and for a version that no rule was read of.
    """
    name, at, version = spelling.strip().partition("@")
    engine = engines().get(name.lower())
    if engine is None:
        raise RecipeError(
            f"engine {name!r} is not known: expected one of {', '.join(engines())}, with a version "
            "if need be, as in vllm@0.31"
        )
    version = version.removeprefix("v")
    if at and not version_key(version):
        raise RecipeError(f"engine {spelling!r}: expected a version after @, as in vllm@0.31")
    if is_before(version, engine.oldest):
        raise RecipeError(
            f"engine {spelling!r}: the rules known here begin with {engine.name} {engine.oldest}; "
            f"they were read of {engine.newest}. Name a version from there on, or none"
        )
    return engine, version
