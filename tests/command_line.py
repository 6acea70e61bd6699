"""The command line in this process, as a fixture's value: what it returned and what it said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from nybble.cli import main


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Ask = Callable[..., Answer]


def asking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command line with these arguments, on a terminal of 120 columns."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["nybble", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as done:
            code = done.code or 0
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run
