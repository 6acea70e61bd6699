"""Writing a GGUF file: streamed and atomic.

All names, types and shapes are known before the first byte of data, so the header is written first
and each tensor has its place; several threads may write, in any order. Work happens in
`OUT.partial`, and one rename makes it OUT. Nothing is resumed: an interrupted file is removed.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.gguf import (
    ALIGNMENT,
    KINDS,
    MAGIC,
    NAME_BYTES,
    RANK,
    VERSION,
    Field,
    GGUFTensor,
)
from nybble.checkpoint.gguf_blocks import BY_NAME
from nybble.checkpoint.writer import as_bytes
from nybble.errors import CheckpointError

_ARRAY = 9
_FORMS = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "?",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}


@dataclass(frozen=True, slots=True)
class GGUFSpec:
    """A tensor to come: `type` is a key of `BY_NAME`, `shape` in numpy's order (K last)."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        row = BY_NAME[self.type]
        return math.prod(self.shape) // row.block * row.nbytes


def lay_out(
    fields: Mapping[str, Field], tensors: Sequence[GGUFSpec]
) -> tuple[bytes, tuple[GGUFTensor, ...], int]:
    """The whole header with its padding, where each tensor lies, and the size of the file.

    Raises CheckpointError for a tensor that the format cannot name or hold, and for a number that
    is too large for its field.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
    parts += [part for key, field in fields.items() for part in _entry(key, field)]
    places, at = [], 0
    for spec in tensors:
        places.append(at)
        parts += _info(spec, at)
        at += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    header += bytes(-len(header) % ALIGNMENT)
    placed = tuple(
        GGUFTensor(t.name, t.type, t.shape, len(header) + place, t.nbytes)
        for t, place in zip(tensors, places, strict=True)
    )
    if len({t.name for t in placed}) != len(placed):
        raise CheckpointError("two tensors of the GGUF file to write have one name")
    return header, placed, len(header) + at


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(key: str, field: Field) -> list[bytes]:
    try:
        return _packed(key, field)
    except (struct.error, OverflowError) as error:
        value = repr(field.value)
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise CheckpointError(
            f"the GGUF key {key!r}: a field of type {field.kind} cannot hold {shown}; correct what "
            "config.json or generation_config.json says of it"
        ) from error


def _packed(key: str, field: Field) -> list[bytes]:
    """One metadata entry; arrays of strings are the long ones."""
    kind, value = field.kind, field.value
    if not kind.startswith("["):
        return [_text(key), struct.pack("<I", KINDS[kind]), _scalar(kind, value)]
    inner = kind[1:-1]
    assert isinstance(value, (list, np.ndarray)), f"{key}: {kind} needs a list or an array"
    head = struct.pack("<IIQ", _ARRAY, KINDS[inner], len(value))
    if inner == "str":
        return [_text(key), head, *(_text(str(text)) for text in value)]
    form = np.dtype("<" + _FORMS[inner])
    return [_text(key), head, np.asarray(value, dtype=form).tobytes()]


def _scalar(kind: str, value: object) -> bytes:
    if kind == "str":
        assert isinstance(value, str)
        return _text(value)
    return struct.pack("<" + _FORMS[kind], value)


def _info(spec: GGUFSpec, at: int) -> list[bytes]:
    row = BY_NAME[spec.type]
    where = f"the GGUF tensor {spec.name!r}"
    if not 0 < len(spec.name.encode()) <= NAME_BYTES:
        raise CheckpointError(f"{where}: names have 1 to {NAME_BYTES} bytes in llama.cpp")
    if not 0 < len(spec.shape) <= RANK:
        raise CheckpointError(f"{where}: {len(spec.shape)} dimensions, expected 1 to {RANK}")
    if spec.shape[-1] % row.block:
        raise CheckpointError(
            f"{where}: rows of {spec.shape[-1]} are no multiple of {row.name}'s block, {row.block}"
        )
    dims = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
    return [_text(spec.name), dims, struct.pack("<IQ", row.number, at)]


class GGUFWriter:
    """Writes the tensors into `OUT.partial` and makes it OUT with `finish`.

    Leaving the `with` block without `finish` removes what was written. Raises CheckpointError if
    OUT or OUT.partial exists, DoesNotFit if the disk is too small, before anything is written.
    """

    def __init__(
        self,
        out: Path,
        fields: Mapping[str, Field],
        tensors: Sequence[GGUFSpec],
        *,
        disk: Disk | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._disk = disk or Disk()
        header, placed, self.size = lay_out(fields, tensors)
        self.tensors = {t.name: t for t in placed}
        self._left = {t.name: t.nbytes for t in placed}
        self._lock = Lock()
        self._refuse_occupied()
        self._fd: int | None = self._disk.create(self.partial)
        try:
            self._disk.allocate(self._fd, self.size)
            self._disk.write_at(self._fd, memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def _refuse_occupied(self) -> None:
        for path, why in (
            (self.out, "exists; name another output, or remove it"),
            (self.partial, "is left from an interrupted run; remove it"),
        ):
            if os.path.lexists(path):
                raise CheckpointError(f"{path}: {why}")
        self._disk.refuse_less_than(self.size, self.out.parent, self.out)

    def write(self, name: str, data: NDArray[np.generic] | bytes, at: int = 0) -> None:
        """Write bytes of one tensor, from byte `at` on; every byte exactly once. Threads may
        write at the same time."""
        view = as_bytes(data)
        tensor = self.tensors[name]
        with self._lock:
            assert at + len(view) <= tensor.nbytes, f"{name}: beyond its end"
            assert len(view) <= self._left[name], f"{name}: written twice"
            self._left[name] -= len(view)
            assert self._fd is not None, "the writer was closed"
        self._disk.write_at(self._fd, view, tensor.offset + at)

    def finish(self) -> None:
        """Flush the file and name it OUT. Raises CheckpointError if a tensor is not written."""
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
            raise CheckpointError(
                f"{self.partial}: {len(unwritten)} tensors are not wholly written, "
                f"{unwritten[0]!r} for one"
            )
        assert self._fd is not None
        self._disk.sync(self._fd)
        fd, self._fd = self._fd, None
        self._disk.close(fd)
        self._disk.rename(self.partial, self.out)
        self._disk.sync_folder(self.out.parent)

    def close(self) -> None:
        """Give up: without `finish` nothing stays."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._disk.close(fd)
            self._disk.remove(self.partial)

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
