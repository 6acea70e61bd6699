"""Made-up measurements of inputs, in place of a forward pass."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from nybble.calibrate.scales import InputAmax
from nybble.plan.plan import Plan
from nybble.plan.recipe import parse_recipe
from nybble.progress import Progress

#: Everything at once: W4A4 and static FP8, experts of both projections, fused groups, lm_head.
MIXED = parse_recipe(
    "mixed",
    '[[rule]]\nroles = ["routed_expert", "shared_expert", "lm_head"]\nscheme = "nvfp4-w4a4"\n'
    '[[rule]]\nroles = ["attention", "linear_attention"]\nscheme = "fp8-static"\n',
)


def modules_of(plan: Plan) -> list[str]:
    return [m.module for j in plan.jobs if j.scheme.needs_input_scale for m in j.members]


def made_up(plan: Plan) -> InputAmax:
    """Some magnitude and some tokens for every module, by its name; fused members differ."""
    modules = modules_of(plan)
    sizes = {m: float(np.float32(0.1 + zlib.crc32(m.encode()) % 997 / 7)) for m in modules}
    return InputAmax(sizes, dict.fromkeys(modules, 11), 77)


class Pass:
    """A measurement that counts its calls."""

    def __init__(self, **changed: float) -> None:
        self.calls = 0
        self.changed = changed

    def __call__(self, plan: Plan, progress: Progress) -> InputAmax:
        self.calls += 1
        found = made_up(plan)
        return replace(found, amax={**found.amax, **self.changed})


def without(measured: InputAmax, *modules: str, tokens: int | None = None) -> InputAmax:
    """The measurement as if these modules had seen nothing, or `tokens` tokens of what they saw."""
    amax, seen = dict(measured.amax), dict(measured.tokens)
    for module in modules:
        if tokens is None:
            del amax[module], seen[module]
        else:
            seen[module] = tokens
    return InputAmax(amax, seen, measured.total_tokens)
