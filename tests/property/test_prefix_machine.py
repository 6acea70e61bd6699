"""The prefix cache under any weather, beside a plain model of it: a table of texts, with the time
at which each was last used.

The model knows no tree: what is cached are beginnings of texts, and what is to be found, shared and
forgotten follows from comparing all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from machine_sizes import long, quick
from nybble.engine.prefix import Hit, Lease, PrefixCache
from nybble.errors import OutOfPages
from nybble.models.numbers import Numbers

#: A text is a beginning that others may have too, and a length.
LENGTHS = st.one_of(st.sampled_from([63, 64, 65, 128, 129, 192, 256]), st.integers(1, 420))
SALTS = st.sampled_from([b"", b"", b"other"])
FIRST_SNAPSHOT = 7
#: Whether pages are exact, and have entries of the MTP head.
BITS = st.sampled_from([(True, True)] * 3 + [(False, True), (True, False), (False, False)])

Key = tuple[bytes, tuple[int, ...]]


@cache
def text(seed: int) -> tuple[int, ...]:
    """One of few texts, which part at 100, 200 or 300 tokens, or not at all."""
    draw, tokens = random.Random(0), []
    for at in range(420):
        tokens.append(draw.randrange(9) + (10 * (seed % 4) if at >= 100 * (1 + seed // 4) else 0))
    return tuple(tokens)


@dataclass
class Cached:
    """A page, by the model: the tokens up to its end are its key."""

    page: int
    is_exact: bool
    has_mtp: bool
    used: int
    slot: int | None = None
    slot_used: int = 0


@dataclass(eq=False)
class Sequence:
    """What a sequence has, by the model: `shared` are keys of pages that it must find there."""

    salt: bytes
    tokens: tuple[int, ...]
    lease: Lease
    hit: Hit
    pages: list[int]
    is_exact: bool
    has_mtp: bool
    shared: list[Key] = field(default_factory=list)
    is_open: bool = True
    pinned: Key | None = None
    rolling: Key | None = None


class PrefixMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        pages=st.integers(7, 20),
        snapshots=st.sampled_from([4, 3, 6, 1, 0]),
        page_tokens=st.sampled_from([64, 64, 32, 48, 128]),
        has_states=st.sampled_from([True, True, True, False]),
        is_exact=st.sampled_from([False, False, True]),
    )
    def open(
        self, pages: int, snapshots: int, page_tokens: int, has_states: bool, is_exact: bool
    ) -> None:
        slots = Numbers(snapshots, "snapshots", first=FIRST_SNAPSHOT)
        self.cache = PrefixCache(
            Numbers(pages, "pages"), slots, page_tokens, has_states=has_states, is_exact=is_exact
        )
        self.size, self.step = page_tokens, self.cache.step
        self.clock = count(1)
        self.model: dict[Key, Cached] = {}
        self.running: list[Sequence] = []
        self.reserved: list[int] = []
        self.slots = snapshots if has_states else 0
        self.evicted = self.evicted_slots = 0

    # --------------------------------------------------------------------------------- the model

    def keys(self, salt: bytes, tokens: tuple[int, ...]) -> Iterator[Key]:
        """The beginnings of a text that fill pages."""
        for end in range(self.size, len(tokens) + 1, self.size):
            yield (salt, tokens[:end])

    def users(self, key: Key) -> int:
        return sum(key in s.shared for s in self.running)

    def idle(self) -> list[Key]:
        """Pages without users, those first that are to go first."""
        keys = [key for key in self.model if not self.users(key)]
        return sorted(keys, key=lambda key: (self.model[key].used, -len(key[1])))

    def unpinned(self) -> list[Key]:
        pinned = {s.pinned for s in self.running}
        keys = [k for k, page in self.model.items() if page.slot is not None and k not in pinned]
        return sorted(keys, key=lambda key: self.model[key].slot_used)

    def free_pages(self) -> int:
        own = sum(len(s.pages) - len(s.shared) for s in self.running)
        return self.cache.pages.count - len(self.model) - own

    def free_slots(self) -> int:
        held = sum(page.slot is not None for page in self.model.values())
        return self.slots - held - len(self.reserved)

    def take(self, number: int) -> None:
        """The model gives so many pages away."""
        for key in self.idle()[: max(0, number - self.free_pages())]:
            self.evicted += 1
            self.evicted_slots += self.model.pop(key).slot is not None

    def touch_slot(self, key: Key) -> None:
        self.model[key].slot_used = next(self.clock)

    # --------------------------------------------------------------------------------- sequences

    @rule(seed=st.integers(0, 11), length=LENGTHS, salt=SALTS, spare=st.integers(0, 70))
    def begin(self, seed: int, length: int, salt: bytes, spare: int) -> None:
        self.start(seed, length, salt, spare)

    def start(self, seed: int, length: int, salt: bytes, spare: int) -> Sequence | None:
        """A sequence looks up its prompt and begins, if there is room."""
        tokens = text(seed)[:length]
        most = max(0, length - spare)
        hit = self.cache.find(tokens, salt, most)
        self.compare(hit, tokens, salt, most)
        missing = -(-length // self.size) - len(hit.pages)
        room = self.cache.room(hit)
        if missing > room:
            return None
        lease = self.cache.begin(hit, salt)
        assert self.cache.available == room
        sequence = Sequence(salt, tokens, lease, hit, list(hit.pages), hit.is_exact, hit.has_mtp)
        sequence.shared = list(self.keys(salt, tokens[: hit.length]))
        if hit.slot is not None:
            sequence.pinned = sequence.shared[-1]
        self.running.append(sequence)
        self.take(missing)
        sequence.pages += self.cache.take(missing)
        places = self.cache.positions(lease, hit.length, length)
        assert len(places) <= max(1, self.slots // 2)
        assert all(at % self.step == 0 and hit.length < at <= length for at in places)
        return sequence

    def compare(self, hit: Hit, tokens: tuple[int, ...], salt: bytes, most: int) -> None:
        """What was found is the longest part that may be, by comparing with all that is cached."""
        found: list[Key] = []
        for key in self.keys(salt, tokens):
            if key not in self.model:
                break
            found.append(key)
        usable = [
            key
            for key in found
            if len(key[1]) <= most
            and len(key[1]) % self.step == 0
            and (not self.cache.has_states or self.model[key].slot is not None)
        ]
        length = len(usable[-1][1]) if usable else 0
        shared = [self.model[key] for key in found[: length // self.size]]
        assert hit.length == length
        assert hit.pages == [page.page for page in shared]
        assert hit.slot == (shared[-1].slot if shared else None)
        assert hit.is_exact == all(page.is_exact for page in shared)
        assert hit.has_mtp == all(page.has_mtp for page in shared)
        if most < self.step:
            assert hit.reason == "short"
        elif all(key[0] != salt for key in self.model):
            assert hit.reason == "empty"
        else:
            assert hit.matched == max(common(tokens, salt, key) for key in self.model)
            assert self.explains(hit, salt, tokens, found, most), hit.reason
        assert hit.explain()

    def explains(
        self, hit: Hit, salt: bytes, tokens: tuple[int, ...], found: list[Key], most: int
    ) -> bool:
        """Whether the reason that no more was found is one."""
        reach = min(len(found) * self.size, most) // self.step * self.step
        if hit.length < reach:
            lost = hit.reason == "evicted-snapshot" and self.evicted_slots > 0
            return hit.reason == "no-snapshot" or lost
        if hit.matched >= most:
            return hit.reason == "hit"
        if hit.reason == "evicted":
            return self.evicted > 0
        end = len(found) * self.size
        after = [k for k in self.model if k[0] == salt and k[1][:end] == tokens[:end] != k[1]]
        ended = "hit" if hit.length else "short"
        return hit.reason == ("parts" if after else ended)

    @rule(
        seed=st.integers(0, 11),
        length=LENGTHS,
        spare=st.sampled_from([1, 1, 30, 420]),
        bits=BITS,
        ends=st.sampled_from([True, True, False]),
    )
    def serve(
        self, seed: int, length: int, spare: int, bits: tuple[bool, bool], ends: bool
    ) -> None:
        """A prompt is computed with snapshots wherever they can be had, and perhaps ends."""
        sequence = self.start(seed, length, b"", spare)
        if sequence is None:
            return
        self.compute(sequence, length, bits)
        which = len(self.running) - 1
        for steps in range(sequence.hit.length // self.step + 1, length // self.step + 1):
            self.reserve(1)
            if self.reserved:
                self.attach(which, steps, is_rolling=False)
        if ends:
            self.end(which)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), which=st.integers(0, 99), upto=st.integers(1, 420))
    def fill(self, data: st.DataObject, which: int, upto: int) -> None:
        """A sequence fills its next pages, with bits of one kind or another."""
        bits = data.draw(BITS)
        self.compute(self.running[which % len(self.running)], upto, bits)

    def compute(self, sequence: Sequence, upto: int, bits: tuple[bool, bool]) -> None:
        self.unpin(sequence)
        for key in list(self.keys(sequence.salt, sequence.tokens[:upto])):
            number = len(key[1]) // self.size - 1
            if number >= len(sequence.shared) and sequence.is_open:
                self.extend(sequence, number, key, *bits)

    def extend(
        self, sequence: Sequence, number: int, key: Key, is_exact: bool, has_mtp: bool
    ) -> None:
        mine, here = sequence.pages[number], self.model.get(key)
        exact, mtp = is_exact and sequence.is_exact, has_mtp and sequence.has_mtp
        tokens = key[1][-self.size :]
        got = self.cache.extend(sequence.lease, tokens, mine, is_exact=is_exact, has_mtp=has_mtp)
        if self.cache.is_exact and not exact:
            sequence.is_open = False
        elif here is None:
            self.model[key] = Cached(mine, exact, mtp, 0)
        elif exact and here.is_exact:  # the same bits
            if mtp and not here.has_mtp and not self.users(key):
                here.page, here.has_mtp = mine, True
            mine = here.page
        elif self.users(key) or (here.is_exact and not exact):
            sequence.is_open = False
        else:
            here.page, here.is_exact, here.has_mtp, here.slot = mine, exact, mtp, None
            for after in [k for k in self.model if k[0] == key[0] and k != key]:
                if after[1][: len(key[1])] == key[1]:  # computed from the old bits
                    del self.model[after]
        assert got == mine
        sequence.pages[number] = got
        assert sequence.lease.is_open == sequence.is_open
        if sequence.is_open:
            sequence.shared.append(key)
            sequence.is_exact &= self.model[key].is_exact
            sequence.has_mtp &= self.model[key].has_mtp

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def read(self, which: int) -> None:
        """A sequence has done the step that reads its snapshot."""
        self.unpin(self.running[which % len(self.running)])

    def unpin(self, sequence: Sequence) -> None:
        self.cache.unpin(sequence.lease)
        key, sequence.pinned = sequence.pinned, None
        if key is not None and all(s.pinned != key for s in self.running):
            self.touch_slot(key)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        sequence = self.running.pop(which % len(self.running))
        self.cache.release(sequence.lease, sequence.pages)
        now, key = next(self.clock), sequence.pinned
        if key is not None and all(s.pinned != key for s in self.running):
            self.touch_slot(key)
        for key in sequence.shared:
            if not self.users(key):
                self.model[key].used = now

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        leader = self.running[which % len(self.running)]
        own = len(leader.pages) - len(leader.shared)
        if own > self.cache.available:
            return
        lease = self.cache.fork(leader.lease)
        other = Sequence(
            leader.salt,
            leader.tokens,
            lease,
            leader.hit,
            lease.pages,
            leader.is_exact,
            leader.has_mtp,
            list(leader.shared),
            leader.is_open,
        )
        self.running.append(other)
        self.take(own)
        other.pages = lease.pages + self.cache.take(own)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), number=st.integers(1, 6))
    def grow(self, which: int, number: int) -> None:
        """A sequence takes more pages than it fills, or than there are."""
        sequence = self.running[which % len(self.running)]
        if number > len(self.idle()) + self.free_pages():
            with pytest.raises(OutOfPages):
                self.cache.take(number)
            return
        self.take(number)
        sequence.pages += self.cache.take(number)

    # --------------------------------------------------------------------------------- snapshots

    @rule(number=st.integers(0, 4))
    def reserve(self, number: int) -> None:
        free, unpinned = self.free_slots(), self.unpinned()
        lost = unpinned[: max(0, number - free)] if self.slots else []
        for key in lost:
            self.model[key].slot = None
        self.evicted_slots += len(lost)
        slots = self.cache.reserve(number)
        assert len(slots) == min(number, free + len(lost))
        assert not set(slots) & set(self.reserved)
        self.reserved += slots

    @precondition(lambda self: self.running and self.reserved)
    @rule(which=st.integers(0, 99), steps=st.integers(1, 4), is_rolling=st.booleans())
    def attach(self, which: int, steps: int, is_rolling: bool) -> None:
        sequence = self.running[which % len(self.running)]
        length, slot = steps * self.step, self.reserved.pop()
        depth = length // self.size
        key = sequence.shared[depth - 1] if depth <= len(sequence.shared) else None
        is_new = key is not None and self.model[key].slot is None
        found = self.cache.attach(sequence.lease, length, slot, is_rolling=is_rolling)
        assert found == is_new
        if key is not None and (is_new or all(s.pinned != key for s in self.running)):
            self.touch_slot(key)
        if key is not None and is_new:
            self.model[key].slot = slot
            sequence.rolling = key if is_rolling else sequence.rolling

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def renew(self, which: int) -> None:
        sequence = self.running[which % len(self.running)]
        key, sequence.rolling = sequence.rolling, None
        unpinned, free = self.unpinned(), self.free_slots()
        slot = self.cache.renew(sequence.lease)
        if not sequence.is_open:
            assert slot is None
        elif key in unpinned:
            assert slot == self.model[key].slot
            self.model[key].slot = None
        elif free:
            assert slot is not None
        elif unpinned:
            assert slot == self.model[unpinned[0]].slot
            self.model[unpinned[0]].slot = None
            self.evicted_slots += 1
        else:
            assert slot is None
        self.reserved += [] if slot is None else [slot]

    @precondition(lambda self: self.reserved)
    @rule(number=st.integers(1, 3))
    def cancel(self, number: int) -> None:
        self.cache.cancel(self.reserved[:number])
        del self.reserved[:number]

    @rule()
    def clear(self) -> None:
        for key in self.idle():
            del self.model[key]
        self.cache.clear()

    # --------------------------------------------------------------------------------- always

    @invariant()
    def is_conserved(self) -> None:
        own = [page for s in self.running for page in s.pages[len(s.shared) :]]
        self.cache.check(own)
        assert self.cache.pages.free == self.free_pages()
        assert self.cache.available == self.free_pages() + len(self.idle())
        for s in self.running:
            assert s.lease.pages == s.pages[: len(s.shared)]
            assert s.lease.pages == [self.model[key].page for key in s.shared]

    @invariant()
    def counts(self) -> None:
        figures = self.cache.figures
        assert figures.pages == len(self.model)
        assert figures.snapshots == sum(page.slot is not None for page in self.model.values())
        assert figures.evicted_pages == self.evicted
        assert figures.evicted_snapshots == self.evicted_slots

    def teardown(self) -> None:
        """All that was lent comes back."""
        if not hasattr(self, "cache"):
            return
        while self.running:
            self.end(0)
        self.cache.cancel(self.reserved)
        self.cache.clear()
        self.cache.check()
        assert self.cache.pages.free == self.cache.pages.count
        if self.cache.snapshots is not None:
            assert self.cache.snapshots.free == self.slots


def common(tokens: tuple[int, ...], salt: bytes, key: Key) -> int:
    """How many tokens a text and a cached one begin with alike."""
    if key[0] != salt:
        return 0
    pairs = zip(tokens, key[1], strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(key[1])))


class TestPrefixCache(PrefixMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = quick(300, 30)


@pytest.mark.slow
def test_a_long_life() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(PrefixMachine, settings=long(2_000, 50))
