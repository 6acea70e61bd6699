"""`nybble quantize`: a checkpoint folder becomes a quantized one, and is opened again to prove
it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import nybble
from nybble.api.plan import find_layout, totals
from nybble.check.audit import Audit, audit
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import SHARD_BYTES, partial_folder
from nybble.errors import CheckpointError
from nybble.formats.search import Search
from nybble.kernels.dispatch import choose, default_threads
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import Recipe, load_recipe
from nybble.progress import Progress
from nybble.quantize.run import Options, execute


@dataclass(frozen=True, slots=True)
class Result:
    """What was made: the plan, the audit of what was written, and what it cost."""

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

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.quantize/1`."""
        checked = self.audit
        return {
            "schema": "nybble.quantize/1",
            "out": str(self.out),
            "dry_run": checked is None,
            "recipe": self.plan.recipe.name,
            "layout": self.plan.layout.name,
            "search": self.search,
            **asdict(totals(self.plan)),
            "notes": list(self.plan.notes),
            "seconds": self.seconds,
            "audit_seconds": self.audit_seconds,
            "cpu_seconds": self.cpu_seconds,
            "audit_cpu_seconds": self.audit_cpu_seconds,
            "kernels": self.kernels,
            "threads": self.threads,
            "audit": checked
            and {
                "tensors": checked.tensors,
                "bytes": checked.payload_bytes,
                "copied_identical": checked.copied,
                "copied_by_role": checked.copied_by_role,
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
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    disk: Disk | None = None,
) -> Result:
    """Quantize a local checkpoint folder into a new folder `out`, without calibration data.

    `jobs` threads (default: all processors), shards of `shard_size` decimal bytes. With `dry_run`
    nothing is written. `on_plan` is called before the work begins. The result is audited before
    this returns. Raises RecipeError for a recipe without a data-free form, CheckFailed if the audit
    finds anything, and what planning and writing raise.
    """
    progress = progress or Progress()
    threads = jobs or default_threads()
    chosen = (load_recipe(recipe) if isinstance(recipe, str) else recipe).without_data()
    target = Path(out)
    _refuse_inside(Path(model), target)
    with Checkpoint.open(Path(model), headers_only=dry_run) as checkpoint:
        made = make_plan(checkpoint, chosen, find_layout(layout), generic=generic)
        if on_plan is not None:
            on_plan(made)
        began = written = ended = _clocks()
        checked = None
        if not dry_run:
            options = Options(search, shard_size, threads, resume)
            # A run that was interrupted while it verified has nothing left to do but that.
            if not (resume and target.is_dir() and not partial_folder(target).exists()):
                execute(
                    made, target, options, version=nybble.__version__, progress=progress, disk=disk
                )
            written = _clocks()
            checked = audit(made, target, threads=threads, progress=progress)
            ended = _clocks()
        return Result(
            target,
            made,
            checked,
            search,
            seconds=written[0] - began[0],
            audit_seconds=ended[0] - written[0],
            cpu_seconds=written[1] - began[1],
            audit_cpu_seconds=ended[1] - written[1],
            kernels=str(choose()),
            threads=threads,
        )


def _clocks() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def _refuse_inside(model: Path, out: Path) -> None:
    """The source's side files are copied, those of subfolders too: the output would copy itself."""
    if model.resolve() in out.resolve().parents:
        raise CheckpointError(
            f"{out}: lies inside the source folder {model}; name a folder outside of it"
        )
