"""Who computes what, when: turns, chunks, pages and slots, without a tensor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.request import Request, SamplingParams
from nybble.engine.scheduler import AGEING, CHUNK, EngineOptions, Scheduler, Share, turn
from nybble.engine.sequence import Sequence
from nybble.errors import EngineError
from nybble.models.numbers import Numbers

NOTHING: Any = None  # a scheduler looks at neither texts nor rows


def sequence(
    name: str, prompt: int, most: int = 4, *, arrival: int = 0, priority: int = 0, choice: int = 0
) -> Sequence:
    params = SamplingParams(max_tokens=most)
    request = Request(name, tuple(range(1, prompt + 1)), params, priority)
    place = turn(arrival, priority, choice)
    return Sequence(request, choice, place, most, frozenset(), NOTHING, NOTHING)


def scoring(name: str, prompt: int, arrival: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=2, prompt_logprobs=1)
    request = Request(name, tuple(range(1, prompt + 1)), params)
    place = turn(arrival, 0, 0)
    return Sequence(request, 0, place, 2, frozenset(), NOTHING, NOTHING)


def scheduler(
    pages: int = 100, slots: int = 8, page_tokens: int = 16, rows: int = 10_000, **options: int
) -> Scheduler:
    sizes = {"max_sequences": 4, "max_batched_tokens": 256} | options
    return Scheduler(
        EngineOptions(page_tokens=page_tokens, **sizes),
        Numbers(pages, "pages"),
        Numbers(slots, "slots"),
        rows,
    )


def step(book: Scheduler) -> list[tuple[str, int, int]]:
    """One step without a model; of each share its name, where it begins and how long it is."""
    shares = book.schedule()
    told = [told_of(share) for share in shares]
    for share in shares:
        book.commit(share)
        if share.is_sampled:
            share.sequence.output.append(0)
            if len(share.sequence.output) == share.sequence.most:
                book.remove(share.sequence)
    return told


def told_of(share: Share) -> tuple[str, int, int]:
    return share.sequence.request.id, share.work.length, len(share.work.tokens)


def steps(book: Scheduler) -> Iterator[list[tuple[str, int, int]]]:
    while told := step(book):
        yield told


def conserved(book: Scheduler) -> None:
    held = [p for s in book.running for p in s.state.pages]
    slots = [n for s in book.running for n in s.state.slots]
    for numbers, mine in ((book.pages, held), (book.slots, slots)):
        numbers.check()
        assert len(set(mine)) == len(mine) == numbers.count - numbers.free
    assert not [s for s in book.waiting if s.state.pages or s.state.slots]


def test_a_scheduler_needs_no_torch() -> None:
    code = "import sys, nybble.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequences": 0}, "max_sequences must be"),
        ({"page_tokens": True}, "page_tokens must be"),
        ({"page_tokens": 4097}, "page_tokens must be a whole number from 1 to 4,096"),
        ({"max_sequences": 4097, "max_batched_tokens": 5000}, "from 1 to 4,096, found 4097"),
        ({"max_batched_tokens": (1 << 20) + 1}, "from 1 to 1,048,576, found 1048577"),
        ({"max_batched_tokens": 1.5}, "max_batched_tokens must be"),
        ({"max_sequences": 32, "max_batched_tokens": 95}, "at least max_sequences \\+ 64, 96"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        EngineOptions(**options)


def test_rows_of_prompts_are_bounded_by_bytes() -> None:
    options = EngineOptions()
    assert options.prompt_rows(248_320) == CHUNK  # 64 rows of these are 63.6 MB
    assert options.prompt_rows(49_152) == 5 * CHUNK
    assert options.prompt_rows(10**9) == CHUNK
    assert options.max_outputs(49_152) == 5 * CHUNK + 32
    assert options.max_outputs(100) == options.max_batched_tokens


def test_a_prompt_is_cut_at_multiples_of_the_chunk() -> None:
    book = scheduler(max_batched_tokens=150)
    book.add(sequence("a", 300, most=2))
    assert list(steps(book)) == [
        [("a", 0, 128)],
        [("a", 128, 128)],
        [("a", 256, 44)],
        [("a", 300, 1)],
    ]
    assert book.pages.free == 100
    assert book.slots.free == 8


def test_who_decodes_goes_before_chunks_which_take_the_rest() -> None:
    book = scheduler(max_batched_tokens=68)
    book.add(sequence("a", 5, arrival=0))
    assert step(book) == [("a", 0, 5)]
    book.add(sequence("b", 200, arrival=1))
    assert step(book) == [("a", 5, 1), ("b", 0, 64)]
    book.add(sequence("c", 3, arrival=2))
    assert step(book) == [("a", 6, 1), ("b", 64, 64)]  # less than a chunk is left for c


def test_a_second_prompt_takes_what_the_first_leaves() -> None:
    book = scheduler(max_batched_tokens=200)
    book.add(sequence("a", 70))
    book.add(sequence("b", 500, arrival=1))
    assert step(book) == [("a", 0, 70), ("b", 0, 128)]


def test_turns_follow_priority_then_arrival() -> None:
    book = scheduler()
    for at, (name, priority) in enumerate([("late", 1), ("first", 0), ("next", 0), ("urgent", -1)]):
        book.add(sequence(name, 4, arrival=at, priority=priority))
    assert [name for name, _, _ in step(book)] == ["urgent", "first", "next", "late"]


def test_a_lower_priority_is_overtaken_so_often_and_no_more() -> None:
    assert turn(5, 1, 0) > turn(4 + AGEING, 0, 0)
    assert turn(5, 1, 0) < turn(5 + AGEING, 0, 0)


def test_nothing_overtakes_the_first_that_waits() -> None:
    book = scheduler(pages=12)
    book.add(sequence("a", 60, most=20))
    book.add(sequence("large", 150, arrival=1))
    book.add(sequence("small", 3, arrival=2))
    begun = [[name for name, _, _ in told] for told in steps(book)]
    assert all(names == ["a"] for names in begun[:20])
    assert begun[20] == ["large", "small"]


def test_a_sequence_begins_only_if_those_that_run_can_go_on() -> None:
    book = scheduler(pages=4)
    book.add(sequence("a", 16, most=40))
    book.add(sequence("b", 40, arrival=1))
    assert step(book) == [("a", 0, 16)]  # b would take the last three pages
    assert [s.request.id for s in book.waiting] == ["b"]


def test_slots_and_sequences_bound_who_runs() -> None:
    for book in (scheduler(slots=2), scheduler(max_sequences=2)):
        for at in range(3):
            book.add(sequence(str(at), 4, arrival=at))
        assert len(step(book)) == 2


def test_the_last_in_turn_is_preempted_and_computes_the_same_again() -> None:
    book = scheduler(pages=6, slots=4)
    book.add(sequence("a", 30, most=60))
    book.add(sequence("b", 30, most=30, arrival=1))
    told: list[list[tuple[str, int, int]]] = []
    lonely = 0
    while len(told) < 200 and (now := step(book)):
        told.append(now)
        conserved(book)
        lonely += len(book.running) == 1 and bool(book.waiting)
    assert book.preemptions == 1
    assert lonely > 5
    of_b = [(at, n) for now in told for name, at, n in now if name == "b"]
    again = of_b.index((0, 30), 1)
    made = of_b[again - 1][0] + 1 - 30 + 1  # all that it had, with the one not yet computed
    assert of_b[again + 1] == (30, made)  # replayed at once
    assert of_b[again + 2 :] == [(at, 1) for at in range(30 + made, 30 + 30 - 1)]
    assert book.pages.free == 6


def test_replays_use_the_kernels_of_decoding() -> None:
    book = scheduler(max_batched_tokens=70)
    replayed = sequence("a", 10, most=200)
    replayed.output += [7] * 90
    book.add(replayed)
    first = book.schedule()
    assert [(s.work.length, len(s.work.tokens), s.work.is_recurrent) for s in first] == [
        (0, 10, False)
    ]
    assert not first[0].is_sampled
    assert first[0].work.outputs == 0
    book.commit(first[0])
    second = book.schedule()[0]
    assert (len(second.work.tokens), second.work.is_recurrent) == (70, True)
    assert set(second.work.tokens) == {7}
    book.commit(second)
    third = book.schedule()[0]
    assert (third.work.length, len(third.work.tokens), third.is_sampled) == (80, 20, True)


def test_removing_frees_wherever_a_sequence_is() -> None:
    book = scheduler(max_sequences=1)
    runs, waits, follows = (sequence(name, 20, arrival=i) for i, name in enumerate("abc"))
    runs.followers = [follows]
    book.add(runs)
    book.add(waits)
    step(book)
    for gone in (follows, waits, runs):
        book.remove(gone)
        conserved(book)
    assert not book.schedule()
    assert book.pages.free == book.pages.count


def test_followers_share_a_prompt_if_there_is_room() -> None:
    book = scheduler(pages=6, max_sequences=3)
    leader = sequence("a", 20)
    leader.followers = [sequence("a", 20, choice=i) for i in (1, 2, 3)]
    book.add(leader)
    for share in book.schedule():
        book.commit(share)
    forked = book.fork(leader)
    assert [s.choice for s in forked] == [1]  # two pages more, and none would be left
    assert forked[0].state.length == 20
    assert [s.choice for s in book.waiting] == [2, 3]
    assert leader.followers == []
    conserved(book)


def test_followers_do_not_overtake() -> None:
    book = scheduler()
    leader = sequence("a", 20, priority=1)
    leader.followers = [sequence("a", 20, priority=1, choice=1)]
    book.add(leader)
    for share in book.schedule():
        book.commit(share)
    book.add(sequence("urgent", 20, arrival=1))
    assert book.fork(leader) == []
    assert [s.request.id for s in book.waiting] == ["urgent", "a"]


def test_scored_prompts_give_rows_within_the_bound() -> None:
    book = scheduler(rows=CHUNK, max_batched_tokens=1000)
    first, second = scoring("a", 150), scoring("b", 70, arrival=1)
    book.add(first)
    book.add(second)
    seen = []
    while len(seen) < 20 and (shares := book.schedule()):
        assert sum(s.scored for s in shares) <= CHUNK
        for share in shares:
            seen.append((*told_of(share), share.scored, share.work.outputs))
            book.commit(share)
            sequence = share.sequence
            sequence.scores += [0.0] * (share.scored + (not sequence.scores))
            if share.is_sampled:
                sequence.is_scored = True
                book.remove(sequence)
    assert (
        seen
        == [
            ("a", 0, 64, 64, 64),
            ("a", 64, 64, 64, 64),
            ("a", 128, 22, 22, 22),
            ("b", 0, 64, 64, 64),
            ("b", 64, 6, 6, 6),
        ]
        or [s for s in seen if s[0] == "a"] == seen[:3]
    )


def test_what_was_scored_before_preemption_is_not_scored_again() -> None:
    book = scheduler(rows=10_000, max_batched_tokens=100)
    asked = scoring("a", 100)
    asked.scores = [None] + [0.0] * 64
    book.add(asked)
    share = book.schedule()[0]
    assert (len(share.work.tokens), share.scored, share.work.outputs) == (100, 36, 36)


ARRIVALS = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=12
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(arrivals=ARRIVALS, pages=st.integers(8, 20), slots=st.integers(1, 4))
def test_nobody_waits_for_ever(
    arrivals: list[tuple[int, int, int]], pages: int, slots: int
) -> None:
    """While urgent requests keep coming, every request ends within a bound of its turn."""
    book = scheduler(pages=pages, slots=slots, max_batched_tokens=80)
    ended: dict[str, int] = {}
    count = at = 0
    watched = []
    for priority, prompt, most in arrivals:
        watched.append(sequence(f"w{count}", prompt, most, arrival=count, priority=priority))
        book.add(watched[-1])
        count += 1
    # Before the last of them only so many requests can ever go, of at most 4 steps each alone.
    bound = (count + AGEING * 7) * 6 + sum(prompt + most for _, prompt, most in arrivals)
    while len(ended) < len(watched):
        urgent = sequence(f"u{count}", 5, 2, arrival=count, priority=-3)
        book.add(urgent)
        count += 1
        step(book)
        conserved(book)
        at += 1
        alive = {id(s) for s in (*book.running, *book.waiting)}
        for one in watched:
            if id(one) not in alive:
                ended.setdefault(one.request.id, at)
        assert at <= bound, f"{len(watched) - len(ended)} of {len(watched)} still wait"
