"""What the prefix cache saves an agent, and what it costs where nothing is shared.

    python benchmarks/drafting/agent.py CKPT [--prompt 3400] [--turns 8]

First `nybble bench engine --multi-turn`, with the turns whose history is long enough told apart.
Then requests that share no beginning, with cache and without, in turn: what pages and snapshots
cost whom they do not help, a full cache and its evictions included. Last, the bytes of snapshots
beside their budget.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Generator
from pathlib import Path

import numpy as np
from lanes import (
    Judge,
    Lane,
    Load,
    Run,
    Turn,
    add_options,
    compare,
    conclude,
    load,
    paired_ratio,
    print_head,
    print_row,
    stepping,
)

from nybble.api.opening import Opened, OpenOptions, open_checkpoint
from nybble.api.turns import TurnsOptions, bench_turns
from nybble.cli.bench import render_turns
from nybble.engine.model_runner import ModelRunner
from nybble.progress import Display


class WholeLane(Lane):
    """Counts whole requests, prompts too; those of a turn share nothing with an earlier turn's."""

    def __init__(self, name: str, opened: Opened) -> None:
        super().__init__(name, lambda: opened.engine)
        self._turns = itertools.count()

    def begin(self, case: Load) -> Generator[None, None, Run]:
        """Answer them under a salt that no turn had before."""
        return stepping(self.make(), case, b"turn %d" % next(self._turns))

    def counted(self, case: Load, run: Run) -> Turn:
        """All tokens, in the seconds of all steps."""
        tokens = sum(map(len, case.prompts)) + sum(map(len, run.texts))
        return Turn(tokens, sum(step.seconds for step in run.steps))


def bench_turns_of(a: argparse.Namespace) -> None:
    """Print the conversation's table, and what the cache saves where the history is long."""
    options = TurnsOptions(a.turns, a.prompt, a.answer, a.rounds)
    opening = OpenOptions(kv_cache_dtype="bf16", precision=a.precision, threads=a.threads)
    with Display() as progress:
        found = bench_turns(a.checkpoint, options, opening, progress=progress)
    print(render_turns(found))
    print_head(
        ("turn", "history, tokens", "hit", "first token", "without", "times shorter"), names=1
    )
    for turn in found.turns[1:]:
        cells = [f"{turn.number}", f"{turn.known:,}", f"{100 * turn.cached / turn.known:.1f} %"]
        cells += [f"{1e3 * turn.first_s:.1f} ms", f"{1e3 * turn.plain_first_s:.1f} ms"]
        print_row([*cells, f"{turn.plain_first_s / turn.first_s:.1f}"])
    print()


def opened(a: argparse.Namespace, **cache: object) -> Opened:
    """An engine for requests that share nothing."""
    return open_checkpoint(
        a.checkpoint,
        OpenOptions(
            memory=a.memory,
            kv_cache_dtype="bf16",
            max_sequences=a.batch,
            max_context=a.apart + a.answer,
            precision=a.precision,
            threads=a.threads,
            draft="off",
            **cache,  # type: ignore[arg-type]
        ),
    )


def bench_overhead(a: argparse.Namespace) -> Opened:
    """Print what the cache costs where nothing is shared; the engine that has one."""
    cached = opened(a, snapshot_memory=a.snapshot_memory)
    lanes = [WholeLane("no cache", opened(a, prefix_cache=False)), WholeLane("cache", cached)]
    vocab = cached.engine.runner.vocab
    draw = np.random.default_rng(0).integers(100, vocab, (a.requests, a.apart))
    asked = load(
        "apart", [tuple(row) for row in draw.tolist()], a.answer, a.batch, ignores_end=True
    )
    judge = Judge(a.rounds, a.wait, a.even_if_busy)
    rates = compare(judge, lanes, [asked])
    plain, own = (rates[lane.name, str(asked)] for lane in lanes)
    print_head(("requests that share nothing", "tokens/s", "of no cache"), names=1)
    for lane, found in zip(lanes, (plain, own), strict=True):
        ratio = paired_ratio(found, plain)
        print_row([lane.name, f"{statistics.median(found):,.1f}", f"{100 * ratio:.2f} %"])
    conclude(judge, rates, a)
    return cached


def print_snapshots(found: Opened, a: argparse.Namespace) -> None:
    """Bytes of the tensors themselves, beside what was allowed."""
    runner, stats, memory = found.engine.runner, found.engine.stats, found.memory
    assert isinstance(runner, ModelRunner)
    pool = runner.states
    tensors = [t for layer in pool.layers.values() for t in (layer.conv, layer.state)]
    tensors += [] if pool.hidden is None else [pool.hidden]
    each = sum(t.nbytes for t in tensors) // pool.count if tensors else 0
    allowed = "chosen" if a.snapshot_memory is None else f"{int(a.snapshot_memory * 2**30):,}"
    print(
        f"\nsnapshots: {memory.snapshots} of {each:,} bytes are {memory.snapshots * each:,}; "
        f"budget {allowed}, planned {memory.snapshot_bytes:,}; {stats.snapshots_used} in use, "
        f"{stats.cached_pages} pages cached, {stats.cache_evictions} evictions"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--turns", type=int, default=8, help="0: no conversation")
    parser.add_argument("--prompt", type=int, default=3400, help="tokens of rules and tools")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--requests", type=int, default=8, help="that share nothing")
    parser.add_argument("--apart", type=int, default=1024, help="tokens of each of those")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--memory", type=float, default=1.0, help="GiB of pools, for those")
    parser.add_argument("--snapshot-memory", type=float, help="GiB of these for snapshots")
    parser.add_argument("--precision", default="bf16")
    add_options(parser)
    a = parser.parse_args()
    if a.turns:
        bench_turns_of(a)
    print_snapshots(bench_overhead(a), a)


if __name__ == "__main__":
    main()
