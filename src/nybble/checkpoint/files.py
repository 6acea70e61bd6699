"""A folder of files, read in pieces, wherever it is: the local one, and what any other must offer.

Nothing is followed out of the folder: links are resolved and refused, names are plain relative
paths. Knows no format; what the bytes mean is for others.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.safetensors import HEADER_LIMIT
from nybble.errors import CheckpointError

#: What a path never begins with, and an address of files elsewhere does.
ADDRESSES = ("hf://", "http://", "https://")
#: At most this much in one read.
RUN_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Habit:
    """How a place is read best: ranges closer than `gap_bytes` in one go, because a seek or a
    request costs more than the bytes between; so many reads at the same time."""

    gap_bytes: int = 1 << 14
    at_once: int = 1


class Files(Protocol):
    """The files of a checkpoint folder: names, sizes, and bytes at a place.

    `where` is the folder's path or address, for messages. Everything raises CheckpointError for a
    file that is absent, leaves the folder, or cannot be read.
    """

    @property
    def where(self) -> str:
        """The folder's path or address."""
        ...

    @property
    def local(self) -> Path | None:
        """The folder, if it is on this machine."""
        ...

    @property
    def habit(self) -> Habit:
        """How it is read best."""
        ...

    def names(self) -> tuple[str, ...]:
        """All files, subfolders' too, as sorted relative names; hidden ones are left out."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file; asked for where a place has no list of them."""
        ...

    def known_sha256(self, name: str) -> str:
        """The hash of a file, if the place tells it without a reading; else ""."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `start` on, or all that follow."""
        ...


class LocalFiles:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def local(self) -> Path | None:
        return self.path

    @property
    def habit(self) -> Habit:
        return Habit()

    def names(self) -> tuple[str, ...]:
        """Links that are broken or leave the folder are named too: reading them is refused."""
        found = []
        for at, folders, files in os.walk(self.path):
            folders[:] = [f for f in folders if not f.startswith(".")]
            inside = Path(at).relative_to(self.path)
            found += [(inside / name).as_posix() for name in files if not name.startswith(".")]
        return tuple(sorted(found))

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def known_sha256(self, name: str) -> str:
        return ""

    def size(self, name: str) -> int:
        fd, status = open_file(self.path, name)
        os.close(fd)
        return status.st_size

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        fd, status = open_file(self.path, name)
        try:
            rest = max(status.st_size - start, 0)
            return read_exactly(fd, rest if length is None else length, start, self.path / name)
        finally:
            os.close(fd)


def read_ranges(files: Files, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of many (start, length) ranges of a file, in the order asked for.

    Neighbours are read together: 60,000 scalars that lie side by side cost a few reads.
    """
    habit = files.habit
    out: list[bytes] = [b""] * len(ranges)

    def read(run: list[int]) -> None:
        first = ranges[run[0]][0]
        last = max(ranges[i][0] + ranges[i][1] for i in run)
        data = memoryview(files.read(name, first, last - first))
        for i in run:
            begin, length = ranges[i]
            out[i] = bytes(data[begin - first : begin - first + length])

    runs = list(_runs(ranges, habit.gap_bytes))
    if habit.at_once == 1 or len(runs) < 2:
        for run in runs:
            read(run)
    else:
        with ThreadPoolExecutor(habit.at_once) as pool:
            list(pool.map(read, runs))
    return out


def read_values(
    files: Files, name: str, places: NDArray[np.int64], width: int
) -> NDArray[np.uint8]:
    """[n, width]: the `width` bytes at each place of a file, in the order asked for."""
    gap, at_once = files.habit.gap_bytes, files.habit.at_once
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    breaks = np.flatnonzero(np.diff(ordered) > gap + width) + 1
    # A run no longer than RUN_BYTES, whatever the gaps.
    runs = [
        piece
        for run in np.split(np.arange(len(ordered)), breaks)
        for piece in np.split(
            run, np.flatnonzero(np.diff((ordered[run] - ordered[run[0]]) // RUN_BYTES)) + 1
        )
    ]
    out = np.empty((len(places), width), dtype=np.uint8)

    def read(run: NDArray[np.int64]) -> None:
        first, last = int(ordered[run[0]]), int(ordered[run[-1]]) + width
        data = np.frombuffer(files.read(name, first, last - first), dtype=np.uint8)
        out[order[run]] = data[(ordered[run] - first)[:, None] + np.arange(width)]

    if at_once == 1 or len(runs) < 2:
        for run in runs:
            read(run)
    else:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(read, runs))
    return out


def _runs(ranges: Sequence[tuple[int, int]], gap_bytes: int) -> Iterator[list[int]]:
    """Indices of ranges to be read together, by place in the file."""
    run: list[int] = []
    first = last = 0
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        begin, length = ranges[i]
        if run and (begin - last > gap_bytes or begin + length - first > RUN_BYTES):
            yield run
            run = []
        if not run:
            first = last = begin
        run.append(i)
        last = max(last, begin + length)
    if run:
        yield run


# ---------------------------------------------------------------------------- files of this machine


def resolve(path: Path, name: str) -> str:
    """The real path of a file of the folder, refused where a link leads out of it.

    A snapshot of the Hugging Face cache, .../snapshots/<revision>, may link into .../blobs.
    """
    root = os.path.realpath(path)
    real = os.path.realpath(path / name)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if not any(real.startswith(r.rstrip(os.sep) + os.sep) for r in roots):
        raise CheckpointError(
            f"{path / name}: is a link that leaves the folder, to {real}; replace it by the file "
            "it points to"
        )
    return real


def open_file(path: Path, name: str) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file of the folder, and its status."""
    real = resolve(path, name)
    try:
        # A named pipe would block for ever without O_NONBLOCK.
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path / name}: cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError(f"{path / name}: is not a regular file")
    return fd, status


def read_exactly(fd: int, length: int, offset: int, where: Path) -> bytes:
    """Bytes offset:offset + length of an open file; CheckpointError if it has fewer."""
    parts = []
    try:
        while length > 0 and (part := os.pread(fd, length, offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
    if length:
        raise CheckpointError(f"{where}: became {length} bytes shorter while it was read")
    return b"".join(parts)


def read_small(path: Path, name: str) -> bytes:
    """A whole file of the folder, of a size that JSON may have."""
    fd, status = open_file(path, name)
    try:
        if status.st_size > HEADER_LIMIT:
            raise CheckpointError(
                f"{path / name}: {status.st_size} bytes; at most {HEADER_LIMIT} are read as JSON"
            )
        return read_exactly(fd, status.st_size, 0, path / name)
    finally:
        os.close(fd)
