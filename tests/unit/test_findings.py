"""Findings for machines: what their readers require of every line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote

import pytest

from nybble.api.check import RULES, Checked
from nybble.cli.findings import sarif


def place_of(file: str) -> str:
    finding = RULES[0].finding("a message", file=file)
    log = cast(Any, sarif(cast(Checked, SimpleNamespace(findings=[finding], where="."))))
    (result,) = log["runs"][0]["results"]
    return str(result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"])


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("", "config.json"),
        ("sub/model.safetensors", "sub/model.safetensors"),
        ("my model.json", "my%20model.json"),
        ("a:b.json", "a%3Ab.json"),  # or it were an address of the scheme a
        ("50%.json", "50%25.json"),
        ("what?#.json", "what%3F%23.json"),
    ],
)
def test_a_place_is_a_relative_uri(file: str, uri: str) -> None:
    assert place_of(file) == uri


@pytest.mark.parametrize("file", ["größe.json", "模型.json", "a b%c.json"])
def test_a_place_leads_back_to_the_file(file: str) -> None:
    assert place_of(file).isascii()
    assert unquote(place_of(file)) == file


def test_a_name_that_is_no_text_has_a_place() -> None:
    assert place_of("\udcff.json").isascii()
