"""Rounding the jobs of one stage by what was measured of their inputs.

Linears in NVFP4 go to `rounding`, those of routed experts to `experts`; other formats have the
data-free search, whose tensors are made here too, for the layer has to be computed with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nybble.calibrate.dense_tasks import DenseTask, RoundedPart, Rows, StoredEvidence, store
from nybble.calibrate.dense_tasks import run_task as run_dense
from nybble.calibrate.expert_tasks import run_task as run_experts
from nybble.calibrate.experts import RoundedJob, round_experts
from nybble.calibrate.rounding import Choice, Effort, Evidence
from nybble.calibrate.scale_out import Workers
from nybble.calibrate.stages import is_rounded
from nybble.calibrate.statistics import Moments, Rounding, Statistics
from nybble.calibrate.task_files import scratch_folder
from nybble.checkpoint.reader import Checkpoint
from nybble.formats.block import NVFP4
from nybble.formats.element import F32Array
from nybble.formats.search import Search
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import block_quantize
from nybble.models.feed_forward import MixtureOfExperts
from nybble.models.loader import Weights
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan
from nybble.quantize.in_memory import searched
from nybble.quantize.scales import job_scales

#: The search of jobs that are not rounded by their inputs, and of tensor scales: powers of two.
SEARCH: Search = "mse"
#: Tokens for each channel below which error feedback follows noise; as for an expert.
FEWEST_TOKENS = 1 / 8
#: Weights that are rounded together: 2^25 take about 1.5 GB. An output head has more.
PART_WEIGHTS = 1 << 25
#: A job, its tensor scale, and its parts as they come.
Begun = tuple[Job, F32Array, Iterator[RoundedPart]]
#: The method that a report names for formats without a choice of codes.
DATA_FREE = "data-free"


@dataclass(frozen=True, slots=True)
class StageRounding:
    """How the jobs of a plan are rounded: `folder` takes the experts' files, `fit_tokens` of the
    inputs that a mixture is known by come first and fit, the others judge."""

    plan: Plan
    weights: Weights
    effort: Effort
    folder: Path
    fit_tokens: int
    all_experts: bool
    threads: int
    input_scales: Mapping[str, float]
    workers: Workers | None = None  # who does the tasks; None: this process

    def statistics(
        self, jobs: Sequence[Job], mixture: MixtureOfExperts | None, rounded: Rounding | None = None
    ) -> Statistics:
        """Who measures what these jobs need to know."""
        own = experts_of(mixture)
        chosen = [job for job in jobs if is_rounded(job)]
        wanted = {m.module for j in chosen for m in j.members} - own
        has_experts = any(m.module in own for j in chosen for m in j.members)
        kept = mixture.router.modules if mixture is not None and has_experts else ()
        return Statistics(
            wanted,
            kept,
            rounded,
            plain_share=self.effort.plain_share,
            residual_share=self.effort.residual_share,
        )

    def all(
        self, jobs: Sequence[Job], statistics: Statistics, mixture: MixtureOfExperts | None
    ) -> Iterator[RoundedJob]:
        """Every job, finished. What was measured of an input is given up with its last job: nothing
        of it is left in `statistics`.

        Raises FormatError for weights, EngineError for inputs that are not finite, naming tensor or
        module.
        """
        own = experts_of(mixture)
        chosen = [job for job in jobs if is_rounded(job)]
        experts = [job for job in chosen if job.members[0].module in own]
        dense = [job for job in chosen if job.members[0].module not in own]
        with ExitStack() as stack:
            begun = self._dense(dense, statistics, stack)
            if self.workers is not None:
                begun = iter(list(begun))  # all are under way before the first is waited for
            else:
                yield from self._joined(begun)
            for job in jobs:
                if not is_rounded(job):
                    tensors = searched(self.plan, [job], SEARCH, self.threads)
                    yield RoundedJob(job, tensors, Choice(DATA_FREE, None, {}, 0, 0))
            if experts and mixture is not None:
                yield from self._experts(experts, statistics, mixture)
            yield from self._joined(begun)

    def _dense(
        self, jobs: Sequence[Job], statistics: Statistics, stack: ExitStack
    ) -> Iterator[Begun]:
        """Each job in parts of rows, begun where there are workers; files for them are gone with
        `stack`."""
        uses = Counter(_key(job, statistics.fit) for job in jobs)
        stored: dict[tuple[str, ...], StoredEvidence] = {}
        folder = self.folder
        if self.workers is not None and jobs:
            folder = stack.enter_context(scratch_folder(self.folder, "dense"))
        for job in jobs:
            key = _key(job, statistics.fit)
            uses[key] -= 1
            known: Evidence | StoredEvidence
            known = _evidence(job, statistics.fit.get(key), statistics.guard.get(key))
            if not uses[key]:  # large: room for the rounding
                statistics.fit.pop(key, None)
                statistics.guard.pop(key, None)
            if self.workers is not None:
                if key not in stored:
                    stored[key] = store(known, folder / str(len(stored)))
                known = stored[key]
            scale = self._scales([job])[job.members[0].module]
            parts = list(_parts(job, self.plan.checkpoint))
            peak = self._peak(job) if len(parts) > 1 else None
            tasks = [
                DenseTask(
                    self.plan.checkpoint.path.absolute(),
                    job.name,
                    rows,
                    float(scale),
                    peak,
                    known,
                    self.effort,
                    self.threads,
                )
                for rows in parts
            ]
            if self.workers is not None:
                yield job, scale, self.workers.map(run_dense, tasks)
            else:
                yield job, scale, map(partial(run_dense, checkpoint=self.plan.checkpoint), tasks)
            del known, tasks

    def _joined(self, begun: Iterable[Begun]) -> Iterator[RoundedJob]:
        """Jobs of their parts: rows know nothing of one another."""
        for job, scale, parts in begun:
            rows, channels = sum(m.shape[0] for m in job.members), job.members[0].shape[1]
            codes = np.empty((rows, channels // 2), np.uint8)
            scales = np.empty((rows, channels // NVFP4.block[1]), np.uint8)
            choices: list[tuple[float, Choice]] = []
            at = 0
            for part in parts:
                codes[at : at + len(part.codes)] = part.codes
                scales[at : at + len(part.codes)] = part.scales
                choices.append((part.energy, part.choice))
                at += len(part.codes)
            tensors: dict[str, BlockScaledTensor] = {}
            at = 0
            for m in job.members:
                own = slice(at, at + m.shape[0])
                tensors[m.module] = BlockScaledTensor(
                    NVFP4, m.shape, codes[own], scales[own], scale
                )
                at += m.shape[0]
            yield RoundedJob(job, tensors, merged(choices))

    def _experts(
        self, jobs: Sequence[Job], statistics: Statistics, mixture: MixtureOfExperts
    ) -> Iterator[RoundedJob]:
        fit: list[Tensor] = []
        guard: list[Tensor] = []
        at = 0
        for rows in statistics.kept.get(mixture.router.modules, ()):
            (fit if at < self.fit_tokens else guard).append(rows)
            at += len(rows)
        return round_experts(
            self.weights,
            mixture,
            fit,
            guard,
            jobs,
            self._scales(jobs),
            self.effort,
            folder=self.folder,
            threads=self.threads,
            all_experts=self.all_experts,
            input_scales=self.input_scales,
            runner=None if self.workers is None else partial(self.workers.map, run_experts),
        )

    def _peak(self, job: Job) -> float:
        matrices = [m.matrix(self.plan.checkpoint) for m in job.members]
        return float(block_quantize.amax(matrices, self.threads).max())

    def _scales(self, jobs: Sequence[Job]) -> dict[str, F32Array]:
        checkpoint = self.plan.checkpoint
        matrices = {m.module: m.matrix(checkpoint) for j in jobs for m in j.members}
        return job_scales(jobs, matrices, self.plan.layout, SEARCH, self.threads)


def experts_of(mixture: MixtureOfExperts | None) -> frozenset[str]:
    """The modules of a mixture's routed experts."""
    if mixture is None:
        return frozenset()
    stacks = (mixture.gate_up.modules, mixture.down.modules)
    return frozenset(m for stack in stacks for modules in stack for m in modules)


