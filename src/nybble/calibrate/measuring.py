"""Observers that have torch's threads while they compute.

While a layer runs torch has one thread (`models.threads`), and nybble's kernels the processors. A
Hessian is a large matmul of torch's own, so observers have all threads while they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nybble.models.linear import Observer


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Give torch so many threads; afterwards what it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Measured:
    """An observer (models.linear.Observer) that is called with `threads` threads."""

    def __init__(self, observer: Observer, threads: int) -> None:
        self.observer, self.threads = observer, threads

    def linear(self, modules: tuple[str, ...], x: Tensor) -> None:
        """See models.linear.Observer."""
        with torch_threads(self.threads):
            self.observer.linear(modules, x)

    def experts(self, modules: Sequence[tuple[str, ...]], x: Tensor, counts: Tensor) -> None:
        """See models.linear.Observer."""
        with torch_threads(self.threads):
            self.observer.experts(modules, x, counts)
