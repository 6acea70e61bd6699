"""`nybble bench engine`: what is run, what is printed, what is refused. No speed is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from nybble.api.bench import BenchOptions, Case, bench_engine, measure
from nybble.api.llm import OpenOptions
from nybble.cli.bench import app
from nybble.engine.runner import Work
from nybble.errors import ContextTooLong, EngineError, NybbleError
from nybble.kernels import dispatch, machine_limits
from nybble.kernels.machine_limits import Limits
from nybble.models.numbers import Numbers

MODEL = Path(__file__).parents[2] / "models" / "hybrid-chat-mtp"
LIMITS = Limits(1, 1e10, {"f32": 1e11, "bf16": 2e11})

needs_kernels = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")


class Recording:
    """A runner that keeps what it is asked; logits are zero, or NaN."""

    vocab = 97

    def __init__(self, fill: float = 0.0) -> None:
        self.asked: list[list[Work]] = []
        self.fill = fill

    def forward(self, works: Sequence[Work]) -> Tensor:
        self.asked.append(list(works))
        return torch.full((sum(w.outputs for w in works), self.vocab), self.fill)


def engine_of(runner: Recording, pages: int = 64, slots: int = 8) -> Any:
    options = SimpleNamespace(page_tokens=16, max_batched_tokens=150)
    return SimpleNamespace(
        runner=runner,
        options=options,
        pages=Numbers(pages, "pages"),
        slots=Numbers(slots, "slots"),
        scheduler=SimpleNamespace(slots_each=1),
    )


def test_a_prompt_is_cut_at_multiples_of_64_and_ends_in_one_row_of_logits() -> None:
    runner = Recording()
    engine = engine_of(runner)
    found = measure(engine, BenchOptions(300, 0, (1,), 2))
    assert list(found) == [Case(300, 0, 1)]
    assert len(found[Case(300, 0, 1)]) == 2
    works = [w for [w] in runner.asked]
    assert len(works) == 3 * 3  # a round to warm up, and two
    assert [(w.length, len(w.tokens), w.outputs) for w in works[:3]] == [
        (0, 128, 0),
        (128, 128, 0),
        (256, 44, 1),
    ]
    assert not any(w.is_recurrent for w in works)
    assert all(16 * len(w.pages) >= w.length + len(w.tokens) for w in works)
    assert works[0].tokens != works[3].tokens  # other tokens, other experts, in each round
    assert engine.pages.free == 64
    assert engine.slots.free == 8


def test_decoding_moves_all_sequences_on_by_a_token_a_step() -> None:
    runner = Recording()
    measure(engine_of(runner), BenchOptions(0, 20, (3,), 1))
    assert len(runner.asked) == 2 * 20
    for at, works in enumerate(runner.asked[20:]):
        assert [(len(w.tokens), w.length, w.outputs, w.is_recurrent) for w in works] == [
            (1, at, 1, True)
        ] * 3
        pages = [page for w in works for page in w.pages]
        assert len(set(pages)) == len(pages) == 3 * 2
        assert len({w.slot for w in works}) == 3


def test_measurements_take_turns() -> None:
    runner = Recording()
    measure(engine_of(runner), BenchOptions(5, 1, (1, 2), 2))
    kinds = [(len(works), len(works[0].tokens)) for works in runner.asked]
    assert kinds == [(1, 5), (1, 1), (2, 1)] * 3


def test_nothing_stays_lent_after_an_error() -> None:
    engine = engine_of(Recording(float("nan")))
    with pytest.raises(EngineError, match="not finite"):
        measure(engine, BenchOptions(5, 0, (1,), 1))
    small = engine_of(Recording(), pages=3)
    with pytest.raises(NybbleError, match="pages"):
        measure(small, BenchOptions(0, 20, (2,), 1))
    for left in (engine, small):
        assert left.pages.free == left.pages.count
        assert left.slots.free == left.slots.count


TALK = ["engine", str(MODEL), "--multi-turn", "--turns", "2", "-p", "200", "-g", "6"]


@needs_kernels
def test_a_conversation_is_measured_with_cache_and_drafts_and_without() -> None:
    asked = [*TALK, "--repeat", "2", "--memory", "0.1", "--draft-tokens", "2", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schema"] == "nybble.bench.multi-turn/1"
    assert "drafting: mtp, up to 2 tokens" in found["ahead"]
    first, second = found["turns"]
    assert (first["known_tokens"], first["cached_tokens"], first["hit_rate"]) == (0, 0, None)
    assert 200 < first["prompt_tokens"] < second["known_tokens"] < second["prompt_tokens"]
    assert second["known_tokens"] - first["prompt_tokens"] == 6 - 1
    # Of what was computed before, all but the part of a page that is not full.
    assert 0 <= second["known_tokens"] - second["cached_tokens"] < 64
    assert (
        found["hit_rate"]
        == second["hit_rate"]
        == second["cached_tokens"] / (second["known_tokens"])
    )
    assert found["equal_answers"] == 2
    assert len(first["samples"]) == 2
    assert all(0 <= share <= 1 for share in found["acceptance_by_position"])
    assert found["seconds_saved"] == pytest.approx(
        found["first_token_seconds_without_cache"] - found["first_token_seconds"]
    )


@needs_kernels
def test_what_is_off_saves_nothing() -> None:
    done = CliRunner().invoke(app, [*TALK, "--no-prefix-cache", "--draft", "off"])
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    figures = dict(zip(cells[0], cells[-1], strict=True))
    assert figures["test"] == "all"
    assert (figures["hit"], figures["accepted"], figures["a step"]) == ("0.0 %", "-", "1.00")
    assert "prefix cache: off; drafting: off" in done.stdout


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (["--turns", "3"], "--turns are those of --multi-turn"),
        (["--draft", "off"], "measured by --multi-turn"),
        (["--no-prefix-cache"], "measured by --multi-turn"),
        (["--multi-turn", "--batch", "2"], "no --batch"),
        (["--multi-turn", "--turns", "65"], "turns must be from 1 to 64"),
        (["--multi-turn", "-g", "1"], "answer must be from 2"),
        (["--multi-turn", "--draft-tokens", "many"], "write auto"),
    ],
)
def test_flags_without_a_place_are_refused(asked: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, ["engine", str(MODEL), *asked], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert reason in " ".join(done.output.replace("│", " ").split())


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits without two seconds of measuring."""
    monkeypatch.setattr(machine_limits, "measure", lambda threads: LIMITS)


@needs_kernels
def test_the_table_and_its_conditions(quick_limits: None) -> None:
    asked = ["engine", str(MODEL), "--prompt", "70", "--generate", "3", "--batch", "1,3"]
    done = CliRunner().invoke(app, [*asked, "--repeat", "2", "--threads", "1"])
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    assert len({len(row) for row in cells}) == 1
    assert [row[cells[0].index("test")] for row in cells[2:]] == ["pp70", "tg3", "tg3@3"]
    assert all("±" in row[cells[0].index("tokens/s")] for row in cells[2:])
    assert "limits: read 10.0 GB/s" in done.stdout
    assert "other processes" in done.stdout.splitlines()[-1]


@needs_kernels
def test_the_document(quick_limits: None, tmp_path: Path) -> None:
    config = tiny.config("llama", vocab_size=4096)
    tiny.write(tmp_path, config, tiny.tensors(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    asked = ["engine", str(tmp_path), "-p", "0", "-g", "4", "-b", "2", "--repeat", "3", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schema"] == "nybble.bench.engine/1"
    assert found["format"] == "bf16"
    assert found["limits"]["read_bytes_per_second"] == 1e10
    [test] = found["tests"]
    assert (test["test"], len(test["samples"])) == ("tg4@2", 3)
    rate, nbytes = test["tokens_per_second"], test["bytes_per_run"]
    assert test["of_read_bandwidth"] == pytest.approx(nbytes * rate / 8 / 1e10)
    assert found["conditions"]["threads"] == dispatch.default_threads()


@needs_kernels
def test_longer_than_the_context_is_refused(quick_limits: None) -> None:
    with pytest.raises(ContextTooLong):
        bench_engine(MODEL, BenchOptions(1 << 20, 0, (1,), 1), OpenOptions())


@pytest.mark.parametrize(
    "wrong", [["--batch", "1;2"], ["--batch", "0"], ["-p", "0", "-g", "0"], ["--precision", "int3"]]
)
def test_wrong_words_are_usage_errors(wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["engine", str(MODEL), *wrong])
    assert done.exit_code == 2
