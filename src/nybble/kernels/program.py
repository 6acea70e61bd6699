"""A forward as a program: kernel calls written down once, replayed with one call of C.

At batch 1 the calls themselves cost more than the arithmetic. While a `Program` records, kernels
check shapes, take memory from its arena and add their call to its list; nothing is computed. The
forward is recorded at its largest size; the numbers of tokens, sequences and outputs are arguments
of a replay, so one program serves every batch shape up to that size. Memory is shared by liveness:
when the Python forward drops a tensor, a later call may use its place.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nybble.errors import DoesNotFit, EngineError
from nybble.kernels.build import loaded

Count = Literal["tokens", "sequences", "outputs"]
_COUNTS: tuple[Count, ...] = ("tokens", "sequences", "outputs")
_DTYPES = {"f32": np.float32, "i64": np.int64, "i32": np.int32, "u8": np.uint8}
_ALIGN = 256
_RECORD = np.dtype([("step", np.uint64), ("first", np.int64)])
_PATCH = np.dtype([("value", np.int64), ("count", np.int64), ("each", np.int64)])


class Program:
    """Records kernel calls, then replays them. `most` are the sizes at which it records.

    With `beside` it takes its memory from what that finished program does not hold on to: replays
    of the two overwrite each other's intermediate results, and the memory is there once.
    """

    def __init__(
        self, *, tokens: int, sequences: int, outputs: int, beside: Program | None = None
    ) -> None:
        self.most = {"tokens": tokens, "sequences": sequences, "outputs": outputs}
        self.names: list[str] = []
        self._rows: Count = "tokens"
        self._values: list[int] = []
        self._records: list[tuple[int, int]] = []
        self._patches: list[tuple[int, int, int]] = []
        self._arena: _Arena = _Arena() if beside is None else beside._arena
        self._kept: list[object] = []
        self._code: _Code | None = None

    # ------------------------------------------------------------------------------- recording

    def record(self, name: str, signature: str, values: Sequence[int | float | None]) -> None:
        """Add a call. Raises EngineError for a number of rows that does not follow the batch."""
        if self._code is not None:
            raise EngineError(f"{name}: the program is finished and takes no further calls")
        if len(values) != len(signature):
            raise EngineError(f"{name}: {len(values)} arguments for {signature!r}")
        step = ctypes.cast(getattr(loaded(), f"{name}_step"), ctypes.c_void_p).value
        assert step is not None
        self.names.append(name)
        self._records.append((step, len(self._values)))
        for letter, value in zip(signature, values, strict=True):
            if letter in "ts":
                self._patch(name, "sequences" if letter == "s" else self._rows, value)
            self._values.append(_bits(letter, value))

    def _patch(self, name: str, count: Count, value: int | float | None) -> None:
        most = self.most[count]
        if not isinstance(value, int) or value % most:
            raise EngineError(f"{name}: {value} rows are no multiple of {most} {count}")
        self._patches.append((len(self._values), _COUNTS.index(count), value // most))

    def empty(self, shape: Sequence[int], dtype: str = "f32") -> Tensor:
        """Memory of the arena for as long as the tensor, or a view of it, lives."""
        return self._arena.empty(tuple(shape), np.dtype(_DTYPES[dtype]))

    def keep(self, thing: object) -> None:
        """Hold on to what recorded addresses point into, as long as the program lives."""
        self._kept.append(thing)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs within; then the program is finished. Computing with torch raises
        EngineError: only kernels and views can be replayed."""
        with _ViewsOnly():  # type: ignore[no-untyped-call]
            yield
        self._code = _Code(self._records, self._values, self._patches)

    @contextmanager
    def counting(self, count: Count) -> Iterator[None]:
        """Within, rows are counted in `count` instead of tokens."""
        before, self._rows = self._rows, count
        try:
            yield
        finally:
            self._rows = before

    # -------------------------------------------------------------------------------- replaying

    @property
    def arena_bytes(self) -> int:
        """What the intermediate results take, those of programs beside it included."""
        return self._arena.size

    def run(
        self,
        *,
        tokens: int,
        sequences: int,
        outputs: int,
        ticks: NDArray[np.int64] | None = None,
        calls: tuple[int, int] | None = None,
    ) -> None:
        """Replay for a batch of these sizes; the interpreter lock is free meanwhile. `ticks` int64
        [calls]: the nanoseconds of each call are added. `calls`: only those from one number to
        before another.

        Raises EngineError for sizes beyond the recorded ones, DoesNotFit where a kernel finds no
        memory.
        """
        assert self._code is not None
        for count, size in zip(_COUNTS, (tokens, sequences, outputs), strict=True):
            if not 0 <= size <= self.most[count]:
                raise EngineError(f"a step of {size} {count}; it was made for {self.most[count]}")
        failed = self._code.run((tokens, sequences, outputs), ticks, calls)
        if failed:
            raise DoesNotFit(f"{self.names[failed - 1]}: no memory for its scratch")


