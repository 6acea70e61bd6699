"""`nybble quantize`: a checkpoint folder becomes a quantized one, and is opened again to prove
it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

import nybble
from nybble.api.calibrated import (
    Prepared,
    Request,
    calibration_request,
    peak_bytes,
    prepare,
    refuse_nothing_to_calibrate,
    workers_of,
)
from nybble.api.check import finding_json
from nybble.api.input_measurement import Measure, input_measurement, refuse_missing
from nybble.api.plan import find_layout, open_source, totals
from nybble.calibrate.report import Report, read_report
from nybble.check.audit import Audit, audit
from nybble.check.rule import Finding, Severity
from nybble.check.run import run_rules, select_rules
from nybble.check.survey import Survey, Target
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import JOURNAL, SHARD_BYTES, partial_folder, refuse_inside
from nybble.errors import CheckFailed, CheckpointError, RecipeError
from nybble.formats.search import Search
from nybble.kernels.dispatch import choose, default_threads
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import Recipe, load_recipe
from nybble.progress import Progress
from nybble.quantize.input_scales import InputScales
from nybble.quantize.run import Options, execute

if TYPE_CHECKING:
    from nybble.quantize.rounder import Rounder

#: The engines that a layout is written for: what one of them would refuse is said.
MADE_FOR = {
    "modelopt": ("vllm", "sglang", "llamacpp"),
    "compressed-tensors": ("vllm", "sglang"),
}

Stage = Literal["dry run", "fresh", "interrupted", "written"]


@dataclass(frozen=True, slots=True)
class Result:
    """What was made: the plan, the audit of what was written, and what it cost.

    `input_scales` is None where no module stores one, after a dry run, and where a finished folder
    was only verified.
    """

    out: Path
    plan: Plan
    audit: Audit | None  # None after a dry run
    search: Search
    seconds: float
    audit_seconds: float
    cpu_seconds: float
    audit_cpu_seconds: float
    kernels: str
    threads: int
    input_scales: InputScales | None = None
    measure_seconds: float = 0.0  # before `seconds` begin; 0 where a resumed run had its scales
    findings: tuple[Finding, ...] = ()  # what the rules of `nybble check` say of the result
    calibration: Report | None = None  # what the finished folder says of it
    planned_bytes: int = 0  # memory that the calibration said it would take
    peak_bytes: int = 0  # the largest resident set, mapped files included
    kv_scales: tuple[Mapping[str, object], ...] = ()  # a row a layer; layer -1 is the MTP head's
    was_finished: bool = False  # an earlier run had written all: it was verified, and no more

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.quantize/1`."""
        checked = self.audit
        return {
            "schema": "nybble.quantize/1",
            "out": str(self.out),
            "dry_run": checked is None,
            "recipe": self.plan.recipe.name,
            "layout": self.plan.layout.name,
            "search": None if self.was_finished else self.search,
            "was_finished": self.was_finished,
            **asdict(totals(self.plan)),
            "notes": list(self.plan.notes),
            "input_scales": _scales_json(self.input_scales),
            "kv_scales": [dict(row) for row in self.kv_scales],
            "calibration": self._calibration_json(),
            "measure_seconds": self.measure_seconds,
            "seconds": self.seconds,
            "audit_seconds": self.audit_seconds,
            "cpu_seconds": self.cpu_seconds,
            "audit_cpu_seconds": self.audit_cpu_seconds,
            "kernels": self.kernels,
            "threads": self.threads,
            "findings": [finding_json(f) for f in self.findings],
            "audit": checked
            and {
                "tensors": checked.tensors,
                "bytes": checked.payload_bytes,
                "copied_identical": checked.copied,
                "copied_by_role": checked.copied_by_role,
                "input_scales": checked.input_scales,
                "sqnr_db": checked.sqnr_db,
                "by_role": [
                    {
                        "role": e.role,
                        "scheme": e.scheme,
                        "modules": e.modules,
                        "sqnr_db": e.sqnr_db,
                        "worst_db": e.worst_db,
                        "worst_module": e.worst_module,
                    }
                    for e in checked.errors
                ],
            },
        }

    def _calibration_json(self) -> dict[str, object] | None:
        """The report without its row for each linear, which is in OUT/report.json."""
        if self.calibration is None:
            return None
        whole = self.calibration.as_json()
        cost = {"planned_bytes": self.planned_bytes, "peak_bytes": self.peak_bytes}
        return {key: value for key, value in whole.items() if key != "linears"} | cost


def _scales_json(scales: InputScales | None) -> dict[str, object] | None:
    if scales is None:
        return None
    return {
        "modules": len(scales.values),
        "smallest": min(scales.values.values()),
        "largest": max(scales.values.values()),
        "headroom": scales.headroom,
        "tokens": scales.tokens,
        "calibration": scales.calibration,
        "fallbacks": len(scales.fallbacks),
        "fallbacks_by_layer": scales.fallbacks_by_layer,
        "sha256": scales.sha256,
    }


