"""One task of a calibrated run's forward: a shard of the calibration tokens through one layer.

Pure data, as `dense_tasks.py`: `run_task` reads hidden states from the stream's file, computes the
layer, and leaves what it noted in files of its own, which no other attempt at the task shares. Only
the run itself writes hidden states, in the order of the shards, so a worker that dies leaves
nothing half done.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from nybble.calibrate.agreement import Choices
from nybble.calibrate.measuring import Measured
from nybble.calibrate.statistics import Statistics
from nybble.calibrate.task_files import Mapped, append
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError
from nybble.formats.element import F32Array
from nybble.formats.scheme import Activation
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.loader import Held
from nybble.models.model import Model
from nybble.stream.shards import Shard, ShardForward

#: What is noted while a layer runs: moments of inputs, where tokens are sent, or nothing.
Notes = Statistics | Choices | None


def noting(notes: Notes, compute: Compute, *, simulate: bool) -> Mode:
    """How a layer runs while notes are taken."""
    return Mode(compute, None if notes is None else Measured(notes, compute.threads), simulate)


def ahead(notes: Notes, *, is_guard: bool) -> Callable[[Tensor], None] | None:
    """What is told to statistics ahead of each batch: whether it judges, what enters the layer."""
    if not isinstance(notes, Statistics):
        return None
    return lambda rows: notes.begin(is_guard=is_guard, hidden=rows)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Weights that stand in the place of the checkpoint's: their arrays in a safetensors file, by
    the number of the module."""

    path: Path
    modules: tuple[tuple[str, BlockScaledTensor, Activation | None, float | None], ...]

    def read(self) -> dict[str, Held]:
        """The weights by module, in memory of their own. Raises CheckpointError for a file that is
        gone or damaged."""
        try:
            arrays = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read: {error}; all who do tasks must see the same files"
            ) from error
        found = {}
        for i, (module, bare, activation, scale) in enumerate(self.modules):
            top: F32Array | None = arrays.get(f"{i}.tensor_scale")
            tensor = BlockScaledTensor(
                bare.format, bare.shape, arrays[f"{i}.codes"], arrays[f"{i}.scale"], top
            )
            found[module] = Held(tensor, activation, scale)
        return found


def store_weights(held: Mapping[str, Held], path: Path) -> StoredWeights:
    """Put weights into a new file. Raises CheckpointError where it cannot be written."""
    arrays: dict[str, NDArray[Any]] = {}
    modules = []
    nothing = np.empty(0, np.uint8)
    for i, (module, one) in enumerate(held.items()):
        weight = one.weight
        arrays[f"{i}.codes"] = np.ascontiguousarray(weight.codes)
        arrays[f"{i}.scale"] = np.ascontiguousarray(weight.scale)
        if weight.tensor_scale is not None:
            arrays[f"{i}.tensor_scale"] = weight.tensor_scale
        bare = BlockScaledTensor(weight.format, weight.shape, nothing, nothing, None)
        modules.append((module, bare, one.activation, one.input_scale))
    try:
        save_file(arrays, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot hold the weights of a layer for workers: {error}; free space there"
        ) from error
    return StoredWeights(path, tuple(modules))


@dataclass(frozen=True, slots=True)
class StoredStatistics:
    """Statistics whose matrices are in files: `sums` of fit and guard in their order, then `kept`,
    a file for each key of `bare.kept`."""

    bare: Statistics
    sums: tuple[Mapped, ...]
    kept: tuple[Mapped, ...]

    def read(self) -> Statistics:
        """The statistics, in memory of their own."""
        found = self.bare
        moments = [*found.fit.values(), *found.guard.values()]
        for one, file in zip(moments, self.sums, strict=True):
            one.sum = file.read()
        for modules, file in zip(found.kept, self.kept, strict=True):
            found.kept[modules] = [file.read()]
        return found


def store_statistics(found: Statistics, folder: Path) -> StoredStatistics:
    """Put the matrices into files; nothing but those has them any more."""
    sums, kept = [], []
    for i, one in enumerate([*found.fit.values(), *found.guard.values()]):
        sums.append(_stored(one.sum, folder / f"sum-{i}"))
        one.sum = torch.empty(0, 0)
    for i, (modules, parts) in enumerate(found.kept.items()):
        for rows in parts:
            append(folder / f"kept-{i}", rows)
        shape = sum(len(rows) for rows in parts), parts[0].shape[1]
        kept.append(Mapped(folder / f"kept-{i}", shape))
        found.kept[modules] = []
    return StoredStatistics(found, tuple(sums), tuple(kept))


@dataclass(frozen=True, slots=True)
class ShardTask:
    """`shard` through layer `layer` of a checkpoint, with the weights `held` in place of its own.

    `hidden` are all hidden states that go into the layer. `notes` says what is noted: by the empty
    statistics given, where tokens go, or nothing; the rows of the shard judge (`is_guard`) or fit.
    Hidden states behind the layer are left where it `keeps` them. Results go below `folder`.
    """

    checkpoint: Path
    layer: int
    shard: Shard
    hidden: Mapped
    notes: Statistics | Literal["choices"] | None
    is_guard: bool
    keeps: bool
    held: StoredWeights | None
    simulate: bool
    compute: Compute
    folder: Path


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a task leaves: hidden states behind the layer, statistics, the experts chosen."""

    rows: Mapped | None
    statistics: StoredStatistics | None
    chosen: Tensor | None


def run_task(task: ShardTask) -> ShardResult:
    """Compute a task. Raises EngineError for NaN, naming the place, CheckpointError where results
    cannot be written."""
    folder = task.folder / secrets.token_hex(8)
    with Checkpoint.open(task.checkpoint) as checkpoint:
        model = Model(checkpoint)
        if task.held is not None:
            for module, held in task.held.read().items():
                model.weights.hold(module, held)
        layer = model.weights.layer(task.layer)
        notes = task.notes
        observer: Notes
        if notes == "choices":
            assert layer.mixture is not None, "a layer without experts has no choices"
            observer = Choices(layer.mixture, Mode(task.compute))
        else:
            observer = notes and notes.empty()  # the task itself stays as it is
        hidden = task.hidden.open()
        passing = ShardForward(model, task.shard).through(
            task.layer,
            layer,
            noting(observer, task.compute, simulate=task.simulate),
            lambda start, stop: torch.from_numpy(np.array(hidden[start:stop])),
            ahead(observer, is_guard=task.is_guard),
        )
        for _, rows in passing:
            if task.keeps:
                append(folder / "rows", rows)
    kept = Mapped(folder / "rows", (task.shard.rows, task.hidden.shape[1])) if task.keeps else None
    statistics = store_statistics(observer, folder) if isinstance(observer, Statistics) else None
    chosen = observer.chosen if isinstance(observer, Choices) else None
    return ShardResult(kept, statistics, chosen)


def _stored(matrix: Tensor, path: Path) -> Mapped:
    append(path, matrix)
    return Mapped(path, (len(matrix), matrix.shape[1]))
