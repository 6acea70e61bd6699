"""An engine with a prefix cache and drafts, under any weather: each request gets what it would have
got alone, without a cache and without drafts, and no page, slot or snapshot is lost.

The runner is the fake one, whose logits and guesses are hashes of what pages, slots and entries of
the MTP head really hold, and which fails at once where one of them is not of the text that is read.
Cache, scheduler, drafters, engine and sampler are the real ones.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_engine_machine import (
    COPY,
    FORWARD,
    PARAMS,
    Columns,
    Heard,
    cannot_start,
    tokenizer,
)

from fake_runner import VOCAB, FakeRunner
from machine_sizes import long, quick
from nybble.engine.drafter import Drafter, MtpDrafter, NgramDrafter
from nybble.engine.engine import Engine, EngineOptions
from nybble.engine.prefix import PrefixCache
from nybble.engine.request import Request, SamplingParams
from nybble.engine.sampler import Sampler
from nybble.engine.speculation import Speculation
from nybble.errors import ContextTooLong, DoesNotFit, EngineError, OutOfPages
from nybble.kernels.compute import Compute
from nybble.models.numbers import Numbers

CONTEXT = 420
#: What greedy sampling follows so often that two of three guesses are right.
HABIT = 8.0
GUESS, SHRUNK = "no memory to guess in", "no memory to compute in"

#: How states and cache go together: bits that tell of kernels and a cache that keeps what chunks
#: made; bits that do not tell, and a cache that keeps all; no recurrent states; and the default,
#: where what goes on from generated text may have other bits.
Kind = Literal["exact", "free", "attention", "default"]
KINDS: tuple[Kind, ...] = ("exact", "free", "attention", "default")


@dataclass(frozen=True)
class Size:
    """An engine's size, and who guesses."""

    kind: Kind
    drafter: Literal["mtp", "ngram", "off"]
    drafts: int
    page_tokens: int
    tokens: int
    sequences: int
    more_slots: int
    batched: int
    snapshots: int
    has_whims: bool


SIZES = st.builds(
    Size,
    st.sampled_from(KINDS),
    st.sampled_from(["mtp", "mtp", "ngram", "off"]),
    st.integers(1, 4),
    st.sampled_from([4, 16, 64, 64, 24]),
    st.integers(200, 900),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(64, 300),
    st.integers(0, 6),
    st.booleans(),
)

#: Most near a multiple of 64, where hits begin.
LENGTHS = st.one_of(
    st.sampled_from([1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 257]), st.integers(1, 300)
)


@cache
def trunk(seed: int) -> tuple[int, ...]:
    """A text that prompts begin with; its ends of texts are turns'."""
    draw = random.Random(seed)
    return tuple(draw.randrange(VOCAB) for _ in range(CONTEXT))


def asked(
    seed: int,
    length: int,
    tail: int,
    params: SamplingParams,
    priority: int,
    salt: bytes,
    boundaries: list[int] | None,
) -> Request:
    """A request whose prompt parts from its trunk after `length` tokens."""
    prompt = (*trunk(seed)[:length], *trunk(100 + tail)[:tail])
    turns = None if boundaries is None else tuple(b for b in boundaries if b <= len(prompt))
    scored = params.prompt_logprobs if tail == 7 else None  # those prompts are not looked up
    return Request("", prompt, replace(params, prompt_logprobs=scored), priority, salt, turns)


ARRIVALS = st.builds(
    asked,
    st.integers(0, 2),
    LENGTHS,
    st.sampled_from([0, 0, 1, 7, 40]),
    PARAMS,
    st.integers(-2, 2),
    st.sampled_from([b"", b"", b"another key"]),
    st.one_of(st.none(), st.lists(st.integers(1, 300), max_size=3, unique=True).map(sorted)),
)


class Whims(Speculation):
    """A policy without reasons: any number of drafts, and heads that begin late or stop midway."""

    def __init__(self, most: int, seed: int) -> None:
        super().__init__(most, None)
        self._most, self._draw = most, random.Random(seed)

    def plan(self, keys: Sequence[int]) -> list[int]:
        super().plan(keys)
        return [self._draw.randint(0, self._most) for _ in keys]

    def starts(self, key: int) -> bool:
        return self._draw.random() < 0.8

    def is_over(self, key: int) -> bool:
        return self._draw.random() < 0.02


class FragileRunner(FakeRunner):
    """Its next copy may fail too, when a part of it is made."""

    copy_fails: Exception | None = None

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        super().copy(from_pages, to_pages, from_slot, to_slot)
        if self.copy_fails is not None:
            failure, self.copy_fails = self.copy_fails, None
            if to_pages:
                self.memory[to_pages[-1]] = list(self.memory[from_pages[0]])
            self.states.pop(to_slot, None)
            raise failure


@dataclass
class World:
    """An engine and all its parts."""

    engine: Engine
    runner: FragileRunner
    grammars: Columns
    cache: PrefixCache
    snapshots: Numbers | None


