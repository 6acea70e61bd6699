"""The C kernels of cpu.c: no copies, the interpreter lock released."""

from __future__ import annotations

from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.calls import Kernel, empty
from nybble.kernels.compute import Compute
from nybble.kernels.routing import Routing

_ROUTE = Kernel("nyb_route", "pnppppp" + "tnni" + "ii")
_GATHER = Kernel("nyb_gather", "pnpp" + "tnni")
_COMBINE = Kernel("nyb_combine", "ppppnpnp" + "tnn" + "ii")


def route(logits: Tensor, top: int, normalises: bool, compute: Compute) -> Routing:
    """See the package."""
    tokens, experts = logits.shape
    routing = Routing(
        empty(compute, (tokens, top)),
        empty(compute, (tokens, top), "i32"),
        empty(compute, (experts,), "i64"),
        empty(compute, (tokens * top,), "i32"),
        empty(compute, (tokens * top,), "i32"),
    )
    _ROUTE(
        compute,
        logits.data_ptr(),
        logits.stride(0),
        routing.weights.data_ptr(),
        routing.chosen.data_ptr(),
        routing.counts.data_ptr(),
        routing.order.data_ptr(),
        routing.places.data_ptr(),
        tokens,
        experts,
        top,
        int(normalises),
        *_how(compute),
    )
    return routing


def gather(x: Tensor, routing: Routing, compute: Compute) -> Tensor:
    """See the package."""
    (rows,), top, width = routing.order.shape, routing.weights.shape[1], x.shape[1]
    y = empty(compute, (rows, width))
    places = (x.data_ptr(), x.stride(0), routing.order.data_ptr(), y.data_ptr())
    _GATHER(compute, *places, rows, top, width, compute.threads)
    return y


def combine(
    parts: Tensor,
    routing: Routing,
    shared: Tensor | None,
    gate: Tensor | None,
    compute: Compute,
) -> Tensor:
    """See the package."""
    tokens, top = routing.weights.shape
    y = empty(compute, (tokens, parts.shape[1]))
    _COMBINE(
        compute,
        parts.data_ptr(),
        routing.weights.data_ptr(),
        routing.places.data_ptr(),
        *_rows(shared),
        *_rows(gate),
        y.data_ptr(),
        tokens,
        top,
        parts.shape[1],
        *_how(compute),
    )
    return y


def _rows(x: Tensor | None) -> tuple[int | None, int]:
    """The address of rows, and how far apart they lie."""
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def _how(compute: Compute) -> tuple[int, int]:
    return dispatch.isa_level(), compute.threads
