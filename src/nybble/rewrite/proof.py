"""The proof of a conversion: what was compared, what differs, and every tensor accounted for.

The source is decoded by the definition (`formats/tensor.py`, by way of `rewrite/held.py`), the
result by `proof_reading.py`, which shares nothing with what wrote it; `proof_source.py` reads again
what the source holds, and says what may be left out. What is compared with what is in
`proof_layouts.py` and `proof_bf16.py`; what neither takes must be a copy, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.progress import Progress

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]

#: Bytes that are compared at a time: few enough for the cache.
_CHUNK = 1 << 18
#: A tensor from this size on is taken out of memory after its last use.
_LARGE = 1 << 16


@dataclass(frozen=True, slots=True)
class Difference:
    """Values of one tensor, or one matrix, of the source that the result has otherwise.

    `largest` is the largest relative difference; infinite where a value is NaN on one side.
    """

    name: str
    part: str  # "weight", "input_scale", "kv_scale" or "copy"
    values: int
    of: int
    largest: float

    def as_json(self) -> dict[str, object]:
        """One entry of `differing`."""
        return {
            "name": self.name,
            "part": self.part,
            "values": self.values,
            "of": self.of,
            "largest_relative": self.largest,
        }


@dataclass
class Proof:
    """What was compared and what differs. `problems` is not empty where the result is wrong
    otherwise: a tensor is absent, or there without an origin, or of another shape."""

    tensors: int = 0
    values: int = 0
    differing: list[Difference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def differing_values(self) -> int:
        """How many values differ."""
        return sum(d.values for d in self.differing)

    def take(self, found: Proof) -> None:
        """Add the findings of a part of the work."""
        self.tensors += found.tensors
        self.values += found.values
        self.differing += found.differing
        self.problems += found.problems


def differ(one: F32Array, other: F32Array) -> tuple[int, float]:
    """How many values differ, and by how much at most, relatively."""
    differ = (one.view(np.uint32) != other.view(np.uint32)) & ~(np.isnan(one) & np.isnan(other))
    count = int(np.count_nonzero(differ))
    if not count:
        return 0, 0.0
    a, b = one[differ].astype(np.float64), other[differ].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.abs(b - a) / np.abs(a)
    return count, float(np.nan_to_num(relative, nan=np.inf, posinf=np.inf).max())


# ---------------------------------------------------------------------------------- all the tensors


class Accounts:
    """Which tensors of both sides have been seen to; what is left is a copy, or a fault."""

    def __init__(self, source: Checkpoint, written: Checkpoint, dropped: Iterable[str]) -> None:
        self.source, self.written = source, written
        self.dropped = set(dropped)
        self.taken: set[str] = set(self.dropped)
        self.made: set[str] = set()
        self.problems: list[str] = []

    def keep(self, may_be_left_out: Callable[[str], bool]) -> None:
        """Problems for what was left out and must not be: it counts as absent."""
        lost = sorted(name for name in self.dropped if not may_be_left_out(name))
        self.problems += [f"{name} was left out of the result" for name in lost]
        self.dropped -= {*lost}
        self.taken -= {*lost}

    def take(self, names: Iterable[str], own: Iterable[str]) -> None:
        self.taken.update(names)
        self.made.update(own)

    def copies(self) -> Iterator[TensorInfo]:
        """What must be there byte for byte; problems for the rest."""
        for name, tensor in self.source.tensors.items():
            if name in self.taken:
                continue
            twin = self.written.tensors.get(name)
            if twin is None or name in self.made:
                self.problems.append(f"{name} is absent from the result")
            elif (twin.dtype, twin.shape) != (tensor.dtype, tensor.shape):
                self.problems.append(
                    f"{name} is {twin.dtype} {list(twin.shape)}, expected {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            else:
                self.made.add(name)
                yield tensor
        extra = [n for n in self.written.tensors if n not in self.made]
        if extra:
            self.problems.append(f"{len(extra)} tensors have no origin, {extra[0]} for one")


def prove_all(
    accounts: Accounts, work: Sequence[partial[Proof]], threads: int, progress: Progress
) -> Proof:
    source, written = accounts.source, accounts.written
    progress.stage("prove", sum(map(_values, written.tensors.values())), "values")
    copies = [partial(_prove_copy, source, written, t) for t in accounts.copies()]
    found = Proof(problems=accounts.problems)
    with ThreadPoolExecutor(threads, thread_name_prefix="nybble-proof") as pool:
        for part in pool.map(lambda task: task(), (*work, *copies)):
            found.take(part)
            progress.advance(part.values)
    return found


def _values(tensor: TensorInfo) -> int:
    """How many numbers a tensor stands for; scales belong to those of their codes."""
    if "_scale" in tensor.name.rpartition(".")[2]:
        return 0
    return tensor.size * (2 if tensor.dtype == "U8" else 1)


def drop(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Give back the pages of tensors that are done with."""
    for name in names:
        if checkpoint.tensors[name].nbytes >= _LARGE:
            checkpoint.drop_pages(name)


def _prove_copy(source: Checkpoint, written: Checkpoint, tensor: TensorInfo) -> Proof:
    found = Proof(tensors=1, values=tensor.size)
    one, other = source.raw(tensor.name), written.raw(tensor.name)
    if not same_bytes(one, other):
        width = max(tensor.nbytes // max(tensor.size, 1), 1)
        count = int((one.reshape(-1, width) != other.reshape(-1, width)).any(axis=1).sum())
        found.problems.append(f"{tensor.name}: {count} of {tensor.size} copied values differ")
    drop(source, [tensor.name])
    drop(written, [tensor.name])
    return found


def same_bytes(one: U8Array, other: U8Array) -> bool:
    if one.size != other.size:
        return False
    for at in range(0, one.size, _CHUNK):
        a, b = one[at : at + _CHUNK], other[at : at + _CHUNK]
        whole = len(a) // 8 * 8
        if not np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64)):
            return False
        if not np.array_equal(a[whole:], b[whole:]):
            return False
    return True


def same_bits(one: F32Array, other: F32Array) -> bool:
    """Equal bit for bit; one NaN is as good as another."""
    if one.shape != other.shape:
        return False
    a, b = np.ascontiguousarray(one), np.ascontiguousarray(other)
    same = a.view(np.uint32) == b.view(np.uint32)
    return bool((same | (np.isnan(a) & np.isnan(b))).all())
