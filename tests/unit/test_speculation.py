"""How many drafts pay: simulated engines, whose times and acceptance are known, and any calls."""

from __future__ import annotations

import logging
import pickle
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.acceptance import Acceptance
from nybble.engine.regimes import Purse, Regime
from nybble.engine.speculation import _SAMPLE, Speculation
from nybble.engine.step_times import StepTimes
from nybble.errors import EngineError

Draw = Callable[[random.Random], float]


def steady(acceptance: float) -> Callable[[int, int], float]:
    return lambda sequence, tokens: acceptance


def dense(rows: int) -> float:
    return 1 + 0.05 * rows


def experts(rows: int) -> float:
    """Each row touches other experts: twice the rows take 1.8 times as long."""
    return 0.2 + 0.8 * rows


def disturbed(rng: random.Random) -> float:
    """A step in twenty is held up to ten times its length; the others vary by a twentieth."""
    return 10.0 if rng.random() < 0.05 else rng.lognormvariate(0, 0.05)


@dataclass
class Simulated:
    """An engine that decodes `count` sequences, in the order of calls of the real one: after each
    step drafts are planned and made, then the step's times are told, unless it may pass.

    `needs_hidden`: of a sequence that drafting gave up for, or never began for, nothing can be
    drafted, but while it is kept up each step takes `entries` longer; nothing is planned where that
    is so of all. `seconds` adds up what steps take when nothing disturbs them.
    """

    policy: Speculation
    cost: Callable[[int], float]
    acceptance: Callable[[int, int], float]
    draft: float = 0.05
    entries: float = 0.01
    noise: Draw = lambda rng: 1.0
    count: int = 1
    seed: int = 0
    has: Draw = lambda rng: True
    needs_hidden: bool = True
    keys: list[int] = field(default_factory=list)
    able: dict[int, bool] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    planned: list[Sequence[int]] = field(default_factory=list)
    verified: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.rng, self.luck = random.Random(self.seed), random.Random(self.seed + 1)
        for key in range(self.count):
            self.begin(key)
        self.next = self.plan()

    def begin(self, key: int) -> None:
        self.keys.append(key)
        self.tokens[key] = 0
        self.policy.expect(len(self.keys))
        self.able[key] = self.policy.starts(key) or not self.needs_hidden

    def end(self, key: int) -> None:
        self.keys.remove(key)
        self.policy.drop(key)

    def plan(self) -> dict[int, int]:
        self.policy.expect(len(self.keys))
        for key in self.keys:
            self.able[key] &= not (self.needs_hidden and self.policy.is_over(key))
        if not any(self.able[key] for key in self.keys):
            return {}
        counts = self.policy.plan(self.keys)
        self.planned.append(counts)
        return {
            key: n if self.able[key] and self.has(self.rng) else 0
            for key, n in zip(self.keys, counts, strict=True)
        }

    def step(self) -> None:
        drafts = {key: self.next.get(key, 0) for key in self.keys}
        rows, sequences = sum(drafts.values()) + len(drafts), len(drafts)
        self.verified.append(list(drafts.values()))
        for key, proposed in drafts.items():
            self.verify(key, proposed)
        self.next = self.plan()
        took, drafting = self.cost(rows), self.draft * max(self.next.values(), default=0)
        is_able = any(self.able[key] for key in self.keys)
        if self.needs_hidden and is_able:
            drafting += self.entries
        noisy = took * self.noise(self.luck), drafting * self.noise(self.luck)
        if is_able or not self.policy.passes(sequences):
            self.policy.note_step(sequences, rows, *noisy)
        self.seconds += took + drafting

    def verify(self, key: int, proposed: int) -> None:
        chance, accepted = self.acceptance(key, self.tokens[key]), 0
        while accepted < proposed and self.rng.random() < chance:
            accepted += 1
        if proposed:
            self.policy.note(key, proposed, accepted)
        self.tokens[key] += 1 + accepted

    def answer(self, keys: Sequence[int], steps: int) -> None:
        """Short answers of sequences that begin and end together."""
        for key in keys:
            self.begin(key)
        self.next = self.plan()
        for _ in range(steps):
            self.step()
        for key in keys:
            self.end(key)

    def run(self, tokens: int) -> Simulated:
        while min(self.tokens[key] for key in self.keys) < tokens:
            self.step()
        return self

    @property
    def speed(self) -> float:
        return sum(self.tokens.values()) / self.seconds


