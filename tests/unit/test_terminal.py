"""What a model writes cannot steer the terminal that shows it."""

from __future__ import annotations

import io
import unicodedata

import pytest

from nybble.cli.terminal import has_colours, shown


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_control_character_reaches_a_terminal() -> None:
    every = "".join(map(chr, range(0x110000 - 0x800)))
    seen = shown(every, Screen())
    assert len(seen) == len(every)
    assert {c for c in seen if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    assert shown("\x1b[2J\x9b", Screen()) == "\u241b[2J\ufffd"


def test_files_and_pipes_get_the_text_itself() -> None:
    assert shown("\x1b[2J\r\n\x9b", io.StringIO()) == "\x1b[2J\r\n\x9b"


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colours(Screen())
    assert not has_colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Screen())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colours(Screen())
