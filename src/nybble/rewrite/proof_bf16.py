"""The proof of a conversion to BF16: every value of the result against the quantized source.

The source is decoded here a second time, by `proof_reading.py`, and not by what wrote the result.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.progress import Progress
from nybble.rewrite.held import Weight
from nybble.rewrite.proof import Accounts, Difference, Proof, drop, prove_all
from nybble.rewrite.proof_reading import (
    Bits,
    F32Array,
    U8Array,
    Written,
    e2m1,
    e4m3,
    nearest_bf16,
)
from nybble.rewrite.proof_source import forgotten, may_be_left_out, read_source, source_fault

#: Elements that are decoded at a time: few enough for the cache.
_ELEMENTS = 1 << 17
#: Elements that stay in memory before their pages are given back.
_KEPT_ELEMENTS = 1 << 22


def prove_bf16(
    source: Checkpoint,
    written: Checkpoint,
    weights: Sequence[Weight],
    dropped: Iterable[str],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Proof:
    """Hold plain weights against the quantized ones that they were decoded from.

    A value differs if BF16 does not hold the float32 product; it must be the nearest, or the result
    is wrong.
    """
    accounts = Accounts(source, written, dropped)
    accounts.keep(lambda name: may_be_left_out(name, "bf16", ()))
    work = []
    inside: dict[str, list[str]] = {}
    for weight in weights:
        own, first_row = _place(written, f"{weight.name}.weight", weight.shape)
        parts = [t.name for t in weight.tensors if t.name not in accounts.dropped]
        inside.setdefault(own, []).append(weight.name)
        accounts.take(parts, [own])
        if fault := source_fault(source, weight):
            accounts.problems.append(fault)
            continue
        work.append(partial(_prove_decoded, source, written, weight, own, first_row))
    accounts.problems += forgotten(source, accounts.taken)
    for name, tensor in source.tensors.items():
        own, first_row = _place(written, name, tensor.shape)
        if name not in accounts.taken and own != name and own in written.tensors:
            accounts.take([name], [own])
            inside.setdefault(own, []).append(name)
            work.append(partial(_prove_row_copy, source, written, name, own, first_row))
    accounts.problems += _unfilled(written, inside)
    return prove_all(accounts, work, threads, progress or Progress())


_in_stack = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight").fullmatch


def _place(written: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """The tensor of the result that holds a matrix, and its first row there."""
    found = _in_stack(name)
    if found is None or name in written.tensors:
        return name, 0
    expert = int(found[2])
    if found[3] == "down":
        return f"{found[1]}.down_proj", expert * shape[0]
    return f"{found[1]}.gate_up_proj", (2 * expert + (found[3] == "up")) * shape[0]


def _unfilled(written: Checkpoint, inside: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Stacks with more matrices than were put in."""
    for own, names in inside.items():
        info = written.tensors.get(own)
        if info is not None and len(info.shape) == 3:
            matrices = info.shape[0] * (2 if own.endswith("gate_up_proj") else 1)
            if matrices != len(names):
                yield f"{own} holds {matrices} matrices, the source has {len(names)} of them"


def _rows_of(written: Checkpoint, own: str, k: int, first: int, last: int) -> Bits | str:
    info = written.tensors.get(own)
    if info is None:
        return f"{own} is absent"
    if info.dtype != "BF16" or info.shape[-1] != k or info.size < last * k:
        return f"{own} is {info.dtype} {list(info.shape)}, which cannot hold its matrices"
    raw = written.raw(own)[2 * first * k : 2 * last * k]
    return raw.view("<u2").reshape(last - first, k)


