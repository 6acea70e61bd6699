"""The C kernels of delta.c: no copies, the interpreter lock released."""

from __future__ import annotations

from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.calls import Kernel, empty
from nybble.kernels.compute import Compute
from nybble.kernels.gated_delta import Heads

_CONV = Kernel("nyb_causal_conv", "pnppppppp" + "snn" + "ii")
_DECAY = Kernel("nyb_decay", "pnpnpppp" + "tn" + "ii")
_DELTA = Kernel(
    "nyb_gated_delta",
    "pppppppppp" + "snnnn" + "ii",
    fails="gated delta: no memory for the scratch of its threads",
)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    writes: Tensor,
    compute: Compute,
) -> Tensor:
    """See the package."""
    y = empty(compute, x.shape)
    others = (t.data_ptr() for t in (weight, state, starts, lengths, slots, writes, y))
    sizes = (len(lengths), *weight.shape)
    _CONV(compute, x.data_ptr(), x.stride(0), *others, *sizes, *_how(compute))
    return y


def decay(
    a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, compute: Compute
) -> tuple[Tensor, Tensor]:
    """See the package."""
    g, beta = empty(compute, a.shape), empty(compute, a.shape)
    inputs = (a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0))
    others = (t.data_ptr() for t in (a_log, dt_bias, g, beta))
    _DECAY(compute, *inputs, *others, *a.shape, *_how(compute))
    return g, beta


def gated_delta(
    mixed: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    writes: Tensor,
    recurrent: Tensor,
    heads: Heads,
    compute: Compute,
) -> Tensor:
    """See the package."""
    out = empty(compute, (len(mixed), heads.value_heads, heads.value_dim))
    tensors = (mixed, g, beta, state, starts, lengths, slots, writes, recurrent, out)
    _DELTA(
        compute,
        *(t.data_ptr() for t in tensors),
        len(lengths),
        heads.key_heads,
        heads.value_heads,
        heads.key_dim,
        heads.value_dim,
        *_how(compute),
    )
    return out


def _how(compute: Compute) -> tuple[int, int]:
    return dispatch.isa_level(), compute.threads