def _evidence(job: Job, fit: Moments | None, guard: Moments | None) -> Evidence:
    """What was measured of a job's input; of one that nothing passed through, that."""
    if fit is None or not fit.tokens:
        seen = "not reached by a calibration token" if fit is None else "zeros alone"
        return Evidence(torch.empty(0, 0), None, 0, 0, "mse", f"its input was {seen}")
    channels = job.members[0].shape[1]
    is_enough = fit.tokens >= channels * FEWEST_TOKENS
    return Evidence(
        fit.mixed(),
        guard.mixed() if guard is not None and guard.tokens else None,
        fit.tokens,
        guard.tokens if guard is not None else 0,
        "gptq-x" if is_enough else "local",
        ""
        if is_enough
        else f"{fit.tokens} tokens; gptq-x needs {channels * FEWEST_TOKENS:g} for {channels} "
        "channels",
    )


def _key(job: Job, known: Mapping[tuple[str, ...], Moments]) -> tuple[str, ...]:
    """The modules that share the job's input; none where nothing was measured of it."""
    module = job.members[0].module
    return next((modules for modules in known if module in modules), ())


def _parts(job: Job, checkpoint: Checkpoint) -> Iterator[tuple[Rows, ...]]:
    """All rows of a job: at once where that is little, else PART_WEIGHTS at a time. By the names
    in the files, as a worker opens them."""
    members = [replace(m, source=checkpoint.stored_name(m.source)) for m in job.members]
    if sum(m.shape[0] * m.shape[1] for m in members) <= PART_WEIGHTS:
        yield tuple(Rows(m, 0, m.shape[0]) for m in members)
        return
    for m in members:
        step = max(1, PART_WEIGHTS // m.shape[1])
        for at in range(0, m.shape[0], step):
            yield (Rows(m, at, min(at + step, m.shape[0])),)


def merged(parts: Sequence[tuple[float, Choice]]) -> Choice:
    """The choice of a job from those of its parts, each with its tr(W H W^T): the method that most
    parts took, and the losses of all; that of the method is what was really taken."""
    first = parts[0][1]
    if len(parts) == 1:
        return first
    counts = Counter(choice.method for _, choice in parts)
    method = counts.most_common(1)[0][0]
    whole = sum(energy for energy, _ in parts)
    losses: dict[str, float] = {}
    for name in first.losses:
        of_parts = [c.losses.get(c.method if name == method else name) for _, c in parts]
        if whole > 0 and None not in of_parts:
            losses[name] = sum(e * (x or 0.0) for (e, _), x in zip(parts, of_parts, strict=True))
            losses[name] /= whole
    taken = next(choice for _, choice in parts if choice.method == method)
    others = [f"{n} of {len(parts)} parts took {name}" for name, n in counts.items()]
    reason = "; ".join(others) if len(counts) > 1 else taken.reason
    return Choice(method, taken.damping, losses, first.tokens, first.guard_tokens, reason)
