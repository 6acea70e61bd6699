"""How network kernels compute: the precision of matmul operands, and the threads.

Activations are float32 everywhere between kernels. Only where a kernel multiplies matrices does a
precision matter: "bf16" rounds the activation to BF16 as it is packed (products and sums stay
float32), "f32" does not round at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nybble.kernels.dispatch import default_threads

Precision = Literal["bf16", "f32"]


@dataclass(frozen=True, slots=True)
class Compute:
    """What every network kernel is told."""

    precision: Precision = "bf16"
    threads: int = field(default_factory=default_threads)
