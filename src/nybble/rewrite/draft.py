"""A checkpoint as it is to be: what each tensor and file will be made of, and every change so far.

Nothing is written here and nothing large is held: a tensor is a place in a file, or a function that
makes its bytes when they are wanted. Changes are made through the methods only, so the list of
changes is complete: what it does not name goes over byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import Contents, Module, read_contents
from nybble.check.survey import Survey
from nybble.checkpoint.declaration import Declaration
from nybble.checkpoint.dialects import read_declaration
from nybble.checkpoint.modelopt import CONFIG_FILE, dump
from nybble.checkpoint.reader import INDEX
from nybble.checkpoint.safetensors import DTYPES, TensorInfo
from nybble.errors import CheckpointError

U8Array = NDArray[np.uint8]
Make = Callable[[], U8Array]

_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
#: Bytes of a tensor that are read at a time.
PIECE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that the result has otherwise: `what` is "tensor" or "file", `action` "changed",
    "added", "dropped" or "renamed", `words` say from what to what."""

    rule: str
    what: str
    action: str
    name: str
    words: str
    old_name: str = ""

    def as_json(self) -> dict[str, object]:
        """One entry of `changes`."""
        entry: dict[str, object] = {
            "rule": self.rule,
            "what": self.what,
            "action": self.action,
            "name": self.name,
            "words": self.words,
        }
        return entry | ({"old_name": self.old_name} if self.old_name else {})


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the bytes of a tensor come from: a survey's file, or a function."""

    survey: Survey | None
    info: TensorInfo | None
    make: Make | None = None


