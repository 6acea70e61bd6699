"""Our engine against transformers' generate, one sequence.

    python benchmarks/engine/against_transformers.py CKPT BF16 [--prompt 512] [--generate 64]

CKPT is ours, packed; BF16 the same model unpacked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from contest import ROOT, Case, Contender, Worker, add_options, hold, ours


def main() -> None:
    """Hold the contest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bf16", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    add_options(parser)
    a = parser.parse_args()
    runner = [sys.executable, ROOT / "peers" / "run_transformers_bench.py", a.bf16]
    contenders: list[Contender] = [
        ours(a.checkpoint, a.threads, name="nybble, packed"),
        ours(a.bf16, a.threads, name="nybble, BF16"),
        Worker("transformers, BF16", [*runner, "--threads", str(a.threads)]),
    ]
    cases = [Case(a.prompt, 0), Case(0, a.generate)]
    hold(f"{a.checkpoint.name} against transformers", contenders, cases, a)


if __name__ == "__main__":
    main()
