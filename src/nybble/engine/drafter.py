"""Who guesses the next tokens of sequences, for one forward to verify. A wrong guess costs time
and changes no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nybble.engine.runner import Guess, Runner


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence that goes on: its `key`, its tokens so far, how many `drafts` are wanted at
    most (0: only note what is known), and what an MTP head needs to guess; None where its entries
    are lost."""

    key: int
    prompt: Sequence[int]
    output: Sequence[int]
    drafts: int
    guess: Guess | None = None


class Drafter(Protocol):
    """Guesses. `needs_hidden`: whether it must be asked after every forward, of prompts too, since
    what it does not see then is lost to it."""

    @property
    def needs_hidden(self) -> bool:
        """See the class."""
        ...

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """At most `drafts` tokens for each that may follow its output."""
        ...

    def drop(self, key: int) -> None:
        """Forget a sequence."""
        ...


class MtpDrafter:
    """The checkpoint's own multi-token-prediction head."""

    needs_hidden = True

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See Drafter; nothing for those whose entries are lost."""
        able = [ask.guess for ask in asks if ask.guess is not None]
        found = iter(self._runner.guess(able) if able else ())
        return [next(found) if ask.guess is not None else [] for ask in asks]

    def drop(self, key: int) -> None:
        """It keeps nothing of a sequence outside the pools."""


_Words = npt.NDArray[np.uint64]

#: How many last tokens must have stood somewhere before, most first. Of code and prose, what stood
#: after the last place of 1, 2, 3 tokens follows again 0.24, 0.46, 0.58 of the time: one token is
#: not worth a row of a step. Looking for five or six as well makes 0.002 more guesses right.
_GRAMS = (4, 3, 2)

#: Where an n-gram stood takes the low bits of its entry, so that sorted entries of the same n-gram
#: end with the latest; what is left of its hash takes the high bits.
_PLACE_BITS = 24
_PLACES = np.uint64((1 << _PLACE_BITS) - 1)
_FACTOR = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1

#: New n-grams go to a dict, and with all others into one sorted array once they are this many, or
#: this share of it: so each is sorted a bounded number of times, and few are kept the costly way.
_MOST_RECENT = 4096
_RECENT_SHARE = 16


def _piece(prompt: Sequence[int], output: Sequence[int], start: int, end: int) -> list[int]:
    """Tokens of a prompt and its output, from `start` to before `end`."""
    cut = len(prompt)
    return [*prompt[start:end], *output[max(0, start - cut) : max(0, end - cut)]]


def _hash(gram: Sequence[int]) -> int:
    """A hash of an n-gram with the bits of its place zero; that of `_hashes` is the same."""
    code = len(gram)
    for token in gram:
        code = (code + token + 1) * _FACTOR & _WORD
    return code & ~int(_PLACES)


def _hashes(tokens: _Words, size: int) -> _Words:
    """The hashes of all n-grams of `size`, by their first token."""
    count = max(0, len(tokens) - size + 1)
    codes = np.full(count, size, np.uint64)
    for at in range(size):
        codes = (codes + tokens[at : at + count] + np.uint64(1)) * np.uint64(_FACTOR)
    return codes & ~_PLACES


class _Index:
    """Where the n-grams of one text stood last, found in about constant time."""

    def __init__(self) -> None:
        self.length = 0  # n-grams that end before here are known
        self._sorted = np.empty(0, np.uint64)
        self._recent: dict[int, int] = {}

    def extend(self, prompt: Sequence[int], output: Sequence[int], length: int) -> None:
        """Take the n-grams that end before `length`."""
        new = len(_GRAMS) * (length - self.length) + len(self._recent)
        start = max(0, self.length - _GRAMS[0] + 1)
        tokens = _piece(prompt, output, start, length)
        if new > max(_MOST_RECENT, len(self._sorted) // _RECENT_SHARE):
            self._sort(tokens, start)
        else:
            self._note(tokens, start)
        self.length = max(self.length, length)

    def _note(self, tokens: list[int], start: int) -> None:
        for end in range(self.length - start, len(tokens)):
            for size in _GRAMS:
                if size <= end + 1:
                    self._recent[_hash(tokens[end + 1 - size : end + 1])] = start + end

    def _sort(self, tokens: list[int], start: int) -> None:
        text = np.array(tokens, np.uint64)
        parts = [self._sorted]
        if self._recent:
            parts.append(np.array([c | p for c, p in self._recent.items()], np.uint64))
        for size in _GRAMS:
            first = max(0, self.length - start - size + 1)
            codes = _hashes(text[first:], size)
            begin = start + first + size - 1
            parts.append(codes | np.arange(begin, begin + len(codes), dtype=np.uint64))
        self._sorted = np.sort(np.concatenate(parts))
        self._recent = {}

    def find(self, gram: Sequence[int]) -> int | None:
        """Where an n-gram ended last; may be wrong, since hashes may agree by chance."""
        code = _hash(gram)
        found = self._recent.get(code)
        if found is not None:
            return found
        at = int(self._sorted.searchsorted(np.uint64(code | int(_PLACES)), side="right"))
        entry = int(self._sorted[at - 1]) if at else 0
        return entry & int(_PLACES) if at and entry & ~int(_PLACES) == code else None


class NgramDrafter:
    """Prompt lookup: what followed the last few tokens when they stood in the text before, most of
    them first, and of equally many their latest place. (Saxena, Prompt Lookup Decoding, 2023.)

    A place so near the end that too few tokens follow it tells of a text that repeats itself: what
    follows is taken to go on so. Of each token of a text it keeps 24 bytes, and more of the latest.
    """

    needs_hidden = False

    def __init__(self) -> None:
        self._indices: dict[int, _Index] = {}

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See Drafter; nothing where the last two tokens are new."""
        return [self._follow(ask) if ask.drafts > 0 else [] for ask in asks]

    def drop(self, key: int) -> None:
        """Forget a sequence, and free what was kept of it."""
        self._indices.pop(key, None)

    def _follow(self, ask: Ask) -> list[int]:
        prompt, output = ask.prompt, ask.output
        length = len(prompt) + len(output)
        if not _GRAMS[-1] < length <= int(_PLACES):
            return []
        index = self._indices.get(ask.key)
        if index is None or index.length >= length:  # another text under the same key
            index = self._indices[ask.key] = _Index()
        index.extend(prompt, output, length - 1)  # not the last n-grams: they would find themselves
        end = _match(index, prompt, output)
        if end is None:
            return []
        drafts = _piece(prompt, output, end + 1, min(length, end + 1 + ask.drafts))
        period = length - 1 - end
        while len(drafts) < ask.drafts:
            drafts.append(drafts[-period])
        return drafts


def _match(index: _Index, prompt: Sequence[int], output: Sequence[int]) -> int | None:
    """Where the longest n-gram that ends the text ended before."""
    length = len(prompt) + len(output)
    last = _piece(prompt, output, max(0, length - _GRAMS[0]), length)
    for size in _GRAMS:
        gram = last[-size:]
        end = index.find(gram) if size <= len(last) else None
        if end is not None and _piece(prompt, output, max(0, end + 1 - size), end + 1) == gram:
            return end
    return None
