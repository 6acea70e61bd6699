"""The reference pack: what it takes to score exact KL to a model without having its weights.

    PACK/hidden.safetensors   hidden BF16 [T, H]: final normed hidden states of all windows' tokens
         tokens.safetensors   starts I64 [W + 1]: where each window begins among the T rows
                              origins I64 [W]: where it begins in the text (Window.start)
                              tokens I32 [T], first_scored I32 [W]
         head.safetensors     head BF16 [V, H], the output head; absent in a smaller pack, whose
                              reader brings the head (`--head PATH`), which is held to its sha256
         pack.json            {"schema": "nybble.reference/1", ...}: sizes, conditions, and of each
                              file its bytes and the sha256 of its header and of its data

Logits are head @ hidden: [T, V] is never stored. Plain safetensors files, so that others can read
them. A pack is untrusted input, as any folder is: the files' own rules are checked by
checkpoint/reader.py, and pack.json's here. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.files import read_small
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import SIZE_LIMIT, TensorInfo, TensorSpec, parse_json, show
from nybble.checkpoint.writer import ShardLayout, as_bytes, layout_shards, partial_folder
from nybble.errors import CheckpointError, EvaluationError
from nybble.evaluate.report import Conditions, parse_conditions
from nybble.evaluate.windows import Window, count_scored

SCHEMA = "nybble.reference/1"
PACK_JSON = "pack.json"
HIDDEN, TOKENS, HEAD = "hidden.safetensors", "tokens.safetensors", "head.safetensors"

_FACTS = ("hidden_size", "vocabulary", "tokens", "windows", "head_sha256", "conditions", "files")
_SLAB_BYTES = 16 << 20
#: Bits of a BF16's exponent: all set in infinities and NaN.
_EXPONENT = np.uint16(0x7F80)

BF16Array = NDArray[ml_dtypes.bfloat16]
U16Array = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class PackFile:
    """What pack.json says of a file."""

    nbytes: int
    header_sha256: str
    data_sha256: str

    def as_json(self) -> dict[str, object]:
        return {
            "bytes": self.nbytes,
            "header_sha256": self.header_sha256,
            "data_sha256": self.data_sha256,
        }


# ------------------------------------------------------------------------------------------ writing


class PackWriter:
    """Streams a pack to `OUT.partial`, window by window in order, and renames it to OUT at the end.

    `head` is the output head, BF16 or its bits as uint16, [V, H] (a view of a mapped file will do);
    with has_head=False only its hash and shape are kept. Raises CheckpointError if OUT or
    OUT.partial exists, DoesNotFit if the disk is too small, before anything is written.
    """

    def __init__(
        self,
        out: Path,
        conditions: Conditions,
        windows: Sequence[Window],
        head: BF16Array | U16Array,
        *,
        has_head: bool = True,
        disk: Disk | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = partial_folder(out)
        self._conditions = conditions
        self._windows = tuple(windows)
        self._head = _bits(head, "the head")
        self._has_head = has_head
        self._disk = disk or Disk()
        self._next = 0
        self._row = 0
        self._fd: int | None = None
        self._sha256 = hashlib.sha256()
        self._check()
        rows = sum(len(w.tokens) for w in self._windows)
        self._layout = _layout([TensorSpec("hidden", "BF16", (rows, self._head.shape[1]))])
        self._begin()

    def add(self, hidden: BF16Array | U16Array) -> None:
        """The final normed hidden states of the next window, [length, H], BF16 or its bits.

        Raises EvaluationError if the shape is not that window's, or a value is not finite.
        """
        assert self._fd is not None, "the pack is finished or closed"
        bits = _bits(hidden, f"hidden states of window {self._next}")
        if self._next == len(self._windows):
            raise EvaluationError(f"{self.folder}: all {self._next} windows are written already")
        expected = (len(self._windows[self._next].tokens), self._head.shape[1])
        if bits.shape != expected:
            raise EvaluationError(
                f"hidden states of window {self._next} are {list(bits.shape)}, expected "
                f"{list(expected)}"
            )
        is_bad = (bits & _EXPONENT) == _EXPONENT
        if is_bad.any():
            row, column = np.argwhere(is_bad)[0]
            raise EvaluationError(
                f"hidden state of window {self._next}, token {row}, element {column} is not "
                "finite; the model's output is broken"
            )
        data = as_bytes(bits)
        place = len(self._layout.header) + 2 * self._row * expected[1]
        self._disk.write_at(self._fd, data, place)
        self._sha256.update(data)
        self._row += len(bits)
        self._next += 1

    def finish(self) -> None:
        """Write tokens, head and pack.json, and give the folder its name.

        Raises EvaluationError if windows are missing.
        """
        assert self._fd is not None, "the pack is finished or closed"
        if self._next != len(self._windows):
            raise EvaluationError(
                f"{self.folder}: {self._next} of {len(self._windows)} windows were written"
            )
        self._disk.sync(self._fd)
        self.close()
        files = {HIDDEN: _describe(self._layout, self._sha256.hexdigest())}
        files[TOKENS] = self._write(TOKENS, _token_arrays(self._windows))
        if self._has_head:
            files[HEAD] = self._write(HEAD, {"head": ("BF16", self._head)})
        head_sha256 = files[HEAD].data_sha256 if self._has_head else _hash(self._head)
        document = {
            "schema": SCHEMA,
            "hidden_size": self._head.shape[1],
            "vocabulary": self._head.shape[0],
            "tokens": self._row,
            "windows": len(self._windows),
            "head_sha256": head_sha256,
            "conditions": self._conditions.as_json(),
            "files": {name: file.as_json() for name, file in files.items()},
        }
        text = json.dumps(document, indent=2) + "\n"
        self._disk.write_file(self.folder / PACK_JSON, text.encode())
        self._disk.sync_folder(self.folder)
        self._refuse_occupied()
        self._disk.rename(self.folder, self.out)
        self._disk.sync_folder(self.out.parent)

    def close(self) -> None:
        """Give up the open file; what is not finished stays in OUT.partial."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._disk.close(fd)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self) -> None:
        scored = count_scored(self._windows)
        said = self._conditions.windows, self._conditions.scored
        if not self._windows or said != (len(self._windows), scored):
            raise EvaluationError(
                f"{self.out}: {len(self._windows)} windows with {scored} scored tokens under "
                f"conditions that say {said[0]} and {said[1]}"
            )
        if self._head.ndim != 2 or 0 in self._head.shape:
            raise EvaluationError(f"a head of shape {list(self._head.shape)}, expected [V, H]")
        highest = max(int(w.tokens.max()) for w in self._windows)
        if highest >= len(self._head):
            raise EvaluationError(
                f"token id {highest} with a head of {len(self._head)} rows: the tokenizer is not "
                "the model's"
            )

    def _refuse_occupied(self) -> None:
        if os.path.lexists(self.out):
            raise CheckpointError(f"{self.out}: exists; name another output, or remove it")

    def _begin(self) -> None:
        self._refuse_occupied()
        if os.path.lexists(self.folder):
            raise CheckpointError(
                f"{self.folder}: is left from an interrupted run; remove it and start again"
            )
        head_bytes = self._head.nbytes if self._has_head else 0
        needed = self._layout.size + head_bytes + 16 * self._layout.tensors[0].shape[0]
        self._disk.refuse_less_than(needed, self.folder, self.out)
        self._disk.make_folder(self.folder)
        self._fd = self._disk.create(self.folder / HIDDEN)
        try:
            self._disk.allocate(self._fd, self._layout.size)
            self._disk.write_at(self._fd, memoryview(self._layout.header), 0)
        except BaseException:
            self.close()
            raise

    def _write(self, name: str, arrays: Mapping[str, tuple[str, NDArray[np.generic]]]) -> PackFile:
        """A whole safetensors file, in slabs: a head may be larger than the memory left."""
        specs = [TensorSpec(n, dtype, array.shape) for n, (dtype, array) in arrays.items()]
        layout = _layout(specs)
        digest = hashlib.sha256()
        fd = self._disk.create(self.folder / name)
        try:
            self._disk.allocate(fd, layout.size)
            self._disk.write_at(fd, memoryview(layout.header), 0)
            for info in layout.tensors:
                data = as_bytes(arrays[info.name][1])
                for at in range(0, len(data), _SLAB_BYTES):
                    digest.update(data[at : at + _SLAB_BYTES])
                    self._disk.write_at(fd, data[at : at + _SLAB_BYTES], info.offset + at)
            self._disk.sync(fd)
        finally:
            self._disk.close(fd)
        return _describe(layout, digest.hexdigest())


