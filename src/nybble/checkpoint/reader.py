"""A Hugging Face checkpoint folder, read lazily: headers at once, data mapped when asked for.

A folder is untrusted input. Every rule of the format is checked on the headers before anything is
allocated or mapped, so what `Checkpoint.open` returns can be used without looking again. Knows no
layout: a tensor is a name, a dtype, a shape and bytes; what they mean is for others.

Source: safetensors 0.8 (README "Format", `tensor.rs`); Hugging Face hub cache (snapshots are links
into blobs).
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.errors import CheckpointError

INDEX = "model.safetensors.index.json"

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

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_WEIGHTS = (*_PICKLES, ".gguf", ".safetensors")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_REWRITTEN = ("config.json", "hf_quant_config.json")
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})\.safetensors")

U8Array = NDArray[np.uint8]


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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor and where it lies: `offset` counts from the start of `file`."""

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


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file. `header_bytes` counts the eight length bytes too: the data follow."""

    name: str
    size: int
    header_bytes: int
    mtime_ns: int
    metadata: dict[str, str]
    has_data: bool
    header_sha256: str


class Checkpoint:
    """A checkpoint folder: every tensor by name, its bytes mapped on first use.

    `tensors` is ordered by file name, then offset. `unindexed` names the safetensors files that the
    index does not use; they are no part of the model. Several threads may read.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        shards: tuple[Shard, ...],
        config: dict[str, object],
        index_metadata: dict[str, object],
        unindexed: tuple[str, ...],
        config_sha256: str,
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.shards = shards
        self.config = config
        self.index_metadata = index_metadata
        self.unindexed = unindexed
        self._config_sha256 = config_sha256
        self._shard = {shard.name: shard for shard in shards}
        self._maps: dict[str, tuple[mmap.mmap, U8Array]] = {}
        self._is_closed = False

    @classmethod
    def open(cls, path: Path, *, headers_only: bool = False) -> Checkpoint:
        """Read all headers of the folder `path` and check every rule of the format.

        With headers_only, shards that end right after their header are accepted too; their
        `has_data` is False. Raises CheckpointError at the first rule broken.
        """
        path = Path(path)
        _check_folder(path)
        with collector_paused():
            names, weight_map, index_metadata, unindexed = _find_shards(path)
            tensors: dict[str, TensorInfo] = {}
            shards = []
            for name in names:
                shard, found = _read_shard(path, name, headers_only)
                if weight_map is not None:
                    _check_index(
                        path, name, found, weight_map
                    )  # one file per tensor, so no duplicates
                elif not tensors.keys().isdisjoint(found):
                    _refuse_duplicate(path, tensors, found)
                tensors.update(found)
                shards.append(shard)
            if weight_map is not None and len(weight_map) != len(tensors):
                _refuse_unfound(path, weight_map, tensors)
            config_bytes = _read_config(path)
            config = parse_json(config_bytes, str(path / "config.json")) if config_bytes else {}
        return cls(
            path,
            tensors,
            tuple(shards),
            config,
            index_metadata,
            unindexed,
            hashlib.sha256(config_bytes).hexdigest(),
        )

    def raw(self, name: str) -> U8Array:
        """The bytes of a tensor, one-dimensional: a read-only view of the mapped file."""
        info = self._info(name)
        return self._map(info)[1][info.offset : info.offset + info.nbytes]

    def array(self, name: str) -> NDArray[np.generic]:
        """A tensor in its dtype and shape: a read-only view of the mapped file.

        The view is as aligned as the file's writer made it; old files start their data at odd
        offsets.
        """
        info = self._info(name)
        return self.raw(name).view(DTYPES[info.dtype]).reshape(info.shape)

    def will_need(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Ask the kernel to read bytes start:stop of a tensor ahead."""
        self._advise(name, start, stop, mmap.MADV_WILLNEED)

    def drop_pages(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Take bytes start:stop of a tensor out of this process's resident memory.

        For streaming: without it the resident size grows to that of the file. Views stay valid; a
        page touched again is mapped again. Whole pages are dropped, so those of the neighbours'
        edges too.
        """
        self._advise(name, start, stop, mmap.MADV_DONTNEED)

    def fingerprint(self) -> str:
        """sha256 of what identifies the source without reading its data.

        Names, headers, sizes and modification times of the shards, and config.json: a copy made
        without its times is another source.
        """
        facts = [(s.name, s.header_sha256, s.size, s.mtime_ns) for s in self.shards]
        return hashlib.sha256(json.dumps([facts, self._config_sha256]).encode()).hexdigest()

    def side_files(self) -> list[str]:
        """Everything to carry over to another checkpoint of this model, as sorted relative names.

        All plain files, of subfolders too, but for weights in any format, their indexes, hidden
        folders, and the two configuration files that a quantizer writes anew. Raises
        CheckpointError for a link that leaves the folder.
        """
        found = []
        for where, folders, files in os.walk(self.path):
            folders[:] = [f for f in folders if not f.startswith(".")]
            at = Path(where)
            for name in folders:
                if (at / name).is_symlink():
                    relative = (at / name).relative_to(self.path)
                    raise CheckpointError(
                        f"{self.path}: the subfolder {str(relative)!r} is a symbolic link; "
                        "replace it by what it points to"
                    )
            for name in files:
                relative = (at / name).relative_to(self.path)
                if not _is_rewritten(relative):
                    _resolve(self.path, str(relative))
                    found.append(relative.as_posix())
        return sorted(found)

    def close(self) -> None:
        """Give up the maps; views already handed out stay valid and keep theirs until they go."""
        self._is_closed = True
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: no tensor {_show(name)} among its {len(self.tensors)}"
            )
        return info

    def _map(self, info: TensorInfo) -> tuple[mmap.mmap, U8Array]:
        known = self._maps.get(info.file)
        return known if known is not None else self._make_map(self._shard[info.file])

    def _make_map(self, shard: Shard) -> tuple[mmap.mmap, U8Array]:
        file = self.path / shard.name
        if self._is_closed:
            raise CheckpointError(f"{file}: the checkpoint was closed")
        if not shard.has_data:
            raise CheckpointError(
                f"{file}: holds only its header, no data; this command needs the whole file"
            )
        fd, status = _open_file(self.path, shard.name)
        try:
            if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise CheckpointError(f"{file}: changed since it was opened; start again")
            mapped = mmap.mmap(fd, shard.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)
        # Two threads may both map a shard; the first one's map is kept.
        return self._maps.setdefault(shard.name, (mapped, np.frombuffer(mapped, dtype=np.uint8)))

    def _advise(self, name: str, start: int, stop: int | None, advice: int) -> None:
        info = self._info(name)
        begin, end, _ = slice(start, stop).indices(info.nbytes)
        if begin < end:
            first = (info.offset + begin) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map(info)[0].madvise(advice, first, info.offset + end - first)


