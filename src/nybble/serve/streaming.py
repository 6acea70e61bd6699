"""Answers as server-sent events, or whole, as the official clients read them.

A writer of one endpoint makes the bytes; here they are sent, and here it is decided what a client
sees of an error: a status, as long as nothing has been sent, and later an event `error`, without
the final [DONE].

Source: OpenAI API reference, "Streaming"; WHATWG HTML, "Server-sent events" for comments.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from nybble.errors import NybbleError
from nybble.serve.errors import from_nybble
from nybble.serve.generation import Generation, Step

Send = Callable[[Any], Awaitable[None]]
#: Runs something beside the event loop.
Aside = Callable[[Callable[[], list[bytes]]], Awaitable[list[bytes]]]

#: A client that has heard nothing for so long hears that it is waited for.
PATIENCE_S = 15.0

_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would collect the events.
    (b"x-accel-buffering", b"no"),
]
#: Entries of a list that are encoded at a time: json.dumps lets no other thread run meanwhile.
_AT_ONCE = 64
#: Bytes that are sent at a time.
_SENT_AT_ONCE = 1 << 16
_WAITING = b": waiting for the first token\n\n"
_DONE = b"data: [DONE]\n\n"


class Writer(Protocol):
    """How one endpoint writes one answer."""

    def chunk(self, step: Step) -> Iterable[bytes]:
        """The events of one step, possibly none, in pieces."""
        ...

    def is_long(self, step: Step) -> bool:
        """Whether writing a step takes longer than others may wait."""
        ...

    def end(self, generation: Generation) -> bytes:
        """The events after the last step."""
        ...

    def whole(self, generation: Generation) -> Iterable[bytes]:
        """The JSON document of an answer that is not streamed, in pieces."""
        ...


def sse(document: Mapping[str, object]) -> bytes:
    """One event."""
    return b"data: " + encode(document) + b"\n\n"


def encode(document: object) -> bytes:
    """A JSON document. Raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


def encode_inside(entries: Iterable[object]) -> Iterator[bytes]:
    """A JSON list without its brackets, in pieces."""
    left = iter(entries)
    comma = b""
    while some := list(islice(left, _AT_ONCE)):
        yield comma + encode(some)[1:-1]
        comma = b","


def separated(lists: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """The entries of a JSON list, each in pieces, with commas between."""
    for i, pieces in enumerate(lists):
        if i:
            yield b","
        yield from pieces


def usage(generation: Generation, *, is_scored_only: bool = False) -> dict[str, object]:
    """What a request took, in OpenAI's names."""
    made = 0 if is_scored_only else generation.completion_tokens
    prompt = generation.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


async def send_whole(generation: Generation, writer: Writer, send: Send, aside: Aside) -> None:
    """Wait for all of an answer and send it. Raises what `Generation.take` raises."""
    while not generation.is_done:
        await generation.take()
    # The log-probabilities of a long prompt are megabytes.
    pieces = await aside(lambda: list(_gathered(writer.whole(generation))))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(sum(map(len, pieces))).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await _send_pieces(send, pieces)
    await _send(send, b"", is_last=True)


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of a good size to send."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _SENT_AT_ONCE:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


async def _send_pieces(send: Send, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        await _send(send, piece)
        # Sending waits for slow readers only; others are to have their turn with fast ones too.
        await asyncio.sleep(0)


async def send_events(generation: Generation, writer: Writer, send: Send, aside: Aside) -> None:
    """Send an answer as it comes. Raises what `Generation.take` raises before the first token."""
    steps = await generation.take(PATIENCE_S)
    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
    try:
        while True:
            out = await _written(writer, steps, send, aside)
            if generation.is_done:
                break
            if not steps:
                out = _WAITING
            if out:
                await _send(send, out)
            steps = await generation.take(None if steps else PATIENCE_S)
        out += writer.end(generation) + _DONE
    except NybbleError as error:
        out = sse(from_nybble(error).body())
    await _send(send, out, is_last=True)


async def _written(writer: Writer, steps: list[Step], send: Send, aside: Aside) -> bytes:
    """The events of some steps; long ones are sent here, with what came before them."""
    out: list[bytes] = []
    for step in steps:
        if not writer.is_long(step):
            out += writer.chunk(step)
            continue
        pieces = await aside(lambda step=step: list(_gathered(writer.chunk(step))))  # type: ignore[misc]
        await _send_pieces(send, [b"".join(out), *pieces])
        out = []
    return b"".join(out)


async def _send(send: Send, out: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": out, "more_body": not is_last})
