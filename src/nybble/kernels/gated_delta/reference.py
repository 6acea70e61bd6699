"""The definition in plain PyTorch, float32: one sequence at a time, all heads at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from nybble.kernels.compute import Compute
from nybble.kernels.gated_delta import CHUNK, Heads

L2_EPS = 1e-6


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
    """See the package. `compute` changes nothing here."""
    out = torch.empty(x.shape)
    taps = weight.shape[1]
    for b, (length, slot) in enumerate(zip(lengths.tolist(), slots.tolist(), strict=True)):
        begin, end = starts[b : b + 2].tolist()
        if begin == end:
            continue
        old = state[slot] if length else torch.zeros_like(state[slot])
        padded = torch.cat([old, x[begin:end]])
        sums = padded[: end - begin] * weight[:, 0]
        for j in range(1, taps):
            sums = sums + padded[j : j + end - begin] * weight[:, j]
        out[begin:end] = silu(sums)
        for t, written in enumerate(writes[begin:end].tolist(), 1):
            if written >= 0:
                state[written] = padded[t : t + taps - 1]
    return out


def decay(
    a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, compute: Compute
) -> tuple[Tensor, Tensor]:
    """See the package. `compute` changes nothing here."""
    return -a_log.exp() * softplus(a + dt_bias, threshold=20.0), b.sigmoid()


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
    """See the package. `compute` changes nothing here: the delta rule is float32."""
    out = mixed.new_empty((len(mixed), heads.value_heads, heads.value_dim))
    places = zip(lengths.tolist(), slots.tolist(), recurrent.tolist(), strict=True)
    for b, (length, slot, is_recurrent) in enumerate(places):
        begin, end = starts[b : b + 2].tolist()
        s = state[slot].clone() if length else torch.zeros_like(state[slot])
        at = begin
        while at < end:
            step = 1 if is_recurrent else CHUNK - (length + at - begin) % CHUNK
            rows = slice(at, min(at + step, end))
            q, k, v = _split(mixed[rows], heads)
            rule = _token if is_recurrent else _chunk
            o, s = rule(q, k, v, g[rows].t(), beta[rows].t(), s)
            out[rows] = o.transpose(0, 1)
            at = rows.stop
            if (written := int(writes[at - 1])) >= 0:
                state[written] = s
    return out


def _split(mixed: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normalised and scaled, [Hv, n, Dk], and v [Hv, n, Dv]."""
    h = heads
    widths = [h.key_heads * h.key_dim, h.key_heads * h.key_dim, h.value_heads * h.value_dim]
    q, k, v = torch.split(mixed, widths, dim=1)
    q = _unit(q.reshape(-1, h.key_heads, h.key_dim)) * h.key_dim**-0.5
    k = _unit(k.reshape(-1, h.key_heads, h.key_dim))
    ratio = h.value_heads // h.key_heads
    q, k = (x.repeat_interleave(ratio, dim=1).transpose(0, 1) for x in (q, k))
    return q, k, v.reshape(-1, h.value_heads, h.value_dim).transpose(0, 1)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + L2_EPS)


def _token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of all heads: q, k [Hv, 1, Dk], v [Hv, 1, Dv], g, beta [Hv, 1], s [Hv, Dk, Dv]."""
    s = s * g[..., None].exp()
    e = (v - k @ s) * beta[..., None]
    s = s + k.transpose(1, 2) * e
    return q @ s, s


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """n <= 64 tokens of all heads at once; shapes as in `_token` with n for 1.

    A token's correction depends on those before it in the chunk: (I + A) E = beta (V - exp(G) K S),
    A = strict lower triangle of beta K K^T exp(G_i - G_j), G the running sum of g.
    """
    # In double, for the difference of two large sums is what tokens next to each other differ by.
    total = g.double().cumsum(dim=1)
    # Only differences with i >= j are exponentiated, so that nothing overflows.
    later = torch.ones(g.shape[1], g.shape[1], dtype=torch.bool).tril()
    between = (total[:, :, None] - total[:, None, :]).masked_fill(~later, -torch.inf).exp().float()
    system = (k * beta[..., None]) @ k.transpose(1, 2) * between
    grown = total[..., None].exp().float()
    wanted = (v - k @ s * grown) * beta[..., None]
    e = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    o = (q * grown) @ s + (q @ k.transpose(1, 2) * between) @ e
    left = (total[:, -1:] - total)[..., None].exp().float()
    return o, s * grown[:, -1:] + (k * left).transpose(1, 2) @ e
