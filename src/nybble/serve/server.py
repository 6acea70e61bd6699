"""Listening, signals and going down: a service's life as a process.

The first SIGTERM or SIGINT lets answers under way come to their end while new requests get 503; the
second ends the process at once. SIGHUP reads the keys again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from nybble.errors import ServeError
from nybble.serve.access import Keys
from nybble.serve.app import make_app
from nybble.serve.connections import Connection, most_connections, raise_open_files
from nybble.serve.service import Service

log = logging.getLogger("nybble")

_HEADER_BYTES = 64 << 10
_BACKLOG = 512
_KEEP_ALIVE_S = 75
#: For answers to be written after their requests were ended.
_LAST_WORDS_S = 2.0


def open_keys(path: Path | None) -> Keys | None:
    """The keys of a file, or None without one. Raises ServeError."""
    return None if path is None else Keys(path)


def bind(host: str, port: int, *, has_keys: bool) -> socket.socket:
    """A socket bound to an address, not listening yet; port 0 takes a free one.

    Raises ServeError for an address that other machines reach, unless there are keys.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServeError(f"--host {host}: {error.strerror or error}") from error
    if not has_keys and not all(_is_loopback(str(entry[4][0])) for entry in found):
        raise ServeError(
            f"--host {host} can be reached from other machines, and without keys everybody who "
            "reaches it may use it: give --api-key-file FILE, or leave out --host"
        )
    family, _, _, _, address = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ServeError(
            f"--host {host} --port {port}: {error.strerror or error}; --port 0 takes a free one"
        ) from error
    return sock


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def url(sock: socket.socket) -> str:
    """Where a bound socket is asked."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    sock: socket.socket,
    make_service: Callable[[], Service],
    keys: Keys | None,
    on_ready: Callable[[], None],
) -> None:
    """Serve until a signal ends it. `make_service` is called in the event loop, `on_ready` when a
    token was generated. Raises Refusal if none can be."""
    asyncio.run(_run(sock, make_service, keys, on_ready))


async def _run(
    sock: socket.socket,
    make_service: Callable[[], Service],
    keys: Keys | None,
    on_ready: Callable[[], None],
) -> None:
    service = make_service()
    Connection.most = most_connections(raise_open_files())
    server = _Server(configure(make_app(service, keys)))
    life = _Life(service, server)
    life.catch_signals(keys)
    warming = asyncio.create_task(life.warm_up(on_ready))
    try:
        await server.serve(sockets=[sock])
        if warming.done():
            warming.result()
    finally:
        warming.cancel()
        service.close()
    log.warning("stopped")


def configure(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn runs an application of this package."""
    return uvicorn.Config(
        app,
        # Of uvicorn's parsers the one that bounds headers.
        http=Connection,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="error",
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(_LAST_WORDS_S) + 1,
    )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would close the door before answers are through, and end
        the process by the signal afterwards."""
        yield


class _Life:
    """A service between its first token and its end."""

    def __init__(self, service: Service, server: uvicorn.Server) -> None:
        self._service, self._server = service, server
        self._going: asyncio.Task[None] | None = None

    def catch_signals(self, keys: Keys | None) -> None:
        """Have the event loop told of signals."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_end, number)
        if keys is not None:
            loop.add_signal_handler(signal.SIGHUP, _reload, keys)

    async def warm_up(self, on_ready: Callable[[], None]) -> None:
        """Generate a token; a server that cannot has nothing to serve and ends."""
        try:
            await self._service.warm_up()
        except BaseException:
            self._server.should_exit = True
            raise
        on_ready()

    def _on_end(self, number: int) -> None:
        if self._going is not None:
            os._exit(128 + number)
        self._going = asyncio.get_running_loop().create_task(self._go_down())

    async def _go_down(self) -> None:
        service = self._service
        service.is_draining = True
        seconds = service.limits.drain_s
        if service.active:
            has = "answer has" if service.active == 1 else "answers have"
            log.warning("going down; %d %s %g s to end", service.active, has, seconds)
        await self._wait_until_idle(seconds)
        if service.active:
            number = "1 answer" if service.active == 1 else f"{service.active} answers"
            log.warning("%s did not end in time and must be cut off", number)
            # Stopping waits for a step to end, which must not hold up those who are told.
            await asyncio.get_running_loop().run_in_executor(None, service.loop.stop)
            await self._wait_until_idle(_LAST_WORDS_S)
        self._server.should_exit = True

    async def _wait_until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._service.active and time.monotonic() < end:
            await asyncio.sleep(0.02)


def _reload(keys: Keys) -> None:
    try:
        keys.reload()
    except ServeError as error:
        log.error("%s; the keys stay as they were", error)
    else:
        log.warning("%s: the keys were read again", keys.path)
