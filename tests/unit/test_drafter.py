"""Guesses from the text itself, against a plain search; and which sequences a head is asked for."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine import drafter as drafter_module
from nybble.engine.drafter import Ask, Drafter, MtpDrafter, NgramDrafter
from nybble.engine.drafting import Drafting, Part
from nybble.engine.prefix import PrefixCache
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import Guess
from nybble.engine.scheduler import EngineOptions, Scheduler
from nybble.engine.sequence import Sequence as Generated
from nybble.engine.speculation import Speculation
from nybble.models.numbers import Numbers

NOTHING: Any = None


def plainly(text: Sequence[int], drafts: int) -> list[int]:
    """What followed the latest place of the longest of the last 4, 3 or 2 tokens; where that runs
    into the end of the text, as it goes on."""
    for size in (4, 3, 2):
        gram = tuple(text[-size:])
        for start in range(len(text) - size - 1, -1, -1):
            if tuple(text[start : start + size]) == gram and len(text) > size:
                grown = list(text)
                for at in range(start + size, start + size + drafts):
                    grown.append(grown[at])
                return grown[len(text) :]
    return []


def ask(text: Sequence[int], prompt: int, drafts: int, key: int = 0) -> Ask:
    return Ask(key, tuple(text[:prompt]), list(text[prompt:]), drafts)


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    prompt=st.integers(1, 80),
    steps=st.lists(st.integers(1, 7), max_size=30),
    drafts=st.integers(1, 6),
    most_recent=st.sampled_from([0, 5, 40, 4096]),
)
def test_it_finds_what_a_plain_search_finds(
    text: list[int], prompt: int, steps: list[int], drafts: int, most_recent: int
) -> None:
    """However the text grows between calls, and wherever n-grams are kept."""
    drafter = NgramDrafter()
    length = min(prompt, len(text))
    with mock.patch.object(drafter_module, "_MOST_RECENT", most_recent):
        for step in [0, *steps]:
            length = min(len(text), length + step)
            told = text[:length]
            assert drafter.draft([ask(told, prompt, drafts)]) == [plainly(told, drafts)]


def test_long_texts_too() -> None:
    rng = random.Random(5)
    words = [[rng.randrange(250_000) for _ in range(rng.randint(2, 9))] for _ in range(300)]
    text = [token for _ in range(5000) for token in rng.choice(words)]
    drafter = NgramDrafter()
    for length in range(20_000, 20_100):
        assert drafter.draft([ask(text[:length], 19_990, 3)]) == [plainly(text[:length], 3)]


def test_tokens_of_any_number_are_told_apart() -> None:
    largest = 2**32 - 1
    text = [0, 0, largest, 7, 0, 0, largest]
    assert NgramDrafter().draft([ask(text, 3, 2)]) == [[7, 0]]
    assert NgramDrafter().draft([ask([0, 0, largest, 7, 0, largest], 3, 2)]) == [[7, 0]]


def test_more_tokens_decide_before_later_places() -> None:
    text = [1, 2, 3, 4, 5, 9, 3, 4, 6, 9, 2, 3, 4]
    assert NgramDrafter().draft([ask(text, 5, 1)]) == [[5]]


def test_what_repeats_itself_goes_on() -> None:
    assert NgramDrafter().draft([ask([5, 8, 1, 2, 3, 1, 2, 3], 3, 7)]) == [[1, 2, 3, 1, 2, 3, 1]]


@pytest.mark.parametrize("text", [[], [1], [1, 1], [1, 2, 3, 2, 1]])
def test_where_nothing_stood_before_nothing_is_guessed(text: list[int]) -> None:
    assert NgramDrafter().draft([ask(text, 1, 3)]) == [[]]


def test_sequences_know_nothing_of_each_other() -> None:
    drafter = NgramDrafter()
    found = drafter.draft([ask([1, 2, 3, 1, 2], 2, 1, 7), ask([1, 2], 1, 1, 8)])
    assert found == [[3], []]
    assert drafter.draft([ask([1, 2, 4, 1, 2], 2, 1, 8)]) == [[4]]


def test_a_preempted_sequence_comes_back_to_what_is_known() -> None:
    drafter = NgramDrafter()
    text = [1, 2, 3, 4, 1, 2]
    first = drafter.draft([ask(text, 4, 2)])
    assert drafter.draft([ask(text, 4, 0)]) == [[]]
    assert drafter.draft([ask(text, 4, 2)]) == first == [[3, 4]]
    assert drafter.draft([ask([*text, 3, 4], 4, 2)]) == [[1, 2]]


def test_another_text_under_the_same_key_is_read_anew() -> None:
    drafter = NgramDrafter()
    drafter.draft([ask([1, 2, 3, 4, 5, 6, 7, 1, 2], 4, 2)])
    assert drafter.draft([ask([8, 9, 1, 8, 9], 4, 1)]) == [[1]]


def test_where_no_drafts_are_wanted_nothing_is_kept() -> None:
    drafter = NgramDrafter()
    before = len(pickle.dumps(drafter))
    assert drafter.draft([ask(list(range(900)), 400, 0)]) == [[]]
    assert len(pickle.dumps(drafter)) == before


def test_only_new_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step costs the same after ten tokens and after ten thousand."""
    hashed: list[int] = []
    hash_one = drafter_module._hash

    def counted(gram: Sequence[int]) -> int:
        hashed.append(len(gram))
        return hash_one(gram)

    monkeypatch.setattr(drafter_module, "_hash", counted)
    drafter, rng = NgramDrafter(), random.Random(1)
    text = [rng.randrange(500) for _ in range(10_000)]
    drafter.draft([ask(text, 9_000, 2)])
    assert len(hashed) <= 3
    for _ in range(500):
        text.append(rng.randrange(500))
        del hashed[:]
        drafter.draft([ask(text, 9_000, 2)])
        assert len(hashed) <= 6


