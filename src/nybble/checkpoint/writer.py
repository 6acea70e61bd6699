"""Writing a checkpoint: sharded, streamed, atomic, resumable.

All names, dtypes and shapes are known before the first byte of data, so every header is written
first and each tensor has its place. Work happens in `OUT.partial/`: a shard is `NAME.part` until it
is whole, the index comes last, and one rename makes the folder `OUT`. What was written before an
interruption is for the journal to say, not for the files (quantize/journal.py); the writer only
makes sure that data are flushed before the journal is told.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from threading import RLock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import INDEX
from nybble.checkpoint.safetensors import (
    HEADER_LIMIT,
    NAME_LIMIT,
    WIDTHS,
    TensorInfo,
    TensorSpec,
    collector_paused,
)
from nybble.errors import CheckpointError

#: Decimal bytes of payload per shard.
SHARD_BYTES = 10**10
#: The one file of the work folder that is no part of the checkpoint.
JOURNAL = "journal.jsonl"

_ALIGNMENT = 64  # a cache line, and what the widest vector load wants
_OURS = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors(\.part)?")

Buffer = bytes | bytearray | memoryview | NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file to come: its tensors in data order, its header with the length bytes, its size."""

    file: str
    tensors: tuple[TensorInfo, ...]
    header: bytes
    size: int


def layout_shards(
    tensors: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES
) -> tuple[ShardLayout, ...]:
    """Decide where each tensor lies.

    Shards are filled in the order given, up to shard_bytes of payload; a larger tensor has a shard
    to itself. Inside a shard wide dtypes come first, so every tensor is aligned to its width
    without gaps, which the format forbids; tensors of one dtype lie together in their order, so
    the codes of many modules are one run.
    """
    if shard_bytes < 1:
        raise CheckpointError(f"shard size of {shard_bytes} bytes; it must be positive")
    with collector_paused():
        _check_names(tensors)
        shards: list[list[TensorSpec]] = []
        used = 0
        for spec in tensors:
            nbytes = spec.nbytes
            if not shards or (shards[-1] and used + nbytes > shard_bytes):
                shards.append([])
                used = 0
            shards[-1].append(spec)
            used += nbytes
        return tuple(
            _lay_out(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard)
            for i, shard in enumerate(shards, 1)
        )


def _check_names(tensors: Sequence[TensorSpec]) -> None:
    if not tensors:
        raise CheckpointError("a checkpoint without tensors cannot be written")
    seen = set()
    for spec in tensors:
        if spec.name in seen:
            raise CheckpointError(f"two tensors to write are named {spec.name!r}")
        seen.add(spec.name)
        is_legal = 0 < len(spec.name) <= NAME_LIMIT and spec.name.isprintable()
        if not is_legal or spec.name == "__metadata__":
            raise CheckpointError(f"{ascii(spec.name[:80])} cannot be the name of a tensor")
        if spec.dtype not in WIDTHS:
            raise CheckpointError(f"tensor {spec.name!r}: unknown dtype {spec.dtype!r}")


