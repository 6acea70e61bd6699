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
- A step is `max_batched_tokens` at most: first the sequences that decode, a token each and, where
  there is room, the drafts that may follow it, then, in turn, chunks of prompts and replays. Chunks
  begin at multiples of `CHUNK`. Nobody waits, and nobody is preempted, for drafts.
- A sequence that begins takes from the cache what its prompt shares with earlier ones: pages, and
  the recurrent state of a snapshot, which its first step reads where it lies. What it replays after
  preemption, beyond the prompt, it computes itself.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from nybble.engine.prefix import Hit, PrefixCache
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
MOST_DRAFTS = 8

#: Logits of prompts that a step may hold, when their log-probabilities are asked for.
MOST_PROMPT_LOGITS_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The size of an engine: how many sequences run at once, how many tokens a step computes, how
    many tokens a page holds, and how many drafts of a sequence a step verifies at most."""

    max_sequences: int = 32
    max_batched_tokens: int = 1024
    page_tokens: int = 64
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_sequences", 1, MOST_SEQUENCES),
            ("max_batched_tokens", 1, MOST_BATCHED_TOKENS),
            ("page_tokens", 1, MOST_PAGE_TOKENS),
            ("draft_tokens", 0, MOST_DRAFTS),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise EngineError(
                    f"{name} must be a whole number from {least} to {most:,}, found {value!r}"
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
        decoded = self.max_sequences * (1 + self.draft_tokens)
        return min(self.prompt_rows(vocab) + decoded, self.max_batched_tokens)


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step. `is_sampled`: its rows of logits give the next tokens, the first
    one the token after those that are known, each other one the token after a draft; `scored`: the
    last this many tell of the prompt. `snapshots`: which of its states go to the cache, pairs of a
    length and a slot; the one of all its tokens is still to be copied there."""

    sequence: Sequence
    work: Work
    is_sampled: bool
    scored: int
    drafts: tuple[int, ...] = ()
    snapshots: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class _Budget:
    """What is left of a step: tokens, drafts among them, and rows of logits of prompts."""

    tokens: int
    drafts: int
    rows: int


def turn(arrival: int, priority: int, choice: int) -> Turn:
    """The place of a choice in the order of all, smaller first."""
    return (arrival + AGEING * priority, arrival, choice)


def _place(sequence: Sequence) -> Turn:
    return sequence.turn