# --------------------------------------------------------------------------------------- the folder


def _check_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise CheckpointError(f"{path}: is a file; give the checkpoint folder that holds it")
    raise CheckpointError(
        f"{path}: no such folder; nybble reads local folders, so download the model first"
    )


_Found = tuple[list[str], dict[str, str] | None, dict[str, object], tuple[str, ...]]


def _find_shards(path: Path) -> _Found:
    """Shard names in order, the index's weight map and metadata, and the files it leaves out."""
    try:
        present = sorted(n for n in os.listdir(path) if not n.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror}") from error
    files = [n for n in present if n.endswith(".safetensors")]
    if INDEX not in present:
        if not files:
            _refuse_empty(path, present)
        _check_numbering(path, files)
        return files, None, {}, ()
    where = str(path / INDEX)
    index = parse_json(_read_small(path, INDEX), where)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{where}: "weight_map" must be an object tensor name -> file name')
    if not isinstance(metadata, dict):
        raise CheckpointError(f'{where}: "metadata" must be an object, found {_show(metadata)}')
    if set(map(type, weight_map.values())) != {str}:
        tensor, file = next((t, f) for t, f in weight_map.items() if not isinstance(f, str))
        raise CheckpointError(
            f"{where}: tensor {_show(tensor)} must name a file, found {_show(file)}"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_shard_name(where, name)
    missing = [n for n in names if not os.path.exists(path / n)]
    if missing:
        shown = ", ".join(map(_show, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} files that {INDEX} names are missing: "
            f"{shown}; "
            "complete the download"
        )
    return names, weight_map, metadata, tuple(n for n in files if n not in set(names))


def _refuse_empty(path: Path, present: list[str]) -> NoReturn:
    pickles = [n for n in present if n.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{path}: holds no safetensors, only {_show(pickles[0])}: pickle files are never "
            "loaded; "
            "convert to safetensors"
        )
    what = f"no *.safetensors among its {len(present)} entries" if present else "is empty"
    raise CheckpointError(f"{path}: {what}; give a folder with model*.safetensors")


def _check_numbering(path: Path, files: list[str]) -> None:
    """Without an index, the names themselves must not speak of files that are not there."""
    for name in files:
        match = _NUMBERED.search(name)
        if match is None:
            continue
        stem, total = name[: match.start()], match[2]
        # Any two of a set have the same stem and total, so counting them is enough.
        count = sum(
            n.startswith(stem + "-") and n.endswith(f"-of-{total}.safetensors") for n in files
        )
        if count != int(total):
            raise CheckpointError(
                f"{path}: {_show(name)} is one of {int(total)} files, found {count}, and there is "
                f"no {INDEX}; "
                "complete the download"
            )


def _check_shard_name(where: str, name: str) -> None:
    if name.endswith(_PICKLES):
        raise CheckpointError(
            f"{where}: names {_show(name)}: pickle files are never loaded; convert to safetensors"
        )
    parts = name.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or any(p in ("", ".", "..") for p in parts)  # a leading slash makes an empty part
        or not name.endswith(".safetensors")
    ):
        raise CheckpointError(
            f"{where}: {_show(name)} is no name of a safetensors file inside the folder; do not "
            "use this checkpoint"
        )


