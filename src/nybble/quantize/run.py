"""Executing a plan: one source tensor (or fused group) at a time, tile by tile, into a journalled writer.

Private memory is bounded by the tile: sources are mapped, output buffers are `TILE_BYTES` and at most `IN_FLIGHT` of
them exist, one being filled while the others are written. Every value is checked before it is quantized: the amax pass
shows NaN and infinities, which are refused by tensor name and index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import (
    JOURNAL,
    SHARD_BYTES,
    CheckpointWriter,
    ShardLayout,
    layout_shards,
    partial_folder,
)
from nybble.errors import CheckpointError, FormatError, RecipeError
from nybble.formats import search as definition
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, NVFP4
from nybble.formats.element import F32Array
from nybble.formats.search import Search
from nybble.kernels import block_quantize
from nybble.plan.plan import Copy, Job, Member, Plan
from nybble.progress import Progress
from nybble.quantize.journal import Journal

#: Output bytes of one kernel call.
TILE_BYTES = 64 << 20
#: Tiles that may exist at once: one being filled, one being written.
IN_FLIGHT = 2
#: Written bytes after which the journal is told; a crash costs at most the work on these.
COMMIT_BYTES = 512 << 20
#: Rows that are widened to float32 at once, where a step works on numpy arrays.
STRIP_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Options:
    """How a plan is executed. None of these but `search` and `shard_bytes` changes a byte of the result."""

    search: Search = "mse"
    shard_bytes: int = SHARD_BYTES
    threads: int = 1
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """What the journal records as one: a copied tensor, or the jobs that share source tensors."""

    name: str
    copy: Copy | None
    jobs: tuple[Job, ...]


def units(plan: Plan) -> list[Unit]:
    """The work in the order of the source: copies, fused groups, whole stacks."""
    found: dict[str, Unit] = {}
    first_seen: dict[str, int] = {name: i for i, name in enumerate(plan.checkpoint.tensors)}
    for copy in plan.copies:
        found[copy.tensor.name] = Unit(copy.tensor.name, copy, ())
    for name, jobs in groupby(plan.jobs, key=_unit_name):
        found[name] = Unit(name, None, tuple(jobs))
    place = {
        u.name: first_seen[u.copy.tensor.name if u.copy else u.jobs[0].members[0].source]
        for u in found.values()
    }
    return sorted(found.values(), key=lambda u: place[u.name])


def _unit_name(job: Job) -> str:
    """The experts of one stack are one unit; a fused group is one by itself."""
    first = job.members[0]
    return job.name if first.expert is None else first.source


def execute(
    plan: Plan,
    out: Path,
    options: Options,
    *,
    version: str,
    progress: Progress,
    disk: Disk | None = None,
) -> None:
    """Write the checkpoint that the plan describes to `out`.

    Raises RecipeError if the plan needs measured input scales; FormatError for NaN or infinities, naming tensor and
    index; CheckpointError and DoesNotFit from the writer. What an interruption leaves in OUT.partial is continued with
    `options.resume`, and ends with the same bytes.
    """
    _refuse_static(plan)
    for job in plan.jobs:
        if job.scheme.weight is not None:
            definition.check_search(job.scheme.weight, options.search)
    disk = disk or Disk()
    layout = layout_shards(plan.outputs, options.shard_bytes)
    work = units(plan)
    header = journal_header(plan, options, version)
    path = partial_folder(out) / JOURNAL
    journal = None
    if options.resume and disk.size(path) is not None:
        journal = Journal.resume(path, header, disk=disk)
    done = journal.done if journal else set()
    try:
        written = [name for unit in work if unit.name in done for name in _names(plan, unit)]
        with CheckpointWriter(
            out, layout, disk=disk, resume=options.resume, done=written
        ) as writer:
            journal = journal or Journal.create(path, header, disk=disk)
            with Run(plan, options, writer, journal, progress) as run:
                run.all([unit for unit in work if unit.name not in done])
            journal.close()
            _finish(plan, writer, layout, version)
    finally:
        if journal is not None:
            journal.close()


def journal_header(plan: Plan, options: Options, version: str) -> dict[str, object]:
    """What must be equal for a run to be continued: the source by headers, sizes and times, the plan, the options."""
    return {
        "version": version,
        "source": plan.checkpoint.fingerprint(),
        "plan": plan.digest(),
        "recipe": plan.recipe.name,
        "layout": plan.layout.name,
        "search": options.search,
        "shard_bytes": options.shard_bytes,
    }


def _refuse_static(plan: Plan) -> None:
    for job in plan.jobs:
        if job.scheme.needs_input_scale:
            raise RecipeError(
                f"{job.name}: {job.scheme} needs a measured input_scale, and this run measures none; "
                "a made-up scale would silently ruin answers"
            )


def _names(plan: Plan, unit: Unit) -> list[str]:
    if unit.copy:
        return [unit.copy.tensor.name]
    return [
        f"{m.module}.{leaf.suffix}"
        for job in unit.jobs
        for m in job.members
        for leaf in plan.leaves(job.scheme, m.shape)
    ]


def _finish(
    plan: Plan, writer: CheckpointWriter, layout: Sequence[ShardLayout], version: str
) -> None:
    checkpoint = plan.checkpoint
    documents = plan.layout.documents(checkpoint.config, plan.listing(version))
    side = [
        (checkpoint.path / name, name) for name in checkpoint.side_files() if name not in documents
    ]
    writer.finish(documents, side, plan.stored_parameters)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows [first, last) of a member: what one kernel run covers. `matrix` is a view into the mapped file."""

    job: Job
    member: Member
    first: int
    last: int
    matrix: NDArray[np.generic]


