"""Workers of a Ray cluster. Ray is imported where a connection is made, and nowhere else.

Each task holds as many of a machine's processors as it has threads. Ray begins a task again whose
worker or machine died; what a task made comes back as bytes of its own, so nothing stays in Ray's
object store.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from nybble.calibrate.scale_out import (
    Conditions,
    Examination,
    Findings,
    R,
    T,
    examination,
    examined,
    judge,
    remove_sign,
)
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EngineError, MissingExtra, NybbleError, RecipeError
from nybble.kernels.dispatch import default_threads

log = logging.getLogger("nybble")

#: Times that a task is begun again after its worker died, before the run gives up.
RETRIES = 3
#: How long machines have for their first answer: they import torch, and may compile the kernels.
EXAMINATION_S = 300
#: How long a cluster's address has to answer at all.
CONNECT_S = 5

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")


def validated(address: str) -> str:
    """An address as `--ray` takes it: "local", "auto" or HOST:PORT. Raises RecipeError else."""
    if address in ("local", "auto"):
        return address
    host, _, port = address.rpartition(":")
    if _HOST.fullmatch(host) and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 1 << 16:
        return address
    raise RecipeError(
        f"--ray {address!r}: write HOST:PORT of the cluster's head (what `ray start --head` says), "
        "auto for the cluster that this machine belongs to, or local for workers on this machine "
        "alone; Ray's client addresses (ray://) are not taken, start nybble on a machine of the "
        "cluster"
    )


def connected(address: str, threads: int, *, allow_mixed: bool = False) -> RayWorkers:
    """Workers of the cluster at `address`, each with `threads` threads; to be closed.

    A connection that this process has already is used, and left open. Raises RecipeError for an
    address that is none, MissingExtra without Ray, EngineError for a cluster that cannot be reached
    or has no machine with so many processors.
    """
    address = validated(address)
    if find_spec("ray") is None:
        raise MissingExtra("--ray needs ray: pip install 'nybble[ray]', or leave --ray out")
    ray = import_module("ray")
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, address)
    workers = RayWorkers(ray, threads, allow_mixed=allow_mixed, is_ours=is_ours)
    try:
        workers.refuse_too_small()
    except BaseException:
        workers.close()
        raise
    return workers


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it would call home
            ray.init("local", num_cpus=default_threads(), include_dashboard=False, **quiet)
            return
        if address != "auto":
            host, _, port = address.rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S):
                pass  # Ray itself would try for a minute
        ray.init(address, **quiet)
    except Exception as error:  # Ray raises its own, the library's, and bare Exceptions
        raise EngineError(
            f"--ray {address}: there is no Ray cluster that this machine can join ({error}); "
            "`ray start --head` makes one, `ray start --address HOST:PORT` adds a machine, with "
            "the same versions of Python and Ray"
        ) from error


class RayWorkers:
    """`scale_out.Workers` of a connection to a cluster."""

    def __init__(
        self,
        ray: Any,
        threads: int,
        *,
        allow_mixed: bool = False,
        is_ours: bool = False,
        retries: int = RETRIES,
    ) -> None:
        self.ray, self.threads, self.retries = ray, threads, retries
        self.allow_mixed, self.is_ours = allow_mixed, is_ours
        self.conditions = Conditions.here()
        self.is_mixed = False
        self._task_bytes = 0
        self._pending: set[Any] = set()
        self._remote = ray.remote(_done)

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def map(self, run: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """See Workers."""
        expected = None if self.allow_mixed else self.conditions
        begun = [self._begin(run, task, expected) for task in tasks]
        return self._results(begun, getattr(run, "__module__", "task"))

    def _begin(
        self, run: Callable[[T], R], task: T, expected: Conditions | None, **options: Any
    ) -> Any:
        if self._task_bytes:
            options["memory"] = self._task_bytes
        begun = self._remote.options(
            num_cpus=self.threads,
            max_retries=self.retries,
            retry_exceptions=False,  # of ours: they would be raised again
            name=f"nybble {getattr(run, '__module__', '')}",
            **options,
        ).remote(expected, run, task)
        self._pending.add(begun)
        return begun

    def _results(self, begun: list[Any], name: str) -> Iterator[Any]:
        begun.reverse()
        while begun:
            reference = begun.pop()  # nothing of ours keeps a result that was taken
            yield self._result(reference, name)

    def _result(self, reference: Any, name: str) -> Any:
        try:
            made, raised = pickle.loads(self.ray.get(reference))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, NybbleError) else error from None
        except self.ray.exceptions.RayError as error:
            raise EngineError(
                f"the cluster lost a task of {name} {self.retries + 1} times, or cannot be reached "
                f"any more ({type(error).__name__}: {str(error).strip().splitlines()[0]}); see to "
                "its machines and their memory, then go on with --resume"
            ) from error
        finally:
            self._pending.discard(reference)
        if raised is not None:
            raise raised
        return made

    def examine(self, folder: Path, checkpoint: Checkpoint) -> None:
        """See Workers: one question to each machine that can take a task."""
        asked = examination(folder, checkpoint)
        try:
            found = [self._answer(*begun) for begun in self._asked(asked)]
        finally:
            remove_sign(asked)
        self.is_mixed = judge(found, self.conditions, allow_mixed=self.allow_mixed)
        log.info("ray: %d machines, %d threads a task", len(found), self.threads)

    def _asked(self, asked: Examination) -> list[tuple[str, Any]]:
        strategies = import_module("ray.util.scheduling_strategies")
        return [
            (
                f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
                self._begin(
                    examined,
                    asked,
                    None,
                    scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(
                        node["NodeID"], soft=False
                    ),
                ),
            )
            for node in self._machines()
        ]

    def _answer(self, name: str, reference: Any) -> Findings:
        ready, _ = self.ray.wait([reference], timeout=EXAMINATION_S)
        if not ready:
            raise EngineError(
                f"{name}: did not begin a task for {EXAMINATION_S} s; the cluster is busy with "
                "other work, or a worker does not start there (see Ray's logs)"
            )
        found = self._result(reference, "the examination of workers")
        assert isinstance(found, Findings)
        return found

    def refuse_too_small(self) -> None:
        """Raise EngineError where no machine could ever begin a task."""
        if not self._machines():
            raise EngineError(
                f"no machine of the cluster has {self.threads} processors for a task's "
                f"{self.threads} threads; name fewer with --jobs"
            )

    @property
    def at_once(self) -> int:
        """See Workers: by processors; memory may allow fewer."""
        return sum(int(n["Resources"]["CPU"]) // self.threads for n in self._machines())

    def _machines(self) -> list[dict[str, Any]]:
        return [
            node
            for node in self.ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= self.threads
        ]

    def reserve(self, task_bytes: int) -> None:
        """See Workers. Raises EngineError where no machine has as much."""
        most = max((node["Resources"].get("memory", 0) for node in self._machines()), default=0)
        if task_bytes > most:
            raise EngineError(
                f"a task takes {task_bytes / 2**30:.2f} GiB, and no machine of the cluster gives "
                f"Ray more than {most / 2**30:.2f} GiB; use fewer or shorter samples, or machines "
                "with more (`ray start --memory`)"
            )
        self._task_bytes = task_bytes

    def close(self) -> None:
        """Give up what is under way, and the connection where it is ours."""
        for reference in self._pending:
            self.ray.cancel(reference, force=True)
        self._pending.clear()
        if self.is_ours:
            self.ray.shutdown()


def _done(expected: Conditions | None, run: Callable[[Any], Any], task: Any) -> bytes:
    """A task on a worker: what it made and None, or None and the error that it raised."""
    try:
        if expected is not None and (different := expected.differences(Conditions.here())):
            raise EngineError(
                f"{socket.gethostname()} has {different}: it joined the cluster after the run had "
                "begun; take it away, or add --allow-mixed"
            )
        return pickle.dumps((run(task), None), protocol=5)
    except NybbleError as error:
        return pickle.dumps((None, error), protocol=5)
