"""A checkpoint folder in memory, to plant a defect into; numpy, ml_dtypes and the standard library.

Reads and writes safetensors itself, without nybble: what the checker is tested with must not come
out of the checker's own reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Folder:
    """Tensors by name, the shard each lies in, and every other file as bytes.

    Change `tensors`, `shard_of` and `files` at will; `write` makes a consistent folder of them,
    with an index where the folder read had one. What must be inconsistent is done after writing, by
    `Defect.after`.
    """

    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    shard_of: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    has_index: bool = True

    @classmethod
    def read(cls, path: Path) -> Folder:
        folder = cls(has_index=(path / INDEX).exists())
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_dir() or name == INDEX:
                continue
            if not name.endswith(".safetensors"):
                folder.files[name] = file.read_bytes()
                continue
            for tensor, values in read_shard(file).items():
                folder.tensors[tensor] = values
                folder.shard_of[tensor] = name
        return folder

    def write(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        usual = next(iter(self.shard_of.values()), "model.safetensors")
        shards: dict[str, dict[str, NDArray[Any]]] = {}
        for name, values in self.tensors.items():
            shards.setdefault(self.shard_of.get(name, usual), {})[name] = values
        for shard, tensors in shards.items():
            write_shard(path / shard, tensors)
        if self.has_index:
            weight_map = {n: self.shard_of.get(n, usual) for n in sorted(self.tensors)}
            total = sum(t.nbytes for t in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file, parsed; change it and give it back with `put`."""
        return json.loads(self.files[name])  # type: ignore[no-any-return]

    def put(self, name: str, document: object) -> None:
        """Write a JSON file."""
        self.files[name] = (json.dumps(document, indent=2) + "\n").encode()

    def matching(self, pattern: str) -> list[str]:
        """Names of the tensors that a regular expression finds, in order."""
        return [name for name in self.tensors if re.search(pattern, name)]

    def drop(self, pattern: str) -> list[str]:
        """Take out the tensors that a regular expression finds; at least one, or it is an error."""
        names = self.matching(pattern)
        if not names:
            raise ValueError(f"no tensor matches {pattern!r}")
        for name in names:
            del self.tensors[name]
            self.shard_of.pop(name, None)
        return names

    def rename(self, pattern: str, to: str) -> None:
        """Rename by re.sub, tensors and their shards; order is kept; at least one must change."""
        new = {re.sub(pattern, to, name): values for name, values in self.tensors.items()}
        if new.keys() == self.tensors.keys():
            raise ValueError(f"no tensor matches {pattern!r}")
        self.shard_of = {re.sub(pattern, to, n): s for n, s in self.shard_of.items()}
        self.tensors = new


@dataclass(frozen=True)
class Defect:
    """One planted defect.

    `rule` is the id that must fire; `base` a folder of `zoo/clean`; `origin` "planted", "tool: what
    made it", or "thread: address". `plant` changes the folder before it is written, `after` the
    written one. `also` are ids of other rules that may fire at error or warning level, because one
    fault shows in several ways. `source` names the clean folder to give as --source, "" for none.
    `engine` and `tensor_parallel` are what to give as --engine and --tp. `repaired`: `nybble
    repair` mends it. `deep`: found only with --deep. `clean` is the folder of `zoo/clean` on which
    the rule must be silent, asked in the same way: `base` if "", which a real tool's faulty output
    cannot be. `severity` is that of the finding: the rule's own if "".
    """

    name: str
    rule: str
    base: str
    summary: str
    plant: Callable[[Folder], None] | None = None
    after: Callable[[Path], None] | None = None
    origin: str = "planted"
    also: tuple[str, ...] = ()
    source: str = ""
    engine: str = ""
    tensor_parallel: int = 0
    repaired: bool = False
    deep: bool = False
    clean: str = ""
    severity: str = ""

    @property
    def twin(self) -> str:
        """The folder of `zoo/clean` that the defect is to be told from."""
        return self.clean or self.base


def read_shard(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of a sound safetensors file, in data order; copies, so that they can be changed."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + length + at for at in entry["data_offsets"])
        values = np.frombuffer(data[begin:end], dtype=DTYPES[entry["dtype"]])
        out[name] = values.reshape(entry["shape"]).copy()
    return out


def write_shard(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """A safetensors file: wide dtypes first, so that every tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    for name, values in ordered:
        header[name] = {
            "dtype": SPELLED[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [at, at + values.nbytes],
        }
        at += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in ordered:
            file.write(np.ascontiguousarray(values).tobytes())
