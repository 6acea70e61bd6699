"""Writing a conversion, and proving it before the folder gets its name.

One pass: a few threads copy bytes from the mapped source and decode matrices some rows at a time,
one of them writing while the others work; small scales were made beforehand. The result is opened
again and held against the source in `OUT.partial`; only what is proven becomes OUT.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import Contents
from nybble.checkpoint.compressed_tensors import CompressedTensors
from nybble.checkpoint.declaration import Declaration
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.layout import Layout
from nybble.checkpoint.modelopt import ModelOpt
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import collector_paused
from nybble.checkpoint.writer import (
    SHARD_BYTES,
    CheckpointWriter,
    layout_shards,
    partial_folder,
)
from nybble.errors import CheckFailed, CheckpointError, RecipeError
from nybble.kernels.block_decode import decode_bf16
from nybble.progress import Progress
from nybble.rewrite.conversion import Conversion, Decoded, Move
from nybble.rewrite.held import Weight
from nybble.rewrite.proof import Proof
from nybble.rewrite.proof_bf16 import prove_bf16
from nybble.rewrite.proof_layouts import prove_layout
from nybble.rewrite.to_bf16 import convert_to_bf16, refuse_nan
from nybble.rewrite.to_layout import convert_to_layout

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ModelOpt(), CompressedTensors())}
#: Bytes that are copied in one task, or more.
_PIECE_BYTES = 1 << 22
#: Elements of a matrix that are decoded in one call.
_PIECE_ELEMENTS = 1 << 20
#: The largest relative error of rounding a normal number to BF16, with room for subnormal ones.
BF16_STEP = 1.0
#: That of the float32 products on both sides.
PRODUCT_ROUNDING = 2.0**-21
#: A tensor from this size on is taken out of memory after its last use.
_LARGE = 1 << 16


@collector_paused()  # a conversion is 100,000s of small objects and no cycle
def make_conversion(
    checkpoint: Checkpoint,
    contents: Contents,
    declaration: Declaration,
    target: str,
    *,
    version: str,
    keep_input_scales: bool = False,
    stack_experts: bool | None = None,
    generic: bool = False,
) -> Conversion:
    """Decide what every tensor becomes. `target` is a layout's word or "bf16".

    Raises what `convert_to_layout` and `convert_to_bf16` raise.
    """
    checkpoint.side_files()  # what cannot be carried over is refused now
    if target == "bf16":
        return convert_to_bf16(checkpoint, contents, declaration, stack_experts=stack_experts)
    return convert_to_layout(
        checkpoint,
        contents,
        declaration,
        LAYOUTS[target],
        version=version,
        keep_input_scales=keep_input_scales,
        generic=generic,
    )


def refuse_inexact(conversion: Conversion) -> None:
    """Raise RecipeError if the target cannot state every value exactly."""
    if conversion.roundings:
        first = conversion.roundings[0]
        raise RecipeError(
            f"--exact: {len(conversion.roundings)} scales have no exact counterpart in "
            f"{conversion.target}, the first {first.name}: {first.before!r} would become "
            f"{first.after!r}; leave --exact out and they are listed, or stay in "
            f"{conversion.held_layout or 'this layout'}"
        )
    if conversion.may_round:
        raise RecipeError(
            f"--exact: {len(conversion.may_round)} matrices have scales whose products BF16 may "
            f"not hold, the first {conversion.may_round[0]}; leave --exact out and the rounded "
            "values are counted"
        )


def refuse_output(out: Path) -> None:
    """Raise CheckpointError for an output that is there, or left from a run that was stopped."""
    folder = partial_folder(out)
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or os.listdir(out)):
        raise CheckpointError(f"{out}: exists and is not an empty folder; name another output")
    if os.path.lexists(folder):
        raise CheckpointError(
            f"{folder}: is left from a conversion that was stopped; remove it, a conversion starts "
            "from the beginning"
        )


def write_conversion(
    conversion: Conversion,
    out: Path,
    *,
    threads: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    disk: Disk | None = None,
    on_written: Callable[[], None] | None = None,
) -> Proof:
    """Write the result to `out`, prove it, and give it its name.

    `on_written` is called between writing and proving. Raises CheckFailed if the result is not what
    the conversion says; `out` is not made then, and what was written is removed.
    """
    refuse_output(out)
    progress = progress or Progress()
    try:
        return _write_proven(
            conversion, out, threads, shard_bytes, progress, disk or Disk(), on_written
        )
    except BaseException:  # Ctrl-C too: nothing continues a half, and it may be large
        shutil.rmtree(partial_folder(out), ignore_errors=True)
        raise


def _write_proven(
    conversion: Conversion,
    out: Path,
    threads: int,
    shard_bytes: int,
    progress: Progress,
    disk: Disk,
    on_written: Callable[[], None] | None,
) -> Proof:
    layout = layout_shards(conversion.outputs, shard_bytes)
    with CheckpointWriter(out, layout, disk=disk) as writer:
        _write_all(conversion, writer, threads, progress)
        if on_written is not None:
            on_written()
        with Checkpoint.open(writer.folder) as written:
            proof = prove(conversion, written, threads=threads, progress=progress)
        if fault := unexplained(conversion, proof):
            raise CheckFailed(
                f"{out}: {fault}; nothing is left of the result. The disk or the memory is faulty, "
                "or nybble is: please report it"
            )
        names = conversion.source.side_files()
        side = [(conversion.source.path / n, n) for n in names if n not in conversion.documents]
        writer.finish(conversion.documents, side, conversion.total_parameters)
    return proof


def prove(
    conversion: Conversion,
    written: Checkpoint,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Proof:
    """Hold what was written against the source."""
    dropped = [each.source.name for each in conversion.dropped]
    source, weights = conversion.source, conversion.weights
    if conversion.target == "bf16":
        return prove_bf16(source, written, weights, dropped, threads=threads, progress=progress)
    return prove_layout(
        source, written, conversion.target, weights, dropped, threads=threads, progress=progress
    )


def unexplained(conversion: Conversion, proof: Proof) -> str:
    """What the proof found that the conversion did not say beforehand; "" if nothing."""
    if proof.problems:
        return f"{len(proof.problems)} faults, the first: {proof.problems[0]}"
    limits = _limits(conversion)
    for each in proof.differing:
        limit = limits.get(each.name)
        if limit is None:
            return f"{each.values} values of {each.name} differ, and no scale of it was rounded"
        if each.largest > limit:
            return (
                f"{each.name}: values differ by a share of {each.largest:.3g}, and its rounded "
                f"scale explains {limit:.3g}"
            )
    expected = len(conversion.source.tensors) - len(conversion.dropped)
    if proof.tensors != expected:
        return f"{proof.tensors} tensors were compared, expected {expected}"
    return ""


# -------------------------------------------------------------------------------------- the writing


def _limits(conversion: Conversion) -> dict[str, float]:
    """By how much the values of a matrix, or a scale, may differ: by what its scale was rounded.

    Products are rounded on both sides, once more where there is a block scale.
    """
    modules = {w.float_scale.name: w.name for w in conversion.weights if w.float_scale}
    found = dict.fromkeys(conversion.may_round, BF16_STEP)
    for each in conversion.roundings:
        share = abs(each.after / each.before - 1) + PRODUCT_ROUNDING
        found[each.name] = found[modules.get(each.name, each.name)] = share
    return found


def _write_all(
    conversion: Conversion, writer: CheckpointWriter, threads: int, progress: Progress
) -> None:
    source = conversion.source
    progress.stage("convert", conversion.payload_bytes)
    for restated in conversion.restated:
        assert restated.value is not None, "headers without data are for a dry run"
        writer.write(restated.spec.name, np.ascontiguousarray(restated.value))
        progress.advance(restated.spec.nbytes)
    tasks = chain(
        _copying(source, conversion.moves, writer), _decoding(source, conversion.decoded, writer)
    )
    with ThreadPoolExecutor(threads, thread_name_prefix="nybble-convert") as pool:
        pending: deque[Future[int]] = deque()
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > 2 * threads:
                progress.advance(pending.popleft().result())
        while pending:
            progress.advance(pending.popleft().result())


def _copying(
    source: Checkpoint, moves: Iterable[Move], writer: CheckpointWriter
) -> Iterator[Callable[[], int]]:
    """Tensors of some megabytes together, each batch a task that copies them."""
    batch, size = [], 0
    for move in moves:
        batch.append(move)
        size += move.spec.nbytes
        if size >= _PIECE_BYTES:
            yield partial(_copy, source, batch, writer)
            batch, size = [], 0
    if batch:
        yield partial(_copy, source, batch, writer)


def _copy(source: Checkpoint, moves: Sequence[Move], writer: CheckpointWriter) -> int:
    for move in moves:
        data = source.raw(move.source.name)
        for at in range(0, max(len(data), 1), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES]
            # One write at a time: what it reads is brought into memory before its turn comes.
            np.bitwise_or.reduce(piece[:: PAGESIZE // 8])
            writer.write(move.spec.name, piece, at)
            if len(data) >= _LARGE:
                source.drop_pages(move.source.name, at, at + len(piece))
    return sum(move.spec.nbytes for move in moves)


def _decoding(
    source: Checkpoint, decoded: Sequence[Decoded], writer: CheckpointWriter
) -> Iterator[Callable[[], int]]:
    """Pieces of rows, each a task that decodes and writes."""
    buffers = _Buffers()
    for each in decoded:
        n, k = each.source.shape
        step = max(128, _PIECE_ELEMENTS // k // 128 * 128)
        scales = each.source.multiplier(source) if isinstance(each.source, Weight) else None
        for first in range(0, n, step):
            last = min(first + step, n)
            yield partial(_piece, source, each, scales, first, last, writer, buffers)


class _Buffers(threading.local):
    """One buffer per thread: new memory for every piece would cost more than decoding into it."""

    bits: NDArray[np.uint16] = np.empty(0, dtype=np.uint16)

    def rows(self, n: int, k: int) -> NDArray[np.uint16]:
        """Uninitialised [n, k], valid until the next call in this thread."""
        if self.bits.size < n * k:
            self.bits = np.empty(n * k, dtype=np.uint16)
        return self.bits[: n * k].reshape(n, k)


def _piece(
    source: Checkpoint,
    each: Decoded,
    scales: NDArray[np.float32] | None,
    first: int,
    last: int,
    writer: CheckpointWriter,
    buffers: _Buffers,
) -> int:
    n, k = each.source.shape
    rows: NDArray[np.generic]
    if isinstance(each.source, Weight):
        bits = buffers.rows(last - first, k)
        held = each.source.rows(source, first, last, scales)
        refuse_nan(each.source, held)
        decode_bf16(held, bits)
        rows, names = bits, [t.name for t in each.source.tensors if t.nbytes >= _LARGE]
    else:
        rows = source.raw(each.source.name)[2 * first * k : 2 * last * k]
        names = [each.source.name]
    writer.write(each.name, rows, 2 * (each.first_row + first) * k)
    if last == n:
        for name in names:
            source.drop_pages(name)
    return rows.nbytes
