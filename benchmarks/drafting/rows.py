"""What the rows of a decoding step cost, kernel by kernel: 1 + k rows of a sequence over one row.

    python benchmarks/drafting/rows.py CKPT [--rows 1,2,3,4,5] [--batch 1] [--context 128]

Steps of the engine's runner, each with other tokens of a text, with different numbers of rows in
turn; each call of the recorded step has a clock, and the fastest quarter of the samples counts. A
dense model reads its weights once for all rows; in a mixture of experts each row may choose other
experts.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from unittest import mock

import numpy as np
from lanes import numbers, print_head, print_row
from numpy.typing import NDArray

from nybble.api.conditions import Watch, conditions
from nybble.api.opening import OpenOptions, open_engine
from nybble.engine import engine as engine_module
from nybble.engine.engine import Engine
from nybble.engine.model_runner import ModelRunner
from nybble.engine.runner import Work
from nybble.kernels.dispatch import default_threads
from nybble.kernels.program import Program

#: Rows are taken from the text at distances that have no factor in common with its length.
STRIDE = 37


@dataclass(frozen=True)
class Place:
    """A sequence's pages, and its slots: the first is read and kept, states go to the others."""

    pages: Sequence[int]
    slots: Sequence[int]


class Sequences:
    """Sequences that share nothing, each with `context` tokens of a text computed."""

    def __init__(self, engine: Engine, batch: int, context: int) -> None:
        assert isinstance(engine.runner, ModelRunner)
        self.runner, self.context = engine.runner, context
        file = Path(engine_module.__file__)
        self.text = engine.tokenizer.encode(file.read_text(), add_special=False)
        each, slots_each = engine.pages.count // batch, engine.scheduler.slots_each
        self.places = [
            Place(range(i * each, (i + 1) * each), range(i * slots_each, (i + 1) * slots_each))
            for i in range(batch)
        ]
        for number, place in enumerate(self.places):
            known = self.tokens(STRIDE * number, context)
            work = Work(known, place.pages, place.slots[0], 0, is_recurrent=False)
            self.runner.forward([work])

    def tokens(self, start: int, count: int) -> list[int]:
        """Some of the text, which goes round."""
        start %= len(self.text) - count
        return self.text[start : start + count]

    def works(self, rows: int, sample: int) -> list[Work]:
        """A step with so many rows of each, as a scheduler has them computed."""
        return [
            Work(
                self.tokens(STRIDE * (sample * len(self.places) + number), rows),
                place.pages,
                place.slots[0],
                self.context,
                is_recurrent=True,
                outputs=rows,
                writes=list(enumerate(place.slots[1 : 1 + rows], 1)) if place.slots[1:] else (),
            )
            for number, place in enumerate(self.places)
        ]

    def seconds(self, rows: int, sample: int) -> NDArray[np.float64]:
        """Those of each call of the recorded step."""
        program = self.runner.program
        assert program is not None
        ticks = np.zeros(len(program.names), np.int64)
        replay = Program.run
        with mock.patch.object(Program, "run", partialmethod(replay, ticks=ticks)):
            self.runner.forward(self.works(rows, sample))
        return ticks / 1e9


def measure(found: Sequences, rows: Sequence[int], samples: int) -> dict[int, NDArray[np.float64]]:
    """By number of rows, the seconds of each call: means of the fastest quarter."""
    taken: dict[int, list[NDArray[np.float64]]] = {n: [] for n in rows}
    for sample in range(samples + 2):
        for n, spent in taken.items():
            spent.append(found.seconds(n, sample))
    kept = -(-samples // 4)
    return {
        n: np.mean(sorted(spent[2:], key=lambda one: float(one.sum()))[:kept], axis=0)
        for n, spent in taken.items()
    }


def by_kernel(names: list[str], seconds: Iterable[float]) -> dict[str, float]:
    """The calls of a kernel together."""
    found: dict[str, float] = defaultdict(float)
    for name, spent in zip(names, seconds, strict=True):
        found[name] += spent
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=numbers, default=(1, 2, 3, 4, 5))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=default_threads())
    a = parser.parse_args()
    watch = Watch()
    engine = open_engine(
        a.checkpoint,
        OpenOptions(
            max_sequences=a.batch,
            max_context=a.context + max(a.rows) + 1,
            precision=a.precision,
            threads=a.threads,
            prefix_cache=False,
            draft="ngram",
            draft_tokens=max(a.rows),
        ),
    )
    found = measure(Sequences(engine, a.batch, a.context), a.rows, a.samples)
    assert isinstance(engine.runner, ModelRunner)
    assert engine.runner.program is not None
    names = list(engine.runner.program.names)
    tables = {n: by_kernel(names, seconds.tolist()) for n, seconds in found.items()}
    least, calls = min(a.rows), Counter(names)
    titles = [part for n in a.rows for part in (f"{n} rows, µs", f"of {least}")]
    print(f"{a.checkpoint.name}, batch {a.batch}, {a.precision}\n")
    print_head(("kernel", "calls", *titles))
    order = sorted(tables[max(a.rows)], key=lambda name: -tables[max(a.rows)][name])
    for name in (*order, "all"):
        cells = [name, str(calls.get(name, len(names)))]
        for n in a.rows:
            spent, first = (_spent(tables[r], name) for r in (n, least))
            cells += [f"{1e6 * spent:,.1f}", f"{spent / first:.2f}"]
        print_row(cells)
    print(f"\n{conditions(a.threads, watch.others_share())}")


def _spent(table: dict[str, float], name: str) -> float:
    return sum(table.values()) if name == "all" else table[name]


if __name__ == "__main__":
    main()