def test_memory_is_that_of_the_tokens_and_goes_with_the_sequence() -> None:
    drafter, rng = NgramDrafter(), random.Random(2)
    before = len(pickle.dumps(drafter))
    text = [rng.randrange(250_000) for _ in range(262_144)]
    drafter.draft([ask(text, 262_144, 3)])
    assert len(pickle.dumps(drafter)) < 24 * len(text) + 1000
    for _ in range(64):
        text += [rng.randrange(250_000) for _ in range(128)]
        drafter.draft([ask(text, 262_144, 3)])
    assert len(pickle.dumps(drafter)) < 32 * len(text)
    drafter.drop(0)
    drafter.drop(99)
    assert len(pickle.dumps(drafter)) == before


class Heads:
    """A runner that guesses what it is asked for, and says how often."""

    def __init__(self) -> None:
        self.asked: list[list[Guess]] = []

    def guess(self, guesses: Sequence[Guess]) -> list[list[int]]:
        self.asked.append(list(guesses))
        return [[100 * guess.work + n for n in range(guess.drafts)] for guess in guesses]


def test_a_head_is_asked_once_for_those_whose_entries_are_there() -> None:
    runner: Any = Heads()
    drafter: Drafter = MtpDrafter(runner)
    guesses = [Guess(work, (4,), (0,), 3, drafts) for work, drafts in ((0, 2), (1, 0), (2, 1))]
    asks = [Ask(n, (1,), [2], g.drafts, g) for n, g in enumerate(guesses)]
    lost = Ask(9, (1,), [2], 3)
    assert drafter.draft([asks[0], lost, *asks[1:]]) == [[0, 1], [], [], [200]]
    assert runner.asked == [guesses]
    assert drafter.draft([lost]) == [[]]
    assert len(runner.asked) == 1
    drafter.drop(9)


def test_only_a_head_must_see_every_forward() -> None:
    assert MtpDrafter(NOTHING).needs_hidden
    assert not NgramDrafter().needs_hidden


# ------------------------------------------------------------------------------- who asks, and when


