"""Who may ask: every request but a probe's needs a key, and without keys only this machine asks.

The decision is made on the path that the router matches, before it does, and what is not named here
is closed. Keys are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.errors import ServeError
from nybble.serve.errors import Refusal, respond

#: What a probe may see without a key, by the exact path.
OPEN = frozenset(("/health", "/ready"))
#: Where the digest of a request's key is left in its scope; nothing, where there are no keys.
KEY_DIGEST = "nybble.key_digest"
#: A key shorter than this can be guessed.
SHORTEST_KEY = 16
_MOST_BYTES = 1 << 20
_LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "::1"))


class Keys:
    """The keys of a file: one a line, empty lines and those that begin with # left out."""

    def __init__(self, path: Path) -> None:
        """Raises ServeError."""
        self.path = path
        self._digests: tuple[bytes, ...] = ()
        self.reload()

    def reload(self) -> None:
        """Read the file again; if it cannot be used, the keys stay and ServeError is raised."""
        try:
            with self.path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise ServeError(f"{self.path}: reading it: {error.strerror or error}") from error
        if len(data) > _MOST_BYTES:
            raise ServeError(f"{self.path}: longer than {_MOST_BYTES:,} bytes")
        lines = [line.strip() for line in data.splitlines()]
        keys = [line for line in lines if line and not line.startswith(b"#")]
        for i, key in enumerate(keys, 1):
            if len(key) < SHORTEST_KEY or not all(0x21 <= byte <= 0x7E for byte in key):
                raise ServeError(
                    f"{self.path}: key {i} must be {SHORTEST_KEY} or more visible ASCII "
                    "characters; `openssl rand -hex 32` makes one"
                )
        if not keys:
            raise ServeError(f"{self.path}: has no key; `openssl rand -hex 32` makes one")
        self._digests = tuple(hashlib.sha256(key).digest() for key in keys)

    def find(self, key: bytes) -> bytes | None:
        """The digest of a key that is one of these, else None, in a time that does not depend on
        how much of it fits."""
        digest = hashlib.sha256(key).digest()
        found = [hmac.compare_digest(digest, own) for own in self._digests]
        return digest if any(found) else None


class Access:
    """An application behind a door: ASGI middleware around all of it."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may be asked; answer 401 or 403 to the rest."""
        if scope["type"] == "http":
            refusal = self._judge(scope)
            if refusal is not None:
                await respond(refusal)(scope, receive, send)
                return
        elif scope["type"] != "lifespan":
            return
        await self._app(scope, receive, send)

    def _judge(self, scope: Scope) -> Refusal | None:
        """Why not, or None; the scope of who may gets the digest of its key."""
        if scope["path"] in OPEN:
            return None
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        if self._keys is None:
            return _judge_host(headers)
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = self._keys.find(key.strip()) if scheme.lower() == b"bearer" else None
        if digest is not None:
            scope[KEY_DIGEST] = digest
            return None
        return Refusal(
            401,
            "this server needs a key: send the header Authorization: Bearer KEY"
            if not given
            else "this is no key of this server",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _judge_host(headers: Sequence[tuple[bytes, bytes]]) -> Refusal | None:
    """Without keys only this machine is served. A web page can have its own name point to this
    machine, and its visitor's browser would ask under that name."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    name = hosts[0].lower() if len(hosts) == 1 else "" if hosts else "localhost"
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name in _LOCAL_NAMES or name.endswith(".localhost"):
        return None
    return Refusal(
        403,
        f"without keys this server answers under localhost only, found the host {name[:100]!r}; "
        "start it with --api-key-file to use another name",
        code="host_not_allowed",
    )
