"""A checkpoint folder as it is, broken or not: what `Checkpoint.open` refuses, a survey records.

Headers, configurations and the index are read once; every breach becomes a `Fault` and the rest
stays usable. Values are read when a rule asks for them, neighbours together. Works on any `Files`,
so on a folder behind HTTP too. Judges nothing: rules do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import Contents, Module, read_contents
from nybble.check.lock import Lock
from nybble.checkpoint.declaration import Declaration
from nybble.checkpoint.dialects import Sections, read_declaration, read_sections
from nybble.checkpoint.files import Files, LocalFiles, read_ranges, read_values
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.reader import INDEX
from nybble.checkpoint.safetensors import (
    DTYPES,
    TensorInfo,
    collector_paused,
    header_length,
    parse_header,
    parse_json,
    show,
)
from nybble.errors import CheckpointError, ModelError, UnreadableValue
from nybble.families import Dimensions, Family, find_family

T = TypeVar("T")

CONFIG = "config.json"
#: What a repair leaves beside the checkpoint, and is no part of it.
REPAIR_FOLDER = "nybble_repair/"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that the format forbids, found while reading.

    `kind`: "json" (a file is no JSON object as it should be), "index" (its shape), "missing" (a
    shard that the index names), "header" (a shard's header breaks a rule), "truncated", "trailing"
    (data after the last tensor), "bare" (header only), "unreadable" (link out of the folder, no
    plain file, I/O error), "declaration" (the quantization section cannot be read), "dimensions"
    (config.json lacks what its model_type needs), "values" (it has it, and holds what no model can
    have there: a size of -1, a list for a name).
    """

    kind: str
    file: str
    message: str


@dataclass(frozen=True, slots=True)
class SurveyedShard:
    """One safetensors file whose header could be read. `expected` is the size that it promises."""

    name: str
    size: int
    header_bytes: int
    expected: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    header_sha256: str

    @property
    def has_data(self) -> bool:
        """Whole: every byte that the header promises, and none beyond."""
        return self.size == self.expected


@dataclass(frozen=True, slots=True)
class Target:
    """Where the checkpoint is to run: "" and 0 for anywhere."""

    engine: str = ""
    engine_version: str = ""
    tensor_parallel: int = 0
    hardware: str = ""


