"""One task of a layer's routed experts: pure data, and the function that does it.

Names, numbers, and files that both sides can read: `run_task` runs here or on another machine over
a shared filesystem, and its result is the same bytes whichever experts share a task. An expert's
inputs are gathered anew from the layer's, and only a few experts are worked on at the same time:
256 Hessians never exist at once.

What an expert's evidence is made of is in `expert_evidence.py`, how codes follow from it in
`rounding.py`, what a layer's tasks are in `experts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nybble.calibrate.expert_evidence import (
    BAND_ROWS,
    PRIOR_TOKENS,
    Known,
    Read,
    Routes,
    Seen,
    evidence,
    measured,
)
from nybble.calibrate.measuring import torch_threads
from nybble.calibrate.rounding import Choice, Effort, round_group
from nybble.calibrate.task_files import Mapped
from nybble.checkpoint.reader import Checkpoint
from nybble.formats.element import U8Array
from nybble.formats.scheme import NVFP4_W4A4
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels.block_matmul import Weight
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import silu_mul
from nybble.models.loader import Weights
from nybble.models.simulate import fake_quantize
from nybble.plan.jobs import Member

Part = Literal["gate_up", "down"]

#: Experts of one task at most: what is lost with a worker, and what is known of a layer's progress.
MOST_EXPERTS = 32
#: Source weights of one task at most, in elements: results of 72 MB.
TASK_WEIGHTS = 1 << 27
#: Of one expert's rounding: matrices [N, K] and [K, K] of float32 that are held together at most.
_WEIGHT_COPIES, _HESSIAN_COPIES = 8, 8
#: Memory of the experts that are worked on at the same time; one is always.
WORK_BYTES = 2 * 10**9
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class ExpertJob:
    """One job of one expert: `members` share their input and a tensor scale, a power of two.

    `input_scale` is that of NVFP4 activations, None where the input is not quantized.
    """

    name: str
    expert: int
    part: Part
    members: tuple[Member, ...]
    tensor_scale: float
    input_scale: float | None


@dataclass(frozen=True, slots=True)
class ExpertTask:
    """Experts [first, last) of the mixture `base` (up to and with ".experts").

    `x` float32 [T, H] are the inputs of the layer's experts, rows [0, fit_tokens) fit and the rest
    judge; `logits` float32 [T, E] the router's; `layer` [2 H, H] the Hessians of all tokens that
    fit, then of all that judge; `energy` is what the first weighted its tokens by.
    """

    checkpoint: Path
    base: str
    first: int
    last: int
    jobs: tuple[ExpertJob, ...]
    x: Mapped
    logits: Mapped
    layer: Mapped
    fit_tokens: int
    energy: float | None
    top: int
    normalises: bool
    effort: Effort
    all_experts: bool
    threads: int


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """What a task makes of a job: packed codes uint8 [N, K / 2] and scales uint8 [N, K / 16] of all
    members, one after the other."""

    name: str
    codes: U8Array
    scales: U8Array
    choice: Choice


def tasks_of(task: ExpertTask) -> Iterator[ExpertTask]:
    """A task cut into smaller ones, each of some experts with all their jobs."""
    by_expert: dict[int, list[ExpertJob]] = {}
    for job in task.jobs:
        by_expert.setdefault(job.expert, []).append(job)
    group: list[ExpertJob] = []
    first, size = task.first, 0
    for expert in range(task.first, task.last):
        mine = by_expert.get(expert, [])
        more = sum(m.shape[0] * m.shape[1] for job in mine for m in job.members)
        if expert > first and (expert - first == MOST_EXPERTS or size + more > TASK_WEIGHTS):
            if group:
                yield replace(task, first=first, last=expert, jobs=tuple(group))
            group, first, size = [], expert, 0
        group += mine
        size += more
    if group:
        yield replace(task, first=first, last=task.last, jobs=tuple(group))


def task_bytes(
    tokens: int, hidden: int, width: int, experts: int, top: int, threads: int = 1
) -> int:
    """The private memory that one task takes at most beyond what the program itself does: the work
    on the experts that are done at once, the router's logits of all tokens, and the results.

    Mapped files are not counted, as mapped weights are not. That all tokens choose one expert is.
    """
    work = _expert_bytes(tokens, hidden, width)
    routes = tokens * (4 * top + 8 + experts) + 2 * hidden * hidden
    results = min(TASK_WEIGHTS, MOST_EXPERTS * 3 * hidden * width) * 9 // 16
    return _at_once(threads, work) * work + _FLOAT * routes + results


def _expert_bytes(tokens: int, hidden: int, width: int) -> int:
    """The work on one expert: gate and up [2 width, hidden], or down [hidden, width]."""

    def rounding(n: int, k: int) -> int:
        return _WEIGHT_COPIES * n * k + _HESSIAN_COPIES * k * k

    rows = min(tokens, BAND_ROWS) * (3 * hidden + 4 * width) + tokens * width
    most = max(rounding(2 * width, hidden), rounding(hidden, width))
    return _FLOAT * (most + 2 * hidden * width + rows)


def _at_once(threads: int, work: int) -> int:
    """How many experts are worked on at the same time."""
    return max(1, min(threads, WORK_BYTES // work))


def run_task(task: ExpertTask, weights: Weights | None = None) -> list[RoundedRows]:
    """Round the jobs of a task: expert after expert, gate and up before down.

    `weights` are those of the task's checkpoint where they are open already. The result is the same
    bytes on any number of threads: each expert has one thread of torch's, whose sums would depend
    on more, and several experts are done at once.
    """
    with torch_threads(1):
        if weights is not None:
            return _Experts(task, weights).all()
        with Checkpoint.open(task.checkpoint) as checkpoint:
            return _Experts(task, Weights(checkpoint)).all()


class _Experts:
    """A task being run."""

    def __init__(self, task: ExpertTask, weights: Weights) -> None:
        self.task, self.checkpoint = task, weights.checkpoint
        dims = weights.network.dims
        self.hidden, self.width = dims.hidden, dims.expert_width
        gate_up = weights.experts(
            task.base, ("gate_proj", "up_proj"), dims.expert_width, dims.hidden
        )
        self.gate_up = gate_up.weight.experts
        self.x = task.x.open()
        logits = task.logits.read()
        routes = partial(
            Routes,
            top=task.top,
            normalises=task.normalises,
            all_experts=task.all_experts,
            threads=task.threads,
            name=task.base,
        )
        self.fit = routes(logits[: task.fit_tokens], 0)
        self.guard = routes(logits[task.fit_tokens :], task.fit_tokens)
        layer = task.layer.read()
        self.of_layer = (
            Known(layer[: self.hidden], self.fit.tokens, self.fit.tokens, task.energy),
            Known(layer[self.hidden :], self.guard.tokens, self.guard.tokens, task.energy),
        )
        self.jobs = {(job.expert, job.part): job for job in task.jobs}
        work = _expert_bytes(self.fit.tokens + self.guard.tokens, dims.hidden, dims.expert_width)
        self.at_once = _at_once(task.threads, work)
        self.threads = max(1, task.threads // self.at_once)  # of the kernels, for each expert

    def all(self) -> list[RoundedRows]:
        experts = range(self.task.first, self.task.last)
        if self.at_once == 1:
            found = [self._expert(e) for e in experts]
        else:
            with ThreadPoolExecutor(self.at_once) as pool:
                found = list(pool.map(self._expert, experts))
        return [rows for of_expert in found for rows in of_expert]

    def _expert(self, expert: int) -> list[RoundedRows]:
        gate_up = self.jobs.get((expert, "gate_up"))
        down = self.jobs.get((expert, "down"))
        found = []
        if gate_up is not None:
            found.append(self._gate_up(gate_up))
        if down is not None:
            found.append(self._down(down, gate_up.input_scale if gate_up else None))
        return found

    def _gate_up(self, job: ExpertJob) -> RoundedRows:
        read = self._read(job.input_scale, job.members[0].module)
        known = self._known(read, self.hidden, job, self.fit.routed(job.expert), None)
        judging = self._known(
            read, self.hidden, job, self.guard.routed(job.expert), known.energy, is_guard=True
        )
        fit, guard = self.of_layer
        return self._round(job, (known, fit, judging, guard))

    def _known(
        self,
        read: Read,
        channels: int,
        job: ExpertJob,
        seen: Seen,
        energy: float | None,
        *,
        is_guard: bool = False,
    ) -> Known:
        if self.task.all_experts and job.part == "gate_up":
            return self.of_layer[is_guard]  # every expert sees what the layer sees
        share = self.task.effort.plain_share
        module = job.members[0].module
        return measured(read, seen, channels, plain_share=share, module=module, energy=energy)

    def _down(self, job: ExpertJob, x_scale: float | None) -> RoundedRows:
        e, most = job.expert, round(PRIOR_TOKENS * self.width)
        sets = [
            self.fit.routed(e),
            self.fit.near_misses(e, most),
            self.guard.routed(e),
            self.guard.near_misses(e, most),
        ]
        h = self._inner(job, torch.cat([s.rows for s in sets]), x_scale)
        found: list[Known] = []
        at = 0
        for seen in sets:
            own = Seen(torch.arange(at, at + len(seen)), seen.weights)
            energy = found[0].energy if found else None
            found.append(self._known(h.__getitem__, self.width, job, own, energy))
            at += len(seen)
        return self._round(job, (found[0], found[1], found[2], found[3]))

    def _inner(self, job: ExpertJob, rows: Tensor, x_scale: float | None) -> Tensor:
        """The input of down float32 [n, width]: silu(gate x) * up x of the original weights."""
        weight = torch.cat([_plain(w) for w in self.gate_up[job.expert]])
        module, scale = job.members[0].module, job.input_scale
        read = self._read(x_scale, module)
        compute = Compute("f32", self.threads)
        found = torch.empty((len(rows), self.width))
        for at in range(0, len(rows), BAND_ROWS):
            part = rows[at : at + BAND_ROWS]
            h = silu_mul(read(part) @ weight.T, compute)
            found[at : at + len(part)] = h if scale is None else rounded(h, scale, module)
        return found

    def _read(self, scale: float | None, module: str) -> Read:
        def read(rows: Tensor) -> Tensor:
            x = torch.from_numpy(self.x[rows.numpy()])
            return x if scale is None else rounded(x, scale, module)

        return read

    def _round(self, job: ExpertJob, known: tuple[Known, Known, Known, Known]) -> RoundedRows:
        weight = torch.cat([_plain(m.matrix(self.checkpoint)) for m in job.members])
        codes, scales, choice = round_group(
            weight, job.tensor_scale, evidence(*known), self.task.effort, self.threads
        )
        return RoundedRows(job.name, codes.numpy(), scales.numpy(), choice)


def _plain(weight: Weight) -> Tensor:
    """A weight [N, K] in float32, memory of its own."""
    if isinstance(weight, BlockScaledTensor):
        return torch.from_numpy(weight.dequantize())
    return torch.from_numpy(weight.astype(np.float32))


def rounded(x: Tensor, scale: float, module: str) -> Tensor:
    """x float32 [n, K] as an engine's W4A4 matmul sees it."""
    assert NVFP4_W4A4.input is not None
    if not len(x):
        return x
    return fake_quantize(x, NVFP4_W4A4.input, scale, module)