def _lay_out(file: str, tensors: list[TensorSpec]) -> ShardLayout:
    ordered = sorted(tensors, key=lambda t: (-WIDTHS[t.dtype], t.dtype))  # stable
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins = []
    at = 0
    for t in ordered:
        end = at + t.nbytes
        entries[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": (at, end)}
        begins.append(at)
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(
            f"{file}: {len(tensors)} tensors need a header of {len(text)} bytes, the format "
            f"allows {HEADER_LIMIT}; "
            "give a smaller shard size"
        )
    header = len(text).to_bytes(8, "little") + text
    placed = tuple(
        TensorInfo(t.name, t.dtype, t.shape, file, len(header) + begin)
        for t, begin in zip(ordered, begins, strict=True)
    )
    return ShardLayout(file, placed, header, len(header) + at)


def index_json(shards: Iterable[ShardLayout], total_parameters: int) -> bytes:
    """`model.safetensors.index.json` of these shards; total_size counts payload bytes."""
    weight_map = {t.name: shard.file for shard in shards for t in shard.tensors}
    total_size = sum(shard.size - len(shard.header) for shard in shards)
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": weight_map,
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def partial_folder(out: Path) -> Path:
    """Where the work for `out` happens."""
    out = Path(os.path.abspath(out))
    if not out.name:
        raise CheckpointError(f"{out}: cannot be an output folder; name a new one")
    return out.with_name(out.name + ".partial")


def refuse_inside(source: Path, out: Path) -> None:
    """Raise CheckpointError for an output in its source's folder: side files are copied, those of
    subfolders too, so it would copy itself."""
    if source.resolve() == out.resolve():
        raise CheckpointError(f"{out}: is the source folder itself; name another one")
    if source.resolve() in out.resolve().parents:
        raise CheckpointError(
            f"{out}: lies inside the source folder {source}; name a folder outside of it"
        )


class _OpenShard:
    """A shard at work: how many bytes are still to come, and its descriptor while it is open."""

    __slots__ = ("fd", "is_dirty", "is_final", "layout", "left_bytes")

    def __init__(self, layout: ShardLayout) -> None:
        self.layout = layout
        self.left_bytes = layout.size - len(layout.header)
        self.fd: int | None = None
        self.is_dirty = False
        self.is_final = False


class CheckpointWriter:
    """Writes the tensors of `shards` into `OUT.partial`, in any order, and makes it OUT in the end.

    `done` names the tensors that the journal of an interrupted run has as written; all others are
    expected again. With resume, what an earlier run left is used; without, it is an error, as is a
    non-empty OUT in any case. One thread may write while another one plans; each call holds a lock.
    After a failed write or flush nothing more is accepted: the kernel reports a lost write once, so
    a later flush would succeed and lie.

    Raises DoesNotFit, before anything is written, if the disk is too small.
    """

    def __init__(
        self,
        out: Path,
        shards: Sequence[ShardLayout],
        *,
        disk: Disk,
        resume: bool = False,
        done: Iterable[str] = (),
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = partial_folder(out)
        self.shards = tuple(shards)
        self._disk = disk
        self._lock = RLock()
        self._is_broken = False
        self._open = [_OpenShard(layout) for layout in self.shards]
        self._where = {t.name: (s, t) for s in self._open for t in s.layout.tensors}
        self._left = {t.name: t.nbytes for s in self.shards for t in s.tensors}
        self._refuse_occupied(resume)
        self._check_space()
        for name in done:
            self._where[name][0].left_bytes -= self._left[name]
            self._left[name] = 0
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def place(self, name: str) -> tuple[str, int]:
        """The shard of a tensor and its absolute offset there."""
        info = self._where[name][1]
        return info.file, info.offset

    def write(self, name: str, data: Buffer, offset_in_tensor: int = 0) -> None:
        """Write bytes of one tensor, from offset_in_tensor on; every byte exactly once."""
        self._write([name], as_bytes(data), offset_in_tensor)

    def write_run(self, names: Sequence[str], data: Buffer) -> None:
        """Write several whole tensors that lie one after the other, in one operation."""
        infos = [self._where[name][1] for name in names]
        assert all(
            a.file == b.file and a.offset + a.nbytes == b.offset for a, b in pairwise(infos)
        ), f"{names[0]!r} ... {names[-1]!r} do not lie one after the other"
        view = as_bytes(data)
        assert len(view) == sum(i.nbytes for i in infos), f"{names[0]!r} ...: {len(view)} bytes"
        self._write(names, view, 0)

    def sync(self) -> None:
        """Flush everything written so far; after this the journal may say so."""
        with self._lock:
            self._refuse_broken()
            try:
                for shard in self._open:
                    self._sync(shard)
            except BaseException:
                self._is_broken = True
                raise

    def finish(
        self,
        json_files: Mapping[str, bytes],
        copied: Sequence[tuple[Path, str]],
        total_parameters: int,
    ) -> None:
        """Add side files, configuration and, last, the index; then rename the folder to OUT.

        `copied` are (source, name relative to OUT with "/"). Raises CheckpointError if a tensor is
        not written.
        """
        with self._lock:
            self._refuse_broken()
            self._refuse_unwritten()
            self._check_names(json_files, copied)
            folders = {self.folder}
            for source, name in copied:
                target = self.folder / name
                self._disk.make_folder(target.parent)
                self._disk.copy(source, target)
                # Every folder between, for each may be new.
                folders.update(p for p in target.parents if p.is_relative_to(self.folder))
            for name, data in json_files.items():
                self._disk.write_file(self.folder / name, data)
            for folder in sorted(folders, reverse=True):
                self._disk.sync_folder(folder)
            self._disk.write_file(self.folder / INDEX, index_json(self.shards, total_parameters))
            self._publish()

    def close(self) -> None:
        """Give up the open files; what is not finished stays in OUT.partial."""
        with self._lock:
            for shard in self._open:
                if shard.fd is not None:
                    fd, shard.fd = shard.fd, None
                    self._disk.close(fd)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --------------------------------------------------------------------------------- at the start

    def _refuse_occupied(self, resume: bool) -> None:
        if os.path.lexists(self.out):
            if self.out.is_symlink() or not self.out.is_dir():
                raise CheckpointError(
                    f"{self.out}: exists and is not a folder; name another output"
                )
            if self._disk.names(self.out):
                raise CheckpointError(
                    f"{self.out}: exists and is not empty; name another output, or remove it"
                )
        if self.folder.is_symlink():
            raise CheckpointError(f"{self.folder}: is a symbolic link; remove it")
        if not resume and os.path.lexists(self.folder):
            raise CheckpointError(
                f"{self.folder}: is left from an interrupted run; continue it with --resume, or "
                "remove it"
            )

    def _check_space(self) -> None:
        names = [n for s in self.shards for n in (s.file, s.file + ".part")]
        has_any = self._disk.names(self.folder)
        used = sum(self._disk.used_bytes(self.folder / n) for n in names) if has_any else 0
        needed = sum(s.size for s in self.shards) - used
        self._disk.refuse_less_than(needed, self.folder, self.out)

    def _prepare(self) -> None:
        """Give every shard its file, size and header; take away what may not be there yet."""
        disk = self._disk
        disk.make_folder(self.folder)
        present = set(disk.names(self.folder) or ())
        expected = {n for s in self.shards for n in (s.file, s.file + ".part")}
        for name in sorted(present):
            if _OURS.fullmatch(name) and name not in expected:
                raise CheckpointError(
                    f"{self.folder / name}: is no shard of this run, and would end up in the "
                    f"result; remove {self.folder}, or continue with the options it was begun with"
                )
        if INDEX in present:  # it would make the folder look complete
            disk.remove(self.folder / INDEX)
        for shard in self._open:
            self._prepare_shard(shard, present)
        disk.sync_folder(self.folder)
        disk.sync_folder(self.folder.parent)
        for shard in self._open:
            if shard.left_bytes == 0 and not shard.is_final:
                self._complete(shard)

    def _prepare_shard(self, shard: _OpenShard, present: set[str]) -> None:
        layout, disk = shard.layout, self._disk
        final, part = self.folder / layout.file, self.folder / (layout.file + ".part")
        found = final if layout.file in present else part if part.name in present else None
        is_intact = found is not None and (
            disk.size(found) == layout.size
            and disk.read(found, len(layout.header)) == layout.header
        )
        if not is_intact and any(not self._left[t.name] and t.nbytes for t in layout.tensors):
            raise CheckpointError(
                f"{final}: the journal has tensors of it as written, but the file is gone or was "
                "changed; "
                f"remove {self.folder} and start again"
            )
        if found == final:
            if is_intact and shard.left_bytes == 0:
                shard.is_final = True
                return
            # Renamed, but the journal was not told in time.
            disk.rename(final, part)
        if not is_intact:
            fd = disk.create(part)
            shard.fd = fd
            disk.allocate(fd, layout.size)
            disk.write_at(fd, memoryview(layout.header), 0)
            # Opened again when its data come: a plan may have more shards than a process may open.
            shard.fd = None
            disk.close(fd)

    # ----------------------------------------------------------------------------------- in between

    def _refuse_broken(self) -> None:
        if self._is_broken:
            raise CheckpointError(
                f"{self.folder}: an earlier write failed, so nothing more is written; run again "
                "with --resume"
            )

    def _write(self, names: Sequence[str], view: memoryview, start: int) -> None:
        """Write `view` from byte `start` of the first tensor; more names only for whole ones."""
        shard, info = self._where[names[0]]
        with self._lock:
            self._refuse_broken()
            for name in names:
                count = len(view) if len(names) == 1 else self._where[name][1].nbytes
                assert start + count <= self._where[name][1].nbytes, f"{name!r}: beyond its end"
                assert count <= self._left[name], f"{name!r}: written twice"
                self._left[name] -= count
            try:
                if shard.fd is None and view:
                    shard.fd = self._disk.open_existing(self.folder / (info.file + ".part"))
                if shard.fd is not None:
                    shard.is_dirty = True
                    self._disk.write_at(shard.fd, view, info.offset + start)
                shard.left_bytes -= len(view)
                if shard.left_bytes == 0 and not shard.is_final:
                    self._complete(shard)
            except BaseException:
                self._is_broken = True
                raise

    def _sync(self, shard: _OpenShard) -> None:
        if shard.is_dirty and shard.fd is not None:
            self._disk.sync(shard.fd)
            shard.is_dirty = False

    def _complete(self, shard: _OpenShard) -> None:
        """All bytes are there: flush them, then give the shard its name."""
        part = self.folder / (shard.layout.file + ".part")
        if shard.fd is None:
            shard.fd, shard.is_dirty = self._disk.open_existing(part), True
        self._sync(shard)
        fd, shard.fd = shard.fd, None
        self._disk.close(fd)
        self._disk.rename(part, self.folder / shard.layout.file)
        shard.is_final = True

    # ----------------------------------------------------------------------------------- at the end

    def _refuse_unwritten(self) -> None:
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
            raise CheckpointError(
                f"{self.folder}: {len(unwritten)} tensors are not wholly written, "
                f"{unwritten[0]!r} for one"
            )

    def _check_names(
        self, json_files: Mapping[str, bytes], copied: Sequence[tuple[Path, str]]
    ) -> None:
        taken = {INDEX, JOURNAL, *(s.file for s in self.shards)}
        for name in (*json_files, *(name for _, name in copied)):
            pure = PurePosixPath(name)
            if not pure.parts or pure.is_absolute() or ".." in pure.parts:
                raise CheckpointError(f"{name!r}: leads out of the output folder {self.out}")
            if str(pure) in taken:
                raise CheckpointError(f"{name!r}: two files of this name for {self.out}")
            taken.add(str(pure))

    def _publish(self) -> None:
        disk = self._disk
        if os.path.lexists(self.out):
            # Once more: without the journal, a rename that fails would cost the whole run.
            self._refuse_occupied(resume=True)
        if disk.size(self.folder / JOURNAL) is not None:
            disk.remove(self.folder / JOURNAL)
        disk.sync_folder(self.folder)
        disk.rename(self.folder, self.out)
        disk.sync_folder(self.out.parent)


def as_bytes(data: Buffer) -> memoryview:
    """The bytes of a contiguous buffer or array, without a copy."""
    if isinstance(data, np.ndarray):
        assert data.flags.c_contiguous, (
            "only contiguous arrays are written: a copy would be hidden memory"
        )
        return data.reshape(-1).view(np.uint8).data  # bf16 and fp8 arrays export no buffer
    return memoryview(data).cast("B")
