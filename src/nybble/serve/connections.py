"""Connections before and between requests: how long each may wait, and how many there may be.

Whoever reaches the port may connect, before any key is asked for. So a request's headers must come
within a time, and where there are too many connections the one that has waited longest without a
request goes.
"""

from __future__ import annotations

import asyncio
import resource
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Connections at a time: fewer where the process may not open as many files.
MOST_CONNECTIONS = 1_024
#: Of the files a process may open, those that are not for connections.
_OTHER_FILES = 64


def raise_open_files() -> int:
    """Let this process open as many files as it may; how many these are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return MOST_CONNECTIONS + _OTHER_FILES if hard == resource.RLIM_INFINITY else hard


def most_connections(files: int) -> int:
    """How many connections a process takes that may open so many files."""
    return max(1, min(MOST_CONNECTIONS, files - _OTHER_FILES))


class Connection(H11Protocol):
    """One connection. From when it is made, or the first byte after an answer, it has `head_s`
    seconds until a request's headers are complete; so has what a client still sends of a body after
    it was answered."""

    head_s = 10.0
    most = MOST_CONNECTIONS
    _timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.since = time.monotonic()
        self._start()
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the time runs until they are a request."""
        super().data_received(data)
        if self.is_waiting:
            self._start()
        else:
            self._stop()

    def on_response_complete(self) -> None:
        """Wait for the next request; for the rest of this one or a begun one not for long."""
        self.since = time.monotonic()
        super().on_response_complete()
        is_begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        if self.is_waiting and is_begun:
            self._start()

    def _start(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.head_s, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_room(self) -> None:
        """Close who has waited longest, this connection itself where all others are answered."""
        waiting = [one for one in self.connections if isinstance(one, Connection)]
        idle = [one for one in waiting if one.is_waiting and not one.transport.is_closing()]
        min(idle, key=lambda one: one.since).transport.abort()
