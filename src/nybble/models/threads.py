"""One pool of threads at a time: torch computes alone while nybble's kernels do the work.

After every parallel operation of its own, torch's OpenMP threads spin for milliseconds on the cores
that the next kernel wants: a quarter of the speed of scoring. What torch does here is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_alone() -> Iterator[None]:
    """Give torch one thread; afterwards what it had, which is the whole process's setting."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
