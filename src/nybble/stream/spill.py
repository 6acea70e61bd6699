"""Hidden states of all windows: in memory, or in files that a later run can go on from.

On disk there are two generations, before and after the layer being computed, and a record of the
last layer that is complete: an interruption costs that layer's work and nothing else. Until the
next layer writes, the generation before the last is whole too, and one may go back to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nybble.errors import CheckpointError

_RECORD = "stream.json"
_FILES = ("hidden-0.f32", "hidden-1.f32")


class HiddenStates(Protocol):
    """The hidden states of all windows, float32, a row a token."""

    @property
    def done(self) -> int:
        """Layers that are complete; -1 before the embedding."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as the last complete layer left them."""
        ...

    def write(self, start: int, rows: Tensor) -> None:
        """Rows of the layer being computed."""
        ...

    def complete(self, layer: int) -> None:
        """All rows of this layer are written."""
        ...

    def rewind(self, layer: int) -> bool:
        """Go back to the inputs of `layer`; False, and nothing changed, where they are gone."""
        ...


class InMemory:
    """One tensor; rows are replaced in place, for a layer reads only the rows it writes."""

    def __init__(self, tokens: int, width: int) -> None:
        self.rows = torch.empty((tokens, width))
        self.done = -1

    def read(self, start: int, stop: int) -> Tensor:
        """See HiddenStates."""
        return self.rows[start:stop]

    def write(self, start: int, rows: Tensor) -> None:
        """See HiddenStates."""
        self.rows[start : start + len(rows)] = rows

    def complete(self, layer: int) -> None:
        """See HiddenStates."""
        self.done = layer

    def rewind(self, layer: int) -> bool:
        """See HiddenStates: rows were replaced in place, so only the embedding can be redone."""
        if layer == self.done:
            return True
        if layer != -1:
            return False
        self.done = -1
        return True


class OnDisk:
    """Two files in a folder, and a record that names the run and the layer they are from."""

    def __init__(self, folder: Path, tokens: int, width: int, run: str) -> None:
        """`run` identifies model, text and settings: a folder of another run is refused.

        Raises CheckpointError for that, and for a folder that cannot be written.
        """
        self.folder, self.run = folder, run
        self.shape = (tokens, width)
        self.done = -1
        self.has_older = False  # the generation before `done` is whole
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._resume()
            self.files = [self._open(i) for i in range(2)]
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot hold {8 * tokens * width / 2**30:.2f} GiB of hidden states: "
                f"{error.strerror}; name an output or a --spill folder on a disk with room"
            ) from error

    def _resume(self) -> None:
        record = self.folder / _RECORD
        if not record.exists():
            return
        try:
            found = json.loads(record.read_text("utf-8"))
            run, done = str(found["run"]), int(found["done"])
            has_older = bool(found["has_older"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{record}: is damaged ({error}); remove the folder") from error
        if run != self.run:
            raise CheckpointError(
                f"{self.folder}: holds the hidden states of another run (other model, text or "
                "settings); name another folder or remove this one"
            )
        self.done, self.has_older = done, has_older

    def _open(self, i: int) -> np.memmap[tuple[int, int], np.dtype[np.float32]]:
        file = self.folder / _FILES[i]
        nbytes = int(np.prod(self.shape, dtype=np.int64)) * 4
        if not file.exists() or file.stat().st_size != nbytes:
            if self.done >= 0 and (self.done % 2 == i or self.has_older):
                raise CheckpointError(f"{file}: is not what its record says; remove {self.folder}")
            with file.open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, max(nbytes, 1))
            os.truncate(file, nbytes)
        return np.memmap(file, dtype=np.float32, mode="r+", shape=self.shape)

    @property
    def file(self) -> Path:
        """Where the rows are that the last complete layer left: float32, flushed."""
        return self.folder.absolute() / _FILES[self.done % 2]

    def read(self, start: int, stop: int) -> Tensor:
        """See HiddenStates."""
        return torch.from_numpy(np.array(self.files[self.done % 2][start:stop]))

    def write(self, start: int, rows: Tensor) -> None:
        """See HiddenStates."""
        if self.has_older:  # no longer: said before the first row goes over it
            self._record(self.done, has_older=False)
        self.files[(self.done + 1) % 2][start : start + len(rows)] = rows.numpy()

    def complete(self, layer: int) -> None:
        """Flush, then record: what the record names is on disk."""
        assert layer == self.done + 1
        self.files[layer % 2].flush()
        self._record(layer, has_older=layer > 0)

    def rewind(self, layer: int) -> bool:
        """See HiddenStates; -1 is before the embedding, and always there."""
        if layer == self.done:
            return True
        if layer != -1 and not (self.has_older and layer == self.done - 1):
            return False
        self._record(layer, has_older=False)
        return True

    def _record(self, done: int, *, has_older: bool) -> None:
        record = self.folder / (_RECORD + ".new")
        try:
            with record.open("w", encoding="utf-8") as file:
                json.dump({"run": self.run, "done": done, "has_older": has_older}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(record, self.folder / _RECORD)
        except OSError as error:
            raise CheckpointError(
                f"{record}: cannot be written: {error.strerror}; free space on its disk, then go "
                "on with the same run"
            ) from error
        self.done, self.has_older = done, has_older

    def remove(self) -> None:
        """Delete the files; the folder too where nothing else is in it."""
        self.files = []
        remove_spill(self.folder)


def remove_spill(folder: Path) -> None:
    """Delete the files of hidden states in a folder; the folder too where nothing else is in it."""
    for name in (*_FILES, _RECORD, _RECORD + ".new"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def offsets(lengths: Sequence[int]) -> list[int]:
    """Where each window's rows begin, and the end of the last."""
    found = [0]
    for length in lengths:
        found.append(found[-1] + length)
    return found