class Run:
    """The state of one execution: who writes, what is not yet committed."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        writer: CheckpointWriter,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.plan, self.options, self.writer, self.journal = plan, options, writer, journal
        self.progress = progress
        self.checkpoint: Checkpoint = plan.checkpoint
        self.background = ThreadPoolExecutor(1, thread_name_prefix="nybble-writer")
        self.pending: list[Future[None]] = []
        self.uncommitted: list[str] = []
        self.uncommitted_bytes = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.background.shutdown(wait=True, cancel_futures=True)

    def all(self, work: Sequence[Unit]) -> None:
        """Do every unit and commit."""
        total = sum(self._source_bytes(unit) for unit in work)
        self.progress.stage("quantize", total)
        for unit in work:
            if unit.copy:
                self._copy(unit.copy)
            else:
                self._quantize(unit.jobs)
            self.uncommitted.append(unit.name)
            self.uncommitted_bytes += self._source_bytes(unit)
            if self.uncommitted_bytes >= COMMIT_BYTES:
                self.commit()
        self.commit()

    def commit(self) -> None:
        """Flush what is written, then tell the journal."""
        self._drain(0)
        self.writer.sync()
        self.journal.commit(self.uncommitted)
        self.uncommitted, self.uncommitted_bytes = [], 0

    def _source_bytes(self, unit: Unit) -> int:
        if unit.copy:
            return unit.copy.tensor.nbytes
        return sum(self.checkpoint.tensors[name].nbytes for name in _sources(unit.jobs))

    def _copy(self, copy: Copy) -> None:
        name = copy.tensor.name
        data = self.checkpoint.raw(name)
        for at in range(0, max(len(data), 1), TILE_BYTES):
            part = data[at : at + TILE_BYTES]
            self._write(lambda part=part, at=at: self.writer.write(name, part, at))
            self.progress.advance(len(part), name)
        self._drain(0)
        self.checkpoint.drop_pages(name)

    def _quantize(self, jobs: Sequence[Job]) -> None:
        for name in _sources(jobs):
            self.checkpoint.will_need(name)
        for some in _batches(self.plan, jobs):
            matrices = {m.module: _matrix(self.checkpoint, m) for job in some for m in job.members}
            scales = self._scales(some, matrices)
            for tile in _tiles(self.plan, some, matrices):
                self._tile(tile, scales)
                self.progress.advance(sum(p.matrix.nbytes for p in tile), tile[-1].member.module)
            self._scalars(some, scales)
        self._drain(0)
        for name in _sources(jobs):
            self.checkpoint.drop_pages(name)

    def _scales(
        self, jobs: Sequence[Job], matrices: dict[str, NDArray[np.generic]]
    ) -> dict[str, F32Array]:
        """Tensor scales (NVFP4: 0-d) or scales (FP8: per tensor 0-d, per channel [N, 1], blocks) of each module."""
        modules = [m for job in jobs for m in job.members]
        amax = dict(
            zip(
                (m.module for m in modules),
                self._amax([matrices[m.module] for m in modules]),
                strict=True,
            )
        )
        for m in modules:
            if not np.isfinite(amax[m.module]):
                raise _not_finite(m, matrices[m.module])
        scales = {}
        for job in jobs:
            fmt, search = job.scheme.weight, self.options.search
            assert fmt is not None
            shared = np.float32(max(amax[m.module] for m in job.members))
            for m in job.members:
                if fmt is FP8_CHANNEL:
                    rows = self._amax(list(matrices[m.module]))
                    scale = definition.tensor_scale(rows[:, None], fmt, search)
                elif fmt is FP8_BLOCK:
                    found = [
                        definition.block_amax(x.astype(np.float32), fmt)
                        for x in _strips(matrices[m.module])
                    ]
                    scale = definition.tensor_scale(np.concatenate(found), fmt, search)
                else:
                    # ModelOpt keeps one FP8 scale per member; engines requantise those to one.
                    own = fmt is FP8 and search == "absmax"
                    scale = definition.tensor_scale(amax[m.module] if own else shared, fmt, search)
                scales[m.module] = scale if fmt is NVFP4 else self.plan.layout.round_scales(scale)
        return scales

    def _amax(self, runs: Sequence[NDArray[np.generic]]) -> F32Array:
        return block_quantize.amax(runs, self.options.threads)

    def _tile(self, tile: Sequence[_Piece], scales: dict[str, F32Array]) -> None:
        """Quantize the pieces into two fresh buffers, codes and block scales, and hand them to the writer."""
        fmt = tile[0].job.scheme.weight
        assert fmt is not None
        sizes = [_sizes(p) for p in tile]
        codes = np.empty(sum(s[0] for s in sizes), dtype=np.uint8)
        blocks = np.empty(sum(s[1] for s in sizes), dtype=np.uint8)
        code_runs = np.split(codes, np.cumsum([s[0] for s in sizes])[:-1])
        block_runs = np.split(blocks, np.cumsum([s[1] for s in sizes])[:-1])
        if fmt is FP8_BLOCK:
            for p, run in zip(tile, code_runs, strict=True):
                made = definition.quantize(
                    p.matrix, fmt, self.options.search, scale=_block_rows(p, scales)
                )
                run[:] = made.codes.reshape(-1)
        else:
            runs = [p.matrix for p in tile]
            per_run = (
                np.array([scales[p.member.module] for p in tile], dtype=np.float32)
                if fmt is not FP8_CHANNEL
                else None
            )
            if per_run is None:  # one run per row
                per_run = np.concatenate(
                    [scales[p.member.module][p.first : p.last, 0] for p in tile]
                )
                code_runs = [
                    row
                    for p, c in zip(tile, code_runs, strict=True)
                    for row in c.reshape(p.matrix.shape)
                ]
                runs = [row for p in tile for row in p.matrix]
            block_quantize.quantize(
                runs,
                fmt,
                self.options.search,
                per_run,
                code_runs,
                block_runs,
                self.options.threads,
                bf16_quotient=fmt is FP8
                and self.options.search == "absmax"
                and self.plan.layout.name == "modelopt",
            )
        self._write(lambda: self._write_tile(tile, "codes", codes))
        if blocks.size:
            self._write(lambda: self._write_tile(tile, "scale", blocks))

    def _write_tile(self, tile: Sequence[_Piece], part: str, buffer: NDArray[np.generic]) -> None:
        """Write one part of a tile's modules: whole tensors that lie together in one call."""
        at = 0
        whole: list[tuple[str, int]] = []
        for p in tile:
            leaf = next(x for x in self.plan.leaves(p.job.scheme, p.member.shape) if x.part == part)
            name = f"{p.member.module}.{leaf.suffix}"
            per_row = leaf.nbytes // p.member.shape[0]
            size = per_row * (p.last - p.first)
            if size == leaf.nbytes:
                whole.append((name, size))
            else:
                self.writer.write(name, buffer[at : at + size], p.first * per_row)
            at += size
        if whole:
            assert len(whole) == len(tile)
            self._write_whole(whole, buffer)

    def _write_whole(self, tensors: Sequence[tuple[str, int]], buffer: NDArray[np.generic]) -> None:
        start = at = 0
        run: list[str] = []
        end = None
        for name, size in tensors:
            file, offset = self.writer.place(name)
            if run and end != (file, offset):
                self.writer.write_run(run, buffer[start:at])
                run, start = [], at
            run.append(name)
            at += size
            end = (file, offset + size)
        self.writer.write_run(run, buffer[start:at])

    def _scalars(self, jobs: Sequence[Job], scales: dict[str, F32Array]) -> None:
        """Write tensor scales (and FP8 scales) of whole jobs, neighbours together."""
        tensors, values = [], []
        for job in jobs:
            for m in job.members:
                for leaf in self.plan.leaves(job.scheme, m.shape):
                    if leaf.part == "tensor_scale":
                        stored = self.plan.layout.store(leaf, scales[m.module])
                        tensors.append((f"{m.module}.{leaf.suffix}", stored.nbytes))
                        values.append(np.ascontiguousarray(stored).reshape(-1).view(np.uint8))
        if tensors:
            self._write(lambda: self._write_whole(tensors, np.concatenate(values)))

    def _write(self, call: object) -> None:
        """Queue a write behind the others; errors surface here or at the next call."""
        assert callable(call)
        self._drain(2 * IN_FLIGHT)  # codes and scales of a tile are two
        self.pending.append(self.background.submit(call))

    def _drain(self, leave: int) -> None:
        while len(self.pending) > leave:
            self.pending.pop(0).result()


