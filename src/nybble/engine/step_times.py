"""How long steps take, by how many drafts they verify, learned from steps that other work on the
machine may have held up. Knows nothing of who drafts, or why.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Of so many times the middle counts: three steps that something else held up do not move it.
_TIMES = 7
#: Times this many steps old are not mixed with new ones.
_STALE_STEPS = 32
#: From so many drafts that were measured up to so many times as many may be concluded: one draft of
#: sixteen sequences says little of one for each.
_REACH = 4
#: Times at different shares of drafts are apart by this much of a draft for each sequence.
SHARES = 4


@dataclass(slots=True)
class _Node:
    """The latest seconds of about so many `drafts`, as they came and by size."""

    drafts: float

    latest: deque[float] = field(default_factory=deque)
    sizes: list[float] = field(default_factory=list)
    last: int = 0

    def add(self, drafts: float, seconds: float, now: int) -> bool:
        """Take one more; whether that moved the point. `now` counts steps."""
        before = self.middle if self.sizes else None
        moved = (drafts - self.drafts) / _TIMES
        self.drafts += moved
        if now - self.last > _STALE_STEPS and before is not None:
            self.latest, self.sizes = deque([before]), [before]
        if len(self.sizes) == _TIMES:
            del self.sizes[bisect_left(self.sizes, self.latest.popleft())]
        self.latest.append(seconds)
        insort(self.sizes, seconds)
        self.last = now
        return self.middle != before or moved != 0 or len(self.sizes) == 2

    @property
    def middle(self) -> float:
        """The median, the lower of two: what disturbs a step makes it longer, never shorter."""
        return self.sizes[(len(self.sizes) - 1) // 2]


class StepTimes:
    """Seconds as a function of drafts for each sequence: medians, and straight lines between."""

    def __init__(self, *anchors: tuple[float, float]) -> None:
        """`anchors`: points of the curve that are known beforehand, until something is noted
        there."""
        self._anchors = anchors
        self._nodes: dict[int, _Node] = {}
        self._counts = [0, 0]
        self._most = 0.0
        self._line = list(anchors)
        self._is_drawn = True

    def count(self, *, is_drafted: bool) -> int:
        """How many times were noted, of steps with drafts or of those without."""
        return self._counts[is_drafted]

    @property
    def reach(self) -> float:
        """How many drafts for each sequence may be judged by what is known."""
        return _REACH * self._most

    def note(self, drafts: float, seconds: float, now: int) -> None:
        """Something with so many drafts for each sequence took so long; `now` counts steps."""
        at = math.ceil(drafts * SHARES)
        node = self._nodes.get(at)
        if node is None:
            node = self._nodes[at] = _Node(drafts, last=now)
        self._counts[at > 0] += 1
        self._most = max(self._most, drafts)
        if node.add(drafts, max(seconds, 1e-9), now):
            self._is_drawn = False

    def at(self, drafts: float) -> float:
        """The seconds to expect; at least one time must be known."""
        if not self._is_drawn:
            self._line, self._is_drawn = self._draw(), True
        return _on_line(self._line, drafts)

    def _draw(self) -> list[tuple[float, float]]:
        """Points of the curve, rising. A single time is believed as far as it does not stand out:
        the first step of its kind does things once."""
        nodes = [self._nodes[at] for at in sorted(self._nodes)]
        known = [
            point for point in self._anchors if math.ceil(point[0] * SHARES) not in self._nodes
        ]
        sure = [*known, *((n.drafts, n.middle) for n in nodes if len(n.sizes) > 1)]
        line = list(sure)
        for node in nodes:
            if len(node.sizes) == 1:
                expected = _on_line(sure, node.drafts) if len(sure) > 1 else math.inf
                line.append((node.drafts, min(expected, node.middle)))
        return _rising(sorted(line))


def _on_line(line: Sequence[tuple[float, float]], x: float) -> float:
    """The height of a line at x: straight between points, or not far beyond them as before if that
    is lower, since a step to a slower kernel may be anywhere between; straight on after the last.
    """
    after = bisect_right(line, (x, math.inf))
    if not after or len(line) == 1:
        return line[0][1]
    found = math.inf
    if after < len(line):
        found = _between(line[after - 1], line[after], x)
    if after > 1 and (after == len(line) or x <= _REACH * line[after - 1][0]):
        found = min(found, _between(line[0], line[after - 1], x))
    return found


def _between(a: tuple[float, float], b: tuple[float, float], x: float) -> float:
    return a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])


def _rising(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """More rows never take less time: of points that fall the later is right, since what disturbs
    makes times longer."""
    lowest = math.inf
    for at in range(len(line) - 1, -1, -1):
        lowest = min(lowest, line[at][1])
        line[at] = (line[at][0], lowest)
    return line