def quantize(
    model: str | PathLike[str],
    out: str | PathLike[str],
    recipe: str | Recipe = "nvfp4",
    *,
    layout: str = "modelopt",
    search: Search = "mse",
    jobs: int | None = None,
    shard_size: int = SHARD_BYTES,
    dry_run: bool = False,
    resume: bool = False,
    generic: bool = False,
    data_free: bool = False,
    untie_head: bool = False,
    calibrate: str | PathLike[str] | None = None,
    effort: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    allow_mixed: bool = False,
    ray: str | None = None,
    calibration_text: str | PathLike[str] | None = None,
    calibration_tokens: int | None = None,
    headroom: float | None = None,
    kv_scales: bool = False,
    measure: Measure | None = None,
    rounder: Rounder | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    disk: Disk | None = None,
) -> Result:
    """Quantize a local checkpoint folder into a new folder `out`.

    A recipe with static input scales has them measured first: a forward pass of the source over
    `calibration_tokens` tokens (default CALIBRATION_TOKENS) of the file `calibration_text`
    (default: the project's own mixture), the largest magnitudes times `headroom` (default
    HEADROOM). `measure` replaces that pass. `data_free` measures nothing and makes the recipe's
    form without such scales. A resumed run goes on with the scales it began with. `untie_head`
    gives a tied model an output head of its own, in the recipe's format for `lm_head`; the
    embedding stays as it is.

    `calibrate` chooses the codes of NVFP4 linears by what passes through them: a preset ("default",
    "nvidia:FOLDER", "infatoshi") or a file, of which `samples` windows of `length` tokens are used;
    `effort` is "fast", "default" or "best". Input scales are measured on the same windows, then.
    Such a run can be resumed on a machine with other instructions or threads with `allow_mixed`
    only. It leaves report.json and report.txt in `out`. `ray` is the address of a Ray cluster that
    does tasks of the calibration, of `jobs` threads each, and gives the same bytes; with
    `allow_mixed` its machines may differ in what bytes depend on. `rounder` chooses codes in the
    place of the search; not with `calibrate`. `kv_scales` measures the scales of an FP8 KV cache
    and writes two a layer.

    `jobs` threads (default: all processors), shards of `shard_size` decimal bytes. With `dry_run`
    a calibration's text is read and its memory said, where no input scales have to be known for it;
    nothing is measured or written. `on_plan` is called before the work begins. The result is
    audited before this returns. Raises, before anything is written, MissingExtra where measuring
    needs a library that is not installed, and RecipeError for a recipe without the data-free form
    asked for, or calibration options where nothing is measured; CheckFailed if the audit or
    the rules of `nybble check` find an error; and what planning, measuring and writing raise.
    """
    progress = progress or Progress()
    threads = jobs or default_threads()
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if data_free:
        chosen = chosen.without_data()
    asked = input_measurement(calibration_text, calibration_tokens, headroom, measure, threads)
    request = calibration_request(
        calibrate,
        effort=effort,
        samples=samples,
        length=length,
        allow_mixed=allow_mixed,
        resume=resume,
        data_free=data_free,
        kv_scales=kv_scales,
        search=search,
        text=calibration_text,
        tokens=calibration_tokens,
        ray=ray,
    )
    if request is not None and rounder is not None:
        raise RecipeError(
            "calibrate and rounder both choose the codes; leave one out (a rounder brings its own "
            "choices, and calibration is one)"
        )
    target = Path(out)
    refuse_inside(Path(model), target)
    stage = _stage(target, dry_run=dry_run, resume=resume)
    options = Options(search, shard_size, threads, resume, allow_mixed)
    with open_source(
        model, headers_only=dry_run, generic=generic, untie_head=untie_head
    ) as checkpoint:
        made = make_plan(
            checkpoint, chosen, find_layout(layout), generic=generic, kv_scales=kv_scales
        )
        nothing_asked = input_measurement(None, None, None, measure, threads)
        if not (made.needs_data or kv_scales) and asked != nothing_asked:
            raise RecipeError(
                f"recipe {chosen.name}{' without data' if data_free else ''} stores no input scale "
                "here, so a calibration text, its tokens and a headroom have no effect; leave them "
                "out"
            )
        if request is not None:
            refuse_nothing_to_calibrate(made)
        must_measure = (made.needs_data or kv_scales) and stage == "fresh"
        if must_measure and measure is None and request is None:
            refuse_missing(made)
        if stage == "written":
            _refuse_finished(made, target, request, has_rounder=rounder is not None)
        if on_plan is not None:
            on_plan(made)
        if request is not None and stage == "dry run":
            request.rehearse(made, target, threads=threads, progress=progress)
        clocks = [_clocks()]
        given = Prepared()
        must_run = stage in ("fresh", "interrupted")
        with workers_of(request if must_run else None, options) as workers:
            if must_run:
                given = prepare(made, target, options, asked, request, progress, disk, workers)
            scales, calibration = given.input_scales, given.calibration
            clocks.append(_clocks())
            if must_run:
                execute(
                    made,
                    target,
                    options,
                    version=nybble.__version__,
                    progress=progress,
                    input_scales=scales,
                    disk=disk,
                    rounder=calibration or rounder,
                    kv_scales=given.kv_scales,
                )
        clocks.append(_clocks())
        checked = None
        findings: tuple[Finding, ...] = ()
        if stage != "dry run":
            values = scales.values if scales else None
            checked = audit(made, target, threads=threads, progress=progress, input_scales=values)
            findings = _self_check(target, Path(model), made.layout.name)
        clocks.append(_clocks())
    wall, cpu = (np.diff([clock[i] for clock in clocks]).tolist() for i in (0, 1))
    return Result(
        target,
        made,
        checked,
        search,
        seconds=wall[1],
        audit_seconds=wall[2],
        cpu_seconds=cpu[1],
        audit_cpu_seconds=cpu[2],
        kernels=str(choose()),
        threads=threads,
        input_scales=scales,
        measure_seconds=wall[0] if must_measure else 0.0,
        findings=findings,
        calibration=None if stage == "dry run" else read_report(target),
        planned_bytes=calibration.footprint.private_bytes if calibration else 0,
        peak_bytes=peak_bytes(),
        kv_scales=given.kv_rows,
        was_finished=stage == "written",
    )


