"""Which tensors of two checkpoints differ, and in how many elements.

Tensors are compared by name, whatever shard they lie in. Quantized modules of one format are
compared part by part, also across layouts: `weight` with `weight_packed`, a scale with a divisor.

Without `deep`, a tensor above 1 MiB, and whatever comes after the first GiB, is compared by
samples: the first page, one in the middle, the last.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import (
    CODES,
    INPUT_SCALES,
    SCALES,
    TENSOR_SCALES,
    Contents,
    Module,
    is_divisor,
    read_contents,
)
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import Checkpoint, U8Array
from nybble.checkpoint.safetensors import WIDTHS, TensorInfo
from nybble.errors import CheckpointError
from nybble.progress import Progress

WHOLE_BYTES = 1 << 20  # a tensor up to this size is compared whole ...
BUDGET_BYTES = 1 << 30  # ... until this much was read
_SAMPLE = 4096
_CHUNK = 16 << 20
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Count:
    """How many elements differ, of those compared, of those there are."""

    different: int
    compared: int
    size: int


@dataclass(frozen=True, slots=True)
class Retyped:
    """A tensor that has another dtype or shape in B."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor of equal dtype and shape whose values differ."""

    name: str
    elements: Count


@dataclass(frozen=True, slots=True)
class ModuleValues:
    """A quantized module of one format and shape whose parts differ.

    A ratio is B's scale over A's, as multipliers whatever the layout stores, of a stack the one
    farthest from 1; None where there is no such scale, not finite where A's is 0.
    """

    name: str
    role: str
    held: str
    codes: Count
    scales: Count | None
    tensor_scale_ratio: float | None
    input_scale_ratio: float | None


