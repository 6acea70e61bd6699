"""The public reproduction of corrupted states: hold one prefix, poison the cache with others that
are shifted against it, and probe again. What is shipped answers as an empty engine does, in all
bits, every time, and so do the poisoners and the one who holds.
"""

from __future__ import annotations

import pytest

from conversations import (
    CARRIED,
    ROOMY,
    TIGHT,
    Setting,
    Spoken,
    Talker,
    dialogues,
    differences,
)
from nybble.engine.request import Request, SamplingParams
from nybble.kernels import dispatch

pytestmark = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")

MOST_SHIFT = 128
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, seed=11)


def probe() -> tuple[int, ...]:
    d = dialogues()
    return (*d[3], *d[8], *d[10])


def shifts(rounds: int) -> list[int]:
    """From one token to two chunks, all alike often."""
    return [1 + (MOST_SHIFT - 1) * i // (rounds - 1) for i in range(rounds)]


def poison(shift: int) -> list[Request]:
    """What begins later in the probe's text, ends earlier, or has something else before it."""
    text, other = probe(), dialogues()[shift % 32]
    prompts = {
        "later": text[shift:],
        "earlier": (*text[:-shift], *other),
        "before": (*text[100 : 100 + shift], *text),
    }
    return [Request(f"{name} {shift}", prompt, SEEDED) for name, prompt in prompts.items()]


def check(memory: float, rounds: int) -> None:
    plain = Talker(CARRIED, Setting().plain)
    talker = Talker(CARRIED, Setting(memory=memory))
    expected = plain.say([Request("probe", probe(), GREEDY)])
    held = Request("held", probe()[:300], SamplingParams(max_tokens=900, ignore_eos=True, seed=5))
    talker.hold(held)
    hits = 0
    for shift in shifts(rounds):
        poisoners = poison(shift)
        both: Spoken = talker.say([*poisoners[:2], Request("probe", probe(), GREEDY)])
        probed = {key: both.pop(key) for key in expected}
        both |= talker.say(poisoners[2:])
        assert not differences(expected, probed), f"after a shift of {shift}"
        assert not differences(plain.say(poisoners), both)
        hits += probed["probe", 0].cached > 0
    assert hits >= rounds - 1 or memory == TIGHT
    assert hits > 0
    assert not differences(plain.say([held]), talker.release(held))
    talker.engine.check()


@pytest.mark.parametrize("memory", [ROOMY, TIGHT])
def test_a_poisoned_cache_answers_as_an_empty_one(memory: float) -> None:
    check(memory, 14)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [ROOMY, TIGHT])
def test_a_poisoned_cache_answers_as_an_empty_one_for_long(memory: float) -> None:
    check(memory, 100)
