"""A runner without a model: logits are a hash of what the memory of a sequence really holds.

A page that is shared, given to another, or written by the wrong kernels, a slot, a hidden state, an
entry of the MTP head or a length that is not what it should be, changes every later token; what can
be told at once, fails at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nybble.engine.runner import Guess, Work
from nybble.engine.scheduler import CHUNK, EngineOptions
from nybble.models.numbers import Numbers
from nybble.text.tokenizer import Tokenizer

#: Token 0 ends a text, 1 to 26 are letters, the others have no text, as a padded vocabulary has.
VOCAB = 29
END = 0

_TABLE = np.random.default_rng(9).normal(0, 2, size=(2, 1009, VOCAB)).astype(np.float32)
#: What a token likes to be followed by, if the runner has habits.
_HABIT = np.random.default_rng(8).permutation(VOCAB)
#: So often, of 100, the MTP head goes by habit.
_HABITUAL = 90

#: The link before the first token, and the hidden state there.
START = 0


class Entry(NamedTuple):
    """What a page holds of a position. `link` is a hash of all tokens up to it, and of the kernels
    that each was computed with, where these decide about bits."""

    position: int
    token: int
    is_recurrent: bool
    link: int


class State(NamedTuple):
    """What a slot holds: of how many tokens, the `link` of the last, and its hidden state."""

    length: int
    link: int
    hidden: int


class Ran(NamedTuple):
    """A work of the last forward: the hidden state that came with its slot, and those made."""

    work: Work
    before: int | None
    hidden: list[int]


def letters(folder: Path) -> Tokenizer:
    """A tokenizer whose tokens are the end and 26 letters."""
    vocab = {"<end>": END} | {chr(96 + i): i for i in range(1, 27)}
    end = {"id": END, "content": "<end>", "special": True, "single_word": False}
    document = {
        "version": "1.0",
        "added_tokens": [end | {"lstrip": False, "rstrip": False, "normalized": False}],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated"}
        | {"invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return Tokenizer.open(folder)


class Violated(BaseException):
    """An engine has used its runner wrongly; no Exception, which the engine would take for the
    end of some requests."""


class FakeRunner:
    """Keeps of every page the entries written, of every slot the length and hash of its state.

    `snapshots` are slots beside those of sequences. `has_states`: there are recurrent states, whose
    bits tell by which kernels they were made if `has_origins`. `habit` is what the logit of a
    token's usual follower has more than others: an MTP head knows the habits, and so often guesses
    right. `cached` tells which pages a cache holds: nobody may write there.

    `nan_after`: a sequence whose last two tokens are these has NaN logits. `fails`: the next
    forward raises it, `guess_fails` the next guess.
    """

    def __init__(
        self,
        options: EngineOptions,
        pages: Numbers,
        slots: Numbers,
        snapshots: Numbers | None = None,
        *,
        has_states: bool = True,
        has_origins: bool = True,
        habit: float = 0.0,
    ) -> None:
        self.options, self.pages, self.slots, self.snapshots = options, pages, slots, snapshots
        self.has_states, self.has_origins, self.habit = has_states, has_origins, habit
        empty: list[Entry | None] = [None] * options.page_tokens
        self.memory = {page: list(empty) for page in range(pages.count)}
        # The MTP head's entries, hashes; those of drafts are overwritten when their tokens come.
        self.entries: dict[int, list[int | None]] = {
            page: [None] * options.page_tokens for page in range(pages.count)
        }
        self.states: dict[int, State] = {}
        self.cached: Callable[[], Collection[int]] = tuple
        self.nan_after: tuple[int, int] | None = None
        self.fails: Exception | None = None
        self.guess_fails: Exception | None = None
        self.batches: list[list[tuple[int, int, bool, int]]] = []  # start, tokens, kernels, outputs
        self.copies = 0
        self.guessed = 0
        self._ran: list[Ran] = []
        self._made = torch.empty(0)

    @property
    def vocab(self) -> int:
        return VOCAB

    def forward(self, works: Sequence[Work]) -> Tensor:
        self._made.fill_(torch.nan)
        try:
            self._check(works)
            states = [self._read(work) for work in works]
            self._ran = []
            pairs = zip(works, states, strict=True)
            rows = [row for work, state in pairs for row in self._compute(work, state)]
        except AssertionError as error:
            raise Violated(str(error)) from error
        self.batches.append([(w.length, len(w.tokens), w.is_recurrent, w.outputs) for w in works])
        if self.fails is not None:  # in the middle: everything was written
            failure, self.fails = self.fails, None
            raise failure
        made = np.stack(rows) if rows else np.zeros((0, VOCAB), np.float32)
        self._made = torch.from_numpy(made)
        return self._made

    def guess(self, guesses: Sequence[Guess]) -> list[list[int]]:
        self._made.fill_(torch.nan)
        try:
            assert guesses
            written = [set(self._guessed_pages(guess)) for guess in guesses]
            self._check_apart(written, [set(guess.pages) for guess in guesses])
            found = [self._guess(guess) for guess in guesses]
        except AssertionError as error:
            raise Violated(str(error)) from error
        self.guessed += sum(map(len, found))
        if self.guess_fails is not None:
            failure, self.guess_fails = self.guess_fails, None
            raise failure
        return found

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        try:
            assert len(from_pages) == len(to_pages)
            assert len(set(to_pages)) == len(to_pages), "a page has two owners"
            assert not set(from_pages) & set(to_pages), "a page is copied onto itself"
            self._check_lent([*from_pages, *to_pages], [from_slot, to_slot])
            self._check_own(to_pages)
            assert from_slot in self.states or not self.has_states, "a slot without a state"
        except AssertionError as error:
            raise Violated(str(error)) from error
        for source, target in zip(from_pages, to_pages, strict=True):
            self.memory[target] = list(self.memory[source])
            self.entries[target] = list(self.entries[source])
        if from_slot in self.states:
            self.states[to_slot] = self.states[from_slot]
        self.copies += 1

    def describe(self) -> str:
        return "fake"

    def explain(self) -> str:
        return "layer 3 is damaged"

    # ----------------------------------------------------------------------------------- checking

    def _check(self, works: Sequence[Work]) -> None:
        options = self.options
        assert works
        assert len(works) <= options.max_sequences
        assert sum(len(w.tokens) for w in works) <= options.max_batched_tokens
        assert sum(w.outputs for w in works) <= options.max_outputs(VOCAB)
        for work in works:
            self._check_work(work)
        size = options.page_tokens
        written = [set(w.pages[w.length // size : _pages(w, size)]) for w in works]
        self._check_apart(written, [set(w.pages) for w in works])
        for pages in written:
            self._check_own(pages)
        slots = [{slot for _, slot in w.writes} or {w.slot} for w in works]
        self._check_apart(slots, [s | {w.slot} for s, w in zip(slots, works, strict=True)])

    def _check_work(self, work: Work) -> None:
        assert work.tokens
        assert 0 <= work.outputs <= len(work.tokens)
        assert work.is_recurrent or work.length % CHUNK == 0
        assert len(work.pages) >= _pages(work, self.options.page_tokens)
        assert len(set(work.pages)) == len(work.pages), "a page has two positions"
        self._check_lent(work.pages, [work.slot, *(slot for _, slot in work.writes)])
        if not work.writes:
            return
        counts, slots = zip(*work.writes, strict=True)
        assert len(set(slots)) == len(slots), "a slot is written twice"
        assert list(counts) == sorted(set(counts)), "counts of writes do not rise"
        assert counts[0] > 0
        assert counts[-1] == len(work.tokens), "the last state is not written"
        if not work.is_recurrent:
            assert all((work.length + count) % CHUNK == 0 for count in counts[:-1])

    def _check_apart(self, written: Sequence[set[int]], held: Sequence[set[int]]) -> None:
        """What one writes, no other holds."""
        for i, mine in enumerate(written):
            for j, other in enumerate(held):
                assert i == j or not mine & other, "what one sequence writes, another holds"

    def _check_own(self, pages: Iterable[int]) -> None:
        assert not set(pages) & set(self.cached()), "a page of the cache is written"

    def _check_lent(self, pages: Iterable[int], slots: Iterable[int]) -> None:
        lent = set(self.slots.lent)
        if self.snapshots is not None:
            lent |= self.snapshots.lent
        assert self.pages.lent.issuperset(pages), "a page that nobody was lent"
        assert lent.issuperset(slots), "a slot that nobody was lent"

    # ---------------------------------------------------------------------------------- the trunk

    def _read(self, work: Work) -> State | None:
        """The state that a work goes on from. None: there is no hidden state with it."""
        if work.length == 0:
            return State(0, START, START)
        pages = self._chain(work.pages, work.length)
        state = self.states.get(work.slot)
        if not self.has_states:  # then a slot has no more than a hidden state
            is_it = state is not None and (state.length, state.link) == (work.length, pages)
            return state if is_it else None
        assert state is not None, "a slot without a state"
        assert state.length == work.length, "the slot holds the state of another length"
        assert state.link == pages, "the slot holds the state of another text, or of other kernels"
        return state

    def _chain(self, pages: Sequence[int], length: int) -> int:
        """The link of the last of so many positions, each of which must follow that before it."""
        link, size = START, self.options.page_tokens
        for position in range(length):
            entry = self.memory[pages[position // size]][position % size]
            assert entry is not None, "a page that was never written"
            assert entry.position == position, "a page holds another sequence's positions"
            link = self._link(link, entry.token, entry.is_recurrent)
            assert entry.link == link, "a page holds another sequence's text"
        return link

    def _link(self, link: int, token: int, is_recurrent: bool) -> int:
        tells = is_recurrent and self.has_origins and self.has_states
        return hash((link, token, tells))

    def _compute(self, work: Work, state: State | None) -> list[np.ndarray]:
        link = self._chain(work.pages, work.length) if state is None else state.link
        links, before = [], self._token(work.pages, work.length - 1)
        rows = []
        for position, token in enumerate(work.tokens, work.length):
            link = self._link(link, token, work.is_recurrent)
            page, at = self._place(work.pages, position)
            self.memory[page][at] = Entry(position, token, work.is_recurrent, link)
            links.append(link)
            rows.append(self._logits(link, before, token))
            before = token
        for count, slot in work.writes or ((len(links), work.slot),):
            made = links[count - 1]
            self.states[slot] = State(work.length + count, made, _hidden(made))
        hidden = [_hidden(link) for link in links]
        self._ran.append(Ran(work, None if state is None else state.hidden, hidden))
        return rows[len(rows) - work.outputs :]

    def _place(self, pages: Sequence[int], position: int) -> tuple[int, int]:
        page, at = divmod(position, self.options.page_tokens)
        assert page < len(pages), f"no page for position {position}"
        return pages[page], at

    def _token(self, pages: Sequence[int], position: int) -> int:
        """The token at a position, -1 before the first."""
        if position < 0:
            return -1
        page, at = self._place(pages, position)
        entry = self.memory[page][at]
        assert entry is not None
        return entry.token

    def _logits(self, link: int, before: int, last: int) -> np.ndarray:
        row: np.ndarray = _TABLE[0, link % 1009] + _TABLE[1, link // 1009 % 1009]
        row[_HABIT[last]] += self.habit
        if (before, last) == self.nan_after:
            row[3] = np.nan
        return row

    # -------------------------------------------------------------------------------- the MTP head

    def _guessed_pages(self, guess: Guess) -> list[int]:
        """Where a guess writes entries: of its tokens, and of all but the last draft."""
        end = guess.start + len(guess.tokens) + max(guess.drafts - 1, 0)
        return [self._place(guess.pages, at)[0] for at in range(guess.start, end)]

    def _guess(self, guess: Guess) -> list[int]:
        end = guess.start + len(guess.tokens)
        self._enter(guess)
        if guess.drafts == 0:
            return []
        out = self._attend(guess.pages, end, guess.tokens[-1])
        token, found = guess.tokens[-1], list[int]()
        for position in range(end, end + guess.drafts):
            is_habitual = out % 100 < _HABITUAL
            token = int(_HABIT[token]) if is_habitual else out // 100 % VOCAB
            found.append(token)
            if len(found) < guess.drafts:
                page, at = self._place(guess.pages, position)
                self.entries[page][at] = hash((position, token, out))
                out = hash((out, self.entries[page][at]))
        return found

    def _enter(self, guess: Guess) -> None:
        """Write the entries of known tokens."""
        assert guess.tokens
        work, before, hidden = self._ran[guess.work]
        first = guess.start - work.length
        assert first >= 0, "the hidden states before were not of this forward"
        assert first + len(guess.tokens) <= len(work.tokens) + 1, "no hidden state there yet"
        run = work.tokens[first : first + len(guess.tokens) - 1]
        assert list(run) == list(guess.tokens[:-1]), "other tokens were run"
        self._check_own(self._guessed_pages(guess))
        self._check_lent(guess.pages, ())
        for position, token in enumerate(guess.tokens, guess.start):
            i = position - work.length
            state = hidden[i - 1] if i else before
            assert state is not None, "the hidden state before the first token is lost"
            page, at = self._place(guess.pages, position)
            self.entries[page][at] = _entry(position, token, state)

    def _attend(self, pages: Sequence[int], end: int, last: int) -> int:
        """What the head makes of all entries but the first, each of which must be what its token
        and the hidden state before it give; the text is that in the trunk's pages, then `last`."""
        self._chain(pages, end - 1)
        found = []
        for position in range(1, end):
            page, at = self._place(pages, position - 1)
            before = self.memory[page][at]
            assert before is not None
            token = last if position == end - 1 else self._token(pages, position)
            page, at = self._place(pages, position)
            entry = self.entries[page][at]
            assert entry is not None, "an entry of the MTP head was never written"
            expected = _entry(position, token, _hidden(before.link))
            assert entry == expected, f"a stale entry of the MTP head at {position}"
            found.append(entry)
        return hash(tuple(found))


def _hidden(link: int) -> int:
    """The hidden state of a token."""
    return START if link == START else hash((link, 1))


def _entry(position: int, token: int, hidden: int) -> int:
    return hash((position, token, hidden))


def _pages(work: Work, size: int) -> int:
    """How many pages a work's tokens need, with those before."""
    return -(-(work.length + len(work.tokens)) // size)