def _bits(array: BF16Array | U16Array, what: str) -> U16Array:
    if array.dtype not in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint16)):
        raise EvaluationError(f"{what} is {array.dtype}, expected bfloat16 or its bits as uint16")
    return np.ascontiguousarray(array).view(np.uint16)


def _hash(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(as_bytes(array)).hexdigest()


def _layout(specs: list[TensorSpec]) -> ShardLayout:
    """The header and places of one file, whatever it is called."""
    return layout_shards(specs, SIZE_LIMIT)[0]


def _describe(layout: ShardLayout, data_sha256: str) -> PackFile:
    return PackFile(layout.size, hashlib.sha256(layout.header[8:]).hexdigest(), data_sha256)


def _token_arrays(windows: Sequence[Window]) -> dict[str, tuple[str, NDArray[np.generic]]]:
    tokens = np.concatenate([w.tokens for w in windows])
    starts = np.cumsum([0, *(len(w.tokens) for w in windows)], dtype=np.int64)
    return {
        "starts": ("I64", starts),
        "origins": ("I64", np.array([w.start for w in windows], dtype=np.int64)),
        "tokens": ("I32", tokens.astype(np.int32)),
        "first_scored": ("I32", np.array([w.first_scored for w in windows], dtype=np.int32)),
    }


# ------------------------------------------------------------------------------------------ reading


class Pack:
    """An opened pack: `windows` with their tokens, and the hidden states of each, mapped.

    `hidden_size` H, `vocabulary` V, `head_sha256` of the head's bytes. Several threads may read.
    """

    def __init__(
        self,
        files: Checkpoint,
        conditions: Conditions,
        windows: tuple[Window, ...],
        starts: NDArray[np.int64],
        document: Mapping[str, object],
    ) -> None:
        self.path = files.path
        self.conditions = conditions
        self.windows = windows
        self.head_sha256 = str(document["head_sha256"])
        self.hidden_size = _count(document, "hidden_size", str(files.path))
        self.vocabulary = _count(document, "vocabulary", str(files.path))
        self._files = files
        self._starts = starts
        self._described = _described(document, str(files.path))

    @classmethod
    def open(cls, path: Path) -> Pack:
        """Check every rule of the pack but for the bytes of `hidden` and `head` (`verify` does).

        Raises CheckpointError for files that break their format, EvaluationError for a pack whose
        parts do not belong together.
        """
        path = Path(path)
        files = Checkpoint.open(path)
        where = str(path / PACK_JSON)
        if not os.path.lexists(path / PACK_JSON):
            raise EvaluationError(
                f"{path}: has no {PACK_JSON}, so it is no reference pack; `nybble reference` makes "
                "one"
            )
        document = parse_json(read_small(path, PACK_JSON), where)
        if document.get("schema") != SCHEMA:
            raise EvaluationError(
                f"{where}: schema {show(document.get('schema'))}, expected {SCHEMA!r}"
            )
        if document.keys() != {"schema", *_FACTS}:
            raise EvaluationError(f"{where}: keys {show(sorted(document))}, expected {_FACTS}")
        conditions = parse_conditions(document["conditions"], where)
        _check_files(files, _described(document, where))
        _check_shapes(files, document, where)
        starts, windows = _read_windows(files, document, where)
        if (len(windows), count_scored(windows)) != (conditions.windows, conditions.scored):
            raise EvaluationError(f"{where}: conditions and windows disagree; the file is damaged")
        return cls(files, conditions, windows, starts, document)

    @property
    def has_head(self) -> bool:
        """Whether the output head came along."""
        return "head" in self._files.tensors

    def hidden(self, window: int) -> BF16Array:
        """Final normed hidden states of one window, BF16 [length, H], a view of the mapped file."""
        rows = slice(int(self._starts[window]), int(self._starts[window + 1]))
        return self._files.array("hidden")[rows]

    def drop_pages(self, window: int) -> None:
        """Take a window's hidden states out of resident memory; views stay valid."""
        width = 2 * self.hidden_size
        begin, end = int(self._starts[window]) * width, int(self._starts[window + 1]) * width
        self._files.drop_pages("hidden", begin, end)

    def head(self) -> BF16Array:
        """The output head, BF16 [V, H], a view of the mapped file.

        Raises EvaluationError if the pack has none.
        """
        if not self.has_head:
            raise EvaluationError(
                f"{self.path}: this pack came without the output head; name a folder that has it "
                "with --head PATH"
            )
        return self._files.array("head")

    def check_head(self, head: BF16Array | U16Array) -> None:
        """Refuse a head from elsewhere that is not the one this pack was made with.

        Raises EvaluationError. Reads all of it.
        """
        bits = _bits(head, "the head")
        expected = (self.vocabulary, self.hidden_size)
        if bits.shape != expected or _hash(bits) != self.head_sha256:
            raise EvaluationError(
                f"{self.path}: made with a head {list(expected)} of sha256 {self.head_sha256}; the "
                f"one given is {list(bits.shape)} and not the same; give the reference model's"
            )

    def verify(self) -> None:
        """Read all data and hold them to their hashes. Raises EvaluationError."""
        for name, described in self._described.items():
            infos = [i for i in self._files.tensors.values() if i.file == name]
            _check_data(self._files, infos, described)

    def close(self) -> None:
        """Give up the maps; views already handed out stay valid."""
        self._files.close()

    def __enter__(self) -> Pack:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _count(document: Mapping[str, object], key: str, where: str) -> int:
    value = document[key]
    if type(value) is not int or not 0 < value <= SIZE_LIMIT:
        raise EvaluationError(f"{where}: {key!r} must be a positive integer, found {show(value)}")
    return value


def _described(document: Mapping[str, object], where: str) -> dict[str, PackFile]:
    entries = document["files"]
    known = ({HIDDEN, TOKENS}, {HIDDEN, TOKENS, HEAD})
    if not isinstance(entries, dict) or entries.keys() not in known:
        raise EvaluationError(f"{where}: files {show(entries)}, expected {sorted(known[1])}")
    found = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "header_sha256", "data_sha256"}:
            raise EvaluationError(f"{where}: file {name!r} is described by {show(entry)}")
        hashes = str(entry["header_sha256"]), str(entry["data_sha256"])
        found[name] = PackFile(_count(entry, "bytes", where), *hashes)
    return found


