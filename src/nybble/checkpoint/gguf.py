"""The GGUF container, read lazily: the header at once, data mapped when asked for.

A file is untrusted input. Every count and length is held against the bytes that are left before
anything is allocated, so what `GGUFFile.open` returns can be used without looking again: all
tensors lie inside the file, one after the other, as llama.cpp demands. Versions 2 and 3, little
endian. Knows no architecture; what the names mean is for others, and what the blocks mean is in
`checkpoint/gguf_blocks.py`.

Source: ggml, docs/gguf.md and src/gguf.cpp.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.files import open_file
from nybble.checkpoint.gguf_blocks import TYPES, decode
from nybble.checkpoint.safetensors import SIZE_LIMIT, show
from nybble.errors import CheckpointError
from nybble.formats.element import F32Array, U8Array

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
#: ggml stores names in 64 bytes with a zero at the end.
NAME_BYTES = 63
KEY_BYTES = 65535
RANK = 4
#: Published files have 30 to 60 keys; split ones repeat them.
KEYS_LIMIT = 1 << 16
TENSORS_LIMIT = 1 << 20
#: Chat templates are the longest strings, of some 100 kB.
STRING_LIMIT = 1 << 26
#: Vocabularies and their merges stay below 2^20.
ARRAY_LIMIT = 1 << 24

#: Numbers of value types -> name and struct format; "bool" is a byte of 0 or 1.
_NUMBERS: dict[int, tuple[str, str]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "B"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_STRING, _ARRAY = 8, 9
KINDS: dict[str, int] = {name: number for number, (name, _) in _NUMBERS.items()} | {"str": _STRING}

Scalar = bool | int | float | str
Value = Scalar | list[str] | NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Field:
    """One metadata entry: `kind` is "u32", "f32", "str" ...; "[str]" or "[i32]" for arrays.

    Arrays of strings are lists, of numbers numpy arrays.
    """

    kind: str
    value: Value


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor in the file: `shape` in numpy's order (K last), `offset` from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class GGUFFile:
    """An open GGUF file: `fields` and `metadata` by key, `tensors` by name in file order."""

    def __init__(
        self,
        path: Path,
        mapped: mmap.mmap,
        version: int,
        fields: dict[str, Field],
        tensors: dict[str, GGUFTensor],
    ) -> None:
        self.path = path
        self.version = version
        self.fields = fields
        self.tensors = tensors
        self._map: mmap.mmap | None = mapped
        self._bytes = np.frombuffer(mapped, dtype=np.uint8)

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the header of a file and check every rule of the format.

        Raises CheckpointError at the first rule broken.
        """
        path = Path(path)
        real = Path(os.path.realpath(path))
        if not real.is_file():
            raise CheckpointError(f"{path}: no such file; give a .gguf file")
        fd, status = open_file(real.parent, real.name)
        try:
            if status.st_size < 24:
                raise CheckpointError(
                    f"{path}: {status.st_size} bytes, a GGUF file has 24 or more; download it again"
                )
            mapped = mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)
        version, fields, tensors = parse(memoryview(mapped), str(path))
        return cls(path, mapped, version, fields, tensors)

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The values alone."""
        return {key: field.value for key, field in self.fields.items()}

    def raw(self, name: str) -> U8Array:
        """The bytes of a tensor, one-dimensional: a read-only view of the mapped file."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.path}: no tensor {show(name)} among its {len(self.tensors)}"
            )
        if self._map is None:
            raise CheckpointError(f"{self.path}: the file was closed")
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def values(self, name: str, start: int = 0, stop: int | None = None) -> F32Array:
        """The float32 values of rows start:stop of a tensor, [rows, K]; leading dimensions count as
        one. Tensor scales beside it are not looked at.

        Raises FormatError for a type that nybble does not decode.
        """
        raw, tensor = self.raw(name), self.tensors[name]
        k = tensor.shape[-1] if tensor.shape else 1
        rows = tensor.size // k if k else 0
        begin, end, _ = slice(start, stop).indices(rows)
        each = tensor.nbytes // rows if rows else 0
        return decode(tensor.type, raw[begin * each : end * each]).reshape(end - begin, k)

    def drop_pages(self, name: str) -> None:
        """Take the whole pages of a tensor out of resident memory; views stay valid."""
        tensor = self.tensors[name]
        if self._map is not None and tensor.nbytes:
            first = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, tensor.offset + tensor.nbytes - first)

    def close(self) -> None:
        """Give up the map; views already handed out stay valid."""
        self._map = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def parse(data: memoryview, where: str) -> tuple[int, dict[str, Field], dict[str, GGUFTensor]]:
    """Version, metadata and tensors of a whole file in memory or mapped.

    `where` is the file's name for messages. Raises CheckpointError at the first rule broken.
    """
    reader = _Reader(data, where)
    if bytes(data[:4]) != MAGIC:
        reader.fail(f"begins with {bytes(data[:4])!r}, expected b'GGUF'; not a GGUF file")
    reader.at = 4
    version = reader.number("I")
    if version and version & 0xFFFF == 0:
        reader.fail("is big-endian; nybble reads little-endian files only: convert it first")
    if version not in (2, 3):
        reader.fail(f"GGUF version {version}, expected 2 or 3; write it anew with llama.cpp")
    tensors, keys = reader.number("Q"), reader.number("Q")
    # A key takes at least 13 bytes, a tensor 24.
    reader.check_count(keys, KEYS_LIMIT, 13, "metadata keys")
    reader.check_count(tensors, TENSORS_LIMIT, 24, "tensors")
    fields = _read_fields(reader, keys)
    return version, fields, _read_tensors(reader, tensors, _alignment(reader, fields))


