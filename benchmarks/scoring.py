"""Scoring and decoding beside transformers and vLLM: one process each, alternating, in one run.

    python benchmarks/scoring.py BF16 PACKED TEXT [--runs 5] [--windows 16] [--vllm PYTHON]

`score`: the negative log-likelihood of every token but the first of windows of 512, over the whole
vocabulary; vLLM only computes the prompt (one token is generated), which is less work. `decode`: 64
tokens after a prompt of 8, one sequence, greedy. transformers and vLLM run the BF16 folder, nybble
the packed one and the BF16 one. Each process loads once, warms up, and waits for its turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WINDOW, PROMPT, NEW = 512, 8, 64
THREADS = len(os.sched_getaffinity(0))


def token_windows(folder: Path, text: Path, count: int) -> list[list[int]]:
    """Windows of token ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = [line for line in text.read_text("utf-8").split("\n") if line.strip()]
    content = "\n\n".join(lines)[: count * WINDOW * 8]
    ids = tokenizer.encode(content, add_special_tokens=False).ids[: count * WINDOW]
    assert len(ids) == count * WINDOW, "the text is too short"
    return [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]


Work = dict[str, Callable[[], float]]


def nybble_work(folder: Path, windows: list[list[int]]) -> Work:
    """Stream and score; generate."""
    import numpy as np
    import torch

    from nybble.api.llm import LLM
    from nybble.checkpoint.reader import Checkpoint
    from nybble.engine.request import SamplingParams
    from nybble.evaluate.score import score
    from nybble.evaluate.windows import Window
    from nybble.models.linear import Mode
    from nybble.models.model import Model
    from nybble.progress import Progress
    from nybble.stream.executor import Stream

    model = Model(Checkpoint.open(folder))
    llm = LLM(folder, max_sequences=1)

    class Source:
        def __init__(self, stream: Stream) -> None:
            self.head, self.normed = model.head, stream.normed

    def scoring() -> float:
        stream = Stream(model, [torch.tensor(w) for w in windows], Mode())
        stream.run()
        cut = [Window(np.array(w), 1, 0) for w in windows]
        return float(score(Source(stream), cut, Mode(), Progress()).nll.mean())

    def decode() -> float:
        params = SamplingParams(max_tokens=NEW + 1, ignore_eos=True)
        times = [time.perf_counter() for _ in llm.stream(windows[0][:PROMPT], params)]
        return times[-1] - times[0]

    return {"score": scoring, "decode": decode}


def transformers_work(folder: Path, windows: list[list[int]]) -> Work:
    """AutoModelForCausalLM in BF16, one window at a time (its fastest here)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def scoring() -> float:
        total = 0.0
        for window in windows:
            ids = torch.tensor([window])
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        return total / (len(windows) * (WINDOW - 1))

    @torch.inference_mode()
    def decode() -> float:
        found = model(torch.tensor([windows[0][:PROMPT]]), use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(NEW):
            found = model(
                found.logits[:, -1:].argmax(-1),
                past_key_values=found.past_key_values,
                use_cache=True,
            )
        return time.perf_counter() - began

    return {"score": scoring, "decode": decode}


def vllm_work(folder: Path, windows: list[list[int]]) -> Work:
    """vLLM in process, BF16, prefix caching off."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def run(prompts: list[list[int]], tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - began

    def decode() -> float:
        prompt = [windows[0][:PROMPT]]
        return run(prompt, NEW + 1) - run(prompt, 1)

    return {"score": lambda: run(windows, 1) and float("nan"), "decode": decode}


WORK = {"nybble": nybble_work, "transformers": transformers_work, "vllm": vllm_work}


def serve(kind: str, folder: Path, text: Path, count: int) -> None:
    """Load, warm up, then answer every line on stdin with seconds and a figure."""
    # vLLM imports a module `kernels` by that name, and would find the file beside this one.
    sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    work = WORK[kind](folder, token_windows(folder, text, count))
    for call in work.values():
        call()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        figure = work[line.strip()]()
        print(time.perf_counter() - began, figure, file=out, flush=True)


class Worker:
    """One engine in its own process."""

    def __init__(self, python: str, kind: str, folder: Path, text: Path, count: int) -> None:
        environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(THREADS))
        if kind == "vllm":
            environment |= {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(THREADS))),
                "KMP_BLOCKTIME": "1",  # its threads would spin through the others' turns
            }
            library = Path(python).parents[1] / "lib" / "libiomp5.so"
            if library.exists():
                environment["LD_PRELOAD"] = str(library)
        command = [python, __file__, str(folder), str(folder), str(text), "--worker", kind]
        self.process = subprocess.Popen(
            [*command, "--windows", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if kind == "vllm" else None,
            text=True,
            env=environment,
        )

    def wait(self) -> None:
        """Until it is warm."""
        assert self.process.stdout
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"a worker failed: {self.process.args}")

    def ask(self, what: str) -> tuple[float, float]:
        """Seconds and figure of one turn."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        seconds, figure = self.process.stdout.readline().split()
        return float(seconds), float(figure)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bf16", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--vllm", help="the interpreter of vLLM's environment")
    parser.add_argument("--worker", choices=WORK)
    a = parser.parse_args()
    if a.worker:
        serve(a.worker, a.bf16, a.text, a.windows)
        return
    engines = {
        "nybble, packed": (sys.executable, "nybble", a.packed),
        "nybble, BF16": (sys.executable, "nybble", a.bf16),
        "transformers, BF16": (sys.executable, "transformers", a.bf16),
    }
    if a.vllm:
        engines["vLLM, BF16 (prompt only)"] = (a.vllm, "vllm", a.bf16)
    workers = {}
    for name, (python, kind, folder) in engines.items():
        workers[name] = Worker(python, kind, folder, a.text, a.windows)
        workers[name].wait()
    rates: dict[tuple[str, str], list[float]] = {}
    figures = {}
    for _ in range(a.runs):
        for name, worker in workers.items():
            for what in ("score", "decode"):
                seconds, figure = worker.ask(what)
                rate = a.windows * WINDOW / seconds if what == "score" else NEW / figure
                rates.setdefault((name, what), []).append(rate)
                figures[name, what] = figure
    print(f"{THREADS} threads, load {os.getloadavg()[0]:.2f}, medians of {a.runs}, tokens/s\n")
    print("| engine | score | min | max | decode | min | max | mean NLL |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in workers:
        cells = []
        for what in ("score", "decode"):
            found = rates[name, what]
            cells += [statistics.median(found), min(found), max(found)]
        shown = " | ".join(f"{c:,.0f}" if c >= 100 else f"{c:.1f}" for c in cells)
        print(f"| {name} | {shown} | {figures[name, 'score']:.5f} |")


if __name__ == "__main__":
    main()