def _sources(jobs: Iterable[Job]) -> list[str]:
    return list(dict.fromkeys(m.source for job in jobs for m in job.members))


def _matrix(checkpoint: Checkpoint, member: Member) -> NDArray[np.generic]:
    array = checkpoint.array(member.source)
    if member.expert is not None:
        array = array[member.expert]
    return array[member.first_row : member.first_row + member.shape[0]]


def _not_finite(member: Member, matrix: NDArray[np.generic]) -> FormatError:
    row = next(
        at * STRIP_ROWS + int(np.argwhere(bad)[0][0])
        for at, strip in enumerate(_strips(matrix))
        if (bad := ~np.isfinite(strip.astype(np.float32))).any()
    )
    column = int(np.argwhere(~np.isfinite(matrix[row].astype(np.float32)))[0][0])
    index = [
        *([member.expert] if member.expert is not None else []),
        member.first_row + row,
        column,
    ]
    return FormatError(
        f"tensor {member.source}: value {float(matrix[row, column])} at index {index} is not finite; no scale can "
        "hold it, and the model computes nothing with it. Mend the source, or keep this tensor out of the recipe"
    )


def _strips(matrix: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    """Some rows at a time, whole blocks of 128, so that a float32 copy stays small."""
    for first in range(0, matrix.shape[0], STRIP_ROWS):
        yield matrix[first : first + STRIP_ROWS]


def _sizes(piece: _Piece) -> tuple[int, int]:
    """Bytes of codes and of block scales that a piece gives."""
    fmt = piece.job.scheme.weight
    assert fmt is not None
    elements = piece.matrix.size
    return (elements // 2, elements // fmt.block[1]) if fmt.is_packed else (elements, 0)


def _batches(plan: Plan, jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs whose results fit into one tile together, at least one at a time, all of one scheme."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        more = sum(plan.member_bytes(job, m) for m in job.members)
        if batch and size + more > TILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += more
    if batch:
        yield batch


def _tiles(
    plan: Plan, jobs: Sequence[Job], matrices: dict[str, NDArray[np.generic]]
) -> Iterator[list[_Piece]]:
    """Pieces of at most TILE_BYTES of results: a whole batch, or rows of a member that is larger than that."""
    total = sum(plan.member_bytes(job, m) for job in jobs for m in job.members)
    if total <= TILE_BYTES:
        yield [_Piece(j, m, 0, m.shape[0], matrices[m.module]) for j in jobs for m in j.members]
        return
    for job in jobs:
        for m in job.members:
            per_row = -(-plan.member_bytes(job, m) // m.shape[0])
            rows = max(128, TILE_BYTES // per_row // 128 * 128)  # whole 128 x 128 blocks
            for first in range(0, m.shape[0], rows):
                last = min(first + rows, m.shape[0])
                yield [_Piece(job, m, first, last, matrices[m.module][first:last])]


def _block_rows(piece: _Piece, scales: dict[str, F32Array]) -> F32Array:
    return scales[piece.member.module][piece.first // 128 : -(-piece.last // 128)]


__all__ = ["CheckpointError", "Options", "Run", "Unit", "execute", "journal_header", "units"]
