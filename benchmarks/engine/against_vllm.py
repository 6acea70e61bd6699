"""Our engine against vLLM's CPU backend: requests that arrive together, prompt and answer.

    python benchmarks/engine/against_vllm.py CKPT BF16 [--prompt 32] [--generate 64] [--batch 16]

CKPT is ours, packed; BF16 the same model unpacked, which is all that vLLM runs on a CPU. Both go
through their whole engines: scheduling, sampling. vLLM takes a minute to start.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from contest import ROOT, Case, Contender, Worker, add_options, environment_of, hold, ours


def main() -> None:
    """Hold the contest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bf16", type=Path)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="bf16,int8")
    parser.add_argument("--with-bf16", action="store_true", help="ours on the BF16 model, too")
    add_options(parser)
    a = parser.parse_args()
    sizes = ["--max-context", str(a.prompt + a.generate), "--max-sequences", str(a.batch)]
    contenders: list[Contender] = [
        ours(a.checkpoint, a.threads, "--precision", p, *sizes, name=f"nybble {p}")
        for p in a.precision.split(",")
    ]
    if a.with_bf16:
        contenders.append(ours(a.bf16, a.threads, *sizes, name="nybble on BF16 weights"))
    runner = [environment_of("vllm"), ROOT / "peers" / "run_vllm_bench.py", a.bf16]
    contenders.append(Worker("vLLM BF16", [*runner, "--threads", str(a.threads), *sizes]))
    cases = [Case(a.prompt, a.generate, a.batch)]
    hold(f"{a.checkpoint.name} against vLLM", contenders, cases, a)


if __name__ == "__main__":
    main()
