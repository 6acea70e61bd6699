"""What a calibrated run takes of memory and disk, said before the first weight is read.

The stages of a layer come one after the other: a forward with its cache and the Hessians it fills,
then the rounding of one group after another beside those Hessians, then a forward through what was
rounded. The peak is the dearest of them over all layers. Mapped files are not counted: the system
takes their pages back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nybble.calibrate.expert_tasks import task_bytes
from nybble.calibrate.rounding import ROWS
from nybble.calibrate.scale_out import tasks_under_way
from nybble.calibrate.stage_rounding import PART_WEIGHTS
from nybble.calibrate.stages import Stages, is_rounded
from nybble.errors import DoesNotFit
from nybble.models.network import Network
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan
from nybble.stream.memory import StreamPlan

_FLOAT = 4
#: Matrices of float32 held together while a group is rounded: [N, K] (the weight, in units, codes
#: and errors of the methods compared), of at most ROWS rows at a time [N, K], and [K, K] beside the
#: two that are counted among the statistics.
_WEIGHT_COPIES, _PART_COPIES, _HESSIAN_COPIES = 7, 4, 7
#: What torch and the kernels take for themselves when they are first used.
_LIBRARY_BYTES = 64 << 20
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of private memory, by what takes them; `disk_bytes` of hidden states.

    `kept_bytes` is what a layer is known by (Hessians, inputs of a mixture), `forward_bytes` what a
    batch computes with and its shard is measured in, `rounding_bytes` what the largest group takes,
    `rounded_bytes` the layer's new weights. All of the stage that takes most, `stage`.
    `task_bytes` is what the dearest task of any stage takes, if a worker does it.
    """

    stage: str
    kept_bytes: int
    forward_bytes: int
    rounding_bytes: int
    rounded_bytes: int
    disk_bytes: int
    task_bytes: int

    @property
    def private_bytes(self) -> int:
        """The peak beyond what the program itself takes."""
        working = max(self.forward_bytes, self.rounding_bytes)
        return self.kept_bytes + working + self.rounded_bytes + _LIBRARY_BYTES

    def __str__(self) -> str:
        return (
            f"{self.private_bytes / _GIB:.2f} GiB of memory at most ({self.stage}: "
            f"{self.kept_bytes / _GIB:.2f} statistics, {self.rounding_bytes / _GIB:.2f} rounding, "
            f"{self.forward_bytes / _GIB:.2f} forward, {self.rounded_bytes / _GIB:.2f} results), "
            f"{self.disk_bytes / _GIB:.2f} GiB of disk for hidden states"
        )

    def refuse_more_than(self, limit: int | None) -> None:
        """Raise DoesNotFit where the limit is known and too small."""
        if limit is None or self.private_bytes <= limit:
            return
        raise DoesNotFit(
            f"calibrating needs {self}, and {limit / _GIB:.2f} GiB are available; use fewer or "
            "shorter samples (--samples, --length), or a machine with more memory"
        )


def footprint(
    plan: Plan,
    stages: Stages,
    network: Network,
    stream: StreamPlan,
    streams: int,
    threads: int,
    *,
    shards: Sequence[int],
    tasks_at_once: int = 0,
) -> Footprint:
    """The footprint of a run over `streams` streams of the plan `stream` each, cut into `shards` of
    so many tokens; `tasks_at_once` are those that workers can do, 0: there are none."""
    waiting = min(tasks_under_way(tasks_at_once), len(shards)) if tasks_at_once else 0
    found = [
        _of_stage(plan, stages, number, network, stream, streams, threads, max(shards), waiting)
        for number in stages.numbers
    ]
    most = max(found, key=lambda f: f.private_bytes)
    return replace(
        most,
        disk_bytes=max(f.disk_bytes for f in found),
        task_bytes=max(f.task_bytes for f in found),
    )


def _of_stage(
    plan: Plan,
    stages: Stages,
    number: int,
    network: Network,
    stream: StreamPlan,
    streams: int,
    threads: int,
    shard: int,
    waiting: int,
) -> Footprint:
    jobs = stages.jobs.get(number, ())
    chosen = [job for job in jobs if is_rounded(job)]
    dense = [job for job in chosen if not _is_expert(job)]
    experts = [job for job in chosen if _is_expert(job)]
    dims = network.dims
    matrices = sum(_FLOAT * job.members[0].shape[1] ** 2 for job in dense)
    kept = 2 * matrices  # fit and guard
    rounding = max((_group_bytes(job) for job in dense), default=0)
    row = dims.hidden * _FLOAT
    of_shard = matrices  # what it is known by
    if experts:
        kept += stream.tokens * row
        of_shard += shard * row
        rounding = max(
            rounding,
            task_bytes(
                stream.tokens,
                dims.hidden,
                dims.expert_width,
                dims.experts,
                dims.experts_per_token,
                threads,
            ),
        )
    rounded = sum(plan.member_bytes(job, m) for job in jobs for m in job.members)
    cached = stream.cache_bytes + stream.workspace_bytes
    held = 0 if stream.spills else streams * stream.hidden_bytes
    return Footprint(
        stages.title(number),
        kept,
        held + cached + matrices,
        held + rounding,
        rounded,
        # What shards leave for whom adds them, hidden states too, and the weights they are sent.
        streams * stream.disk_bytes + (waiting and waiting * (of_shard + shard * row) + rounded),
        # The output head's inputs and the MTP head's are measured by the run itself.
        max(rounding, cached + of_shard + rounded if number < stages.layers else 0),
    )


def _is_expert(job: Job) -> bool:
    """A routed expert's, of the trunk or of the MTP head: measured from the mixture's input."""
    return ".experts." in job.members[0].module


def _group_bytes(job: Job) -> int:
    k = job.members[0].shape[1]
    n = min(sum(m.shape[0] for m in job.members), max(1, PART_WEIGHTS // k))
    parts = _PART_COPIES * min(n, ROWS) * k
    return _FLOAT * (_WEIGHT_COPIES * n * k + parts + _HESSIAN_COPIES * k * k)