def speed(tokens: int, fixed: int | None, runs: int = 12, most: int = 4, **engine: Any) -> float:
    return statistics.mean(
        Simulated(Speculation(most, fixed), seed=seed, **engine).run(tokens).speed
        for seed in range(runs)
    )


def against_best(tokens: int, runs: int = 12, most: int = 4, **engine: Any) -> float:
    """The speed, as a share of that of the best fixed number of drafts, known beforehand."""
    found = {k: speed(tokens, k, runs, most, **engine) for k in (*range(most + 1), None)}
    return found.pop(None) / max(found.values())


# ------------------------------------------------------------------------------------ as fast as


@pytest.mark.parametrize("draft", [0.0, 0.05, 0.15])
def test_a_dense_model_is_as_fast_as_with_the_best_fixed_number(draft: float) -> None:
    """From its first token on, learning included."""
    assert against_best(512, cost=dense, acceptance=steady(0.8), draft=draft) > 0.98


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.95])
def test_other_acceptance_needs_other_numbers(acceptance: float) -> None:
    assert against_best(512, cost=dense, acceptance=steady(acceptance)) > 0.975


def test_the_best_number_is_found_and_kept() -> None:
    runs = [
        Simulated(Speculation(4), dense, steady(0.7), draft=0.2, seed=seed).run(2048)
        for seed in range(4)
    ]
    late = [counts[0] for run in runs for counts in run.planned[300:]]
    # Tokens a second for 1 to 4 drafts: 1.31, 1.41, 1.41, 1.35.
    assert statistics.mean(k in (2, 3) for k in late) > 0.75
    assert statistics.mean(k == 0 for k in late) < 0.02


def test_a_slower_kernel_for_more_rows_is_not_taken_for_a_slope() -> None:
    """Five rows take twice as long, up to four hardly longer: three drafts, found though four were
    tried before."""

    def cliff(rows: int) -> float:
        return dense(rows) + (1 if rows > 4 else 0)

    assert against_best(512, cost=cliff, acceptance=steady(0.8)) > 0.96


@pytest.mark.parametrize("cost", [experts, float])
def test_where_rows_cost_as_much_as_tokens_it_turns_off(cost: Callable[[int], float]) -> None:
    off = speed(256, 0, cost=cost, acceptance=steady(0.62))
    assert speed(256, None, cost=cost, acceptance=steady(0.62)) > 0.975 * off
    run = Simulated(Speculation(4), cost, steady(0.62)).run(256)
    assert run.policy.figures.reason
    assert sum(n > 0 for (n,) in run.verified[30:]) < 0.04 * len(run.verified)


def rows_cost(more: float) -> Callable[[int], float]:
    """Twice the rows take `more` times as long in addition, whatever the number of sequences."""
    return lambda rows: 1 + more * (rows - 1)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.62])
@pytest.mark.parametrize(
    ("more", "draft", "entries"),
    [(0.8, 0.3, 0.1), (0.9, 0.3, 0.1), (0.6, 0.3, 0.1), (0.8, 0.1, 0.02)],
)
def test_to_find_that_drafts_do_not_pay_costs_little(
    more: float, draft: float, entries: float, acceptance: float
) -> None:
    """Of 256 tokens of a new engine, of 1,000, and of 1,000 in short answers: an engine without
    drafts gives a token in a unit of time."""
    told: dict[str, Any] = {"draft": draft, "entries": entries, "noise": disturbed}
    for seed in range(4):
        run = Simulated(Speculation(4), rows_cost(more), steady(acceptance), seed=seed, **told).run(
            256
        )
        assert run.speed > 0.97
        assert run.run(1000).speed > 0.985
        short = Simulated(Speculation(4), rows_cost(more), steady(acceptance), seed=seed, **told)
        for key in range(1, 16):
            short.run(64)
            short.end(short.keys[0])
            short.begin(key)
        assert short.speed > 0.985


def test_a_batch_that_shrinks_learns_nothing_anew_where_drafts_do_not_pay() -> None:
    """What 16 sequences do not gain by, 15 do not either."""

    def cost(rows: int) -> float:
        return 0.2 + 0.8 * rows

    run = Simulated(Speculation(4), cost, steady(0.5), draft=4.0, entries=0.0, count=16).run(60)
    before = len(run.verified)
    while len(run.keys) > 1:
        run.end(run.keys[-1])
        for _ in range(20):
            run.step()
    assert run.policy.is_off
    drafted = sum(any(counts) for counts in run.verified[before:])
    assert drafted <= 0.04 * (len(run.verified) - before)


