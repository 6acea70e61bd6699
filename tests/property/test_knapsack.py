"""The knapsack keeps its limit and comes close to the optimum that dynamic programming finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.calibrate.knapsack import Option, climb, hull, solve
from nybble.errors import RecipeError

options = st.builds(Option, st.integers(0, 40), st.floats(0, 8, allow_nan=False))
groups = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=7)


def smallest(found: list[list[Option]]) -> int:
    return sum(min(o.bytes for o in group) for group in found)


def total(found: list[list[Option]], chosen: tuple[int, ...]) -> tuple[int, float]:
    picked = [group[i] for group, i in zip(found, chosen, strict=True)]
    return sum(o.bytes for o in picked), sum(o.damage for o in picked)


def optimum(found: list[list[Option]], limit: int) -> float:
    """Exact, over every number of bytes."""
    best = {0: 0.0}
    for group in found:
        grown: dict[int, float] = {}
        for used, damage in best.items():
            for o in group:
                at = used + o.bytes
                if at <= limit:
                    grown[at] = min(grown.get(at, float("inf")), damage + o.damage)
        best = grown
    return min(best.values())


@given(groups, st.integers(0, 120))
def test_the_limit_is_kept_and_the_optimum_missed_by_less_than_one_step(
    found: list[list[Option]], room: int
) -> None:
    limit = smallest(found) + room
    used, damage = total(found, solve(found, limit))
    assert used <= limit
    steps = [
        group[a].damage - group[b].damage
        for group in found
        for points in [hull(group)]
        for a, b in zip(points, points[1:], strict=False)
    ]
    assert damage <= optimum(found, limit) + max(steps, default=0.0) + 1e-9


@given(groups)
def test_room_for_everything_takes_the_least_damage_of_each_group(
    found: list[list[Option]],
) -> None:
    _, damage = total(found, solve(found, 10**6))
    assert damage == pytest.approx(sum(min(o.damage for o in g) for g in found))


@given(groups)
def test_a_limit_below_the_smallest_options_is_refused(found: list[list[Option]]) -> None:
    with pytest.raises(RecipeError, match="smallest options take"):
        solve(found, smallest(found) - 1)
    with pytest.raises(RecipeError, match="smallest options take"):
        climb(found, [range(len(found))], smallest(found) - 1)


@given(st.lists(options, min_size=1, max_size=8))
def test_no_option_lies_below_the_hull(found: list[Option]) -> None:
    points = [found[i] for i in hull(found)]
    for o in found:
        if o.bytes >= points[-1].bytes:
            assert o.damage >= points[-1].damage
        for a, b in zip(points, points[1:], strict=False):
            assert a.damage > b.damage
            if a.bytes <= o.bytes <= b.bytes:
                share = (o.bytes - a.bytes) / (b.bytes - a.bytes)
                assert o.damage >= a.damage + share * (b.damage - a.damage) - 1e-9


@given(groups, st.integers(0, 120), st.permutations(range(7)))
def test_a_climb_keeps_its_limit_and_damages_do_not_matter(
    found: list[list[Option]], room: int, order: list[int]
) -> None:
    limit = smallest(found) + room
    sets = [[g] for g in order if g < len(found)]
    chosen = climb(found, sets, limit)
    used, _ = total(found, chosen)
    assert used <= limit
    blind = [[Option(o.bytes, 0.0) for o in group] for group in found]
    assert climb(blind, sets, limit) == chosen


@given(st.integers(1, 9), st.integers(0, 40), st.permutations(range(9)))
def test_a_climb_raises_in_the_order_given_and_all_once_before_any_twice(
    count: int, room: int, order: list[int]
) -> None:
    found = [[Option(4, 0.0), Option(6, 0.0), Option(9, 0.0)] for _ in range(count)]
    turns = [g for g in order if g < count]
    chosen = climb(found, [[g] for g in turns], 4 * count + room)
    once = min(count, room // 2)
    twice = max(0, room - 2 * count) // 3 if once == count else 0
    expected = [0] * count
    for g in turns[:once]:
        expected[g] = 1
    for g in turns[:twice]:
        expected[g] = 2
    assert list(chosen) == expected


def test_a_climb_takes_sets_whole_where_it_can() -> None:
    found = [[Option(0, 0.0), Option(2, 0.0)] for _ in range(4)]
    assert climb(found, [[2, 3], [0, 1]], 4) == (0, 0, 1, 1)
    assert climb(found, [[2, 3], [0, 1]], 7) == (1, 0, 1, 1)


def test_more_damage_per_byte_goes_first() -> None:
    found = [
        [Option(10, 5.0), Option(20, 1.0)],  # 0.4 a byte
        [Option(10, 9.0), Option(20, 2.0)],  # 0.7 a byte
        [Option(10, 3.0), Option(12, 2.9)],  # 0.05 a byte
    ]
    assert solve(found, 40) == (0, 1, 0)
    assert solve(found, 42) == (0, 1, 1)
    assert solve(found, 50) == (1, 1, 0)


def test_an_option_off_the_hull_fills_what_is_left() -> None:
    found = [[Option(0, 10.0), Option(6, 9.0), Option(10, 0.0)]]
    assert hull(found[0]) == [0, 2]
    assert solve(found, 7) == (1,)
