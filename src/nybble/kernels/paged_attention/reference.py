"""The definition in plain PyTorch, float32: one sequence at a time, all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.compute import Compute
from nybble.kernels.paged_attention import FP8, Pages, seen_from

#: The largest E4M3 number.
MOST = 448.0


def write(
    k: Tensor,
    v: Tensor,
    pages: Pages,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    compute: Compute,
) -> None:
    """See the package. `compute` changes nothing here."""
    for b, length in enumerate(lengths.tolist()):
        begin, end = starts[b : b + 2].tolist()
        page, offset = _places(table[b], length, length + end - begin, pages.keys.shape[2])
        for pool, x, scale in (
            (pages.keys, k, pages.key_scale),
            (pages.values, v, pages.value_scale),
        ):
            # Bytes are copied: torch has no indexing for FP8.
            held = _rounded(x[begin:end], pool.dtype, scale, pages.clipped)
            _raw(pool)[page, :, offset] = _raw(held)


def attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    first: int,
    compute: Compute,
) -> Tensor:
    """See the package. `compute` changes nothing here: there is no precision to choose."""
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        begin, end = starts[b : b + 2].tolist()
        if begin < end:
            lowest = seen_from(length, window, first)
            keys = torch.arange(lowest, length + end - begin)
            page, offset = _places(table[b], lowest, length + end - begin, pages.keys.shape[2])
            k, v = (
                _read(pool, page, offset, scale).transpose(0, 1)  # [Hkv, S, D]
                for pool, scale in (
                    (pages.keys, pages.key_scale),
                    (pages.values, pages.value_scale),
                )
            )
            at = torch.arange(length, length + end - begin)[:, None]
            seen = (keys <= at) & (keys >= at.clamp(max=first))
            if window:
                seen &= keys > at - window
            out[begin:end] = _softmax_attention(q[begin:end], k, v, seen, scale)
    return out


def _rounded(x: Tensor, dtype: torch.dtype, scale: float, clipped: Tensor | None) -> Tensor:
    """x as pages hold it; what is beyond the range of FP8 is cut off and counted."""
    if dtype != FP8:
        return x.to(dtype)
    x = x / scale
    if clipped is not None:
        clipped += (x.abs() > MOST).sum()
    codes = x.clamp(-MOST, MOST).to(FP8).view(torch.uint8)
    return codes.masked_fill(x.isnan(), 0x7F).view(FP8)  # a NaN has no sign


def _read(pool: Tensor, page: Tensor, offset: Tensor, scale: float) -> Tensor:
    """Positions of a pool as float32 [S, Hkv, D]."""
    return _raw(pool)[page, :, offset].view(pool.dtype).float() * scale


def _raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == FP8 else x


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """q [T, Hq, D], k and v [Hkv, S, D], seen bool [T, S] -> [T, Hq, D]."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[0]
    # Query heads of one key/value head are consecutive.
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ k[:, None].transpose(-1, -2) * scale  # [Hkv, G, T, S]
    p = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (p @ v[:, None]).permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def _places(row: Tensor, first: int, end: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """The page and the offset in it of positions first .. end - 1."""
    positions = torch.arange(first, end)
    return row[positions // page_tokens].long(), positions % page_tokens
