"""An engine's thread without an engine: it says what a script says, a token a step for everybody,
so that a server can be tested for what it makes of events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nybble.engine.limits import EngineStats
from nybble.engine.request import Alternative, Event, PromptLogprobs, Request, Token
from nybble.errors import Busy, EngineError
from nybble.text.tokenizer import Tokenizer

OnEvent = Callable[[Event], None]


@dataclass
class _Running:
    request: Request
    on_event: OnEvent
    made: int = 0


class ScriptedLoop:
    """Every choice of every request says `script`, again and again, until max_tokens.

    `step_s` is how long a step takes. A request whose prompt ends with `broken` fails after two
    tokens with `failure`; `most` requests are taken at a time; without `may_step` it hangs. Of each
    prompt `cached` tokens are said to come from the cache, and `missed` why not more; `figures` are
    further ones of the stats. `seen` are the requests, `cancelled` the ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, script: str, *, step_s: float = 0.0, most: int = 10_000
    ) -> None:
        self.tokenizer, self.script = tokenizer, tokenizer.encode(script)
        self.step_s, self.most = step_s, most
        self.broken: int | None = None
        self.failure = "the logits are NaN"
        self.cached, self.missed = 0, ""
        self.figures: dict[str, Any] = {}
        self.seen: list[Request] = []
        self.cancelled: list[str] = []
        self.busy_since: float | None = None
        self.steps = self.generated = self.prompt_tokens = 0
        self._changed = threading.Condition()
        self._running: dict[str, _Running] = {}
        self._is_stopped = False
        self.may_step = threading.Event()
        self.may_step.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stats(self) -> EngineStats:
        running = len(self._running)
        plain = EngineStats(
            *(running, 0, 100, running, 10, running, self.steps, 0),
            *(self.prompt_tokens, self.generated, 0),
        )
        return replace(plain, **self.figures)

    def submit_all(self, requests: Sequence[Request], on_event: OnEvent) -> None:
        with self._changed:
            if self._is_stopped:
                raise EngineError("the engine is stopping and takes no more requests")
            if len(requests) > self.most:
                raise EngineError(f"{len(requests)} are asked for, and {self.most} are the most")
            if len(self._running) + len(requests) > self.most:
                raise Busy(f"{self.most} run, the most that are taken", 7)
            self.seen += requests
            for request in requests:
                self._running[request.id] = _Running(request, on_event)
                self.prompt_tokens += len(request.prompt)
            self._changed.notify_all()

    def cancel(self, id: str) -> None:
        with self._changed:
            found = self._running.pop(id, None)
            self.cancelled.append(id)
        if found is not None:
            _end(found, "cancelled")

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped:
            with self._changed:
                while not self._running and not self._is_stopped:
                    self._changed.wait()
                running = list(self._running.values())
            self.busy_since = time.monotonic()
            self.may_step.wait()
            if self.step_s:
                time.sleep(self.step_s)
            self.steps += 1
            for one in running:
                self._step(one)
            self.busy_since = None
        for one in self._running.values():
            _end(one, "cancelled")

    def _step(self, one: _Running) -> None:
        request, params = one.request, one.request.params
        if request.id not in self._running:
            return
        if self.broken == request.prompt[-1] and one.made == 2:
            del self._running[request.id]
            one.on_event(Event(request.id, finish="error", error=self.failure))
            return
        if one.made == 0 and params.prompt_logprobs is not None:
            one.on_event(Event(request.id, prompt=_scores(request.prompt, params.prompt_logprobs)))
        id = self.script[one.made % len(self.script)]
        one.made += 1
        is_last = one.made >= params.max_tokens
        if is_last:
            del self._running[request.id]
        for choice in range(params.n):
            self.generated += 1
            top = _top(id, params.logprobs or 0)
            text = self.tokenizer.decode([id])
            token = Token(id, text, -0.5, "length" if is_last else "", top)
            first: dict[str, Any] = {}
            if one.made == 1:
                first = {"queued_s": 0.125, "cached": self.cached, "missed": self.missed}
            one.on_event(Event(request.id, choice, token, **first))


def _end(one: _Running, finish: str) -> None:
    for choice in range(one.request.params.n):
        one.on_event(Event(one.request.id, choice, finish=finish))  # type: ignore[arg-type]


def _top(id: int, most: int) -> tuple[Alternative, ...]:
    return tuple(Alternative(id + i, -0.5 - i) for i in range(most))


def _scores(prompt: Sequence[int], most: int) -> PromptLogprobs:
    return PromptLogprobs(
        (None, *(-1.0 - i for i in range(len(prompt) - 1))),
        ((), *(_top(token, most) for token in prompt[1:])),
    )
