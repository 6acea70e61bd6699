"""Matmuls of a model: fused linears and stacks of experts, run from the mapped packed weights.

Statistics and activation quantization are arguments of the call (`Mode`), never hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nybble.formats.scheme import Activation
from nybble.kernels.block_matmul import Prepared, matmul
from nybble.kernels.compute import Compute, Precision
from nybble.kernels.expert_matmul import PreparedExperts, expert_matmul
from nybble.models.simulate import fake_quantize

#: Routers and gates decide; their matmuls are small and never rounded.
EXACT: Precision = "f32"


class Observer(Protocol):
    """Who measures the inputs of linears: a statistic of the calibration."""

    def linear(self, modules: tuple[str, ...], x: Tensor) -> None:
        """The input float32 [M, K] that these modules share."""
        ...

    def experts(self, modules: Sequence[tuple[str, ...]], x: Tensor, counts: Tensor) -> None:
        """Inputs [M, K] sorted by expert, `counts` int64 [E] rows each; modules of each expert."""
        ...


@dataclass(frozen=True, slots=True)
class Mode:
    """How a forward is run: precision and threads, who measures, and whether the inputs of
    quantized linears are rounded as an engine would (`simulate`)."""

    compute: Compute = field(default_factory=Compute)
    observer: Observer | None = None
    simulate: bool = False

    @property
    def exact(self) -> Compute:
        """The same threads, nothing rounded."""
        return Compute(EXACT, self.compute.threads, self.compute.program)


@dataclass(frozen=True, slots=True)
class Linear:
    """Modules [N_i, K] that share their input, as one matmul; outputs side by side.

    `activation` and `input_scale` (a float32 scalar) are what the checkpoint declares of the input;
    None: left as it is.
    """

    modules: tuple[str, ...]
    weight: Prepared
    activation: Activation | None = None
    input_scale: float | None = None

    def __call__(self, x: Tensor, mode: Mode, *, is_exact: bool = False) -> Tensor:
        """x float32 [M, K] -> float32 [M, sum of N_i]."""
        if mode.observer is not None:
            mode.observer.linear(self.modules, x)
        if mode.simulate and self.activation is not None:
            x = fake_quantize(x, self.activation, self.input_scale, self.modules[0])
        return matmul(x, self.weight, mode.exact if is_exact else mode.compute)


@dataclass(frozen=True, slots=True)
class Experts:
    """One projection (or gate and up together) of all experts of a layer.

    `input_scales` is float32 [E] where the inputs of the experts have measured scales.
    """

    modules: tuple[tuple[str, ...], ...]
    weight: PreparedExperts
    activation: Activation | None = None
    input_scales: Tensor | None = None

    def __call__(self, x: Tensor, counts: Tensor, mode: Mode) -> Tensor:
        """x float32 [M, K] sorted by expert, counts int64 [E] -> float32 [M, N]."""
        if mode.observer is not None:
            mode.observer.experts(self.modules, x, counts)
        if mode.simulate and self.activation is not None:
            scales = None
            if self.input_scales is not None:
                scales = torch.repeat_interleave(self.input_scales, counts)
            x = fake_quantize(x, self.activation, scales, self.modules[0][0])
        return expert_matmul(x, counts, self.weight, mode.compute)
