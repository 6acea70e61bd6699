"""The C kernels of cpu.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.build import loaded
from nybble.kernels.compute import Compute
from nybble.kernels.paged_attention import Pages


class _Pages(ctypes.Structure):
    """nyb_pages of cpu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "table", "starts", "lengths")),
        *(
            (name, ctypes.c_int64)
            for name in ("sequences", "width", "kv_heads", "page_tokens", "head_dim", "is_bf16")
        ),
    )


def write(
    k: Tensor, v: Tensor, pages: Pages, table: Tensor, starts: Tensor, lengths: Tensor
) -> None:
    """See the package."""
    described = _describe(pages, table, starts, lengths)
    loaded().nyb_paged_write(
        ctypes.byref(described),
        ctypes.c_void_p(k.data_ptr()),
        ctypes.c_void_p(v.data_ptr()),
        ctypes.c_int(dispatch.isa_level()),
    )


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
    """See the package."""
    out = torch.empty_like(q)
    described = _describe(pages, table, starts, lengths)
    loaded().nyb_paged_attention(
        ctypes.byref(described),
        ctypes.c_void_p(q.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(q.shape[1]),
        ctypes.c_float(scale),
        ctypes.c_int64(window),
        ctypes.c_int(dispatch.isa_level()),
        ctypes.c_int(compute.threads),
    )
    return out


def _describe(pages: Pages, table: Tensor, starts: Tensor, lengths: Tensor) -> _Pages:
    _, kv_heads, page_tokens, head_dim = pages.keys.shape
    pointers = (x.data_ptr() for x in (pages.keys, pages.values, table, starts, lengths))
    is_bf16 = pages.keys.dtype == torch.bfloat16
    return _Pages(*pointers, *table.shape, kv_heads, page_tokens, head_dim, is_bf16)
