"""How often drafts turn out right: of one sequence, of all, and in figures. Knows nothing of times,
or of what follows from it.
"""

from __future__ import annotations

#: As many verified drafts of a sequence weigh as much as what is known from all.
PRIOR_DRAFTS = 6.0
#: What a verified draft leaves of those before: a sequence remembers 24 of them, all together 64.
#: (Simulated: sequences that differ gain by small numbers here, those that are alike by large.)
_KEEP_ONE, _KEEP_ALL = 23 / 24, 63 / 64
#: What a step without drafts leaves of a sequence's own acceptance, while others have drafts: it is
#: tried again some day.
_KEEP_IDLE = 0.99


class Acceptance:
    """How often a draft is accepted if those before it are, by position; the latest count most."""

    __slots__ = ("counts", "hits")

    def __init__(self, most: int) -> None:
        self.hits, self.counts = [0.0] * most, [0.0] * most

    def note(self, proposed: int, accepted: int) -> None:
        """Drafts of one sequence were verified; of those after one that was wrong nothing is
        known."""
        hits, counts = self.hits, self.counts
        for at in range(accepted):
            hits[at] = hits[at] * _KEEP_ONE + 1
            counts[at] = counts[at] * _KEEP_ONE + 1
        if accepted < proposed:
            hits[accepted] *= _KEEP_ONE
            counts[accepted] = counts[accepted] * _KEEP_ONE + 1

    def note_many(self, at: int, count: int, hits: int) -> None:
        """So many drafts at a position were verified, of any sequence, in whatever order."""
        left = _KEEP_ALL**count
        weight = (1 - left) / (1 - _KEEP_ALL)
        self.hits[at] = self.hits[at] * left + weight * hits / count
        self.counts[at] = self.counts[at] * left + weight

    def fade(self, steps: int) -> None:
        """So many steps have gone by in which nothing was verified."""
        trust = _KEEP_IDLE**steps
        self.hits = [trust * x for x in self.hits]
        self.counts = [trust * x for x in self.counts]

    def mean(self, at: int, prior: float) -> float:
        """Of the draft at a position, from 0; `prior` is what it is taken for unseen."""
        return (PRIOR_DRAFTS * prior + self.hits[at]) / (PRIOR_DRAFTS + self.counts[at])


class Outcomes:
    """How often so many drafts of a sequence were verified and so many of them accepted, or gave a
    token more."""

    def __init__(self, most: int) -> None:
        self._kinds = [(n, right) for n in range(most + 1) for right in range(n + 1)]
        self._counts = [0] * len(self._kinds)
        self._told = [0] * len(self._kinds)

    def note(self, proposed: int, accepted: int) -> None:
        """Once more."""
        self._counts[proposed * (proposed + 1) // 2 + accepted] += 1

    def by_position(self) -> list[tuple[int, int, int]]:
        """Of all drafts at each position: how many, how many after none that was wrong, and how
        many of these right."""
        return self._positions(self._counts)

    def news(self) -> list[tuple[int, int, int]]:
        """The same of those that were not told before; empty if there are none."""
        now = self._counts.copy()
        if now == self._told:
            return []
        fresh = [a - b for a, b in zip(now, self._told, strict=True)]
        self._told = now
        return self._positions(fresh)

    def _positions(self, counts: list[int]) -> list[tuple[int, int, int]]:
        made, reached, right = ([0] * self._kinds[-1][0] for _ in range(3))
        for (proposed, accepted), count in zip(self._kinds, counts, strict=True):
            if count:
                for at in range(proposed):
                    made[at] += count
                    reached[at] += count * (at <= accepted)
                    right[at] += count * (at < accepted)
        return list(zip(made, reached, right, strict=True))
