"""`nybble bench engine`: tokens a second of prefill and decoding, beside what this machine could
reach at most, measured in the same run.

Steps go to the engine's runner directly, as llama-bench does it: no tokenizing, no sampling. The
tokens are random, the context empty where decoding begins.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nybble.api.conditions import Conditions, Watch, conditions
from nybble.api.extras import needs_torch
from nybble.api.traffic import Traffic, operand, read_traffic
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EngineError
from nybble.kernels import machine_limits
from nybble.kernels.machine_limits import Limits
from nybble.progress import Progress

if TYPE_CHECKING:
    from nybble.api.llm import OpenOptions
    from nybble.engine.engine import Engine
    from nybble.engine.runner import Work

#: Where a prompt is cut, its parts begin at multiples of this.
CHUNK = 64


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Sizes: tokens of a prompt, tokens generated after it, sequences side by side, and how often
    each is measured. 0 tokens leave that half out."""

    prompt: int = 512
    generate: int = 128
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, least in (("prompt", 0), ("generate", 0), ("repeats", 1)):
            value = getattr(self, name)
            if not least <= value <= 1 << 20:
                raise EngineError(f"{name} must be from {least} to {1 << 20:,}, found {value}")
        if not self.prompt + self.generate:
            raise EngineError("nothing to measure: prompt and generate are both 0")
        if not self.batches or not all(1 <= b <= 1024 for b in self.batches):
            raise EngineError(f"batches must be from 1 to 1,024, found {self.batches}")

    @property
    def cases(self) -> tuple[Case, ...]:
        """What is measured, in the order of the table."""
        prefill = (Case(self.prompt, 0, 1),) if self.prompt else ()
        batches = self.batches if self.generate else ()
        return (*prefill, *(Case(0, self.generate, batch) for batch in batches))


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt of so many tokens, or so many steps of decoding for `batch` sequences."""

    prompt: int
    generate: int
    batch: int

    def __str__(self) -> str:
        """As llama-bench names them: pp512, tg128; tg128@8 with eight sequences."""
        if self.prompt:
            return f"pp{self.prompt}"
        return f"tg{self.generate}" + (f"@{self.batch}" if self.batch > 1 else "")

    @property
    def tokens(self) -> int:
        """How many are computed in one measurement."""
        return self.prompt or self.generate * self.batch


@dataclass(frozen=True, slots=True)
class Row:
    """One case: seconds of each measurement, and the least that reading and multiplying take at the
    machine's limits."""

    case: Case
    seconds: tuple[float, ...]
    read_bytes: float
    read_s: float
    compute_s: float

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens a second of each measurement."""
        return tuple(self.case.tokens / s for s in self.seconds)

    @property
    def tokens_per_s(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 for a single measurement."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def of_read(self) -> float:
        """The share of the measured read bandwidth, over packed bytes."""
        return self.read_s / statistics.median(self.seconds)

    @property
    def of_compute(self) -> float:
        """The share of the measured peak of the operands' type."""
        return self.compute_s / statistics.median(self.seconds)

    @property
    def of_roof(self) -> float:
        """The share of the lower of the two roofs."""
        return max(self.of_read, self.of_compute)

    def as_json(self) -> dict[str, object]:
        """One entry of `tests`."""
        return {
            "test": str(self.case),
            "prompt": self.case.prompt,
            "generate": self.case.generate,
            "batch": self.case.batch,
            "tokens_per_second": self.tokens_per_s,
            "standard_deviation": self.deviation,
            "samples": list(self.rates),
            "bytes_per_run": self.read_bytes,
            "of_read_bandwidth": self.of_read,
            "of_compute": self.of_compute,
            "of_roof": self.of_roof,
        }


