"""What drafting gives at a given acceptance: without, with a fixed number, and as it pays.

    python benchmarks/drafting/oracle.py CKPT [--acceptance 0.85] [--batch 1,4,16]

The drafter knows the text, is wrong as often as asked, and computes a real MTP head all the same
(`planted.py`). First, what rows and drafts cost: steps of 1 + k rows over steps of one row, and the
guessing itself. Then the engine as a whole: "auto" keeps what it learned from turn to turn as a
server does, "auto, new" begins each turn knowing nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from lanes import Lane, Load, add_options, load, numbers, print_head, print_row, race, shares
from planted import Planted

from nybble.api.opening import ADAPTIVE_DRAFTS, OpenOptions, open_engine
from nybble.engine.engine import Engine
from nybble.engine.runner import Guess, Work


def cost_of_rows(
    planted: Planted, batch: int, context: int, drafts: Sequence[int], samples: int
) -> dict[int, tuple[float, float]]:
    """By number of drafts k: the median seconds of a step of 1 + k rows for each of `batch`
    sequences, and of guessing k tokens after it. They take turns."""
    runner, slots_each = planted.runner, planted.slots_each
    size, most = runner.pages.page_tokens, max(drafts)
    each = -(-(context + 1 + 2 * most) // size)
    draw = np.random.default_rng(0)
    tokens = draw.integers(100, 4000, (batch, 1 + most)).tolist()
    pages = [list(range(i * each, (i + 1) * each)) for i in range(batch)]
    for i in range(batch):  # a context to look at
        known = draw.integers(100, 4000, context).tolist()
        runner.forward([Work(known, pages[i], i * slots_each, 0, is_recurrent=False)])
    found: dict[int, tuple[list[float], list[float]]] = {k: ([], []) for k in (0, *drafts)}
    for sample in range(samples + 2):
        for k, (steps, guesses) in found.items():
            works = [
                Work(
                    tokens[i][: 1 + k],
                    pages[i],
                    i * slots_each,
                    context,
                    is_recurrent=True,
                    outputs=1 + k,
                    writes=_writes(i * slots_each, k, slots_each),
                )
                for i in range(batch)
            ]
            asked = [Guess(i, tokens[i][1:2], pages[i], context + 1, k) for i in range(batch)]
            began = time.perf_counter()
            runner.forward(works)
            stepped = time.perf_counter()
            if k:
                runner.guess(asked)
            step, guess = stepped - began, time.perf_counter() - stepped
            if sample > 1:
                steps.append(step)
                guesses.append(guess)
    return {k: (statistics.median(a), statistics.median(b)) for k, (a, b) in found.items()}


def _writes(first: int, k: int, slots_each: int) -> tuple[tuple[int, int], ...]:
    """As a scheduler has the states of a step written."""
    return tuple((n + 1, first + n) for n in range(1 + k)) if slots_each > 1 else ()


def print_costs(
    costs: dict[int, tuple[float, float]], batch: int, acceptance: Sequence[float]
) -> None:
    """The table, with what these times alone would allow at each acceptance."""
    one = costs[0][0]
    for k, (step, guess) in costs.items():
        allowed = [f"{_tokens(a, k) * one / (step + guess):.2f}" for a in acceptance]
        cells = [
            f"{1e3 * step:.2f}",
            f"{step / one:.3f}",
            f"{1e3 * guess:.2f}",
            f"{guess / one:.3f}",
        ]
        print_row([str(batch), str(k), *cells, *allowed])


def _tokens(acceptance: float, drafts: int) -> float:
    """Tokens that a step with so many drafts gives."""
    return sum(acceptance**at for at in range(drafts + 1))


def race_batch(a: argparse.Namespace, batch: int) -> None:
    """All lanes at one batch."""
    most = max(*a.drafts, ADAPTIVE_DRAFTS)
    context = a.prompt + a.generate + 2 * most + 2
    planted = Planted(
        a.checkpoint,
        sequences=batch,
        context=context,
        drafts=most,
        lanes=len(a.acceptance) * (2 + len(a.drafts)),
        precision=a.precision,
        threads=a.threads,
    )
    costs = cost_of_rows(planted, batch, a.prompt, a.drafts, a.samples)
    print_head(
        ("batch", "k", "step, ms", "of one row", "guessing, ms", "of one row")
        + tuple(f"allows at {share}" for share in a.acceptance)
    )
    print_costs(costs, batch, a.acceptance)
    print()
    plain = open_engine(
        a.checkpoint,
        OpenOptions(
            kv_cache_dtype="bf16",
            max_sequences=batch,
            max_context=context,
            precision=a.precision,
            threads=a.threads,
            prefix_cache=False,
            draft="off",
        ),
    )
    draw = np.random.default_rng(batch)
    prompts = [tuple(draw.integers(100, 4000, a.prompt).tolist()) for _ in range(batch)]
    asked = load(a.checkpoint.name, prompts, a.generate, batch, ignores_end=True)
    off = Lane("off", lambda: plain)
    off.turn(asked)
    lanes = [off]
    for share in a.acceptance:
        lanes += drafted_lanes(planted, share, a.drafts, asked, off, len(lanes) - 1)
    off.runs.clear()
    off.rates.clear()
    race(lanes, [asked], a, side_by_side=True)


def drafted_lanes(
    planted: Planted, acceptance: float, drafts: Sequence[int], asked: Load, off: Lane, first: int
) -> list[Lane]:
    """Lanes whose drafter knows what came without drafts; they take the planted ones from `first`
    on."""
    oracle = planted.oracle(acceptance)
    oracle.answers = dict(zip(asked.prompts, off.runs[str(asked)][0].texts, strict=True))

    def adaptive(lane: int) -> Engine:
        return planted.engine(oracle, ADAPTIVE_DRAFTS, is_fixed=False, lane=lane)

    def fixed(most: int, lane: int) -> Callable[[], Engine]:
        return lambda: planted.engine(oracle, most, is_fixed=True, lane=lane)

    kept = adaptive(first)
    makers: dict[str, Callable[[], Engine]] = {
        "auto": lambda: kept,
        "auto, new": lambda: adaptive(first + 1),
    }
    makers |= {f"k={k}": fixed(k, first + 2 + at) for at, k in enumerate(drafts)}
    return [Lane(f"{name}, {acceptance}", make) for name, make in makers.items()]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--acceptance", type=shares, default=(0.85,), help="of each position")
    parser.add_argument("--batch", type=numbers, default=(1, 4, 16))
    parser.add_argument("--drafts", type=numbers, default=(1, 2, 3, 4), help="fixed numbers")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--generate", type=int, default=192, help="tokens of each text")
    parser.add_argument("--samples", type=int, default=15, help="of each step's cost")
    parser.add_argument("--precision", default="bf16")
    add_options(parser)
    a = parser.parse_args()
    for batch in a.batch:
        race_batch(a, batch)
        print()


if __name__ == "__main__":
    main()
