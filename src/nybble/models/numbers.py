"""Numbers of pages and slots, lent and given back. Owns no memory; a pool of tensors, a scheduler
and a test count with the same class."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.errors import EngineError, OutOfPages


class Numbers:
    """`count` numbers from `first` on, each lent to one owner at a time. `what` is for messages.

    Two of them may share a pool, one behind the other. Where all take `each` at a time, what they
    take first lies side by side: so those that use no other do not meet in the same few sets of a
    processor's cache (of states of 64 KiB every fourth cost a step of 16 sequences 2 %).
    """

    def __init__(self, count: int, what: str, first: int = 0, each: int = 1) -> None:
        self.count, self.what, self.first = count, what, first
        takers = count // each
        end = first + takers * each
        order = [n for at in range(first, first + takers) for n in range(at, end, takers)]
        self._free = [*order, *range(end, first + count)][::-1]
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._free)

    @property
    def lent(self) -> frozenset[int]:
        """The numbers that somebody holds."""
        return frozenset(self._taken)

    def take(self, count: int = 1) -> list[int]:
        """Numbers for the caller alone; all of them or none. Raises OutOfPages."""
        if count > len(self._free):
            raise OutOfPages(
                f"{count} of {self.what} were asked for, {len(self._free)} of {self.count} are "
                "free; shorten the prompts or give the engine more memory"
            )
        found = [self._free.pop() for _ in range(count)]
        self._taken.update(found)
        return found

    def give_back(self, numbers: Sequence[int]) -> None:
        """Free numbers. Raises EngineError, and frees none, if one is not lent or named twice."""
        wrong = [n for n in numbers if n not in self._taken]
        if wrong or len(set(numbers)) < len(numbers):
            raise EngineError(
                f"{self.what}: {list(numbers)} are given back and {wrong or 'one of them twice'} "
                "was not taken"
            )
        self._taken.difference_update(numbers)
        self._free.extend(reversed(numbers))  # to be taken in the same order

    def check(self) -> None:
        """Raise EngineError unless every number is free or lent, and none both."""
        free = set(self._free)
        if len(free) < len(self._free) or free & self._taken:
            raise EngineError(f"{self.what}: a number is free twice, or free and lent")
        if len(free) + len(self._taken) != self.count:
            raise EngineError(
                f"{self.what}: {len(free)} free and {len(self._taken)} lent of {self.count}; "
                "some are lost"
            )
