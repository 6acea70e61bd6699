"""Files that tasks read and leave their results in: on a filesystem that all who do them see.

Bare float32, row by row; what a file holds is said by who names it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import CheckpointError

#: The folders, below that of a run's hidden states, that files of tasks lie in.
Kind = Literal["shards", "dense", "experts"]


@dataclass(frozen=True, slots=True)
class Mapped:
    """A float32 matrix in a file."""

    path: Path
    shape: tuple[int, int]

    def open(self) -> NDArray[np.float32]:
        """The matrix, mapped: pages that the system takes back at will. Raises CheckpointError for
        a file that is gone or too short."""
        if not self.shape[0]:
            return np.empty(self.shape, np.float32)
        try:
            return np.memmap(self.path, np.float32, "r", shape=self.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read as a matrix of {self.shape[0]:,} x {self.shape[1]:,}:"
                f" {error}; all who do tasks must see the same files"
            ) from error

    def read(self) -> Tensor:
        """The matrix, in memory of its own."""
        return torch.from_numpy(np.array(self.open()))


@contextmanager
def scratch_folder(spill: Path, kind: Kind) -> Iterator[Path]:
    """A folder for the files of one layer's tasks, gone afterwards; its absolute path. Raises
    CheckpointError where it cannot be made."""
    scratch = spill.absolute() / kind
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(scratch, error) from error
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_scratch(spill: Path) -> None:
    """Delete what a run that was killed left there."""
    for kind in get_args(Kind):
        shutil.rmtree(spill / kind, ignore_errors=True)


def append(file: Path, rows: Tensor) -> None:
    """Write rows behind those that are there. The folder is made if need be, in one that is there:
    a task that outlived its run fails. Raises CheckpointError where that cannot be."""
    try:
        file.parent.mkdir(exist_ok=True)
        with file.open("ab") as opened:
            opened.write(rows.contiguous().numpy().data)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot hold what tasks read and leave: {error.strerror}; free space there, or "
        "name another folder"
    )
