"""The C kernels of cpu.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.build import loaded
from nybble.kernels.calls import Kernel
from nybble.kernels.compute import Compute
from nybble.kernels.vocabulary import Divergence, LogLikelihood

# logits with their row stride, out, M, V; isa, threads
_LIKELIEST = Kernel("nyb_likeliest", "pnptnii")


def log_likelihood(logits: Tensor, targets: Tensor, compute: Compute) -> LogLikelihood:
    """See the package."""
    rows = len(targets)
    nll, log_sum = (torch.empty(rows, dtype=torch.float64) for _ in range(2))
    top = torch.empty(rows, dtype=torch.int64)
    _call("nyb_log_likelihood", [logits], [targets, nll, top, log_sum], compute)
    return LogLikelihood(nll, top, log_sum)


def divergence(
    reference: Tensor, candidate: Tensor, targets: Tensor, compute: Compute
) -> Divergence:
    """See the package."""
    rows = len(targets)
    kl, ours, theirs = (torch.empty(rows, dtype=torch.float64) for _ in range(3))
    our_top, their_top = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
    outputs = [targets, kl, ours, theirs, our_top, their_top]
    _call("nyb_divergence", [reference, candidate], outputs, compute)
    return Divergence(kl, ours, theirs, our_top, their_top, (-ours).exp(), (-theirs).exp())


def likeliest(logits: Tensor, out: Tensor, compute: Compute) -> None:
    """See the package."""
    how = (dispatch.isa_level(), compute.threads)
    _LIKELIEST(compute, logits.data_ptr(), logits.stride(0), out.data_ptr(), *logits.shape, *how)


def _call(name: str, logits: list[Tensor], rest: list[Tensor], compute: Compute) -> None:
    """Call a function of cpu.c: logits, their sizes, arrays of rows, isa, threads."""
    library = loaded()
    getattr(library, name)(
        *(ctypes.c_void_p(x.data_ptr()) for x in logits),
        *(ctypes.c_int64(size) for size in logits[0].shape),
        *(ctypes.c_void_p(x.data_ptr()) for x in rest),
        ctypes.c_int(dispatch.isa_level()),
        ctypes.c_int(compute.threads),
    )
