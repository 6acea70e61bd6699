"""The C kernel of round.c: no copies, the interpreter lock released."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.block_round import BLOCK, Search, Strip
from nybble.kernels.calls import Kernel
from nybble.kernels.compute import Compute

_ROUND = Kernel("nyb_block_round", "pnpnpnp" + "pp" + "pppp" + "nn" + "iiiiii")


def round_strip(
    weight: Tensor,
    target: Tensor,
    upper: Tensor,
    importance: Tensor,
    search: Search,
    current: tuple[Tensor, Tensor] | None,
    threads: int,
) -> Strip:
    """See the package."""
    rows, columns = weight.shape
    strip = Strip(
        torch.empty(rows, columns, dtype=torch.uint8),
        torch.empty(rows, columns // BLOCK, dtype=torch.uint8),
        torch.empty(rows, columns),
        torch.empty(rows, columns // BLOCK),
    )
    _ROUND(
        Compute(threads=threads),
        weight.data_ptr(),
        weight.stride(0),
        target.data_ptr(),
        target.stride(0),
        upper.data_ptr(),
        upper.stride(0),
        importance.data_ptr(),
        *(None if t is None else t.data_ptr() for t in current or (None, None)),
        strip.codes.data_ptr(),
        strip.scales.data_ptr(),
        strip.error.data_ptr(),
        strip.loss.data_ptr(),
        rows,
        columns,
        search.lowest,
        search.highest,
        search.passes,
        search.kept,
        dispatch.isa_level(),
        threads,
    )
    return strip
