"""Real models under any weather: whoever comes, goes on, is cancelled or preempted, each request
gets the tokens and the bits that an engine without cache and drafts gives it alone.

The machine over the fake runner, in test_cache_machine.py, is the longer one; here kernels, the MTP
head and pools of tensors are the real ones. All settings are exact, so that none may differ.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tiny
from conversations import CARRIED, PARAMS, ROOMY, TIGHT, Setting, Talker, dialogues, differences
from fake_runner import letters
from machine_sizes import long, quick
from nybble.engine.request import Request
from nybble.kernels import dispatch

pytestmark = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")

#: The carried model, and random ones with five, and three, value heads for a key head.
MODELS = {"carried": 4096, "qwen3_5-10": 131, "qwen3_5_moe-6": 131}

SETTINGS = st.builds(
    lambda guessing, **rest: Setting(draft=guessing[0], drafts=guessing[1], exact=True, **rest),
    st.sampled_from([("mtp", 1), ("mtp", 3), ("mtp", 4), ("auto", None), ("ngram", 3)]),
    kv=st.sampled_from(["bf16", "fp8"]),
    batched=st.sampled_from([1024, 160]),
    memory=st.sampled_from([ROOMY, TIGHT]),
    preempt=st.sampled_from([0, 5, 11]),
)
LENGTHS = st.one_of(st.sampled_from([1, 63, 64, 65, 128, 129, 192, 256]), st.integers(1, 300))


@dataclass(frozen=True)
class Arrival:
    """A prompt that parts from a trunk after `length` tokens, and how it is asked."""

    seed: int
    length: int
    tail: int
    options: int
    priority: int
    salt: bytes


ARRIVALS = st.builds(
    Arrival,
    st.integers(0, 1),
    LENGTHS,
    st.sampled_from([0, 1, 17, 60]),
    st.integers(0, len(PARAMS) - 1),
    st.integers(-1, 1),
    st.sampled_from([b"", b"", b"another key"]),
)


@cache
def folder(model: str) -> Path:
    """The checkpoint of a model."""
    if model == "carried":
        return CARRIED
    family, _, heads = model.rpartition("-")
    at = Path(tempfile.mkdtemp()) / model
    tiny.checkpoint(at, family, max_position_embeddings=900, linear_num_value_heads=int(heads))
    letters(at)
    return at


@cache
def plain(model: str, kv: str) -> Talker:
    return Talker(folder(model), Setting(kv=kv).plain)


@cache
def trunk(seed: int) -> tuple[int, ...]:
    """A text that prompts begin with."""
    return tuple(t for i in range(8) for t in dialogues()[(seed + 5 * i) % 32])


class SpeculationMachine(RuleBasedStateMachine):
    """Random arrivals, turns, cancellations and preemptions."""

    @initialize(
        model=st.sampled_from(sorted(MODELS)),
        setting=SETTINGS,
        arrivals=st.lists(ARRIVALS, min_size=2, max_size=5),
    )
    def open(self, model: str, setting: Setting, arrivals: list[Arrival]) -> None:
        self.model, self.setting = model, setting
        self.talker = Talker(folder(model), setting)
        self.requests: dict[str, Request] = {}
        self.cancelled: set[str] = set()
        self.arrive(arrivals)

    def ask(self, prompt: tuple[int, ...], options: int, priority: int, salt: bytes) -> None:
        vocab = MODELS[self.model]
        params = PARAMS[options]
        biases = {token % vocab: bias for token, bias in params.logit_bias.items()}
        request = Request(
            f"r{len(self.requests)}",
            tuple(token % vocab for token in prompt),
            replace(params, logit_bias=biases),
            priority,
            salt,
        )
        self.requests[request.id] = request
        self.talker.hold(request)

    @rule(arrivals=st.lists(ARRIVALS, min_size=1, max_size=3))
    def arrive(self, arrivals: list[Arrival]) -> None:
        for drawn in arrivals:
            prompt = (*trunk(drawn.seed)[: drawn.length], *trunk(9)[: drawn.tail])
            self.ask(prompt, drawn.options, drawn.priority, drawn.salt)

    @rule(which=st.integers(0, 100), user=st.integers(1, 50), options=st.integers(0, 5))
    def go_on(self, which: int, user: int, options: int) -> None:
        """The next turn of a conversation that has answered."""
        done = [r for r in self.requests.values() if self.talker.heard(r.id).finish]
        if done:
            request = done[which % len(done)]
            answer = self.talker.heard(request.id).tokens
            prompt = (*request.prompt, *answer, *trunk(4)[:user])
            self.ask(prompt[:700], options, 0, request.salt)

    @rule(steps=st.integers(1, 25))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.talker.step()

    @precondition(lambda self: self.talker.engine.scheduler.running)
    @rule(which=st.integers(0, 30))
    def preempt(self, which: int) -> None:
        running = self.talker.engine.scheduler.running
        self.talker.engine.scheduler.preempt(running[which % len(running)])

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        id = f"r{which % len(self.requests)}"
        if self.talker.engine.cancel(id):
            self.cancelled.add(id)

    def teardown(self) -> None:
        if not hasattr(self, "talker"):
            return
        alone = plain(self.model, self.setting.kv)
        for id, request in self.requests.items():
            if id not in self.cancelled:
                found = self.talker.release(request)
                assert not differences(alone.say([request]), found)
        engine = self.talker.engine
        while not engine.is_idle:
            engine.step()
        engine.check()


SpeculationMachine.TestCase.settings = quick(16, 12)
TestSpeculation = SpeculationMachine.TestCase


@pytest.mark.slow
def test_real_models_for_long() -> None:
    run_state_machine_as_test(SpeculationMachine, settings=long(150, 30))
