"""`nybble diff`: what differs between two checkpoints."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from nybble.checkpoint.reader import Checkpoint
from nybble.progress import Progress
from nybble.rewrite.diff import Difference, compare
from nybble.rewrite.diff_tensors import Count, ModuleValues, Retyped, Values
from nybble.rewrite.diff_texts import Setting, Template


def diff(
    a: str | PathLike[str],
    b: str | PathLike[str],
    deep: bool = False,
    *,
    progress: Progress | None = None,
) -> Difference:
    """Compare two local checkpoint folders; with `deep` every byte of every tensor.

    Raises CheckpointError for a folder that holds headers without data.
    """
    with Checkpoint.open(Path(a)) as one, Checkpoint.open(Path(b)) as other:
        return compare(one, other, deep=deep, progress=progress)


__all__ = [
    "Count",
    "Difference",
    "ModuleValues",
    "Retyped",
    "Setting",
    "Template",
    "Values",
    "diff",
]
