"""What passes through the layers of a calibrated run, and what is rounded from it.

Two streams of hidden states pass over the same windows. The teacher's go through the model as it
is, the student's through what it became: a layer is fitted to the inputs that the layers before it
really give. For each layer

    the teacher's hidden states go through it (where they went, a mixture's router is asked);
    the student's do, with an observer, and are not kept: what its linears see;
    its linears are rounded, and held in the place of the file's;
    the student's go through it again, as an engine will run it, and are kept.

`effort.is_sequential` False saves the student: one pass of the teacher measures. A model without
routers needs no teacher. Knows neither how codes are chosen nor what becomes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nybble.calibrate.activations import QuantizedInputs
from nybble.calibrate.agreement import Agreement, Choices, agreement
from nybble.calibrate.calibration_progress import CalibrationProgress
from nybble.calibrate.experts import RoundedJob
from nybble.calibrate.measuring import torch_threads
from nybble.calibrate.shard_tasks import Notes, noting
from nybble.calibrate.stage_rounding import StageRounding
from nybble.calibrate.stages import Stages
from nybble.calibrate.statistics import Statistics
from nybble.calibrate.sweeps import Sweep
from nybble.errors import CheckpointError
from nybble.kernels.compute import Compute
from nybble.models.feed_forward import MixtureOfExperts
from nybble.models.layer import Layer
from nybble.models.linear import Mode
from nybble.models.loader import Held
from nybble.models.model import Model
from nybble.plan.jobs import Job
from nybble.stream.drafts import draft_states
from nybble.stream.executor import Stream


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage that is done: its jobs, whether its router agrees with the teacher's, and for each
    input measured the energy of its largest token over the median one's."""

    rounded: tuple[RoundedJob, ...] = ()
    agreement: Agreement | None = None
    peaks: Mapping[str, float] | None = None


