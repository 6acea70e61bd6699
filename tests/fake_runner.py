"""A runner without a model: logits are a hash of what the memory of a sequence really holds.

A page that is shared, given to another, or written by the wrong kernels, a slot or a length that
is not what it should be, changes every later token; what can be told at once, fails at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nybble.engine.runner import Work
from nybble.engine.scheduler import CHUNK, EngineOptions
from nybble.models.numbers import Numbers
from nybble.text.tokenizer import Tokenizer

#: Token 0 ends a text, 1 to 26 are letters, the others have no text, as a padded vocabulary has.
VOCAB = 29
END = 0

_TABLE = np.random.default_rng(7).normal(0, 2, size=(2, 1009, VOCAB)).astype(np.float32)

Entry = tuple[int, int, bool]  # position, token, whether the recurrent kernels wrote it


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

    `nan_after`: a sequence whose last two tokens are these has NaN logits. `fails`: the next
    forward raises it.
    """

    def __init__(self, options: EngineOptions, pages: Numbers, slots: Numbers) -> None:
        self.options, self.pages, self.slots = options, pages, slots
        self.memory: dict[int, list[Entry | None]] = {
            page: [None] * options.page_tokens for page in range(pages.count)
        }
        self.states: dict[int, tuple[int, int]] = {}
        self.nan_after: tuple[int, int] | None = None
        self.fails: Exception | None = None
        self.batches: list[list[tuple[int, int, bool, int]]] = []  # start, tokens, kernels, outputs
        self.copies = 0

    @property
    def vocab(self) -> int:
        return VOCAB

    def forward(self, works: Sequence[Work]) -> Tensor:
        try:
            self._check(works)
            rows = [row for work in works for row in self._compute(work)]
        except AssertionError as error:
            raise Violated(str(error)) from error
        self.batches.append([(w.length, len(w.tokens), w.is_recurrent, w.outputs) for w in works])
        if self.fails is not None:  # in the middle: everything was written
            error, self.fails = self.fails, None
            raise error
        made = np.stack(rows) if rows else np.zeros((0, VOCAB), np.float32)
        return torch.from_numpy(made)

    def describe(self) -> str:
        return "fake"

    def explain(self) -> str:
        return "layer 3 is damaged"

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        try:
            assert len(from_pages) == len(to_pages)
            self._check_lent([*from_pages, *to_pages], [from_slot, to_slot])
        except AssertionError as error:
            raise Violated(str(error)) from error
        for source, target in zip(from_pages, to_pages, strict=True):
            self.memory[target] = list(self.memory[source])
        self.states[to_slot] = self.states[from_slot]
        self.copies += 1

    def _check(self, works: Sequence[Work]) -> None:
        options = self.options
        assert works
        assert len(works) <= options.max_sequences
        assert sum(len(w.tokens) for w in works) <= options.max_batched_tokens
        assert sum(w.outputs for w in works) <= options.max_outputs(VOCAB)
        self._check_lent([p for w in works for p in w.pages], [w.slot for w in works])
        for work in works:
            assert work.tokens
            assert 0 <= work.outputs <= len(work.tokens)
            assert work.is_recurrent or work.length % CHUNK == 0
            needed = -(-(work.length + len(work.tokens)) // options.page_tokens)
            assert len(work.pages) >= needed

    def _check_lent(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        assert len(set(pages)) == len(pages), "a page has two owners"
        assert len(set(slots)) == len(slots), "a slot has two owners"
        assert self.pages._taken.issuperset(pages)
        assert self.slots._taken.issuperset(slots)

    def _compute(self, work: Work) -> list[np.ndarray]:
        length, state = self.states.get(work.slot, (0, 0)) if work.length else (0, 0)
        assert length == work.length, "the slot holds another sequence's state"
        size = self.options.page_tokens
        states = []
        for position, token in enumerate(work.tokens, work.length):
            entry = (position, token, work.is_recurrent)
            self.memory[work.pages[position // size]][position % size] = entry
            state = hash((state, entry))
            states.append(state)
        end = work.length + len(work.tokens)
        self.states[work.slot] = (end, state)
        return self._attend(work.pages, states[len(states) - work.outputs :], end)

    def _attend(self, pages: Sequence[int], states: list[int], end: int) -> list[np.ndarray]:
        """The rows of the last positions, from their states and all entries before them."""
        seen, size, rows = 0, self.options.page_tokens, []
        first = end - len(states)
        before: Entry | None = None
        for position in range(end):
            entry = self.memory[pages[position // size]][position % size]
            assert entry is not None
            assert entry[0] == position, "a page holds another sequence's positions"
            seen = hash((seen, entry))
            if position >= first:
                rows.append(self._logits(hash((seen, states[position - first])), before, entry))
            before = entry
        return rows

    def _logits(self, seen: int, before: Entry | None, last: Entry) -> np.ndarray:
        row = _TABLE[0, seen % 1009] + _TABLE[1, seen // 1009 % 1009]
        if before is not None and (before[1], last[1]) == self.nan_after:
            row[3] = np.nan
        return row
