"""The definition in plain PyTorch, float32. `compute` changes nothing here."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.compute import Compute
from nybble.kernels.routing import Routing


def route(logits: Tensor, top: int, normalises: bool, compute: Compute) -> Routing:
    """See the package."""
    # A stable sort keeps the lower expert first among equals; topk promises nothing of them.
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top]
    weights = torch.softmax(logits, dim=-1).gather(1, chosen)
    if normalises:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    entries = chosen.reshape(-1)
    order = entries.argsort(stable=True)
    return Routing(
        weights.contiguous(),
        chosen.int().contiguous(),
        torch.bincount(entries, minlength=logits.shape[1]),
        order.int(),
        order.argsort().int(),
    )


def gather(x: Tensor, routing: Routing, compute: Compute) -> Tensor:
    """See the package."""
    top = routing.weights.shape[1]
    return x[torch.div(routing.order, top, rounding_mode="floor")]


def combine(
    parts: Tensor,
    routing: Routing,
    shared: Tensor | None,
    gate: Tensor | None,
    compute: Compute,
) -> Tensor:
    """See the package."""
    weights = routing.weights
    tokens, top = weights.shape
    mine = parts[routing.places.long()].reshape(tokens, top, parts.shape[1])
    # One choice after the other, so that a token's sum never depends on its neighbours.
    found = mine[:, 0] * weights[:, :1]
    for i in range(1, top):
        found = found + mine[:, i] * weights[:, i : i + 1]
    if shared is not None and gate is not None:
        found = found + shared * gate.sigmoid()
    return found