class Survey:
    """A checkpoint folder: faults, configurations, shards, tensors, modules.

    `documents` are the parsed JSON objects of the top folder by name: config.json, the index,
    tokenizer_config.json and others; tokenizer.json is left for whoever needs it. `shards` are all
    readable safetensors files of the top folder, of the index or not. `tensors` are those of the
    model: of the shards that the index names, of all if there is no index; of a name in two shards
    the first counts. `source` is the checkpoint that this one was made of, if it is known.

    `target` is what the user wants to run it on.
    """

    def __init__(
        self,
        files: Files,
        source: Survey | None = None,
        *,
        deep: bool = False,
        target: Target | None = None,
        lock: Lock | None = None,
    ) -> None:
        self.files = files
        self.source = source
        self.deep = deep
        self.target = target or Target()
        self.lock = lock
        self._kept: dict[object, object] = {}
        faults: list[Fault] = []
        with collector_paused():
            self.names = tuple(n for n in files.names() if not n.startswith(REPAIR_FOLDER))
            self.documents = _documents(files, self.names, faults)
            self.weight_map, self.index_metadata = _index(self.documents.get(INDEX), faults)
            self.shards = _shards(files, self.names, self.weight_map, faults)
            self.tensors = _tensors(self.shards, self.weight_map)
        self.config: dict[str, object] = self.documents.get(CONFIG, {})
        self.declaration = _declaration(self.config, self.documents.get(CONFIG_FILE), faults)
        self.family, self.dimensions, self.why_no_family = _family(self.config, faults)
        self.faults = tuple(faults)

    @classmethod
    def open(cls, path: Path, source: Path | None = None, *, deep: bool = False) -> Survey:
        """Survey a local folder."""
        other = None if source is None else cls(LocalFiles(source))
        return cls(LocalFiles(path), other, deep=deep)

    def aimed_at(self, target: Target) -> Survey:
        """The same checkpoint, to be run elsewhere; what was read of it is shared."""
        other = copy(self)
        other.target = target
        other._kept = {}
        return other

    @property
    def engine(self) -> str:
        """The chosen engine, "" for all."""
        return self.target.engine

    @property
    def engine_version(self) -> str:
        return self.target.engine_version

    @property
    def tensor_parallel(self) -> int:
        return self.target.tensor_parallel

    @property
    def hardware(self) -> str:
        return self.target.hardware

    @property
    def where(self) -> str:
        """The folder, for messages."""
        return self.files.where

    def once(self, make: Callable[[Survey], T]) -> T:
        """What a function makes of this survey, made once: several rules look at the same."""
        if make not in self._kept:
            self._kept[make] = make(self)
        return cast(T, self._kept[make])

    @cached_property
    def sections(self) -> Sections:
        """The sections on quantization as they stand; an empty one where they cannot be read."""
        try:
            return read_sections(self.config, self.documents.get(CONFIG_FILE))
        except CheckpointError:
            return Sections()  # a fault already

    @cached_property
    def contents(self) -> Contents:
        """The tensors as modules, held against the declaration."""
        return read_contents(self, self.declaration)

    @property
    def modules(self) -> tuple[Module, ...]:
        return self.contents.modules

    @property
    def quantized(self) -> Iterator[Module]:
        """The modules that hold quantized weights."""
        return (m for m in self.modules if m.kind.is_quantized)

    @cached_property
    def has_data(self) -> bool:
        """Whether any shard has values to look at."""
        return any(shard.size > shard.header_bytes for shard in self.shards.values())

    @property
    def text_config(self) -> Mapping[str, object]:
        """`text_config` of a wrapped model, else config.json itself."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    def faults_of(self, *kinds: str) -> tuple[Fault, ...]:
        return tuple(f for f in self.faults if f.kind in kinds)

    def is_held(self, tensor: TensorInfo) -> bool:
        """Whether the file has all bytes of this tensor."""
        return tensor.offset + tensor.nbytes <= self.shards[tensor.file].size

    def values(self, tensors: Sequence[TensorInfo]) -> list[NDArray[np.generic] | None]:
        """The values of small tensors, read together; None for one that the file cuts off."""
        out: list[NDArray[np.generic] | None] = [None] * len(tensors)
        by_file: dict[str, list[int]] = {}
        for i, tensor in enumerate(tensors):
            if self.is_held(tensor):
                by_file.setdefault(tensor.file, []).append(i)
        for file, wanted in by_file.items():
            ranges = [(tensors[i].offset, tensors[i].nbytes) for i in wanted]
            for i, data in zip(wanted, read_ranges(self.files, file, ranges), strict=True):
                info = tensors[i]
                out[i] = np.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)
        return out

    def scalars(self, tensors: Sequence[TensorInfo]) -> NDArray[np.float64]:
        """The first value of each tensor; NaN for one that the file cuts off. Tens of thousands of
        scalars cost milliseconds."""
        out = np.full(len(tensors), np.nan)
        by_kind: dict[tuple[str, str], list[int]] = {}
        for i, tensor in enumerate(tensors):
            if self.is_held(tensor) and tensor.size:
                by_kind.setdefault((tensor.file, tensor.dtype), []).append(i)
        for (file, dtype), wanted in by_kind.items():
            kind = DTYPES[dtype]
            places = np.array([tensors[i].offset for i in wanted], dtype=np.int64)
            values = read_values(self.files, file, places, kind.itemsize)
            out[wanted] = values.view(kind)[:, 0].astype(np.float64)
        return out

    def sample(self, tensor: TensorInfo, nbytes: int = 4096) -> NDArray[np.uint8]:
        """Bytes of a tensor: all if it has no more than 3 x nbytes (or the survey is deep), else
        its first, middle and last `nbytes`. Empty where the file cuts it off."""
        return self.samples([tensor], nbytes)[0]

    def samples(self, tensors: Sequence[TensorInfo], nbytes: int = 4096) -> list[NDArray[np.uint8]]:
        """`sample` of many, read together: behind HTTP every read is a request."""
        places = [self._places(tensor, nbytes) for tensor in tensors]
        by_file: dict[str, list[int]] = {}
        for i, tensor in enumerate(tensors):
            if places[i]:
                by_file.setdefault(tensor.file, []).append(i)
        out = [np.empty(0, dtype=np.uint8) for _ in tensors]
        for file, wanted in by_file.items():
            flat = [place for i in wanted for place in places[i]]
            parts = iter(read_ranges(self.files, file, flat))
            for i in wanted:
                data = b"".join(next(parts) for _ in places[i])
                out[i] = np.frombuffer(data, dtype=np.uint8)
        return out

    def _places(self, tensor: TensorInfo, nbytes: int) -> list[tuple[int, int]]:
        if not self.is_held(tensor):
            return []
        if self.deep or tensor.nbytes <= 3 * nbytes:
            return [(tensor.offset, tensor.nbytes)]
        width = DTYPES[tensor.dtype].itemsize
        middle = tensor.nbytes // 2 // width * width
        return [(tensor.offset + at, nbytes) for at in (0, middle, tensor.nbytes - nbytes)]


# ------------------------------------------------------------------------------------------ reading


def _documents(
    files: Files, names: Sequence[str], faults: list[Fault]
) -> dict[str, dict[str, object]]:
    """Every JSON file of the top folder that is an object, but tokenizer.json and vocabularies."""
    found = {}
    for name in names:
        if "/" in name or not name.endswith(".json") or name in _LARGE:
            continue
        where = f"{files.where}/{name}"
        try:
            data = files.read(name)
        except CheckpointError as error:
            faults.append(Fault("unreadable", name, str(error)))
            continue
        try:
            found[name] = parse_json(data, where, check_duplicates=name != INDEX)
        except CheckpointError as error:
            faults.append(Fault("json", name, str(error)))
    return found


_LARGE = ("tokenizer.json", "vocab.json", "merges.json", "added_tokens.json")


def _index(
    document: Mapping[str, object] | None, faults: list[Fault]
) -> tuple[dict[str, str] | None, dict[str, object]]:
    """The weight map, None without an index or with one of no use; its metadata."""
    if document is None:
        return None, {}
    metadata = document.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        faults.append(Fault("index", INDEX, f'{INDEX}: "metadata" must be an object'))
    kept = metadata if isinstance(metadata, dict) else {}
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        message = f'{INDEX}: "weight_map" must be an object tensor name -> file name'
        faults.append(Fault("index", INDEX, message))
        return None, kept
    is_text = set(map(type, weight_map.values())) == {str}
    if is_text and all(map(_is_shard_name, set(weight_map.values()))):
        return weight_map, kept
    good = {t: f for t, f in weight_map.items() if isinstance(f, str) and _is_shard_name(f)}
    if len(good) < len(weight_map):
        bad = next(t for t in weight_map if t not in good)
        faults.append(
            Fault(
                "index",
                INDEX,
                f"{INDEX}: {len(weight_map) - len(good)} entries name no safetensors file inside "
                f"the folder: {show(bad)} -> {show(weight_map[bad])}",
            )
        )
    return good, kept


def _is_shard_name(name: str) -> bool:
    parts = name.split("/")
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and "\\" not in name
        and not any(part in ("", ".", "..") for part in parts)
    )


def _shards(
    files: Files,
    names: Sequence[str],
    weight_map: Mapping[str, str] | None,
    faults: list[Fault],
) -> dict[str, SurveyedShard]:
    present = set(names)
    asked = set((weight_map or {}).values())
    asked |= {n for n in names if n.endswith(".safetensors") and "/" not in n}
    found = {}
    for name in sorted(asked):
        if name not in present:
            faults.append(Fault("missing", name, f"{name}: {INDEX} names it, but it is not there"))
            continue
        shard = _shard(files, name, faults)
        if shard is not None:
            found[name] = shard
    return found


def _shard(files: Files, name: str, faults: list[Fault]) -> SurveyedShard | None:
    try:
        size = files.size(name)
        start = files.read(name, 0, min(size, 8))
    except CheckpointError as error:
        faults.append(Fault("unreadable", name, str(error)))
        return None
    try:
        length = header_length(start, size, name)
        text = files.read(name, 8, length)
        metadata, tensors, total = parse_header(text, name, name)
    except CheckpointError as error:
        faults.append(Fault("header", name, str(error)))
        return None
    expected = 8 + length + total
    digest = hashlib.sha256(text).hexdigest()
    shard = SurveyedShard(name, size, 8 + length, expected, metadata, tensors, digest)
    if not shard.has_data:
        kind = "trailing" if size > expected else "truncated"
        if size == shard.header_bytes:
            kind = "bare"
        words = f"{name}: expected {expected:,} bytes as its header says, found {size:,}"
        faults.append(Fault(kind, name, words))
    return shard


def _tensors(
    shards: Mapping[str, SurveyedShard], weight_map: Mapping[str, str] | None
) -> dict[str, TensorInfo]:
    used = None if weight_map is None else set(weight_map.values())
    found: dict[str, TensorInfo] = {}
    for name, shard in shards.items():
        if used is not None and name not in used:
            continue
        if found.keys().isdisjoint(shard.tensors):
            found |= shard.tensors
        else:
            for tensor, info in shard.tensors.items():
                # Where the index places it counts; else the first file.
                is_named = weight_map is not None and weight_map.get(tensor) == name
                if tensor not in found or is_named:
                    found[tensor] = info
    return found


def _declaration(
    config: Mapping[str, object], nested: Mapping[str, object] | None, faults: list[Fault]
) -> Declaration:
    try:
        return read_declaration(config, nested)
    except CheckpointError as error:
        faults.append(Fault("declaration", CONFIG, str(error)))
        return Declaration()


def _family(
    config: Mapping[str, object], faults: list[Fault]
) -> tuple[Family | None, Dimensions | None, str]:
    try:
        family = find_family(config)
    except ModelError as error:
        if isinstance(error, UnreadableValue):
            faults.append(Fault("values", CONFIG, str(error).partition(". ")[0]))
        return None, None, str(error)
    try:
        return family, family.dimensions(config), ""
    except ModelError as error:
        kind = "values" if isinstance(error, UnreadableValue) else "dimensions"
        faults.append(Fault(kind, CONFIG, str(error)))
        return family, None, ""