class Scheduler:
    """Sequences that wait and that run, each list in order of turns, and the pools they share.

    `prompt_rows` as in `EngineOptions`; `slots_each` is how many slots a sequence has, one and one
    for each draft where drafts move a state on. `preemptions` counts.
    """

    def __init__(
        self,
        options: EngineOptions,
        pages: Numbers,
        slots: Numbers,
        prompt_rows: int,
        *,
        cache: PrefixCache | None = None,
        slots_each: int = 1,
    ) -> None:
        self.options, self.pages, self.slots = options, pages, slots
        self.prompt_rows, self.cache, self.slots_each = prompt_rows, cache, slots_each
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._refused: tuple[Turn, int, int, int] | None = None
        self._reserving: set[tuple[bytes, tuple[int, ...]]] = set()

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
        self._reserving.clear()
        decoding = [s for s in self.running if s.is_decoding]
        tokens = self.options.max_batched_tokens
        spare = CHUNK if self.waiting or len(decoding) < len(self.running) else 0
        budget = _Budget(tokens, tokens - len(decoding) - spare, self.prompt_rows)
        shares = [self._decode(s, budget) for s in decoding]
        others = [self._share(s, budget) for s in self.running if not s.is_decoding]
        while self.waiting and budget.tokens >= CHUNK and self._begin(self.waiting[0]):
            others.append(self._share(self.waiting.pop(0), budget))
        return shares + [share for share in others if share is not None]

    def commit(self, share: Share) -> None:
        """A share is computed: the state of its tokens is in the sequence's pages and slot; of a
        share with drafts, that of its first token."""
        sequence = share.sequence
        sequence.state.commit(len(share.work.tokens) - len(share.drafts))
        sequence.computed = max(sequence.computed, sequence.state.length)
        if sequence.source is not None:
            sequence.source = None
            if self.cache is not None and sequence.lease is not None:
                self.cache.unpin(sequence.lease)

    def accept(self, sequence: Sequence) -> None:
        """The next draft of a sequence was right: its state is computed too."""
        state = sequence.state
        state.commit(1, slot=min(state.slot + 1, len(state.slots) - 1))
        sequence.computed = max(sequence.computed, state.length)

    def fork(self, leader: Sequence) -> list[Sequence]:
        """Let the followers of a sequence begin whose prompt was just computed.

        Those for which there is room, and whose turn it is, run and hold pages and a slot for the
        leader's state, which the caller copies; the others wait and compute the prompt themselves.
        """
        forked = []
        for sequence in leader.followers:
            is_next = not self.waiting or sequence.turn < self.waiting[0].turn
            if is_next and self._has_room(self._missing(sequence), self._available):
                if self.cache is not None and leader.lease is not None:
                    sequence.lease = self.cache.fork(leader.lease)
                    sequence.state.pages = sequence.lease.pages
                self._admit(sequence)
                sequence.state.commit(leader.state.length)
                sequence.state.mtp_length = leader.state.mtp_length
                sequence.cached, sequence.is_new = leader.cached, False
                forked.append(sequence)
            else:
                self.add(sequence)
        leader.followers = []
        return forked

    def _has_room(self, missing: int, available: int) -> bool:
        """Whether a sequence may begin that lacks so many pages: each that runs could still take
        one more page after."""
        if not self.running:
            return True
        return self._has_seat and missing + len(self.running) <= available

    @property
    def _has_seat(self) -> bool:
        has_slots = self.slots.free >= self.slots_each
        return has_slots and len(self.running) < self.options.max_sequences

    def _begin(self, sequence: Sequence) -> bool:
        """Let a sequence run, with what the cache has of its prompt, if there is room for it."""
        now = (sequence.turn, self._available, len(self.running), self.slots.free)
        # Looking up a long prompt at every step would cost.
        if now == self._refused or (self.running and not self._has_seat):
            return False
        hit = self._find(sequence)
        found = 0 if hit is None else len(hit.pages)
        available = self._available if self.cache is None else self.cache.room(hit)
        if not self._has_room(self._missing(sequence) - found, available):
            self._refused = now
            return False
        if self.cache is not None:
            self._start_from(sequence, hit, self.cache)
        self._admit(sequence)
        return True

    def _find(self, sequence: Sequence) -> Hit | None:
        """What the cache has of a prompt; all of it is computed where its log-probabilities are
        wanted."""
        if self.cache is None or sequence.wants_scores:
            return None
        request = sequence.request
        most = len(request.prompt) - 1  # the last token gives the first logits
        return self.cache.find(
            request.prompt,
            request.salt,
            most,
            sequence.boundaries,
        )

    def _start_from(self, sequence: Sequence, hit: Hit | None, cache: PrefixCache) -> None:
        """Share what was found, and plan what the cache is to have of the rest."""
        request, state = sequence.request, sequence.state
        is_first = sequence.arrived is not None  # later it finds what it made itself
        lease = sequence.lease = cache.begin(hit, request.salt, is_counted=is_first)
        if hit is not None:
            state.pages, state.length = list(hit.pages), hit.length
            state.mtp_length = hit.length if hit.has_mtp or not hit.length else -1
            sequence.source = hit.slot
        if hit is not None and is_first:
            sequence.cached = hit.length
            sequence.missed = "" if hit.reason == "hit" else hit.explain()
        whole = len(request.prompt)
        sequence.planned = cache.positions(lease, state.length, whole, sequence.boundaries)

    def _admit(self, sequence: Sequence) -> None:
        sequence.state.slots = self.slots.take(self.slots_each)
        sequence.state.pages += self._take(self._missing(sequence))
        insort(self.running, sequence, key=_place)
        sequence.is_new = True

    @property
    def _available(self) -> int:
        """How many pages can be had, by whoever runs."""
        return self.pages.free if self.cache is None else self.cache.available

    def _take(self, count: int) -> list[int]:
        return self.pages.take(count) if self.cache is None else self.cache.take(count)

    def _missing(self, sequence: Sequence) -> int:
        """How many pages a sequence lacks for all tokens that it has."""
        needed = -(-sequence.known // self.options.page_tokens)
        return max(0, needed - len(sequence.state.pages))

    def _grow(self) -> None:
        """Give every running sequence its pages, in turn, and preempt from the end."""
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            missing = self._missing(sequence)
            if missing > self._available:
                self.preempt(self.running[-1])
            else:
                sequence.state.pages += self._take(missing)
                at += 1
        for sequence in self.running:
            self._grow_ahead(sequence)

    def _grow_ahead(self, sequence: Sequence) -> None:
        """A page for drafts, while there are more than all that run will need next."""
        ahead = sequence.known + 2 * self.options.draft_tokens
        room = len(sequence.state.pages) * self.options.page_tokens
        if sequence.is_decoding and ahead > room and self._available > len(self.running):
            sequence.state.pages += self._take(1)

    def preempt(self, sequence: Sequence) -> None:
        """Take from a sequence that runs all it holds; it waits in its turn, to begin again."""
        self.running.remove(sequence)
        self._release(sequence)
        self.add(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if self.cache is not None and sequence.lease is not None:
            self.cache.release(sequence.lease, sequence.state.pages)
        else:
            self.pages.give_back(sequence.state.pages)
        self.slots.give_back(sequence.state.slots)
        sequence.state, sequence.lease, sequence.source = nothing_held(), None, None
        sequence.planned = []

    def drop(self, share: Share) -> None:
        """A share was not computed: no state of it goes to the cache."""
        if self.cache is not None:
            self.cache.cancel([slot for _, slot in share.snapshots])

    def _decode(self, sequence: Sequence, budget: _Budget) -> Share:
        """The one token that is known, and what may follow it."""
        state = sequence.state
        drafts: tuple[int, ...] = ()
        if state.drafts:
            drafts = tuple(state.drafts[: max(0, min(self.most_drafts(sequence), budget.drafts))])
        count = 1 + len(drafts)
        # Else the state is written where it was read.
        is_moved = self.slots_each > 1 and (count > 1 or state.slot > 0)
        work = Work(
            [*sequence.tokens(state.length, sequence.known), *drafts],
            state.pages,
            state.slots[state.slot],
            state.length,
            is_recurrent=True,
            outputs=count,
            writes=tuple(enumerate(state.slots[:count], 1)) if is_moved else (),
            has_hidden=state.mtp_length >= 0,
        )
        budget.tokens -= count
        budget.drafts -= len(drafts)
        return Share(sequence, work, is_sampled=True, scored=0, drafts=drafts)

    def most_drafts(self, sequence: Sequence) -> int:
        """How many drafts may follow the tokens that are known: what its pages hold, and what may
        still be generated after the token that comes anyway."""
        room = len(sequence.state.pages) * self.options.page_tokens - sequence.known
        left = sequence.most - len(sequence.output) - 1
        return max(0, min(self.options.draft_tokens, room, left))

    def _share(self, sequence: Sequence, budget: _Budget) -> Share | None:
        """As much of a sequence as the budget has left; None if that is nothing."""
        end = self._end(sequence, budget)
        state = sequence.state
        if end <= state.length:
            return None
        scored, is_sampled = sequence.unscored(end), end == sequence.known
        snapshots = self._snapshots(sequence, end)
        writes = [*(s for s in snapshots if s[0] < end), (end, state.slots[0])]
        work = Work(
            sequence.tokens(state.length, end),
            state.pages,
            state.slots[state.slot] if sequence.source is None else sequence.source,
            state.length,
            is_recurrent=not sequence.is_prefilling,
            outputs=max(scored, int(is_sampled)),
            writes=tuple((length - state.length, slot) for length, slot in writes),
            has_hidden=state.mtp_length >= 0,
        )
        budget.tokens -= end - state.length
        budget.rows -= scored
        return Share(sequence, work, is_sampled, scored, snapshots=tuple(snapshots))

    def _snapshots(self, sequence: Sequence, end: int) -> list[tuple[int, int]]:
        """Which states of a chunk of a prompt go to the cache, and to which slots."""
        cache, lease, request = self.cache, sequence.lease, sequence.request
        if cache is None or lease is None or not lease.is_open:
            return []
        wanted = []
        for at in sequence.planned:
            if not sequence.state.length < at <= end:
                continue
            prefix = request.prompt[:at]
            if (request.salt, prefix) in self._reserving or cache.has_snapshot(lease, prefix):
                continue  # others made it, or make it in this step
            self._reserving.add((request.salt, prefix))
            wanted.append(at)
        return sorted(zip(wanted, cache.reserve(len(wanted)), strict=False))

    def _end(self, sequence: Sequence, budget: _Budget) -> int:
        """The position where a sequence's share ends: a chunk at a multiple of `CHUNK` or with the
        prompt, a replay anywhere."""
        start, prompt = sequence.state.length, len(sequence.request.prompt)
        if not sequence.is_prefilling:
            return min(sequence.known, start + budget.tokens)
        end = min(prompt, start + budget.tokens)
        end -= max(0, sequence.unscored(end) - budget.rows)
        return end if end == prompt else end // CHUNK * CHUNK
