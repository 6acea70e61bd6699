"""A `Rounder` that takes finished NVFP4 tensors from another checkpoint of the same model, as they
are; whatever else a plan wants is made by the data-free search.

Knows no reason for either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from nybble.check.contents import CODES, SCALES, TENSOR_SCALES, is_divisor, read_contents
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError
from nybble.formats.block import NVFP4, Shape
from nybble.formats.tensor import BlockScaledTensor
from nybble.quantize.rounder import Unit

#: Side documents that go along: how the tensors were made.
_KEPT = ("report.json", "report.txt")


class Reuse:
    """The NVFP4 modules of the checkpoint in `folder`."""

    def __init__(self, folder: Path, documents: Mapping[str, bytes]) -> None:
        """`documents` are added to those that tell how `folder` was made."""
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        self.contents = read_contents(self.checkpoint, declaration_of(self.checkpoint))
        self._documents = dict(documents)

    def record(self) -> dict[str, object]:
        """See Rounder: which checkpoint."""
        return {"reused": self.checkpoint.fingerprint()}

    def order(self, work: Sequence[Unit]) -> list[Unit]:
        """See Rounder: as they come."""
        return list(work)

    def take(
        self, unit: Unit, commit: Callable[[], None]
    ) -> Mapping[str, BlockScaledTensor] | None:
        """See Rounder. Raises CheckpointError for a module that the other checkpoint lacks."""
        if any(job.scheme.weight is not NVFP4 for job in unit.jobs):
            return None
        return {m.module: self._tensor(m.module, m.shape) for job in unit.jobs for m in job.members}

    def documents(self) -> dict[str, bytes]:
        """See Rounder."""
        kept = {n: self.folder / n for n in _KEPT if (self.folder / n).is_file()}
        return {**{n: path.read_bytes() for n, path in kept.items()}, **self._documents}

    def close(self) -> None:
        """See Rounder: the other checkpoint is somebody else's to remove."""

    def _tensor(self, name: str, shape: Shape) -> BlockScaledTensor:
        module = self.contents.by_name.get(name)
        parts = (CODES, SCALES[:2], TENSOR_SCALES)
        found = [t for words in parts if module and (t := module.tensor(*words)) is not None]
        if module is None or module.kind.held != NVFP4.name or len(found) != len(parts):
            raise CheckpointError(
                f"{self.folder}: no NVFP4 tensors of {name}; it is not the checkpoint that the "
                "allocation was made with"
            )
        codes, scale, tensor_scale = found
        value = self.checkpoint.array(tensor_scale.name).astype(np.float32).reshape(())
        if is_divisor(tensor_scale):
            value = np.float32(1) / value
        return BlockScaledTensor(
            NVFP4,
            shape,
            self.checkpoint.array(codes.name).view(np.uint8),
            self.checkpoint.array(scale.name).view(np.uint8),
            np.asarray(value, dtype=np.float32),
        )

    def __enter__(self) -> Reuse:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give its mappings up."""
        self.checkpoint.__exit__(kind, error, trace)
