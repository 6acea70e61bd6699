"""How network kernels compute: the precision of matmul operands, the threads, and whether a call is
made or written down.

Activations are float32 everywhere between kernels. Only where a kernel multiplies matrices does a
precision matter: "bf16" rounds the activation to BF16 as it is packed (products and sums stay
float32), "f32" does not round at all, "int8" rounds the input of four-bit weights to INT8 with a
scale per 16 elements (other weights take BF16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nybble.kernels.dispatch import default_threads

Precision = Literal["bf16", "f32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "f32", "int8")


class Recorder(Protocol):
    """Who writes calls of kernels down instead of making them: `program.Program`."""

    def record(self, name: str, signature: str, values: Sequence[int | float | None]) -> None:
        """One call; `signature` as in `calls.Kernel`."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory for a result of a recorded call: a tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Compute:
    """What every network kernel is told. With a `program`, kernels check shapes, take their
    results' memory from it and record the call; nothing is computed."""

    precision: Precision = "bf16"
    threads: int = field(default_factory=default_threads)
    program: Recorder | None = field(default=None, compare=False, repr=False)
