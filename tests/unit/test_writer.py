"""Where tensors lie, what a finished folder holds, and what the writer refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nybble.checkpoint import disk as disk_module
from nybble.checkpoint import writer as writer_module
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import INDEX, Checkpoint
from nybble.checkpoint.safetensors import TensorSpec
from nybble.checkpoint.writer import (
    JOURNAL,
    CheckpointWriter,
    ShardLayout,
    as_bytes,
    index_json,
    layout_shards,
    partial_folder,
)
from nybble.errors import CheckpointError, DoesNotFit


def spec(name: str, nbytes: int, dtype: str = "U8") -> TensorSpec:
    return TensorSpec(name, dtype, (nbytes,))


TWO = layout_shards([spec("a", 4), spec("b", 4), spec("c", 8)], 8)
FULL = {"a": b"aaaa", "b": b"bbbb", "c": b"cccccccc"}


def fill(writer: CheckpointWriter) -> None:
    for name, data in FULL.items():
        writer.write(name, data)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --------------------------------------------------------------------------------- layout


def shards_of(sizes: list[int], limit: int) -> list[list[int]]:
    tensors = [spec(f"t{i}", n) for i, n in enumerate(sizes)]
    return [[t.nbytes for t in s.tensors] for s in layout_shards(tensors, limit)]


def test_shards_fill_in_the_order_given() -> None:
    assert shards_of([3, 3, 4, 1], 10) == [[3, 3, 4], [1]]
    assert shards_of([3, 8, 3], 10) == [[3], [8], [3]]
    assert shards_of([10, 1], 10) == [[10], [1]]


def test_a_tensor_over_the_limit_has_its_own_shard() -> None:
    assert shards_of([3, 30, 3], 10) == [[3], [30], [3]]
    assert shards_of([30], 10) == [[30]]


def test_names_count_shards_even_for_one() -> None:
    assert layout_shards([spec("a", 1)])[0].file == "model-00001-of-00001.safetensors"
    assert [s.file for s in TWO] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_wide_dtypes_come_first_and_each_keeps_its_order() -> None:
    dtypes = ["U8", "BF16", "F8_E4M3", "F32", "U8", "I64", "F16", "F32"]
    tensors = [TensorSpec(f"{i}", d, (3,)) for i, d in enumerate(dtypes)]
    (shard,) = layout_shards(tensors)
    assert [t.name for t in shard.tensors] == ["5", "3", "7", "1", "6", "2", "0", "4"]
    assert all(t.offset % (t.nbytes // t.size) == 0 for t in shard.tensors)


def test_data_start_at_a_cache_line() -> None:
    for n in range(70):
        (shard,) = layout_shards([spec("n" * (n + 1), 5)])
        assert len(shard.header) % 64 == 0
        assert shard.size == len(shard.header) + 5
        length = int.from_bytes(shard.header[:8], "little")
        assert length == len(shard.header) - 8
        header = json.loads(shard.header[8:])
        assert header["__metadata__"] == {"format": "pt"}


def test_the_index_maps_every_tensor_and_counts_payload() -> None:
    assert json.loads(index_json(TWO, 7)) == {
        "metadata": {"total_parameters": 7, "total_size": 16},
        "weight_map": {"a": TWO[0].file, "b": TWO[0].file, "c": TWO[1].file},
    }


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([], "without tensors"),
        ([spec("a", 1), spec("a", 2)], "'a'"),
        ([spec("__metadata__", 1)], "__metadata__"),
        ([spec("", 1)], "cannot be the name"),
        ([spec("x\n", 1)], "cannot be the name"),
        ([spec("x" * 2000, 1)], "cannot be the name"),
        ([TensorSpec("a", "F4", (2,))], "'a': unknown dtype 'F4'"),
    ],
)
def test_what_no_reader_accepts_is_not_laid_out(tensors: list[TensorSpec], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        layout_shards(tensors)
    assert expected in str(caught.value)


def test_a_shard_size_must_be_positive() -> None:
    with pytest.raises(CheckpointError, match="positive"):
        layout_shards([spec("a", 1)], 0)


def test_a_header_over_the_cap_asks_for_smaller_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "HEADER_LIMIT", 100)
    with pytest.raises(CheckpointError, match="smaller shard size"):
        layout_shards([spec("a", 1), spec("b", 1)])


# -------------------------------------------------------------------------------- writing


def test_a_finished_folder_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"tok")
    out = tmp_path / "new" / "out"
    with CheckpointWriter(out, TWO, disk=Disk()) as writer:
        assert files(writer.folder) == [s.file + ".part" for s in TWO]
        assert writer.place("b") == (TWO[0].file, len(TWO[0].header) + 4)
        fill(writer)
        assert files(writer.folder) == [s.file for s in TWO]
        assert not out.exists()
        copied = [(tmp_path / "tokenizer.json", "tokenizer.json")]
        copied.append((tmp_path / "tokenizer.json", "a/b/c.txt"))
        writer.finish({"config.json": b"{}", "hf_quant_config.json": b"[]"}, copied, 16)
    assert not writer.folder.exists()
    expected = ["a/b/c.txt", "config.json", "hf_quant_config.json", *(s.file for s in TWO)]
    assert files(out) == sorted([*expected, INDEX, "tokenizer.json"])
    with Checkpoint.open(out) as checkpoint:
        for name, data in FULL.items():
            assert checkpoint.raw(name).tobytes() == data
            shard, at = writer.place(name)
            assert (checkpoint.tensors[name].file, checkpoint.tensors[name].offset) == (shard, at)


def test_pieces_and_runs_make_the_same_bytes(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        writer.write("c", memoryview(b"cccc"), 4)
        writer.write("c", np.frombuffer(b"cc", np.uint16), 2)
        writer.write("c", bytearray(b"cc"))
        writer.write_run(["a", "b"], b"aaaabbbb")
        writer.finish({}, [], 0)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert {n: checkpoint.raw(n).tobytes() for n in FULL} == FULL


def test_an_empty_existing_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        fill(writer)
        writer.finish({}, [], 0)
    assert INDEX in files(tmp_path / "out")


def test_a_shard_of_empty_tensors_is_whole_at_once(tmp_path: Path) -> None:
    shards = layout_shards([spec("e", 0), spec("f", 0)])
    with CheckpointWriter(tmp_path / "out", shards, disk=Disk()) as writer:
        writer.write("e", b"")
        writer.sync()
        writer.finish({}, [], 0)
    assert Checkpoint.open(tmp_path / "out").array("f").shape == (0,)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda w: w.write("a", b"aaaaa"), "beyond its end"),
        (lambda w: w.write("a", b"aa", 3), "beyond its end"),
        (lambda w: [w.write("a", b"aaaa"), w.write("a", b"a")], "written twice"),
        (lambda w: w.write_run(["b", "a"], b"bbbbaaaa"), "do not lie"),
        (lambda w: w.write_run(["b", "c"], b"bbbbcccccccc"), "do not lie"),
        (lambda w: w.write_run(["a", "b"], b"aaaabbb"), "7 bytes"),
        (lambda w: w.write("a", np.zeros((2, 4), np.uint8)[:, ::2]), "contiguous"),
    ],
)
def test_our_own_mistakes_do_not_reach_the_file(tmp_path: Path, use: object, message: str) -> None:
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        with pytest.raises(AssertionError, match=message):
            use(writer)  # type: ignore[operator]


def test_arrays_of_every_dtype_are_written_without_a_copy() -> None:
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32, np.bool_):
        array = np.zeros((3, 2), dtype)
        view = as_bytes(array)
        assert len(view) == array.nbytes
        view[:] = b"\1" * array.nbytes
        assert array.view(np.uint8).all()
    assert len(as_bytes(np.array(1.0, np.float32))) == 4
    assert len(as_bytes(np.zeros((0, 3), np.float32))) == 0


def test_nothing_is_finished_before_every_byte_is_there(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        writer.write("a", b"aaaa")
        writer.write("b", b"bb")
        with pytest.raises(CheckpointError, match="2 tensors are not wholly written, 'b'"):
            writer.finish({}, [], 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "", INDEX, JOURNAL, TWO[0].file, "config.json"])
def test_side_files_may_not_hit_anything_else(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"")
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        fill(writer)
        with pytest.raises(CheckpointError, match="leads out|two files"):
            writer.finish({"config.json": b"{}"}, [(source, name)], 0)


def test_an_output_filled_meanwhile_keeps_the_work(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        fill(writer)
        (writer.folder / JOURNAL).write_bytes(b"")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_bytes(b"")
        with pytest.raises(CheckpointError, match="not empty"):
            writer.finish({}, [], 0)
    assert (writer.folder / JOURNAL).exists()


# ------------------------------------------------------------------------------- the start


def test_an_occupied_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_bytes(b"")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        CheckpointWriter(out, TWO, disk=Disk())
    with pytest.raises(CheckpointError, match="not a folder"):
        CheckpointWriter(out / "x", TWO, disk=Disk())
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        CheckpointWriter(tmp_path / "link", TWO, disk=Disk())
    with pytest.raises(CheckpointError, match="name a new one"):
        partial_folder(Path("/"))


def test_interrupted_work_is_not_overwritten_unasked(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path / "out", TWO, disk=Disk()).close()
    with pytest.raises(CheckpointError, match=r"out\.partial: .*--resume, or remove it"):
        CheckpointWriter(tmp_path / "out", TWO, disk=Disk())


def test_a_disk_too_small_is_found_before_anything_is_written(tmp_path: Path) -> None:
    shards = (ShardLayout("model-00001-of-00001.safetensors", (), b"", 2**62),)
    with pytest.raises(DoesNotFit, match=r"4294967296\.00 GiB to write"):
        CheckpointWriter(tmp_path / "a" / "out", shards, disk=Disk())
    assert list(tmp_path.iterdir()) == []


def begin(out: Path) -> CheckpointWriter:
    writer = CheckpointWriter(out, TWO, disk=Disk())
    writer.write("a", b"aaaa")
    writer.write("c", b"cccccccc")
    writer.sync()
    writer.close()
    return writer


def test_resuming_keeps_what_the_journal_has_and_nothing_else(tmp_path: Path) -> None:
    folder = begin(tmp_path / "out").folder
    assert files(folder) == [TWO[0].file + ".part", TWO[1].file]
    # c lies in a finished shard, but nobody said so: it is expected again.
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk(), resume=True, done=["a"]) as writer:
        assert files(folder) == [s.file + ".part" for s in TWO]
        writer.write("b", b"bbbb")
        with pytest.raises(CheckpointError, match="'c'"):
            writer.finish({}, [], 0)
        writer.write("c", b"cccccccc")
        writer.finish({}, [], 0)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert {n: checkpoint.raw(n).tobytes() for n in FULL} == FULL


def test_a_shard_whose_rename_was_lost_gets_its_name(tmp_path: Path) -> None:
    folder = begin(tmp_path / "out").folder
    (folder / TWO[1].file).rename(folder / (TWO[1].file + ".part"))
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk(), resume=True, done=["c"]):
        assert TWO[1].file in files(folder)


@pytest.mark.parametrize("damage", ["gone", "shorter", "other header"])
def test_done_tensors_whose_file_is_not_as_written_are_refused(tmp_path: Path, damage: str) -> None:
    folder = begin(tmp_path / "out").folder
    path = folder / TWO[1].file
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        os.truncate(path, TWO[1].size - 1)
    else:
        path.write_bytes(path.read_bytes().replace(b"U8", b"I8"))
    with pytest.raises(CheckpointError, match="gone or was changed; remove .*partial"):
        CheckpointWriter(tmp_path / "out", TWO, disk=Disk(), resume=True, done=["c"])


def test_a_stale_index_goes_and_shards_of_another_plan_are_refused_by_name(tmp_path: Path) -> None:
    folder = begin(tmp_path / "out").folder
    (folder / INDEX).write_bytes(b"{}")
    CheckpointWriter(tmp_path / "out", TWO, disk=Disk(), resume=True).close()
    before = files(folder)
    assert INDEX not in before
    three = layout_shards([spec("a", 4), spec("b", 4), spec("c", 8)], 4)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors\.part"):
        CheckpointWriter(tmp_path / "out", three, disk=Disk(), resume=True)
    assert files(folder) == before


def test_a_linked_work_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        CheckpointWriter(tmp_path / "out", TWO, disk=Disk(), resume=True)
    assert files(tmp_path / "elsewhere") == []


# -------------------------------------------------------------------------------- the disk


def test_after_a_failed_write_nothing_more_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        writer.write("a", b"aa")

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError) as caught:
            writer.write("a", b"aa", 2)
        at = len(TWO[0].header) + 2
        assert f"{TWO[0].file}.part: writing 2 bytes at {at}: No space left" in str(caught.value)
        assert "free space on that disk and run again with --resume" in str(caught.value)
        monkeypatch.undo()
        for again in (lambda: writer.write("b", b"bbbb"), writer.sync):
            with pytest.raises(CheckpointError, match="an earlier write failed"):
                again()


def test_a_flush_that_failed_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a lost write once; the second flush would succeed."""
    with CheckpointWriter(tmp_path / "out", TWO, disk=Disk()) as writer:
        writer.write("a", b"aa")

        def broken(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", broken)
        with pytest.raises(CheckpointError, match="flushing it: Input/output error; check the"):
            writer.sync()
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="an earlier write failed"):
            writer.sync()