def test_what_is_kept_up_in_vain_is_given_up_the_sooner_the_dearer_it_is() -> None:
    """Entries of a head that cost a tenth of a step, or a fiftieth; next to nothing, for ever."""

    def steps(entries: float) -> int:
        run = Simulated(Speculation(4), float, steady(0.5), entries=entries)
        while run.able[0] and len(run.verified) < 1000:
            run.step()
        return len(run.verified)

    found = [steps(entries) for entries in (0.2, 0.1, 0.02, 0.001)]
    assert found[0] < found[1] < found[2] < found[3] == 1000
    assert found[1] * 0.1 < 4
    assert found[2] * 0.02 < 4


def test_where_drafts_have_paid_a_bad_passage_is_waited_for() -> None:
    def changing(sequence: int, tokens: int) -> float:
        return 0.02 if tokens > 300 else 0.85

    def kept(start: int) -> int:
        run = Simulated(Speculation(4), dense, changing, entries=0.03)
        run.tokens[0] = start
        while run.able[0] and run.tokens[0] < 4000:
            run.step()
        return run.tokens[0] - 300

    assert kept(0) > 2 * kept(300)


def test_times_that_are_disturbed_decide_alike() -> None:
    assert against_best(512, cost=dense, acceptance=steady(0.8), noise=disturbed) > 0.975
    off = speed(256, 0, cost=float, acceptance=steady(0.62))
    noisy = speed(256, None, cost=float, acceptance=steady(0.62), noise=disturbed)
    assert noisy > 0.97 * off


def test_the_first_step_of_its_kind_may_take_long() -> None:
    """Programs are recorded when a step of their shape is first computed."""

    def told(fixed: int | None, seed: int) -> Simulated:
        met: set[int] = set()

        def cost(rows: int) -> float:
            first = rows not in met
            met.add(rows)
            return dense(rows) + (20 if first else 0)

        run = Simulated(Speculation(4, fixed), cost, steady(0.8), seed=seed).run(512)
        run.seconds -= 20 * len(met)
        return run

    found, best = (statistics.mean(told(k, s).speed for s in range(8)) for k in (None, 4))
    assert found > 0.975 * best


@pytest.mark.parametrize("low", [0.02, 0.1, 0.25])
def test_acceptance_may_change_in_mid_stream(low: float) -> None:
    """Faster than any number that stays, also where none pays for a while."""

    def changing(sequence: int, tokens: int) -> float:
        return low if tokens // 600 % 2 else 0.85

    assert against_best(3600, 6, cost=dense, acceptance=changing) > 1.02


def test_a_machine_that_is_busy_for_a_while_changes_nothing_for_long() -> None:
    class Load:
        calls = 0

        def __call__(self, rng: random.Random) -> float:
            self.calls += 1
            return 3.0 if 150 < self.calls < 350 else 1.0

    best = speed(1024, 4, 4, cost=dense, acceptance=steady(0.8))
    runs = [
        Simulated(Speculation(4), dense, steady(0.8), noise=Load(), seed=seed).run(1024)
        for seed in range(4)
    ]
    assert statistics.mean(run.speed for run in runs) > 0.95 * best


# -------------------------------------------------------------------------------- many sequences


@pytest.mark.parametrize("slope", [0.02, 0.05, 0.1, 0.2, 1.0])
def test_a_batch_of_16_where_rows_cost(slope: float) -> None:
    def cost(rows: int) -> float:
        return 1 + slope * rows

    assert against_best(256, 2, count=16, cost=cost, acceptance=steady(0.7)) > 0.965


def test_sequences_that_are_easy_to_guess_get_the_drafts() -> None:
    def mixed(sequence: int, tokens: int) -> float:
        return 0.9 if sequence % 2 else 0.2

    def cost(rows: int) -> float:
        return 1 + 0.1 * rows

    engine: dict[str, Any] = {"cost": cost, "acceptance": mixed, "draft": 0.02, "count": 16}
    assert against_best(512, 2, **engine) > 1.05
    late = Simulated(Speculation(4), **engine).run(512).verified[60:]
    hard, easy = ([n for counts in late for n in counts[half::2]] for half in (0, 1))
    assert statistics.mean(easy) > 4 * statistics.mean(hard)