class Draft:
    """The checkpoint to be. `tensors` and `config` are as read_contents wants them."""

    def __init__(self, survey: Survey, version: str) -> None:
        self.survey = survey
        self.version = version  # nybble's, for the configuration
        self.changes: list[Change] = []
        self.left: list[tuple[str, str]] = []  # (rule, why something is not mended)
        self.tensors: dict[str, TensorInfo] = {}
        self.origins: dict[str, Origin] = {}
        for name, info in survey.tensors.items():
            if survey.is_held(info):
                self.tensors[name] = info
                self.origins[name] = Origin(survey, info)
        self.cut_off = tuple(n for n in survey.tensors if n not in self.tensors)
        self.files: dict[str, tuple[Survey, str] | bytes] = {
            name: (survey, name) for name in survey.names if is_carried(name)
        }
        self._contents: Contents | None = None

    @property
    def config(self) -> Mapping[str, object]:
        return self.document("config.json")

    # ---------------------------------------------------------------------------------- what it is

    @property
    def contents(self) -> Contents:
        """The modules as they are to be."""
        if self._contents is None:
            nested = self.document(CONFIG_FILE) if CONFIG_FILE in self.files else None
            try:
                declaration = read_declaration(self.config, nested)
            except CheckpointError:  # a section that cannot be read declares nothing
                declaration = Declaration()
            self._contents = read_contents(self, declaration)
        return self._contents

    @property
    def quantized(self) -> Iterator[Module]:
        return (m for m in self.contents.modules if m.kind.is_quantized)

    def document(self, name: str) -> dict[str, object]:
        """A JSON file as it is to be, a copy; {} if there is none."""
        if name not in self.files:
            return {}
        value = json.loads(self.file_bytes(name))
        return value if isinstance(value, dict) else {}

    def file_bytes(self, name: str) -> bytes:
        """A side file as it is to be."""
        held = self.files[name]
        return held if isinstance(held, bytes) else held[0].files.read(held[1])

    def values(self, names: list[str]) -> list[NDArray[np.generic]]:
        """Small tensors as they are to be, in their dtypes and shapes."""
        plain = [n for n in names if self.origins[n].make is None]
        by_survey: dict[int, list[str]] = {}
        for n in plain:
            by_survey.setdefault(id(self.origins[n].survey), []).append(n)
        found: dict[str, NDArray[np.generic]] = {}
        for group in by_survey.values():
            survey = self.origins[group[0]].survey
            assert survey is not None
            infos = [i for n in group if (i := self.origins[n].info) is not None]
            for n, value in zip(group, survey.values(infos), strict=True):
                assert value is not None  # cut-off tensors are no part of a draft
                found[n] = value
        for n in names:
            if n not in found:
                info = self.tensors[n]
                found[n] = self.read(n).view(DTYPES[info.dtype]).reshape(info.shape)
        return [found[n] for n in names]

    def read(self, name: str) -> U8Array:
        """All bytes of a tensor as it is to be."""
        origin = self.origins[name]
        if origin.make is not None:
            return origin.make()
        assert origin.survey is not None
        assert origin.info is not None
        info = origin.info
        data = origin.survey.files.read(info.file, info.offset, info.nbytes)
        return np.frombuffer(data, dtype=np.uint8)

    def pieces(self, name: str) -> Iterator[tuple[int, bytes | U8Array]]:
        """(offset in the tensor, bytes), of at most PIECE_BYTES where it comes from a file."""
        origin = self.origins[name]
        if origin.make is not None:
            yield 0, origin.make()
            return
        assert origin.survey is not None
        assert origin.info is not None
        info = origin.info
        for at in range(0, max(info.nbytes, 1), PIECE_BYTES):
            length = min(PIECE_BYTES, info.nbytes - at)
            yield at, origin.survey.files.read(info.file, info.offset + at, length)

    # ------------------------------------------------------------------------------------- changes

    def set(self, rule: str, name: str, value: NDArray[np.generic], words: str) -> None:
        """Give a tensor a new value, the same or another dtype and shape; or add one."""
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self.set_later(rule, name, _SPELLED[value.dtype], value.shape, lambda: data, words)

    def set_later(
        self, rule: str, name: str, dtype: str, shape: tuple[int, ...], make: Make, words: str
    ) -> None:
        """The same for bytes that are made when they are wanted."""
        action = "changed" if name in self.tensors else "added"
        self.tensors[name] = TensorInfo(name, dtype, tuple(shape), "", 0)
        self.origins[name] = Origin(None, None, make)
        self._note(rule, "tensor", action, name, words)

    def take(self, rule: str, source: Survey, info: TensorInfo, words: str) -> None:
        """A tensor of another checkpoint, byte for byte."""
        if not source.is_held(info):
            _refuse(f"{source.where}: the tensor {info.name} is cut off; fetch the source again")
        action = "changed" if info.name in self.tensors else "added"
        self.tensors[info.name] = info
        self.origins[info.name] = Origin(source, info)
        self._note(rule, "tensor", action, info.name, words)

    def drop(self, rule: str, name: str, words: str) -> None:
        """Leave a tensor out."""
        del self.tensors[name], self.origins[name]
        self._note(rule, "tensor", "dropped", name, words)

    def rename(self, rule: str, renamed: Mapping[str, str], words: str) -> None:
        """Give tensors other names; their order stays."""
        new = [renamed.get(n, n) for n in self.tensors]
        if len(set(new)) < len(new):
            _refuse(f"{self.survey.where}: renaming would give two tensors one name")
        infos, origins = self.tensors, self.origins
        self.tensors, self.origins = {}, {}
        for old, name in zip(infos, new, strict=True):
            info = infos[old]
            self.tensors[name] = TensorInfo(name, info.dtype, info.shape, info.file, info.offset)
            self.origins[name] = origins[old]
            if name != old:
                self._note(rule, "tensor", "renamed", name, words, old)

    def put(self, rule: str, name: str, document: Mapping[str, object], words: str) -> None:
        """Write a JSON file; nothing happens if it says the same already."""
        if name not in self.files or self.document(name) != document:
            self.put_bytes(rule, name, dump(document), words)

    def put_bytes(self, rule: str, name: str, data: bytes, words: str) -> None:
        """Write a side file."""
        if name in self.files and self.file_bytes(name) == data:
            return
        action = "changed" if name in self.files else "added"
        self.files[name] = data
        self._note(rule, "file", action, name, words)

    def take_file(self, rule: str, source: Survey, name: str, words: str) -> None:
        """A side file of another checkpoint."""
        self.put_bytes(rule, name, source.files.read(name), words)

    def leave(self, rule: str, why: str) -> None:
        """Note what a mend saw and did not touch."""
        if (rule, why) not in self.left:
            self.left.append((rule, why))

    def drop_file(self, rule: str, name: str, words: str) -> None:
        """Leave a side file out; one that is never carried is noted all the same."""
        self.files.pop(name, None)
        self._note(rule, "file", "dropped", name, words)

    def _note(
        self, rule: str, what: str, action: str, name: str, words: str, old_name: str = ""
    ) -> None:
        self.changes.append(Change(rule, what, action, name, words, old_name))
        self._contents = None


def is_carried(name: str) -> bool:
    """Whether a side file goes over: weights and their index are written anew."""
    return not name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf")) and name != INDEX


def _refuse(message: str) -> NoReturn:
    raise CheckpointError(message)
