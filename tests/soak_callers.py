"""Callers of every kind at one LLM, for a time: `soak_callers.py FOLDER SECONDS`.

Prints JSON: what was asked how often, what went wrong, samples of the resident memory, and threads,
descriptors and processes before and after. Run by tests/e2e/test_soak.py.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from array import array
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from nybble import LLM, SamplingParams
from nybble.engine.request import Grammar
from nybble.errors import EngineError

CALLERS = 3
SAMPLE_S = 0.25
PLAIN = SamplingParams(max_tokens=40, ignore_eos=True)


class Interrupted(Exception):
    """A caller leaves in the middle."""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def held() -> dict[str, int]:
    """What a process can lose besides memory."""
    tasks = list(Path("/proc/self/task").iterdir())
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    descriptors = len(os.listdir("/proc/self/fd"))
    return {"threads": len(tasks), "descriptors": descriptors, "processes": len(children)}


class Samples:
    """Seconds and bytes, in memory that was touched beforehand: a list of them grows by 500 bytes a
    second, which is more than the test lets pass."""

    def __init__(self, most: int = 1 << 16) -> None:
        self.values = array("d", bytes(16 * most))
        self.count = 0

    def add(self, seconds: float, value: float) -> None:
        self.values[self.count], self.values[self.count + 1] = seconds, value
        self.count += 2

    def pairs(self) -> list[tuple[float, float]]:
        found = self.values[: self.count]
        return list(zip(found[::2], found[1::2], strict=True))


class Callers:
    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.vocab = llm.limits.vocab
        self.asked: Counter[str] = Counter()
        self.cancelled = 0
        self.errors: list[str] = []
        self.samples = Samples()
        self.kinds = {
            "plain": self.plain,
            "many": self.many,
            "choices": self.choices,
            "scored": self.scored,
            "long": self.long,
            "left": self.left,
            "interrupted": self.interrupted,
            "grammar": self.grammar,
            "bad grammar": self.bad_grammar,
        }

    def prompt(self, draw: random.Random) -> list[int]:
        length = draw.choice([1, 5, 30, 63, 64, 65, 129, draw.randrange(1, self.llm.context - 60)])
        return [draw.randrange(3, self.vocab) for _ in range(length)]

    def plain(self, draw: random.Random) -> None:
        params = replace(PLAIN, temperature=draw.choice([0.0, 0.8]), logprobs=2, stop=("the end",))
        (done,) = self.llm.generate([self.prompt(draw)], params)
        _ = done.text

    def many(self, draw: random.Random) -> None:
        prompts = [self.prompt(draw) for _ in range(6)]
        for done in self.llm.generate(prompts, replace(PLAIN, repetition_penalty=1.1)):
            assert len(done.tokens) == PLAIN.max_tokens

    def long(self, draw: random.Random) -> None:
        """Sequences that begin small and grow until not all of them have room."""
        prompts = [[draw.randrange(3, self.vocab)] for _ in range(4)]
        for done in self.llm.generate(prompts, replace(PLAIN, max_tokens=700)):
            assert len(done.tokens) == 700

    def choices(self, draw: random.Random) -> None:
        params = replace(PLAIN, n=3, temperature=1.0, seed=None, top_p=0.9)
        (done,) = self.llm.generate([self.prompt(draw)], params)
        assert len(done.choices) == 3

    def scored(self, draw: random.Random) -> None:
        prompt = self.prompt(draw)
        (done,) = self.llm.generate([prompt], replace(PLAIN, max_tokens=1, prompt_logprobs=1))
        assert done.prompt_logprobs is not None
        assert len(done.prompt_logprobs.logprobs) == len(prompt)

    def left(self, draw: random.Random) -> None:
        with closing(self.llm.stream(self.prompt(draw), PLAIN)) as stream:
            for _ in range(draw.randrange(1, 8)):
                next(stream)
        self.cancelled += 1

    def interrupted(self, draw: random.Random) -> None:
        def interrupt(*_: object) -> None:
            raise Interrupted

        try:
            self.llm.generate([self.prompt(draw) for _ in range(3)], PLAIN, on_token=interrupt)
        except Interrupted:
            self.cancelled += 1

    def grammar(self, draw: random.Random) -> None:
        pattern = draw.choice(["(yes|no), (sir|madam)", "[a-d]{3,9}"])
        params = replace(PLAIN, grammar=Grammar("regex", pattern), temperature=1.0, n=2)
        (done,) = self.llm.generate([self.prompt(draw)], params)
        assert {choice.finish for choice in done.choices} == {"stop"}

    def bad_grammar(self, draw: random.Random) -> None:
        params = replace(PLAIN, grammar=Grammar("regex", "(unclosed"))
        (done,) = self.llm.generate([self.prompt(draw)], params)
        try:
            _ = done.text
        except EngineError:
            return
        raise AssertionError("a grammar that is none was taken")

    def call(self, seed: int, until: float) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until and not self.errors:
            kind = draw.choice(list(self.kinds))
            try:
                self.kinds[kind](draw)
            except Exception as error:
                self.errors.append(f"{kind}: {type(error).__name__}: {error}")
            self.asked[kind] += 1

    def run(self, seconds: float) -> None:
        began = time.monotonic()
        until = began + seconds
        threads = [
            threading.Thread(target=self.call, args=(seed, until)) for seed in range(CALLERS)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.samples.add(time.monotonic() - began, resident())
            time.sleep(SAMPLE_S)
        for thread in threads:
            thread.join()


def fill_cache_of_numpy() -> None:
    """NumPy keeps up to 7 freed blocks of each size below 1 KiB: 3.5 MiB once all are there, which
    takes hours where sizes follow the lengths of prompts, and looks like a leak until then."""
    for size in range(1, 1024):
        _ = [np.empty(size, np.uint8) for _ in range(7)]


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    fill_cache_of_numpy()
    memory = 0.0005  # GiB: four sequences, and pages for a little more than two long ones
    with LLM(
        folder, memory=memory, kv_cache_dtype="fp8", max_sequences=4, max_batched_tokens=256
    ) as llm:
        callers = Callers(llm)
        for name, call in callers.kinds.items():  # each once: what is loaded lazily is loaded
            call(random.Random(name))
        before = held()
        callers.run(seconds)
        time.sleep(0.5)
        stats, after = llm.stats, held()
    names = ("preemptions", "pages", "pages_used", "slots_used", "running", "waiting", "clipped")
    found = {
        "asked": callers.asked,
        "cancelled": callers.cancelled,
        "errors": callers.errors,
        "generated_tokens": stats.generated_tokens,
        "before": before,
        "after": after,
        "samples": callers.samples.pairs(),
    }
    json.dump(found | {name: getattr(stats, name) for name in names}, sys.stdout)


if __name__ == "__main__":
    main()
