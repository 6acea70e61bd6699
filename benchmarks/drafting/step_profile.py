"""Where a decoding step spends its time, Python included: a tree of functions, in microseconds.

    python benchmarks/drafting/step_profile.py [CKPT] [--drafts off,auto,1,3] [--cpu-time]

Some functions of the engine are wrapped with a clock; each wrap adds about half a microsecond to
the function that calls it. Of the steps that decode and compute nothing else the fastest quarter
counts, of those with as many tokens each, and of it the mean: so rows add up, and a busy machine
disturbs little. "itself" is what is not in the rows below. `--cpu-time` counts what the engine's
own thread computes, not what it waits: with `--threads 1` that is all, whoever else runs.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lanes import Load, answer, load, numbers, print_head, print_row
from trained import CARRIED, prompts

from nybble.api.conditions import Watch, conditions
from nybble.api.opening import OpenOptions, open_engine
from nybble.engine.drafting import Drafting
from nybble.engine.engine import Engine
from nybble.engine.model_runner import ModelRunner
from nybble.engine.mtp_runner import MtpRunner
from nybble.engine.remembering import Remembering
from nybble.engine.sampler import Sampler
from nybble.engine.scheduler import Scheduler
from nybble.engine.speculation import Speculation
from nybble.engine.step_inputs import StepInputs
from nybble.kernels.dispatch import default_threads
from nybble.kernels.program import Program
from nybble.text.tokenizer import Tokenizer

#: What is wrapped, under the names that the table has.
WRAPPED: tuple[tuple[type, str, str], ...] = (
    (Engine, "step", "step"),
    (Scheduler, "schedule", "schedule"),
    (ModelRunner, "forward", "forward"),
    (ModelRunner, "_check", "check"),
    (StepInputs, "fill", "fill"),
    (Program, "run", "program"),
    (MtpRunner, "begin", "hidden states in"),
    (MtpRunner, "finish", "hidden states out"),
    (Engine, "_commit_all", "commit"),
    (Engine, "_verify", "verify"),
    (Sampler, "sample", "sample"),
    (Engine, "_take", "take"),
    (Engine, "_read", "text"),
    (Speculation, "note", "policy: note"),
    (Engine, "_draft", "draft"),
    (Drafting, "propose", "propose"),
    (Speculation, "plan", "policy: plan"),
    (Speculation, "note_step", "policy: note step"),
    (MtpRunner, "guess", "guess"),
    (MtpRunner, "_check", "check"),
    (MtpRunner, "_fill", "fill"),
    (Remembering, "keep", "remember"),
)
Place = tuple[str, ...]


_STEP = ("step",)


@dataclass
class Spent:
    """Seconds and calls by place in the tree of calls, of one step."""

    seconds: dict[Place, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[Place, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class Clock:
    """What each outermost call so far spent, by a clock that tells seconds."""

    now: Callable[[], float]
    past: list[Spent] = field(default_factory=list)
    place: Place = ()
    spent: Spent = field(default_factory=Spent)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            outer = self.place
            self.place = here = (*outer, name)
            began = self.now()
            try:
                return function(*args, **named)
            finally:
                self.spent.seconds[here] += self.now() - began
                self.spent.calls[here] += 1
                self.place = outer
                if not outer:
                    self.past.append(self.spent)
                    self.spent = Spent()

        return timed


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """While it lasts, everything in WRAPPED is timed."""
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in WRAPPED]
    for owner, name, title in WRAPPED:
        setattr(owner, name, clock.wrap(title, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


@dataclass
class Profile:
    """An engine with so many drafts, and what its steps spent so far; `steps` that count."""

    engine: Engine
    asked: Load
    drafts: str
    steps: list[tuple[int, Spent]] = field(default_factory=list)

    def run(self, now: Callable[[], float]) -> None:
        """Answer all prompts once more."""
        clock = Clock(now)
        with timed(clock):
            run = answer(self.engine, self.asked)
        self.steps += [
            (step.tokens, spent)
            for step, spent in zip(run.steps, clock.past, strict=True)
            if step.is_decoding and step.sequences == self.asked.batch
        ]

    def fastest(self) -> list[Spent]:
        """A quarter of the steps, for every number of tokens that they gave."""
        found = []
        for count in {tokens for tokens, _ in self.steps}:
            alike = [spent for tokens, spent in self.steps if tokens == count]
            alike.sort(key=lambda spent: spent.seconds[_STEP])
            found += alike[: -(-len(alike) // 4)]
        return found

    def show(self) -> None:
        """Print the tree."""
        tokens = sum(tokens for tokens, _ in self.steps) / len(self.steps)
        steps = self.fastest()
        each = sum(spent.seconds[_STEP] for spent in steps) / len(steps) / tokens
        print(
            f"\ndrafts {self.drafts}, {self.asked}: {tokens:.2f} tokens a step, "
            f"{1e6 * each:.1f} µs a token; the fastest quarter of {len(self.steps):,} steps\n"
        )
        print_head(("what", "calls", "µs", "itself, µs", "share"))
        print_tree(steps)


def profiles(a: argparse.Namespace) -> list[Profile]:
    """All settings, warmed up."""
    texts = prompts(Tokenizer.open(a.checkpoint), a.texts)[a.kind]
    found = []
    for batch in a.batch:
        asked = load(a.kind, texts, a.generate, batch, ignores_end=True)
        for drafts in a.drafts.split(","):
            engine = open_engine(a.checkpoint, _options(a, drafts, batch))
            answer(engine, asked)
            found.append(Profile(engine, asked, drafts))
    return found


def _options(a: argparse.Namespace, drafts: str, batch: int) -> OpenOptions:
    return OpenOptions(
        memory=a.memory,
        max_sequences=batch,
        max_context=1024,
        threads=a.threads,
        prefix_cache=not a.no_prefix_cache,
        draft="off" if drafts == "off" else "mtp",
        draft_tokens=int(drafts) if drafts.isdecimal() else None,
    )


def print_tree(steps: Sequence[Spent]) -> None:
    """Each place behind the one that called it, the dearest first."""
    count = len(steps)
    mean = {
        place: sum(step.seconds.get(place, 0.0) for step in steps) / count
        for place in {place for step in steps for place in step.seconds}
    }

    def order(place: Place) -> list[tuple[float, str]]:
        return [(-mean[place[: n + 1]], place[n]) for n in range(len(place))]

    for place in sorted(mean, key=order):
        below = (s for p, s in mean.items() if p[:-1] == place)
        cells = (
            "&nbsp;" * 2 * (len(place) - 1) + place[-1],
            f"{sum(step.calls.get(place, 0) for step in steps) / count:.2f}",
            f"{1e6 * mean[place]:.1f}",
            f"{1e6 * (mean[place] - sum(below)):.1f}",
            f"{100 * mean[place] / mean[_STEP]:.1f} %",
        )
        print_row(cells)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CARRIED)
    parser.add_argument("--drafts", default="off,auto,1,2,3", help="fixed numbers, auto, off")
    parser.add_argument("--batch", type=numbers, default=(1,))
    parser.add_argument("--kind", default="dialogues", choices=("stories", "dialogues", "code"))
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--generate", type=int, default=48)
    parser.add_argument("--memory", type=float, default=0.5)
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--threads", type=int, default=default_threads())
    a = parser.parse_args()
    watch = Watch()
    found = profiles(a)
    for _ in range(a.rounds):
        for profile in found:
            profile.run(time.thread_time if a.cpu_time else time.perf_counter)
    for profile in found:
        profile.show()
    print(f"\n{conditions(a.threads, watch.others_share())}")


if __name__ == "__main__":
    main()