def test_who_sits_out_is_tried_again() -> None:
    """Sequences that were hard to guess and become easy get drafts too."""

    def turning(sequence: int, tokens: int) -> float:
        return 0.9 if sequence % 2 or tokens > 200 else 0.05

    def cost(rows: int) -> float:
        return 1 + 0.1 * rows

    run = Simulated(Speculation(4), cost, turning, draft=0.02, count=8).run(200)
    while run.tokens[0] < 800:
        run.step()
    hard = [n for counts in run.verified[-50:] for n in counts[::2]]
    assert statistics.mean(hard) > 2


def test_sequences_that_come_and_go_need_no_lessons_anew() -> None:
    """Each number of sequences has its own times, but begins with those of a similar one."""
    run = Simulated(Speculation(4), dense, steady(0.8))
    key = 1
    for _ in range(300):
        run.step()
        if len(run.keys) < 16 and run.luck.random() < 0.3:
            run.begin(key)
            key += 1
        if len(run.keys) > 1 and run.luck.random() < 0.3:
            run.end(run.luck.choice(run.keys))
    plain = [counts for counts in run.verified if not any(counts)]
    crowds = {len(counts) for counts in run.verified}
    assert len(crowds) > 5
    assert len(plain) < 3 * len(crowds)


def test_a_crowd_is_judged_apart_from_one_alone() -> None:
    """Rows are free up to eight, then dear: alone drafts pay, together they do not."""

    def roof(rows: int) -> float:
        return max(1.0, rows / 8)

    policy = Speculation(3)

    def run(count: int) -> list[list[int]]:
        engine = Simulated(policy, roof, steady(0.6), draft=0.02, count=count).run(200)
        for key in tuple(engine.keys):
            engine.end(key)
        return engine.verified[20:]

    for _ in range(3):
        assert statistics.mean(n for counts in run(1) for n in counts) > 2.5
        assert statistics.mean(n for counts in run(8) for n in counts) < 0.2


def test_a_crowd_that_drafts_do_not_pay_for_loses_little_beside_one_that_gains() -> None:
    """Loads in turn, one that drafts pay for and one that they do not: neither what the first has
    gained nor that it turns drafting on again lets the second try again and again."""

    def cost(rows: int) -> float:
        return 1 + 0.1 * (rows - 1) if rows < 6 else 0.2 + 0.8 * rows

    policy, key, speeds = Speculation(3), 0, list[float]()
    for _ in range(8):
        for count in (1, 16):
            run = Simulated(policy, cost, steady(0.75), draft=0.1, entries=0.4)
            for old in tuple(run.keys):
                run.end(old)
            for _ in range(4):
                run.answer(range(key, key + count), steps=20)
                key += count
            if count == 16:
                speeds.append(run.speed * cost(16) / 16)
    assert statistics.mean(speeds) > 0.98
    assert min(speeds) > 0.9


@pytest.mark.parametrize("count", [4, 8, 16])
def test_a_crowd_that_becomes_easy_to_guess_is_drafted_for_again(count: int) -> None:
    """Short answers, of which now and then one begins with what drafting needs: what is accepted of
    it alone has to tell."""
    policy, waves = Speculation(2), list[int]()
    for seed in range(3):
        policy, key, easy = Speculation(2), 0, 0
        while easy < 100 and not (easy and not policy.is_off):
            easy += key > 30 * count
            chance = steady(0.85 if easy else 0.03)
            run = Simulated(
                policy, rows_cost(0.3 / count), chance, draft=0.1, entries=0.1, seed=seed + key
            )
            run.end(0)
            run.answer(range(key, key + count), steps=40)
            key += count
        waves.append(easy)
    assert statistics.mean(waves) < 40


def test_one_draft_of_sixteen_says_little_of_three_for_each() -> None:
    """While drafting is off one sequence begins with what it needs; its steps are about as long as
    any. That is no reason to give all of them three drafts."""
    times = StepTimes()
    for now in range(4):
        times.note(0.0, 1.0, now)
        times.note(1 / 16, 0.99, now)
    assert times.reach == 0.25
    counts, gain = Regime(16, Purse(), times).best([[0.8, 0.6, 0.5]] * 16, 1.05)
    assert sum(counts) == 4
    assert gain > 0