class Opinion(Speculation):
    """A policy that is told what to say, and notes what it is asked."""

    def __init__(self, most: int = 2) -> None:
        super().__init__(most)
        self.drafts, self.over, self.refused = most, set[int](), set[int]()
        self.planned: list[list[int]] = []
        self.off = self.resting = False

    @property
    def is_off(self) -> bool:
        return self.off

    def starts(self, key: int) -> bool:
        return key not in self.refused

    def is_over(self, key: int) -> bool:
        return key in self.over

    def rests(self, sequences: int) -> bool:
        return self.resting

    def plan(self, keys: Sequence[int]) -> list[int]:
        self.planned.append(list(keys))
        return [self.drafts] * len(keys)


class Desk:
    """Sequences that a scheduler runs and no model computes, and what is asked for them."""

    def __init__(self, *, needs_hidden: bool = True, has_cache: bool = False) -> None:
        sizes = EngineOptions(4, 256, page_tokens=64, draft_tokens=2)
        pages, slots = Numbers(16, "pages"), Numbers(12, "slots")
        snapshots = Numbers(4, "snapshots", first=12)
        cache = PrefixCache(pages, snapshots, 64, has_states=True) if has_cache else None
        self.scheduler = Scheduler(sizes, pages, slots, 64, cache=cache, slots_each=3)
        self.policy, self.heads = Opinion(), Heads()
        runner: Any = self.heads
        drafter: Drafter = MtpDrafter(runner) if needs_hidden else NgramDrafter()
        self.drafting = Drafting(drafter, self.policy, self.scheduler)

    def add(self, prompt: int, most: int = 50, arrival: int = 0) -> Generated:
        request = Request(str(arrival), (1, 2) * prompt, SamplingParams(max_tokens=most))
        turn = (arrival, arrival, 0)
        made = Generated(request, 0, turn, most, frozenset(), NOTHING, NOTHING)
        self.scheduler.add(made)
        return made

    def step(self) -> list[Guess]:
        """The guesses that a step asks for."""
        parts = []
        for number, share in enumerate(self.scheduler.schedule()):
            sequence = share.sequence
            if sequence.is_new:
                self.drafting.begin(sequence)
            sequence.is_new = False
            self.scheduler.commit(share)
            if share.is_sampled:
                sequence.output.append(1 + len(sequence.output) % 2)
            is_done = len(sequence.output) == sequence.most
            parts.append(Part(sequence, number, is_done))
        before = len(self.heads.asked)
        self.drafting.propose(parts)
        for part in parts:
            if part.is_done:
                self.scheduler.remove(part.sequence)
        return [guess for asked in self.heads.asked[before:] for guess in asked]


def test_entries_are_made_of_prompts_and_then_of_each_token() -> None:
    desk = Desk()
    one = desk.add(7)
    (guess,) = desk.step()
    assert (guess.start, list(guess.tokens), guess.drafts) == (0, [1, 2] * 7 + [1], 2)
    assert one.state.drafts == [0, 1]
    one.state.drafts = []
    (guess,) = desk.step()
    assert (guess.start, list(guess.tokens), guess.drafts) == (15, [2], 2)


@pytest.mark.parametrize("has_cache", [True, False])
def test_where_nobody_has_entries_nobody_is_asked_about(has_cache: bool) -> None:
    """Not the policy, not the head; until one begins. Of those that draft nothing the prompt alone
    gets entries, where others that begin alike may share them."""
    desk = Desk(has_cache=has_cache)
    first, second = desk.add(3), desk.add(5, arrival=1)
    desk.policy.refused = {first.key, second.key}
    read = [(0, 6, 0), (0, 10, 0)] if has_cache else []
    assert [(g.start, len(g.tokens), g.drafts) for g in desk.step()] == read
    assert not desk.step()
    assert first.state.mtp_length == second.state.mtp_length == -1
    planned = len(desk.policy.planned)
    for _ in range(3):
        assert not desk.step()
    assert len(desk.policy.planned) == planned
    third = desk.add(4, arrival=2)
    (guess,) = desk.step()
    assert (guess.start, guess.drafts) == (0, 2)
    assert len(desk.policy.planned[-1]) == 3
    assert third.state.drafts == [200, 201]
    (guess,) = desk.step()
    assert guess.start == 9
    desk.scheduler.remove(third)
    assert not desk.step()
    planned = len(desk.policy.planned)
    assert not desk.step()
    assert len(desk.policy.planned) == planned