@dataclass(frozen=True, slots=True)
class EngineBench:
    """All tests of one checkpoint, and what they are measured against."""

    model: str
    traffic: Traffic
    precision: str
    kv_cache: str
    limits: Limits
    rows: tuple[Row, ...]
    conditions: Conditions

    @property
    def format(self) -> str:
        """How the linears are stored."""
        return "+".join(self.traffic.formats)

    @property
    def operand(self) -> str:
        """The type that four-bit weights, or all where there are none, are multiplied in."""
        has_packed = bool(self.traffic.dense.four_bit + self.traffic.routed.four_bit)
        return operand(self.precision, self.limits.operations_s, is_four_bit=has_packed)

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.bench.engine/1`."""
        return {
            "schema": "nybble.bench.engine/1",
            "model": self.model,
            "format": self.format,
            "bytes": self.traffic.stored_bytes,
            "parameters": self.traffic.parameters,
            "precision": self.precision,
            "kv_cache": self.kv_cache,
            "operand": self.operand,
            "limits": {
                "threads": self.limits.threads,
                "read_bytes_per_second": self.limits.read_bytes_s,
                "operations_per_second": self.limits.operations_s,
            },
            "tests": [row.as_json() for row in self.rows],
            "conditions": {
                name: getattr(self.conditions, name) for name in Conditions.__dataclass_fields__
            },
        }


def bench_engine(
    model: str | PathLike[str],
    options: BenchOptions | None = None,
    opening: OpenOptions | None = None,
    *,
    progress: Progress | None = None,
) -> EngineBench:
    """Measure a local checkpoint. Of `opening`, sequences and context follow the tests.

    The limits are measured before and after, and the better of the two counts. Raises MissingExtra
    without torch, KernelUnavailable without compiled kernels, ContextTooLong for tests longer than
    the model's context, and what opening an engine raises.
    """
    needs_torch("bench engine")
    from nybble.api.llm import OpenOptions, open_engine
    from nybble.kernels.dispatch import default_threads

    options, opening = options or BenchOptions(), opening or OpenOptions()
    progress = progress or Progress()
    threads = opening.threads or default_threads()
    folder = Path(model)
    with Checkpoint.open(folder, headers_only=True) as checkpoint:
        traffic = read_traffic(checkpoint)
    watch = Watch()
    limits = machine_limits.measure(threads)
    engine = open_engine(
        folder,
        replace(
            opening,
            max_sequences=max(options.batches),
            max_batched_tokens=max(opening.max_batched_tokens, max(options.batches) + CHUNK),
            max_context=max(options.prompt, options.generate),
        ),
    )
    measured = measure(engine, options, progress)
    limits = limits.or_better(machine_limits.measure(threads))
    share = watch.others_share()
    kv_cache, width = _kv_cache(engine)
    rows = tuple(
        _row(case, seconds, traffic, limits, opening.precision, width, _chunk(engine))
        for case, seconds in measured.items()
    )
    name = folder.resolve().name
    found = conditions(threads, share)
    return EngineBench(name, traffic, opening.precision, kv_cache, limits, rows, found)


# --------------------------------------------------------------------------------------- measuring


def measure(
    engine: Engine, options: BenchOptions, progress: Progress | None = None
) -> dict[Case, tuple[float, ...]]:
    """Seconds of every repeat of every case, one case after the other and then again, so that a
    busy moment hits all of them. The first round is not counted."""
    progress = progress or Progress()
    cases = options.cases
    progress.stage("measuring", (options.repeats + 1) * len(cases), "runs")
    found: dict[Case, list[float]] = {case: [] for case in cases}
    for repeat in range(options.repeats + 1):
        for case in cases:
            seconds = run(engine, case, repeat)
            if repeat:
                found[case].append(seconds)
            progress.advance(1, str(case))
    return {case: tuple(seconds) for case, seconds in found.items()}


def run(engine: Engine, case: Case, seed: int) -> float:
    """Seconds of one measurement of a case, with tokens drawn by `seed`."""
    length = case.prompt or case.generate
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, engine.runner.vocab, (case.batch, length)).tolist()
    with _lent(engine, case.batch, length) as places:
        steps = list(_prompt(engine, tokens, places) if case.prompt else _decode(tokens, places))
        began = time.perf_counter()
        for works in steps:
            logits = engine.runner.forward(works)
        seconds = time.perf_counter() - began
        if not bool(logits.isfinite().all()):
            raise EngineError(f"{case}: the logits are not finite; the checkpoint is damaged")
    return seconds


Places = Sequence[tuple[list[int], int]]


@contextmanager
def _lent(engine: Engine, batch: int, length: int) -> Iterator[Places]:
    """Pages and a slot for each sequence, as the engine lends them. Raises OutOfPages."""
    each = -(-length // engine.options.page_tokens)
    slots_each = engine.scheduler.slots_each
    slots = engine.slots.take(batch * slots_each)
    pages: list[int] = []
    try:
        pages = engine.pages.take(batch * each)
        yield [
            (pages[i * each : (i + 1) * each], slot) for i, slot in enumerate(slots[::slots_each])
        ]
    finally:
        engine.pages.give_back(pages)
        engine.slots.give_back(slots)


def _prompt(engine: Engine, tokens: Sequence[list[int]], places: Places) -> Iterator[list[Work]]:
    """The steps of one prompt, in chunks as the scheduler cuts them; logits of the last token."""
    from nybble.engine.runner import Work

    chunk = _chunk(engine)
    for (pages, slot), prompt in zip(places, tokens, strict=True):
        for at in range(0, len(prompt), chunk):
            part = prompt[at : at + chunk]
            is_last = at + chunk >= len(prompt)
            yield [Work(part, pages, slot, at, is_recurrent=False, outputs=int(is_last))]


def _decode(tokens: Sequence[list[int]], places: Places) -> Iterator[list[Work]]:
    """The steps of all sequences side by side, a token of each."""
    from nybble.engine.runner import Work

    for at in range(len(tokens[0])):
        yield [
            Work([row[at]], pages, slot, at, is_recurrent=True, outputs=1)
            for row, (pages, slot) in zip(tokens, places, strict=True)
        ]


def _chunk(engine: Engine) -> int:
    """Tokens of a prompt in one step: a multiple of 64."""
    return engine.options.max_batched_tokens // CHUNK * CHUNK


def _kv_cache(engine: Engine) -> tuple[str, int]:
    """The type of keys and values, and the bytes of one."""
    from nybble.engine.model_runner import ModelRunner

    runner = engine.runner
    if not isinstance(runner, ModelRunner) or not runner.pages.layers:
        return "none", 0
    keys = next(iter(runner.pages.layers.values())).keys
    return str(keys.dtype).removeprefix("torch."), keys.element_size()


# ------------------------------------------------------------------------------------------- roofs


def _row(
    case: Case,
    seconds: tuple[float, ...],
    traffic: Traffic,
    limits: Limits,
    precision: str,
    width: int,
    chunk: int,
) -> Row:
    """What a case reads and multiplies, over what the machine can."""
    if case.prompt:
        sizes = [min(chunk, case.prompt - at) for at in range(0, case.prompt, chunk)]
        nbytes = sum(
            traffic.weight_bytes(n, outputs=int(i + 1 == len(sizes))) for i, n in enumerate(sizes)
        )
        compute = traffic.compute_seconds(case.prompt, 1, limits, precision)
    else:
        weights = traffic.weight_bytes(case.batch, case.batch)
        context = (case.generate + 1) / 2  # the mean over the steps
        state = case.batch * traffic.state_traffic(context, width)
        nbytes = case.generate * (weights + state)
        compute = traffic.compute_seconds(case.tokens, case.tokens, limits, precision)
    return Row(case, seconds, nbytes, nbytes / limits.read_bytes_s, compute)
