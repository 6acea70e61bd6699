"""Schemes: the formats of a module's weight and of its input. One row of `SCHEMES` per scheme.

A scheme says what a layout must declare and what an engine will run; it knows neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.formats.element import E2M1, E4M3, ElementFormat


@dataclass(frozen=True, slots=True)
class Activation:
    """How a module's input is quantized.

    `granularity` is what shares a scale: "tensor", "token", or a group size along K as text ("16").
    `has_input_scale`: a measured scale per module is stored in the checkpoint (the tensor scale of
    NVFP4 activations, whose block scales are made at run time, or the scale of static FP8).
    """

    element: ElementFormat
    granularity: str
    has_input_scale: bool


@dataclass(frozen=True, slots=True)
class Scheme:
    """The weight's block format and the input's format; None leaves that side in BF16."""

    name: str
    weight: BlockFormat | None
    input: Activation | None

    def __reduce__(self) -> tuple[Callable[[str], Scheme], tuple[str]]:
        return _scheme, (self.name,)  # compared by identity: another process takes its own

    def __str__(self) -> str:
        return self.name

    @property
    def needs_input_scale(self) -> bool:
        """A measured `input_scale` belongs in the checkpoint; none is written without it."""
        return self.input is not None and self.input.has_input_scale

    @property
    def activation(self) -> str:
        """Short text for tables: "BF16", "FP4", "FP8 static", "FP8 dynamic"."""
        if self.input is None:
            return "BF16"
        if self.input.element is E2M1:
            return "FP4"
        return "FP8 static" if self.input.has_input_scale else "FP8 dynamic"


BF16 = Scheme("bf16", None, None)
NVFP4_W4A16 = Scheme("nvfp4-w4a16", NVFP4, None)
NVFP4_W4A4 = Scheme("nvfp4-w4a4", NVFP4, Activation(E2M1, "16", has_input_scale=True))
MXFP4_W4A16 = Scheme("mxfp4-w4a16", MXFP4, None)
FP8_STATIC = Scheme("fp8-static", FP8, Activation(E4M3, "tensor", has_input_scale=True))
FP8_DYNAMIC = Scheme("fp8-dynamic", FP8_CHANNEL, Activation(E4M3, "token", has_input_scale=False))
FP8_BLOCK_DYNAMIC = Scheme("fp8-block", FP8_BLOCK, Activation(E4M3, "128", has_input_scale=False))

SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        BF16,
        NVFP4_W4A16,
        NVFP4_W4A4,
        MXFP4_W4A16,
        FP8_STATIC,
        FP8_DYNAMIC,
        FP8_BLOCK_DYNAMIC,
    )
}


def _scheme(name: str) -> Scheme:
    return SCHEMES[name]
