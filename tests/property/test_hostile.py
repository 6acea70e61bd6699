"""Hostile files end with a result or a NybbleError, in little time and memory.

Ten thousand mutated inputs here; `scripts/fuzz` runs millions. Every find is a file in
fixtures/hostile and is tried for ever.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hostile_inputs
from hostile_inputs import CLEAN, FIXTURES, READERS, TooSlow, base, load, try_input, watched
from nybble.errors import CheckpointError, NybbleError, TextError
from nybble.text.chat import ChatTemplate

ROOT = Path(__file__).parents[2]


def test_ten_thousand_hostile_inputs_end_as_they_may() -> None:
    """In a process of its own, as its memory is limited and finds may end it."""
    command = [sys.executable, str(ROOT / "scripts" / "fuzz"), "--inputs", "10000", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.startswith("10,000 inputs")
    assert " 0 finds" in done.stdout


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda p: p.stem)
def test_a_find_stays_mended(path: Path) -> None:
    reader, files = load(path)
    with watched():
        outcome, find = try_input(reader, files)
    assert find is None, find.trace
    assert outcome.startswith(("ok", *(cls.__name__ for cls in _errors(NybbleError))))


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.jinja")), ids=lambda p: p.stem)
def test_a_hostile_template_ends_in_little_memory(path: Path) -> None:
    """Rendered in the process that asks, as `nybble generate` does."""
    with watched():
        template = ChatTemplate.compile(path.name, path.read_text(), Path("none"), {})
        with pytest.raises(TextError, match=r"more than|at most|asks for|not for|is for"):
            template.render([{"role": "user", "content": "x"}], time_limit_s=5.0)


def test_rendering_ends_when_its_time_is_over() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate.compile("long", source, Path("none"), {})
    with pytest.raises(TextError, match="longer than it was given"):
        template.render([{"role": "user", "content": "x"}], time_limit_s=0.05)


def _errors(cls: type[NybbleError]) -> list[type[NybbleError]]:
    return [cls, *(one for sub in cls.__subclasses__() for one in _errors(sub))]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_the_seeds_are_sound(reader: hostile_inputs.Reader) -> None:
    """A mutation of what is refused anyway would test nothing."""
    for files in reader.seeds():
        assert reader.read(files) is not None


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_the_same_seed_tries_the_same_inputs(reader: hostile_inputs.Reader) -> None:
    count = 10 if reader.name == "folder" else 150
    one, other = (hostile_inputs.run(count, "same", reader.name) for _ in range(2))
    assert one.outcomes == other.outcomes
    assert one.total == count
    # Mutations that are all refused for one reason would reach nothing.
    assert len(one.outcomes) > 1


def test_what_must_not_happen_is_a_find() -> None:
    def endless(files: hostile_inputs.Files) -> str:
        while True:
            pass

    def hungry(files: hostile_inputs.Files) -> str:
        return str(len(bytearray(2 * hostile_inputs.MEMORY_LIMIT)))

    def wrong(files: hostile_inputs.Files) -> str:
        raise KeyError("dtype")

    def refused(files: hostile_inputs.Files) -> str:
        raise CheckpointError("file: what is wrong")

    with watched():
        for read, error in ((hungry, MemoryError), (wrong, KeyError), (endless, TooSlow)):
            outcome, find = try_input(hostile_inputs.Reader("x", read, list, 1), {})
            assert find is not None
            assert find.error.startswith(error.__name__), outcome
        assert try_input(hostile_inputs.Reader("x", refused, list, 1), {})[1] is None


def test_a_find_is_written_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile_inputs, "FIXTURES", tmp_path)
    clean = {name: base(name) for name in ("nybble-ct", "nybble-modelopt")}
    files = {**clean["nybble-ct"], "config.json": b"\xff"}
    del files["tokenizer.json"]
    find = hostile_inputs.Find("folder", files, "E: x", "there")
    path = hostile_inputs.save(find, "one", clean)
    assert json.loads(path.read_text())["base"] == "nybble-ct"
    assert path.stat().st_size < 1000
    reader, again = load(path)
    assert (reader.name, again) == ("folder", files)
    assert (CLEAN / "nybble-ct" / "tokenizer.json").exists()
