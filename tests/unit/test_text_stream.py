"""Text is cut at the stop that is complete first, however it is split into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.request import SamplingParams
from nybble.engine.text_stream import Decoder, TextStream, spellings
from nybble.text.tokenizer import Tokenizer

MODELS = Path(__file__).parents[2] / "models"
CHAT = MODELS / "hybrid-chat-mtp"


class Pieces:
    """A tokenizer whose token i is the i-th piece of a text; the last characters of `late` pieces
    come with the next token, as those of unfinished characters do."""

    def __init__(self, pieces: Sequence[str], late: Sequence[bool] = ()) -> None:
        self.pieces, self.late = pieces, late or [False] * len(pieces)

    def stream(self) -> Decoder:
        return _PieceStream(self)

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


class _PieceStream:
    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._held = pieces, ""

    def push(self, token: int) -> str:
        text = self._held + self._pieces.pieces[token]
        self._held = text[-1:] if self._pieces.late[token] else ""
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def whole(text: str, stops: Sequence[str], include: bool, begin: int = 0) -> tuple[str, bool]:
    """Search the whole text: the stop that ends first at or behind `begin`, then the longest."""
    ends = [
        (at + len(stop), at)
        for stop in stops
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > begin
    ]
    if not ends:
        return text, False
    end, start = min(ends)
    return text[: end if include else start], True


def streamed(pieces: Pieces, params: SamplingParams) -> tuple[list[str], bool]:
    """What is shown, token by token, until it stops or ends."""
    stream = TextStream(pieces, params)
    shown = []
    for token in range(len(pieces.pieces)):
        text, is_stopped = stream.push(token)
        shown.append(text)
        if is_stopped:
            assert stream.finish() == ""
            assert stream.push(0) == ("", True)
            return shown, True
    shown.append(stream.finish())
    return shown, False


LETTERS = st.text("ab ", max_size=40)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def split(text: str, cuts: set[int]) -> list[str]:
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(LETTERS, STOPS, st.booleans(), st.sets(st.integers(0, 40)), st.data())
def test_any_split_reads_as_the_whole(
    text: str, stops: list[str], include: bool, cuts: set[int], data: st.DataObject
) -> None:
    pieces = split(text, cuts)
    late = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    params = SamplingParams(stop=tuple(stops), include_stop=include)
    shown, _ = streamed(Pieces(pieces, late), params)
    assert "".join(shown) == whole(text, stops, include)[0]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LETTERS, STOPS, st.sets(st.integers(0, 40)), st.integers(0, 6))
def test_stops_within_the_first_tokens_do_not_count(
    text: str, stops: list[str], cuts: set[int], least: int
) -> None:
    pieces = split(text, cuts)
    begin = len("".join(pieces[:least]))
    params = SamplingParams(stop=tuple(stops), min_tokens=least)
    shown, is_stopped = streamed(Pieces(pieces), params)
    assert ("".join(shown), is_stopped) == whole(text, stops, False, begin)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LETTERS, STOPS)
def test_no_more_is_held_than_could_be_a_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(Pieces(list(text)), SamplingParams(stop=tuple(stops)))
    shown = ""
    for token in range(len(text)):
        new, is_stopped = stream.push(token)
        shown += new
        if is_stopped:
            return
        held = text[len(shown) : token + 1]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text[: token + 1].endswith(stop[:n])),
            default=0,
        )
        assert len(held) == longest


def test_the_stop_that_is_complete_first_counts() -> None:
    for stops, shown in (
        (("bcd", "c"), "ab"),
        (("c", "bc"), "a"),
        (("bcd", "cdx"), "a"),
        (("x",), "abcde"),
    ):
        found, _ = streamed(Pieces(["abcde"]), SamplingParams(stop=stops))
        assert "".join(found) == shown


def test_a_stop_of_a_thousand_characters_costs_no_time_per_token() -> None:
    """The worst text for a search that starts over: each character is compared about once."""
    stop = "a" * 999 + "b"
    text = "a" * 20_000
    found, _ = streamed(Pieces(list(text)), SamplingParams(stop=(stop,) * 4))
    assert "".join(found) == text
    assert [len(piece) for piece in found[:-1]].count(1) == len(text) - 999


@pytest.mark.parametrize("stop", ["def", " return", "🙂", "\n"])
def test_real_tokens(stop: str) -> None:
    tokenizer = Tokenizer.open(CHAT)
    text = "Some words 🙂 in defence\nof  a return, naïvely."
    ids = tokenizer.encode(text)
    for include in (False, True):
        stream = TextStream(tokenizer, SamplingParams(stop=(stop,), include_stop=include))
        shown, is_stopped = "", False
        for token in ids:
            new, is_stopped = stream.push(token)
            shown += new
            if is_stopped:
                break
        assert (shown, is_stopped) == whole(text, [stop], include)


def test_without_a_stop_the_text_is_what_the_tokens_decode_to() -> None:
    tokenizer = Tokenizer.open(CHAT)
    ids = tokenizer.encode("naïve 🙂🙂 text")[:-1]
    stream = TextStream(tokenizer, SamplingParams())
    assert "".join(stream.push(t)[0] for t in ids) + stream.finish() == tokenizer.decode(ids)


def test_bad_words_are_spelled_with_and_without_a_space() -> None:
    found = list(spellings(Pieces([]), ("ab", " c")))
    assert found == [tuple(map(ord, text)) for text in ("ab", " ab", "c", " c")]
