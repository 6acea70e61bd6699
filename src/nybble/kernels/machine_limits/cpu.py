"""The C probes of cpu.c, called through ctypes: the interpreter lock is free meanwhile."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from nybble.kernels.build import loaded
from nybble.kernels.dispatch import isa_level


def read(words: NDArray[np.uint64], passes: int, threads: int) -> int:
    """Read all words `passes` times; their sum modulo 2^64."""
    library = loaded()
    library.nyb_limit_pieces.restype = ctypes.c_int64
    library.nyb_limit_read.restype = ctypes.c_uint64
    size = ctypes.c_int64(words.size)
    scratch = np.empty(passes * library.nyb_limit_pieces(size), dtype=np.uint64)
    return int(
        library.nyb_limit_read(
            ctypes.c_void_p(words.ctypes.data),
            size,
            ctypes.c_int64(passes),
            ctypes.c_void_p(scratch.ctypes.data),
            ctypes.c_int(isa_level()),
            ctypes.c_int(threads),
        )
    )


def multiply(kind: int, rounds: int, threads: int) -> tuple[int, float]:
    """Multiply-adds that all threads did, 0 where the instruction set has no such instruction, and
    the sum of the products, which are all 1."""
    library = loaded()
    library.nyb_limit_multiply.restype = ctypes.c_int64
    sums = np.zeros(threads, dtype=np.float64)
    each = library.nyb_limit_multiply(
        ctypes.c_int(kind),
        ctypes.c_int64(rounds),
        ctypes.c_void_p(sums.ctypes.data),
        ctypes.c_int(isa_level()),
        ctypes.c_int(threads),
    )
    return int(each) * threads, float(sums.sum())
