"""Who does the tasks of a calibrated run: this process, or others that see the same files.

A task is pure data and its function gives the same bytes wherever it runs, as long as instruction
set, threads and torch are the same: `Conditions` are what workers are asked for. Knows nothing of a
cluster's software (`scale_out_ray.py`).
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, EngineError
from nybble.kernels.dispatch import choose

T = TypeVar("T")
R = TypeVar("R")

#: A file that a worker has to see where the run has put it.
_SIGN = "seen-by-workers"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the bytes of a result may depend on besides its task."""

    nybble: str
    kernels: str
    torch: str
    torch_isa: str

    @classmethod
    def here(cls) -> Conditions:
        """Those of this process."""
        return cls(
            # Of the package that runs here. The statement `import nybble` would say that this room
            # knows those above it: the package lists the names of all.
            str(import_module("nybble").__version__),
            str(choose()),
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
        )

    def differences(self, other: Conditions) -> str:
        """What the other has different, as people read it; empty where nothing is."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {theirs[name]!r} instead of {mine[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        )


class Workers(Protocol):
    """Other processes that do tasks."""

    is_mixed: bool
    """Whether some of them have other conditions than the run itself; known after `examine`."""

    @property
    def at_once(self) -> int:
        """How many tasks they can do at the same time, as far as is known."""
        ...

    def map(self, run: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Begin `run` of each task, and give the results in the order of the tasks.

        `run` is a function of a module. A worker that dies costs its task alone, which is begun
        again. Raises what `run` raises; EngineError where workers are lost for good.
        """
        ...

    def examine(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Refuse workers that cannot do this run's tasks: each has to see `folder` and the source,
        under their absolute paths. Raises EngineError, naming the machine."""
        ...

    def reserve(self, task_bytes: int) -> None:
        """Say what a task takes of memory, so that no machine is given too many."""
        ...


def tasks_under_way(at_once: int) -> int:
    """So many tasks keep workers busy that do so many at the same time, while the oldest result is
    waited for."""
    return at_once + max(1, at_once // 2)


@dataclass(frozen=True, slots=True)
class Examination:
    """Asked of a worker: does it see the file `sign`, and the checkpoint as the run sees it?"""

    sign: Path
    word: str
    checkpoint: Path
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Findings:
    """A worker's answer; `problem` is empty where it sees everything."""

    host: str
    conditions: Conditions
    problem: str


def examination(folder: Path, checkpoint: Checkpoint) -> Examination:
    """Put the sign into `folder`, which is made. Raises CheckpointError where it cannot be."""
    sign = folder.absolute() / _SIGN
    word = secrets.token_hex(8)
    try:
        sign.parent.mkdir(parents=True, exist_ok=True)
        sign.write_text(word, "utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{sign}: cannot be written: {error.strerror}; name an OUT that can"
        ) from error
    return Examination(sign, word, checkpoint.path.absolute(), checkpoint.fingerprint())


def remove_sign(asked: Examination) -> None:
    """The examination is over: nothing of it is left, the folder neither if it is empty."""
    asked.sign.unlink(missing_ok=True)
    if asked.sign.parent.is_dir() and not any(asked.sign.parent.iterdir()):
        asked.sign.parent.rmdir()


def examined(asked: Examination) -> Findings:
    """What this process sees, as a task."""
    return Findings(platform.node() or str(os.getpid()), Conditions.here(), _problem(asked))


def _problem(asked: Examination) -> str:
    try:
        word = asked.sign.read_text("utf-8")
    except OSError as error:
        return f"does not see {asked.sign} ({error.strerror})"
    if word != asked.word:
        return f"sees another {asked.sign.parent} under this name"
    try:
        with Checkpoint.open(asked.checkpoint) as checkpoint:
            found = checkpoint.fingerprint()
    except (CheckpointError, OSError) as error:
        return f"cannot open {asked.checkpoint} ({error})"
    if found != asked.fingerprint:
        return f"has other files, or the same at other times, in {asked.checkpoint}"
    return ""


def judge(found: Iterable[Findings], here: Conditions, *, allow_mixed: bool) -> bool:
    """Whether conditions are mixed. Raises EngineError for workers that cannot help, all of them
    named."""
    found = list(found)
    blind = [f"{f.host} {f.problem}" for f in found if f.problem]
    if blind:
        raise EngineError(
            f"{len(blind)} of {len(found)} machines of the cluster cannot do tasks of this run: "
            f"{'; '.join(blind)}. All need the source and OUT on a shared filesystem, under the "
            "same absolute paths"
        )
    others = [f"{f.host} has {d}" for f in found if (d := here.differences(f.conditions))]
    if others and not allow_mixed:
        raise EngineError(
            f"{'; '.join(others)}: the bytes of the result would depend on who does which task. "
            "Use machines of one kind with the same versions, force one instruction set "
            "everywhere (NYBBLE_ISA, ATEN_CPU_CAPABILITY), or add --allow-mixed"
        )
    return bool(others)