def test_a_write_that_makes_no_progress_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    fd = disk.create(tmp_path / "x")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(CheckpointError, match="Input/output error"):
        disk.write_at(fd, memoryview(b"abc"), 0)
    disk.close(fd)


def test_space_is_reserved_where_the_file_system_can(tmp_path: Path) -> None:
    disk = Disk()
    fd = disk.create(tmp_path / "x")
    disk.allocate(fd, 1 << 20)
    assert disk.size(tmp_path / "x") == 1 << 20
    with pytest.raises(CheckpointError, match=r"x: reserving \d+ bytes: .*(space|large)"):
        disk.allocate(fd, 2**62)
    disk.close(fd)


class FakeLibrary:
    """A C library whose fallocate answers one errno after the other, then succeeds."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)

    def __call__(self, *_: object, **__: object) -> FakeLibrary:
        return self

    def fallocate(self, *_: int) -> int:
        if not self.codes:
            return 0
        disk_module.ctypes.set_errno(self.codes.pop(0))
        return -1


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINTR, None])
def test_without_reservation_the_size_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    if code is None:
        library: object = lambda *_, **__: object()  # noqa: E731
    else:
        # A function, as ctypes gives it: argtypes can be set.
        fake = FakeLibrary(code)
        fake.fallocate = lambda *a: FakeLibrary.fallocate(fake, *a)  # type: ignore[method-assign]
        library = fake
    monkeypatch.setattr(disk_module.ctypes, "CDLL", library)
    disk = Disk()
    fd = disk.create(tmp_path / "x")
    disk.allocate(fd, 100)
    disk.close(fd)
    # After EINTR the fake claims success without doing anything.
    assert disk.size(tmp_path / "x") == (0 if code == errno.EINTR else 100)


def test_a_plan_may_have_more_shards_than_open_files(tmp_path: Path) -> None:
    shards = layout_shards([spec(f"t{i}", 2) for i in range(40)], 2)
    before = len(os.listdir("/proc/self/fd"))
    with CheckpointWriter(tmp_path / "out", shards, disk=Disk()) as writer:
        assert len(os.listdir("/proc/self/fd")) == before
        for i in range(40):
            writer.write(f"t{i}", b"xy")
        assert len(os.listdir("/proc/self/fd")) == before
        writer.finish({}, [], 0)
