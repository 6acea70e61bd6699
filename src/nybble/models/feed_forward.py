"""The feed-forward half of a layer: a gated MLP, or routed experts with or without a shared one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.kernels.elementwise import silu_mul
from nybble.kernels.routing import Routing, combine, gather, route
from nybble.models.linear import Experts, Linear, Mode


@dataclass(frozen=True, slots=True)
class MLP:
    """down(silu(gate x) * up x); `gate_up` puts gate and up side by side."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor, mode: Mode) -> Tensor:
        """x float32 [T, H] -> float32 [T, H]."""
        return self.down(silu_mul(self.gate_up(x, mode), mode.compute), mode)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Softmax router, the `top` experts of each token, and a shared expert behind a sigmoid gate.

    The router's probabilities are float32; those of the chosen experts are divided by their sum
    where `normalises`. The shared expert is no part of that sum.
    """

    router: Linear
    gate_up: Experts
    down: Experts
    top: int
    normalises: bool
    shared: MLP | None = None
    shared_gate: Linear | None = None

    def __call__(self, x: Tensor, mode: Mode) -> Tensor:
        """x float32 [T, H] -> float32 [T, H]."""
        compute = mode.compute
        routing = self.route(x, mode)
        rows = gather(x, routing, compute)
        hidden = silu_mul(self.gate_up(rows, routing.counts, mode), compute)
        parts = self.down(hidden, routing.counts, mode)
        shared = gate = None
        if self.shared is not None and self.shared_gate is not None:
            gate = self.shared_gate(x, mode, is_exact=True)
            shared = self.shared(x, mode)
        return combine(parts, routing, shared, gate, compute)

    def route(self, x: Tensor, mode: Mode) -> Routing:
        """Which experts each token goes to, and with what weight."""
        logits = self.router(x, mode, is_exact=True)
        return route(logits, self.top, self.normalises, mode.compute)