def test_a_step_without_drafts_is_timed_when_caches_are_warm() -> None:
    """The first step without drafts after one with them takes a half longer: taken for what a step
    takes, it would make drafts pay that do not."""

    class Caches:
        was_drafted = False

        def __call__(self, rows: int) -> float:
            is_cold, self.was_drafted = self.was_drafted and rows == 1, rows > 1
            return (1.5 if is_cold else 1.0) if rows == 1 else 1.6

    def worse(sequence: int, tokens: int) -> float:
        return 0.85 if tokens < 600 else 0.4

    for seed in range(4):
        run = Simulated(Speculation(1), Caches(), worse, draft=0.05, seed=seed).run(600)
        assert run.speed > 1.08
        run.seconds, run.tokens[0] = 0.0, 600
        run.run(2000)
        assert (run.tokens[0] - 600) / run.seconds > 0.97
        assert run.policy._regimes[1].steps.at(0.0) == 1.0


def test_a_machine_that_became_faster_meanwhile_is_noticed() -> None:
    """While drafting is off few steps are timed: drafts that seem to pay beside old times are
    compared with new ones before long."""

    class Machine:
        steps = 0

        def __call__(self, rows: int) -> float:
            self.steps += 1
            return (2.0 if self.steps < 600 else 1.0) * (1 + 0.6 * (rows - 1))

    for seed in range(12):
        machine = Machine()
        run = Simulated(Speculation(2), machine, steady(0.4), entries=0.0, seed=seed)
        while machine.steps < 600:
            run.step()
        before, tokens = run.seconds, run.tokens[0]
        while machine.steps < 1600:
            run.step()
        assert (run.tokens[0] - tokens) / (run.seconds - before) > 0.97


def test_drafts_that_end_a_text_gave_nothing() -> None:
    """Of a text that ends with a draft that was right no token follows it; figures count it."""
    policy, same = Speculation(2), Speculation(2)
    for one, told in ((policy, {"is_cut": True}), (same, {})):
        one.plan([1])
        for _ in range(50):
            one.note(1, 2, 1, **told)
        one.plan([1])
    assert policy.figures.accepted_by_position == same.figures.accepted_by_position == (50, 0)
    assert policy.figures.drafted_by_position == (50, 0)
    assert same.figures.drafted_by_position == (50, 50)
    assert policy._known[1].mean(0, 0.5) < 0.2 < 0.8 < same._known[1].mean(0, 0.5)


@pytest.mark.parametrize("count", [1, 16, 40])
def test_while_it_is_off_a_step_need_not_be_told_of_but_now_and_then(count: int) -> None:
    """And not always the same one of work that comes in rounds of 2 to 16 steps."""
    policy = Speculation(2)
    Simulated(policy, float, steady(0.1), count=count).run(200)
    assert policy.is_off
    told = []
    for at in range(4000):
        if not policy.passes(count):
            policy.note_step(count, count, 1.0, 0.0)
            told.append(at)
    assert len(told) == pytest.approx(4000 / _SAMPLE, abs=1)
    for round_of in range(2, 17):
        assert {at % round_of for at in told} == set(range(round_of))
    assert Speculation(2, 0).passes(count)
    assert not Speculation(2).passes(count)


def test_a_sequence_without_drafts_costs_nothing() -> None:
    """What an n-gram drafter has nothing for is a step like any other."""
    text: dict[str, Any] = {"draft": 0.0, "needs_hidden": False}
    none = Simulated(Speculation(4), dense, steady(0.8), has=lambda rng: False, **text)
    assert not any(map(any, none.run(300).verified))
    assert none.speed == pytest.approx(1 / dense(1))
    few: dict[str, Any] = {"has": lambda rng: rng.random() < 0.3, **text}
    assert against_best(512, cost=dense, acceptance=steady(0.7), **few) > 0.975


def test_tokens_that_are_computed_again_are_no_drafts() -> None:
    """After preemption a step has many rows of few sequences: that tells nothing of drafts."""
    run = Simulated(Speculation(4), dense, steady(0.8)).run(200)
    before = pickle.dumps(run.policy._regimes)
    run.policy.note_step(1, 700, 50.0, 0.0)
    assert pickle.dumps(run.policy._regimes) == before


# ------------------------------------------------------------------------------------- on and off


def test_off_is_said_once_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nybble")
    run = Simulated(Speculation(4), experts, steady(0.62), draft=0.1)
    assert run.policy.figures.reason == ""
    run.run(1000)
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("drafting is off: 1 draft is accepted 0.")
    assert message.endswith("of the time, and a step with it takes 1.91 times as long")
    assert message.endswith(run.policy.figures.reason)
    assert run.policy.is_off


