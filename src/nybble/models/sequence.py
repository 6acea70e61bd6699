"""The one object that says what a sequence holds of the pools. Knows no tensor's memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class SequenceState:
    """Everything a sequence is, beside its tokens. Changed by `commit` alone.

    `pages` and `mtp_pages` are page numbers, of the trunk and of the MTP head where it has its own;
    `mtp_length` entries of the MTP head are made, -1 once some are missing; `slots` the
    recurrent states, one and one for each draft, of which `slots[slot]` holds the state after
    `length` tokens; `last_hidden` the final normed hidden state at the last token, float32 [H];
    `draws` counts random draws; `offset` is what images add to positions.
    """

    pages: list[int]
    slots: list[int] = field(default_factory=lambda: [0])
    mtp_pages: list[int] = field(default_factory=list)
    length: int = 0
    mtp_length: int = 0
    slot: int = 0
    last_hidden: Tensor | None = None
    drafts: list[int] = field(default_factory=list)
    grammar: object | None = None
    draws: int = 0
    offset: int = 0

    def commit(self, tokens: int, last_hidden: Tensor | None = None, slot: int = 0) -> None:
        """Take `tokens` more tokens for computed: their pages are written, their state lies in
        `slots[slot]`."""
        self.length += tokens
        self.slot = slot
        self.last_hidden = last_hidden
        self.drafts = []
