"""From the engine's thread to the requests of an event loop, and back when a client goes.

The engine calls with every event; the event loop is woken once for all that came since it last
looked, as a rule once per step. A Generation is what one HTTP request asked of the engine: leaving
it, in whatever way, cancels what still runs.

Knows requests and events; neither HTTP's words nor OpenAI's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from nybble.engine.limits import EngineStats
from nybble.engine.request import Event, Finish, PromptLogprobs, Request, Token
from nybble.errors import Busy, ContextTooLong, EngineError, OutOfPages
from nybble.serve.errors import Refusal, from_nybble, invalid
from nybble.serve.metrics import Metrics, Times

Receive = Callable[[], Awaitable[object]]

#: How errors begin that are about what a request wants its answer to follow.
GRAMMAR = "grammar: "
#: How errors begin that say that a request's own options exclude every token.
NO_TOKEN = "no token is left"
#: A delivery that took a second is followed by a pause of so many, and by none longer than the
#: eye notices.
PACE = 20
LONGEST_PAUSE_S = 0.04


class Loop(Protocol):
    """The engine in a thread of its own: `nybble.engine.loop.EngineLoop`. Any thread may call."""

    @property
    def is_alive(self) -> bool:
        """Whether it still takes steps."""
        ...

    @property
    def stats(self) -> EngineStats:
        """What it does now."""
        ...

    @property
    def busy_since(self) -> float | None:
        """When the step that it takes began, by time.monotonic(); None between steps."""
        ...

    def submit_all(self, requests: Sequence[Request], on_event: Callable[[Event], None]) -> None:
        """Take all of some requests or none. Raises Busy if too many wait, EngineError for what
        can never run."""
        ...

    def cancel(self, id: str) -> None:
        """End a request soon; nothing, if it has ended."""
        ...

    def stop(self) -> None:
        """End everything."""
        ...


class Disconnected(Exception):
    """The client has gone; nobody reads an answer."""


class Bridge:
    """Brings the events of an engine to the event loop it was made in.

    Writing to many clients takes time that the engine's threads want. So it takes a part of the
    time at most: a delivery that took long makes the next one wait, and bring more at once. First
    tokens do not wait.
    """

    def __init__(self, loop: Loop, metrics: Metrics) -> None:
        self.loop, self.metrics = loop, metrics
        self._asyncio = asyncio.get_running_loop()
        self._arrived: deque[tuple[Inbox, Event, float]] = deque()
        self._is_woken = False
        self._next = 0.0

    def submit(self, requests: Sequence[Request], inbox: Inbox) -> None:
        """Hand requests to the engine, all or none; their events go to `inbox`. Raises what the
        engine raises."""
        self.loop.submit_all(requests, lambda event: self._arrive(inbox, event))

    def _arrive(self, inbox: Inbox, event: Event) -> None:
        """Called by the engine's thread."""
        self._arrived.append((inbox, event, time.perf_counter()))
        if inbox.is_new:
            inbox.is_new = False
            self._wake(self._deliver)
        elif not self._is_woken:
            self._is_woken = True
            self._wake(self._pace)

    def _wake(self, what: Callable[[], None]) -> None:
        try:
            self._asyncio.call_soon_threadsafe(what)
        except RuntimeError:  # the event loop is closed: nobody is there to read
            self._arrived.clear()

    def _pace(self) -> None:
        if self._asyncio.time() < self._next:
            self._asyncio.call_at(self._next, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        # Before the queue is emptied: an event that comes meanwhile wakes again.
        self._is_woken = False
        began = self._asyncio.time()
        while self._arrived:
            inbox, event, at = self._arrived.popleft()
            inbox.put(event, at)
        # Who was woken by this writes before what is called from here on.
        self._asyncio.call_soon(self._delivered, began)

    def _delivered(self, began: float) -> None:
        now = self._asyncio.time()
        self._next = now + min(PACE * (now - began), LONGEST_PAUSE_S)


class Inbox:
    """Events that one coroutine waits for. Belongs to the event loop; but `is_new`, whether nothing
    has come yet, is the engine's thread's."""

    def __init__(self) -> None:
        self._events: list[tuple[Event, float]] = []
        self._waiter: asyncio.Future[None] | None = None
        self.is_new = True
        self.is_disconnected = False

    def put(self, event: Event, at: float) -> None:
        """Add an event that the engine made at a time."""
        self._events.append((event, at))
        self._wake()

    def disconnect(self) -> None:
        """Say that the client has gone."""
        self.is_disconnected = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self, patience_s: float | None = None) -> list[tuple[Event, float]]:
        """All that has come, at least one event unless it takes longer. Raises Disconnected."""
        if not self._events and not self.is_disconnected:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = None if patience_s is None else loop.call_later(patience_s, self._wake)
            try:
                await self._waiter
            finally:
                if timer is not None:
                    timer.cancel()
        if self.is_disconnected:
            raise Disconnected
        events, self._events = self._events, []
        return events


