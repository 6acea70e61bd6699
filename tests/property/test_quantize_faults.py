"""Whole quantize runs on a disk that fails at its k-th operation: resumed, they end with the bytes
of an undisturbed run, and at no moment is there an OUT that is not whole.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble
import nybble.quantize.run as run_module
import nybble.quantize.tiles as tiles_module
import tiny
from faulty_disk import MODES, FaultyDisk, PowerCut
from nybble.api.quantize import quantize
from nybble.checkpoint.disk import Disk
from nybble.errors import CheckpointError

SHARD_BYTES = 12_000
CONFIG = tiny.config(
    "qwen3_5_moe",
    hidden_size=32,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    mtp_num_hidden_layers=0,
    vocab_size=67,
    num_attention_heads=2,
    linear_num_value_heads=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source of two shards; runs of several shards and commits, with a large matrix in several
    tiles."""
    monkeypatch.setattr(run_module, "COMMIT_BYTES", 25_000)
    for module in (run_module, tiles_module):
        monkeypatch.setattr(module, "TILE_BYTES", 2_500)
    shm = Path("/dev/shm")  # thousands of flushes: a memory disk where there is one
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as path:
        tiny.write(Path(path) / "m", CONFIG, tiny.tensors(CONFIG), shards=2)
        yield Path(path)


def run(folder: Path, disk: Disk, **options: Any) -> None:
    options = {"search": "absmax", "shard_size": SHARD_BYTES, "jobs": 1, **options}
    quantize(folder / "m", folder / "out", "nvfp4-all", disk=disk, **options)


def clean_run(folder: Path) -> tuple[FaultyDisk, dict[str, bytes]]:
    disk = FaultyDisk()
    run(folder, disk)
    expected = tiny.tree(folder / "out")
    assert sum(n.endswith(".safetensors") for n in expected) >= 3
    assert sum(o == "flushing it: journal.jsonl" for o in disk.operations) >= 3
    return disk, expected


def start_again(folder: Path) -> None:
    for name in ("out", "out.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def interrupt(folder: Path, k: int, mode: str, **options: Any) -> bool:
    """Run until operation k fails; False if the run had fewer."""
    disk = FaultyDisk(k, mode)
    if mode == "kill":
        child = os.fork()
        if child == 0:
            try:
                run(folder, disk, **options)
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    said = f"{folder} run again with --resume"
    try:
        run(folder, disk, **options)
    except CheckpointError as error:
        said = str(error)
    except PowerCut:
        pass
    assert "run again with --resume" in said
    assert str(folder) in said
    if mode.startswith("cut"):
        disk.lose()
        for kept in folder.glob(".kept-*"):
            kept.unlink()
    return disk.has_failed


def check_partial(folder: Path, expected: dict[str, bytes]) -> None:
    """What is left does not look like a checkpoint: the index, if it is there, is the last of all
    files."""
    left = tiny.tree(folder / "out.partial") if (folder / "out.partial").exists() else {}
    index = "model.safetensors.index.json"
    if index in left:
        whole = {name: data for name, data in expected.items() if name != index}
        assert whole == {name: left.get(name) for name in whole}


def fail_everywhere(folder: Path, mode: str, step: int, first: int = 1) -> None:
    clean, expected = clean_run(folder)
    n = len(clean.operations)
    for k in range(first, n + 1, step):
        start_again(folder)
        at = f"operation {k} of {n}, {clean.operations[k - 1]}"
        assert interrupt(folder, k, mode), at
        if (folder / "out").exists():  # only the flush after the last rename can fail then
            assert tiny.tree(folder / "out") == expected, at
            continue
        check_partial(folder, expected)
        run(folder, Disk(), resume=True)
        assert tiny.tree(folder / "out") == expected, at
        assert not (folder / "out.partial").exists(), at
    start_again(folder)
    assert not interrupt(folder, n + 1, mode), "more operations than in the clean run"


def test_a_run_that_fails_anywhere_resumes_to_the_same_bytes(folder: Path) -> None:
    fail_everywhere(folder, "short", 1)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "short"])
