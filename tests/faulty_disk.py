"""`FaultyDisk`: a disk whose k-th operation fails, in SQLite's manner.

Count the operations of a clean run, then let each of them fail in turn and look at what a resumed
run makes of the rest.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nybble.checkpoint.disk import Disk

T = TypeVar("T")

#: enospc, eio    the operation fails with that error
#: short          a write puts half of its bytes on the disk, then the disk is full
#: kill           the process dies; a write has half of its bytes on the disk. Fork first.
#: cut_data       the power fails: writes that were not flushed are lost, names are not
#: cut_all        the power fails: names that were not flushed are lost, too
MODES = ("enospc", "eio", "short", "kill", "cut_data", "cut_all")
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "short": errno.ENOSPC}


class PowerCut(BaseException):
    """The machine is off. Call `FaultyDisk.lose` before looking at the disk again."""


class FaultyDisk(Disk):
    """A disk whose operation number `fail_at` (from 1) fails as `mode` says, and all after it."""

    def __init__(self, fail_at: int | None = None, mode: str = "enospc") -> None:
        super().__init__()
        assert mode in MODES
        self.operations: list[str] = []
        self.has_failed = False
        self._fail_at = fail_at
        self._mode = mode
        # (is it data, inode or folder that a flush settles, how to undo it)
        self._unflushed: list[tuple[bool, int | Path, Callable[[], None]]] = []
        self._keep = 0

    def call(self, what: str, path: Path, function: Callable[[], T]) -> T:
        if what == "closing it":
            return super().call(what, path, function)
        self.operations.append(f"{what}: {path.name}")
        if not self.has_failed and len(self.operations) == self._fail_at:
            self.has_failed = True
            return super().call(what, path, lambda: self._fail(function))
        if self.has_failed:
            return super().call(what, path, lambda: self._fail(None))
        return super().call(what, path, function)

    def _fail(self, function: Callable[[], T] | None) -> T:
        """Fail; `function` is given for the first operation that does."""
        if self._mode == "short" and function is not None and self._half is not None:
            return self._half()  # type: ignore[return-value]
        if self._mode == "kill":
            if self._half is not None:
                self._half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._mode.startswith("cut"):
            raise PowerCut
        code = _ERRORS[self._mode]
        raise OSError(code, os.strerror(code))

    _half: Callable[[], int] | None = None  # half of the write at hand

    def _write(self, fd: int, data: memoryview, offset: int) -> int:
        if self._mode.startswith("cut"):
            self._remember_data(fd)
        if len(data) > 1:
            self._half = lambda: os.pwrite(fd, data[: len(data) // 2], offset)
        try:
            return super()._write(fd, data, offset)
        finally:
            self._half = None

    # --------------------------------------------------------------------------- power cuts

    def lose(self) -> None:
        """Undo what no flush has made safe, latest first."""
        for is_data, _, undo in reversed(self._unflushed):
            if is_data or self._mode == "cut_all":
                undo()
        self._unflushed.clear()

    def _remember_data(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        before = os.pread(fd, size, 0)
        # Outlives the descriptor and follows the file through renames; os.dup would share its lock.
        kept = open(f"/proc/self/fd/{fd}", "r+b", buffering=0)

        def undo() -> None:
            with kept:
                kept.truncate(size)
                os.pwrite(kept.fileno(), before, 0)

        self._unflushed.append((True, os.fstat(fd).st_ino, undo))

    def _remember_name(self, folder: Path, undo: Callable[[], None]) -> None:
        if self._mode.startswith("cut"):
            self._unflushed.append((False, folder, undo))

    def _settle(self, is_data: bool, key: int | Path) -> None:
        self._unflushed = [u for u in self._unflushed if u[:2] != (is_data, key)]

    def allocate(self, fd: int, size: int) -> None:
        if self._mode.startswith("cut"):
            self._remember_data(fd)
        super().allocate(fd, size)

    def truncate(self, fd: int, size: int) -> None:
        if self._mode.startswith("cut"):
            self._remember_data(fd)
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self._settle(True, os.fstat(fd).st_ino)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self._settle(False, path)

    def make_folder(self, path: Path) -> None:
        is_new = not path.exists()
        super().make_folder(path)
        if is_new:
            self._remember_name(path.parent, lambda: shutil.rmtree(path))

    def create(self, path: Path) -> int:
        is_new = not path.exists()
        fd = super().create(path)
        if is_new:
            self._remember_name(path.parent, lambda: path.unlink())
        return fd

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self._remember_name(new.parent, lambda: os.rename(new, old))

    def remove(self, path: Path) -> None:
        if self._mode.startswith("cut"):
            # A second name keeps the bytes until the removal is flushed.
            kept = path.parent.parent / f".kept-{self._keep}"
            self._keep += 1
            os.link(path, kept)
            super().remove(path)
            self._remember_name(path.parent, lambda: os.rename(kept, path))
        else:
            super().remove(path)
