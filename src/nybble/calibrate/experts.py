"""The routed experts of one layer, rounded by what each of them sees.

What all experts share (inputs, the router's logits, the Hessians of the whole layer) is written to
files once, and the layer is cut into tasks of some experts (`expert_tasks.py`), which run here one
after the other or wherever `runner` sends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nybble.calibrate.expert_evidence import Known, Seen, measured
from nybble.calibrate.expert_tasks import (
    ExpertJob,
    ExpertTask,
    Part,
    RoundedRows,
    rounded,
    run_task,
    tasks_of,
)
from nybble.calibrate.measuring import torch_threads
from nybble.calibrate.rounding import Choice, Effort
from nybble.calibrate.task_files import Mapped, append, scratch_folder
from nybble.errors import EngineError
from nybble.formats.block import NVFP4
from nybble.formats.element import F32Array
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels.compute import Compute
from nybble.models.feed_forward import MixtureOfExperts
from nybble.models.linear import Mode
from nybble.models.loader import Weights
from nybble.plan.jobs import Job


@dataclass(frozen=True, slots=True)
class RoundedJob:
    """A finished job: the tensor of each member by module, and how it was chosen."""

    job: Job
    tensors: Mapping[str, BlockScaledTensor]
    choice: Choice


#: Who runs tasks, in order: here, or an executor's `map` of `run_task`.
Runner = Callable[[Iterable[ExpertTask]], Iterable[Sequence[RoundedRows]]]


def round_experts(
    weights: Weights,
    mixture: MixtureOfExperts,
    fit: Iterable[Tensor],
    guard: Iterable[Tensor],
    jobs: Sequence[Job],
    tensor_scales: Mapping[str, F32Array],
    effort: Effort,
    *,
    folder: Path,
    threads: int = 1,
    all_experts: bool = False,
    input_scales: Mapping[str, float] | None = None,
    runner: Runner | None = None,
) -> Iterator[RoundedJob]:
    """Every NVFP4 job of a mixture's routed experts, expert after expert.

    `fit` and `guard` are the inputs of the mixture in parts float32 [M, H], read once; `jobs` of
    any order; `tensor_scales` (powers of two) and `input_scales` by module. `folder` takes files
    for the tasks, on a filesystem that all who run them see, and is left as it was. Raises
    EngineError for NaN inputs, naming the module, and CheckpointError for a folder that cannot be
    written.
    """
    wanted = _expert_jobs(mixture, jobs, tensor_scales, input_scales or {})
    by_name = {job.name: job for job in jobs}
    with scratch_folder(folder, "experts") as scratch:
        task = _whole_layer(
            weights.checkpoint.path.absolute(),
            mixture,
            (fit, guard),
            wanted,
            scratch,
            effort=effort,
            threads=threads,
            all_experts=all_experts,
        )
        run = runner or partial(map, partial(run_task, weights=weights))
        for rows in run(list(tasks_of(task))):
            for found in rows:
                job = by_name[found.name]
                yield RoundedJob(job, _tensors(job, found, tensor_scales), found.choice)


# ------------------------------------------------------------------------------- the whole layer


def _expert_jobs(
    mixture: MixtureOfExperts,
    jobs: Sequence[Job],
    tensor_scales: Mapping[str, F32Array],
    input_scales: Mapping[str, float],
) -> tuple[ExpertJob, ...]:
    """The jobs as data, by expert, gate and up before down."""
    places: dict[str, tuple[int, Part]] = {}
    parts: tuple[Part, Part] = ("gate_up", "down")
    for part, stack in zip(parts, (mixture.gate_up, mixture.down), strict=True):
        for e, modules in enumerate(stack.modules):
            places.update(dict.fromkeys(modules, (e, part)))
    found = []
    for job in jobs:
        module = job.members[0].module
        if job.scheme.weight is not NVFP4 or module not in places:
            raise EngineError(
                f"{module}: is {job.scheme}, and no linear in NVFP4 of a routed expert of "
                f"{mixture.gate_up.modules[0][0]} and its like; round it as other linears are"
            )
        expert, part = places[module]
        scale = float(tensor_scales[module])
        own = float(input_scales[module]) if job.scheme.input is not None else None
        found.append(ExpertJob(job.name, expert, part, job.members, scale, own))
    return tuple(sorted(found, key=lambda j: (j.expert, j.part != "gate_up")))


def _whole_layer(
    checkpoint: Path,
    mixture: MixtureOfExperts,
    inputs: tuple[Iterable[Tensor], Iterable[Tensor]],
    jobs: tuple[ExpertJob, ...],
    folder: Path,
    *,
    effort: Effort,
    threads: int,
    all_experts: bool,
) -> ExpertTask:
    """One task of all experts: writes the files that tasks read."""
    modules = mixture.gate_up.modules
    base = modules[0][0].removesuffix(".0.gate_proj")
    first = [job for job in jobs if job.part == "gate_up"]
    # What engines take that run all experts as one matmul.
    scale = max((j.input_scale for j in first if j.input_scale is not None), default=None)
    hidden, experts = mixture.gate_up.weight.k, len(modules)
    mode = Mode(Compute("f32", threads))
    counts = []
    for parts in inputs:
        counts.append(0)
        for x in parts:
            append(folder / "x", x)
            append(folder / "logits", mixture.router(x, mode, is_exact=True))
            counts[-1] += len(x)
    tokens = sum(counts)
    inputs_file = Mapped(folder / "x", (tokens, hidden))
    with torch_threads(threads):
        layer, energy = _of_layer(inputs_file, counts, scale, effort.plain_share, base)
    append(folder / "layer", layer)
    return ExpertTask(
        checkpoint,
        base,
        0,
        experts,
        jobs,
        inputs_file,
        Mapped(folder / "logits", (tokens, experts)),
        Mapped(folder / "layer", (2 * hidden, hidden)),
        counts[0],
        energy,
        mixture.top,
        mixture.normalises,
        effort,
        all_experts,
        threads,
    )


def _of_layer(
    x: Mapped, counts: Sequence[int], scale: float | None, plain_share: float, base: str
) -> tuple[Tensor, float | None]:
    """Hessians [2 H, H] of all tokens that fit and of all that judge, and the energy of the
    first."""
    rows = x.open()

    def read(wanted: Tensor) -> Tensor:
        found = torch.from_numpy(rows[wanted.numpy()])
        return found if scale is None else rounded(found, scale, base)

    found: list[Known] = []
    at = 0
    for count in counts:
        seen = Seen(torch.arange(at, at + count), torch.ones(count))
        energy = found[0].energy if found else None
        found.append(
            measured(read, seen, x.shape[1], plain_share=plain_share, module=base, energy=energy)
        )
        at += count
    return torch.cat([known.h for known in found]), found[0].energy


def _tensors(
    job: Job, found: RoundedRows, tensor_scales: Mapping[str, F32Array]
) -> dict[str, BlockScaledTensor]:
    tensors: dict[str, BlockScaledTensor] = {}
    at = 0
    for m in job.members:
        rows = slice(at, at + m.shape[0])
        top = np.asarray(tensor_scales[m.module], dtype=np.float32)
        tensors[m.module] = BlockScaledTensor(
            NVFP4, m.shape, found.codes[rows], found.scales[rows], top
        )
        at += m.shape[0]
    return tensors
