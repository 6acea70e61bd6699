"""The routed experts of a layer: tasks, the files between, and what comes out for each job."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.calibrate.expert_tasks import ExpertTask, RoundedRows, run_task, task_bytes
from nybble.errors import CheckpointError, EngineError
from nybble.formats.scheme import FP8_DYNAMIC, NVFP4_W4A16

sys.path.insert(0, str(Path(__file__).parents[1]))

from expert_layers import EXPERTS, Layer, bytes_of, open_layer


@pytest.fixture(params=[True, False], ids=["stacked", "single"])
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Layer]:
    with open_layer(tmp_path, stacked=request.param) as found:
        yield found


def test_every_job_comes_once_with_all_members_and_little_loss(layer: Layer) -> None:
    found = layer.round()
    assert sorted(r.job.name for r in found) == sorted(j.name for j in layer.jobs)
    for rounded in found:
        assert list(rounded.tensors) == [m.module for m in rounded.job.members]
        assert len({float(t.tensor_scale) for t in rounded.tensors.values()}) == 1
        for m in rounded.job.members:
            source = m.matrix(layer.weights.checkpoint).astype(np.float32)
            tensor = rounded.tensors[m.module]
            assert tensor.shape == m.shape
            error = np.square(tensor.dequantize() - source).sum() / np.square(source).sum()
            assert error < 0.05  # codes of another row, member or expert would be above 1
    chosen = sum(r.choice.tokens for r in found if len(r.job.members) == 2)
    assert chosen == 2 * 120  # each of the fit tokens chooses two


def test_calibration_wins_on_held_out_tokens(layer: Layer) -> None:
    for rounded in layer.round():
        choice = rounded.choice
        assert choice.losses[choice.method] <= choice.losses["mse"]
    assert {r.choice.method for r in layer.round()} >= {"gptq-x"}


def test_any_cut_order_or_process_gives_equal_bytes(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = bytes_of(layer.round())

    def elsewhere(tasks: Iterable[ExpertTask]) -> Iterator[Sequence[RoundedRows]]:
        sent = [pickle.loads(pickle.dumps(task)) for task in tasks]
        assert len(sent) == -(-EXPERTS // 2)
        done = {task.first: pickle.dumps(run_task(task)) for task in reversed(sent)}
        for task in sent:
            yield pickle.loads(done[task.first])

    monkeypatch.setattr("nybble.calibrate.expert_tasks.MOST_EXPERTS", 2)
    assert bytes_of(layer.round(runner=elsewhere)) == together
    assert not list(layer.folder.rglob("*"))


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_any_number_of_threads_gives_equal_bytes(
    layer: Layer, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = bytes_of(layer.round(threads=1))
    assert bytes_of(layer.round(threads=threads)) == alone
    monkeypatch.setattr("nybble.calibrate.expert_tasks.WORK_BYTES", 1)  # one expert at a time
    assert bytes_of(layer.round(threads=threads)) == alone


def test_only_some_jobs_are_done_where_a_recipe_names_some(layer: Layer) -> None:
    every = bytes_of(layer.round())
    layer.jobs = [j for j in layer.jobs if j.members[0].module.endswith("down_proj")][1::2]
    some = bytes_of(layer.round())
    assert len(some) == len(layer.jobs)
    assert some.items() <= every.items()


def test_all_experts_see_all_tokens_where_asked(layer: Layer) -> None:
    for rounded in layer.round(all_experts=True):
        assert rounded.choice.tokens == 120
        assert rounded.choice.guard_tokens == 30
        assert rounded.choice.method != "mse" or rounded.choice.reason


def test_without_guard_tokens_the_search_without_data_is_taken(layer: Layer) -> None:
    layer.guard = []
    for rounded in layer.round():
        assert rounded.choice.method == "mse"
        assert "judge" in rounded.choice.reason


def test_nan_inputs_name_the_layer(layer: Layer) -> None:
    layer.fit[1][3, 5] = float("nan")
    with pytest.raises(EngineError, match=r"model\.layers\.1\.mlp\.experts"):
        layer.round()
    assert not list(layer.folder.rglob("*"))


def test_another_scheme_is_refused(layer: Layer) -> None:
    layer.jobs[3] = replace(layer.jobs[3], scheme=FP8_DYNAMIC)
    with pytest.raises(EngineError, match="no linear in NVFP4"):
        layer.round()


def test_a_folder_that_cannot_be_written_is_named(layer: Layer) -> None:
    layer.folder.parent.joinpath("file").write_text("x")
    layer.folder = layer.folder.parent / "file" / "below"
    with pytest.raises(CheckpointError, match="below"):
        layer.round()


def test_quantized_inputs_change_the_statistics(tmp_path: Path) -> None:
    with open_layer(tmp_path, "nvfp4-w4a4") as layer:
        modules = [m.module for j in layer.jobs for m in j.members]
        fine = layer.round(input_scales=dict.fromkeys(modules, 2.0**-8))
        # Scales so large that all block scales underflow: inputs are zero, and nothing is known.
        dead = layer.round(input_scales=dict.fromkeys(modules, 2.0**40))
        assert {r.choice.method for r in fine} >= {"gptq-x"}
        assert {r.choice.method for r in dead} == {"mse"}
        layer.jobs = [replace(j, scheme=NVFP4_W4A16) for j in layer.jobs]
        assert bytes_of(layer.round()).keys() == bytes_of(fine).keys()
        assert bytes_of(layer.round()) != bytes_of(fine)


def test_a_task_of_the_real_shapes_stays_far_below_six_gigabytes() -> None:
    real = {"tokens": 65536, "hidden": 2048, "width": 512, "experts": 256, "top": 8}
    assert task_bytes(**real) < 2 * 10**9
    assert task_bytes(**real, threads=16) < 3 * 10**9
    assert task_bytes(**{**real, "tokens": 131072}) > task_bytes(**real)
