"""Choosing one option per group under a limit of bytes: the multiple-choice knapsack.

Every group starts at its smallest option and climbs the convex hull of its (bytes, damage) points;
of all steps of all groups the one that takes away most damage per byte comes first (Sinha and
Zoltners 1979: the linear relaxation is solved by exactly this order). What is left over goes to
whichever single change still fits and gains most. So the result misses the optimum by less than the
gain of one step; there are hundreds.

Knows numbers only: no tensors, no formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group: what it costs and what it spoils."""

    bytes: int
    damage: float


@dataclass(frozen=True, slots=True)
class _Step:
    """From one point of a group's hull to the next."""

    group: int
    option: int  # where the step leads
    bytes: int
    gain: float

    @property
    def rate(self) -> float:
        return self.gain / self.bytes


def solve(groups: Sequence[Sequence[Option]], limit_bytes: int) -> tuple[int, ...]:
    """The index of an option for each group, so that the bytes keep the limit and the sum of
    damages is small.

    Raises RecipeError where even the smallest options together are above the limit.
    """
    hulls = [hull(options) for options in groups]
    chosen = [points[0] for points in hulls]
    left = limit_bytes - sum(groups[g][i].bytes for g, i in enumerate(chosen))
    if left < 0:
        raise RecipeError(
            f"the smallest options take {limit_bytes - left:,} bytes, and the limit is "
            f"{limit_bytes:,}"
        )
    steps = [step for g, points in enumerate(hulls) for step in _steps(g, groups[g], points)]
    # Of equal rates the smaller step first; then the order of the groups: the same on every run.
    steps.sort(key=lambda s: (-s.rate, s.bytes, s.group))
    stuck: set[int] = set()
    for step in steps:
        if step.group in stuck:
            continue
        if step.bytes > left:
            stuck.add(step.group)  # its later steps start where this one leads
            continue
        chosen[step.group] = step.option
        left -= step.bytes
    _fill(groups, chosen, left)
    return tuple(chosen)


def hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull, from the smallest on; damages fall strictly and every
    step takes away less per byte than the one before."""
    order = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].damage, i))
    points: list[int] = []
    for i in order:
        if points and options[i].damage >= options[points[-1]].damage:
            continue
        while len(points) > 1 and _rate(options, points[-2], points[-1]) <= _rate(
            options, points[-2], i
        ):
            points.pop()
        points.append(i)
    return points


def _rate(options: Sequence[Option], a: int, b: int) -> float:
    gain = options[a].damage - options[b].damage
    return gain / (options[b].bytes - options[a].bytes)


def _steps(group: int, options: Sequence[Option], points: Sequence[int]) -> list[_Step]:
    return [
        _Step(group, b, options[b].bytes - options[a].bytes, options[a].damage - options[b].damage)
        for a, b in zip(points, points[1:], strict=False)
    ]


def _fill(groups: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Change single groups, the largest gain first, while anything fits; options off the hull
    count too."""
    while True:
        best: tuple[float, int, int, int] | None = None
        for g, options in enumerate(groups):
            now = options[chosen[g]]
            for i, option in enumerate(options):
                gain = now.damage - option.damage
                if gain > 0 and option.bytes - now.bytes <= left:
                    found = (gain, -(option.bytes - now.bytes), -g, i)
                    best = found if best is None or found > best else best
        if best is None:
            return
        _, cost, g, i = best
        left += cost
        chosen[-g] = i


def climb(
    groups: Sequence[Sequence[Option]], order: Sequence[Sequence[int]], limit_bytes: int
) -> tuple[int, ...]:
    """Raise groups to their next larger option in the order given, whatever the damages say.

    `order` are sets of group numbers, each tried as a whole and then, where it does not fit, group
    by group; when all have been raised once they are raised again. This is how a control without
    knowledge is made. Raises RecipeError as `solve` does.
    """
    sizes = [sorted(range(len(o)), key=lambda i, o=o: (o[i].bytes, i)) for o in groups]  # type: ignore[misc]
    level = [0] * len(groups)

    def cost(g: int) -> int:
        if level[g] + 1 >= len(sizes[g]):
            return 0
        return groups[g][sizes[g][level[g] + 1]].bytes - groups[g][sizes[g][level[g]]].bytes

    left = limit_bytes - sum(groups[g][s[0]].bytes for g, s in enumerate(sizes))
    if left < 0:
        raise RecipeError(
            f"the smallest options take {limit_bytes - left:,} bytes, and the limit is "
            f"{limit_bytes:,}"
        )
    for _ in range(max(map(len, sizes), default=1) - 1):
        late: list[int] = []
        for together in order:
            total = sum(cost(g) for g in together)
            if total <= left:
                left -= total
                _raise(level, sizes, together)
            else:
                late += together
        for g in late:
            if cost(g) <= left:
                left -= cost(g)
                _raise(level, sizes, [g])
        if late:
            break
    return tuple(s[at] for s, at in zip(sizes, level, strict=True))


def _raise(level: list[int], sizes: Sequence[Sequence[int]], groups: Sequence[int]) -> None:
    for g in groups:
        level[g] = min(level[g] + 1, len(sizes[g]) - 1)
