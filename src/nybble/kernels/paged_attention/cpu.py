"""The C kernels of cpu.c and write.c: no copies, the interpreter lock released."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.calls import Kernel, empty
from nybble.kernels.compute import Compute
from nybble.kernels.paged_attention import FP8, Pages

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, FP8: 2}  # the enum of cpu.h
# keys, values, table, starts, lengths, sequences, width, heads, page tokens, D, format, two scales
_PAGES = "pppppsnnnniff"
# clipped; k and v with their strides; isa, threads
_WRITE = Kernel("nyb_paged_write", _PAGES + "ppnnpnnii")
# q with its strides, out, query heads, scale, window, first; isa, threads
_ATTENTION = Kernel(
    "nyb_paged_attention", _PAGES + "pnnpnfnnii", fails="attention: no memory for its scratch"
)


def write(
    k: Tensor,
    v: Tensor,
    pages: Pages,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    compute: Compute,
) -> None:
    """See the package."""
    clipped = None if pages.clipped is None else pages.clipped.data_ptr()
    described = _describe(pages, table, starts, lengths)
    _WRITE(compute, *described, clipped, *_place(k), *_place(v), *_how(compute))


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
    """See the package."""
    out = empty(compute, q.shape)
    described = _describe(pages, table, starts, lengths)
    result = (out.data_ptr(), q.shape[1], scale, window, first)
    _ATTENTION(compute, *described, *_place(q), *result, *_how(compute))
    return out


def _describe(
    pages: Pages, table: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[int | float, ...]:
    pointers = (x.data_ptr() for x in (pages.keys, pages.values, table, starts, lengths))
    sizes = (*table.shape, *pages.keys.shape[1:])
    return (*pointers, *sizes, _FORMATS[pages.keys.dtype], pages.key_scale, pages.value_scale)


def _place(x: Tensor) -> tuple[int, int, int]:
    """The address of rows, and how far apart tokens and heads lie."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def _how(compute: Compute) -> tuple[int, int]:
    return dispatch.isa_level(), compute.threads
