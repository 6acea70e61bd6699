"""What `nybble quantize` does with text: measure input scales, calibrate weights, and keep apart
what is calibrated on from what is judged on.

Torch is imported where something runs, not here: a run without text needs none.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.extras import needs_torch
from nybble.api.input_measurement import InputMeasurement
from nybble.calibrate.overlap import Sketch, refuse_overlap
from nybble.calibrate.report import REPORT_JSON, read_report
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.writer import JOURNAL, partial_folder
from nybble.errors import RecipeError
from nybble.families.dimensions import text_section
from nybble.formats.block import NVFP4
from nybble.formats.search import Search
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.quantize.input_scales import InputScales, stored_input_scales
from nybble.quantize.kv_scales import stored_kv_scales
from nybble.quantize.run import Options, refuse_other_run, refuse_start

if TYPE_CHECKING:
    from nybble.calibrate.samples import Samples
    from nybble.calibrate.scale_out import Workers
    from nybble.calibrate.sequential import Calibration

#: How hard to try, the quickest first; rounding.EFFORTS holds what each does.
EFFORTS = ("fast", "default", "best")


# ------------------------------------------------------------------------------ calibrated weights


@dataclass(frozen=True, slots=True)
class Request:
    """A calibration that was asked for: `source` is a preset or a file, `ray` the address of a
    cluster that helps."""

    source: str
    effort: str
    samples: int | None
    length: int | None
    ray: str | None = None

    def open_samples(self, plan: Plan, progress: Progress) -> Samples:
        """The windows of the source, once it is clear that nobody will judge the model on them.

        Raises MissingExtra without torch, and what reading the text raises.
        """
        needs_torch("--calibrate", ", or leave --calibrate out")
        from nybble.calibrate.samples import open_samples

        context = text_section(plan.checkpoint.config).get("max_position_embeddings")
        progress.say(f"reading the calibration text ({self.source})")
        samples = open_samples(
            plan.checkpoint.path,
            self.source,
            samples=self.samples,
            length=self.length,
            context=context if isinstance(context, int) else None,
        )
        _refuse_suites(samples)
        return samples

    def rehearse(self, plan: Plan, out: Path, *, threads: int, progress: Progress) -> None:
        """Say what a run would be calibrated on, and the memory and disk that it would take;
        nothing is computed. Raises what a run would raise before its first layer."""
        samples = self.open_samples(plan, progress)
        if plan.needs_data:
            progress.say(f"to calibrate on {samples}, once input scales are measured")
            return
        self.calibration(plan, out, samples, threads=threads, progress=progress, scales=None)

    def calibration(
        self,
        plan: Plan,
        out: Path,
        samples: Samples,
        *,
        threads: int,
        progress: Progress,
        scales: Mapping[str, float] | None,
        workers: Workers | None = None,
    ) -> Calibration:
        """Who chooses the codes; what it keeps meanwhile is in OUT.calibration."""
        from nybble.calibrate import rounding
        from nybble.calibrate.sequential import Calibration

        if workers is not None:
            workers.examine(calibration_folder(out), plan.checkpoint)
        return Calibration(
            plan,
            samples,
            rounding.EFFORTS[self.effort],
            spill=calibration_folder(out),
            threads=threads,
            progress=progress,
            input_scales=scales,
            workers=workers,
        )


def calibration_request(
    calibrate: str | PathLike[str] | None,
    *,
    effort: str | None,
    samples: int | None,
    length: int | None,
    allow_mixed: bool,
    resume: bool,
    data_free: bool,
    kv_scales: bool,
    search: Search,
    text: object,
    tokens: object,
    ray: str | None = None,
) -> Request | None:
    """What was asked for; None without --calibrate. Raises RecipeError for options that contradict
    each other."""
    if kv_scales and data_free:
        raise RecipeError(
            "--kv-scales measures keys and values, --data-free measures nothing; leave one out"
        )
    if calibrate is None:
        given = {
            "--effort": effort,
            "--samples": samples,
            "--length": length,
            "--allow-mixed": allow_mixed or None,
            "--ray": ray,
        }
        for name, value in given.items():
            if value is not None:
                raise RecipeError(
                    f"{name} belongs to --calibrate, which is not there; add it, or leave {name} "
                    "out"
                )
        return None
    if effort is not None and effort not in EFFORTS:
        raise RecipeError(f"effort {effort!r}; choose one of {', '.join(EFFORTS)}")
    if data_free:
        raise RecipeError(
            "--data-free measures nothing, --calibrate runs the model over text; leave one out "
            "(recipe nvfp4-all stores no input scales)"
        )
    if text is not None or tokens is not None:
        raise RecipeError(
            "--calibration-text and --calibration-tokens choose the text that input scales alone "
            "are measured on; with --calibrate they are measured on its own: give that text to "
            "--calibrate, and --samples and --length"
        )
    if search != "mse":
        raise RecipeError(
            f"--search {search}: calibration chooses block scales itself, among all; leave it out"
        )
    if allow_mixed and not resume and ray is None:
        raise RecipeError(
            "--allow-mixed lets a run be continued on another machine, or be done by machines "
            "that differ; it needs --resume or --ray"
        )
    return Request(str(calibrate), effort or "default", samples, length, ray)


@contextmanager
def workers_of(request: Request | None, options: Options) -> Iterator[Workers | None]:
    """Who does tasks besides this process, while they are needed. Raises what `connected` does."""
    if request is None or request.ray is None:
        yield None
        return
    needs_torch("--calibrate", ", or leave --calibrate out")
    from nybble.calibrate.scale_out_ray import connected

    with connected(request.ray, options.threads, allow_mixed=options.allow_mixed) as workers:
        yield workers


def refuse_nothing_to_calibrate(plan: Plan) -> None:
    """Raise RecipeError for a plan without a linear whose codes calibration chooses."""
    if not any(job.scheme.weight is NVFP4 for job in plan.jobs):
        raise RecipeError(
            f"recipe {plan.recipe.name} has no linear in NVFP4 here, and calibration chooses the "
            "codes of no other format; leave --calibrate out"
        )


def calibration_folder(out: Path) -> Path:
    """Where a calibrated run keeps hidden states until it is done."""
    return out.with_name(out.name + ".calibration")


def peak_bytes() -> int:
    """The largest resident set of this process so far, mapped files included."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