def _self_check(out: Path, model: Path, layout: str) -> tuple[Finding, ...]:
    """The rules that hold for anybody's checkpoint, for ours too; and what each engine that the
    layout is made for would stumble over.

    Raises CheckFailed for an error that the source does not have: what goes over byte for byte is
    as good as it was.
    """
    survey = Survey.open(out, model)
    findings = run_rules(survey).findings
    wrong = [f for f in findings if f.severity == Severity.ERROR]
    if wrong and survey.source is not None:
        before: dict[str, set[str]] = {}
        for f in run_rules(survey.source).findings:
            before.setdefault(f.rule.id, set()).update((f.file, *f.subjects))
        wrong = [
            f for f in wrong if f.rule.id not in before or not before[f.rule.id] >= set(f.subjects)
        ]
    if wrong:
        raise CheckFailed(
            f"{out}: written as planned, but `nybble check` finds {len(wrong)} errors: "
            f"{'; '.join(f'{f.rule.id} {f.message}' for f in wrong[:3])}. If the source is sound, "
            "please report it"
        )
    for engine in MADE_FOR[layout]:
        aimed = survey.aimed_at(Target(engine))
        found = run_rules(aimed, select_rules(["NB6"])).findings
        findings += [f for f in found if f.severity > Severity.NOTE and f.engine == engine]
    findings.sort(key=lambda f: (-f.severity, f.rule.id))
    return tuple(findings)


def _refuse_finished(plan: Plan, out: Path, request: Request | None, *, has_rounder: bool) -> None:
    """Raise CheckpointError for a finished folder that is not what is asked for, as far as can be
    told.

    What it does not tell, such as the search of its scales, is not claimed of it either.
    """
    planned = {s.name: (s.dtype, s.shape) for s in plan.outputs}
    with Checkpoint.open(out) as written:
        held = {t.name: (t.dtype, t.shape) for t in written.tensors.values()}
    report = read_report(out)
    names = sorted(n for n in planned.keys() | held.keys() if planned.get(n) != held.get(n))
    differs = ""
    if names:
        one = names[0]
        how = [
            f"{dtype} {list(shape)}" if dtype else "nothing"
            for dtype, shape in (planned.get(one, ("", ())), held.get(one, ("", ())))
        ]
        differs = f"{len(names):,} tensors, the first {one}: expected {how[0]}, found {how[1]}"
    elif (request is None) != (report is None) and not has_rounder:
        differs = "without calibration" if report is None else f"calibrated, effort {report.effort}"
    elif request is not None and report is not None and request.effort != report.effort:
        differs = f"calibrated with effort {report.effort}, not {request.effort}"
    if differs:
        raise CheckpointError(
            f"{out}: is finished, and made otherwise than is asked for now ({differs}): with other "
            "options or of another source. Nothing was changed; give the options that it was made "
            "with to verify it, or name another output"
        )


def _stage(target: Path, *, dry_run: bool, resume: bool) -> Stage:
    if dry_run:
        return "dry run"
    if resume and (partial_folder(target) / JOURNAL).exists():
        return "interrupted"
    # A run that was interrupted while it verified has nothing left to do but that.
    if resume and target.is_dir() and not partial_folder(target).exists():
        return "written"
    return "fresh"


def _clocks() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()
