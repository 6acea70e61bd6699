"""The numbers of a batch, in memory whose addresses a recorded program holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nybble.engine.runner import Work
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import look_up
from nybble.models.rope import Rope
from nybble.models.state import Batch


class StepInputs:
    """Fixed buffers for a batch of at most so many tokens and sequences."""

    def __init__(self, angles: Angles, tokens: int, sequences: int, page_tokens: int) -> None:
        width = -(-angles.context // page_tokens)
        self.tokens = torch.zeros(tokens, dtype=torch.int64)
        self.positions = torch.zeros(tokens, dtype=torch.int64)
        self.starts = torch.zeros(sequences + 1, dtype=torch.int32)
        self.lengths = torch.zeros(sequences, dtype=torch.int32)
        self.table = torch.full((sequences, width), -1, dtype=torch.int32)
        self.slots = torch.zeros(sequences, dtype=torch.int32)
        self.writes = torch.full((tokens,), -1, dtype=torch.int32)
        self.recurrent = torch.zeros(sequences, dtype=torch.int32)
        self._angles = angles
        self._rows: list[list[int]] = [[] for _ in range(sequences)]
        # A view of a tensor as an array costs as much as writing to it.
        self._tokens, self._positions = self.tokens.numpy(), self.positions.numpy()
        self._starts, self._lengths = self.starts.numpy(), self.lengths.numpy()
        self._table, self._writes = self.table.numpy(), self.writes.numpy()
        self._slots, self._recurrent = self.slots.numpy(), self.recurrent.numpy()

    @property
    def context(self) -> int:
        """How many positions a sequence may have."""
        return self._angles.context

    @property
    def nbytes(self) -> int:
        """What the buffers take, without the angles."""
        found = (self.tokens, self.positions, self.starts, self.lengths, self.table, self.slots)
        return sum(t.nbytes for t in (*found, self.writes, self.recurrent))

    def batch(self, sequences: int, tokens: int, compute: Compute) -> Batch:
        """The first so many, as a batch; the angles of their positions are looked up, or that is
        recorded."""
        return Batch(
            self.tokens[:tokens],
            self.starts[: sequences + 1],
            self.lengths[:sequences],
            self.table[:sequences],
            self.slots[:sequences],
            self.writes[:tokens],
            *self._angles.look_up(self.positions[:tokens], compute),
            self.recurrent[:sequences],
        )

    def fill(self, works: Sequence[Work]) -> int:
        """Write a batch down; how many tokens it has."""
        writes, slots, recurrent = self._writes, self._slots, self._recurrent
        at = 0
        for i, work in enumerate(works):
            end = self.put(i, at, work.tokens, work.length, work.pages)
            slots[i], recurrent[i] = work.slot, work.is_recurrent
            writes[at:end] = -1
            for count, slot in written_states(work):
                writes[at + count - 1] = slot
            at = end
        return at

    def put(
        self, row: int, at: int, tokens: Sequence[int], length: int, pages: Sequence[int]
    ) -> int:
        """Write down, as the sequence of that row, tokens that follow `length` others and stand
        from `at` on in the batch; where they end."""
        end = at + len(tokens)
        self._tokens[at:end] = tokens
        self._angles.reach(length, length + len(tokens))
        self._positions[at:end] = self._angles.positions[length : length + len(tokens)]
        self._lengths[row], self._starts[row + 1] = length, end
        if self._rows[row] != pages:
            self._write_pages(row, pages)
        return end

    def _write_pages(self, row: int, pages: Sequence[int]) -> None:
        """Only what a decode adds is new where the row held the same sequence a step ago."""
        before, width = self._rows[row], self._table.shape[1]
        start = len(before) if pages[: len(before)] == before else 0
        new = pages[start:width]  # a page taken ahead may lie beyond the context
        self._table[row, start : start + len(new)] = new
        self._rows[row] = list(pages)


def written_states(work: Work) -> Sequence[tuple[int, int]]:
    """After how many tokens of a work its state is written to which slot."""
    return work.writes or ((len(work.tokens), work.slot),)


class Angles:
    """Cosine and sine of positions, float32 [N, R / 2], made in blocks when they are first met;
    and `positions` themselves, int64 [N]."""

    BLOCK = 4096

    def __init__(self, rope: Rope, context: int) -> None:
        self.rope, self.context = rope, context
        shape = (context, len(rope.inverse))
        self.cos, self.sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.positions = np.arange(context)
        self._unknown = set(range(-(-context // self.BLOCK)))

    @property
    def nbytes(self) -> int:
        """At most: blocks that nobody reached were never touched."""
        return self.cos.nbytes + self.sin.nbytes + self.positions.nbytes

    def reach(self, start: int, end: int) -> None:
        """Make what is missing of those from a position to before another."""
        if not self._unknown:
            return
        for block in range(start // self.BLOCK, (end - 1) // self.BLOCK + 1):
            if block in self._unknown:
                self._make(block)

    def look_up(self, positions: Tensor, compute: Compute) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [T, R / 2], of positions int64 [T] that were reached before."""
        return look_up(self.cos, positions, compute), look_up(self.sin, positions, compute)

    def _make(self, block: int) -> None:
        start, end = block * self.BLOCK, min((block + 1) * self.BLOCK, self.context)
        cos, sin = self.rope.tables(torch.arange(start, end))
        self.cos[start:end], self.sin[start:end] = cos.numpy(), sin.numpy()
        self._unknown.discard(block)
