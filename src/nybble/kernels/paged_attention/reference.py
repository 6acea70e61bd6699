"""The definition in plain PyTorch, float32: one sequence at a time, all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels.compute import Compute
from nybble.kernels.paged_attention import Pages


def write(
    k: Tensor, v: Tensor, pages: Pages, table: Tensor, starts: Tensor, lengths: Tensor
) -> None:
    """See the package."""
    for b, length in enumerate(lengths.tolist()):
        begin, end = starts[b : b + 2].tolist()
        page, offset = _places(table[b], length, length + end - begin, pages.keys.shape[2])
        pages.keys[page, :, offset] = k[begin:end].to(pages.keys.dtype)
        pages.values[page, :, offset] = v[begin:end].to(pages.values.dtype)


def attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    compute: Compute,
) -> Tensor:
    """See the package. `compute` changes nothing here: there is no precision to choose."""
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        begin, end = starts[b : b + 2].tolist()
        if begin < end:
            first = max(0, length - window + 1) if window else 0
            keys = torch.arange(first, length + end - begin)
            page, offset = _places(table[b], first, length + end - begin, pages.keys.shape[2])
            k = pages.keys[page, :, offset].float().transpose(0, 1)  # [Hkv, S, D]
            v = pages.values[page, :, offset].float().transpose(0, 1)
            at = torch.arange(length, length + end - begin)[:, None]
            seen = keys <= at
            if window:
                seen &= keys > at - window
            out[begin:end] = _softmax_attention(q[begin:end], k, v, seen, scale)
    return out


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