def _resolve(path: Path, name: str) -> str:
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


def _open_file(path: Path, name: str) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file of the folder, and its status."""
    real = _resolve(path, name)
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


def _read_exactly(fd: int, length: int, offset: int, where: Path) -> bytes:
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


def _read_small(path: Path, name: str) -> bytes:
    fd, status = _open_file(path, name)
    try:
        if status.st_size > HEADER_LIMIT:
            raise CheckpointError(
                f"{path / name}: {status.st_size} bytes; at most {HEADER_LIMIT} are read as JSON"
            )
        return _read_exactly(fd, status.st_size, 0, path / name)
    finally:
        os.close(fd)


def _read_config(path: Path) -> bytes:
    return _read_small(path, "config.json") if os.path.lexists(path / "config.json") else b""


def _is_rewritten(relative: Path) -> bool:
    """A quantizer makes this file itself, or it holds weights."""
    name = relative.name
    return name.endswith((*_WEIGHTS, *_INDEXES)) or str(relative) in _REWRITTEN


# ----------------------------------------------------------------------------- index against shards


def _check_index(
    path: Path, name: str, found: dict[str, TensorInfo], weight_map: dict[str, str]
) -> None:
    if not found or set(map(weight_map.get, found)) == {name}:
        return
    for tensor in found:
        named = weight_map.get(tensor)
        if named != name:
            says = f"places it in {_show(named)}" if named else "does not name it"
            raise CheckpointError(
                f"{path / name}: holds the tensor {_show(tensor)}, but {INDEX} {says}; the files "
                "are of different "
                "downloads: download again, or remove the index if the shards are right"
            )


def _refuse_unfound(
    path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]
) -> NoReturn:
    absent = [t for t in weight_map if t not in tensors]
    raise CheckpointError(
        f"{path / weight_map[absent[0]]}: lacks the tensor {_show(absent[0])} that {INDEX} places "
        "there "
        f"({len(absent)} such tensors); the files are of different downloads: download again"
    )


def _refuse_duplicate(
    path: Path, tensors: dict[str, TensorInfo], found: dict[str, TensorInfo]
) -> NoReturn:
    name = next(n for n in found if n in tensors)
    raise CheckpointError(
        f"{path}: the tensor {_show(name)} is in both {_show(tensors[name].file)} and "
        f"{_show(found[name].file)}; "
        f"remove the file that is not part of the model, or add {INDEX}"
    )


# --------------------------------------------------------------------------------------- one header


def _read_shard(path: Path, name: str, headers_only: bool) -> tuple[Shard, dict[str, TensorInfo]]:
    where = path / name
    fd, status = _open_file(path, name)
    try:
        size = status.st_size
        if size < 8:
            raise CheckpointError(
                f"{where}: {size} bytes; a safetensors file has at least 8; download it again"
            )
        length = int.from_bytes(_read_exactly(fd, 8, 0, where), "little")
        if length > HEADER_LIMIT:
            raise CheckpointError(
                f"{where}: header of {length} bytes, at most {HEADER_LIMIT} are allowed; not a "
                "safetensors file"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{where}: the header ends at byte {8 + length}, the file at {size}; download it "
                "again"
            )
        text = _read_exactly(fd, length, 8, where)
    finally:
        os.close(fd)
    metadata, tensors, total = parse_header(text, name, str(where))
    has_data = size == 8 + length + total
    if not has_data and not (headers_only and size == 8 + length):
        is_bare = size == 8 + length
        advice = (
            "the data are missing; only plan and inspect can use it"
            if is_bare
            else "download it again"
        )
        raise CheckpointError(
            f"{where}: expected {8 + length + total} bytes as its header says, found {size}; "
            f"{advice}"
        )
    digest = hashlib.sha256(text).hexdigest()
    return Shard(name, size, 8 + length, status.st_mtime_ns, metadata, has_data, digest), tensors


def parse_header(
    text: bytes, file: str, where: str
) -> tuple[dict[str, str], dict[str, TensorInfo], int]:
    """Parse a safetensors header: its metadata, the tensors in data order, the bytes of data.

    `text` comes without the length. `file` goes into each TensorInfo, `where` into messages. Raises
    CheckpointError unless the tensors cover the data from the first byte on, without gap or
    overlap.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where}: the header must start with '{{', found {_show(text[:1])}")
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
                f"{where}: tensor {_show(name)} at data bytes {begin}:{end} {fault} "
                f"{_show(previous) if previous else 'the header'}, which ends at {at}; the file "
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
    at = f"{where}: tensor {_show(name)}"
    if not 0 < len(name) <= NAME_LIMIT:
        raise CheckpointError(
            f"{at}: name of {len(name)} characters, allowed are 1 to {NAME_LIMIT}"
        )
    if not name.isprintable():
        raise CheckpointError(f"{at}: the name has a control or unprintable character")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{at}: expected an object of dtype, shape and data_offsets, found {_show(entry)}"
        )
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype in _SUB_BYTE:
        raise CheckpointError(
            f"{at}: dtype {dtype} packs less than a byte per element and is not supported; "
            "published NVFP4 and MXFP4 checkpoints store U8"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{at}: unknown dtype {_show(dtype)}, known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{at}: shape must be a list of integers >= 0, found {_show(shape)}")
    if len(shape) > RANK_LIMIT:
        raise CheckpointError(f"{at}: {len(shape)} dimensions, at most {RANK_LIMIT} are allowed")
    raise CheckpointError(
        f"{at}: data_offsets must be two integers, found {_show(entry['data_offsets'])}"
    )


def _check_extent(name: str, entry: dict[str, object], where: str) -> None:
    """Sizes in full: also reached by empty tensors, whose other extents may still overflow."""
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    assert isinstance(dtype, str)
    at = f"{where}: tensor {_show(name)}"
    begin, end = offsets
    if not 0 <= begin <= end <= SIZE_LIMIT:
        raise CheckpointError(
            f"{at}: data_offsets must rise from 0 on, found {_show(offsets)}; the file is damaged"
        )
    if math.prod(n or 1 for n in shape) * WIDTHS[dtype] > SIZE_LIMIT:
        raise CheckpointError(f"{at}: shape {_show(shape)} of {dtype} exceeds 2^63 bytes")
    nbytes = math.prod(shape) * WIDTHS[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{at}: {dtype} {_show(shape)} takes {nbytes} bytes, its data_offsets "
            f"{_show(offsets)} span "
            f"{end - begin}; the file is damaged"
        )


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: __metadata__ must be an object, found {_show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{where}: __metadata__ key {_show(key)} must hold a string, found {_show(value)}"
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
            raise CheckpointError(f"{where}: the key {_show(key)} occurs twice in one object")
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
        raise CheckpointError(f"{where}: expected a JSON object, found {_show(value)}")
    return value


def _show(value: object) -> str:
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
