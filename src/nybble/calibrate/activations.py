"""What an engine does to the inputs of a plan's linears before the matmul: how each is rounded.

Statistics for weights whose inputs are quantized too are made from inputs that are: the rounding's
own error is part of what the weights meet. Knows which module has which scheme and scale; the
arithmetic is `models.simulate`'s.

Source: the engines' behaviour as docs/formats.md has it; ModelOpt collects GPTQ's Hessians from
quantized inputs as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass

from torch import Tensor

from nybble.errors import RecipeError
from nybble.formats.scheme import Activation
from nybble.models.simulate import fake_quantize
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class InputRounding:
    """How one module's input is quantized: its format, and the stored scale where it has one."""

    activation: Activation
    scale: float | None


class QuantizedInputs:
    """The rounding of every module of a plan whose scheme quantizes its input.

    A `statistics.Rounding`: called with the modules that share an input, and that input.
    """

    def __init__(self, plan: Plan, input_scales: Mapping[str, float] | None = None) -> None:
        """`input_scales` by module, of every scheme that stores one.

        Raises RecipeError, naming the module, for one that is missing: rounding with a made-up
        scale would fit the weights to inputs that no engine makes.
        """
        scales = input_scales or {}
        self.by_module: dict[str, InputRounding] = {}
        for job in plan.jobs:
            activation = job.scheme.input
            if activation is None:
                continue
            for m in job.members:
                if activation.has_input_scale and m.module not in scales:
                    raise RecipeError(
                        f"{m.module}: {job.scheme} rounds its input by a measured scale, and none "
                        "is given; measure the inputs before the weights are calibrated"
                    )
                scale = scales[m.module] if activation.has_input_scale else None
                self.by_module[m.module] = InputRounding(activation, scale)

    def only(self, jobs: Iterable[Job]) -> QuantizedInputs:
        """The same for the modules of these jobs: what is sent to others should be small."""
        found = copy(self)
        modules = [m.module for job in jobs for m in job.members]
        found.by_module = {m: self.by_module[m] for m in modules if m in self.by_module}
        return found

    def of(self, module: str) -> InputRounding | None:
        """How this module's input is rounded; None: it is not."""
        return self.by_module.get(module)

    def __call__(self, modules: tuple[str, ...], x: Tensor) -> Tensor:
        """x float32 [M, K] as an engine's matmul reads it; `x` itself where it is not rounded.

        Engines give fused modules one scale, the largest.
        """
        found = [r for m in modules if (r := self.by_module.get(m)) is not None]
        if not found:
            return x
        largest = max((r.scale for r in found if r.scale is not None), default=None)
        return fake_quantize(x, found[0].activation, largest, modules[0])
