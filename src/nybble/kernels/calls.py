"""Calling a C kernel: through ctypes at once, or written into a program that replays it.

A kernel `nyb_name` that a program may hold has a twin `nyb_name_step` in C, which takes its
arguments from an array (program.h); both come from one signature here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.errors import DoesNotFit
from nybble.kernels.build import loaded
from nybble.kernels.compute import Compute

_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "t": ctypes.c_int64,
    "s": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
_DTYPES = {"f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "u8": torch.uint8}


class Kernel:
    """A function of the library: its name and one letter for each argument.

    p  address (int or None)       n  int64     i  int     f  float     d  double
    t  int64, a number of rows that grows with the tokens of a batch; s  the number of sequences

    `fails` is what DoesNotFit says when the function returns other than 0; without it the function
    returns nothing.
    """

    __slots__ = ("_function", "fails", "name", "signature")

    def __init__(self, name: str, signature: str, fails: str = "") -> None:
        self.name, self.signature, self.fails = name, signature, fails
        self._function: ctypes._NamedFuncPointer | None = None

    def __call__(self, compute: Compute, *values: int | float | None) -> None:
        """Call it, or record the call. Raises DoesNotFit."""
        if compute.program is not None:
            compute.program.record(self.name, self.signature, values)
            return
        if self._function is None:
            self._function = self._load()
        if self._function(*values) and self.fails:
            raise DoesNotFit(self.fails)

    def _load(self) -> ctypes._NamedFuncPointer:
        function: ctypes._NamedFuncPointer = getattr(loaded(), self.name)
        function.restype = ctypes.c_int if self.fails else None
        function.argtypes = [_TYPES[letter] for letter in self.signature]
        return function


def empty(compute: Compute, shape: Sequence[int], dtype: str = "f32") -> Tensor:
    """Memory for a kernel's result, f32, i64, i32 or u8: torch's own, or the program's."""
    if compute.program is not None:
        return compute.program.empty(shape, dtype)  # type: ignore[no-any-return]
    return torch.empty(tuple(shape), dtype=_DTYPES[dtype])
