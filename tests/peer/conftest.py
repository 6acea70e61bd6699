"""Fixtures of the peer tests: every model, checkpoint and reference is made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from peer_harness import Made, Make, Peer, make_model, recipe_of, run_peer

from nybble.api.quantize import quantize

ByName = Callable[[str], Path]


@pytest.fixture(scope="session")
def peer() -> Peer:
    """Call a runner: peer(ENVIRONMENT, RUNNER, *ARGUMENTS) -> its rows."""
    return run_peer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ByName:
    """A model folder by name."""

    @cache
    def get(name: str) -> Path:
        return make_model(name, tmp_path_factory.mktemp(name) / name)

    return get


@pytest.fixture(scope="session")
def ids(model: ByName, tmp_path_factory: pytest.TempPathFactory) -> ByName:
    """By model: a file with the ids of story.txt (over 600) in the model's own tokenizer."""
    text = Path(__file__).with_name("story.txt").read_text("utf-8")

    @cache
    def get(name: str) -> Path:
        tokenizers = pytest.importorskip("tokenizers")
        tokenizer = tokenizers.Tokenizer.from_file(str(model(name) / "tokenizer.json"))
        file = tmp_path_factory.mktemp("ids") / name
        file.write_text(",".join(map(str, tokenizer.encode(text).ids)))
        return file

    return get


@pytest.fixture(scope="session")
def make(model: ByName, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Quantize a model with a recipe into a layout, all by name."""

    @cache
    def get(name: str, recipe: str, layout: str) -> Made:
        out = tmp_path_factory.mktemp("made") / f"{name}-{recipe}-{layout}"
        return Made(
            out, quantize(model(name), out, recipe_of(recipe), layout=layout, data_free=True).plan
        )

    return get
