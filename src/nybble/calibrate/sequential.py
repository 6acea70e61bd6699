"""The calibrated run as a `Rounder`: layer after layer, measured, rounded, written, gone on from.

What is given to a run is on the disk before the next layer writes hidden states, and those go back
one layer until then: an interrupted run begins its layer anew, and makes the same bytes. How a
layer is measured is in `passes.py`, how codes are chosen in `rounding.py` and `experts.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from nybble.calibrate.calibration_progress import CalibrationProgress
from nybble.calibrate.footprint import Footprint, footprint
from nybble.calibrate.passes import Finished, Passes
from nybble.calibrate.report import REPORT_JSON, REPORT_TEXT, Report
from nybble.calibrate.rounding import Effort
from nybble.calibrate.samples import Samples
from nybble.calibrate.scale_out import Workers
from nybble.calibrate.stage_record import JobRecord, StageRecord, load, remove_all, save
from nybble.calibrate.stage_rounding import StageRounding
from nybble.calibrate.stages import Stages, stages_of
from nybble.calibrate.task_files import remove_scratch
from nybble.errors import CheckpointError, RecipeError
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels.dispatch import choose
from nybble.machine import available_bytes
from nybble.models.model import Model
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.quantize.rounder import MACHINE, Unit

#: What a worker takes before it does a task: Python, torch, the kernels.
_WORKER_BYTES = 1 << 29


class Calibration:
    """A `Rounder` that chooses codes by what passes through each linear."""

    def __init__(
        self,
        plan: Plan,
        samples: Samples,
        effort: Effort,
        *,
        spill: Path,
        threads: int,
        progress: Progress,
        input_scales: Mapping[str, float] | None = None,
        limit_bytes: int | None = None,
        workers: Workers | None = None,
    ) -> None:
        """`spill` is a folder for hidden states, continued from where it holds an interrupted run
        of this; `input_scales` those of a plan that needs some; `workers`, examined before, do its
        tasks. The memory that all will take is said, and kept.

        Raises ModelError for a model that nybble cannot compute, RecipeError for input scales that
        are missing, and DoesNotFit beyond `limit_bytes` (default: what is available).
        """
        if taken := {REPORT_JSON, REPORT_TEXT}.intersection(plan.checkpoint.side_files()):
            raise CheckpointError(
                f"{plan.checkpoint.path}: holds a file {min(taken)}, the name of a calibrated "
                "run's own report; move it away"
            )
        self.samples, self.effort, self.spill, self.threads = samples, effort, spill, threads
        model = Model(plan.checkpoint)
        self.stages: Stages = stages_of(plan, model.weights.prefix, model.network.dims.layers)
        if not self.stages.jobs:
            raise RecipeError(
                f"recipe {plan.recipe.name}: quantizes nothing here that a text passes through, so "
                "there is nothing to calibrate; leave --calibrate out"
            )
        limit_bytes = available_bytes() if limit_bytes is None else limit_bytes
        scales = dict(input_scales or {})
        windows = samples.fit_windows, samples.guard_windows
        self.told = CalibrationProgress(progress)
        self.passes = Passes(
            model,
            self.stages,
            StageRounding(
                plan,
                model.weights,
                effort,
                spill,
                samples.fit_tokens,
                samples.all_experts,
                threads,
                scales,
                workers,
            ),
            windows,
            spill=spill,
            identity=_identity(plan, effort, scales, [*windows[0], *windows[1]]),
            limit_bytes=limit_bytes,
            told=self.told,
        )
        self.footprint: Footprint = footprint(
            plan,
            self.stages,
            model.network,
            self.passes.main.plan,
            len(self.passes.streams),
            threads,
            shards=[shard.rows for shard in self.passes.main.shards],
            tasks_at_once=workers.at_once if workers is not None else 0,
        )
        progress.say(f"calibrating on {samples}: {self.footprint}")
        self.footprint.refuse_more_than(limit_bytes)
        self.workers = workers
        if workers is not None:
            workers.reserve(self.footprint.task_bytes + _WORKER_BYTES)
        self.records: dict[int, StageRecord] = {}
        self._next = 0  # the stage that comes next
        self._tensors: dict[str, BlockScaledTensor] = {}
        self._left: dict[int, int] = {}  # units of a stage that were not taken yet

    # ------------------------------------------------------------------------------- as a rounder

    def record(self) -> dict[str, object]:
        """See Rounder: effort and samples; the sums depend on threads, processor and torch."""
        return {
            "effort": asdict(self.effort),
            "source": self.samples.record.get("source"),
            "asked": self.samples.record.get("asked"),
            "all_experts": self.samples.all_experts,
            "samples": self.samples.record.get("sha256"),
            "tokens": self.passes.main.plan.tokens,
            MACHINE: self._conditions(),
        }

    def order(self, work: Sequence[Unit]) -> list[Unit]:
        """See Rounder: copies, then layer by layer. Streams begin, or go back to the layer that an
        interrupted run was at."""
        found = self.stages.ordered(work)
        left = [n for unit in found if (n := self.stages.of(unit)) is not None]
        for number in left:
            self._left[number] = self._left.get(number, 0) + 1
        self._next = self.passes.begin(left[0]) if left else len(self.stages.numbers)
        for number in self.stages.jobs:
            if number < self._next:
                self.records[number] = load(self.spill, number)
        return found

    def take(
        self, unit: Unit, commit: Callable[[], None]
    ) -> Mapping[str, BlockScaledTensor] | None:
        """See Rounder."""
        number = self.stages.of(unit)
        if number is None:
            return None
        if self._next <= number:
            commit()  # before hidden states are written that its layer was not made of
            work = [self.passes.work(n) for n in self.stages.numbers]
            self.told.begin(sum(work), sum(work[: self._next]))
        while self._next <= number:
            self._keep(self._next, self.passes.run(self._next))
            self._next += 1
        found = {m.module: self._tensors[m.module] for job in unit.jobs for m in job.members}
        self._left[number] -= 1
        if not self._left[number]:
            self._tensors.clear()
        return found

    def documents(self) -> dict[str, bytes]:
        """See Rounder: the report, as JSON and as tables."""
        stages = [self.records[n] for n in sorted(self.records)]
        record = self.samples.record
        report = Report.of_stages(self.effort.name, record, self._conditions(), stages)
        return report.documents()

    def close(self) -> None:
        """See Rounder: the hidden states go."""
        self.passes.discard()
        remove_all(self.spill)
        remove_scratch(self.spill)
        if self.spill.is_dir() and not any(self.spill.iterdir()):
            self.spill.rmdir()

    def _conditions(self) -> dict[str, object]:
        """What the bytes depend on. Who does the tasks is not in it, unless their bytes differ."""
        # Sums are taken batch by batch, and how long those are the free memory decides.
        batches = len(self.passes.main.plan.batches)
        found = {**_machine(), "threads": self.threads, "batches": batches}
        is_mixed = self.workers is not None and self.workers.is_mixed
        return {**found, "mixed": True} if is_mixed else found

    def _keep(self, number: int, stage: Finished) -> None:
        """Tensors until they are asked for, what the report says of them until it is written."""
        if not stage.rounded:
            return
        for found in stage.rounded:
            self._tensors.update(found.tensors)
        jobs = {found.job.name: JobRecord.of(found.job, found.choice) for found in stage.rounded}
        self.records[number] = StageRecord(
            number,
            self.stages.title(number),
            tuple(jobs[job.name] for job in self.stages.jobs[number]),
            stage.agreement,
            stage.peaks or {},
        )
        save(self.records[number], self.spill)


def _machine() -> dict[str, object]:
    """What the last bits of sums depend on, threads aside."""
    return {
        "kernels": str(choose()),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def _identity(
    plan: Plan, effort: Effort, scales: Mapping[str, float], windows: Iterable[Tensor]
) -> str:
    """What must be equal for hidden states to be gone on with: the journal knows more."""
    digest = hashlib.sha256(plan.checkpoint.fingerprint().encode())
    digest.update(plan.digest().encode())
    digest.update(json.dumps(asdict(effort)).encode())
    digest.update(json.dumps(scales, sort_keys=True).encode())
    for window in windows:
        digest.update(window.numpy().tobytes() + b"|")
    return digest.hexdigest()[:16]
