"""What is left of the speed when one foreign process keeps a core busy: ours and llama.cpp's.

    python benchmarks/engine/busy.py CKPT GGUF... [--generate 32]

Decoding of one sequence, quiet and beside a loop that never sleeps, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contest import Case, Contender, Judge, LlamaBench, add_options, ours


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that counts, for as long as the block lasts."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("gguf", type=Path, nargs="*")
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--precision", default="bf16")
    add_options(parser)
    a = parser.parse_args()
    contenders: list[Contender] = [
        ours(a.checkpoint, a.threads, "--precision", a.precision, name="nybble"),
        *(LlamaBench(f"llama.cpp {gguf.stem}", gguf, a.threads) for gguf in a.gguf),
    ]
    case, judge = Case(0, a.generate), Judge(a.rounds, a.wait, a.even_if_busy)
    rates: dict[str, tuple[list[float], list[float]]] = {c.name: ([], []) for c in contenders}
    for contender in contenders:
        contender.turn(case)
    for _ in range(a.rounds):
        for contender in contenders:
            quiet, disturbed = rates[contender.name]
            turn = judge.fair_turn(contender, case)
            quiet.append(turn.tokens / turn.seconds)
            with busy_process():
                turn = contender.turn(case)
            disturbed.append(turn.tokens / turn.seconds)
    for contender in contenders:
        contender.close()
    print(
        f"tg{a.generate}, {a.threads} threads, medians of {a.rounds}; others used at most", end=" "
    )
    print(f"{100 * max(judge.shares):.0f} % of a core in the quiet turns\n")
    print("| contender | quiet, tokens/s | one busy process | kept |\n|---|--:|--:|--:|")
    for name, (quiet, disturbed) in rates.items():
        before, after = statistics.median(quiet), statistics.median(disturbed)
        print(f"| {name} | {before:.1f} | {after:.1f} | {100 * after / before:.0f} % |")


if __name__ == "__main__":
    main()