# ---------------------------------------------------------------------------------------- judging


def refuse_calibrated_on(folder: Path, text: str, name: str) -> None:
    """Raise EvaluationError if the checkpoint in `folder` was calibrated on a passage of `text`."""
    report = read_report(folder)
    if report is None:
        return
    sketch = Sketch.from_json(report.samples.get("words"), str(folder / REPORT_JSON))
    calibrated = f"what {folder.name} was calibrated on ({report.samples.get('source')})"
    refuse_overlap(sketch, text, calibrated=calibrated, judged=name)


def _refuse_suites(samples: Samples) -> None:
    """The texts that come along for judging are not calibrated on."""
    from nybble.evaluate.windows import SUITES, load_suite

    name = f"the calibration text {samples.record['source']}"
    sketch = Sketch.from_json(samples.record["words"], name)
    for suite in SUITES:
        refuse_overlap(sketch, load_suite(suite).content, calibrated=name, judged=suite)


# ------------------------------------------------------------------------------------ before a run


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run is given: measured scales, and who chooses its codes; None for what it has not.
    `kv_scales` are those of keys and values by layer, `kv_rows` what a report says of them: of an
    interrupted run, only the scales are known."""

    input_scales: InputScales | None = None
    kv_scales: Mapping[int, tuple[float, float]] | None = None
    kv_rows: tuple[Mapping[str, object], ...] = ()
    calibration: Calibration | None = None


def prepare(
    plan: Plan,
    out: Path,
    options: Options,
    asked: InputMeasurement,
    request: Request | None,
    progress: Progress,
    disk: Disk | None,
    workers: Workers | None = None,
) -> Prepared:
    """Measure, or read what an interrupted run measured; raises at once what would stop the run."""
    is_fresh = not (options.resume and (partial_folder(out) / JOURNAL).exists())
    must_measure = plan.needs_data or bool(plan.kv_scales)
    if is_fresh and (must_measure or request is not None):
        refuse_start(plan, out, options, disk=disk)
    if not is_fresh:
        refuse_other_run(plan, out, options, disk=disk)
    if request is not None:
        asked = replace(asked, samples=request.open_samples(plan, progress))
    scales: InputScales | None = None
    kv: Mapping[int, tuple[float, float]] | None = None
    rows: Sequence[Mapping[str, object]] = ()
    if not is_fresh:
        scales = asked.over(stored_input_scales(out, disk=disk))
        kv = stored_kv_scales(out, disk=disk)
        rows = [{"layer": n, "k_scale": k, "v_scale": v} for n, (k, v) in kv.items()]
    elif must_measure:
        scales, found = asked.run(plan, progress)
        if found is not None:
            from nybble.calibrate.kv_scales import as_json

            rows = as_json(found)
            # Of the MTP head, -1, no engine is known to look for scales: they are only reported.
            kv = {n: (s.key, s.value) for n, s in found.items() if n >= 0}
    if request is None or asked.samples is None:
        return Prepared(scales, kv, tuple(rows))
    values = None if scales is None else scales.values
    calibration = request.calibration(
        plan,
        out,
        asked.samples,
        threads=options.threads,
        progress=progress,
        scales=values,
        workers=workers,
    )
    return Prepared(scales, kv, tuple(rows), calibration)
