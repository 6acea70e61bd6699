"""`Disk`: every operation of the writer and the journal on the file system, and nothing else.

One class, so that a test can count the operations and make any one of them fail
(tests/faulty_disk.py). An OSError becomes a CheckpointError that names the file and what to do.
Knows neither tensors nor JSON.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nybble.errors import CheckpointError, DoesNotFit

T = TypeVar("T")

_COPY_BYTES = 16 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What a file system without native reservation answers.
_NOT_RESERVED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Disk:
    """The real file system. `call` is the one way out; each call is one operation that can fail."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}  # of open descriptors, for messages

    def call(self, what: str, path: Path, function: Callable[[], T]) -> T:
        """Run one operation; an OSError becomes a CheckpointError about `what` and `path`."""
        try:
            return function()
        except OSError as error:
            if error.errno in _NO_SPACE:
                advice = "; free space on that disk and run again with --resume"
            elif error.errno == errno.EIO:
                advice = "; check the disk, then run again with --resume"
            else:
                advice = ""
            raise CheckpointError(f"{path}: {what}: {error.strerror or error}{advice}") from error

    # ------------------------------------------------------------------------------------ questions

    def size(self, path: Path) -> int | None:
        """The size of a file in bytes, or None if there is none."""

        def ask() -> int | None:
            try:
                return path.stat().st_size
            except FileNotFoundError:
                return None

        return self.call("looking it up", path, ask)

    def refuse_less_than(
        self, needed: int, folder: Path, out: Path, what: str = "to write"
    ) -> None:
        """Raise DoesNotFit, naming `out`, where `needed` bytes find no room on `folder`'s disk."""
        free = self.free_bytes(folder)
        if needed > free:
            raise DoesNotFit(
                f"{out}: {_amount(needed)} {what}, {_amount(free)} free on that disk; free space "
                "or name another disk"
            )

    def names(self, folder: Path) -> list[str] | None:
        """What a folder holds, sorted, or None if there is no such folder."""

        def ask() -> list[str] | None:
            try:
                return sorted(os.listdir(folder))
            except FileNotFoundError:
                return None

        return self.call("listing it", folder, ask)

    def read(self, path: Path, limit: int) -> bytes:
        """At most the first `limit` bytes of a file."""

        def ask() -> bytes:
            with path.open("rb") as file:
                return file.read(limit)

        return self.call("reading it", path, ask)

    def used_bytes(self, path: Path) -> int:
        """What a file occupies on the disk; 0 if there is none."""

        def ask() -> int:
            try:
                return path.stat().st_blocks * 512
            except FileNotFoundError:
                return 0

        return self.call("looking it up", path, ask)

    def free_bytes(self, path: Path) -> int:
        """Bytes free to this user on the disk where `path` is, or will be."""
        while not path.exists() and path != path.parent:
            path = path.parent

        def ask() -> int:
            status = os.statvfs(path)
            return status.f_bavail * status.f_frsize

        return self.call("asking for its free space", path, ask)

    # -------------------------------------------------------------------------------------- folders

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents, as far as they are not there."""
        self.call("making the folder", path, lambda: path.mkdir(parents=True, exist_ok=True))

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, in place of a file or empty folder of that name."""
        self.call(f"renaming {old.name} to it", new, lambda: os.rename(old, new))
        for fd, path in self._paths.items():
            if path == old:
                self._paths[fd] = new

    def remove(self, path: Path) -> None:
        self.call("removing it", path, lambda: os.unlink(path))

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder survive a power cut."""

        def sync() -> None:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        self.call("flushing the folder", path, sync)

    # ---------------------------------------------------------------------------------------- files

    def create(self, path: Path) -> int:
        """Open a new, empty file for writing; one of that name is emptied."""
        return self._open(path, "creating it", os.O_CREAT | os.O_TRUNC)

    def open_existing(self, path: Path) -> int:
        return self._open(path, "opening it", 0)

    def allocate(self, fd: int, size: int) -> None:
        """Give a file its final size, with its blocks reserved, so that a full disk shows at once.

        Where the file system cannot reserve, only the size is set. (`os.posix_fallocate` would
        write a byte into every block there: minutes per shard over a network.)
        """

        def allocate() -> None:
            if size and not _reserve(fd, size):
                os.ftruncate(fd, size)

        self.call(f"reserving {size} bytes", self._paths[fd], allocate)

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of `data`, a view of bytes; the system may take it in pieces."""
        while data:
            done = self._write(fd, data, offset)
            data, offset = data[done:], offset + done

    def append(self, fd: int, data: bytes) -> None:
        end = self.call("looking it up", self._paths[fd], lambda: os.fstat(fd).st_size)
        self.write_at(fd, memoryview(data), end)

    def truncate(self, fd: int, size: int) -> None:
        self.call(f"cutting it to {size} bytes", self._paths[fd], lambda: os.ftruncate(fd, size))

    def sync(self, fd: int) -> None:
        """Make a file's data survive a power cut."""
        self.call("flushing it", self._paths[fd], lambda: os.fdatasync(fd))

    def close(self, fd: int) -> None:
        path = self._paths.pop(fd)
        self.call("closing it", path, lambda: os.close(fd))

    def lock(self, fd: int) -> None:
        """Refuse to go on if another process locks this file; the lock ends with the descriptor."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            path = self._paths[fd]
            raise CheckpointError(
                f"{path}: another nybble process is writing to {path.parent}; wait for it, or end "
                "it"
            ) from error
        except OSError:
            # A file system without locks loses this protection against a user's mistake, nothing
            # else.
            pass

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a small file as a whole and flush it."""
        fd = self.create(path)
        try:
            self.write_at(fd, memoryview(data), 0)
            self.sync(fd)
        finally:
            self.close(fd)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file's bytes and flush them; neither times nor rights come along."""
        with self.call("opening it", source, lambda: source.open("rb", buffering=0)) as file:
            fd = self.create(target)
            try:
                at = 0
                while part := self.call("reading it", source, lambda: file.read(_COPY_BYTES)):
                    self.write_at(fd, memoryview(part), at)
                    at += len(part)
                self.sync(fd)
            finally:
                self.close(fd)

    def _open(self, path: Path, what: str, flags: int) -> int:
        flags |= os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # nobody redirects our files by a link
        fd = self.call(what, path, lambda: os.open(path, flags, 0o666))
        self._paths[fd] = path
        return fd

    def _write(self, fd: int, data: memoryview, offset: int) -> int:
        def write() -> int:
            done = os.pwrite(fd, data, offset)
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return done

        return self.call(f"writing {len(data)} bytes at {offset}", self._paths[fd], write)


def _reserve(fd: int, size: int) -> bool:
    """fallocate(2), which Python has only with a slow substitute; False where not supported."""
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(fd, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code in _NOT_RESERVED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def _amount(count: int) -> str:
    """Bytes as people read them, in the unit that tells small disks apart."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