class Passes:
    """The streams of a run, and each stage's way through them."""

    def __init__(
        self,
        model: Model,
        stages: Stages,
        rounding: StageRounding,
        windows: tuple[Sequence[Tensor], Sequence[Tensor]],
        *,
        spill: Path,
        identity: str,
        limit_bytes: int | None,
        told: CalibrationProgress,
    ) -> None:
        """`windows` int64 [length] are those that fit and those that judge; hidden states are kept
        in `spill`, and `identity` names the run that they belong to. Raises TextError for no
        windows, DoesNotFit where `limit_bytes` are not enough for one batch, RecipeError for input
        scales that are missing."""
        self.model, self.stages, self.rounding, self.told = model, stages, rounding, told
        self.quantized = QuantizedInputs(rounding.plan, rounding.input_scales)
        self.compute = Compute("bf16", rounding.threads)
        fit, guard = windows
        self.first_guard = len(fit)

        def stream(name: str) -> Stream:
            return Stream(
                model,
                [*fit, *guard],
                Mode(self.compute),
                spill=spill / name,
                limit_bytes=limit_bytes,
                progress=told,
                breaks=[len(fit)],
                identity=identity,
            )

        is_sequential = rounding.effort.is_sequential
        has_teacher = not is_sequential or any(model.network.dims.has_experts)
        self.teacher = stream("teacher") if has_teacher else None
        self.student = stream("student") if is_sequential else None

    @property
    def main(self) -> Stream:
        """The stream whose inputs the weights are fitted to."""
        found = self.student or self.teacher
        assert found is not None
        return found

    @property
    def streams(self) -> list[Stream]:
        """All there are."""
        return [s for s in (self.teacher, self.student) if s is not None]

    def work(self, number: int) -> int:
        """Token layers of a stage; rounding counts as one pass."""
        has_jobs = number in self.stages.jobs
        passes = int(has_jobs)
        if number < self.stages.layers:
            passes = len(self.streams) + (has_jobs and self.student is not None)
        return self.main.plan.tokens * (passes + has_jobs)

    def begin(self, first: int) -> int:
        """The stage to begin with where `first` is the first that has work left: hidden states go
        back to its inputs, where an interrupted run left them. Raises CheckpointError where they
        are gone."""
        every = [n for n in self.stages.numbers if n in self.stages.jobs]
        if first == every[0]:  # nothing is lost by beginning anew
            self.discard()
            for stream in self.streams:
                stream.begin()
            return 0
        # Layers without jobs are not in the journal: the streams know how far they are.
        last = min(first, self.stages.layers)
        start = min([last, *(s.begin() for s in self.streams)])
        can_go_on = not any(start <= n < last for n in every)
        for stream in self.streams:
            if not can_go_on or not stream.rewind(start):
                raise CheckpointError(
                    f"{stream.spill}: does not hold what goes into {self.stages.title(first)}, "
                    "where the interrupted run has to go on; remove it and the unfinished output, "
                    "and start again"
                )
        return first if start == last else start

    def discard(self) -> None:
        """Give the hidden states up, whatever they are from."""
        for stream in self.streams:
            stream.discard()

    def run(self, number: int) -> Finished:
        """One stage, from its inputs to its tensors. Raises EngineError, naming layer or module,
        for NaN, FormatError for weights that are not finite."""
        self.told.at(self.stages.title(number))
        if number < self.stages.layers:
            return self._layer(number)
        if number not in self.stages.jobs:
            return Finished()
        return self._head() if number == self.stages.head else self._mtp()

    # ---------------------------------------------------------------------------------- the stages

    def _layer(self, number: int) -> Finished:
        weights = self.model.weights
        layer = weights.layer(number)
        jobs = self.stages.jobs.get(number, ())
        statistics = self.rounding.statistics(jobs, layer.mixture, self.quantized.only(jobs))
        before = self._choices(layer)
        if self.teacher is not None and self.student is not None:
            self.told.doing("teacher")
            self._send(self._sweep(self.teacher, number, layer), before)
        if self.student is None or jobs:
            self.told.doing("statistics")
            sweep = self._sweep(self.main, number, layer)
            self._send(sweep, statistics, keeps=self.student is None)
        peaks = _peaks(statistics)
        rounded = self._rounded(jobs, statistics, layer.mixture)
        del statistics  # the next pass needs the memory
        agreed = self._go_on(number, rounded, before) if self.student is not None else None
        weights.drop_layer(number)
        return Finished(rounded, agreed, peaks)

    def _go_on(
        self, number: int, rounded: Sequence[RoundedJob], before: Choices | None
    ) -> Agreement | None:
        """The student's hidden states through the layer as it is now."""
        assert self.student is not None
        weights, scales = self.model.weights, self.rounding.input_scales
        self.told.doing("student")
        held = {
            module: Held(tensor, found.job.scheme.input, scales.get(module))
            for found in rounded
            for module, tensor in found.tensors.items()
        }
        for module, one in held.items():
            weights.hold(module, one)
        try:
            layer = weights.layer(number)
            after = self._choices(layer)
            self._send(self._sweep(self.student, number, layer, simulate=True, held=held), after)
        finally:
            weights.release()
        if before is None or after is None:
            return None
        return agreement(before.chosen, after.chosen)

    def _head(self) -> Finished:
        jobs = self.stages.jobs[self.stages.head]
        statistics = self.rounding.statistics(jobs, None, self.quantized)
        self.told.doing("statistics")
        modules = self.model.weights.head().modules
        with torch_threads(self.rounding.threads):
            for rows in self._final(statistics):
                statistics.linear(modules, rows[1])
                self.told.advance(len(rows[1]), modules[0])
        peaks = _peaks(statistics)
        return Finished(self._rounded(jobs, statistics, None), None, peaks)

    def _mtp(self) -> Finished:
        jobs = self.stages.jobs[self.stages.mtp]
        head = self.model.mtp
        assert head is not None, "jobs of an MTP head that the model does not have"
        mixture = head.layer.mixture
        statistics = self.rounding.statistics(jobs, mixture, self.quantized)
        self.told.doing("statistics")
        mode = noting(statistics, self.compute, simulate=False)
        final = self._final(statistics)
        for _, rows in draft_states(self.model, self.main.windows, final, mode):
            self.told.advance(len(rows), head.layer.name)
        peaks = _peaks(statistics)
        return Finished(self._rounded(jobs, statistics, mixture), None, peaks)

    # ---------------------------------------------------------------------------------- the pieces

    def _rounded(
        self, jobs: Sequence[Job], statistics: Statistics, mixture: MixtureOfExperts | None
    ) -> tuple[RoundedJob, ...]:
        found: list[RoundedJob] = []
        whole, done, told = sum(map(_elements, jobs)), 0, 0
        self.told.doing("rounding")
        with torch_threads(self.rounding.threads):
            for one in self.rounding.all(jobs, statistics, mixture):
                found.append(one)
                self.told.won(one.choice)
                done += _elements(one.job)
                counted = self.main.plan.tokens * done // whole
                self.told.advance(counted - told, one.job.name)
                told = counted
        return tuple(found)

    def _final(self, statistics: Statistics) -> Iterator[tuple[int, Tensor]]:
        """The final hidden states window by window; statistics know by then whose they are."""
        for window, rows in self.main.normed():
            statistics.begin(is_guard=window >= self.first_guard)
            yield window, rows

    def _sweep(
        self,
        stream: Stream,
        number: int,
        layer: Layer,
        *,
        simulate: bool = False,
        held: Mapping[str, Held] | None = None,
    ) -> Sweep:
        return Sweep(stream, number, layer, self.first_guard, self.compute, simulate, held)

    def _send(self, sweep: Sweep, notes: Notes, *, keeps: bool = True) -> None:
        """By workers, where there are some."""
        if isinstance(notes, Statistics) and notes.is_idle:
            notes = None
        if self.rounding.workers is None:
            sweep.here(notes, keeps=keeps)
        else:
            folder = self.rounding.folder
            sweep.by(self.rounding.workers, notes, keeps=keeps, folder=folder)

    def _choices(self, layer: Layer) -> Choices | None:
        """Who notes where tokens go, where there are two to compare."""
        if layer.mixture is None or len(self.streams) < 2:
            return None
        return Choices(layer.mixture, Mode(self.compute))


def _peaks(statistics: Statistics) -> dict[str, float]:
    return {modules[0]: moments.peak for modules, moments in statistics.fit.items()}


def _elements(job: Job) -> int:
    return sum(m.shape[0] * m.shape[1] for m in job.members)