def test_while_off_a_sequence_now_and_then_tells_whether_it_pays_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "nybble")
    policy = Speculation(4)
    run = Simulated(policy, dense, steady(0.0), draft=0.1, entries=0.02).run(150)
    assert policy.figures.reason
    assert not policy.is_over(0)  # a head that is right as usual would pay: that is worth a wait
    run.run(1000)
    assert policy.is_over(0)
    assert not run.able[0]
    run.acceptance = steady(0.9)
    started = []
    for key in range(1, 40):
        run.end(run.keys[0])
        run.begin(key)
        started.append(run.able[key])
        run.next = run.plan()
        for _ in range(60):
            run.step()
    assert not all(started[:8])
    assert all(started[-8:])
    assert statistics.mean(map(sum, run.verified[-200:])) > 2
    told = [r.getMessage() for r in caplog.records]
    assert [m.split(":")[0] for m in told] == ["drafting is off", "drafting is on again"]
    assert policy.figures.reason == ""


def test_where_one_pays_again_a_crowd_is_judged_anew() -> None:
    """What a crowd rests on may be old: of acceptance that has changed since."""
    policy = Speculation(2)
    text: dict[str, Any] = {"draft": 0.02, "needs_hidden": False}
    crowd = Simulated(policy, lambda rows: 1 + 0.05 * rows, steady(0.02), count=3, **text).run(500)
    while not policy.rests(3):
        crowd.step()
    alone = Simulated(policy, dense, steady(0.95), **text)
    while policy.is_off and len(alone.verified) < 3000:
        alone.step()
    assert not policy.is_off
    assert not policy.rests(3)
    assert any(policy.plan(crowd.keys))


def test_while_off_few_sequences_are_tried_and_none_for_long() -> None:
    """Where it never pays, fewer and fewer sequences begin with what drafting needs."""
    policy = Speculation(4)
    run = Simulated(policy, experts, steady(0.5), entries=0.05).run(200)
    started = []
    for key in range(1, 200):
        run.end(run.keys[0])
        run.begin(key)
        started.append(run.able[key])
        run.next = run.plan()
        for _ in range(30):
            run.step()
        assert not run.able[key]
    assert 0 < sum(started[:100]) < 12
    assert 0 < sum(started[100:]) < 6


def test_once_off_a_sequence_is_not_kept_up_unless_it_is_a_trial() -> None:
    policy = Speculation(4)
    run = Simulated(policy, float, steady(0.5), entries=0.05)
    for _ in range(400):
        run.step()
    assert policy.is_over(0)
    trial = next(key for key in range(1, 99) if policy.starts(key))
    assert not policy.is_over(trial)
    run.end(0)
    run.begin(trial)
    run.able[trial] = True
    run.next = run.plan()
    for _ in range(10):
        run.step()
    assert any(map(any, run.verified[-10:]))
    assert policy.is_over(trial)


def test_a_fixed_number_stays_whatever_it_costs() -> None:
    run = Simulated(Speculation(4, 3), float, steady(0.1)).run(100)
    assert {n for counts in run.planned for n in counts} == {3}
    assert run.policy.starts(9)
    assert not run.policy.is_over(9)
    assert run.policy.figures.reason == ""


@pytest.mark.parametrize(("most", "fixed"), [(0, None), (0, 0), (4, 0)])
def test_none_at_all(most: int, fixed: int | None) -> None:
    policy = Speculation(most, fixed)
    assert list(policy.plan([3, 1])) == [0, 0]
    assert policy.rests(2)
    assert not policy.starts(3)
    assert policy.is_over(3)
    assert policy.figures.reason == "0 drafts were asked for"


@pytest.mark.parametrize(("most", "fixed"), [(-1, None), (2, 3), (2, -1), (True, None), (9, None)])
def test_numbers_that_cannot_be_are_refused(most: int, fixed: int | None) -> None:
    with pytest.raises(EngineError, match="must be a whole number from 0 to"):
        Speculation(most, fixed)


def test_figures_count_what_was_verified() -> None:
    policy = Speculation(3)
    policy.plan([1, 2])
    for proposed, accepted in ((3, 1), (2, 2), (1, 0), (0, 0)):
        policy.note(1, proposed, accepted)
    figures = policy.figures
    assert (figures.steps, figures.drafted, figures.accepted) == (3, 6, 3)
    assert figures.drafted_by_position == (3, 2, 1)
    assert figures.accepted_by_position == (2, 1, 0)
    assert Speculation(0).figures.drafted_by_position == ()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.booleans())
