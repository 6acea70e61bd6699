"""The journal of a run: which units of work are on the disk, so that an interrupted run can go on.

`journal.jsonl` in the work folder. The first line says what the run is (source, plan, options,
version); each later one lists units whose data were flushed before it was written. Every line
carries a CRC: a line torn by a crash is recognised, and its units are done again. Knows neither
tensors nor what a unit is; only that it is a string.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from nybble.checkpoint.disk import Disk
from nybble.errors import CheckpointError

log = logging.getLogger("nybble")

SCHEMA = "nybble.journal/1"
_LIMIT = 1 << 30  # bytes read back; a unit takes some 60, a run has 100,000 at most
_SHOWN = 5  # fields of a header that differs; input scales are one each


class Journal:
    """An open journal; `done` holds the units committed so far.

    Order of a run: `resume` before the writer is made (its `done` tells the writer what to keep),
    `create` after (the writer makes the folder). `commit` only what `CheckpointWriter.sync` has
    flushed.
    """

    def __init__(self, path: Path, fd: int, end: int, done: set[str], disk: Disk) -> None:
        self.path = path
        self.done = done
        self._fd: int | None = fd
        self._end = end
        self._disk = disk

    @classmethod
    def create(cls, path: Path, header: Mapping[str, object], *, disk: Disk) -> Journal:
        """Start a journal for the run that `header` describes (JSON values); replaces one there."""
        line = _line(_with_schema(header))
        part = path.with_name(path.name + ".part")
        fd = disk.create(part)
        try:
            disk.lock(fd)
            disk.append(fd, line)
            disk.sync(fd)
            disk.rename(part, path)  # so that no journal ever has half a header
            disk.sync_folder(path.parent)
        except BaseException:
            disk.close(fd)
            raise
        return cls(path, fd, len(line), set(), disk)

    @classmethod
    def resume(
        cls,
        path: Path,
        header: Mapping[str, object],
        *,
        disk: Disk,
        machine: str = "",
        allow_mixed: bool = False,
    ) -> Journal:
        """Open the journal of an interrupted run; a torn last line is cut off.

        Fields whose dotted name begins with `machine` may differ where `allow_mixed`. Raises
        CheckpointError if `header` is not the one that the run began with, naming the fields, if
        the journal is damaged, or if another process is writing it.
        """
        fd = disk.open_existing(path)
        try:
            disk.lock(fd)
            data = disk.read(path, _LIMIT)
            records, end = _parse(data, path)
            mixed = _differing(records[0], _with_schema(header))
            of_machine = [d for d in mixed if machine and d.startswith(machine)]
            if not allow_mixed or len(of_machine) < len(mixed):
                _refuse_differing(mixed, path, is_machine=len(of_machine) == len(mixed))
            elif mixed:
                log.warning("%s: continued although %s", path, "; ".join(mixed))
            if end < len(data):
                disk.truncate(fd, end)
                disk.sync(fd)
        except BaseException:
            disk.close(fd)
            raise
        return cls(path, fd, end, {unit for r in records[1:] for unit in _units(r, path)}, disk)

    def commit(self, units: Iterable[str]) -> None:
        """Record that the data of these units are flushed; returns when the record is, too."""
        assert self._fd is not None, "the journal is closed"
        new = list(units)
        if not new:
            return
        line = _line({"done": new})
        # At a place of our own, not at the end: what a failed attempt left is overwritten.
        self._disk.write_at(self._fd, memoryview(line), self._end)
        self._disk.sync(self._fd)
        self._end += len(line)
        self.done.update(new)

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._disk.close(fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_header(path: Path, *, disk: Disk) -> dict[str, object]:
    """What the run of this journal began with, its journal left as it is.

    Raises CheckpointError if the journal is damaged.
    """
    return _parse(disk.read(path, _LIMIT), path)[0][0]


def refuse_other(path: Path, asked: Mapping[str, object], *, disk: Disk) -> None:
    """Raise CheckpointError unless the run of this journal began with these fields, whatever else
    it began with: what can be known before hours of work. The journal is left as it is."""
    then = read_header(path, disk=disk)
    differing = _differing({key: then.get(key) for key in asked}, _with_schema(asked))
    _refuse_differing(
        [d for d in differing if not d.startswith("schema: ")], path, is_machine=False
    )


def _with_schema(header: Mapping[str, object]) -> dict[str, object]:
    """The header as it comes back from the file: tuples are lists there."""
    value = json.loads(json.dumps({"schema": SCHEMA, **header}))
    assert isinstance(value, dict)
    return value


def _crc(record: Mapping[str, object]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps({**record, "crc": _crc(record)}, separators=(",", ":")).encode() + b"\n"


def _parse(data: bytes, path: Path) -> tuple[list[dict[str, object]], int]:
    """The whole records, and where the last of them ends."""
    records = []
    end = 0
    for line in data.splitlines(keepends=True):
        record = _record(line)
        if record is None:
            break
        records.append(record)
        end += len(line)
    # Each commit is flushed before the next one begins, so a crash can spoil the last line only.
    if not records or b"\n" in data[end:-1]:
        raise CheckpointError(
            f"{path}: line {len(records) + 1} is damaged; remove {path.parent} and start again"
        )
    return records, end


def _record(line: bytes) -> dict[str, object] | None:
    """A line's record without its CRC, or None if the line is not whole."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None
    crc = record.pop("crc", None)
    return record if crc == _crc(record) else None


def _units(record: dict[str, object], path: Path) -> list[str]:
    units = record.get("done")
    if not isinstance(units, list) or not all(isinstance(u, str) for u in units):
        raise CheckpointError(
            f"{path}: a line that lists no units; remove {path.parent} and start again"
        )
    return units


def _differing(then: dict[str, object], now: dict[str, object]) -> list[str]:
    """The fields that differ, each with both values."""
    before, after = dict(_flatten(then)), dict(_flatten(now))
    return [
        f"{k}: {before.get(k, 'absent')} then, {after.get(k, 'absent')} now"
        for k in {**before, **after}
        if before.get(k) != after.get(k)
    ]


def _refuse_differing(fields: Sequence[str], path: Path, *, is_machine: bool) -> None:
    if not fields:
        return
    shown = "; ".join(fields[:_SHOWN])
    shown += f" (and {len(fields) - _SHOWN} more)" if len(fields) > _SHOWN else ""
    otherwise = (
        "; with --allow-mixed it goes on here, with bytes that neither machine alone would make"
        if is_machine
        else ""
    )
    raise CheckpointError(
        f"{path}: the interrupted run differs from this one in {shown}; "
        f"run with the same source and options, or remove {path.parent} and start again{otherwise}"
    )


def _flatten(record: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, value as JSON) of every leaf."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
