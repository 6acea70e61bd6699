"""Thinking told from answer, however a text is cut into parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nybble.api.chat import CLOSE, OPEN, Thinking

PARTS = st.lists(st.sampled_from(["a", " ", "\n", "<", "think", ">", "/", OPEN, CLOSE, "x <b>"]))


def told(parts: list[str], *, is_open: bool) -> tuple[str, str]:
    """What is thought, and what is said."""
    split = Thinking(is_open)
    pieces = [piece for part in parts for piece in split.push(part)] + split.finish()
    assert all(piece.text for piece in pieces)
    order = [piece.is_thinking for piece in pieces]
    assert order == sorted(order, reverse=True)  # thinking comes first, once
    thought = "".join(piece.text for piece in pieces if piece.is_thinking)
    return thought, "".join(piece.text for piece in pieces if not piece.is_thinking)


def whole(text: str, *, is_open: bool) -> tuple[str, str]:
    """The definition, on the text as a whole."""
    if not is_open:
        if not text.lstrip().startswith(OPEN):
            return "", text
        text = text.lstrip().removeprefix(OPEN)
    thought, tag, answer = text.partition(CLOSE)
    return (thought.strip(), answer.lstrip()) if tag else (thought.lstrip(), "")


@given(PARTS, st.booleans())
def test_any_cut_gives_what_the_whole_text_gives(parts: list[str], is_open: bool) -> None:
    assert told(parts, is_open=is_open) == whole("".join(parts), is_open=is_open)


@given(st.text(alphabet="ab <>/\nthink", max_size=40), st.booleans())
def test_single_characters_give_what_the_whole_text_gives(text: str, is_open: bool) -> None:
    assert told(list(text), is_open=is_open) == whole(text, is_open=is_open)


def test_text_without_tags_is_not_held_back() -> None:
    split = Thinking(is_open=False)
    assert [piece.text for part in ("Once ", "upon") for piece in split.push(part)] == [
        "Once ",
        "upon",
    ]


def test_tags_in_the_middle_are_text() -> None:
    assert told(["Write <think> and </think>."], is_open=False) == (
        "",
        "Write <think> and </think>.",
    )
