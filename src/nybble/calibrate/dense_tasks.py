"""One task of a layer's dense linears: rows of a job, and the function that rounds them.

Pure data, as `expert_tasks.py`: `run_task` runs here or on another machine over a shared
filesystem, and gives the same bytes there. Rows know nothing of one another, so a job may be cut
into several tasks; how is `stage_rounding.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nybble.calibrate.measuring import torch_threads
from nybble.calibrate.rounding import Choice, Effort, Evidence, Rung, round_group
from nybble.calibrate.task_files import Mapped, append
from nybble.checkpoint.reader import Checkpoint
from nybble.formats.element import U8Array
from nybble.plan.jobs import Member


@dataclass(frozen=True, slots=True)
class StoredEvidence:
    """Evidence whose matrices are in files."""

    fit: Mapped
    guard: Mapped | None
    tokens: int
    guard_tokens: int
    rung: Rung
    reason: str

    def read(self) -> Evidence:
        """The evidence, in memory of its own."""
        guard = None if self.guard is None else self.guard.read()
        return Evidence(
            self.fit.read(), guard, self.tokens, self.guard_tokens, self.rung, self.reason
        )


def store(evidence: Evidence, folder: Path) -> StoredEvidence:
    """Put the matrices into files of a new folder. Raises CheckpointError where it cannot be
    written."""

    def file(name: str, matrix: Tensor) -> Mapped:
        append(folder / name, matrix)
        return Mapped(folder / name, (len(matrix), matrix.shape[1]))

    return StoredEvidence(
        file("fit", evidence.fit),
        None if evidence.guard is None else file("guard", evidence.guard),
        evidence.tokens,
        evidence.guard_tokens,
        evidence.rung,
        evidence.reason,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [first, last) of a member."""

    member: Member
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class DenseTask:
    """Rows of one job, one after the other: they share their input and `tensor_scale`. `peak` is
    the job's largest magnitude where these are not all of its rows."""

    checkpoint: Path
    name: str
    rows: tuple[Rows, ...]
    tensor_scale: float
    peak: float | None
    evidence: Evidence | StoredEvidence
    effort: Effort
    threads: int


@dataclass(frozen=True, slots=True)
class RoundedPart:
    """What a task makes: packed codes uint8 [N, K / 2], scales uint8 [N, K / 16], and tr(W H W^T)
    by the guard's H, which the choice's relative losses are relative to."""

    codes: U8Array
    scales: U8Array
    energy: float
    choice: Choice


def run_task(task: DenseTask, checkpoint: Checkpoint | None = None) -> RoundedPart:
    """Round the rows of a task, with `task.threads` threads, which the last bits of sums depend on.

    `checkpoint` is the task's where it is open already.
    """
    if checkpoint is None:
        with Checkpoint.open(task.checkpoint) as opened:
            return run_task(task, opened)
    known = task.evidence if isinstance(task.evidence, Evidence) else task.evidence.read()
    matrices = [r.member.matrix(checkpoint)[r.first : r.last] for r in task.rows]
    # Memory of its own, and no copy of it where there is one matrix.
    found = [torch.from_numpy(m.astype(np.float32)) for m in matrices]
    weight = found[0] if len(found) == 1 else torch.cat(found)
    del found
    with torch_threads(task.threads):
        codes, scales, choice = round_group(
            weight, task.tensor_scale, known, task.effort, task.threads, peak=task.peak
        )
        energy = _energy(weight, known.guard)
    return RoundedPart(codes.numpy(), scales.numpy(), energy, choice)


def _energy(weight: Tensor, h: Tensor | None) -> float:
    return 0.0 if h is None else float((weight @ h).mul_(weight).sum(dtype=torch.float64))
