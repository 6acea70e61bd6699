"""An engine under any weather: whoever comes, goes, is preempted or fails, every page and slot has
one owner, and each request gets what it would have got alone.

The runner is the fake one, whose logits are a hash of what pages and slots really hold, and the
grammars are fakes of a few letters; scheduler, engine, sampler and texts are the real ones.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fake_runner import END, VOCAB, FakeRunner, letters
from machine_sizes import long, quick
from nybble.engine.engine import Engine, EngineOptions
from nybble.engine.request import (
    MOST_CHOICES,
    Event,
    Grammar,
    PromptLogprobs,
    Request,
    SamplingParams,
    Token,
)
from nybble.engine.sampler import Sampler
from nybble.errors import ContextTooLong, EngineError, OutOfPages
from nybble.kernels.compute import Compute
from nybble.models.numbers import Numbers
from nybble.text.tokenizer import Tokenizer

CONTEXT = 150

#: What fails when a forward, or a copy of a state, is made to fail.
FORWARD, COPY = "layer 3 is NaN", "no memory to copy to"

LENGTHS = st.one_of(
    st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129]), st.integers(1, 30), st.integers(1, 149)
)
#: Texts of `Columns`; the last four fail, each elsewhere.
GRAMMARS = ("abc|xyz|mno", "ab|cd", "a", "unstarted", "uncompiled", "unmasked", "unaccepted")
BIASES: tuple[dict[int, float], ...] = (
    {},
    {},
    {3: 100.0, 27: -100.0},
    {END: 3.0},
    dict.fromkeys(range(20, VOCAB), -100.0),
)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(3, 30),
    min_tokens=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 3),
    n=st.sampled_from([1, 1, 1, 1, 2, 3]),
    ignore_eos=st.sampled_from([True, True, False]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    stop=st.sampled_from([(), (), ("ab",), ("bc", "xa")]),
    stop_token_ids=st.sampled_from([(), (), (28,)]),
    include_stop=st.booleans(),
    bad_words=st.sampled_from([(), (), (), ("c",), ("ab", "bca"), ("xyz", "q")]),
    logit_bias=st.sampled_from(BIASES),
    grammar=st.one_of(
        st.none(),
        st.none(),
        st.none(),
        st.builds(Grammar, st.just("regex"), st.sampled_from(GRAMMARS)),
    ),
    logprobs=st.sampled_from([None, 2]),
    prompt_logprobs=st.sampled_from([None, None, 0, 3]),
)
ARRIVALS = st.builds(
    lambda length, seed, params, priority: Request("", prompt(length, seed), params, priority),
    LENGTHS,
    st.integers(0, 5),
    PARAMS,
    st.integers(-2, 2),
)


@cache
def tokenizer() -> Tokenizer:
    return letters(Path(tempfile.mkdtemp()))


@cache
def prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(1, VOCAB) for _ in range(length))


class Columns:
    """Grammars of columns: "abc|xyz" allows a or x, then b or y, then c or z, and is complete.

    "unstarted" is refused for a second choice, "uncompiled" when it should be ready; "unmasked" and
    "unaccepted" fail with their second token.
    """

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.accepted: dict[int, int] = {}
        self.patience: dict[int, int] = {}
        self.asked: list[int] = []

    def start(self, key: int, grammar: Grammar) -> None:
        assert key not in self.texts
        if grammar.text == "unstarted" and key % MOST_CHOICES:
            raise EngineError("grammar: nothing can start it")
        self.texts[key], self.accepted[key] = grammar.text, 0
        self.patience[key] = key // MOST_CHOICES % 3

    def is_ready(self, key: int) -> bool:
        self.patience[key] -= 1
        if self.patience[key] < 0 and self.texts[key] == "uncompiled":
            raise EngineError("grammar: takes too long")
        return self.patience[key] < 0

    def ask(self, keys: Sequence[int]) -> None:
        assert not self.asked, "masks were asked for and not collected"
        assert all(self.patience[key] < 0 for key in keys)
        self.asked = list(keys)

    def collect(self) -> list[bytes]:
        asked, self.asked = self.asked, []
        return [self.mask(key) for key in asked]

    def mask(self, key: int) -> bytes:
        if self.failure(key):
            return b""
        return sum(1 << (ord(letter) - 96) for letter in self.column(key)).to_bytes(4, "little")

    def column(self, key: int) -> set[str]:
        """What may come next."""
        return {word[self.accepted[key]] for word in self.texts[key].split("|")}

    def failure(self, key: int) -> str:
        has_failed = self.texts[key] == "unmasked" and self.accepted[key] == 1
        return "grammar: has failed" if has_failed else ""

    def accept(self, key: int, token: int) -> bool:
        assert chr(96 + token) in self.column(key)
        if self.texts[key] == "unaccepted" and self.accepted[key] == 1:
            raise EngineError("grammar: does not allow it")
        self.accepted[key] += 1
        return self.accepted[key] == len(self.texts[key].partition("|")[0])

    def drop(self, key: int) -> None:
        self.texts.pop(key, None)  # may not have begun

    def close(self) -> None:
        self.texts = {}


class FailingRunner(FakeRunner):
    """Its next copy may fail too, when a part of it is made."""

    copy_fails: Exception | None = None

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        if self.copy_fails is not None:
            error, self.copy_fails = self.copy_fails, None
            self.memory[to_pages[0]] = list(self.memory[from_pages[0]])
            raise error
        super().copy(from_pages, to_pages, from_slot, to_slot)


def engine(options: EngineOptions, pages: int, slots: int) -> tuple[Engine, FailingRunner, Columns]:
    numbers = Numbers(pages, "pages"), Numbers(slots, "slots")
    runner, grammars = FailingRunner(options, *numbers), Columns()
    sampler = Sampler(VOCAB, Compute(threads=1))
    made = Engine(runner, tokenizer(), options, *numbers, CONTEXT, sampler, grammars)
    return made, runner, grammars


def cannot_start(request: Request) -> bool:
    grammar = request.params.grammar
    return grammar is not None and grammar.text == "unstarted" and request.params.n > 1


@dataclass
class Heard:
    """All that was said about a request: of each choice its tokens, and why it ended."""

    prompt: PromptLogprobs | None = None
    tokens: dict[int, list[Token]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[int, tuple[str, str]] = field(default_factory=dict)

    def hear(self, event: Event) -> None:
        assert event.choice not in self.ends, "a choice goes on after its end"
        if event.prompt is not None:
            assert self.prompt is None
            assert not self.tokens
            self.prompt = event.prompt
        if event.token is not None:
            self.tokens[event.choice].append(event.token)
        finish = event.finish or (event.token.finish if event.token else "")
        if finish:
            self.ends[event.choice] = (finish, event.error)


def alone(request: Request, nan_after: tuple[int, int] | None, room: int) -> Heard:
    """The same request, one choice after another in an engine that has room for anything; pages of
    another size. `room`: the tokens that the crowded engine has for one sequence."""
    options = EngineOptions(max_sequences=1, max_batched_tokens=1000, page_tokens=50)
    one, runner, grammars = engine(options, 40, 1)
    runner.nan_after = nan_after
    most = min(request.params.max_tokens, room - len(request.prompt))
    params = replace(
        request.params, max_tokens=most, min_tokens=min(most, request.params.min_tokens)
    )
    one.add(replace(request, params=params))
    heard = Heard()
    while not one.is_idle:
        for event in one.step():
            heard.hear(event)
    one.check()
    assert not grammars.texts
    return heard


class EngineMachine(RuleBasedStateMachine):
    """Random arrivals, cancellations and failures in an engine with a tiny pool."""

    @initialize(
        page_tokens=st.sampled_from([4, 16, 50]),
        tokens=st.integers(30, 180),
        slots=st.integers(2, 5),
        sequences=st.integers(2, 5),
        more=st.integers(64, 200),
        nan_after=st.one_of(st.none(), st.tuples(st.integers(1, 26), st.integers(1, 26))),
    )
    def open(
        self,
        page_tokens: int,
        tokens: int,
        slots: int,
        sequences: int,
        more: int,
        nan_after: tuple[int, int] | None,
    ) -> None:
        options = EngineOptions(sequences, sequences + more, page_tokens)
        pages = -(-tokens // page_tokens)
        self.engine, self.runner, self.grammars = engine(options, pages, slots)
        self.runner.nan_after = self.nan_after = nan_after
        self.requests: dict[str, Request] = {}
        self.heard: dict[str, Heard] = defaultdict(Heard)
        self.disturbed: set[str] = set()  # cancelled, or in a batch that failed

    @rule(arrivals=st.lists(ARRIVALS, min_size=1, max_size=3))
    def arrive(self, arrivals: list[Request]) -> None:
        for drawn in arrivals:
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

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.one_step()

    def one_step(self) -> None:
        for event in self.engine.step():
            self.heard[event.request].hear(event)
            if event.error in (FORWARD, COPY):
                self.disturbed.add(event.request)

    @precondition(lambda self: not self.engine.is_idle)
    @rule(which=st.one_of(st.none(), st.integers(0, 100)))
    def disturb(self, which: int | None) -> None:
        if which is None:
            self.fail()
        else:
            self.cancel(f"r{which % len(self.requests)}")

    def cancel(self, id: str) -> None:
        left = self.requests[id].params.n - len(self.heard[id].ends)
        events = self.engine.cancel(id)
        assert len(events) == left
        for event in events:
            assert event.finish == "cancelled"
            self.heard[id].hear(event)
            self.disturbed.add(id)

    def fail(self) -> None:
        """A batch fails after it has written half of everything."""
        self.runner.fails = EngineError(FORWARD)
        self.one_step()
        assert self.runner.fails or self.disturbed  # nobody computes while all grammars compile

    @rule()
    def fail_to_copy(self) -> None:
        """The next state that another choice gets is copied in part."""
        self.runner.copy_fails = EngineError(COPY)

    @invariant()
    def everything_has_one_owner(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        self.engine.check()
        assert len(scheduler.running) <= scheduler.options.max_sequences
        states = [s.state for s in scheduler.running]
        for numbers, held in (
            (self.engine.pages, [p for s in states for p in s.pages]),
            (self.engine.slots, [n for s in states for n in s.slots]),
        ):
            assert len(set(held)) == len(held) == numbers.count - numbers.free
        stats = self.engine.stats
        choices = sum(r.params.n for r in self.requests.values())
        ended = sum(len(h.ends) for h in self.heard.values())
        assert stats.running + stats.waiting == choices - ended
        shaped = {id: r for id, r in self.requests.items() if r.params.grammar}
        left = sum(r.params.n - len(self.heard[id].ends) for id, r in shaped.items())
        assert len(self.grammars.texts) == left, "a grammar is kept, or lost"
        assert not self.grammars.asked

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

    def compare(self, request: Request, heard: Heard, is_disturbed: bool) -> None:
        expected = alone(request, self.nan_after, self.engine.limits.room)
        has_failed = any(finish == "error" for finish, _ in expected.ends.values())
        assert set(heard.ends) == set(range(request.params.n))
        if not (is_disturbed or has_failed):
            assert heard == expected
            return
        if heard.prompt is not None:
            assert heard.prompt == expected.prompt
        for choice, tokens in heard.tokens.items():
            # With one choice NaN, the others end where they are: earlier or later than alone.
            both = min(len(tokens), len(expected.tokens[choice]))
            assert tokens[:both] == expected.tokens[choice][:both]
            assert both or is_disturbed or has_failed
        if not is_disturbed:
            assert {finish for finish, _ in heard.ends.values()} & {"error"}


EngineMachine.TestCase.settings = quick(200, 8)
TestEngine = EngineMachine.TestCase


@pytest.mark.slow
def test_an_engine_for_long() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(EngineMachine, settings=long(1000, 25))
