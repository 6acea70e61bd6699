"""`nybble eval --drafts` as people and scripts meet it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from nybble.api.acceptance import acceptance
from nybble.api.quantize import quantize
from nybble.cli import app

CHAT, STORIES = tiny.MODELS / "hybrid-chat-mtp", tiny.MODELS / "stories-hybrid-moe"
SHORT = ("--windows", 4, "--length", 128, "--threads", 1)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trunk and head in four bits."""
    out = tmp_path_factory.mktemp("packed") / "nvfp4"
    quantize(CHAT, out, "nvfp4-mtp", search="absmax", jobs=1)
    return out


def test_the_guesses_of_both_heads_are_compared_on_the_text_of_the_divergence(packed: Path) -> None:
    told = run("eval", packed, "--reference", CHAT, "--drafts", "--json", *SHORT)
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    assert document["schema"] == "nybble.eval/1"
    found = document["drafts"]
    assert found["schema"] == "nybble.acceptance/1"
    assert (found["before_model"], found["after_model"]) == (str(CHAT), str(packed))
    assert (found["windows"], found["positions"]) == (4, 4 * 127)
    assert found["text_sha256"] == document["conditions"]["text_sha256"]
    before, after = (found[name]["value"] for name in ("before", "after"))
    assert 0.1 < before < 0.9
    assert found["difference"]["value"] == pytest.approx(after - before)
    assert found["same_trunk"] < 1  # the quantized trunk was run, not the reference twice
    library = acceptance(CHAT, packed, windows=4, length=128, threads=1)
    assert library.as_json() == found
    plain = run("eval", packed, "--reference", CHAT, "--json", *SHORT)
    assert "drafts" not in json.loads(plain.stdout)


def test_the_table_has_them_below_the_divergence(packed: Path) -> None:
    told = run("eval", packed, "--reference", CHAT, "--drafts", *SHORT)
    assert told.exit_code == 0, told.output
    assert told.stdout.index("KL, mean") < told.stdout.index("drafts accepted before")
    assert "508" in told.stdout


def test_what_has_no_head_is_refused_before_the_long_part(packed: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "pack.json").write_text("{}")
    headless = tmp_path / "headless"
    shutil.copytree(STORIES, headless)
    for candidate, reference, words in (
        (headless, headless, "headless: has no MTP head"),
        (packed, pack, "is a reference pack, which has no MTP head"),
    ):
        told = run("eval", candidate, "--reference", reference, "--drafts", *SHORT)
        assert words in str(told.exception)
        assert told.stdout == ""
