"""The C kernel of cpu.c, called through ctypes: no copies, the interpreter lock released."""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache

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
    ruled = np.ascontiguousarray(rules.rules)
    if not (most or len(rules.tokens) or any(mask is not None for mask in rules.masks)):
        return _plain(logits, ruled.ctypes.data, compute)
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
    _function(loaded())(
        logits.data_ptr(),
        *logits.shape,
        ruled.ctypes.data,
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


class _Room(threading.local):
    """What the kernel reads and writes where rows are only filtered and drawn, for so many rows. A
    step of a small model takes less time than finding the addresses of a dozen new arrays."""

    def __init__(self) -> None:
        self.rows = 0

    def grow(self, rows: int) -> None:
        """Make room for so many rows, if there is not."""
        if rows <= self.rows:
            return
        self.rows = rows
        self.starts, self.no_masks = np.zeros(rows + 1, np.int64), np.zeros(rows, np.uint64)
        self.sizes = np.full(rows, -1, np.int64)
        self.token, self.logprob = np.empty(rows, np.int64), np.empty(rows)
        starts, *others = (
            a.ctypes.data
            for a in (self.starts, self.no_masks, self.sizes, self.token, self.logprob)
        )
        masks, sizes, token, logprob = others
        self.edits = (starts, 0, 0, 0, 0, masks, sizes)
        self.found = (token, logprob)


_room = _Room()


def _plain(logits: Tensor, rules: int, compute: Compute) -> Choices:
    """Without edits, masks and alternatives."""
    rows = len(logits)
    _room.grow(rows)
    token, logprob = _room.token[:rows], _room.logprob[:rows]
    token.fill(NAN)
    logprob.fill(np.nan)
    _function(loaded())(
        *(logits.data_ptr(), *logits.shape, rules, *_room.edits, 0, *_room.found, 0, 0),
        *(dispatch.isa_level(), compute.threads),
    )
    nothing = np.empty((rows, 0), np.int64), np.empty((rows, 0))
    return Choices(token.copy(), logprob.copy(), *nothing)


@lru_cache(maxsize=2)
def _function(library: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    function = library.nyb_choose_tokens
    function.restype = None
    function.argtypes = [_P, _N, _N, *[_P] * 8, _N, *[_P] * 4, _I, _I]
    return function