def _check_files(files: Checkpoint, described: Mapping[str, PackFile]) -> None:
    shards = {shard.name: shard for shard in files.shards}
    if shards.keys() != described.keys():
        raise EvaluationError(
            f"{files.path}: holds {sorted(shards)}, {PACK_JSON} says {sorted(described)}; the "
            "pack is incomplete, or files of another one were added"
        )
    for name, file in described.items():
        shard = shards[name]
        found, expected = (shard.size, shard.header_sha256), (file.nbytes, file.header_sha256)
        if found != expected:
            raise EvaluationError(
                f"{files.path / name}: {found[0]} bytes with a header of sha256 {found[1]}; "
                f"{PACK_JSON} says {expected[0]} and {show(expected[1])}; the files are of "
                "different packs, or damaged"
            )


def _check_shapes(files: Checkpoint, document: Mapping[str, object], where: str) -> None:
    rows, width, vocabulary, windows = (
        _count(document, key, where) for key in ("tokens", "hidden_size", "vocabulary", "windows")
    )
    expected = {
        "hidden": (HIDDEN, "BF16", (rows, width)),
        "starts": (TOKENS, "I64", (windows + 1,)),
        "origins": (TOKENS, "I64", (windows,)),
        "tokens": (TOKENS, "I32", (rows,)),
        "first_scored": (TOKENS, "I32", (windows,)),
    }
    if any(shard.name == HEAD for shard in files.shards):
        expected["head"] = (HEAD, "BF16", (vocabulary, width))
    found = {i.name: (i.file, i.dtype, i.shape) for i in files.tensors.values()}
    if found != expected:
        name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise EvaluationError(
            f"{files.path}: tensor {name!r} is {show(found.get(name))}, expected "
            f"{expected.get(name)}; the files are of different packs, or damaged"
        )


