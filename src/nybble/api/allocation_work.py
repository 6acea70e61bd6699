"""What an allocation needs before it can choose: text that nothing was fitted to, checkpoints in
one format each, and the damages measured with them.

All of it lies in OUT.allocation until the result is written, so that an interrupted run goes on
where it was. What is made of it is in `allocate.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.calibrate.allocate import Choice, Ground
from nybble.calibrate.candidates import Damages
from nybble.calibrate.derived import derive
from nybble.calibrate.report import Row, read_report
from nybble.calibrate.scales import InputAmax
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, TextError
from nybble.formats.block import NVFP4
from nybble.formats.scheme import BF16, Scheme
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import Recipe
from nybble.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from nybble.api.quantize import Result
    from nybble.calibrate.damage import Bench, Source
    from nybble.calibrate.samples import Samples

#: Tokens that damages are measured on, and those that candidates are: each candidate is one branch,
#: each group one too, and there are a hundred or two of these.
PROBE_TOKENS, JUDGE_TOKENS = 1536, 4096
#: `quantize` with a model and options filled in: called with an output, a recipe and keywords.
Quantize = Callable[..., "Result"]


def held_out(samples: Samples) -> tuple[list[Tensor], list[Tensor]]:
    """The guard's windows in two halves, one to measure damages on and one to judge candidates.

    Raises TextError where the guard has not two windows of two tokens.
    """
    guard = list(samples.guard_windows)
    if len(guard) == 1:
        middle = len(guard[0]) // 2
        guard = [guard[0][:middle], guard[0][middle:]]
    probes, judges = _first(guard[::2], PROBE_TOKENS), _first(guard[1::2], JUDGE_TOKENS)
    if sum(map(len, probes)) < 2 or sum(map(len, judges)) < 2:
        raise TextError(
            f"an allocation needs text that nothing was fitted to, and the calibration's guard has "
            f"{samples.guard_tokens:,} tokens; give more or longer samples"
        )
    return probes, judges


def _first(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    found: list[Tensor] = []
    left = tokens
    for window in windows:
        if left < 2:
            break
        found.append(window[:left])
        left -= len(found[-1])
    return found


class Remembered:
    """A measurement of inputs on the samples' fit windows, made once for all checkpoints.

    The largest input of a module does not depend on its format, so what was measured for one
    checkpoint serves the next.
    """

    def __init__(self, samples: Samples, threads: int, headroom: float | None = None) -> None:
        self.samples, self.threads, self.headroom = samples, threads, headroom
        self.known: InputAmax | None = None
        self.modules: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What is measured on, in words that are equal for equal text: the journal keeps them."""
        digest = str(self.samples.record.get("sha256"))[:16]
        source = self.samples.record.get("source")
        return f"{self.samples.fit_tokens:,} tokens of {source}, sha256 {digest}"

    def keywords(self, plan: Plan) -> dict[str, object]:
        """For `quantize`, which takes no options of a measurement where it makes none."""
        if not plan.needs_data:
            return {}
        given = {} if self.headroom is None else {"headroom": self.headroom}
        return {"measure": self, **given}

    def __call__(self, plan: Plan, progress: Progress) -> InputAmax:
        """See api.calibrated.Measure."""
        from nybble.calibrate.amax import measure_amax

        jobs = [j for j in plan.jobs if j.scheme.needs_input_scale]
        wanted = frozenset(m.module for j in jobs for m in j.members)
        if self.known is None or not wanted <= self.modules:
            found = measure_amax(
                plan, windows=self.samples.fit_windows, threads=self.threads, progress=progress
            )
            old = self.known
            self.known = found if old is None else _joined(old, found)
            self.modules |= wanted
        return self.known


def _joined(a: InputAmax, b: InputAmax) -> InputAmax:
    return InputAmax(
        {**a.amax, **b.amax}, {**a.tokens, **b.tokens}, b.total_tokens, {**a.blocks, **b.blocks}
    )


