"""What a finished stage has to tell the report, kept in a file until the run is over.

A resumed run does not measure again what was written before; its report says it all the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nybble.calibrate.agreement import Agreement
from nybble.calibrate.rounding import Choice
from nybble.errors import CheckpointError
from nybble.plan.jobs import Job


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job, and how its codes were chosen."""

    name: str
    role: str
    scheme: str
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    choice: Choice

    @classmethod
    def of(cls, job: Job, choice: Choice) -> JobRecord:
        """The record of a plan's job."""
        members = job.members
        modules, shapes = tuple(m.module for m in members), tuple(m.shape for m in members)
        return cls(job.name, job.role, job.scheme.name, modules, shapes, choice)


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage: its jobs in the order of the plan, whether its router still agrees with the
    teacher's, and for each input measured the largest token energy over the median."""

    number: int
    title: str
    jobs: tuple[JobRecord, ...] = ()
    agreement: Agreement | None = None
    peaks: Mapping[str, float] = field(default_factory=dict)


def save(record: StageRecord, folder: Path) -> None:
    """Put it in its file; returns when it is on the disk."""
    path = _path(folder, record.number)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}; run again with --resume"
        ) from error


def load(folder: Path, number: int) -> StageRecord:
    """A stage that an interrupted run finished. Raises CheckpointError if its file is gone."""
    path = _path(folder, number)
    try:
        return _read(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the record of a stage that the interrupted run finished cannot be read "
            f"({error}); remove {folder} and the unfinished output, and start again"
        ) from error


def remove_all(folder: Path) -> None:
    """Delete the files of all stages."""
    for path in folder.glob("stage-*.json*"):
        path.unlink()


def _path(folder: Path, number: int) -> Path:
    return folder / f"stage-{number:05d}.json"


def _read(found: dict[str, object]) -> StageRecord:
    jobs, agreed, peaks = found["jobs"], found["agreement"], found["peaks"]
    assert isinstance(jobs, list)
    assert isinstance(peaks, dict)
    return StageRecord(
        int(str(found["number"])),
        str(found["title"]),
        tuple(_job(job) for job in jobs),
        Agreement(**agreed) if isinstance(agreed, dict) else None,
        peaks,
    )


def _job(found: dict[str, object]) -> JobRecord:
    modules, shapes, choice = found["modules"], found["shapes"], found["choice"]
    assert isinstance(modules, list)
    assert isinstance(shapes, list)
    assert isinstance(choice, dict)
    return JobRecord(
        str(found["name"]),
        str(found["role"]),
        str(found["scheme"]),
        tuple(modules),
        tuple(tuple(shape) for shape in shapes),
        Choice(**choice),
    )
