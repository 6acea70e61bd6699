"""The one object that says what a sequence holds of the pools. Knows no tensor's memory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SequenceState:
    """Everything a sequence is, beside its tokens. Changed by `commit` alone.

    `pages` are page numbers, of the trunk and of the MTP head alike; `mtp_length` entries of the
    head are made, -1 once some are missing; `slots` the recurrent states, one and one for each
    draft, of which `slots[slot]` holds the state after `length` tokens, with the hidden state of
    the last one; `drafts` are guesses of what follows the tokens that are known; `offset` is what
    images add to positions.
    """

    pages: list[int]
    slots: list[int] = field(default_factory=lambda: [0])
    length: int = 0
    mtp_length: int = 0
    slot: int = 0
    drafts: list[int] = field(default_factory=list)
    offset: int = 0

    def commit(self, tokens: int, slot: int = 0) -> None:
        """Take `tokens` more tokens for computed: their pages are written, their state lies in
        `slots[slot]`."""
        self.length += tokens
        self.slot = slot
        self.drafts = []
