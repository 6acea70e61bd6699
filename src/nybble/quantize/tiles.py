"""Tiles: the pieces of weights that one kernel call covers, and the buffers their results lie in.

A tile's results are at most `TILE_BYTES`, so private memory depends on the tile and not on the
tensor: a batch of small jobs (the experts of a stack), or some rows of one large matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from nybble.formats import search as definition
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL
from nybble.formats.element import F32Array, U8Array
from nybble.formats.search import Search
from nybble.kernels import block_quantize
from nybble.plan.jobs import Job, Member
from nybble.plan.plan import Plan

#: Bytes of results of one kernel call: small enough for buffers to stay in the last-level cache.
TILE_BYTES = 16 << 20
#: Buffers of that size: one being filled, one being written, one waiting.
BUFFERS = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) of a member; `matrix` is a view of them in the mapped source."""

    job: Job
    member: Member
    first: int
    last: int
    matrix: NDArray[np.generic]

    @property
    def code_bytes(self) -> int:
        """Bytes of codes it becomes."""
        fmt = self.job.scheme.weight
        return self.matrix.size // 2 if fmt is not None and fmt.is_packed else self.matrix.size

    @property
    def scale_bytes(self) -> int:
        """Bytes of block scales it becomes; 0 for FP8, whose scales are made before."""
        fmt = self.job.scheme.weight
        return self.matrix.size // fmt.block[1] if fmt is not None and fmt.is_packed else 0


def batches(plan: Plan, jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs whose results fit into one tile together, at least one at a time."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        more = sum(plan.member_bytes(job, m) for m in job.members)
        if batch and size + more > TILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += more
    if batch:
        yield batch


def tiles(
    plan: Plan, jobs: Sequence[Job], matrices: Mapping[str, NDArray[np.generic]]
) -> Iterator[list[Piece]]:
    """A batch as one tile, or the rows of its members where that would be too much."""
    total = sum(plan.member_bytes(job, m) for job in jobs for m in job.members)
    if total <= TILE_BYTES:
        yield [Piece(j, m, 0, m.shape[0], matrices[m.module]) for j in jobs for m in j.members]
        return
    for job in jobs:
        for m in job.members:
            per_row = -(-plan.member_bytes(job, m) // m.shape[0])
            rows = max(128, TILE_BYTES // per_row // 128 * 128)  # whole 128 x 128 blocks
            for first in range(0, m.shape[0], rows):
                last = min(first + rows, m.shape[0])
                yield [Piece(job, m, first, last, matrices[m.module][first:last])]


class Buffers:
    """A few buffers that go round: fresh pages for every tile would cost a fifth of the time."""

    def __init__(self) -> None:
        self._free: SimpleQueue[U8Array | None] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(None)  # made when first needed

    def take(self, size: int) -> U8Array:
        """A buffer of at least `size` bytes; waits until one is given back."""
        buffer = self._free.get()
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, TILE_BYTES), dtype=np.uint8)
        return buffer

    def give_back(self, buffer: U8Array) -> None:
        """Let the buffer be filled again."""
        self._free.put(buffer)


def fill(
    tile: Sequence[Piece],
    scales: Mapping[str, F32Array],
    search: Search,
    buffer: U8Array,
    threads: int,
    *,
    bf16_quotient: bool,
) -> tuple[U8Array, U8Array]:
    """Quantize a tile, all of one scheme, into `buffer`; returns its codes and its block scales."""
    fmt = tile[0].job.scheme.weight
    assert fmt is not None
    codes_end = sum(p.code_bytes for p in tile)
    codes = buffer[:codes_end]
    blocks = buffer[codes_end : codes_end + sum(p.scale_bytes for p in tile)]
    code_runs = np.split(codes, np.cumsum([p.code_bytes for p in tile])[:-1])
    block_runs = np.split(blocks, np.cumsum([p.scale_bytes for p in tile])[:-1])
    if fmt is FP8_BLOCK:  # runs of 128 elements are too short for a kernel call: plain numpy
        for p, run in zip(tile, code_runs, strict=True):
            own = scales[p.member.module][p.first // 128 : -(-p.last // 128)]
            run[:] = definition.quantize(p.matrix, fmt, search, scale=own).codes.reshape(-1)
        return codes, blocks
    if fmt is FP8_CHANNEL:
        for p, run in zip(tile, code_runs, strict=True):
            own = scales[p.member.module][p.first : p.last, 0]
            rows = run.reshape(p.matrix.shape)
            block_quantize.quantize(p.matrix, fmt, search, own, rows, [], threads)
        return codes, blocks
    per_run = np.array([scales[p.member.module] for p in tile], dtype=np.float32)
    block_quantize.quantize(
        [p.matrix for p in tile],
        fmt,
        search,
        per_run,
        code_runs,
        block_runs,
        threads,
        bf16_quotient=bf16_quotient and fmt is FP8,
    )
    return codes, blocks
