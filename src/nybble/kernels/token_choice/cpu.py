"""The C kernel of cpu.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from nybble.kernels import dispatch
from nybble.kernels.build import loaded
from nybble.kernels.compute import Compute
from nybble.kernels.token_choice import NAN, Choices, Rules

_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def choose(logits: Tensor, rules: Rules, compute: Compute) -> Choices:
    """See the package."""
    rows, most = len(logits), int(rules.rules["alternatives"].max(initial=0))
    found = Choices(
        np.full(rows, NAN),
        np.full(rows, np.nan),
        np.full((rows, most), -1),
        np.full((rows, most), np.nan),
    )
    before = np.empty(len(rules.tokens), dtype=np.float32)
    masks = [None if m is None else np.frombuffer(m, np.uint8) for m in rules.masks]
    addresses = np.array([0 if m is None else m.ctypes.data for m in masks], dtype=np.uint64)
    sizes = np.array([-1 if m is None else len(m) for m in masks], dtype=np.int64)
    edits = (rules.starts, rules.tokens, rules.factors, rules.shifts, before, addresses, sizes)
    _function()(
        logits.data_ptr(),
        *logits.shape,
        np.ascontiguousarray(rules.rules).ctypes.data,
        *(a.ctypes.data for a in edits),
        most,
        found.token.ctypes.data,
        found.logprob.ctypes.data,
        found.top_tokens.ctypes.data,
        found.top_logprobs.ctypes.data,
        dispatch.isa_level(),
        compute.threads,
    )
    return found


def _function() -> ctypes._NamedFuncPointer:
    function = loaded().nyb_choose_tokens
    function.restype = None
    function.argtypes = [_P, _N, _N, *[_P] * 8, _N, *[_P] * 4, _I, _I]
    return function
