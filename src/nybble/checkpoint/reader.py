"""A Hugging Face checkpoint folder, read lazily: headers at once, data mapped when asked for.

A folder is untrusted input. Every rule of the format is checked on the headers before anything is
allocated or mapped, so what `Checkpoint.open` returns can be used without looking again. Knows
files, links and the index; what a header may say is in `checkpoint/safetensors.py`, what the bytes
mean is for others.

Source: Hugging Face hub cache (snapshots are links into blobs).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.files import open_file, read_exactly, read_small, resolve
from nybble.checkpoint.safetensors import (
    DTYPES,
    TensorInfo,
    collector_paused,
    header_length,
    parse_header,
    parse_json,
    show,
)
from nybble.errors import CheckpointError

INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_WEIGHTS = (*_PICKLES, ".gguf", ".safetensors")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_REWRITTEN = ("config.json", "hf_quant_config.json")
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})\.safetensors")

U8Array = NDArray[np.uint8]


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
    index does not use; they are no part of the model. `config_sha256` is of config.json's bytes.
    `aliases` (`with_alias`) maps names that the files do not have to those that they are there.
    Several threads may read.
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
        self.config_sha256 = config_sha256
        self._shard = {shard.name: shard for shard in shards}
        self.aliases: dict[str, str] = {}
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
                    # One file per tensor, so no duplicates.
                    _check_index(path, name, found, weight_map)
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

    def with_alias(self, alias: str, name: str, config: dict[str, object]) -> Checkpoint:
        """The same files with one tensor more: `alias`, which is the bytes of `name`, and another
        configuration. Nothing is written; the files are mapped anew."""
        tensors = {}
        for key, info in self.tensors.items():
            tensors[key] = info
            if key == name:
                tensors[alias] = info._replace(name=alias)
        made = Checkpoint(
            self.path,
            tensors,
            self.shards,
            config,
            self.index_metadata,
            self.unindexed,
            self.config_sha256,
        )
        made.aliases = {**self.aliases, alias: self.stored_name(name)}
        return made

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files: another name for an alias."""
        return self.aliases.get(name, name)

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
        return hashlib.sha256(json.dumps([facts, self.config_sha256]).encode()).hexdigest()

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
                    resolve(self.path, str(relative))
                    if not (at / name).is_file():
                        raise CheckpointError(
                            f"{self.path}: {str(relative)!r} is not a plain file and cannot be "
                            "carried over; remove it"
                        )
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
                f"{self.path}: no tensor {show(name)} among its {len(self.tensors)}"
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
        fd, status = open_file(self.path, shard.name)
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
    index = parse_json(read_small(path, INDEX), where)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{where}: "weight_map" must be an object tensor name -> file name')
    if not isinstance(metadata, dict):
        raise CheckpointError(f'{where}: "metadata" must be an object, found {show(metadata)}')
    if set(map(type, weight_map.values())) != {str}:
        tensor, file = next((t, f) for t, f in weight_map.items() if not isinstance(f, str))
        raise CheckpointError(
            f"{where}: tensor {show(tensor)} must name a file, found {show(file)}"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_shard_name(where, name)
    missing = [n for n in names if not os.path.exists(path / n)]
    if missing:
        shown = ", ".join(map(show, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} files that {INDEX} names are missing: "
            f"{shown}; complete the download"
        )
    return names, weight_map, metadata, tuple(n for n in files if n not in set(names))


def _refuse_empty(path: Path, present: list[str]) -> NoReturn:
    pickles = [n for n in present if n.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{path}: holds no safetensors, only {show(pickles[0])}: pickle files are never "
            "loaded; convert to safetensors"
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
                f"{path}: {show(name)} is one of {int(total)} files, found {count}, and there is "
                f"no {INDEX}; complete the download"
            )


def _check_shard_name(where: str, name: str) -> None:
    if name.endswith(_PICKLES):
        raise CheckpointError(
            f"{where}: names {show(name)}: pickle files are never loaded; convert to safetensors"
        )
    parts = name.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or any(p in ("", ".", "..") for p in parts)  # a leading slash makes an empty part
        or not name.endswith(".safetensors")
    ):
        raise CheckpointError(
            f"{where}: {show(name)} is no name of a safetensors file inside the folder; do not "
            "use this checkpoint"
        )


def _read_config(path: Path) -> bytes:
    return read_small(path, "config.json") if os.path.lexists(path / "config.json") else b""


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
            says = f"places it in {show(named)}" if named else "does not name it"
            raise CheckpointError(
                f"{path / name}: holds the tensor {show(tensor)}, but {INDEX} {says}; the files "
                "are of different downloads: download again, or remove the index if the shards are "
                "right"
            )


def _refuse_unfound(
    path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]
) -> NoReturn:
    absent = [t for t in weight_map if t not in tensors]
    raise CheckpointError(
        f"{path / weight_map[absent[0]]}: lacks the tensor {show(absent[0])} that {INDEX} places "
        f"there ({len(absent)} such tensors); the files are of different downloads: download again"
    )


def _refuse_duplicate(
    path: Path, tensors: dict[str, TensorInfo], found: dict[str, TensorInfo]
) -> NoReturn:
    name = next(n for n in found if n in tensors)
    raise CheckpointError(
        f"{path}: the tensor {show(name)} is in both {show(tensors[name].file)} and "
        f"{show(found[name].file)}; remove the file that is not part of the model, or add {INDEX}"
    )


# ---------------------------------------------------------------------------------------- one shard


def _read_shard(path: Path, name: str, headers_only: bool) -> tuple[Shard, dict[str, TensorInfo]]:
    where = path / name
    fd, status = open_file(path, name)
    try:
        size = status.st_size
        length = header_length(read_exactly(fd, min(size, 8), 0, where), size, str(where))
        text = read_exactly(fd, length, 8, where)
    finally:
        os.close(fd)
    metadata, tensors, total = parse_header(text, name, str(where))
    has_data = size == 8 + length + total
    is_bare = size == 8 + length
    if not has_data and not (headers_only and is_bare):
        advice = "the data are missing; only plan and inspect can use it"
        raise CheckpointError(
            f"{where}: expected {8 + length + total} bytes as its header says, found {size}; "
            f"{advice if is_bare else 'download it again'}"
        )
    digest = hashlib.sha256(text).hexdigest()
    return Shard(name, size, 8 + length, status.st_mtime_ns, metadata, has_data, digest), tensors
