"""The text of tokens that come one by one, up to a stop text.

A stop text may be spread over tokens in any way. What could be its beginning is held back until
the next characters decide; what follows it is never shown. The stop that is complete first counts,
and of those complete at one character the longest: so the result does not depend on how the text
is split.

Knows a tokenizer's decoder; refuses to know stop tokens, which have no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from nybble.engine.request import SamplingParams


class Decoder(Protocol):
    """Text of ids that come one by one: `text.tokenizer.Stream`."""

    def push(self, token: int) -> str:
        """Add one id; the text that is now certain."""
        ...

    def finish(self) -> str:
        """The text still held back."""
        ...


class TextTokenizer(Protocol):
    """What is needed of `text.tokenizer.Tokenizer`."""

    def stream(self) -> Decoder:
        """A new decoder."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """The ids of a text."""
        ...


class TextStream:
    """The text of one choice. Stops complete within its first `min_tokens` tokens do not count."""

    def __init__(self, tokenizer: TextTokenizer, params: SamplingParams) -> None:
        self._decoder = tokenizer.stream()
        self._stops = [_Stop(text) for text in params.stop]
        self._include_stop, self._exempt = params.include_stop, params.min_tokens
        self._held = ""
        self._tokens = 0
        self._is_stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token: the text that can be shown now, and whether a stop text ended it. After
        that there is no further text."""
        self._tokens += 1
        text = "" if self._is_stopped else self._decoder.push(token)
        return self._take(text, can_stop=self._tokens > self._exempt), self._is_stopped

    def finish(self) -> str:
        """The text still held back, when no token follows."""
        if self._is_stopped:
            return ""
        text = self._take(self._decoder.finish(), can_stop=self._tokens >= self._exempt)
        held, self._held = self._held, ""
        return text if self._is_stopped else text + held

    def _take(self, text: str, *, can_stop: bool) -> str:
        """Search new text; what of all the text held can be shown."""
        if not self._stops:
            return text
        known = self._held + text
        for at, character in enumerate(text, len(self._held) + 1):
            # A list, not a generator: every stop must see every character.
            found = [stop.length for stop in self._stops if stop.feed(character)]
            if found and can_stop:
                self._is_stopped, self._held = True, ""
                return known[: at if self._include_stop else at - max(found)]
        shown = len(known) - max(stop.matched for stop in self._stops)
        self._held = known[shown:]
        return known[:shown]


class _Stop:
    """A stop text and how many of its characters the text so far ends with (Knuth, Morris, Pratt:
    Fast Pattern Matching in Strings, 1977)."""

    __slots__ = ("_back", "_text", "length", "matched")

    def __init__(self, text: str) -> None:
        self._text, self.length = text, len(text)
        self.matched = 0
        # [n]: the longest proper beginning of the text that its first n characters end with.
        self._back = [0, 0]
        for character in text[1:]:
            self._back.append(self._next(self._back[-1], character))

    def feed(self, character: str) -> bool:
        """Whether the text is complete with this character."""
        self.matched = self._next(self.matched, character)
        if self.matched < self.length:
            return False
        self.matched = self._back[self.length]
        return True

    def _next(self, matched: int, character: str) -> int:
        while matched and self._text[matched] != character:
            matched = self._back[matched]
        return matched + (self._text[matched] == character)


def spellings(tokenizer: TextTokenizer, words: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """The tokens of bad words, each as it begins a text and as it follows a space.

    Source: vLLM, vllm/sampling_params.py, update_from_tokenizer. vLLM leaves the second out where
    it has more tokens than the first; here both always count.
    """
    for word in words:
        for spelling in (word.lstrip(), " " + word.lstrip()):
            yield tuple(tokenizer.encode(spelling))
