"""What the endpoints that generate have in common, from the body to the last byte.

Each of them prepares a body, which gives requests for the engine and a writer of the answer; here
these meet the engine and the client.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.types import Receive, Scope, Send

from nybble.engine.request import Request
from nybble.serve.access import KEY_DIGEST
from nybble.serve.access_log import GENERATION
from nybble.serve.errors import Refusal, invalid
from nybble.serve.generation import Disconnected, Generation
from nybble.serve.protocol import Asked, Bounds
from nybble.serve.service import Service
from nybble.serve.streaming import Writer, send_events, send_whole

#: Log-probabilities of prompts that one answer shows, some 45 bytes each: those of a prompt of
#: 262,144 tokens with three alternatives.
MOST_SCORES = 1 << 20
#: Log-probabilities of generated tokens, which the engine makes at its own pace.
MOST_LOGPROBS = 1 << 23
#: Characters of prompts that one answer repeats.
MOST_ECHOED = 1 << 24


@dataclass(frozen=True, slots=True)
class Prepared:
    """Requests that can go to the engine, and the name and id to answer under."""

    asked: Asked
    model: str
    id: str
    requests: tuple[Request, ...]

    def head(self, service: Service, kind: str) -> dict[str, object]:
        """The fields that every document of the answer begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": service.served.fingerprint,
        }


Prepare = Callable[[Service, Mapping[str, object], Bounds], tuple[Prepared, Writer]]


def check_size(requests: Sequence[Request], context: int, *, lists: int, echoed: int = 0) -> None:
    """Raise Refusal for an answer that would be far longer than its request: one that shows the
    scores of every prompt `lists` times, and `echoed` characters of prompts for each choice."""
    params = requests[0].params
    tokens = sum(len(request.prompt) for request in requests)
    each = (params.prompt_logprobs or 0) + 1
    if params.prompt_logprobs is not None and tokens * lists * each > MOST_SCORES:
        raise invalid(
            "prompt",
            f"the answer would have {tokens * lists * each:,} log-probabilities of prompts "
            f"({tokens:,} tokens, shown {lists:,} times, {each} for each), and may have "
            f"{MOST_SCORES:,}; send fewer prompts at a time, or ask for fewer alternatives or n",
        )
    if echoed * params.n > MOST_ECHOED:
        raise invalid(
            "echo",
            f"the answer would repeat {echoed:,} characters of prompts {params.n} times, and may "
            f"have {MOST_ECHOED:,} of them; send fewer prompts at a time, or leave out echo or n",
        )
    left = sum(min(params.max_tokens, max(context - len(r.prompt), 1)) for r in requests)
    made = left * params.n * ((params.logprobs or 0) + 1)
    if params.logprobs is not None and made > MOST_LOGPROBS:
        raise invalid(
            "max_tokens",
            f"the answer could have {made:,} log-probabilities ({left:,} tokens of {len(requests)} "
            f"prompts, {params.n} choices, {params.logprobs + 1} for each), and may have "
            f"{MOST_LOGPROBS:,}; lower max_tokens, logprobs or n",
        )


class Answering:
    """An endpoint that generates, as an ASGI application for one route."""

    def __init__(self, service: Service, prepare: Prepare) -> None:
        self._service, self._prepare = service, prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises Refusal before anything is sent."""
        service, began = self._service, time.perf_counter()
        service.admit()
        service.active += 1
        try:
            body = await read_body(scope, receive, service)
            prepared, writer = await service.prepare(
                body, lambda values, bounds: self._prepare(service, values, bounds)
            )
            field = prepared.asked.grammar_field
            salt = salt_of(scope.get(KEY_DIGEST, b""), prepared.asked.cache_salt)
            requests = [replace(request, salt=salt) for request in prepared.requests]
            async with Generation(service.bridge, requests, receive, began, field) as generation:
                scope[GENERATION] = generation
                if prepared.asked.stream:
                    await send_events(generation, writer, send, service.aside)
                else:
                    await send_whole(generation, writer, send, service.aside)
        except Disconnected:
            pass
        finally:
            service.active -= 1


def salt_of(key_digest: bytes, cache_salt: str) -> bytes:
    """What divides the prefix cache: requests share prefixes if both the key and what they ask to
    be told apart by are equal. Else a key's owner could find out, by time or by `cached_tokens`,
    how prompts of another one begin."""
    if not key_digest and not cache_salt:
        return b""
    digest = hashlib.sha256(b"nybble prefix cache")
    for part in (key_digest, cache_salt.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


async def read_body(scope: Scope, receive: Receive, service: Service) -> bytes:
    """A request's body. Raises Refusal if it is no JSON by its header, too long, or too slow, and
    Disconnected."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        # A web page can send other types to a server on its visitor's machine without asking.
        raise Refusal(
            415,
            "the body must be JSON and say so: add the header Content-Type: application/json "
            f"(found {kind.decode('latin-1')[:100] or 'none'})",
        )
    most = service.limits.body_bytes
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 18 or int(length) > most:
        raise _too_long(most)
    try:
        async with asyncio.timeout(service.limits.body_s):
            return await _collect(receive, most)
    except TimeoutError as error:
        raise Refusal(
            408,
            f"the body did not come within {service.limits.body_s:g} s",
            headers={"connection": "close"},
        ) from error


async def _collect(receive: Receive, most: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_long(most)
        if not message.get("more_body", False):
            return bytes(body)


def _too_long(most: int) -> Refusal:
    return Refusal(
        413,
        f"the body is longer than {most:,} bytes, the most this server takes",
        code="body_too_large",
        headers={"connection": "close"},
    )
