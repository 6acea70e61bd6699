"""Tasks that other processes do: the same bytes wherever they run, workers that are examined, and
addresses that are none."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from calibrated_runs import ROPE, plan_of, samples
from nybble.api.calibrated import calibration_request
from nybble.calibrate.rounding import EFFORTS
from nybble.calibrate.scale_out import (
    Conditions,
    Findings,
    R,
    T,
    examination,
    examined,
    judge,
    remove_sign,
)
from nybble.calibrate.scale_out_ray import RayWorkers, connected, validated
from nybble.calibrate.sequential import Calibration
from nybble.calibrate.shard_tasks import ShardTask, run_task
from nybble.calibrate.statistics import Statistics
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, EngineError, MissingExtra, NybbleError, RecipeError
from nybble.formats.block import FORMATS
from nybble.formats.scheme import SCHEMES
from nybble.progress import Progress
from nybble.quantize.input_scales import InputScales
from nybble.quantize.run import Options, execute
from nybble.stream import memory

HERE = Conditions("1", "cpu avx2", "2.13.0", "AVX2")


class Elsewhere:
    """Workers as a cluster has them: tasks travel as bytes, and are done last one first."""

    def __init__(self, pool: ProcessPoolExecutor | None = None) -> None:
        self.pool = pool
        self.is_mixed = False
        self.at_once = 2
        self.done: list[object] = []
        self.task_bytes = 0

    def map(self, run: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        sent = [pickle.dumps((run, task)) for task in tasks]
        if self.pool is not None:
            results = list(self.pool.map(_run, reversed(sent)))
        else:
            results = [_run(task) for task in reversed(sent)]
        self.done += [pickle.loads(task)[1] for task in sent]
        return iter([pickle.loads(result) for result in reversed(results)])

    def examine(self, folder: Path, checkpoint: Checkpoint) -> None:
        asked = examination(folder, checkpoint)
        try:
            judge([examined(asked)], Conditions.here(), allow_mixed=False)
        finally:
            remove_sign(asked)

    def reserve(self, task_bytes: int) -> None:
        self.task_bytes = task_bytes


def _run(sent: bytes) -> bytes:
    run, task = pickle.loads(sent)
    return pickle.dumps(run(task))


def calibrated(
    model: Path,
    out: Path,
    threads: int,
    workers: Elsewhere | None,
    effort: str = "default",
    recipe: str = "nvfp4-all",
) -> None:
    with Checkpoint.open(model) as checkpoint:
        plan = plan_of(checkpoint, recipe)
        names = [m.module for j in plan.jobs if j.scheme.needs_input_scale for m in j.members]
        scales = InputScales(dict.fromkeys(names, 0.0078125), (), 2.0, 1) if names else None
        rounder = Calibration(
            plan,
            samples(67, (30, 17, 40, 25, 31), frozenset({1, 4})),
            replace(EFFORTS[effort], dampings=(0.03,)),
            spill=out.with_name(out.name + ".calibration"),
            threads=threads,
            progress=Progress(),
            input_scales=scales.values if scales else None,
            workers=workers,
        )
        execute(
            plan,
            out,
            Options(threads=threads),
            version="1",
            progress=Progress(),
            input_scales=scales,
            rounder=rounder,
        )


@pytest.fixture(params=[1, 70])
def in_shards(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Each window of `calibrated` a batch, and a shard of its own or with a neighbour; how many
    shards that makes."""
    monkeypatch.setattr("nybble.stream.shards.SHARD_TOKENS", request.param)
    true = memory._plan

    def plan(network: Any, lengths: Any, tokens: int, spills: bool, breaks: Any) -> Any:
        return true(network, lengths, 1, spills, breaks)

    monkeypatch.setattr(memory, "_plan", plan)
    return 5 if request.param == 1 else 3  # 30 + 40, 25 to fit; 17 + 31 to judge


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Layers of both kinds, as small as they get."""
    return tiny.checkpoint(
        tmp_path / "model",
        "qwen3_5_moe",
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters=ROPE,
        vocab_size=67,
        num_attention_heads=2,
        linear_num_value_heads=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_tasks_done_elsewhere_make_the_same_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_shards: int, threads: int
) -> None:
    """Codes, scales and both reports, with jobs cut into parts and experts into groups."""
    monkeypatch.setattr("nybble.calibrate.stage_rounding.PART_WEIGHTS", 1024)
    monkeypatch.setattr("nybble.calibrate.expert_tasks.MOST_EXPERTS", 2)
    calibrated(model, tmp_path / "here", threads, None)
    workers = Elsewhere()
    calibrated(model, tmp_path / "there", threads, workers)
    assert tiny.tree(tmp_path / "there") == tiny.tree(tmp_path / "here")
    kinds = Counter(type(task).__name__ for task in workers.done)
    assert set(kinds) == {"DenseTask", "ExpertTask", "ShardTask"}
    assert kinds["ShardTask"] == 2 * 3 * in_shards  # layers, passes
    assert workers.task_bytes > 1 << 28
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["here", "model", "there"]  # neither matrices nor hidden states


@pytest.mark.parametrize(
    ("effort", "recipe"), [("fast", "nvfp4-all"), ("default", "nvfp4-w4a4"), ("default", "nvfp4")]
)
def test_shards_of_one_pass_and_of_rounded_inputs(
    model: Path, tmp_path: Path, in_shards: int, effort: str, recipe: str
) -> None:
    calibrated(model, tmp_path / "here", 1, None, effort, recipe)
    workers = Elsewhere()
    calibrated(model, tmp_path / "there", 1, workers, effort, recipe)
    assert tiny.tree(tmp_path / "there") == tiny.tree(tmp_path / "here")
    shards = [task for task in workers.done if isinstance(task, ShardTask)]
    assert {task.is_guard for task in shards if isinstance(task.notes, Statistics)} == {True, False}
    assert {task.held is not None for task in shards} == (
        {False} if effort == "fast" else {False, True}
    )


def test_an_attempt_that_was_killed_leaves_nothing_that_another_takes(
    model: Path, tmp_path: Path, in_shards: int
) -> None:
    """Every task done twice, the first time for nothing: as if its worker had died at its end."""

    class Twice(Elsewhere):
        def map(self, run: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
            tasks = list(tasks)
            for task in tasks:
                _run(pickle.dumps((run, task)))
            return super().map(run, tasks)

    calibrated(model, tmp_path / "here", 1, None)
    calibrated(model, tmp_path / "there", 1, Twice())
    assert tiny.tree(tmp_path / "there") == tiny.tree(tmp_path / "here")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "model", "there"]


def test_what_a_killed_run_left_goes_with_the_rest(model: Path, tmp_path: Path) -> None:
    for kind in ("shards", "dense", "experts"):
        left = tmp_path / "out.calibration" / kind / "0" / "rows"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"1234")
    calibrated(model, tmp_path / "out", 1, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_task_that_outlives_its_run_fails_and_makes_no_folder(
    model: Path, tmp_path: Path
) -> None:
    workers = Elsewhere()
    calibrated(model, tmp_path / "out", 1, workers)
    for task in workers.done:
        if isinstance(task, ShardTask):
            hidden = tmp_path / "hidden"
            hidden.write_bytes(bytes(4 * task.hidden.shape[0] * task.hidden.shape[1]))
            late = replace(task, hidden=replace(task.hidden, path=hidden), held=None, keeps=True)
            with pytest.raises(CheckpointError, match="cannot hold what tasks read and leave"):
                run_task(late)
            with pytest.raises(CheckpointError, match="all who do tasks must see the same files"):
                run_task(task)
    assert not (tmp_path / "out.calibration").exists()


def test_no_more_shards_are_under_way_than_keep_workers_busy(
    model: Path, tmp_path: Path, in_shards: int
) -> None:
    """What they leave lies on the disk until it is its turn."""
    under_way, most = 0, 0

    class Counting(Elsewhere):
        def map(self, run: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
            nonlocal under_way, most
            tasks = list(tasks)
            is_shard = isinstance(tasks[0], ShardTask)
            under_way += is_shard
            most = max(most, under_way)
            return taken(super().map(run, tasks), is_shard)

    def taken(results: Iterator[R], is_shard: bool) -> Iterator[R]:
        nonlocal under_way
        for result in results:
            under_way -= is_shard
            yield result

    calibrated(model, tmp_path / "out", 1, Counting())
    assert most == 3
    assert under_way == 0


@pytest.mark.parametrize("table", [FORMATS, SCHEMES])
def test_formats_are_themselves_in_another_process(table: dict[str, Any]) -> None:
    """They are compared by identity."""
    for one in table.values():
        assert pickle.loads(pickle.dumps(one)) is one


def test_a_process_of_its_own_makes_the_same_checkpoint(model: Path, tmp_path: Path) -> None:
    """Nothing is taken from the memory of the run: a fresh interpreter has the task alone."""
    calibrated(model, tmp_path / "here", 1, None)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        calibrated(model, tmp_path / "there", 1, Elsewhere(pool))
    assert tiny.tree(tmp_path / "there") == tiny.tree(tmp_path / "here")


# ------------------------------------------------------------------------------- who may help


def test_workers_of_another_kind_are_refused_by_name_unless_allowed() -> None:
    same, other = Findings("a", HERE, ""), Findings("b", replace(HERE, kernels="cpu avx512"), "")
    assert judge([same, same], HERE, allow_mixed=False) is False
    with pytest.raises(EngineError, match=r"^b has kernels 'cpu avx512' .*--allow-mixed"):
        judge([same, other], HERE, allow_mixed=False)
    assert judge([same, other], HERE, allow_mixed=True) is True


def test_workers_that_see_other_files_are_refused_even_where_mixed_ones_are_not(
    tmp_path: Path,
) -> None:
    model = tiny.checkpoint(tmp_path / "model", "llama")
    with Checkpoint.open(model) as checkpoint:
        asked = examination(tmp_path / "out.calibration", checkpoint)
    assert examined(asked).problem == ""
    other = tiny.checkpoint(tmp_path / "other", "llama", vocab_size=99)
    problems = {
        "has other files": replace(asked, checkpoint=other),
        "cannot open": replace(asked, checkpoint=tmp_path / "nowhere"),
        "sees another": replace(asked, word="of another run"),
        "does not see": replace(asked, sign=tmp_path / "nowhere"),
    }
    for words, changed in problems.items():
        found = examined(changed)
        assert words in found.problem
        with pytest.raises(EngineError, match="shared filesystem"):
            judge([found], Conditions.here(), allow_mixed=True)
    remove_sign(asked)
    assert not (tmp_path / "out.calibration").exists()


# --------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address", ["local", "auto", "head:6379", "10.0.0.1:6379", "a-b.example:1", "[fd00::2]:6379"]
)
def test_addresses_of_clusters(address: str) -> None:
    assert validated(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "head",
        "head:",
        ":6379",
        "head:0",
        "head:65536",
        "head:6379\n",
        "head:６３７９",
        "ray://head:10001",
        "head:6379/x",
        "-head:6379",
        "a b:6379",
        "unix:///tmp/x",
        "head;rm:1",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_opened(address: str) -> None:
    with pytest.raises(RecipeError, match="HOST:PORT"):
        connected(address, 1)


def test_a_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.calibrate.scale_out_ray.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"nybble\[ray\]"):
        connected("local", 1)


def test_an_address_where_nobody_listens_is_an_error_at_once() -> None:
    with pytest.raises(NybbleError, match="no Ray cluster that this machine can join"):
        connected("127.0.0.1:1", 1)


# ------------------------------------------------------------- what is made of Ray's answers


class Lost(Exception):
    """As ray.exceptions.RayError."""


class Cluster:
    """Ray as far as it is used here: tasks are done when their results are asked for."""

    class exceptions:
        RayError = Lost
        RayTaskError = type("RayTaskError", (Lost,), {"cause": ValueError("a bug")})

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.cancelled: list[object] = []
        self.lost: set[int] = set()
        self.is_shut = False

    def remote(self, function: Callable[..., bytes]) -> Any:
        cluster = self

        class Remote:
            def options(self, **options: Any) -> Any:
                cluster.options.append(options)
                return self

            def remote(self, *arguments: Any) -> tuple[int, bytes]:
                return len(cluster.options) - 1, pickle.dumps((function, arguments))

        return Remote()

    def get(self, reference: tuple[int, bytes]) -> bytes:
        if reference[0] in self.lost:
            raise Lost("The worker died.\nmore")
        function, arguments = pickle.loads(reference[1])
        return bytes(function(*arguments))

    def cancel(self, reference: tuple[int, bytes], *, force: bool) -> None:
        assert force
        self.cancelled.append(reference[0])

    def nodes(self) -> list[dict[str, Any]]:
        sizes = [(True, 4, 1 << 30), (True, 2, 1 << 40), (False, 64, 1 << 50)]
        return [{"Alive": a, "Resources": {"CPU": c, "memory": m}} for a, c, m in sizes]

    def shutdown(self) -> None:
        self.is_shut = True


def refused(text: str) -> int:
    raise EngineError(f"module {text}")


def test_results_come_in_order_and_errors_as_they_were_raised() -> None:
    cluster = Cluster()
    workers = RayWorkers(cluster, 4)
    assert list(workers.map(len, ["a", "bc", ""])) == [1, 2, 0]
    assert {o["num_cpus"] for o in cluster.options} == {4}
    assert all(o["max_retries"] > 0 for o in cluster.options)
    with pytest.raises(EngineError, match="^module x$"):
        list(workers.map(refused, ["x"]))


def test_a_task_that_is_lost_for_good_says_so_and_what_is_under_way_is_given_up() -> None:
    cluster = Cluster()
    with RayWorkers(cluster, 1, is_ours=True) as workers:
        results = workers.map(len, ["a", "b", "c", "d"])
        cluster.lost = {1}
        assert next(results) == 1
        with pytest.raises(EngineError, match=r"lost a task .* The worker died\.\).*--resume"):
            next(results)
    assert sorted(map(str, cluster.cancelled)) == ["2", "3"]
    assert cluster.is_shut


def test_tasks_go_to_machines_that_are_alive_and_large_enough() -> None:
    cluster = Cluster()
    workers = RayWorkers(cluster, 4)
    with pytest.raises(EngineError, match="more than 1.00 GiB"):
        workers.reserve(1 << 31)  # the machine with more has too few processors
    workers.reserve(1 << 29)
    list(workers.map(len, ["a"]))
    assert cluster.options[-1]["memory"] == 1 << 29
    RayWorkers(cluster, 4).refuse_too_small()
    with pytest.raises(EngineError, match="5 processors"):
        RayWorkers(cluster, 5).refuse_too_small()


def test_a_worker_that_joins_later_and_differs_does_nothing() -> None:
    workers = RayWorkers(Cluster(), 1)
    workers.conditions = HERE
    with pytest.raises(EngineError, match="joined the cluster after"):
        list(workers.map(len, ["a"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": None, "ray": "auto"}, "--ray belongs to --calibrate"),
        ({"allow_mixed": True}, "needs --resume or --ray"),
    ],
)
def test_options_that_make_no_sense_without_a_cluster(options: dict[str, Any], words: str) -> None:
    rest: dict[str, Any] = {
        "calibrate": "default",
        "effort": None,
        "samples": None,
        "length": None,
        "allow_mixed": False,
        "resume": False,
        "data_free": False,
        "kv_scales": False,
        "search": "mse",
        "text": None,
        "tokens": None,
    }
    with pytest.raises(RecipeError, match=words):
        calibration_request(**{**rest, **options})
    found = calibration_request(**rest, ray="auto")
    assert found is not None
    assert found.ray == "auto"


def test_ray_is_not_imported_before_it_is_asked_for() -> None:
    import subprocess

    program = (
        "import sys, nybble.calibrate.scale_out_ray, nybble.calibrate.sequential, "
        "nybble.api.quantize; sys.exit('ray' in sys.modules)"
    )
    found: Any = subprocess.run([sys.executable, "-c", program], check=False)
    assert found.returncode == 0
