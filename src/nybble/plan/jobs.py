"""What a plan is made of: matrices, the jobs that do them together, and copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo, TensorSpec
from nybble.formats.block import Shape
from nybble.formats.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Member:
    """One matrix [N, K] of the source and the module it becomes.

    `source` is the tensor's name, `expert` its place in a stack [E, rows, K] or None, `first_row`
    where it begins.
    """

    module: str
    source: str
    expert: int | None
    first_row: int
    shape: Shape

    def matrix(self, checkpoint: Checkpoint) -> NDArray[np.generic]:
        """Its rows in the mapped source, [N, K]."""
        array = checkpoint.array(self.source)
        if self.expert is not None:
            array = array[self.expert]
        return array[self.first_row : self.first_row + self.shape[0]]


@dataclass(frozen=True, slots=True)
class Job:
    """The members of one fused group (or one lone matrix): they share a tensor scale and are done
    together."""

    name: str
    role: str
    scheme: Scheme
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class KvScale:
    """A scalar that belongs to no weight: the scale of a layer's keys or values in an FP8 cache."""

    layer: int
    is_key: bool
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that goes over byte for byte."""

    tensor: TensorInfo
    role: str