def _prove_decoded(
    source: Checkpoint, written: Checkpoint, weight: Weight, own: str, first_row: int
) -> Proof:
    n, k = weight.shape
    found = Proof(
        tensors=sum(1 for t in weight.tensors if t is not weight.input_scale), values=n * k
    )
    module = read_source(source, weight)
    # A part begins at the edge of a block, which is 128 rows in FP8_BLOCK.
    step = max(1, _ELEMENTS // k)
    if weight.format is FP8_BLOCK:
        step = -(-step // 128) * 128
    rounded, largest, kept = 0, 0.0, 0
    for first in range(0, n, step):
        last = min(first + step, n)
        stored = _rows_of(written, own, k, first_row + first, first_row + last)
        if isinstance(stored, str):
            found.problems.append(stored)
            return found
        fault, count, worst = compare_decoded(module, stored, first, last)
        rounded, largest = rounded + count, max(largest, worst)
        if last == n or (last - kept) * k >= _KEPT_ELEMENTS:
            written.drop_pages(own, 2 * (first_row + kept) * k, 2 * (first_row + last) * k)
            kept = last
        if fault:
            found.problems.append(f"{weight.name}: {fault} values are not the nearest in BF16")
    if rounded:
        found.differing.append(Difference(weight.name, "weight", rounded, n * k, largest))
    drop(source, (t.name for t in weight.tensors))
    return found


class _Buffers(threading.local):
    """What a comparison needs, once per thread: new memory for each would cost more than it."""

    index16: NDArray[np.uint16] = np.empty(0, dtype=np.uint16)
    index: NDArray[np.intp] = np.empty(0, dtype=np.intp)
    found: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)

    def grow(self, size: int) -> None:
        if self.index.size < size:
            self.index16 = np.empty(size, dtype=np.uint16)
            self.index = np.empty(size, dtype=np.intp)
            self.found = np.empty(size, dtype=np.uint32)


_buffers = _Buffers()


@dataclass(frozen=True, slots=True)
class _Table:
    """What there can be: each product of a code and a scale in BF16, or each pair of neighbours.

    `bits` are uint16, or uint32 with the first of a pair in the low half; `lost` says how many were
    rounded, and `worst` by how much at most, relatively; both are None where all are exact.
    """

    bits: NDArray[np.unsignedinteger]
    lost: NDArray[np.uint8] | None
    worst: F32Array | None

    def pairs(self, first: NDArray[np.intp], second: NDArray[np.intp]) -> _Table:
        """A table of two entries of this one for each index."""
        wide = self.bits.astype(np.uint32)
        bits = wide[first] | wide[second] << np.uint32(16)
        if self.lost is None or self.worst is None:
            return _Table(bits, None, None)
        worst = np.maximum(self.worst[first], self.worst[second])
        return _Table(bits, self.lost[first] + self.lost[second], worst)

    def hold(self, index: NDArray[np.intp], stored: Bits) -> tuple[int, int, float]:
        """Values that are wrong, values that were rounded, and the largest rounding."""
        own = stored.reshape(-1)
        expected = _buffers.found.view(self.bits.dtype)[: index.size]
        np.take(self.bits, index, out=expected, mode="clip")
        wrong = 0
        if not np.array_equal(expected, own.view(self.bits.dtype)):
            wrong = int(np.count_nonzero(expected.view("<u2") != own))
        if self.lost is None or self.worst is None:
            return wrong, 0, 0.0
        count = int(np.take(self.lost, index, mode="clip").sum(dtype=np.int64))
        shares = _buffers.found[: index.size].view(np.float32)
        np.take(self.worst, index, out=shares, mode="clip")
        return wrong, count, float(shares.max())


def compare_decoded(module: Written, stored: Bits, first: int, last: int) -> tuple[int, int, float]:
    """Rows first:last in BF16 against the products: values that are wrong, values that were
    rounded, and the largest rounding."""
    codes = module.codes[first:last].reshape(-1)
    is_odd = bool(stored.size % 2)
    if module.format in (NVFP4, MXFP4):
        table = _packed_pairs(module.format, float(module.top))
        index = _packed_index(codes, module.scale[first:last].reshape(-1))
    elif module.format is FP8 and not is_odd:
        table = _fp8_pairs(float(module.scale.reshape(-1)[0]))
        index = _index_like(codes.view("<u2"))
    else:
        table, index = _by_scale(module, first, last)
        index += codes
    return table.hold(index, stored)


def _index_like(narrow: NDArray[np.uint16]) -> NDArray[np.intp]:
    """An index in the type that numpy wants."""
    _buffers.grow(narrow.size)
    index = _buffers.index[: narrow.size]
    index[:] = narrow
    return index


def _packed_index(codes: U8Array, scale: NDArray[np.generic]) -> NDArray[np.intp]:
    """For each byte its block scale * 256 + itself."""
    _buffers.grow(codes.size)
    narrow = _buffers.index16[: codes.size]
    words = codes.size // scale.size // 4
    # Four indexes at a time: a scale times this is the scale in the upper half of each.
    spread = scale.astype("<u8") * np.uint64(0x0100_0100_0100_0100)
    four = narrow.view("<u8").reshape(-1, words)
    for word in range(words):
        four[:, word] = spread
    narrow |= codes
    return _index_like(narrow)


def _by_scale(module: Written, first: int, last: int) -> tuple[_Table, NDArray[np.intp]]:
    """The products of all FP8 codes with each scale of these rows, and where each element's scale
    begins in that table."""
    n, k = last - first, module.codes.shape[1]
    if module.format is FP8_BLOCK:
        scale = module.scale[first // 128 : -(-last // 128)]
        row, column = np.arange(n) // 128 * scale.shape[1], np.arange(k) // 128
    else:
        scale = module.scale[first:last] if module.format is FP8_CHANNEL else module.scale
        row, column = np.arange(n) if scale.size > 1 else np.zeros(n, np.intp), np.zeros(k, np.intp)
    with np.errstate(over="ignore", invalid="ignore"):
        values = e4m3() * scale.astype(np.float32).reshape(-1, 1)
    _buffers.grow(n * k)
    index = _buffers.index[: n * k]
    np.add(row[:, None] * 256, column * 256, out=index.reshape(n, k))
    return _table(values.reshape(-1)), index


@lru_cache(maxsize=16)
def _packed_pairs(fmt: BlockFormat, top: float) -> _Table:
    """[block scale * 256 + byte]: the low four bits come first."""
    scale = np.arange(256, dtype=np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = Written(fmt, scale, scale, np.float32(top)).scales(scale)
        values = scales[:, None] * e2m1()[None, :]
    row, byte = np.divmod(np.arange(1 << 16), 256)
    return _table(values.reshape(-1)).pairs(row * 16 + (byte & 15), row * 16 + (byte >> 4))


@lru_cache(maxsize=16)
def _fp8_pairs(scale: float) -> _Table:
    """[second code * 256 + first code]."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = e4m3() * np.float32(scale)
    second, first = np.divmod(np.arange(1 << 16), 256)
    return _table(values).pairs(first, second)


def _table(values: F32Array) -> _Table:
    """Each of `values`, float32 [entries]."""
    bits = nearest_bf16(values)
    back = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    is_lost = (values.view(np.uint32) != back.view(np.uint32)) & ~np.isnan(values)
    if not is_lost.any():
        return _Table(bits, None, None)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.abs(back.astype(np.float64) - values) / np.abs(values)
        share = np.nan_to_num(share, nan=np.inf, posinf=np.inf)
        worst = np.where(is_lost, share, 0).astype(np.float32)
    return _Table(bits, is_lost.astype(np.uint8), worst)


def _prove_row_copy(
    source: Checkpoint, written: Checkpoint, name: str, own: str, first_row: int
) -> Proof:
    """A plain matrix inside a stack."""
    n, k = source.tensors[name].shape
    found = Proof(tensors=1, values=n * k)
    stored = _rows_of(written, own, k, first_row, first_row + n)
    if isinstance(stored, str):
        found.problems.append(stored)
        return found
    count = int(np.count_nonzero(source.raw(name).view("<u2").reshape(n, k) != stored))
    if count:
        found.problems.append(f"{name}: {count} of {n * k} copied values differ")
    return found
