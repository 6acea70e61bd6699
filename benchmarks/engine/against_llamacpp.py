"""Our engine against llama.cpp on the same weights: prefill, decoding, several sequences.

    python benchmarks/engine/against_llamacpp.py CKPT GGUF... [--prompt 512,4096] [--generate 128]
        [--batch 16] [--precision bf16,int8]

CKPT is ours, packed; every GGUF is a contender (prepare.py makes them). With several precisions of
ours, the first is what ratios are over. `--rounds` turns of each, in turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from contest import ROOT, Case, Contender, LlamaBench, add_options, hold, ours


def numbers(text: str) -> list[int]:
    """Numbers with commas."""
    return [int(word) for word in text.split(",") if word]


def main() -> None:
    """Hold the contest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("gguf", type=Path, nargs="+")
    parser.add_argument("--prompt", type=numbers, default=[512])
    parser.add_argument("--generate", type=numbers, default=[128])
    parser.add_argument("--batch", type=numbers, default=[], help="sequences that generate at once")
    parser.add_argument("--precision", default="bf16,int8")
    add_options(parser)
    a = parser.parse_args()
    subprocess.run(
        [sys.executable, ROOT / "peers" / "run_llamacpp_bench.py", "--build"], check=True
    )
    context = str(max([*a.prompt, *a.generate]))
    contenders: list[Contender] = [
        ours(
            a.checkpoint,
            a.threads,
            *("--precision", precision, "--max-context", context),
            *("--max-sequences", str(max([1, *a.batch]))),
            name=f"nybble {precision}",
        )
        for precision in a.precision.split(",")
    ]
    contenders += [LlamaBench(f"llama.cpp {gguf.stem}", gguf, a.threads) for gguf in a.gguf]
    cases = [Case(n, 0) for n in a.prompt]
    cases += [Case(0, n, batch) for n in a.generate for batch in [1, *a.batch]]
    hold(f"{a.checkpoint.name} against llama.cpp", contenders, cases, a)


if __name__ == "__main__":
    main()
