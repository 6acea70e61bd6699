"""What is served, and what all routes share: the model's texts, the engine's thread, the limits,
and whether it goes up, runs, or goes down.

Knows no HTTP but refusals.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from nybble.engine.request import Request, SamplingParams
from nybble.serve.errors import Refusal, invalid
from nybble.serve.fields import read_json
from nybble.serve.generation import Bridge, Inbox, Loop
from nybble.serve.metrics import Metrics
from nybble.serve.protocol import Bounds
from nybble.text.chat import ChatTemplate
from nybble.text.pieces import Pieces
from nybble.text.tokenizer import Tokenizer

log = logging.getLogger("nybble")
T = TypeVar("T")

#: A conversation renders in milliseconds; a template that takes this long is refused.
RENDER_S = 5.0
#: More characters for each token of the context than any text has: such a prompt is too long, and
#: is not read to count by how much.
MOST_CHARACTERS_PER_TOKEN = 64
#: An engine whose step takes so long hangs.
STALL_S = 300.0
#: Names of the arguments of ChatTemplate.render, and what the server gives a template itself.
_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "time_limit_s", "self")
)


@dataclass(frozen=True, slots=True)
class Served:
    """The model: under which `names` (the first is shown), with which texts and bounds, and how
    many `sequences` run at once.

    `fingerprint` tells answers of other weights, kernels or settings apart.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    bounds: Bounds
    fingerprint: str
    sequences: int
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes: bytes of a body, seconds for it to come, requests that are answered
    at a time, and seconds for those under way when it goes down."""

    body_bytes: int = 8 << 20
    body_s: float = 60.0
    active: int = 896
    drain_s: float = 30.0


class Service:
    """One model being served. Made in the event loop's thread, and used there."""

    def __init__(self, served: Served, loop: Loop, limits: Limits) -> None:
        self.served, self.loop, self.limits = served, loop, limits
        self.metrics = Metrics(served.names[0], served.sequences, lambda: loop.stats)
        self.bridge = Bridge(loop, self.metrics)
        self.pieces = Pieces(served.tokenizer)
        template = served.template
        self.switches = (
            frozenset() if template is None else template.variables() - template.tokens.keys()
        ) - _RESERVED
        self.is_draining = False
        self.active = 0
        self._is_warm = False
        self._texts = ThreadPoolExecutor(2, "nybble-text")
        self._numbers = itertools.count()

    # ------------------------------------------------------------------------------ up and down

    async def warm_up(self) -> None:
        """Generate a token, which is what makes it ready. Raises Refusal if that fails."""
        token = self.served.tokenizer.bos_id or 0
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        inbox = Inbox()
        self.bridge.submit((Request("warm-up", (token,), params),), inbox)
        event, _ = (await inbox.take())[-1]
        if event.token is None:
            raise Refusal(503, f"the model generates nothing: {event.error or event.finish}")
        self._is_warm = True

    @property
    def unready(self) -> str:
        """Why no request should be sent here; "" if they may."""
        if self.is_draining:
            return "the server is going down"
        if not self.is_healthy:
            return "the engine has stopped"
        return "" if self._is_warm else "the model has not generated its first token yet"

    @property
    def is_healthy(self) -> bool:
        """Whether the engine lives, and its step has not begun too long ago."""
        since = self.loop.busy_since
        return self.loop.is_alive and (since is None or time.monotonic() - since < STALL_S)

    def admit(self) -> None:
        """Raise Refusal if no new request is taken."""
        if self.is_draining or not self.loop.is_alive:
            raise Refusal(
                503,
                "the server is going down; ask another, or again later",
                code="draining",
                headers={"retry-after": "5", "connection": "close"},
            )
        if self.active >= self.limits.active:
            raise Refusal(
                503,
                f"{self.active} requests are being answered, the most this server takes",
                code="busy",
                headers={"retry-after": "1", "connection": "close"},
            )

    def close(self) -> None:
        """Let go of the threads that prepare texts."""
        self._texts.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------ preparing

    async def prepare(self, body: bytes, read: Callable[[Mapping[str, object], Bounds], T]) -> T:
        """A body as what it asks for, read beside the event loop. Raises Refusal."""

        def run() -> T:
            return read(read_json(body), self.served.bounds)

        return await self.aside(run)

    async def aside(self, run: Callable[[], T]) -> T:
        """Run something that takes a while beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, run)

    def new_id(self, kind: str) -> str:
        """An id for an answer, which nobody can guess and which is unique here."""
        return f"{kind}-{secrets.token_hex(8)}{next(self._numbers):x}"

    def check_model(self, name: str | None) -> str:
        """The name to answer under. Raises Refusal for a model that is not served."""
        if name is None:
            return self.served.names[0]
        if name not in self.served.names:
            raise Refusal(
                404,
                f"the model {name!r} is not served here; there is {', '.join(self.served.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    def encode(self, path: str, text: str, *, add_special: bool) -> tuple[int, ...]:
        """The token ids of a prompt. Raises Refusal for a text that is far too long."""
        most = self.served.bounds.context * MOST_CHARACTERS_PER_TOKEN
        if len(text) > most:
            raise invalid(
                path,
                f"{path} has {len(text):,} characters, which are no {self.served.bounds.context:,} "
                "tokens, the most that fit; shorten it",
                "context_length_exceeded",
            )
        return tuple(self.served.tokenizer.encode(text, add_special=add_special))

    def check_prompt(self, path: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Token ids that leave room for an answer. Raises Refusal."""
        context = self.served.bounds.context
        if not ids:
            raise invalid(path, f"{path} is empty: there is no token to go on from")
        if len(ids) >= context:
            raise invalid(
                path,
                f"{path} has {len(ids):,} tokens, and prompt and answer together have room for "
                f"{context:,}; shorten it",
                "context_length_exceeded",
            )
        return ids