def test_what_the_cache_has_no_entries_for_is_not_begun() -> None:
    desk = Desk()
    one = desk.add(3)
    one.state.mtp_length = -1
    desk.policy.starts = mock.Mock(side_effect=AssertionError)  # type: ignore[method-assign]
    desk.drafting.begin(one)
    one.state.length = one.known - 1
    desk.drafting.propose([Part(one, 0, False)])
    assert one.state.mtp_length == -1
    assert not desk.policy.planned


def test_what_is_over_is_not_kept_up() -> None:
    desk = Desk()
    one, two = desk.add(20), desk.add(2, arrival=1)
    assert len(desk.step()) == 2
    desk.policy.over = {one.key}
    (guess,) = desk.step()
    assert guess.pages is two.state.pages
    assert one.state.mtp_length == -1
    assert two.state.mtp_length == two.known
    desk.policy.over.add(two.key)
    assert not desk.step()
    planned = len(desk.policy.planned)
    assert not desk.step()
    assert len(desk.policy.planned) == planned


@pytest.mark.parametrize("is_off", [False, True])
def test_who_has_ended_is_not_asked_for_while_drafting_is_off(is_off: bool) -> None:
    """But for the entries of its prompt, if that was all it had computed."""
    desk = Desk()
    desk.policy.off = is_off
    desk.add(6, most=1)
    assert [(g.start, len(g.tokens), g.drafts) for g in desk.step()] == [(0, 12, 0)]
    assert not desk.scheduler.running
    one = desk.add(6, arrival=1)
    assert [(g.start, len(g.tokens)) for g in desk.step()] == [(0, 13)]
    (share,) = desk.scheduler.schedule()
    desk.scheduler.commit(share)
    desk.scheduler.accept(one)
    one.output += [7, 8]
    desk.drafting.propose([Part(one, 0, True)])
    asked = [
        (g.start, list(g.tokens), g.drafts) for guesses in desk.heads.asked[2:] for g in guesses
    ]
    assert asked == ([] if is_off else [(13, [7], 0)])


def test_choices_that_share_a_prompt_have_its_entries() -> None:
    desk = Desk()
    leader = desk.add(5)
    follower = Generated(leader.request, 1, (1, 0, 1), 50, frozenset(), NOTHING, NOTHING)
    leader.followers = [follower]
    (share,) = desk.scheduler.schedule()
    desk.drafting.begin(leader)
    desk.scheduler.commit(share)
    assert desk.scheduler.fork(leader) == [follower]
    for sequence in (leader, follower):
        sequence.output.append(3)
    desk.drafting.propose([Part(leader, 0, False), Part(follower, 0, False)])
    (guesses,) = desk.heads.asked
    assert [guess.start for guess in guesses] == [0, 0]
    assert leader.state.mtp_length == follower.state.mtp_length == 11
    desk.scheduler.remove(leader)
    assert [guess.start for guess in desk.step()] == [11]


def test_a_text_is_not_read_while_the_policy_rests() -> None:
    desk = Desk(needs_hidden=False)
    one = desk.add(4)
    desk.step()
    assert one.state.drafts == [2, 1]
    assert one.state.mtp_length == -1
    desk.policy.resting = True
    planned = len(desk.policy.planned)
    asks = mock.Mock(side_effect=AssertionError)
    with mock.patch("nybble.engine.drafting.Ask", asks):
        desk.step()
        assert len(desk.policy.planned) == planned
        desk.policy.resting, desk.policy.drafts = False, 0
        desk.step()
    assert len(desk.policy.planned) == planned + 1
    assert one.state.drafts == []


def test_drafts_are_no_more_than_may_still_be_generated() -> None:
    desk = Desk()
    desk.add(3, most=3)
    assert [guess.drafts for guess in desk.step()] == [1]
    assert [guess.drafts for guess in desk.step()] == [0]


def test_who_could_not_be_drafted_for_is_not_asked_for_again() -> None:
    desk = Desk()
    one = desk.add(3)
    desk.step()
    desk.drafting.give_up([Part(one, 0, False)])
    assert one.state.drafts == []
    assert not desk.step()
    desk.drafting.drop([one])