def test_acceptance_of_many_at_once_is_that_of_one_after_another(
    count: int, is_right: bool
) -> None:
    at_once, plain, weight = Acceptance(2), 0.0, 0.0
    for hits in (count, 0):
        at_once.note_many(1, count, hits if is_right else count - hits)
        for _ in range(count):
            plain = plain * 63 / 64 + ((hits > 0) == is_right)
            weight = weight * 63 / 64 + 1
    assert at_once.hits[1] == pytest.approx(plain)
    assert at_once.counts == [0, pytest.approx(weight)]


# ------------------------------------------------------------------------------------------ times


def test_times_are_medians_that_outliers_do_not_move() -> None:
    times = StepTimes()
    for now, seconds in enumerate([1.0, 1.0, 10.0, 1.1, 10.0]):
        times.note(0.0, seconds, now)
    for now, seconds in enumerate([30.0, 2.0]):
        times.note(1.0, seconds, now)
    assert times.at(0.0) == 1.1
    assert times.at(1.0) == 2.0
    assert times.at(0.5) == pytest.approx(1.55)
    assert times.at(3.0) == pytest.approx(3.8)


def test_a_single_time_is_believed_as_far_as_it_does_not_stand_out() -> None:
    times = StepTimes((0.0, 0.0))
    for now in range(2):
        times.note(1.0, 0.5, now)
    times.note(3.0, 40.0, 2)
    assert times.at(3.0) == pytest.approx(1.5)
    times.note(3.0, 2.0, 3)
    assert times.at(3.0) == 2.0
    times.note(2.0, 0.6, 4)
    assert times.at(2.0) == 0.6


def test_more_rows_never_take_less_time() -> None:
    times = StepTimes()
    for at, seconds in ((0.0, 5.0), (1.0, 2.0), (2.0, 3.0)):
        for now in range(3):
            times.note(at, seconds, now)
    assert [times.at(x) for x in (0.0, 1.0, 2.0)] == [2.0, 2.0, 3.0]


def test_old_times_give_way_to_new() -> None:
    times = StepTimes()
    for now in range(7):
        times.note(0.0, 5.0, now)
    times.note(0.0, 1.0, 100)
    assert times.at(0.0) == 1.0


def test_few_drafts_of_many_sequences_are_known_by_their_own_share() -> None:
    """One of sixteen is not a quarter of a draft for each."""
    times = StepTimes()
    for now in range(20):
        times.note(0.0, 1.0, now)
        times.note(1 / 16, 1.05, now)
    assert times.at(1 / 16) == pytest.approx(1.05)
    assert times.at(1.0) == pytest.approx(1.8)
    for now in range(20, 80):
        times.note(3 / 16, 1.15, now)
    assert times.at(1.0) == pytest.approx(1.8, rel=1e-3)


def test_an_anchor_gives_way_to_what_was_noted_there() -> None:
    times = StepTimes((0.0, 0.0))
    for now in range(3):
        times.note(1.0, 0.5, now)
    assert times.at(0.0) == 0.0
    assert times.at(2.0) == pytest.approx(1.0)
    for now in range(3):
        times.note(0.0, 0.3, now)
    assert times.at(0.0) == 0.3
    assert times.at(2.0) == pytest.approx(0.7)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1e3), st.integers(0, 40)), min_size=1, max_size=40))
