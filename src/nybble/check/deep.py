"""Reading the values of many tensors, some of them or all, and counting what is in them.

Everything: runs of a file into a few buffers that are used over and over, by as many threads as
there are processors, so memory stays bounded whatever the checkpoint's size. Some: three pieces of
each tensor. Knows bytes and kinds of values (`kernels.value_scan`); judges nothing.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.files import open_file, read_exactly, read_ranges
from nybble.checkpoint.safetensors import DTYPES, TensorInfo
from nybble.errors import CheckpointError
from nybble.kernels import dispatch, value_scan
from nybble.kernels.value_scan import Segment

if TYPE_CHECKING:
    from nybble.check.survey import Survey

U8Array = NDArray[np.uint8]
F64Array = NDArray[np.float64]
Counts = NDArray[np.void]  # value_scan.COUNTS

#: One read of a whole scan. Large enough that the read is not felt, small enough for a cache.
CHUNK = 1 << 21
#: Behind a network at most so many separate reads of scalars in one file; the rest is left out.
REMOTE_RUNS = 256


@dataclass
class _Chunk:
    """A run of one file, the pieces of tensors in it, and which tensors they belong to."""

    file: str
    start: int
    length: int = 0
    segments: list[Segment] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


def count_all(survey: Survey, tensors: Sequence[TensorInfo], kinds: Sequence[str]) -> Counts:
    """The counts of whole tensors, read once from start to end; a tensor that the file cuts off
    counts nothing. Raises CheckpointError if a file shrinks meanwhile."""
    total = value_scan.empty(len(tensors))
    chunks = list(_chunks(survey, tensors, kinds))
    local = survey.files.local is not None
    threads = dispatch.default_threads() if local else survey.files.habit.at_once
    with _Descriptors(survey) as files, ThreadPoolExecutor(max(threads, 1)) as pool:
        try:
            # Merged on one thread, as they come.
            for chunk, counts in zip(chunks, pool.map(files.count, chunks), strict=True):
                value_scan.add(total, np.array(chunk.owners, dtype=np.int64), counts)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return total


def count_some(pieces: Sequence[U8Array], kinds: Sequence[str]) -> Counts:
    """The counts of pieces of tensors that were read already."""
    lengths = [piece.size for piece in pieces]
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    data = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint8)
    return value_scan.scan(data, list(zip(starts, lengths, kinds, strict=True)))


def read_some(
    survey: Survey, tensors: Sequence[TensorInfo], nbytes: Sequence[int]
) -> list[U8Array]:
    """Of each tensor its first, middle and last `nbytes[i]` bytes, or all of it if that is no more;
    empty where the file cuts it off. Read together, file by file."""
    out = [np.empty(0, dtype=np.uint8) for _ in tensors]
    by_file: dict[str, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if survey.is_held(tensor):
            by_file.setdefault(tensor.file, []).append(i)
    for file, wanted in by_file.items():
        places = [places_of(tensors[i], nbytes[i]) for i in wanted]
        parts = _read_places(survey, file, [p for some in places for p in some])
        for i, some in zip(wanted, places, strict=True):
            out[i] = np.frombuffer(b"".join(next(parts) for _ in some), dtype=np.uint8)
    return out


def _read_places(survey: Survey, file: str, places: list[tuple[int, int]]) -> Iterator[bytes]:
    folder = survey.files.local
    if folder is None:
        yield from read_ranges(survey.files, file, places)
        return
    descriptor, _ = open_file(folder, file)  # once for thousands of small reads
    try:
        for start, length in places:
            yield read_exactly(descriptor, length, start, folder / file)
    finally:
        os.close(descriptor)


def places_of(tensor: TensorInfo, nbytes: int) -> list[tuple[int, int]]:
    """Where `read_some` reads: (offset, length) in the file. Tensors whose sizes and `nbytes` are
    in one ratio are read at corresponding places."""
    if tensor.nbytes <= 3 * nbytes:
        return [(tensor.offset, tensor.nbytes)]
    middle = tensor.nbytes // 2 // nbytes * nbytes
    return [(tensor.offset + at, nbytes) for at in (0, middle, tensor.nbytes - nbytes)]


# ---------------------------------------------------------------------------------- reading scalars


def read_scalars(survey: Survey, infos: Sequence[TensorInfo]) -> tuple[F64Array, NDArray[np.bool_]]:
    """The one value of each tensor as float64, and whether it could be read."""
    stored = np.full(len(infos), np.nan)
    is_read = np.zeros(len(infos), dtype=bool)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, info in enumerate(infos):
        groups.setdefault((info.file, info.dtype), []).append(i)
    for (file, dtype), members in groups.items():
        at = np.array(members, dtype=np.int64)
        kind = DTYPES[dtype]
        offsets = np.fromiter((infos[i].offset for i in members), np.int64, len(members))
        held = offsets + kind.itemsize <= survey.shards[file].size
        at, offsets = at[held], offsets[held]
        data, got = _gather(survey, file, offsets, kind.itemsize)
        with np.errstate(invalid="ignore"):
            stored[at[got]] = data.view(kind).reshape(-1).astype(np.float64)
        is_read[at[got]] = True
    return stored, is_read


def _gather(
    survey: Survey, file: str, offsets: NDArray[np.int64], width: int
) -> tuple[U8Array, NDArray[np.bool_]]:
    """`width` bytes at each offset as [read, width], and which of them were read."""
    everything = np.ones(len(offsets), dtype=bool)
    if not len(offsets):
        return np.empty((0, width), dtype=np.uint8), everything
    span = np.arange(width)
    folder = survey.files.local
    if folder is not None:
        # Mapped: where scalars lie between weights a read each would take seconds.
        fd, _ = open_file(folder, file)
        try:
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                if offsets.max() + width > len(mapped):
                    raise CheckpointError(
                        f"{folder / file}: became shorter while it was read, to {len(mapped)} "
                        "bytes; is it still being downloaded?"
                    )
                view = np.frombuffer(mapped, dtype=np.uint8)
                out = view[offsets[:, None] + span]
                del view  # else the map cannot be closed
                return out, everything
        finally:
            os.close(fd)
    order = np.argsort(offsets, kind="stable")
    lying = offsets[order]
    breaks = np.flatnonzero(np.diff(lying) > survey.files.habit.gap_bytes) + 1
    runs = np.split(np.arange(len(lying)), breaks)
    runs = runs[:: max(1, -(-len(runs) // REMOTE_RUNS))]
    ranges = [(int(lying[r[0]]), int(lying[r[-1]] + width - lying[r[0]])) for r in runs]
    got = np.zeros(len(offsets), dtype=bool)
    values = np.zeros((len(offsets), width), dtype=np.uint8)
    for run, data in zip(runs, read_ranges(survey.files, file, ranges), strict=True):
        places = order[run]
        part = np.frombuffer(data, dtype=np.uint8)
        values[places] = part[(offsets[places] - lying[run[0]])[:, None] + span]
        got[places] = True
    return values[got], got


# ------------------------------------------------------------------------------- reading everything


def _chunks(
    survey: Survey, tensors: Sequence[TensorInfo], kinds: Sequence[str]
) -> Iterator[_Chunk]:
    """Neighbours together, large tensors in pieces, in the order of the files."""
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i].file, tensors[i].offset))
    chunk: _Chunk | None = None
    for i in order:
        tensor, nbytes = tensors[i], tensors[i].nbytes
        if not survey.is_held(tensor) or not nbytes:
            continue
        for at in range(0, nbytes, CHUNK):
            start, length = tensor.offset + at, min(CHUNK, nbytes - at)
            if (
                chunk is None
                or chunk.file != tensor.file
                or start + length > chunk.start + CHUNK
                or start > chunk.start + chunk.length + (1 << 16)
            ):
                if chunk is not None:
                    yield chunk
                chunk = _Chunk(tensor.file, start)
            chunk.segments.append((start - chunk.start, length, kinds[i]))
            chunk.owners.append(i)
            chunk.length = max(chunk.length, start + length - chunk.start)
    if chunk is not None:
        yield chunk


def holes_of(descriptor: int, status: os.stat_result) -> Iterator[tuple[int, int]]:
    """Where an open local file has no data on its disk and reads as zeros: (start, end)."""
    if status.st_blocks * 512 >= status.st_size or not hasattr(os, "SEEK_HOLE"):
        return
    at = 0
    while at < status.st_size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_HOLE)
        except OSError:  # a file system that does not say
            return
        if start >= status.st_size:
            return
        try:
            at = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError:  # no data after it
            at = status.st_size
        yield start, at


class _Descriptors:
    """Open files of a local folder and spare buffers, for the threads of one scan."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.open: dict[str, int] = {}
        self.holes: dict[str, list[tuple[int, int]]] = {}
        self.spare: SimpleQueue[U8Array] = SimpleQueue()

    def __enter__(self) -> _Descriptors:
        folder = self.survey.files.local
        if folder is not None:
            for file in self.survey.shards:
                self.open[file], status = open_file(folder, file)
                self.holes[file] = list(holes_of(self.open[file], status))
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def count(self, chunk: _Chunk) -> Counts:
        """Read one chunk and count."""
        if chunk.file not in self.open:
            data = self.survey.files.read(chunk.file, chunk.start, chunk.length)
            return value_scan.scan(np.frombuffer(data, dtype=np.uint8), chunk.segments)
        buffer = np.empty(CHUNK, dtype=np.uint8) if self.spare.empty() else self.spare.get()
        self._fill(buffer[: chunk.length], chunk)
        counts = value_scan.scan(buffer, chunk.segments)
        self.spare.put(buffer)
        return counts

    def _fill(self, buffer: U8Array, chunk: _Chunk) -> None:
        holes = self.holes[chunk.file]
        before = bisect_right(holes, chunk.start, key=itemgetter(0)) - 1
        if before >= 0 and chunk.start + chunk.length <= holes[before][1]:
            buffer[:] = 0  # reading a hole makes the system allocate and clear what it copies
            return
        view, at = memoryview(buffer.data), 0
        while at < len(view):
            got = os.preadv(self.open[chunk.file], [view[at:]], chunk.start + at)
            if got == 0:
                raise CheckpointError(
                    f"{self.survey.where}/{chunk.file}: became shorter while it was read: expected "
                    f"bytes up to {chunk.start + chunk.length}, found {chunk.start + at}; is it "
                    "still being downloaded?"
                )
            at += got
