"""`nybble repair`: what check found and can be mended without quantizing again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import nybble
from nybble.api.check import Checked, check, open_files, refuse_nothing
from nybble.check.engines import find_engine
from nybble.check.run import run_rules
from nybble.check.survey import Survey, Target
from nybble.checkpoint.files import LocalFiles
from nybble.checkpoint.writer import SHARD_BYTES, refuse_inside
from nybble.errors import CheckpointError
from nybble.progress import Progress
from nybble.rewrite.draft import Change
from nybble.rewrite.repair import plan_repair, plan_undo, write_repair, write_undo


@dataclass
class Repaired:
    """What was changed, what was not mended and why, and what check says of the result.

    `unmended` are (rule, severity, message, reason). `after` is None for a dry run, and if there
    was nothing to do.
    """

    path: str
    out: Path
    changes: list[Change]
    unmended: list[tuple[str, str, str, str]] = field(default_factory=list)
    not_kept: list[str] = field(default_factory=list)  # files left out, not in nybble_repair/
    after: Checked | None = None

    @property
    def has_errors(self) -> bool:
        """Whether the result, or what there was nothing to do about, still has errors."""
        if self.after is not None:
            return self.after.has_errors
        return not self.changes and any(severity == "error" for _, severity, _, _ in self.unmended)

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.repair/1`."""
        keys = ("rule", "severity", "message", "reason")
        return {
            "schema": "nybble.repair/1",
            "path": self.path,
            "out": str(self.out),
            "changes": [change.as_json() for change in self.changes],
            "unmended": [dict(zip(keys, row, strict=True)) for row in self.unmended],
            "not_kept": self.not_kept,
            "check": self.after.as_json() if self.after else None,
        }


def repair(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    source: str | PathLike[str] | None = None,
    only: Sequence[str] = (),
    engine: str = "",
    deep: bool = False,
    dry_run: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Repaired:
    """Write to OUT the checkpoint of PATH with its faults mended, and check it.

    Errors and warnings are mended, notes only if `only` names their rules. Nothing is quantized
    again. If there is nothing to change, nothing is written. Raises what check raises;
    CheckpointError for lost tensors that nothing brings back, and for an OUT that is not new.
    """
    progress = progress or Progress()
    refuse_inside(Path(path), Path(out))
    target = Target()
    if engine:
        found, version = find_engine(engine)
        target = Target(found.name, version)
    before = None if source is None else Survey(open_files(source))
    survey = Survey(_local(path), before, deep=deep, target=target)
    refuse_nothing(survey)
    findings = run_rules(survey).findings
    made = plan_repair(survey, findings, only=only, version=nybble.__version__)
    done = Repaired(
        str(path),
        Path(out),
        made.changes,
        [(f.rule.id, str(f.severity), f.message, reason) for f, reason in made.unmended],
        made.not_kept,
    )
    if made.changes and not dry_run:
        write_repair(made, Path(out), shard_bytes=shard_bytes, progress=progress)
        done.after = check(out, source=source, engine=engine, deep=deep)
        still = {f.rule.id for f in done.after.findings}
        done.unmended = [row for row in done.unmended if row[0] in still]
    return done


def undo(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Write to OUT the tensors and files that were there before a repair made PATH.

    Values, names and side files are those of the original byte for byte; shards may be divided
    otherwise. Returns the files that the repair left out and did not keep: orphan shards, pickles.
    Raises CheckpointError for a folder that no repair made.
    """
    refuse_inside(Path(path), Path(out))
    draft, not_kept = plan_undo(Survey(_local(path)), nybble.__version__)
    write_undo(draft, Path(out), shard_bytes=shard_bytes, progress=progress or Progress())
    return not_kept


def _local(path: str | PathLike[str]) -> LocalFiles:
    files = open_files(path)
    if not isinstance(files, LocalFiles):
        raise CheckpointError(f"{path}: repair works on local folders; download it first")
    return files


__all__ = ["Change", "Repaired", "repair", "undo"]