class _Code:
    """The arrays that C walks."""

    def __init__(
        self,
        records: Sequence[tuple[int, int]],
        values: Sequence[int],
        patches: Sequence[tuple[int, int, int]],
    ) -> None:
        self.records = np.array(records, dtype=_RECORD)
        self.values = np.array([v & (1 << 64) - 1 for v in values], dtype=np.uint64)
        self.patches = np.array(patches, dtype=_PATCH)
        self.counts = np.zeros(len(_COUNTS), dtype=np.int64)
        self.function = loaded().nyb_program_run
        self.function.restype = ctypes.c_int64
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.function.argtypes = [pointer, size, pointer, pointer, size, pointer, pointer]
        self.arguments = (
            self.records.ctypes.data,
            len(self.records),
            self.values.ctypes.data,
            self.patches.ctypes.data,
            len(self.patches),
            self.counts.ctypes.data,
        )

    def run(
        self,
        counts: tuple[int, int, int],
        ticks: NDArray[np.int64] | None,
        calls: tuple[int, int] | None,
    ) -> int:
        """0, or 1 + the number of the call that failed."""
        self.counts[:] = counts
        clock = None if ticks is None else ticks.ctypes.data
        if calls is None:
            return int(self.function(*self.arguments, clock))
        first, end = calls
        at = self.arguments[0] + first * _RECORD.itemsize
        clock = None if clock is None else clock + first * 8
        failed = int(self.function(at, end - first, *self.arguments[2:], clock))
        return failed and first + failed


def _bits(letter: str, value: int | float | None) -> int:
    if letter in "fd":
        return int(np.float64(value).view(np.int64))
    return int(value or 0)


class _Arena:
    """Memory handed out while recording, and reused when its tensor is gone.

    Segments are anonymous maps: what no replay reaches is never touched, so it costs nothing.
    """

    SEGMENT = 64 << 20

    def __init__(self) -> None:
        self.size = 0
        self._segments: list[mmap.mmap] = []
        self._free: list[_Gap] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Tensor:
        """A tensor whose place is free again when it and its views are gone."""
        count = math.prod(shape)
        size = max(-(-count * dtype.itemsize // _ALIGN) * _ALIGN, _ALIGN)
        segment, offset = self._take(size)
        memory = memoryview(self._segments[segment])[offset : offset + size]
        array: NDArray[np.generic] = np.frombuffer(memory, dtype=dtype, count=count)
        weakref.finalize(array, self._give, _Gap(segment, offset, size))
        return torch.from_numpy(array).view(shape)  # its storage holds the array, and so do views

    def _take(self, size: int) -> tuple[int, int]:
        fitting = [gap for gap in self._free if gap.size >= size]
        if not fitting:
            made = -(-max(size, self.SEGMENT) // mmap.PAGESIZE) * mmap.PAGESIZE
            self._segments.append(self._mapped(made))
            self.size += made
            fitting = [_Gap(len(self._segments) - 1, 0, made)]
            self._free += fitting
        best = min(fitting, key=lambda gap: (gap.size, gap.segment, gap.offset))
        self._free.remove(best)
        if best.size > size:
            self._free.append(_Gap(best.segment, best.offset + size, best.size - size))
        return best.segment, best.offset

    def _mapped(self, size: int) -> mmap.mmap:
        try:
            return mmap.mmap(-1, size)
        except (OSError, OverflowError) as error:
            raise DoesNotFit(
                f"no memory for the results of a step: {size:,} bytes beside {self.size:,} "
                f"({error}); max_batched_tokens decides how many they are: make it smaller"
            ) from error

    def _give(self, gap: _Gap) -> None:
        for other in [g for g in self._free if g.segment == gap.segment]:
            if other.offset + other.size == gap.offset:
                self._free.remove(other)
                gap = _Gap(gap.segment, other.offset, other.size + gap.size)
            elif gap.offset + gap.size == other.offset:
                self._free.remove(other)
                gap = _Gap(gap.segment, gap.offset, gap.size + other.size)
        self._free.append(gap)


class _Gap(NamedTuple):
    segment: int
    offset: int
    size: int


class _ViewsOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While a program records, torch may look at tensors and not compute: what it computed would
    be missing from the program."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Asking to be skipped imports torch._dynamo: three times what importing torch takes.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func not in _HARMLESS:
            raise EngineError(f"{func} while a program records; use a kernel")
        return func(*args, **(kwargs or {}))


_HARMLESS = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})
