"""`nybble quantize --calibrate --ray` on a cluster of two local workers: the bytes of a run without
it, also when a worker is killed in the middle of a task.

The cluster is Ray's own, its ports fixed beforehand: without, a machine gives up on itself where
its helpers take more than 15 s to start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from command_line import Ask, asking
from nybble.api.calibrated import calibration_folder
from nybble.api.quantize import quantize
from nybble.calibrate.scale_out import Conditions
from nybble.calibrate.scale_out_ray import RayWorkers, connected
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EngineError

pytestmark = pytest.mark.slow

STORIES = Path(__file__).parents[2] / "models" / "stories-hybrid-moe"
#: Three batches of what fits, one of what judges.
SMALL = {"calibrate": "default", "samples": 40, "length": 128, "jobs": 1}
#: Workers that are killed in one run: at most one in a kind of task, then any.
MOST = 4
RAY = Path(sys.executable).with_name("ray")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass(frozen=True)
class Cluster:
    """Its address, and the process that all others of it descend from."""

    address: str
    root: int


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One machine with room for two tasks of one thread."""
    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as environment:
        # Neither a token in the user's home nor the one that may be there.
        (folder / "token").write_text("of-this-test-and-long-enough-to-be-one")
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        environment.setenv("RAY_agent_register_timeout_ms", "300000")
        environment.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield from started(folder)


def started(folder: Path) -> Iterator[Cluster]:
    head, agent, listening, environments, exported = free_ports(5)
    sockets = Path("/tmp") / f"nybble-ray-{os.getpid()}"  # their paths must be short
    command = [
        *(str(RAY), "start", "--head", "--block", f"--port={head}", "--num-cpus=2"),
        *("--include-dashboard=false", "--object-store-memory=83886080", "--disable-usage-stats"),
        *(f"--dashboard-agent-grpc-port={agent}", f"--dashboard-agent-listen-port={listening}"),
        *(f"--runtime-env-agent-port={environments}", f"--metrics-export-port={exported}"),
        f"--temp-dir={sockets}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 120
            while "Ray runtime started" not in Path(log.name).read_text():
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < until, "Ray does not start"
                time.sleep(0.2)
            yield Cluster(f"127.0.0.1:{head}", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)  # --block: it takes the others along
            process.wait(60)
    shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def small_shards() -> Iterator[None]:
    """A shard for each batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.stream.shards.SHARD_TOKENS", 1)
        yield


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return asking(monkeypatch, capsys)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without a cluster writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    quantize(STORIES, out, "nvfp4-all", **SMALL)
    return tiny.tree(out)


def titles(root: int) -> dict[int, str]:
    """What the workers below `root` are at, by process."""
    parents, found = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text("utf-8", "replace")
                title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode("utf-8", "replace")
            except OSError:  # it is gone
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            if title.startswith("ray::"):
                found[int(entry.name)] = title
    return {process: title for process, title in found.items() if is_below(process, root, parents)}


def is_below(process: int, root: int, parents: dict[int, int]) -> bool:
    while process in parents and process != root:
        process = parents[process]
    return process == root


class Killer(threading.Thread):
    """Kills (-9) workers that are at tasks of nybble's: so many, the first two of two kinds."""

    def __init__(self, root: int, most: int) -> None:
        super().__init__(daemon=True)
        self.root, self.most, self.killed = root, most, dict[int, str]()
        self.stopped = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.most and not self.stopped.wait(0.002):
            for process, title in titles(self.root).items():
                is_new = title not in self.killed.values() or len(self.killed) >= 2
                is_ours = "nybble" in title and "_tasks" in title
                if is_ours and is_new and process not in self.killed:
                    os.kill(process, signal.SIGKILL)
                    self.killed[process] = title
                    break


def test_two_workers_write_the_bytes_of_a_run_without_them(
    cluster: Cluster, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(STORIES, out, "nvfp4-all", ray=cluster.address, **SMALL)
    assert tiny.tree(out) == alone  # report.json too
    assert not calibration_folder(out).exists()
    assert "mixed" not in json.loads((out / "report.json").read_text())["conditions"]


def test_the_command_does_it_too(
    cluster: Cluster, alone: dict[str, bytes], tmp_path: Path, ask: Ask
) -> None:
    out = tmp_path / "out"
    sizes = ("--samples", str(SMALL["samples"]), "--length", str(SMALL["length"]), "--jobs", "1")
    done = ask(
        *("quantize", str(STORIES), str(out), "--recipe", "nvfp4-all", "--calibrate", "default"),
        *(*sizes, "--ray", cluster.address),
    )
    assert done.code == 0, done.err
    assert tiny.tree(out) == alone


def test_a_killed_worker_costs_its_task_and_nothing_else(
    cluster: Cluster, alone: dict[str, bytes], tmp_path: Path
) -> None:
    killer = Killer(cluster.root, MOST)
    killer.start()
    try:
        quantize(STORIES, tmp_path / "out", "nvfp4-all", ray=cluster.address, **SMALL)
    finally:
        killer.stopped.set()
        killer.join()
    assert len(killer.killed) == MOST  # or nothing was shown
    assert any("shard_tasks" in title for title in killer.killed.values()), killer.killed
    assert tiny.tree(tmp_path / "out") == alone


def test_what_cannot_be_done_is_said_before_anything_is(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no machine of the cluster has 3 processors"):
        connected(cluster.address, 3)
    with connected(cluster.address, 1) as workers, Checkpoint.open(STORIES) as checkpoint:
        assert isinstance(workers, RayWorkers)
        workers.conditions = Conditions("0", "cpu", "2", "none")  # as if the workers were others
        with pytest.raises(EngineError, match="--allow-mixed"):
            workers.examine(tmp_path / "spill", checkpoint)
        with pytest.raises(EngineError, match="joined the cluster after"):
            list(workers.map(len, ["task"]))
        workers.allow_mixed = True
        workers.examine(tmp_path / "spill", checkpoint)
        assert workers.is_mixed
        assert list(workers.map(len, ["a", "bc"])) == [1, 2]
        with pytest.raises(EngineError, match="GiB"):
            workers.reserve(1 << 50)
    assert not list(tmp_path.iterdir())
