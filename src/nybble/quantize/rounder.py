"""What a run does as one, and who may choose codes in the place of the data-free search.

A `Rounder` knows what the weights are for (their inputs, say) and gives finished tensors, unit by
unit; `run.py` writes, journals and audits them as any others. Knows nothing of how codes are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from nybble.formats.tensor import BlockScaledTensor
from nybble.plan.jobs import Copy, Job
from nybble.plan.plan import Plan

#: The part of a rounder's record that says what its sums may depend on in their last bit.
MACHINE = "machine"


@dataclass(frozen=True, slots=True)
class Unit:
    """What the journal records as one: a copied tensor, or the jobs that share source tensors."""

    name: str
    copy: Copy | None
    jobs: tuple[Job, ...]


class Rounder(Protocol):
    """Who chooses the codes of a run."""

    def record(self) -> Mapping[str, object]:
        """What must be equal for a run to be continued, JSON values; below `MACHINE` what
        `Options.allow_mixed` lets differ."""
        ...

    def order(self, work: Sequence[Unit]) -> list[Unit]:
        """The units that are left to do, in the order in which they will be asked for. Said before
        anything is read; refuses what cannot be done."""
        ...

    def take(
        self, unit: Unit, commit: Callable[[], None]
    ) -> Mapping[str, BlockScaledTensor] | None:
        """The finished tensors of a unit's modules; None: the data-free search makes them.

        `commit` returns when all units given before are on the disk and in the journal: to be
        called before anything that they were made of is given up.
        """
        ...

    def documents(self) -> Mapping[str, bytes]:
        """Side documents of the finished checkpoint, by name."""
        ...

    def close(self) -> None:
        """The checkpoint is whole: what was kept for continuing can go."""
        ...


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