@dataclass(slots=True)
class TensorComparison:
    """One pass over the tensors that both have."""

    a: Checkpoint
    b: Checkpoint
    deep: bool
    progress: Progress
    paired_a: set[str] = field(default_factory=set)
    paired_b: set[str] = field(default_factory=set)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    retyped: list[Retyped] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    modules: list[ModuleValues] = field(default_factory=list)
    whole: int = 0
    sampled: int = 0
    read_bytes: int = 0
    same_files: set[tuple[str, str]] = field(default_factory=set)

    def run(self) -> None:
        files = {_identity(self.b, shard.name): shard.name for shard in self.b.shards}
        for shard in self.a.shards:
            if same := files.get(_identity(self.a, shard.name)):
                self.same_files.add((shard.name, same))
        self.progress.stage("compare", sum(t.nbytes for t in self.a.tensors.values()))
        held_a, held_b = (_contents(c) for c in (self.a, self.b))
        for module in held_a.modules:
            other = held_b.by_name.get(module.name)
            if other is not None and module.kind.is_quantized:
                self.compare_module(module, other)
        for name, tensor in self.a.tensors.items():
            twin = self.b.tensors.get(name)
            if twin is None or name in self.paired_a:
                continue
            if (tensor.dtype, tensor.shape) != (twin.dtype, twin.shape):
                self.retyped.append(Retyped(name, _spell(tensor), _spell(twin)))
                continue
            count = self.count(tensor, twin)
            if count.different:
                self.values.append(Values(name, count))

    def compare_module(self, mine: Module, other: Module) -> None:
        """Compare the parts of a module, if both hold it in one format and shape."""
        a, b = _parts(mine), _parts(other)
        codes = a.codes, b.codes
        if mine.kind.held != other.kind.held or codes[0] is None or codes[1] is None:
            return
        if (codes[0].dtype, codes[0].shape) != (codes[1].dtype, codes[1].shape):
            return
        is_packed = mine.kind.held.startswith(("nvfp4", "mxfp4", "int4"))
        count = self.count(codes[0], codes[1], is_packed)
        self.pair(codes[0], codes[1])
        scales, ratio = None, self.ratio(a.tensor_scale, b.tensor_scale)
        if a.scale is not None and a.scale.size == 1:
            ratio = self.ratio(a.scale, b.scale) if ratio is None else ratio
        else:
            scales = self.count_scales(a.scale, b.scale)
        input_ratio = self.ratio(a.input_scale, b.input_scale)
        if count.different or (scales and scales.different) or {ratio, input_ratio} - {None, 1.0}:
            self.modules.append(
                ModuleValues(
                    mine.name, mine.role, mine.kind.held, count, scales, ratio, input_ratio
                )
            )

    def count_scales(self, a: TensorInfo | None, b: TensorInfo | None) -> Count | None:
        """How many block or channel scales differ, by value where their dtypes differ."""
        if a is None or b is None or a.size != b.size:
            return None
        if a.dtype == b.dtype:
            self.pair(a, b)
            return self.count(a, b)
        if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
            return None
        self.pair(a, b)
        self.whole += 1
        self.progress.advance(a.nbytes, a.name)
        x, y = self.multipliers(a, self.a), self.multipliers(b, self.b)
        return Count(int(np.count_nonzero(x != y)), a.size, a.size)

    def ratio(self, a: TensorInfo | None, b: TensorInfo | None) -> float | None:
        """B's tensor scale over A's."""
        if a is None or b is None or a.size != b.size:
            return None
        self.pair(a, b)
        self.whole += 1
        self.progress.advance(a.nbytes, a.name)
        x, y = self.multipliers(a, self.a), self.multipliers(b, self.b)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 1.0, y / x)
            return float(ratios[np.argmax(np.abs(np.log(np.abs(ratios))))])

    def multipliers(self, scale: TensorInfo, checkpoint: Checkpoint) -> NDArray[np.float64]:
        """Scales as what codes are multiplied with, flat."""
        value = checkpoint.array(scale.name).reshape(-1).astype(np.float32)
        if is_divisor(scale):
            with np.errstate(divide="ignore"):
                value = np.float32(1) / value
        return value.astype(np.float64)

    def pair(self, a: TensorInfo, b: TensorInfo) -> None:
        """Take a tensor of each side out of the comparison by name."""
        self.paired_a.add(a.name)
        self.paired_b.add(b.name)
        if a.name != b.name:
            self.renamed.append((a.name, b.name))
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            self.retyped.append(Retyped(a.name, _spell(a), _spell(b)))

    def count(self, a: TensorInfo, b: TensorInfo, is_packed: bool = False) -> Count:
        """Elements that differ; of packed codes, nibbles. Both have one dtype and shape."""
        per_byte = 2.0 if is_packed else 1 / WIDTHS[a.dtype]
        size = round(a.nbytes * per_byte)
        if (a.file, b.file) in self.same_files and a.offset == b.offset:
            self.whole += 1
            self.progress.advance(a.nbytes, a.name)
            return Count(0, size, size)
        ranges = self.ranges(a.nbytes)
        different, compared = 0, sum(stop - start for start, stop in ranges)
        if compared == a.nbytes:
            different = self.count_whole(a, b, is_packed)
        else:
            samples = (_read(c.path, t, ranges) for c, t in ((self.a, a), (self.b, b)))
            for x, y in zip(*samples, strict=True):
                different += _unequal(x, y, a.dtype, is_packed)
            self.progress.advance(a.nbytes, a.name)
        self.read_bytes += compared
        self.whole += compared == a.nbytes
        self.sampled += compared != a.nbytes
        return Count(different, round(compared * per_byte), size)

    def count_whole(self, a: TensorInfo, b: TensorInfo, is_packed: bool) -> int:
        x, y = self.a.raw(a.name), self.b.raw(b.name)
        different = 0
        for at in range(0, a.nbytes, _CHUNK):
            end = min(at + _CHUNK, a.nbytes)
            different += _unequal(x[at:end], y[at:end], a.dtype, is_packed)
            if end - at > WHOLE_BYTES:
                self.a.drop_pages(a.name, at, end)
                self.b.drop_pages(b.name, at, end)
            self.progress.advance(end - at, a.name)
        return different

    def ranges(self, nbytes: int) -> list[tuple[int, int]]:
        """The bytes of a tensor to compare."""
        is_affordable = nbytes <= WHOLE_BYTES and self.read_bytes + nbytes <= BUDGET_BYTES
        if self.deep or is_affordable or nbytes <= 3 * _SAMPLE:
            return [(0, nbytes)]
        middle = nbytes // 2 // _SAMPLE * _SAMPLE
        last = (nbytes - _SAMPLE) // _SAMPLE * _SAMPLE
        return [(0, _SAMPLE), (middle, middle + _SAMPLE), (last, nbytes)]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors of a quantized module by what they are."""

    codes: TensorInfo | None
    scale: TensorInfo | None
    tensor_scale: TensorInfo | None
    input_scale: TensorInfo | None


def _parts(module: Module) -> _Parts:
    return _Parts(
        module.tensor(*CODES),
        module.tensor(*SCALES),
        module.tensor(*TENSOR_SCALES),
        module.tensor(*INPUT_SCALES),
    )


def _contents(checkpoint: Checkpoint) -> Contents:
    return read_contents(checkpoint, declaration_of(checkpoint))


def _identity(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    status = (checkpoint.path / name).stat()
    return status.st_dev, status.st_ino


def _spell(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _read(path: Path, tensor: TensorInfo, ranges: list[tuple[int, int]]) -> list[U8Array]:
    """Samples, read and not mapped: a fault would read a hundred pages around each."""
    file = path / tensor.file
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = [os.pread(fd, stop - start, tensor.offset + start) for start, stop in ranges]
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if [len(part) for part in parts] != [stop - start for start, stop in ranges]:
        raise CheckpointError(f"{file}: changed since it was opened; start again")
    return [np.frombuffer(part, dtype=np.uint8) for part in parts]


def _unequal(x: U8Array, y: U8Array, dtype: str, is_packed: bool) -> int:
    if is_packed:
        changed = x ^ y
        return int(np.count_nonzero(changed & 15) + np.count_nonzero(changed & 240))
    word = np.dtype(f"u{WIDTHS[dtype]}")
    return int(np.count_nonzero(x.view(word) != y.view(word)))