class _Reader:
    """A place in the file, and the numbers and strings from there on."""

    __slots__ = ("at", "data", "where")

    def __init__(self, data: memoryview, where: str) -> None:
        self.data = data
        self.where = where
        self.at = 0

    def fail(self, text: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {text}")

    def number(self, form: str) -> int:
        """One integer."""
        value = self.unpack(form)
        assert isinstance(value, int)
        return value

    def unpack(self, form: str) -> int | float:
        """One number of a struct format."""
        width = struct.calcsize(form)
        if self.at + width > len(self.data):
            self.fail(f"ends at byte {len(self.data)} inside its header; download it again")
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += width
        assert isinstance(value, (int, float))
        return value

    def take(self, length: int) -> memoryview:
        """The next bytes."""
        if length > len(self.data) - self.at:
            self.fail(
                f"byte {self.at}: a length of {length}, but the file ends at {len(self.data)}; "
                "download it again"
            )
        self.at += length
        return self.data[self.at - length : self.at]

    def string(self, limit: int, what: str) -> str:
        """A string of at most `limit` bytes."""
        length = self.number("Q")
        if length > limit:
            self.fail(f"byte {self.at}: {what} of {length} bytes; at most {limit} are read")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            self.fail(f"byte {self.at - length}: {what} is not UTF-8")

    def check_count(self, count: int, limit: int, least: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold, before anything is made of it."""
        if count > limit:
            self.fail(f"{count} {what}; at most {limit} are read")
        if count * least > len(self.data) - self.at:
            self.fail(
                f"{count} {what} do not fit into the {len(self.data) - self.at} bytes that follow; "
                "download it again"
            )


def _read_fields(reader: _Reader, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for _ in range(count):
        key = reader.string(KEY_BYTES, "a key")
        if key in fields:
            reader.fail(f"the metadata key {show(key)} stands there twice")
        kind = reader.number("I")
        fields[key] = _array(reader, key) if kind == _ARRAY else _scalar(reader, key, kind)
    return fields


def _scalar(reader: _Reader, key: str, kind: int) -> Field:
    if kind == _STRING:
        return Field("str", reader.string(STRING_LIMIT, f"the value of {show(key)}"))
    name, form = _number_type(reader, key, kind)
    value = reader.unpack(form)
    if name == "bool":
        if value not in (0, 1):
            reader.fail(f"{show(key)}: a boolean is 0 or 1, found {value}")
        return Field(name, bool(value))
    return Field(name, value)


def _number_type(reader: _Reader, key: str, kind: int) -> tuple[str, str]:
    if kind not in _NUMBERS:
        reader.fail(f"{show(key)}: value type {kind}; GGUF has 0 to 12")
    return _NUMBERS[kind]


def _array(reader: _Reader, key: str) -> Field:
    kind, count = reader.number("I"), reader.number("Q")
    if kind == _ARRAY:
        reader.fail(f"{show(key)}: an array of arrays, which llama.cpp does not read either")
    if kind == _STRING:
        reader.check_count(count, ARRAY_LIMIT, 8, f"strings in {show(key)}")
        texts = [reader.string(STRING_LIMIT, f"an entry of {show(key)}") for _ in range(count)]
        return Field("[str]", texts)
    name, form = _number_type(reader, key, kind)
    width = struct.calcsize(form)
    reader.check_count(count, ARRAY_LIMIT, width, f"numbers in {show(key)}")
    # Copied: the metadata must not keep the file mapped.
    values = np.frombuffer(reader.take(count * width), dtype=np.dtype("<" + form)).copy()
    if name == "bool":
        if values.size and values.max() > 1:
            reader.fail(f"{show(key)}: a boolean is 0 or 1, found {values.max()}")
        values = values.astype(np.bool_)
    return Field(f"[{name}]", values)


def _alignment(reader: _Reader, fields: dict[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return ALIGNMENT
    value = field.value
    if field.kind != "u32" or not isinstance(value, int) or value < 8 or value & (value - 1):
        reader.fail(f"general.alignment must be a power of two of 8 or more, found {value!r}")
    return value


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, GGUFTensor]:
    listed = [_read_tensor(reader) for _ in range(count)]
    start = _padded(reader.at, alignment)
    tensors: dict[str, GGUFTensor] = {}
    expected = 0
    for name, kind, shape, offset in listed:
        if name in tensors:
            reader.fail(f"the tensor {show(name)} stands there twice")
        if offset != expected:
            reader.fail(
                f"tensor {show(name)}: begins at {offset} of the data, expected {expected}: they "
                f"follow one another, padded to {alignment} bytes; write the file anew"
            )
        nbytes = _tensor_bytes(reader, name, kind, shape)
        if start + offset + nbytes > len(reader.data):
            reader.fail(
                f"tensor {show(name)}: ends at byte {start + offset + nbytes}, the file at "
                f"{len(reader.data)}; download it again"
            )
        tensors[name] = GGUFTensor(name, TYPES[kind].name, shape, start + offset, nbytes)
        expected = _padded(offset + nbytes, alignment)
    if len(reader.data) > start + expected:
        reader.fail(
            f"{len(reader.data) - start - expected} bytes follow the last tensor, expected none; "
            "two files joined, or a damaged download"
        )
    return tensors


def _read_tensor(reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
    name = reader.string(NAME_BYTES, "a tensor's name")
    if not name or not name.isprintable():
        reader.fail(f"{show(name)} cannot be the name of a tensor")
    rank = reader.number("I")
    if rank > RANK:
        reader.fail(f"tensor {show(name)}: {rank} dimensions, at most {RANK} are allowed")
    shape = tuple(reader.number("Q") for _ in range(rank))[::-1]
    return name, reader.number("I"), shape, reader.number("Q")


def _tensor_bytes(reader: _Reader, name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind not in TYPES:
        reader.fail(f"tensor {show(name)}: type {kind} is none that nybble knows")
    row = TYPES[kind]
    if math.prod(max(n, 1) for n in shape) > SIZE_LIMIT:
        reader.fail(f"tensor {show(name)}: shape {list(shape)} overflows")
    k = shape[-1] if shape else 1
    if k % row.block:
        reader.fail(
            f"tensor {show(name)}: rows of {k} are no multiple of {row.name}'s block, {row.block}"
        )
    return math.prod(shape) // row.block * row.nbytes


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