@dataclass(slots=True)
class Answer:
    """What became of one choice. `finish` is "" while it goes on."""

    tokens: list[Token] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """What one event means to a writer: `index` counts choices over all prompts, `finish` is ""
    but for a choice's last, `scores` its prompt's, once these are known and if they are."""

    index: int
    token: Token | None
    scores: PromptLogprobs | None
    finish: str


class Generation:
    """The engine's work for one HTTP request, which came at `began`: as many requests as there are
    prompts. `grammar_field` is what an error of their grammar is about, `has_failed` whether an
    error ended one of them; `missed` says of each prompt why the prefix cache had no more of it.

        async with Generation(bridge, requests, receive, began) as generation:
            while not generation.is_done:
                steps = await generation.take()
    """

    def __init__(
        self,
        bridge: Bridge,
        requests: Sequence[Request],
        receive: Receive,
        began: float,
        grammar_field: str | None = None,
    ) -> None:
        self._bridge, self.requests, self._receive = bridge, requests, receive
        self._grammar_field = grammar_field
        self._inbox = Inbox()
        self.has_failed = False
        self._is_submitted = False
        self._numbers = {request.id: i for i, request in enumerate(requests)}
        self._n = requests[0].params.n
        self.answers = [Answer() for _ in range(len(requests) * self._n)]
        self.prompts: list[PromptLogprobs | None] = [None] * len(requests)
        self._cached = [0] * len(requests)
        self.missed: list[str] = [""] * len(requests)
        self._left = len(self.answers)
        self._times = [Times(began) for _ in self.answers]

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return self._left == 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        """Those of them that came from the prefix cache."""
        return sum(self._cached)

    @property
    def completion_tokens(self) -> int:
        """Tokens made so far, those that ended a choice included."""
        return sum(len(answer.tokens) for answer in self.answers)

    async def __aenter__(self) -> Generation:
        self._watcher = asyncio.create_task(self._watch())
        try:
            self._bridge.submit(self.requests, self._inbox)
            self._is_submitted = True
        except EngineError as error:
            self._leave()
            raise self._refused(error) from error
        return self

    def _refused(self, error: EngineError) -> Refusal:
        """Why the engine did not take a request: what it says then is about the request."""
        if isinstance(error, (Busy, ContextTooLong, OutOfPages)):
            return from_nybble(error)
        if not self._bridge.loop.is_alive:
            return Refusal(503, str(error), code="draining")
        is_grammar = str(error).startswith(GRAMMAR)
        return invalid(self._grammar_field if is_grammar else None, str(error))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._watcher.cancel()
        requests = self.requests if self._is_submitted else ()
        for i, request in enumerate(requests):
            choices = self.answers[i * self._n : (i + 1) * self._n]
            if not all(answer.finish for answer in choices):
                self._bridge.loop.cancel(request.id)
        self._bridge.metrics.ended(requests, self.answers, self._times)

    async def _watch(self) -> None:
        """The body has been read: what else there is to receive is that the client goes."""
        while True:
            message = await self._receive()
            if isinstance(message, dict) and message.get("type") == "http.disconnect":
                self._inbox.disconnect()
                return

    async def take(self, patience_s: float | None = None) -> list[Step]:
        """What has happened since, at least one thing unless it takes longer.

        Raises Disconnected, and Refusal if a request failed: the others of it are not shown either.
        """
        return [self._step(event, at) for event, at in await self._inbox.take(patience_s)]

    def _step(self, event: Event, at: float) -> Step:
        number = self._numbers[event.request]
        index = number * self._n + event.choice
        answer = self.answers[index]
        if event.error or event.finish in ("error", "cancelled"):
            self.has_failed = True
            raise _failure(event, self._grammar_field)
        if event.prompt is not None:
            self.prompts[number] = event.prompt
        if event.queued_s is not None:
            self._bridge.metrics.queued(event.queued_s)
        if event.cached is not None and event.choice == 0:
            self._cached[number], self.missed[number] = event.cached, event.missed
        finish: Finish = event.finish
        if event.token is not None:
            answer.tokens.append(event.token)
            answer.text.append(event.token.text)
            finish = event.token.finish
            self._bridge.metrics.token(self._times[index], at)
        if finish and not answer.finish:
            answer.finish = finish
            self._left -= 1
        return Step(index, event.token, self.prompts[number], finish)


def _failure(event: Event, grammar_field: str | None) -> Refusal:
    if event.finish == "cancelled":
        return Refusal(503, "the server ended this request, as it is going down", code="draining")
    if event.error.startswith(GRAMMAR):
        return invalid(grammar_field, event.error, "invalid_grammar")
    if event.error.startswith(NO_TOKEN):
        return invalid(None, event.error, "no_token_left")
    return Refusal(500, event.error or "the engine failed", code="engine_error")
