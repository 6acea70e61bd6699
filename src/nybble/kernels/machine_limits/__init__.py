"""The limits of this machine, measured with the threads and instructions that the kernels use:
bytes a second from memory, multiply-adds a second of each type of operand.

No operation of a network: there is nothing to compute and no reference. Refuses to know models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nybble.errors import KernelUnavailable
from nybble.kernels import dispatch

#: Operand types of multiply-adds, as cpu.c numbers them.
PEAKS = {"f32": 0, "bf16": 1, "int8": 2}
#: Memory that is read, far larger than a last-level cache of today.
READ_BYTES = 1 << 30
#: How long one measurement of a peak takes, about.
PEAK_S = 0.05


@dataclass(frozen=True, slots=True)
class Limits:
    """The best of several measurements: `read_bytes_s`, and operations (two for a multiply-add) a
    second by type of operand. A type is missing where there is no instruction for it."""

    threads: int
    read_bytes_s: float
    operations_s: dict[str, float]

    def or_better(self, other: Limits) -> Limits:
        """The larger of each of two measurements: a disturbed moment lowers, nothing raises."""
        peaks = {k: max(v, other.operations_s[k]) for k, v in self.operations_s.items()}
        return Limits(self.threads, max(self.read_bytes_s, other.read_bytes_s), peaks)


def measure(threads: int, *, read_bytes: int = READ_BYTES, repeats: int = 5) -> Limits:
    """Measure all limits, about two seconds. Raises KernelUnavailable without compiled kernels."""
    peaks = {kind: peak(kind, threads, repeats) for kind in PEAKS}
    return Limits(
        threads,
        read_bandwidth(threads, read_bytes, repeats),
        {kind: value for kind, value in peaks.items() if value is not None},
    )


def read_bandwidth(threads: int, nbytes: int = READ_BYTES, repeats: int = 5) -> float:
    """Bytes a second that `threads` read together from memory that no cache holds."""
    _needs_library()
    from nybble.kernels.machine_limits import cpu

    words = np.ones(nbytes // 8, dtype=np.uint64)
    cpu.read(words, 1, threads)  # the pool's threads are made
    seconds = [_seconds(cpu.read, words, 1, threads) for _ in range(repeats)]
    return words.nbytes / min(seconds)


def peak(kind: str, threads: int, repeats: int = 5) -> float | None:
    """Operations a second of all threads, two for each multiply-add; None where the instruction set
    in use has no instruction for operands of this kind."""
    _needs_library()
    from nybble.kernels.machine_limits import cpu

    number, rounds = PEAKS[kind], 1 << 14
    if not cpu.multiply(number, 1, threads)[0]:
        return None
    while (taken := _seconds(cpu.multiply, number, rounds, threads)) < PEAK_S / 4:
        rounds *= 4
    rounds = round(rounds * max(1.0, PEAK_S / taken))
    best = min(_seconds(cpu.multiply, number, rounds, threads) for _ in range(repeats))
    return 2 * cpu.multiply(number, 1, threads)[0] * rounds / best


def _needs_library() -> None:
    if dispatch.choose().backend != "cpu":
        raise KernelUnavailable(
            f"the machine's limits are measured by compiled kernels: {dispatch.choose().origin}"
        )


def _seconds(call: Callable[..., object], *values: object) -> float:
    began = time.perf_counter()
    call(*values)
    return time.perf_counter() - began
