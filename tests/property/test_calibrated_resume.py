"""A calibrated run that is stopped anywhere goes on to the bytes of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nybble.calibrate.sequential as sequential_module
import nybble.quantize.run as run_module
import tiny
from calibrated_runs import ROPE, calibrate, plan_of, samples
from faulty_disk import FaultyDisk
from nybble.calibrate.rounding import EFFORTS, Effort
from nybble.calibrate.stage_rounding import StageRounding
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError
from nybble.stream.spill import OnDisk

#: Layers of both kinds, as small as they get.
CONFIG = tiny.config(
    "qwen3_5_moe",
    hidden_size=32,
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    rope_parameters=ROPE,
    vocab_size=67,
    num_attention_heads=2,
    linear_num_value_heads=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
QUICK = replace(EFFORTS["default"], dampings=(0.03,))
LENGTHS, GUARD = (30, 17, 40), frozenset({1})
#: A layer in the middle and the output head keep their weights, the MTP head does not.
GAPS = """
title = "with gaps"
[[rule]]
roles = ["routed_expert", "shared_expert", "attention", "linear_attention"]
modules = ["*.layers.0.*", "*.layers.2.*"]
scheme = "nvfp4-w4a16"
[[rule]]
roles = ["mtp"]
modules = ["*mtp.layers.*"]
scheme = "nvfp4-w4a16"
"""


class Stopped(BaseException):
    """The process is gone."""


class Stopper:
    """Stops the run at its event number `at`; what is done at an event may be half done."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.events = at, 0

    def wrap(self, function: Callable[..., Any], half: Callable[..., Any] | None = None) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.events += 1
            if self.events == self.at:
                if half is not None:
                    half(*args, **options)
                raise Stopped
            return function(*args, **options)

        return wrapped


def half_written(hidden: OnDisk, start: int, rows: Any) -> None:
    OnDisk_write(hidden, start, rows[: len(rows) // 2])


OnDisk_write = OnDisk.write


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(run_module, "COMMIT_BYTES", 25_000)
    shm = Path("/dev/shm")  # thousands of flushes: a memory disk where there is one
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as path:
        tiny.write(Path(path) / "m", CONFIG, tiny.tensors(CONFIG))
        (Path(path) / "gaps.toml").write_text(GAPS)
        yield Path(path)


def run(
    folder: Path,
    effort: Effort,
    disk: FaultyDisk | None = None,
    recipe: str = "nvfp4-all",
    **options: Any,
) -> None:
    with Checkpoint.open(folder / "m") as checkpoint:
        plan = plan_of(checkpoint, str(folder / recipe) if ".toml" in recipe else recipe)
        given = samples(67, LENGTHS, GUARD)
        calibrate(plan, folder / "out", given, effort, disk=disk, options=options)


def stopped(folder: Path, effort: Effort, stopper: Stopper, **options: Any) -> bool:
    """Run with every step that changes something outside of memory watched; whether it stopped."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(OnDisk, "write", stopper.wrap(OnDisk.write, half_written))
        changed.setattr(OnDisk, "complete", stopper.wrap(OnDisk.complete))
        changed.setattr(OnDisk, "rewind", stopper.wrap(OnDisk.rewind))
        changed.setattr(sequential_module, "save", stopper.wrap(sequential_module.save))
        changed.setattr(run_module.Run, "commit", stopper.wrap(run_module.Run.commit))
        changed.setattr(run_module.Run, "_give", stopper.wrap(run_module.Run._give))
        changed.setattr(StageRounding, "_dense", stopper.wrap(StageRounding._dense))
        try:
            run(folder, effort, **options)
        except Stopped:
            return True
    return False


def start_again(folder: Path) -> None:
    for name in ("out", "out.partial", "out.calibration"):
        shutil.rmtree(folder / name, ignore_errors=True)


def clean(folder: Path, effort: Effort, **options: Any) -> tuple[int, dict[str, bytes]]:
    stopper = Stopper()
    assert not stopped(folder, effort, stopper, **options)
    expected = tiny.tree(folder / "out")
    start_again(folder)
    return stopper.events, expected


def stop_everywhere(
    folder: Path, effort: Effort, step: int, first: int = 1, recipe: str = "nvfp4-all"
) -> None:
    events, expected = clean(folder, effort, recipe=recipe)
    assert events > 20
    for at in range(first, events + 1, step):
        assert stopped(folder, effort, Stopper(at), recipe=recipe), at
        assert not (folder / "out").exists(), at
        run(folder, effort, resume=(folder / "out.partial").exists(), recipe=recipe)
        assert tiny.tree(folder / "out") == expected, at
        assert not (folder / "out.calibration").exists(), at
        start_again(folder)


def test_stopped_anywhere_it_ends_with_the_same_bytes(folder: Path) -> None:
    stop_everywhere(folder, QUICK, 9)


def test_one_stream_too(folder: Path) -> None:
    stop_everywhere(folder, EFFORTS["fast"], 11, first=5)


def test_layers_without_jobs_and_the_mtp_head_too(folder: Path) -> None:
    stop_everywhere(folder, QUICK, 10, first=7, recipe="gaps.toml")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nvfp4-all", "gaps.toml"])
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_at_every_event(folder: Path, effort: str, recipe: str) -> None:
    chosen = QUICK if effort == "default" else EFFORTS["fast"]
    stop_everywhere(folder, chosen, 1, recipe=recipe)


def test_stopped_again_while_it_goes_on(folder: Path) -> None:
    events, expected = clean(folder, QUICK)
    assert stopped(folder, QUICK, Stopper(events * 2 // 3))
    for at in (2, 9, 5, 13):  # each falls a little further on, or back at the layer's beginning
        if not stopped(folder, QUICK, Stopper(at), resume=True):
            break
    else:
        run(folder, QUICK, resume=True)
    assert tiny.tree(folder / "out") == expected


@pytest.mark.parametrize("mode", ["enospc", "short", "cut_all"])
def test_a_disk_that_fails_is_gone_on_from(folder: Path, mode: str) -> None:
    whole = FaultyDisk()
    run(folder, QUICK, whole)
    expected = tiny.tree(folder / "out")
    start_again(folder)
    commits = [i for i, o in enumerate(whole.operations, 1) if o == "flushing it: journal.jsonl"]
    for at in (commits[2], commits[-1] + 1):
        disk = FaultyDisk(at, mode)
        with pytest.raises(BaseException) as failed:  # noqa: PT011 - a power cut is no Exception
            run(folder, QUICK, disk)
        assert type(failed.value).__name__ in ("CheckpointError", "PowerCut")
        disk.lose()
        for kept in folder.glob(".kept-*"):
            kept.unlink()
        run(folder, QUICK, resume=True)
        assert tiny.tree(folder / "out") == expected
        start_again(folder)


def test_without_its_hidden_states_a_run_is_not_gone_on_with(folder: Path) -> None:
    events, _ = clean(folder, QUICK)
    assert stopped(folder, QUICK, Stopper(events * 2 // 3))
    shutil.rmtree(folder / "out.calibration")
    with pytest.raises(CheckpointError, match="does not hold what goes into layer .* start again"):
        run(folder, QUICK, resume=True)


def test_hidden_states_of_a_run_that_is_gone_are_not_used(folder: Path) -> None:
    """OUT.partial was removed by hand; what lies beside it is begun anew."""
    events, expected = clean(folder, QUICK)
    assert stopped(folder, QUICK, Stopper(events // 2))
    shutil.rmtree(folder / "out.partial")
    run(folder, QUICK)
    assert tiny.tree(folder / "out") == expected
