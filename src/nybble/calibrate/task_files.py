"""Files that tasks read and leave their results in: on a filesystem that all who do them see.

Bare float32, row by row; what a file holds is said by who names it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Mapped:
    """A float32 matrix in a file."""

    path: Path
    shape: tuple[int, int]

    def open(self) -> NDArray[np.float32]:
        """The matrix, mapped: pages that the system takes back at will."""
        if not self.shape[0]:
            return np.empty(self.shape, np.float32)
        return np.memmap(self.path, np.float32, "r", shape=self.shape)

    def read(self) -> Tensor:
        """The matrix, in memory of its own."""
        return torch.from_numpy(np.array(self.open()))


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder for the files of one layer, gone afterwards; its absolute path."""
    scratch = folder.absolute()
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def append(file: Path, rows: Tensor) -> None:
    """Write rows behind those that are there. Raises CheckpointError where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as opened:
            opened.write(rows.contiguous().numpy().data)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot hold what tasks read: {error.strerror}; free space there, or "
            "name another folder"
        ) from error
