"""The safetensors format: what a header may say, every rule of it checked, and the JSON it is in.

A header is untrusted input: nothing is allocated by what it says. Knows no files, no folders and no
indexes: bytes come in, tensors and their places in the file come out. Knows no layout either: a
tensor is a name, a dtype, a shape and an extent.

Source: safetensors 0.8 (README "Format", `tensor.rs`).
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from nybble.errors import CheckpointError

#: The reference implementation's cap; all JSON is held to it.
HEADER_LIMIT = 100_000_000
#: No published name exceeds 200 characters; a longer one is an attack on whoever prints or stores
#: it.
NAME_LIMIT = 1024
#: numpy 1.26 has no more dimensions.
RANK_LIMIT = 32
#: Sizes must fit a signed 64-bit file offset.
SIZE_LIMIT = 2**63 - 1

#: safetensors' spelling -> numpy; every dtype of whole bytes that the reference knows.
DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, wherever it lies; `dtype` is a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]


class TensorInfo(NamedTuple):
    """A tensor and where it lies: `offset` counts from the start of `file`.

    A tuple, as a checkpoint has 100,000s: it is made in a third of a dataclass's time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


# -------------------------------------------------------------------------------------- the header


def header_length(start: bytes, size: int, where: str) -> int:
    """How long the header is, by the first eight bytes of a file of `size` bytes."""
    if size < 8:
        raise CheckpointError(
            f"{where}: {size} bytes; a safetensors file has at least 8; download it again"
        )
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{where}: header of {length} bytes, at most {HEADER_LIMIT} are allowed; not a "
            "safetensors file"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{where}: the header ends at byte {8 + length}, the file at {size}; download it again"
        )
    return length


def parse_header(
    text: bytes, file: str, where: str
) -> tuple[dict[str, str], dict[str, TensorInfo], int]:
    """Parse a safetensors header: its metadata, the tensors in data order, the bytes of data.

    `text` comes without the length. `file` goes into each TensorInfo, `where` into messages. Raises
    CheckpointError unless the tensors cover the data from the first byte on, without gap or
    overlap.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where}: the header must start with '{{', found {show(text[:1])}")
    header = parse_json(text, where, check_duplicates=False)
    metadata = _check_metadata(header.get("__metadata__", {}), where)
    # A name, three keys and a dtype per entry: if the text has no string beyond those, no key
    # occurs twice. Asking json for the pairs of each object instead takes twice as long.
    has_metadata = header.pop("__metadata__", None) is not None
    strings = 5 * len(header) + 2 * len(metadata) + has_metadata
    start = 8 + len(text)
    entries = [_check_entry(name, entry, file, start, where) for name, entry in header.items()]
    if b"\\" in text or text.count(b'"') != 2 * strings:
        parse_json(text, where)
    entries.sort()
    at, previous = 0, ""
    for begin, end, name, _ in entries:
        if begin != at:
            fault = "overlaps" if begin < at else f"leaves {begin - at} unused bytes after"
            raise CheckpointError(
                f"{where}: tensor {show(name)} at data bytes {begin}:{end} {fault} "
                f"{show(previous) if previous else 'the header'}, which ends at {at}; the file "
                "is damaged"
            )
        at, previous = end, name
    return metadata, {name: info for _, _, name, info in entries}, at


def _check_entry(
    name: str, entry: object, file: str, start: int, where: str
) -> tuple[int, int, str, TensorInfo]:
    """One entry's data offsets, its name and its tensor. The tight loop of opening a checkpoint."""
    if type(entry) is not dict or len(entry) != 3:
        _refuse_entry(name, entry, where)
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        begin, end = offsets
        nbytes = WIDTHS[dtype]
    except (KeyError, TypeError, ValueError):
        _refuse_entry(name, entry, where)
    if (
        type(shape) is not list
        or type(offsets) is not list
        or type(begin) is not int
        or type(end) is not int
        or len(shape) > RANK_LIMIT
        or not 0 < len(name) <= NAME_LIMIT
        or not name.isprintable()
    ):
        _refuse_entry(name, entry, where)
    for extent in shape:
        if type(extent) is not int or extent < 0:
            _refuse_entry(name, entry, where)
        nbytes *= extent
    if not 0 <= begin <= end <= SIZE_LIMIT or end - begin != nbytes or nbytes == 0:
        _check_extent(name, entry, where)
    return begin, end, name, TensorInfo(name, dtype, tuple(shape), file, start + begin)