def test_other_faults_at_every_seventh_operation(folder: Path, mode: str) -> None:
    fail_everywhere(folder, mode, 7, first=1 + MODES.index(mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_fault_at_every_operation(folder: Path, mode: str) -> None:
    fail_everywhere(folder, mode, 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["enospc", "kill", "cut_data", "cut_all"])
def test_a_resumed_run_may_fail_too(folder: Path, mode: str) -> None:
    clean, expected = clean_run(folder)
    for k in range(3, len(clean.operations), 11):
        start_again(folder)
        interrupt(folder, k, mode)
        for again in range(2, len(clean.operations), 17):
            if not (folder / "out").exists():
                interrupt(folder, again, mode, resume=True)
        if not (folder / "out").exists():
            run(folder, Disk(), resume=True)
        assert tiny.tree(folder / "out") == expected, k


def stop_after_first_commit(folder: Path) -> None:
    start_again(folder)
    clean, _ = clean_run(folder)
    start_again(folder)
    commits = [i for i, o in enumerate(clean.operations, 1) if o == "flushing it: journal.jsonl"]
    assert interrupt(folder, commits[1] + 1, "enospc")


def test_what_is_committed_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after_first_commit(folder)
    lines = (folder / "out.partial" / "journal.jsonl").read_text().splitlines()
    done = [unit for line in lines[1:] for unit in json.loads(line)["done"]]
    assert done
    seen: list[str] = []
    true_names = run_module.Run._copy

    def copy(self: run_module.Run, copy: Any) -> None:
        seen.append(copy.tensor.name)
        true_names(self, copy)

    monkeypatch.setattr(run_module.Run, "_copy", copy)
    run(folder, Disk(), resume=True)
    assert seen
    assert not set(seen) & set(done)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("search", {"search": "mse"}),
        ("shard_bytes", {"shard_size": SHARD_BYTES + 1}),
        ("layout", {"layout": "compressed-tensors"}),
    ],
)
def test_a_run_is_not_resumed_with_other_options(
    folder: Path, field: str, options: dict[str, Any]
) -> None:
    stop_after_first_commit(folder)
    before = tiny.tree(folder / "out.partial")
    with pytest.raises(CheckpointError, match=rf"differs from this one in .*{field}: ") as found:
        run(folder, Disk(), resume=True, **options)
    assert "run with the same source and options, or remove" in str(found.value)
    assert tiny.tree(folder / "out.partial") == before
    run(folder, Disk(), resume=True)


def test_a_run_is_not_resumed_with_another_recipe(folder: Path) -> None:
    stop_after_first_commit(folder)
    with pytest.raises(CheckpointError, match='recipe: "nvfp4-all" then, "nvfp4" now'):
        quantize(
            folder / "m",
            folder / "out",
            "nvfp4",
            search="absmax",
            shard_size=SHARD_BYTES,
            resume=True,
        )


@pytest.mark.parametrize("change", ["touched", "weights", "config"])
def test_a_run_is_not_resumed_from_a_changed_source(folder: Path, change: str) -> None:
    stop_after_first_commit(folder)
    if change == "touched":
        file = next((folder / "m").glob("*.safetensors"))
        os.utime(file, ns=(0, 0))
    elif change == "weights":
        tiny.write(folder / "m", CONFIG, tiny.tensors(CONFIG, seed=1), shards=2)
    else:
        config = {**CONFIG, "new": 1}
        (folder / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="differs from this one in source: "):
        run(folder, Disk(), resume=True)


def test_a_run_is_not_resumed_by_another_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after_first_commit(folder)
    monkeypatch.setattr(nybble, "__version__", "99.0")
    with pytest.raises(CheckpointError, match='version: .* "99.0" now'):
        run(folder, Disk(), resume=True)


def test_threads_and_tiles_may_change_between_the_halves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = clean_run(folder)
    stop_after_first_commit(folder)
    for module in (run_module, tiles_module):
        monkeypatch.setattr(module, "TILE_BYTES", 1 << 20)
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    run(folder, Disk(), resume=True, jobs=2)
    assert tiny.tree(folder / "out") == expected


def test_resuming_what_never_began_is_a_fresh_run(folder: Path) -> None:
    run(folder, Disk(), resume=True)
    expected = tiny.tree(folder / "out")
    start_again(folder)
    run(folder, Disk())
    assert tiny.tree(folder / "out") == expected


def test_two_processes_do_not_write_one_output(folder: Path) -> None:
    stop_after_first_commit(folder)
    path = folder / "out.partial" / "journal.jsonl"
    disk = Disk()
    fd = disk.open_existing(path)
    disk.lock(fd)
    try:
        with pytest.raises(CheckpointError, match="another nybble process"):
            run(folder, Disk(), resume=True)
    finally:
        disk.close(fd)
    run(folder, Disk(), resume=True)
