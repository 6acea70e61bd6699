"""Who gives finished tensors to a run: asked in his order, written as any others, and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import nybble.quantize.run as run_module
import tiny
from calibrated_runs import ROPE, plan_of
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import JOURNAL
from nybble.errors import CheckpointError
from nybble.formats.tensor import BlockScaledTensor
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.quantize.in_memory import searched
from nybble.quantize.rounder import MACHINE, Unit
from nybble.quantize.run import Options, execute


class Backwards:
    """Gives what the search would, last unit first; leaves one in `leaves` to the search."""

    def __init__(
        self,
        plan: Plan,
        *,
        stops_at: str = "",
        leaves: str = "",
        threads: int = 1,
        effort: str = "",
    ) -> None:
        self.plan, self.stops_at, self.leaves = plan, stops_at, leaves
        self.threads, self.effort = threads, effort
        self.asked: list[str] = []
        self.commits: list[Callable[[], None]] = []
        self.is_closed = False

    def record(self) -> Mapping[str, object]:
        return {"effort": self.effort, MACHINE: {"threads": self.threads}}

    def order(self, work: Sequence[Unit]) -> list[Unit]:
        return sorted(work, key=lambda u: (u.copy is None, u.name), reverse=True)

    def take(
        self, unit: Unit, commit: Callable[[], None]
    ) -> Mapping[str, BlockScaledTensor] | None:
        assert unit.copy is None
        self.asked.append(unit.name)
        if unit.name == self.stops_at:
            commit()
            raise KeyboardInterrupt
        if unit.name == self.leaves:
            return None
        found: dict[str, BlockScaledTensor] = {}
        for job in unit.jobs:
            found.update(searched(self.plan, [job], "mse", 1))
        return found

    def documents(self) -> Mapping[str, bytes]:
        return {"report.json": b"{}\n"}

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(params=["modelopt nvfp4-all", "compressed-tensors fp8", "compressed-tensors mxfp4"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    layout, recipe = request.param.split()
    tiny.checkpoint(tmp_path / "m", "qwen3_5_moe", rope_parameters=ROPE, mtp_num_hidden_layers=0)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        yield plan_of(checkpoint, recipe, layout)


def run(plan: Plan, out: Path, rounder: Backwards | None, **options: Any) -> None:
    execute(
        plan,
        out,
        Options(threads=1, **options),
        version="1",
        progress=Progress(),
        rounder=rounder,
    )


def test_given_tensors_are_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    """Tensors, scales and FP8 scales of every layout, in whatever order they come."""
    run(plan, tmp_path / "plain", None)
    left = plan.jobs[-1].name
    rounder = Backwards(plan, leaves=left if plan.jobs[-1].members[0].expert is None else "")
    run(plan, tmp_path / "given", rounder)
    given = tiny.tree(tmp_path / "given")
    assert given.pop("report.json") == b"{}\n"
    assert given == tiny.tree(tmp_path / "plain")
    assert rounder.asked == sorted(rounder.asked, reverse=True)
    assert rounder.is_closed


def one(tmp_path: Path) -> Any:
    tiny.checkpoint(tmp_path / "m", "llama")
    return Checkpoint.open(tmp_path / "m")


def test_commit_is_on_the_disk_before_more_is_asked_for(tmp_path: Path) -> None:
    with one(tmp_path) as checkpoint:
        plan = plan_of(checkpoint, "nvfp4-all")
        run(plan, tmp_path / "whole", Backwards(plan))
        order = [u.name for u in Backwards(plan).order(run_module.units(plan)) if not u.copy]
        stopped = Backwards(plan, stops_at=order[2])
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out", stopped)
        assert not stopped.is_closed
        lines = (tmp_path / "out.partial" / JOURNAL).read_text().splitlines()
        done = [name for line in lines[1:] for name in json.loads(line)["done"]]
        assert set(order[:2]) == set(done) & set(order)
        again = Backwards(plan)
        run(plan, tmp_path / "out", again, resume=True)
        assert again.asked == order[2:]
        assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "whole")


def test_what_is_recorded_must_be_equal_to_go_on(tmp_path: Path) -> None:
    with one(tmp_path) as checkpoint:
        plan = plan_of(checkpoint, "nvfp4-all")
        name = plan.jobs[0].name
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out", Backwards(plan, stops_at=name, threads=2))
        with pytest.raises(CheckpointError, match=r"rounder\.machine\.threads: 2 then, 4 now") as e:
            run(plan, tmp_path / "out", Backwards(plan, threads=4), resume=True)
        assert "--allow-mixed" in str(e.value)
        for changed in (Backwards(plan, effort="best", threads=4), None):
            with pytest.raises(CheckpointError, match=r"rounder\.effort") as e:
                run(plan, tmp_path / "out", changed, resume=True, allow_mixed=True)
            assert "--allow-mixed" not in str(e.value)
        run(plan, tmp_path / "out", Backwards(plan, threads=4), resume=True, allow_mixed=True)
        assert (tmp_path / "out" / "config.json").exists()