def _read_windows(
    files: Checkpoint, document: Mapping[str, object], where: str
) -> tuple[NDArray[np.int64], tuple[Window, ...]]:
    infos = [i for i in files.tensors.values() if i.file == TOKENS]
    _check_data(files, infos, _described(document, where)[TOKENS])
    starts, origins, tokens, first = (
        files.array(n).astype(np.int64) for n in ("starts", "origins", "tokens", "first_scored")
    )
    lengths = np.diff(starts)
    is_right = (
        starts[0] == 0
        and starts[-1] == len(tokens)
        and (lengths > 1).all()
        and (first > 0).all()
        and (first < lengths).all()
        and (tokens >= 0).all()
        and (tokens < _count(document, "vocabulary", where)).all()
    )
    if not is_right:
        raise EvaluationError(
            f"{files.path / TOKENS}: windows that overlap, are empty, or hold ids beyond the "
            "vocabulary; the pack is damaged"
        )
    return starts, tuple(
        Window(tokens[starts[i] : starts[i + 1]], int(first[i]), int(origins[i]))
        for i in range(len(origins))
    )


def _check_data(files: Checkpoint, infos: Sequence[TensorInfo], described: PackFile) -> None:
    digest = hashlib.sha256()
    for info in infos:  # in the order of their offsets
        for at in range(0, info.nbytes, _SLAB_BYTES):
            digest.update(files.raw(info.name)[at : at + _SLAB_BYTES].data)
            files.drop_pages(info.name, at, at + _SLAB_BYTES)
    if digest.hexdigest() != described.data_sha256:
        raise EvaluationError(
            f"{files.path / infos[0].file}: data of sha256 {digest.hexdigest()}, {PACK_JSON} says "
            f"{show(described.data_sha256)}; the file is damaged: copy it again"
        )
