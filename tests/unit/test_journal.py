"""What the journal remembers, recognises as torn, and whose work it refuses to go on with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nybble.checkpoint.disk import Disk
from nybble.errors import CheckpointError
from nybble.quantize.journal import SCHEMA, Journal

HEADER = {
    "source": "f00d",
    "plan": "beef",
    "options": {"recipe": "nvfp4", "roles": ("mlp", "attention")},
    "version": "0.1.0",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    with Journal.create(path, HEADER, disk=Disk()) as journal:
        journal.commit(["a", "b"])
        journal.commit([])
        journal.commit(["c \u00e9\n"])
        assert journal.done == {"a", "b", "c \u00e9\n"}
    return path


def resume(path: Path, **changes: object) -> Journal:
    return Journal.resume(path, {**HEADER, **changes}, disk=Disk())


def test_committed_units_come_back_and_more_follow(path: Path) -> None:
    with resume(path) as journal:
        assert journal.done == {"a", "b", "c \u00e9\n"}
        journal.commit(["d"])
    with resume(path) as journal:
        assert journal.done == {"a", "b", "c \u00e9\n", "d"}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["schema"] == SCHEMA
    assert [line.get("done") for line in lines] == [None, ["a", "b"], ["c \u00e9\n"], ["d"]]


def test_only_the_journal_itself_is_left(path: Path) -> None:
    assert os.listdir(path.parent) == ["journal.jsonl"]


def test_a_torn_last_line_is_cut_off_at_any_byte(path: Path) -> None:
    whole = path.read_bytes()
    end = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(end, len(whole)):
        path.write_bytes(whole[:cut])
        with resume(path) as journal:
            assert journal.done == {"a", "b"}
            assert path.read_bytes() == whole[:end]
            journal.commit(["c \u00e9\n"])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 30, b"\0" * 30 + b"\n", b"[]\n", b'{"done":["x"]}\n'])
def test_a_last_line_without_its_crc_counts_for_nothing(path: Path, tail: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with resume(path) as journal:
        assert journal.done == {"a", "b", "c \u00e9\n"}
    assert path.read_bytes() == whole


def test_damage_before_the_last_line_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"x"'))
    with pytest.raises(CheckpointError, match="line 2 is damaged; remove .* and start again"):
        resume(path)


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"{"])
def test_a_journal_without_its_first_line_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        resume(path)


def test_a_line_of_another_kind_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    header = path.read_bytes()
    path.write_bytes(header + header)
    with pytest.raises(CheckpointError, match="lists no units"):
        resume(path)


def test_another_run_is_refused_by_what_differs(path: Path) -> None:
    changed = {"recipe": "fp8", "roles": ["mlp", "attention"], "threads": 4}
    with pytest.raises(CheckpointError) as caught:
        resume(path, plan="dead", options=changed)
    message = str(caught.value)
    assert 'plan: "beef" then, "dead" now' in message
    assert 'options.recipe: "nvfp4" then, "fp8" now' in message
    assert "options.threads: absent then, 4 now" in message
    assert "roles" not in message
    assert "source:" not in message
    assert f"run with the same source and options, or remove {path.parent}" in message


def test_two_processes_do_not_share_a_journal(path: Path) -> None:
    with resume(path), pytest.raises(CheckpointError, match="another nybble process is writing"):
        resume(path)
    resume(path).close()


def test_a_file_system_without_locks_is_good_enough(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("nybble.checkpoint.disk.fcntl.flock", no_locks)
    with resume(path) as journal:
        journal.commit(["d"])


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"journal\.jsonl: opening it: No such file"):
        resume(tmp_path / "journal.jsonl")


def test_a_failed_start_leaves_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        Journal.create(tmp_path / "journal.jsonl", HEADER, disk=Disk())
    assert not (tmp_path / "journal.jsonl").exists()


def test_what_a_failed_commit_left_is_overwritten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with resume(path) as journal:
        pwrite = os.pwrite
        writes = []

        def once_half(fd: int, data: memoryview, offset: int) -> int:
            writes.append(offset)
            if len(writes) > 1:
                raise OSError(28, "No space left on device")
            return pwrite(fd, data[:7], offset)

        monkeypatch.setattr(os, "pwrite", once_half)
        with pytest.raises(CheckpointError, match="No space left"):
            journal.commit(["long name of a unit"])
        monkeypatch.undo()
        assert "long name of a unit" not in journal.done
        journal.commit(["d"])
    with resume(path) as journal:
        assert journal.done == {"a", "b", "c \u00e9\n", "d"}
