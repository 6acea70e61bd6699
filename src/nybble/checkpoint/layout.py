"""What a layout is: which tensors a quantized module becomes on disk, how scales are stored, what
the configs say.

A layout converts between the canonical form (value = code * scale * tensor_scale) and one
container's names and conventions. Divisors, 0-d against [1], BF16 scales: all of that lives here
and in the two layout files, nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.safetensors import TensorSpec
from nybble.formats.block import Shape
from nybble.formats.element import F32Array
from nybble.formats.scheme import Scheme

Part = Literal["codes", "scale", "tensor_scale", "input_scale"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a quantized module: `MODULE.suffix`, what part of the canonical form it holds,
    and its type."""

    suffix: str
    part: Part
    dtype: str
    shape: Shape

    def spec(self, module: str) -> TensorSpec:
        """The tensor of this leaf for one module."""
        return TensorSpec(f"{module}.{self.suffix}", self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of this leaf on disk."""
        return TensorSpec("", self.dtype, self.shape).nbytes


@dataclass(frozen=True, slots=True)
class Listing:
    """What a layout's configuration has to say about a checkpoint.

    `quantized` maps module paths to schemes; the experts of a layer stand as their container
    (`...mlp.experts`) where all have one scheme, and `expert_modules` then names one expert's
    projections below it ("0.gate_proj" ...). `plain` are the linear modules that stay in their own
    dtype, `others` whatever else has a matrix (embedding, MTP head, towers): no pattern may take
    them along. `kv_cache` is "fp8" or ""; `has_kv_scales`: its measured
    scales are in the file.
    """

    quantized: Mapping[str, Scheme]
    expert_modules: Mapping[str, Sequence[str]]
    plain: Sequence[str]
    plain_experts: Sequence[str]  # containers of experts that stay in their own dtype
    others: Sequence[str]
    has_mtp: bool
    has_vision: bool
    kv_cache: str
    version: str
    has_kv_scales: bool = False


class Layout(Protocol):
    """A container format that quantized checkpoints are written in."""

    @property
    def name(self) -> str:
        """The word on the command line."""
        ...

    @property
    def declares_kv_cache(self) -> bool:
        """Whether a KV cache format may be declared without scale tensors beside it."""
        ...

    def refusal(self, schemes: Sequence[Scheme]) -> str:
        """Why checkpoints with these schemes cannot be written so that engines read them; "" if
        they can."""
        ...

    def leaves(self, scheme: Scheme, shape: Shape) -> tuple[Leaf, ...]:
        """The tensors of a module of this scheme whose weight is [N, K]."""
        ...

    def kv_scales(self, attention: str) -> tuple[TensorSpec, TensorSpec]:
        """The tensors of an FP8 cache's scales for the attention module of this path: of its keys,
        of its values. Both multiply what is stored."""
        ...

    def round_scales(self, scales: F32Array) -> F32Array:
        """FP8 scales as this container can store them; codes must be made with these."""
        ...

    def store(self, leaf: Leaf, value: F32Array) -> NDArray[np.generic]:
        """The bytes of a float32 scale leaf in this container's convention (codes and block scales
        go as they are)."""
        ...

    def load(self, leaf: Leaf, stored: NDArray[np.generic]) -> F32Array:
        """The multiplying float32 scale of a scale leaf: undoes `store`."""
        ...

    def documents(self, config: Mapping[str, object], listing: Listing) -> dict[str, bytes]:
        """config.json with its quantization section, and whatever other files this container has
        beside it."""
        ...
