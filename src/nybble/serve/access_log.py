"""A line for each request: who asked for what, how it was answered, and what that took.

Failures are warnings, all else is information, which nobody sees who does not ask for it. What was
asked and answered, keys and query strings are not written. Failed probes are information too: an
orchestrator asks every second while a model is being opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.serve.access import OPEN
from nybble.serve.generation import Generation

log = logging.getLogger("nybble.access")

#: Where an endpoint that generates leaves its Generation in the request's scope.
GENERATION = "nybble.generation"
_MOST_CHARACTERS = 200
#: Of one request's prompts, so many say why they missed.
_MOST_REASONS = 4


class AccessLog:
    """ASGI middleware around all of an application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and write a line when the answer has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def watching(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watching)
        finally:
            _write(scope, status, time.perf_counter() - began)


def _write(scope: Scope, status: int, seconds: float) -> None:
    generation: Generation | None = scope.get(GENERATION)
    is_failed = status >= 400 or (generation is not None and generation.has_failed)
    level = logging.WARNING if is_failed and scope["path"] not in OPEN else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "%s", line(scope, status, seconds, generation))


def line(
    scope: MutableMapping[str, Any], status: int, seconds: float, generation: Generation | None
) -> str:
    """The line: "-" stands for what there is not, such as the status of an answer that the client
    did not wait for, and "abort" for the finish of a choice that was ended. Last comes why the
    prefix cache had no more of the prompts, where it did not have all that it could."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    client = "{}:{}".format(*scope["client"]) if scope.get("client") else "-"
    prompt = cached = completion = finish = "-"
    missed: list[str] = []
    if generation is not None:
        prompt, completion = str(generation.prompt_tokens), str(generation.completion_tokens)
        cached, missed = str(generation.cached_tokens), [m for m in generation.missed if m]
        finish = ",".join(sorted({answer.finish or "abort" for answer in generation.answers}))
    return (
        f"{now} {client} {_plain(scope['method'])} {_plain(scope['path'])} {status or '-'} "
        f"prompt={prompt} cached={cached} completion={completion} seconds={seconds:.3f} "
        f"finish={finish}" + "".join(f' missed="{reason}"' for reason in missed[:_MOST_REASONS])
    )


def _plain(text: str) -> str:
    """A client's text in one word: it could hold the end of a line, and another line after it."""
    return quote(text[:_MOST_CHARACTERS], safe="/:@!$&'()*+,;=", errors="replace")
