"""Executing a plan: one source tensor (or fused group) at a time, into a journalled writer.

Sources are mapped, results go through a few tile buffers (tiles.py), and a background thread writes
one while the next is filled. Every value is checked before it is quantized (scales.py), every
measured scale before anything is written (input_scales.py). A `Rounder` may give finished tensors
in the place of the search (rounder.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import (
    JOURNAL,
    SHARD_BYTES,
    CheckpointWriter,
    layout_shards,
    partial_folder,
)
from nybble.errors import CheckpointError
from nybble.formats import search as definition
from nybble.formats.element import F32Array, U8Array
from nybble.formats.search import Search
from nybble.formats.tensor import BlockScaledTensor
from nybble.plan.jobs import Copy, Job
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.quantize.input_scales import KEY, InputScales, check_input_scales
from nybble.quantize.journal import Journal, refuse_other
from nybble.quantize.kv_scales import KEY as KV_KEY
from nybble.quantize.kv_scales import kv_record, kv_scale_tensors
from nybble.quantize.rounder import MACHINE, Rounder, Unit, units
from nybble.quantize.scales import job_scales
from nybble.quantize.tiles import TILE_BYTES, Buffers, Piece, batches, fill, tiles

#: Source bytes after which the journal is told; a crash costs at most the work on these.
COMMIT_BYTES = 512 << 20
#: Writes that may wait for the background thread; tiles are bounded by their buffers anyway.
QUEUE = 8
_ROUNDER = "rounder"  # the journal's word for what a rounder says of itself
_MACHINE = f"{_ROUNDER}.{MACHINE}."


@dataclass(frozen=True, slots=True)
class Options:
    """How a plan is executed. None of these but `search` and `shard_bytes` changes a byte of the
    result; a rounder's sums may depend on `threads`, so its run is continued with another number,
    or on another machine, only where `allow_mixed`."""

    search: Search = "mse"
    shard_bytes: int = SHARD_BYTES
    threads: int = 1
    resume: bool = False
    allow_mixed: bool = False


def execute(
    plan: Plan,
    out: Path,
    options: Options,
    *,
    version: str,
    progress: Progress,
    input_scales: InputScales | None = None,
    disk: Disk | None = None,
    rounder: Rounder | None = None,
    kv_scales: Mapping[int, tuple[float, float]] | None = None,
) -> None:
    """Write the checkpoint that the plan describes to `out`.

    `input_scales` are the measured scales of a plan that `needs_data`, `kv_scales` those of keys
    and values by layer where the plan has tensors for them; `rounder` chooses codes where the
    data-free search would. Raises RecipeError if the scales are not what is needed; FormatError for
    NaN or infinities, naming tensor and index; CheckpointError and DoesNotFit from the writer. What
    an interruption leaves in OUT.partial is continued with `options.resume` and the same scales
    (`stored_input_scales`, `stored_kv_scales`), and ends with the same bytes.
    """
    disk = disk or Disk()
    _check_start(plan, options)
    layout = layout_shards(plan.outputs, options.shard_bytes)
    work = units(plan)
    header = journal_header(plan, options, version, input_scales, rounder, kv_scales)
    path = partial_folder(out) / JOURNAL
    journal = None
    if options.resume and disk.size(path) is not None:
        journal = Journal.resume(
            path, header, disk=disk, machine=_MACHINE, allow_mixed=options.allow_mixed
        )
    try:
        # After the journal's own refusal: scales of another recipe are not this run's fault.
        scales = check_input_scales(plan, input_scales)
        kv_tensors = kv_scale_tensors(plan, kv_scales)
        done = journal.done if journal else set()
        written = [name for unit in work if unit.name in done for name in _names(plan, unit)]
        with CheckpointWriter(
            out, layout, disk=disk, resume=options.resume, done=written
        ) as writer:
            journal = journal or Journal.create(path, header, disk=disk)
            left = [unit for unit in work if unit.name not in done]
            with Run(plan, options, writer, journal, progress, scales, rounder) as run:
                run.all(left if rounder is None else rounder.order(left))
            for name, value in kv_tensors.items():  # no unit: written anew by each resumed run
                writer.write(name, value.reshape(-1).view(np.uint8))
            journal.close()
            _finish(plan, writer, version, rounder)
    finally:
        if journal is not None:
            journal.close()
    if rounder is not None:
        rounder.close()


def refuse_start(plan: Plan, out: Path, options: Options, *, disk: Disk | None = None) -> None:
    """Raise what would stop a fresh `execute` at once, so that nothing is measured in vain.

    FormatError for a search that a format lacks, CheckpointError for an output that is there,
    DoesNotFit for a disk that is too small. Writes nothing; the writer checks again.
    """
    disk = disk or Disk()
    _check_start(plan, options)
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or disk.names(out)):
        raise CheckpointError(f"{out}: exists and is not an empty folder; name another output")
    folder = partial_folder(out)
    if options.resume:
        return
    if os.path.lexists(folder):
        raise CheckpointError(
            f"{folder}: is left from an interrupted run; continue it with --resume, or remove it"
        )
    disk.refuse_less_than(plan.payload_bytes, folder, out)


def _check_start(plan: Plan, options: Options) -> None:
    for job in plan.jobs:
        if job.scheme.weight is not None:
            definition.check_search(job.scheme.weight, options.search)
    if JOURNAL in plan.checkpoint.side_files():
        raise CheckpointError(
            f"{plan.checkpoint.path}: holds a file {JOURNAL}, the name of a run's own record; "
            "move it away"
        )


def journal_header(
    plan: Plan,
    options: Options,
    version: str,
    input_scales: InputScales | None = None,
    rounder: Rounder | None = None,
    kv_scales: Mapping[int, tuple[float, float]] | None = None,
) -> dict[str, object]:
    """What must be equal for a run to be continued: the source by headers, sizes and times, the
    plan, the options, what chooses the codes, the measured scales."""
    chosen = {} if rounder is None else {_ROUNDER: dict(rounder.record())}
    measured: dict[str, object] = {} if input_scales is None else {KEY: input_scales.record()}
    if kv_scales:
        measured[KV_KEY] = kv_record(kv_scales)
    return {"version": version, **_asked(plan, options), **chosen, **measured}


def _asked(plan: Plan, options: Options) -> dict[str, object]:
    """What is known of a run before anything is measured."""
    return {
        "source": plan.checkpoint.fingerprint(),
        "recipe": plan.recipe.name,
        "untied": sorted(plan.checkpoint.aliases),
        "layout": plan.layout.name,
        "search": options.search,
        "shard_bytes": options.shard_bytes,
        "plan": plan.digest(),
    }


def refuse_other_run(plan: Plan, out: Path, options: Options, *, disk: Disk | None = None) -> None:
    """Raise CheckpointError if the interrupted run of `out` was asked for something else: before
    its calibration text is read or its inputs are measured again."""
    refuse_other(partial_folder(out) / JOURNAL, _asked(plan, options), disk=disk or Disk())


def _names(plan: Plan, unit: Unit) -> list[str]:
    if unit.copy:
        return [unit.copy.tensor.name]
    return [
        f"{m.module}.{leaf.suffix}"
        for job in unit.jobs
        for m in job.members
        for leaf in plan.leaves(job.scheme, m.shape)
    ]


def _finish(plan: Plan, writer: CheckpointWriter, version: str, rounder: Rounder | None) -> None:
    checkpoint = plan.checkpoint
    documents = plan.layout.documents(checkpoint.config, plan.listing(version))
    if rounder is not None:
        documents.update(rounder.documents())
    side = [
        (checkpoint.path / name, name) for name in checkpoint.side_files() if name not in documents
    ]
    writer.finish(documents, side, plan.stored_parameters)


class Run:
    """The state of one execution: who writes, and what the journal does not know yet."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        writer: CheckpointWriter,
        journal: Journal,
        progress: Progress,
        input_scales: Mapping[str, float],
        rounder: Rounder | None = None,
    ) -> None:
        self.rounder = rounder
        self.plan, self.options, self.writer, self.journal = plan, options, writer, journal
        self.progress, self.input_scales = progress, input_scales
        self.checkpoint: Checkpoint = plan.checkpoint
        self.buffers = Buffers()
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
        counted = [u for u in work if self.rounder is None or u.copy]  # else it counts itself
        title = "quantize" if self.rounder is None else "copy"
        self.progress.stage(title, sum(self._source_bytes(unit) for unit in counted))
        for unit in work:
            given = None
            if self.rounder is not None and unit.copy is None:
                given = self.rounder.take(unit, self.commit)
            if unit.copy:
                self._copy(unit.copy)
            elif given is not None:
                self._give(unit.jobs, given)
            else:
                self._quantize(unit.jobs, self.progress if self.rounder is None else Progress())
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
            self._write(partial(self.writer.write, name, part, at))
            self.progress.advance(len(part), name)
        if len(data) >= TILE_BYTES:
            self._drain(0)
            self.checkpoint.drop_pages(name)

    def _give(self, jobs: Sequence[Job], given: Mapping[str, BlockScaledTensor]) -> None:
        """Write tensors that are finished."""
        for job in jobs:
            for m in job.members:
                tensor = given[m.module]
                for leaf in self.plan.leaves(job.scheme, m.shape):
                    if leaf.part in ("codes", "scale"):
                        data = tensor.codes if leaf.part == "codes" else tensor.scale
                        assert data.nbytes == leaf.nbytes, f"{m.module}.{leaf.suffix}"
                        part = np.ascontiguousarray(data)
                        self._write(partial(self.writer.write, f"{m.module}.{leaf.suffix}", part))
        # The scale of FP8 is what NVFP4's tensor scale is: the last that is multiplied with.
        scales: dict[str, F32Array] = {
            module: np.asarray(t.scale if t.tensor_scale is None else t.tensor_scale, np.float32)
            for module, t in given.items()
        }
        self._scalars(jobs, scales)
        for name in _sources(jobs):
            self.checkpoint.drop_pages(name)

    def _quantize(self, jobs: Sequence[Job], progress: Progress) -> None:
        for name in _sources(jobs):
            self.checkpoint.will_need(name)
        search, threads = self.options.search, self.options.threads
        for batch in batches(self.plan, jobs):
            matrices = {m.module: m.matrix(self.checkpoint) for j in batch for m in j.members}
            scales = job_scales(batch, matrices, self.plan.layout, search, threads)
            for tile in tiles(self.plan, batch, matrices):
                self._tile(tile, scales)
                done = sum(p.matrix.nbytes for p in tile)
                progress.advance(done, tile[-1].member.module)
            self._scalars(batch, scales)
        for name in _sources(jobs):
            self.checkpoint.drop_pages(name)

    def _tile(self, tile: Sequence[Piece], scales: dict[str, F32Array]) -> None:
        buffer = self.buffers.take(sum(p.code_bytes + p.scale_bytes for p in tile))
        codes, blocks = fill(
            tile,
            scales,
            self.options.search,
            buffer,
            self.options.threads,
            bf16_quotient=self.options.search == "absmax" and self.plan.layout.name == "modelopt",
        )

        def write() -> None:
            try:
                self._write_part(tile, "codes", codes)
                if blocks.size:
                    self._write_part(tile, "scale", blocks)
            finally:
                self.buffers.give_back(buffer)

        self._write(write)

    def _write_part(self, tile: Sequence[Piece], part: str, data: U8Array) -> None:
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
                self.writer.write(name, data[at : at + size], p.first * per_row)
            at += size
        if whole:
            self._write_whole(whole, data)

    def _write_whole(self, tensors: Sequence[tuple[str, int]], data: U8Array) -> None:
        """Write tensors whose bytes follow one another in `data`; neighbours on disk in one
        call."""
        start = at = 0
        run: list[str] = []
        end: tuple[str, int] | None = None
        for name, size in tensors:
            file, offset = self.writer.place(name)
            if run and end != (file, offset):
                self.writer.write_run(run, data[start:at])
                run, start = [], at
            run.append(name)
            at += size
            end = (file, offset + size)
        self.writer.write_run(run, data[start:at])

    def _scalars(self, jobs: Sequence[Job], scales: Mapping[str, F32Array]) -> None:
        """Write tensor scales, the scales of FP8, and measured input scales."""
        tensors: list[tuple[str, int]] = []
        values: list[U8Array] = []
        for job in jobs:
            for m in job.members:
                for leaf in self.plan.leaves(job.scheme, m.shape):
                    if leaf.part == "tensor_scale":
                        scale = scales[m.module]
                    elif leaf.part == "input_scale":
                        scale = np.asarray(self.input_scales[m.module], dtype=np.float32)
                    else:
                        continue
                    stored = self.plan.layout.store(leaf, scale)
                    tensors.append((f"{m.module}.{leaf.suffix}", stored.nbytes))
                    values.append(np.ascontiguousarray(stored).reshape(-1).view(np.uint8))
        if tensors:
            data = np.concatenate(values)
            self._write(partial(self._write_whole, tensors, data))

    def _write(self, call: Callable[[], None]) -> None:
        """Queue a write behind the others; the error of an earlier one surfaces here."""
        self._drain(QUEUE)
        self.pending.append(self.background.submit(call))

    def _drain(self, leave: int) -> None:
        while self.pending and (len(self.pending) > leave or self.pending[0].done()):
            self.pending.pop(0).result()


def _sources(jobs: Iterable[Job]) -> list[str]:
    return list(dict.fromkeys(m.source for job in jobs for m in job.members))
