"""Whatever operation fails, and however: OUT is complete or not there, and a resumed run makes the
bytes that an uninterrupted one makes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorSpec
from nybble.checkpoint.writer import JOURNAL, CheckpointWriter, layout_shards, partial_folder
from nybble.errors import CheckpointError
from nybble.quantize.journal import Journal

sys.path.insert(0, str(Path(__file__).parents[1]))
from faulty_disk import MODES, FaultyDisk, PowerCut

TENSORS = [
    TensorSpec("embed", "BF16", (8, 9)),
    TensorSpec("a.codes", "U8", (11, 4)),
    TensorSpec("a.scale", "F8_E4M3", (11,)),
    TensorSpec("a.scale_2", "F32", ()),
    TensorSpec("b.codes", "U8", (70,)),
    TensorSpec("b.scale", "F8_E4M3", (70,)),
    TensorSpec("empty", "F32", (0, 3)),
    TensorSpec("norm", "F32", (25,)),
    TensorSpec("big", "I64", (40,)),
    TensorSpec("mtp", "BF16", (3, 5)),
]
SHARDS = layout_shards(TENSORS, 300)
UNITS = {
    "embed": ["embed"],
    "a": ["a.codes", "a.scale", "a.scale_2"],
    "b": ["b.codes", "b.scale", "empty"],
    "norm": ["norm"],
    "big": ["big"],
    "mtp": ["mtp"],
}
HEADER = {"source": "f00d", "plan": "beef", "options": {"recipe": "nvfp4"}, "version": "0.1"}


def content(spec: TensorSpec) -> bytes:
    seed = TENSORS.index(spec)
    return np.random.default_rng(seed).integers(0, 256, spec.nbytes, dtype=np.uint8).tobytes()


def run(folder: Path, disk: Disk, resume: bool) -> None:
    """Write the model as `quantize` does: units, three to a commit, then the rest of the folder."""
    out = folder / "out"
    path = partial_folder(out) / JOURNAL
    journal = None
    if resume and path.exists():
        journal = Journal.resume(path, HEADER, disk=disk)
    done = journal.done if journal else set()
    writer = None
    try:
        names = [name for unit in sorted(done) for name in UNITS[unit]]
        writer = CheckpointWriter(out, SHARDS, disk=disk, resume=resume, done=names)
        if journal is None:
            journal = Journal.create(path, HEADER, disk=disk)
        pending = []
        for unit in [u for u in UNITS if u not in done]:
            for spec in [t for t in TENSORS if t.name in UNITS[unit]]:
                data = content(spec)
                half = len(data) // 2
                writer.write(spec.name, data[half:], half)
                writer.write(spec.name, data[:half])
            pending.append(unit)
            if len(pending) == 3:
                writer.sync()
                journal.commit(pending)
                pending = []
        writer.sync()
        journal.commit(pending)
        writer.finish({"config.json": b"{}"}, [(folder / "README", "sub/README")], 12)
    finally:
        if writer is not None:
            writer.close()
        if journal is not None:
            journal.close()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder() -> Iterator[Path]:
    # Thousands of flushes: a memory disk where there is one.
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as path:
        (Path(path) / "README").write_bytes(b"side file")
        yield Path(path)


def start_again(folder: Path) -> None:
    for name in ("out", "out.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def interrupt(folder: Path, k: int, mode: str, resume: bool = False) -> bool:
    """Run until operation k fails; False if the run had fewer."""
    disk = FaultyDisk(k, mode)
    if mode == "kill":
        child = os.fork()
        if child == 0:
            try:
                run(folder, disk, resume)
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    message = None
    try:
        run(folder, disk, resume)
    except CheckpointError as error:
        message = str(error)
    except PowerCut:
        pass
    if message is not None:
        assert str(folder) in message
        assert {"eio": "Input/output error"}.get(mode, "No space left") in message
        assert "run again with --resume" in message
    if mode.startswith("cut"):
        disk.lose()
        for kept in folder.glob(".kept-*"):
            kept.unlink()
    return disk.has_failed


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_fails_anywhere_resumes_to_the_same_bytes(folder: Path, mode: str) -> None:
    clean = FaultyDisk()
    run(folder, clean, resume=False)
    expected = tree(folder / "out")
    assert len(SHARDS) >= 3
    k = 0
    while True:
        start_again(folder)
        k += 1
        if not interrupt(folder, k, mode):
            break
        at = f"operation {k} of {len(clean.operations)}, {clean.operations[k - 1]}"
        if (folder / "out").exists():
            # Only the flush after the last rename can fail then.
            assert tree(folder / "out") == expected, at
            continue
        assert not (folder / "out.partial" / "config.json.part").exists()
        run(folder, Disk(), resume=True)
        assert tree(folder / "out") == expected, at
        assert not (folder / "out.partial").exists(), at
    assert k == len(clean.operations) + 1
    Checkpoint.open(folder / "out").close()


@pytest.mark.parametrize("mode", ["enospc", "kill", "cut_data", "cut_all"])
def test_a_resumed_run_may_fail_too(folder: Path, mode: str) -> None:
    clean = FaultyDisk()
    run(folder, clean, resume=False)
    expected = tree(folder / "out")
    for k in range(3, len(clean.operations), 7):
        start_again(folder)
        interrupt(folder, k, mode)
        for again in range(2, 60, 9):
            if not (folder / "out").exists():
                interrupt(folder, again, mode, resume=True)
        if not (folder / "out").exists():
            run(folder, Disk(), resume=True)
        assert tree(folder / "out") == expected, k


def test_committed_units_are_not_written_again(folder: Path) -> None:
    """Else resuming would be starting again under another name."""
    clean = FaultyDisk()
    run(folder, clean, resume=False)
    start_again(folder)
    flush = f"flushing it: {JOURNAL}"
    commits = [i for i, o in enumerate(clean.operations, 1) if o == flush]
    assert len(commits) == 2
    interrupt(folder, commits[-1] + 1, "enospc")
    disk = FaultyDisk()
    run(folder, disk, resume=True)
    written = [o for o in disk.operations if o.startswith("writing") and "safetensors.part" in o]
    assert written == []


def test_an_operation_killed_is_killed(folder: Path) -> None:
    """The modes do what they say: the driver is a test that could pass by doing nothing."""
    child = os.fork()
    if child == 0:
        run(folder, FaultyDisk(5, "kill"), resume=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
