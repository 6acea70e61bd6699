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
        """A sequence begins, with or without something of the cache. Entries of a prompt that
        others may share are made even while drafting is off: they cost little, and it may be on
        then."""
        is_shared = sequence.lease is not None
        self.speculation.expect(len(self._scheduler.running))
        if not self.drafter.needs_hidden:
            sequence.state.mtp_length = -1
        elif sequence.state.mtp_length >= 0 and (is_shared or self._is_to_draft(sequence)):
            self._has_entries = True
        else:
            sequence.state.mtp_length = -1

    def propose(self, parts: Sequence[Part]) -> None:
        """After a step: set the drafts of the sequences that decode next."""
        if not self.can_draft(len(parts)):
            return
        asked = []
        for part, wanted in zip(parts, self._wanted(parts), strict=True):
            ask = self._ask(part, wanted)
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

    def _wanted(self, parts: Sequence[Part]) -> list[int | None]:
        """How many drafts each is to have, None for those that cannot be drafted for next: they do
        not decode, or drafting has ended for them. Where that is all, nothing is planned."""
        goes_on = [not part.is_done and part.sequence.is_decoding for part in parts]
        able = goes_on
        if self.drafter.needs_hidden:
            self.speculation.expect(sum(goes_on))
            pairs = zip(parts, goes_on, strict=True)
            able = [goes and self._goes_on_drafting(part.sequence) for part, goes in pairs]
        if not any(able):
            return [None] * len(parts)
        pairs = zip(parts, goes_on, strict=True)
        plan = iter(self.speculation.plan([part.sequence.key for part, goes in pairs if goes]))
        counts = [next(plan) if goes else 0 for goes in goes_on]
        return [count if is_able else None for count, is_able in zip(counts, able, strict=True)]

    def _goes_on_drafting(self, sequence: Generated) -> bool:
        """Whether a sequence that decodes has all entries of a head, and they are kept up."""
        has_entries = sequence.state.mtp_length >= 0
        return (
            has_entries
            and self._is_to_draft(sequence)
            and not self.speculation.is_over(sequence.key)
        )

    def _ask(self, part: Part, wanted: int | None) -> Ask | None:
        """What to ask for a sequence, where `wanted` is None for one that is not drafted for next;
        None for nothing."""
        sequence, guess = part.sequence, None
        if self.drafter.needs_hidden and sequence.state.mtp_length < 0:
            return None
        drafts = min(wanted, self._scheduler.most_drafts(sequence)) if wanted else 0
        if self.drafter.needs_hidden:
            guess = self._guess(part, drafts, drafts_on=wanted is not None)
        if guess is None and (self.drafter.needs_hidden or not drafts):
            return None
        return Ask(sequence.key, sequence.request.prompt, sequence.output, drafts, guess)

    def _guess(self, part: Part, drafts: int, *, drafts_on: bool) -> Guess | None:
        """The entries that a sequence lacks, and the drafts after them."""
        sequence, state = part.sequence, part.sequence.state
        start = state.mtp_length
        is_read = state.length <= len(sequence.request.prompt)
        if part.is_done and self.speculation.is_off and not is_read:
            return None
        if not (drafts_on or is_read or part.is_done) and sequence.is_decoding:
            state.mtp_length = -1
            return None
        room = len(state.pages) * self._scheduler.options.page_tokens
        end = min(state.length + drafts_on, room)
        if start >= end:
            return None
        drafts = drafts if end == sequence.known else 0
        return Guess(part.work, sequence.tokens(start, end), state.pages, start, drafts)

    def give_up(self, parts: Sequence[Part]) -> None:
        """Sequences could not be drafted for, and are not again while they run."""
        for part in parts:
            part.sequence.state.mtp_length, part.sequence.state.drafts = -1, []

    def drop(self, sequences: Iterable[Generated]) -> None:
        """Forget sequences that have ended."""
        for sequence in sequences:
            self.drafter.drop(sequence.key)
            self.speculation.drop(sequence.key)
