"""The feed-forward half of a layer: a gated MLP, or routed experts with or without a shared one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels.elementwise import sigmoid_mul, silu_mul
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
        weights, chosen = self.route(x, mode)
        order = torch.argsort(chosen.reshape(-1), stable=True)
        counts = torch.bincount(chosen.reshape(-1), minlength=len(self.gate_up.modules))
        rows = x[torch.div(order, self.top, rounding_mode="floor")]
        hidden = silu_mul(self.gate_up(rows, counts, mode), mode.compute)
        parts = torch.empty_like(rows)
        parts[order] = self.down(hidden, counts, mode)
        parts = parts.reshape(len(x), self.top, -1)
        # One expert after the other, so that a token's sum never depends on its neighbours.
        found = parts[:, 0] * weights[:, :1]
        for i in range(1, self.top):
            found = found + parts[:, i] * weights[:, i : i + 1]
        if self.shared is not None and self.shared_gate is not None:
            # Through the kernel: torch's own sigmoid of [T, 1] differs in bits by T.
            gate = self.shared_gate(x, mode, is_exact=True).expand(x.shape).contiguous()
            found = found + sigmoid_mul(self.shared(x, mode), gate, mode.compute)
        return found

    def route(self, x: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Weights float32 [T, top] and experts int64 [T, top], the likeliest first."""
        logits = self.router(x, mode, is_exact=True)
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1), self.top, dim=-1)
        if self.normalises:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen
