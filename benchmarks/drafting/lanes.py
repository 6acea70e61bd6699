"""Lanes: engines that answer the same requests, with drafts and without, step by step.

What counts is decoding: steps that compute no prompt, with all seats taken. Lanes take turns as the
contenders of benchmarks/engine do, or go side by side, some steps of each before the next: a
neighbour of the machine that takes half of its bandwidth for some seconds then slows all alike. A
ratio is the median of those of each round. Drafts change no token: lanes whose texts differ make
the benchmark fail.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from contest import Case as Case
from contest import Judge as Judge
from contest import Turn as Turn
from contest import add_options as add_options
from contest import write_rows

from nybble.api.conditions import conditions
from nybble.engine.engine import Engine
from nybble.engine.limits import EngineStats
from nybble.engine.request import Request, SamplingParams

Prompt = tuple[int, ...]
#: Tokens a second of each round, by lane and load.
Rates = Mapping[tuple[str, str], Sequence[float]]
WRONG_TEXTS = 1
#: Steps of one lane before the next, side by side.
SLICE = 8


@dataclass(frozen=True)
class Load(Case):
    """What a turn asks: `batch` of the prompts at a time, each to be continued by `generate` tokens
    or, where the text ends by itself, fewer."""

    name: str = ""
    prompts: tuple[Prompt, ...] = ()
    ignores_end: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{self.batch}"


def load(
    name: str,
    prompts: Sequence[Prompt],
    generate: int,
    batch: int,
    *,
    ignores_end: bool = False,
) -> Load:
    """Continue prompts, so many at a time. Ends the program if there are fewer."""
    if len(prompts) < batch:
        sys.exit(f"{name}: {batch} texts at a time need as many prompts, found {len(prompts)}")
    longest = max(map(len, prompts))
    return Load(longest, generate, batch, name, tuple(prompts), ignores_end)


@dataclass(frozen=True)
class Step:
    """One step of an engine: its seconds, the tokens it gave, the drafts it verified, for how many
    sequences, and whether all it computed was decoding."""

    seconds: float
    tokens: int
    drafted: int
    sequences: int
    is_decoding: bool


@dataclass(frozen=True)
class Run:
    """One turn of one lane: its steps, the text of each prompt, and what drafting came to."""

    steps: tuple[Step, ...]
    texts: tuple[tuple[int, ...], ...]
    batch: int
    verified: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    off: str

    @property
    def full(self) -> list[Step]:
        """The steps that count."""
        return [s for s in self.steps if s.is_decoding and s.sequences == self.batch]

    @property
    def turn(self) -> Turn:
        """What the judge wants to know."""
        return Turn(sum(s.tokens for s in self.full), sum(s.seconds for s in self.full))


@dataclass
class Lane:
    """An engine under a name. `make` gives the engine for a turn, the same one or a new one."""

    name: str
    make: Callable[[], Engine]
    runs: dict[str, list[Run]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: float = 0.0  # it runs in this process, which the judge counts itself

    def turn(self, case: Case) -> Turn:
        """Answer all prompts of a load."""
        assert isinstance(case, Load)
        return self.end(case, exhausted(self.begin(case)))

    def begin(self, case: Load) -> Generator[None, None, Run]:
        """Answer them, and after each step somebody else may do something."""
        return stepping(self.make(), case)

    def end(self, case: Load, run: Run) -> Turn:
        """Keep what came of it; what counts of that."""
        self.runs.setdefault(str(case), []).append(run)
        turn = self.counted(case, run)
        self.rates.setdefault(str(case), []).append(turn.tokens / turn.seconds)
        return turn

    def counted(self, case: Load, run: Run) -> Turn:
        """Tokens, in seconds."""
        return run.turn

    def close(self) -> None:
        """Nothing stays."""


def answer(engine: Engine, asked: Load, salt: bytes = b"") -> Run:
    """Have all prompts of a load continued, `batch` at a time; `salt` is the cache's."""
    return exhausted(stepping(engine, asked, salt))


def exhausted(steps: Generator[None, None, Run]) -> Run:
    """What comes of them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Run = end.value
            return found


def stepping(engine: Engine, asked: Load, salt: bytes = b"") -> Generator[None, None, Run]:
    """The same, and after each step somebody else may do something."""
    texts: dict[str, list[int]] = {}
    steps, waiting, before = [], list(enumerate(asked.prompts)), engine.stats
    params = SamplingParams(max_tokens=asked.generate, ignore_eos=asked.ignores_end)
    under_way, scheduler = 0, engine.scheduler
    while waiting or not engine.is_idle:
        while waiting and under_way < asked.batch:
            number, prompt = waiting.pop(0)
            texts[str(number)] = []
            engine.add(Request(str(number), prompt, params, salt=salt))
            under_way += 1
        # Figures of the engine would tell as well, and take longer where there are drafts.
        is_decoding = not scheduler.waiting and all(s.is_decoding for s in scheduler.running)
        began = time.perf_counter()
        events = engine.step()
        seconds = time.perf_counter() - began
        for event in events:
            if event.error:
                sys.exit(event.error)
            if event.token is not None:
                texts[event.request].append(event.token.id)
                under_way -= bool(event.token.finish)
        given = [event.request for event in events if event.token is not None]
        drafted = sum(event.drafted for event in events)
        steps.append(Step(seconds, len(given), drafted, len(set(given)), is_decoding))
        yield
    return _run(steps, texts, asked.batch, before, engine.stats)


def _run(
    steps: Sequence[Step],
    texts: dict[str, list[int]],
    batch: int,
    before: EngineStats,
    after: EngineStats,
) -> Run:
    return Run(
        tuple(steps),
        tuple(tuple(text) for text in texts.values()),
        batch,
        after.draft_steps - before.draft_steps,
        _more(before.drafted_by_position, after.drafted_by_position),
        _more(before.accepted_by_position, after.accepted_by_position),
        after.drafting,
    )


def _more(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(before, after, strict=True))


class SideBySide:
    """All lanes as one contender: SLICE steps of each, in a drawn order, and again, until all have
    answered."""

    name = "all lanes"
    cpu_s = 0.0  # they run in this process

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes, self._order = lanes, random.Random(0)

    def turn(self, case: Case) -> Turn:
        """Tokens and seconds of all; each lane keeps its own run."""
        assert isinstance(case, Load)
        going = [(lane, lane.begin(case)) for lane in self.lanes]
        turns = []
        while going:
            # Who comes after a lane whose MTP head has filled the caches is slower for a step.
            self._order.shuffle(going)
            for one in tuple(going):
                lane, steps = one
                try:
                    for _ in range(SLICE):
                        next(steps)
                except StopIteration as end:
                    turns.append(lane.end(case, end.value))
                    going.remove(one)
        return Turn(sum(t.tokens for t in turns), sum(t.seconds for t in turns))

    def close(self) -> None:
        """Nothing stays."""


# ------------------------------------------------------------------------------------------- report

HEAD = ("load", "lane", "tokens/s", "min-max", "of off", "ms a step", "tokens a step")
DRAFT_HEAD = ("drafts a step", "accepted by position", "it says")


def race(
    lanes: Sequence[Lane],
    loads: Sequence[Load],
    options: argparse.Namespace,
    *,
    side_by_side: bool = False,
) -> None:
    """Run all lanes and print the table; the first lane is the one without drafts. `side_by_side`:
    of engines that share nothing. Ends with status WRONG_TEXTS if any text differs from its."""
    judge = Judge(options.rounds, options.wait, options.even_if_busy)
    rates = compare(judge, lanes, loads) if side_by_side else judge.rates(lanes, loads)
    print_head((*HEAD, *DRAFT_HEAD), names=2)
    for case in loads:
        plain = rates[lanes[0].name, str(case)]
        for lane in lanes:
            found = rates[lane.name, str(case)]
            print_row([str(case), *_speed(lane, found, plain), *_cells(lane.runs[str(case)][1:])])
    conclude(judge, rates, options)
    different = [
        f"{lane.name}, {case}: {count}"
        for lane in lanes
        for case in loads
        if (count := _different(lane, lanes[0], str(case)))
    ]
    if different:
        print(f"\nTEXTS DIFFER from those of {lanes[0].name}: " + "; ".join(different))
        sys.exit(WRONG_TEXTS)
    print(f"\nAll texts are those of {lanes[0].name}, token for token.")


def compare(judge: Judge, lanes: Sequence[Lane], loads: Sequence[Load]) -> Rates:
    """The rates of each round, of lanes side by side."""
    judge.rates([SideBySide(lanes)], loads)
    return {
        (lane.name, str(case)): lane.rates[str(case)][-judge.rounds :]
        for lane in lanes
        for case in loads
    }


def _different(lane: Lane, plain: Lane, case: str) -> int:
    """How many texts differ, of all turns, those too that were taken again."""
    expected = plain.runs[case][0].texts
    return sum(
        own != other
        for run in (*lane.runs[case], *plain.runs[case])
        for own, other in zip(run.texts, expected, strict=True)
    )


def _speed(lane: Lane, found: Sequence[float], plain: Sequence[float]) -> list[str]:
    ratio = paired_ratio(found, plain)
    spread = f"{min(found):,.1f}-{max(found):,.1f}"
    return [lane.name, f"{statistics.median(found):,.1f}", spread, f"{ratio:.3f}"]


def paired_ratio(found: Iterable[float], plain: Iterable[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(found, plain, strict=True))


def _cells(runs: Sequence[Run]) -> list[str]:
    steps = [step for run in runs for step in run.full]
    seats = sum(step.sequences for step in steps)
    drafted = [sum(n) for n in zip(*(run.drafted for run in runs), strict=True)]
    accepted = [sum(n) for n in zip(*(run.accepted for run in runs), strict=True)]
    shares = ", ".join(f"{a / d:.2f}" for a, d in zip(accepted, drafted, strict=True) if d)
    return [
        f"{1e3 * statistics.median(step.seconds for step in steps):.3f}",
        f"{sum(step.tokens for step in steps) / seats:.2f}",
        f"{sum(step.drafted for step in steps) / seats:.2f}",
        shares or "-",
        runs[-1].off or "on",
    ]


def print_head(names_of_columns: Sequence[str], names: int = 1) -> None:
    """The first two lines of a Markdown table, whose first columns are names."""
    print(f"| {' | '.join(names_of_columns)} |")
    print("|" + "---|" * names + "--:|" * (len(names_of_columns) - names), flush=True)


def print_row(cells: Sequence[str]) -> None:
    """A line of it."""
    print(f"| {' | '.join(cells)} |", flush=True)


def conclude(judge: Judge, rates: Rates, options: argparse.Namespace) -> None:
    """Say what was measured where while others used how much, and write the rows asked for."""
    line = conditions(options.threads, statistics.median(judge.shares))
    rounds, most = "round" if options.rounds == 1 else "rounds", 100 * max(judge.shares)
    print(f"\nmedians of {options.rounds} {rounds}; {line}; at most {most:.0f} %")
    if options.csv:
        write_rows(options.csv, options.checkpoint.name, rates, str(line))


def numbers(text: str) -> tuple[int, ...]:
    """An option like 1,4,16."""
    return tuple(int(word) for word in text.split(","))


def shares(text: str) -> tuple[float, ...]:
    """An option like 0.6,0.85."""
    return tuple(float(word) for word in text.split(","))