def world(size: Size, seed: int) -> World:
    """The engine of a size, with its cache and drafter."""
    has_states = size.kind != "attention"
    # There is no model with an MTP head and without recurrent states.
    source = size.drafter if has_states or size.drafter == "off" else "ngram"
    drafts = 0 if source == "off" else size.drafts
    each = 1 + drafts if has_states else 1
    batched = size.sequences * (1 + drafts) + size.batched
    options = EngineOptions(size.sequences, batched, size.page_tokens, drafts)
    pages = Numbers(-(-size.tokens // size.page_tokens), "pages")
    slots = Numbers(size.sequences * each + size.more_slots, "slots")
    snapshots = Numbers(size.snapshots, "snapshots", slots.count) if has_states else None
    traits: dict[str, Any] = {
        "has_states": has_states,
        "has_origins": size.kind != "free",
        "habit": HABIT,
    }
    runner = FragileRunner(options, pages, slots, snapshots, **traits)
    is_exact = size.kind == "exact"
    held = PrefixCache(pages, snapshots, size.page_tokens, has_states=has_states, is_exact=is_exact)
    runner.cached = lambda: {node.page for node in held._nodes()}
    drafter: Drafter | None = None
    if drafts:
        drafter = MtpDrafter(runner) if source == "mtp" else NgramDrafter()
    policy = Whims(drafts, seed) if size.has_whims else Speculation(drafts, drafts)
    grammars = Columns()
    engine = Engine(
        runner,
        tokenizer(),
        options,
        pages,
        slots,
        CONTEXT,
        Sampler(VOCAB, Compute(threads=1)),
        grammars,
        cache=held,
        drafter=drafter,
        speculation=policy if drafter is not None else None,
        slots_each=each,
    )
    return World(engine, runner, grammars, held, snapshots)


def alone(request: Request, kind: Kind, nan_after: tuple[int, int] | None, room: int) -> Heard:
    """The same request, one choice after another in an engine that has room for anything, pages of
    another size, no cache and no drafts. `room`: the tokens that the crowded engine has for one
    sequence."""
    options = EngineOptions(max_sequences=1, max_batched_tokens=1000, page_tokens=50)
    pages, slots = Numbers(40, "pages"), Numbers(1, "slots")
    traits: dict[str, Any] = {
        "has_states": kind != "attention",
        "has_origins": kind != "free",
        "habit": HABIT,
    }
    runner, grammars = FakeRunner(options, pages, slots, **traits), Columns()
    runner.nan_after = nan_after
    sampler = Sampler(VOCAB, Compute(threads=1))
    one = Engine(runner, tokenizer(), options, pages, slots, CONTEXT, sampler, grammars)
    most = min(request.params.max_tokens, room - len(request.prompt))
    least = min(most, request.params.min_tokens)
    params = replace(request.params, max_tokens=most, min_tokens=least)
    one.add(replace(request, params=params))
    heard = Heard()
    while not one.is_idle:
        for event in one.step():
            heard.hear(event)
    return heard


class CacheMachine(RuleBasedStateMachine):
    """Random arrivals, conversations, cancellations and failures in an engine with a tiny pool."""

    @initialize(
        size=SIZES,
        arrivals=st.lists(ARRIVALS, min_size=1, max_size=4),
        seed=st.integers(0, 5),
        nan_after=st.one_of(
            st.none(), st.none(), st.tuples(st.integers(1, 26), st.integers(1, 26))
        ),
    )
    def open(
        self,
        size: Size,
        arrivals: list[Request],
        seed: int,
        nan_after: tuple[int, int] | None,
    ) -> None:
        self.size, self.world, self.nan_after = size, world(size, seed), nan_after
        self.engine, self.runner = self.world.engine, self.world.runner
        self.runner.nan_after = nan_after
        self.requests: dict[str, Request] = {}
        self.heard: dict[str, Heard] = defaultdict(Heard)
        self.disturbed: set[str] = set()  # cancelled, or in a batch that failed
        self.generated: set[str] = set()  # whose prompts were generated, in part
        self.arrive(arrivals)

    def add(self, drawn: Request) -> bool:
        request = replace(drawn, id=f"r{len(self.requests)}")
        length = len(request.prompt)
        if length >= self.engine.limits.room:
            with pytest.raises((ContextTooLong, OutOfPages), match=str(length)):
                self.engine.add(request)
        elif cannot_start(request):
            with pytest.raises(EngineError, match="nothing can start it"):
                self.engine.add(request)
        else:
            self.engine.add(request)
            self.requests[request.id] = request
            return True
        return False

    @rule(arrivals=st.lists(ARRIVALS, min_size=1, max_size=3))
    def arrive(self, arrivals: list[Request]) -> None:
        for drawn in arrivals:
            self.add(drawn)

    @rule(
        which=st.integers(0, 100),
        left=st.one_of(st.none(), st.none(), st.integers(0, 30)),
        tail=st.integers(1, 70),
        params=PARAMS,
    )
    def go_on(self, which: int, left: int | None, tail: int, params: SamplingParams) -> None:
        """The next turn of a conversation: an answer, or what is `left` of it, and more."""
        ended = [id for id, heard in self.heard.items() if len(heard.ends) and heard.tokens]
        if not ended:
            return
        id = ended[which % len(ended)]
        before = self.requests[id]
        answer = tuple(token.id for token in self.heard[id].tokens[0])[:left]
        prompt = (*before.prompt, *answer, *trunk(200 + tail)[:tail])
        if self.add(replace(before, prompt=prompt, params=params, boundaries=None)):
            self.generated.add(f"r{len(self.requests) - 1}")

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.one_step()

    def one_step(self) -> None:
        for event in self.engine.step():
            self.heard[event.request].hear(event)
            if event.error in (FORWARD, COPY, GUESS, SHRUNK):
                self.disturbed.add(event.request)
        self.check()

    @precondition(lambda self: not self.engine.is_idle)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        id = f"r{which % len(self.requests)}"
        left = self.requests[id].params.n - len(self.heard[id].ends)
        events = self.engine.cancel(id)
        assert len(events) == left
        for event in events:
            assert event.finish == "cancelled"
            self.heard[id].hear(event)
            self.disturbed.add(id)

    @precondition(lambda self: not self.engine.is_idle)
    @rule(what=st.sampled_from([FORWARD, COPY, GUESS, SHRUNK]))
    def fail(self, what: str) -> None:
        """What is next of a kind fails, after it has written all or a part of it."""
        if what == COPY:
            self.runner.copy_fails = EngineError(what)
        elif what == GUESS:
            self.runner.guess_fails = EngineError(what)
        else:  # without memory, the last in turn ends and the others begin again
            self.runner.fails = EngineError(what) if what == FORWARD else DoesNotFit(what)
        self.one_step()

    @rule()
    def forget(self) -> None:
        """All that nobody uses leaves the cache."""
        self.world.cache.clear()

    def check(self) -> None:
        """Every page, slot and snapshot has its owner."""
        engine, cache, snapshots = self.engine, self.world.cache, self.world.snapshots
        engine.check()
        states = [s.state for s in engine.scheduler.running]
        slots = [slot for state in states for slot in state.slots]
        assert len(set(slots)) == len(slots) == engine.slots.count - engine.slots.free
        nodes = list(cache._nodes())
        shared = {node.page for node in nodes}
        assert len(shared) == len(nodes)
        own = [page for state in states for page in state.pages if page not in shared]
        assert len(set(own)) == len(own), "a page outside the cache has two owners"
        assert {*own, *shared} == engine.pages.lent, "a page is lost"
        kept = [node.snapshot for node in nodes if node.snapshot is not None]
        if snapshots is not None:
            assert sorted(kept) == sorted(snapshots.lent), "a snapshot is lost"

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            self.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        work = sum((len(r.prompt) + 30) * r.params.n for r in self.requests.values())
        for _ in range(100 + 4 * work):
            if self.engine.is_idle:
                break
            self.one_step()
        assert self.engine.is_idle, "not all of them end"
        assert self.engine.step() == []
        for id, request in self.requests.items():
            self.compare(request, self.heard[id], id in self.disturbed)
        self.world.cache.clear()
        self.check()
        assert self.engine.pages.free == self.engine.pages.count

    def compare(self, request: Request, heard: Heard, is_disturbed: bool) -> None:
        assert set(heard.ends) == set(range(request.params.n))
        if self.size.kind == "default" and request.id in self.generated:
            return  # other bits are allowed; that pages and states agree, the runner has seen
        expected = alone(request, self.size.kind, self.nan_after, self.engine.limits.room)
        has_failed = any(finish == "error" for finish, _ in expected.ends.values())
        if not (is_disturbed or has_failed):
            assert heard == expected
            return
        if heard.prompt is not None:
            assert heard.prompt == expected.prompt
        for choice, tokens in heard.tokens.items():
            # With one choice NaN, the others end where they are: earlier or later than alone.
            both = min(len(tokens), len(expected.tokens[choice]))
            assert tokens[:both] == expected.tokens[choice][:both]


def test_a_page_of_other_bits_takes_with_it_what_follows() -> None:
    """Generated pages are computed again as part of a prompt that parts from them: the pages and
    the state that follow them are of the bits before, and do not go with the new ones."""
    size = Size("default", "off", 1, 16, 900, 2, 0, 200, 6, has_whims=False)
    engine = world(size, 0).engine

    def said(prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        engine.add(Request("r", prompt, params))
        found = []
        while not engine.is_idle:
            found += [event.token.id for event in engine.step() if event.token is not None]
        return tuple(found)

    prompt = trunk(0)[:70]
    answer = said(prompt, 140)
    said((*prompt, *answer[:50], 5, 6, 7), 4)
    said((*prompt, *answer, 9, 9, 9), 4)  # the runner sees what it begins with
    assert engine.stats.cache_hits >= 128


CacheMachine.TestCase.settings = quick(200, 10)
TestCache = CacheMachine.TestCase


@pytest.mark.slow
def test_a_cache_for_long() -> None:
    run_state_machine_as_test(CacheMachine, settings=long(4_000, 25))
