"""The stages of a calibrated run: the layers in their order, then the output head, the MTP head.

A stage is what one pass over the calibration tokens measures, and what is rounded from it. Jobs of
other parts (a vision tower) belong to none: no text passes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.formats.block import NVFP4
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan
from nybble.quantize.rounder import Unit


@dataclass(frozen=True, slots=True)
class Stages:
    """Where each job of a plan belongs: `of_job` by job name; stage numbers below `layers` are
    layers."""

    layers: int
    jobs: dict[int, tuple[Job, ...]]
    of_job: dict[str, int]

    @property
    def head(self) -> int:
        """The number of the output head's stage."""
        return self.layers

    @property
    def mtp(self) -> int:
        """The number of the MTP head's stage."""
        return self.layers + 1

    @property
    def numbers(self) -> range:
        """Every stage that has to be gone through: all layers before a later one's."""
        return range(max(self.jobs, default=-1) + 1)

    def of(self, unit: Unit) -> int | None:
        """The stage of a unit, None for one that belongs to none."""
        return self.of_job.get(unit.jobs[0].name) if unit.jobs else None

    def ordered(self, work: Sequence[Unit]) -> list[Unit]:
        """Copies first, what belongs to no stage next, then stage by stage."""
        return sorted(work, key=lambda u: -2 if u.copy else -1 if (n := self.of(u)) is None else n)

    def title(self, number: int) -> str:
        """As the progress display and the report name a stage."""
        if number < self.layers:
            return f"layer {number + 1} of {self.layers}"
        return "lm_head" if number == self.head else "mtp"


def stages_of(plan: Plan, prefix: str, layers: int) -> Stages:
    """The stages of a plan for a model of `layers` layers, whose modules begin with `prefix`."""
    found: dict[int, list[Job]] = {}
    of_job: dict[str, int] = {}
    for job in plan.jobs:
        number = _number(job, prefix, layers)
        if number is not None:
            found.setdefault(number, []).append(job)
            of_job[job.name] = number
    return Stages(layers, {n: tuple(jobs) for n, jobs in found.items()}, of_job)


def is_rounded(job: Job) -> bool:
    """Whether the job's codes are chosen by its inputs; other formats have the data-free search."""
    return job.scheme.weight is NVFP4


def _number(job: Job, prefix: str, layers: int) -> int | None:
    if job.role == "lm_head":
        return layers
    if job.role == "mtp":
        return layers + 1
    module = job.members[0].module
    if not module.startswith(f"{prefix}layers."):
        return None
    return int(module[len(prefix) :].split(".")[1])
