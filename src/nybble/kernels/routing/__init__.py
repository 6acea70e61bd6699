"""What a mixture of experts does between its matmuls: who goes where, and the sum that comes back.

The router's logits choose experts, rows are sorted by expert for `expert_matmul`, and the experts'
outputs are added per token. A token's result is the same bits whatever its neighbours and the
number of threads. Knows nothing of weights' formats, of experts' arithmetic or of layers.
`reference.py` is the definition, `cpu.py` calls the C kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.tensors import check_rows, check_tensor

#: Experts per token: what the C kernels keep at hand.
MOST_CHOICES = 64
#: Rows sorted by expert are numbered in int32.
_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts the tokens of a batch go to. Contiguous; an entry is token * top + choice.

    `weights` float32 [T, top] and `chosen` int32 [T, top], the likeliest first; `counts` int64 [E],
    the rows of each expert; `order` int32 [T * top], the entry of each row when rows are sorted by
    expert, then by entry; `places` int32 [T * top], the row of each entry.
    """

    weights: Tensor
    chosen: Tensor
    counts: Tensor
    order: Tensor
    places: Tensor


def route(logits: Tensor, top: int, normalises: bool, compute: Compute) -> Routing:
    """The `top` likeliest of E experts for each token: logits float32 [T, E], rows may lie apart.

    Weights are the softmax over all experts, float32, and `normalises` divides the chosen ones by
    their sum. The larger logit is the likelier; of equals, the lower expert. A NaN is taken for the
    largest, so the experts are always some, and it makes its token's weights NaN.
    Raises EngineError for other shapes or dtypes, and unless 1 <= top <= min(E, 64).
    """
    tokens, experts = logits.shape if logits.ndim == 2 else (-1, -1)
    check_rows(logits, "routing", "logits", (tokens, experts))
    if not 1 <= top <= min(experts, MOST_CHOICES):
        raise EngineError(
            f"routing: {top} of {experts} experts; expected from 1 to {min(experts, MOST_CHOICES)}"
        )
    if tokens * top > _MOST_ROWS:
        raise EngineError(
            f"routing: {tokens} tokens of {top} experts each are more rows than {_MOST_ROWS}; run "
            "fewer tokens at once"
        )
    return _backend().route(logits, top, normalises, compute)  # type: ignore[no-any-return]


def gather(x: Tensor, routing: Routing, compute: Compute) -> Tensor:
    """A row for each choice, sorted by expert: x float32 [T, H], rows may lie apart -> [T top, H].

    Raises EngineError for other shapes or dtypes.
    """
    width = x.shape[1] if x.ndim == 2 else -1
    check_rows(x, "routing", "x", (len(routing.weights), width))
    _check_routing(routing)
    return _backend().gather(x, routing, compute)  # type: ignore[no-any-return]


def combine(
    parts: Tensor,
    routing: Routing,
    shared: Tensor | None,
    gate: Tensor | None,
    compute: Compute,
) -> Tensor:
    """Sum of weight * part over a token's choices, the first first, + sigmoid(gate) * shared.

    parts float32 [T top, H] are the experts' outputs in the order of `gather`; shared [T, H] and
    gate [T, 1], whose rows may lie apart, come together or not at all. Returns float32 [T, H].
    Raises EngineError for other shapes or dtypes, and for one of shared and gate without the other.
    """
    tokens, top = _check_routing(routing)
    width = parts.shape[1] if parts.ndim == 2 else -1
    check_tensor(parts, "routing", "parts", (tokens * top, width))
    if (shared is None) != (gate is None):
        raise EngineError("routing: a shared expert and its gate come together or not at all")
    if shared is not None and gate is not None:
        check_rows(shared, "routing", "shared", (tokens, width))
        check_rows(gate, "routing", "gate", (tokens, 1))
    return _backend().combine(parts, routing, shared, gate, compute)  # type: ignore[no-any-return]


def _check_routing(routing: Routing) -> tuple[int, int]:
    """Tokens and choices of a routing; its values are those that `route` wrote."""
    tokens, top = routing.weights.shape if routing.weights.ndim == 2 else (-1, -1)
    check_tensor(routing.weights, "routing", "weights", (tokens, top))
    check_tensor(routing.order, "routing", "order", (tokens * top,), torch.int32)
    check_tensor(routing.places, "routing", "places", (tokens * top,), torch.int32)
    return tokens, top


def _backend() -> ModuleType:
    return _load(dispatch.choose().backend)


@lru_cache(maxsize=2)  # an import statement costs more than some of these kernels
def _load(backend: str) -> ModuleType:
    if backend == "cpu":
        from nybble.kernels.routing import cpu

        return cpu
    from nybble.kernels.routing import reference

    return reference
