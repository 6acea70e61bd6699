"""When sequences guess ahead, and how far: between a drafter, who guesses, and the policy, which
says whether it pays. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nybble.engine.drafter import Ask, Drafter
from nybble.engine.runner import Guess
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence as Generated
from nybble.engine.speculation import Speculation


class Part(NamedTuple):
    """A sequence that a step computed, as the `work` of that number. `is_done`: it has ended, and
    what is known of it is noted for others that begin alike."""

    sequence: Generated
    work: int
    is_done: bool


class Drafting:
    """Asks a drafter for as many drafts as the policy finds worth their time."""

    def __init__(self, drafter: Drafter, speculation: Speculation, scheduler: Scheduler) -> None:
        self.drafter, self.speculation, self._scheduler = drafter, speculation, scheduler
        self._has_entries = False  # whether some sequence that runs may have all its entries

    def _is_to_draft(self, sequence: Generated) -> bool:
        """Whether entries are kept up while a sequence generates. Asked of the policy once."""
        if sequence.is_drafting is None:
            sequence.is_drafting = self.speculation.starts(sequence.key)
        return sequence.is_drafting

    def begin(self, sequence: Generated) -> None:
        """A sequence begins, with or without something of the cache. Entries of its prompt are made
        even while drafting is off: they cost little, and others may begin alike when it is on."""
        if not self.drafter.needs_hidden:
            sequence.state.mtp_length = -1
        elif sequence.state.mtp_length >= 0:
            self._has_entries = True

    def propose(self, parts: Sequence[Part]) -> None:
        """After a step: set the drafts of the sequences that decode next."""
        if not self.can_draft(len(parts)):
            return
        goes_on = [not part.is_done and part.sequence.is_decoding for part in parts]
        keys = [part.sequence.key for part, goes in zip(parts, goes_on, strict=True) if goes]
        plan = iter(self.speculation.plan(keys))
        asked = []
        for part, goes in zip(parts, goes_on, strict=True):
            ask = self._ask(part, next(plan) if goes else None)
            if ask is not None:
                asked.append((part.sequence, ask))
        if asked:
            found = self.drafter.draft([ask for _, ask in asked])
            for (sequence, ask), drafts in zip(asked, found, strict=True):
                sequence.state.drafts = drafts
                if ask.guess is not None:
                    sequence.state.mtp_length += len(ask.guess.tokens)
        if self.drafter.needs_hidden:
            # Nobody gets entries between here and `begin`, but a fork of one who has them.
            running = self._scheduler.running
            self._has_entries = any(s.state.mtp_length >= 0 for s in running)

    def can_draft(self, sequences: int) -> bool:
        """Whether anything may come of asking; costs the same for any number of sequences."""
        if self.drafter.needs_hidden:
            return self._has_entries
        return not self.speculation.rests(sequences)

    def _ask(self, part: Part, wanted: int | None) -> Ask | None:
        """What to ask for a sequence, where `wanted` is None for one that does not decode next;
        None for nothing."""
        sequence = part.sequence
        drafts = min(wanted, self._scheduler.most_drafts(sequence)) if wanted else 0
        guess: Guess | None = None
        if self.drafter.needs_hidden:
            guess = self._guess(part, drafts, goes_on=wanted is not None)
        if guess is None and (self.drafter.needs_hidden or not drafts):
            return None
        return Ask(sequence.key, sequence.request.prompt, sequence.output, drafts, guess)

    def _guess(self, part: Part, drafts: int, *, goes_on: bool) -> Guess | None:
        """The entries that a sequence lacks, and the drafts after them."""
        sequence, state = part.sequence, part.sequence.state
        start = state.mtp_length
        is_read = state.length <= len(sequence.request.prompt)
        if start < 0 or (part.is_done and self.speculation.is_off and not is_read):
            return None
        drafts_on = goes_on and self._goes_on_drafting(sequence)
        if goes_on and not drafts_on and not is_read:
            state.mtp_length = -1
            return None
        room = len(state.pages) * self._scheduler.options.page_tokens
        end = min(state.length + drafts_on, room)
        if start >= end:
            return None
        drafts = drafts if end == sequence.known else 0
        return Guess(part.work, sequence.tokens(start, end), state.pages, start, drafts)

    def _goes_on_drafting(self, sequence: Generated) -> bool:
        return self._is_to_draft(sequence) and not self.speculation.is_over(sequence.key)

    def give_up(self, parts: Sequence[Part]) -> None:
        """Sequences could not be drafted for, and are not again while they run."""
        for part in parts:
            part.sequence.state.mtp_length, part.sequence.state.drafts = -1, []

    def drop(self, sequences: Iterable[Generated]) -> None:
        """Forget sequences that have ended."""
        for sequence in sequences:
            self.drafter.drop(sequence.key)
            self.speculation.drop(sequence.key)