def _refuse_entry(name: str, entry: object, where: str) -> NoReturn:
    """Say which rule an entry breaks; reached only for entries that break one."""
    at = f"{where}: tensor {show(name)}"
    if not 0 < len(name) <= NAME_LIMIT:
        raise CheckpointError(
            f"{at}: name of {len(name)} characters, allowed are 1 to {NAME_LIMIT}"
        )
    if not name.isprintable():
        raise CheckpointError(f"{at}: the name has a control or unprintable character")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{at}: expected an object of dtype, shape and data_offsets, found {show(entry)}"
        )
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype in _SUB_BYTE:
        raise CheckpointError(
            f"{at}: dtype {dtype} packs less than a byte per element and is not supported; "
            "published NVFP4 and MXFP4 checkpoints store U8"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{at}: unknown dtype {show(dtype)}, known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{at}: shape must be a list of integers >= 0, found {show(shape)}")
    if len(shape) > RANK_LIMIT:
        raise CheckpointError(f"{at}: {len(shape)} dimensions, at most {RANK_LIMIT} are allowed")
    raise CheckpointError(
        f"{at}: data_offsets must be two integers, found {show(entry['data_offsets'])}"
    )


def _check_extent(name: str, entry: dict[str, object], where: str) -> None:
    """Sizes in full: also reached by empty tensors, whose other extents may still overflow."""
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    assert isinstance(dtype, str)
    at = f"{where}: tensor {show(name)}"
    begin, end = offsets
    if not 0 <= begin <= end <= SIZE_LIMIT:
        raise CheckpointError(
            f"{at}: data_offsets must rise from 0 on, found {show(offsets)}; the file is damaged"
        )
    if math.prod(n or 1 for n in shape) * WIDTHS[dtype] > SIZE_LIMIT:
        raise CheckpointError(f"{at}: shape {show(shape)} of {dtype} exceeds 2^63 bytes")
    nbytes = math.prod(shape) * WIDTHS[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{at}: {dtype} {show(shape)} takes {nbytes} bytes, its data_offsets "
            f"{show(offsets)} span {end - begin}; the file is damaged"
        )


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: __metadata__ must be an object, found {show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{where}: __metadata__ key {show(key)} must hold a string, found {show(value)}"
            )
    return metadata


# --------------------------------------------------------------------------------------------- JSON


def parse_json(data: bytes, where: str, *, check_duplicates: bool = True) -> dict[str, object]:
    """Parse one JSON object strictly.

    UTF-8, no duplicate keys, no NaN or Infinity, bounded size and depth; else CheckpointError.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [key for key, _ in pairs]
            key = next(k for i, k in enumerate(keys) if k in keys[:i])
            raise CheckpointError(f"{where}: the key {show(key)} occurs twice in one object")
        return out

    def no_constant(text: str) -> NoReturn:
        raise CheckpointError(f"{where}: {text} is not JSON; write a number or null")

    if len(data) > HEADER_LIMIT:
        raise CheckpointError(
            f"{where}: {len(data)} bytes of JSON, at most {HEADER_LIMIT} are read"
        )
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=unique if check_duplicates else None,
            parse_constant=no_constant,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {_cut(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {show(value)}")
    return value


def show(value: object) -> str:
    """Untrusted text or JSON for a message: escaped and short."""
    if isinstance(value, (list, dict)):
        # repr of a large container would build all of it first.
        return _cut(repr(value)) if len(value) <= 40 else f"{type(value).__name__} of {len(value)}"
    return _cut(ascii(value[:200] if isinstance(value, (str, bytes)) else value))


def _cut(text: str) -> str:
    return text if len(text) <= 160 else text[:150] + "..."


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection: a header makes 100,000s of live containers and no cycle.

    Scanning them again and again takes four times as long as parsing (35B NVFP4: 400 ms instead of
    90).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
