"""A conversion: what every tensor of a checkpoint becomes, decided before anything is written.

Every tensor of the source is moved, restated, decoded or dropped with a reason; there is no other
way out. Small scales are restated here already, so that what a foreign scale rounds is known, and
can be refused, beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo, TensorSpec
from nybble.errors import CheckpointError
from nybble.rewrite.held import Weight

TARGETS = ("modelopt", "compressed-tensors", "bf16")


@dataclass(frozen=True, slots=True)
class Move:
    """A tensor whose bytes go over as they are, perhaps under another name."""

    source: TensorInfo
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Restated:
    """Scales in the target's convention: `value` is what it stores, None without data to read."""

    source: TensorInfo
    spec: TensorSpec
    value: NDArray[np.generic] | None


@dataclass(frozen=True, slots=True)
class Decoded:
    """A matrix that becomes BF16: all of the tensor `name`, or its rows from `first_row` on.

    `source` is the quantized matrix, or a plain one that a stack takes in.
    """

    source: Weight | TensorInfo
    name: str
    first_row: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor that the target has no place for, and why nothing is lost with it."""

    source: TensorInfo
    why: str


@dataclass(frozen=True, slots=True)
class Rounding:
    """A scale that the target cannot state exactly, as multipliers; of many, the worst one.

    `part` is "tensor_scale", "input_scale" or "kv_scale"; `scales` counts those that differ.
    """

    name: str
    part: str
    before: float
    after: float
    scales: int = 1

    def as_json(self) -> dict[str, object]:
        """One entry of `roundings`."""
        return {
            "name": self.name,
            "part": self.part,
            "before": self.before,
            "after": self.after,
            "scales": self.scales,
        }


@dataclass(frozen=True, repr=False)
class Conversion:
    """What will happen. `inexact` says what `exact` would refuse, in words, without naming all."""

    source: Checkpoint
    held_layout: str
    target: str
    weights: tuple[Weight, ...]
    outputs: tuple[TensorSpec, ...]
    moves: tuple[Move, ...]
    restated: tuple[Restated, ...]
    decoded: tuple[Decoded, ...]
    dropped: tuple[Dropped, ...]
    roundings: tuple[Rounding, ...]
    may_round: tuple[str, ...]  # matrices whose products BF16 may not hold
    notes: tuple[str, ...]
    documents: Mapping[str, bytes]
    total_parameters: int
    payload_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "payload_bytes", sum(spec.nbytes for spec in self.outputs))

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(t.nbytes for t in self.source.tensors.values())

    @property
    def renamed(self) -> list[tuple[TensorInfo, TensorSpec]]:
        """Tensors that keep their content and get another name."""
        return [(old, new) for old, new in self._pairs() if old.name != new.name]

    @property
    def retyped(self) -> list[tuple[TensorInfo, TensorSpec]]:
        """Tensors that are of another dtype or shape."""
        pairs = self._pairs()
        return [(a, b) for a, b in pairs if (a.dtype, a.shape) != (b.dtype, b.shape)]

    def _pairs(self) -> Iterable[tuple[TensorInfo, TensorSpec]]:
        yield from ((move.source, move.spec) for move in self.moves)
        yield from ((restated.source, restated.spec) for restated in self.restated)

    def check_complete(self) -> None:
        """Raise CheckpointError unless every tensor of the source has its place exactly once."""
        seen: dict[str, int] = {}
        for name in self._taken():
            seen[name] = seen.get(name, 0) + 1
        absent = [n for n in self.source.tensors if n not in seen]
        twice = [n for n, count in seen.items() if count > 1]
        for names, fault in ((absent, "has no place in the result"), (twice, "has two places")):
            if names:
                raise CheckpointError(
                    f"{self.source.path}: {names[0]!r} {fault}, as have {len(names) - 1} others; "
                    "nothing is dropped or guessed, so nothing was written: please report it"
                )

    def _taken(self) -> Iterable[str]:
        dropped = {each.source.name for each in self.dropped}
        yield from dropped
        yield from (source.name for source, _ in self._pairs())
        for decoded in self.decoded:
            if isinstance(decoded.source, TensorInfo):
                yield decoded.source.name
            else:
                yield from (t.name for t in decoded.source.tensors if t.name not in dropped)
