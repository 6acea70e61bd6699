"""Our engine, for a contest: a case in a line of JSON, how long it took in another.

    python benchmarks/engine/worker.py CKPT [--precision int8] [--threads 2]

A case with a prompt or a generation alone is run on the engine's runner, as `nybble bench engine`
does; a case with both are whole requests, side by side: scheduling, sampling, detokenizing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from nybble.api import bench
from nybble.api.llm import OpenOptions, open_engine
from nybble.engine.engine import Engine
from nybble.engine.request import Request, SamplingParams


def whole(engine: Engine, prompt: int, generate: int, batch: int, seed: int) -> tuple[int, float]:
    """Generated tokens, and seconds, of requests that all arrive at once."""
    draw = np.random.default_rng(seed)
    params = SamplingParams(max_tokens=generate, ignore_eos=True)
    began = time.perf_counter()
    for i in range(batch):
        ids = draw.integers(100, min(4000, engine.runner.vocab), prompt).tolist()
        engine.add(Request(f"{seed}-{i}", tuple(ids), params))
    made = 0
    while not engine.is_idle:
        for event in engine.step():
            if event.error:
                sys.exit(event.error)
            made += event.token is not None
    return made, time.perf_counter() - began


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--kv-cache-dtype", default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-context", type=int, default=4352)
    parser.add_argument("--max-sequences", type=int, default=32)
    a = parser.parse_args()
    options = OpenOptions(
        kv_cache_dtype=a.kv_cache_dtype,
        max_sequences=a.max_sequences,
        max_context=a.max_context,
        precision=a.precision,
        threads=a.threads,
        prefix_cache=False,
        draft="off",
    )
    engine = open_engine(a.checkpoint, options)
    print(json.dumps({"ready": 1}), flush=True)
    for seed, line in enumerate(sys.stdin):
        asked = json.loads(line)
        prompt, generate, batch = asked["prompt"], asked["generate"], asked["batch"]
        if prompt and generate:
            tokens, seconds = whole(engine, prompt, generate, batch, seed)
        else:
            case = bench.Case(prompt, generate, batch)
            tokens, seconds = case.tokens, bench.run(engine, case, seed)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