class Work:
    """What lies in OUT.allocation: two checkpoints, and the damages once they are measured."""

    def __init__(self, out: Path, base: Plan, ground: Ground, *, resume: bool) -> None:
        self.base, self.ground, self.resume = base, ground, resume
        self.folder = out.with_name(out.name + ".allocation")
        self.uniform, self.eight = self.folder / "uniform", self.folder / "fp8"
        self.smallest = ground.smallest()
        self.in_eight: dict[str, Scheme] = {
            g.name: next((s for s in g.schemes if is_eight(s)), BF16) for g in ground.groups
        }
        self.has_eight = any(is_eight(self.in_eight[g.name]) for g in ground.open)
        is_there = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if is_there and resume and not self.folder.exists():
            raise CheckpointError(
                f"{out}: is complete, there is nothing to go on with; verify it with nybble check"
            )
        if is_there and not resume:
            raise CheckpointError(f"{out}: exists and is not an empty folder; name another output")
        if self.folder.exists() and not resume:
            raise CheckpointError(
                f"{self.folder}: is left from an interrupted run; continue it with --resume, or "
                "remove it"
            )

    def recipe(self, choice: Choice, title: str) -> Recipe:
        """The recipe of a choice, named after the base."""
        name = f"{self.base.recipe.name}-allocated"
        return derive(self.base, self.ground.groups, choice, name, title)

    def make(
        self, uniform: Quantize, plain: Quantize, measure: Remembered, progress: Progress
    ) -> None:
        """The two checkpoints; what is there already is only verified."""
        sizes = [self.ground.payload_bytes(self.smallest)] * 2  # the result is larger: at least
        if self.has_eight:
            sizes.append(self.ground.payload_bytes(self.in_eight))
        progress.say(
            f"an allocation among {len(self.ground.open)} groups; {self.folder} will hold "
            f"{sum(sizes[1:]) / 2**30:.2f} GiB until the end"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        what = "more for checkpoints to weigh and the result"
        Disk().refuse_less_than(sum(sizes) - there, self.folder, self.folder, what)
        recipe = self.recipe(self.smallest, "every group in its smallest format")
        uniform(self.uniform, recipe, resume=self.resume, **measure.keywords(self.plan(recipe)))
        if self.has_eight:
            recipe = self.recipe(self.in_eight, "every group in FP8")
            plain(self.eight, recipe, resume=self.resume, **measure.keywords(self.plan(recipe)))

    def plan(self, recipe: Recipe) -> Plan:
        """Of a recipe that was derived here."""
        return make_plan(self.base.checkpoint, recipe, self.base.layout)

    def opened(self, threads: int) -> Sources:
        return Sources(self, threads)

    def damages(
        self, sources: Mapping[str, Source], probes: Sequence[Tensor], threads: int, told: Progress
    ) -> Damages:
        """Measured, or what an interrupted run measured of the same."""
        from nybble.calibrate.damage import measure_damages

        identity = self._identity(sources, probes)
        file = self.folder / "damage.json"
        if file.exists():
            known = json.loads(file.read_text("utf-8"))
            if known["identity"] == identity:
                return dict(known["damages"])
        bench = bench_of(sources, self.ground, probes, threads, told)
        found = measure_damages(bench, self.ground.open)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps({"identity": identity, "damages": found}), "utf-8")
        part.replace(file)
        return found

    def _identity(self, sources: Mapping[str, Source], probes: Sequence[Tensor]) -> str:
        digest = hashlib.sha256()
        for name in sorted(sources):
            fingerprint = sources[name].model.weights.checkpoint.fingerprint()
            digest.update(f"{name} {fingerprint}\n".encode())
        for group in self.ground.groups:
            digest.update(f"{group.name} {[s.name for s in group.schemes]}\n".encode())
        for window in probes:
            digest.update(window.numpy().tobytes() + b"\n")
        return digest.hexdigest()

    def remove(self) -> None:
        """What was only needed to choose."""
        shutil.rmtree(self.folder)


class Sources:
    """The checkpoints of a work, open, by the names of schemes."""

    def __init__(self, work: Work, threads: int) -> None:
        self.work = work
        self.stack = ExitStack()

    def __enter__(self) -> Mapping[str, Source]:
        from nybble.calibrate.damage import Source
        from nybble.models.model import Model

        work = self.work
        models = {}
        for folder in (work.uniform, work.eight):
            if folder.exists():
                opened = self.stack.enter_context(Checkpoint.open(folder))
                models[folder] = Model(opened)
        found = {BF16.name: Source(Model(work.base.checkpoint))}
        for scheme in {s for g in work.ground.groups for s in g.schemes} - {BF16}:
            folder = work.eight if is_eight(scheme) and work.has_eight else work.uniform
            found[scheme.name] = Source(models[folder], is_weight_only=scheme.input is None)
        return found

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def is_eight(scheme: Scheme) -> bool:
    return scheme.weight is not None and scheme.weight is not NVFP4


def bench_of(
    sources: Mapping[str, Source],
    ground: Ground,
    windows: Sequence[Tensor],
    threads: int,
    progress: Progress,
) -> Bench:
    from nybble.calibrate.damage import Bench
    from nybble.kernels.compute import Compute
    from nybble.models.linear import Mode

    mode = Mode(Compute("bf16", threads), simulate=True)
    return Bench(sources, ground.groups, windows, mode, progress)


def report_of(uniform: Path, plan: Plan) -> dict[str, bytes]:
    """The report of the uniform checkpoint's calibration, of what a result has of it, as documents:
    no group that stays as it was, no method of one in another format. How far routers agree was
    measured in the uniform network, which this is not. Empty where nothing was calibrated."""
    from nybble.calibrate.stage_rounding import DATA_FREE

    found = read_report(uniform)
    if found is None:
        return {}
    schemes = {m.module: job.scheme for job in plan.jobs for m in job.members}
    rows: list[Row] = []
    for row in found.rows:
        scheme = schemes.get(row.modules[0])
        if scheme is None:
            continue
        kept = replace(row, scheme=scheme.name)
        if scheme.weight is not NVFP4:
            kept = Row(
                row.job, row.role, scheme.name, row.modules, row.shape, DATA_FREE, None, {}, 0, 0
            )
        rows.append(kept)
    return replace(found, rows=rows, routing=[]).documents()