def test_the_middle_is_that_of_the_latest_times(notes: list[tuple[float, int]]) -> None:
    """Beside a list that is sorted every time."""
    times, plain, now, last = StepTimes(), list[float](), 0, 0
    for seconds, later in notes:
        now += later
        if plain and now - last > 32:
            plain = [sorted(plain)[(len(plain) - 1) // 2]]
        plain, last = [*plain, seconds][-7:], now
        times.note(0.0, seconds, now)
        assert times.at(0.0) == sorted(plain)[(len(plain) - 1) // 2]


# --------------------------------------------------------------------------------------- its price


@contextmanager
def counting_calls() -> Iterator[list[str]]:
    """The names of all functions that are called meanwhile, those of C among them."""
    calls: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)
        elif event == "c_call" and argument is not sys.setprofile:
            calls.append(argument.__name__)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def counted(run: Simulated, steps: int) -> list[int]:
    """How many calls the policy makes and takes in each of so many steps."""
    found = []
    policy = run.policy
    for _ in range(steps):
        with counting_calls() as calls:
            for key in run.keys:
                proposed = run.next[key]
                if proposed:
                    policy.note(key, proposed, int(run.rng.random() < 0.8) * proposed)
            rows = len(run.keys) + sum(run.next.values())
            run.next = dict(zip(run.keys, policy.plan(run.keys), strict=True))
            policy.note_step(len(run.keys), rows, run.cost(rows), 0.05)
        found.append(sum(name not in ("random", "cost") for name in calls))
    return found


@pytest.mark.parametrize("count", [1, 16, 100])
def test_while_it_is_off_a_step_is_only_counted(count: int) -> None:
    """For any number of sequences by the same few calls, but for one step in sixteen."""

    def cost(rows: int) -> float:
        return 1 + (rows - count) / count

    run = Simulated(Speculation(4), cost, steady(0.3), count=count, needs_hidden=False).run(100)
    while not (run.policy.is_off and run.policy.rests(count)):
        run.step()
    found: list[int] = []
    while run.policy.rests(count):
        found += counted(run, 1)
    assert len(found) > 100
    assert max(found) < 100
    assert sum(n > 20 for n in found) <= len(found) // 16 + 1


@pytest.mark.parametrize(("count", "most_calls"), [(1, 100), (16, 300), (100, 1500)])
def test_while_it_is_on_what_was_decided_stands_for_some_steps(count: int, most_calls: int) -> None:
    run = Simulated(Speculation(4), dense, steady(0.8), count=count).run(300)
    found = counted(run, 160)
    assert statistics.mean(found) < most_calls
    assert statistics.median(found) < 50 + 8 * count


# --------------------------------------------------------------------------------------- any calls

KEYS = st.integers(0, 12)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("plan"), st.lists(KEYS, unique=True, max_size=13)),
        st.tuples(st.just("note"), KEYS, st.integers(0, 3), st.integers(0, 3)),
        st.tuples(
            st.just("note_step"),
            st.integers(1, 40),
            st.integers(0, 120),
            st.floats(0, 1e6),
            st.floats(0, 1e6),
        ),
        st.tuples(st.just("drop"), KEYS),
        st.tuples(st.just("starts"), KEYS),
        st.tuples(st.just("rests"), st.integers(1, 40)),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(CALLS, st.sampled_from([None, 0, 2, 3]))
def test_any_calls_in_any_order_give_plans_within_bounds(
    calls: list[tuple[Any, ...]], fixed: int | None
) -> None:
    policy = Speculation(3, fixed)
    for name, *told in calls:
        if name == "plan":
            counts = policy.plan(*told)
            assert len(counts) == len(told[0])
            assert all(n == fixed if fixed is not None else 0 <= n <= 3 for n in counts)
        elif name == "note":
            key, *numbers = told
            policy.note(key, max(numbers), min(numbers))
        elif name == "note_step":
            sequences, drafts, *seconds = told
            policy.note_step(sequences, sequences + drafts, *seconds)
        elif name == "rests":
            sequences = told[0]
            is_rest = policy.rests(sequences)
            counts = policy.plan(range(sequences))
            assert not (is_rest and any(counts))
        else:
            getattr(policy, name)(*told)
    assert policy.figures.accepted <= policy.figures.drafted


def test_memory_is_bounded() -> None:
    """Of millions of steps and sequences no more is kept than of thousands, dropped or not."""

    def size(steps: int) -> int:
        policy, rng = Speculation(2), random.Random(7)
        for at in range(steps):
            keys = [64 * at + n for n in range(64)]
            policy.plan(keys)
            policy.note(keys[0], 2, rng.randint(0, 2))
            sequences = rng.randint(1, 4096)
            rows = sequences + rng.randint(0, 2 * sequences)
            policy.note_step(sequences, rows, rng.random(), rng.random())
            if rng.random() < 0.5:
                policy.drop(keys[0])
        return len(pickle.dumps(policy))

    assert size(800) < 1.3 * size(400)


def test_what_was_dropped_is_not_remembered() -> None:
    policy = Speculation(2)
    before = len(pickle.dumps(policy))
    for key in range(500):
        policy.plan([key])
        policy.drop(key)
        policy.note(key, 2, 1)
        policy.drop(key)
        policy._reason = "tries are remembered while it is off"
        policy.starts(key)
        policy.drop(key)
        policy._reason = ""
    assert not policy._tries
    assert len(pickle.dumps(policy)) < before + 1000
