"""Who computes what in the next step: a tensor-free book of pages, slots and turns.

The rules, all of them:

- Turns are a total order, fixed when a request arrives: earlier first, and a request whose priority
  number is higher by one as though `AGEING` requests later. So no stream of urgent requests holds
  up another for ever.
- A sequence runs from when it gets a slot and the pages of all its tokens until it ends. The first
  that waits is the only one that may begin; nothing overtakes it for being smaller.
- Each running sequence takes pages as it grows. If there are none, the last in turn is preempted:
  it gives back all it holds, waits in its turn, and later computes its tokens again by the same
  kernels, so with the same bits: the prompt in chunks, the generated tokens as in decoding. The
  first in turn is never preempted for pages, and ends; so every sequence does.
- A step is `max_batched_tokens` at most: first the sequences that decode, a token each, then, in
  turn, chunks of prompts and replays. Chunks begin at multiples of `CHUNK`.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from nybble.engine.runner import Work
from nybble.engine.sequence import Sequence, Turn, nothing_held
from nybble.errors import EngineError
from nybble.models.numbers import Numbers

#: Chunks of a prompt begin at multiples of this many tokens: there the recurrent kernels' own
#: chunks begin, so that cutting a prompt changes no bit.
CHUNK = 64

#: How many later requests go before one whose priority number is higher by one.
AGEING = 64

#: The largest engine: a step's buffers, and the record of its calls, are made for these sizes.
MOST_SEQUENCES = 4_096
MOST_BATCHED_TOKENS = 1 << 20
MOST_PAGE_TOKENS = 4_096

#: Logits of prompts that a step may hold, when their log-probabilities are asked for.
MOST_PROMPT_LOGITS_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The size of an engine: how many sequences run at once, how many tokens a step computes, how
    many tokens a page holds."""

    max_sequences: int = 32
    max_batched_tokens: int = 1024
    page_tokens: int = 64

    def __post_init__(self) -> None:
        for name, most in (
            ("max_sequences", MOST_SEQUENCES),
            ("max_batched_tokens", MOST_BATCHED_TOKENS),
            ("page_tokens", MOST_PAGE_TOKENS),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise EngineError(
                    f"{name} must be a whole number from 1 to {most:,}, found {value!r}"
                )
        if self.max_batched_tokens < self.max_sequences + CHUNK:
            raise EngineError(
                f"max_batched_tokens must be at least max_sequences + {CHUNK}, "
                f"{self.max_sequences + CHUNK}, so that a prompt goes on while all others decode; "
                f"found {self.max_batched_tokens}"
            )

    def prompt_rows(self, vocab: int) -> int:
        """How many rows of logits of prompts a step computes at most, a multiple of `CHUNK`."""
        return max(1, MOST_PROMPT_LOGITS_BYTES // (4 * vocab * CHUNK)) * CHUNK

    def max_outputs(self, vocab: int) -> int:
        """How many rows of logits a step computes at most."""
        return min(self.prompt_rows(vocab) + self.max_sequences, self.max_batched_tokens)


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step. `is_sampled`: its last row of logits gives the next token;
    `scored`: the last this many tell of the prompt."""

    sequence: Sequence
    work: Work
    is_sampled: bool
    scored: int


@dataclass(slots=True)
class _Budget:
    tokens: int
    rows: int


def turn(arrival: int, priority: int, choice: int) -> Turn:
    """The place of a choice in the order of all, smaller first."""
    return (arrival + AGEING * priority, arrival, choice)


def _place(sequence: Sequence) -> Turn:
    return sequence.turn


class Scheduler:
    """Sequences that wait and that run, each list in order of turns, and the pools they share.

    `prompt_rows` as in `EngineOptions`. `preemptions` counts.
    """

    def __init__(
        self, options: EngineOptions, pages: Numbers, slots: Numbers, prompt_rows: int
    ) -> None:
        self.options, self.pages, self.slots = options, pages, slots
        self.prompt_rows = prompt_rows
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait in its turn. It holds nothing, and must fit when it is alone."""
        insort(self.waiting, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, wherever it is, and free what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Share]:
        """What the next step computes, for sequences in turn; changes who runs and what they hold,
        but no state's length: that is `commit`, when it is computed. Empty if nobody is there."""
        self._grow()
        budget = _Budget(self.options.max_batched_tokens, self.prompt_rows)
        decoding = [self._share(s, budget) for s in self.running if s.is_decoding]
        others = [self._share(s, budget) for s in self.running if not s.is_decoding]
        while self.waiting and budget.tokens >= CHUNK and self._has_room(self.waiting[0]):
            sequence = self.waiting.pop(0)
            self._admit(sequence)
            others.append(self._share(sequence, budget))
        return [share for share in decoding + others if share is not None]

    def commit(self, share: Share) -> None:
        """A share is computed: its tokens' state is in the sequence's pages and slot."""
        sequence = share.sequence
        sequence.state.commit(len(share.work.tokens))
        sequence.computed = max(sequence.computed, sequence.state.length)

    def fork(self, leader: Sequence) -> list[Sequence]:
        """Let the followers of a sequence begin whose prompt was just computed.

        Those for which there is room, and whose turn it is, run and hold pages and a slot for the
        leader's state, which the caller copies; the others wait and compute the prompt themselves.
        """
        forked = []
        for sequence in leader.followers:
            is_next = not self.waiting or sequence.turn < self.waiting[0].turn
            if is_next and self._has_room(sequence):
                self._admit(sequence)
                sequence.state.commit(leader.state.length)
                forked.append(sequence)
            else:
                self.add(sequence)
        leader.followers = []
        return forked

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a sequence may begin: each that runs could still take one more page after."""
        if not self.running:
            return True
        if len(self.running) >= self.options.max_sequences or not self.slots.free:
            return False
        return self._missing(sequence) + len(self.running) <= self.pages.free

    def _admit(self, sequence: Sequence) -> None:
        sequence.state.slots = self.slots.take()
        sequence.state.pages = self.pages.take(self._missing(sequence))
        insort(self.running, sequence, key=_place)

    def _missing(self, sequence: Sequence) -> int:
        """How many pages a sequence lacks for all tokens that it has."""
        needed = -(-sequence.known // self.options.page_tokens)
        return needed - len(sequence.state.pages)

    def _grow(self) -> None:
        """Give every running sequence its pages, in turn, and preempt from the end."""
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            missing = self._missing(sequence)
            if missing > self.pages.free:
                self.preempt(self.running[-1])
            else:
                sequence.state.pages += self.pages.take(missing)
                at += 1

    def preempt(self, sequence: Sequence) -> None:
        """Take from a sequence that runs all it holds; it waits in its turn, to begin again."""
        self.running.remove(sequence)
        self._release(sequence)
        self.add(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pages.give_back(sequence.state.pages)
        self.slots.give_back(sequence.state.slots)
        sequence.state = nothing_held()

    def _share(self, sequence: Sequence, budget: _Budget) -> Share | None:
        """As much of a sequence as the budget has left; None if that is nothing."""
        end = self._end(sequence, budget)
        state = sequence.state
        if end <= state.length:
            return None
        scored, is_sampled = sequence.unscored(end), end == sequence.known
        work = Work(
            sequence.tokens(state.length, end),
            state.pages,
            state.slots[state.slot],
            state.length,
            is_recurrent=not sequence.is_prefilling,
            outputs=max(scored, int(is_sampled)),
        )
        budget.tokens -= end - state.length
        budget.rows -= scored
        return Share(sequence, work, is_sampled, scored)

    def _end(self, sequence: Sequence, budget: _Budget) -> int:
        """The position where a sequence's share ends: a chunk at a multiple of `CHUNK` or with the
        prompt, a replay anywhere."""
        start, prompt = sequence.state.length, len(sequence.request.prompt)
        if not sequence.is_prefilling:
            return min(sequence.known, start + budget.tokens)
        end = min(prompt, start + budget.tokens)
        end -= max(0, sequence.unscored(end) - budget.rows)
        return end if end == prompt else end // CHUNK * CHUNK
