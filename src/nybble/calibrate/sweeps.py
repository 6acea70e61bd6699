"""All calibration tokens through one layer, shard after shard: here, or by workers.

Where a shard is computed changes no bit: what is noted of each is noted apart, and added in the
order of the shards.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nybble.calibrate.agreement import Choices
from nybble.calibrate.scale_out import Workers, tasks_under_way
from nybble.calibrate.shard_tasks import (
    Notes,
    ShardResult,
    ShardTask,
    StoredWeights,
    ahead,
    noting,
    run_task,
    store_weights,
)
from nybble.calibrate.statistics import Statistics
from nybble.calibrate.task_files import Mapped, scratch_folder
from nybble.kernels.compute import Compute
from nybble.models.layer import Layer
from nybble.models.loader import Held
from nybble.stream.executor import Stream
from nybble.stream.shards import Shard


@dataclass(frozen=True, slots=True)
class Sweep:
    """`stream` through layer `number`, the next one; `layer` is made with the weights `held` in
    place of the checkpoint's. Windows from `first_guard` on judge."""

    stream: Stream
    number: int
    layer: Layer
    first_guard: int
    compute: Compute
    simulate: bool = False
    held: Mapping[str, Held] | None = None

    def here(self, notes: Notes, *, keeps: bool) -> None:
        """Compute in this process. What was seen is added to `notes`; hidden states behind the
        layer are kept where it `keeps` them."""
        for number, shard in enumerate(self.stream.shards):
            own = notes.empty() if isinstance(notes, Statistics) else notes
            mode = noting(own, self.compute, simulate=self.simulate)
            before = ahead(own, is_guard=self._judges(shard))
            for start, rows in self.stream.through(number, self.number, self.layer, mode, before):
                if keeps:
                    self.stream.write(start, rows)
            if isinstance(notes, Statistics) and isinstance(own, Statistics):
                notes.merge(own)
        if keeps:
            self.stream.complete(self.number)

    def by(self, workers: Workers, notes: Notes, *, keeps: bool, folder: Path) -> None:
        """The same by workers, which see `folder` and take from it what they need; it is left as it
        was."""
        with scratch_folder(folder, "shards") as scratch:
            # A name that no layer had before: what a machine remembers of a file is another's.
            file = scratch / f"held-{secrets.token_hex(8)}"
            held = store_weights(self.held, file) if self.held else None
            for shards in self._together(notes):
                tasks = (self._task(s, notes, held, scratch, keeps=keeps) for s in shards)
                for shard, found in zip(shards, _few_at_once(workers, tasks), strict=True):
                    self._take(shard, found, notes)
        if keeps:
            self.stream.complete(self.number)

    def _judges(self, shard: Shard) -> bool:
        return shard.first >= self.first_guard

    def _together(self, notes: Notes) -> Iterator[list[Shard]]:
        """Shards that may be under way at the same time: what judges is measured by the means of
        what fits, so it waits for them."""
        shards = self.stream.shards
        if not isinstance(notes, Statistics):
            yield list(shards)
            return
        for judges in (False, True):
            if found := [s for s in shards if self._judges(s) is judges]:
                yield found

    def _task(
        self, shard: Shard, notes: Notes, held: StoredWeights | None, scratch: Path, *, keeps: bool
    ) -> ShardTask:
        model = self.stream.model
        return ShardTask(
            model.weights.checkpoint.path.absolute(),
            self.number,
            shard,
            Mapped(self.stream.file, (self.stream.plan.tokens, model.network.dims.hidden)),
            "choices" if isinstance(notes, Choices) else notes and notes.empty(),
            self._judges(shard),
            keeps,
            held,
            self.simulate,
            self.compute,
            scratch,
        )

    def _take(self, shard: Shard, found: ShardResult, notes: Notes) -> None:
        """Add a result; its files are not needed any more."""
        if found.rows is not None:
            self.stream.write(shard.start, found.rows.read())
            found.rows.path.unlink()
        if isinstance(notes, Statistics) and found.statistics is not None:
            notes.merge(found.statistics.read())
            for file in (*found.statistics.sums, *found.statistics.kept):
                file.path.unlink(missing_ok=True)
        if isinstance(notes, Choices) and found.chosen is not None:
            notes.add(found.chosen)
        self.stream.progress.advance(shard.rows, self.layer.name)


def _few_at_once(workers: Workers, tasks: Iterable[ShardTask]) -> Iterator[ShardResult]:
    """Results in the order of the tasks; no more are under way or waited for than keep the workers
    busy, for each leaves matrices on the disk."""
    under_way: deque[Iterator[ShardResult]] = deque()
    for task in tasks:
        if len(under_way) == tasks_under_way(workers.at_once):
            yield next(under_way.popleft())
        under_way.append(workers.map(run_task, [task]))
    while under_way:
        yield next(under_way.popleft())
