"""An engine in a thread of its own: others submit and cancel, and are called with what came of it.

Knows requests and events; refuses to know tensors and connections. The thread sleeps while there is
nothing to do, and whatever fails, it ends the requests that it must and goes on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nybble.engine.engine import Engine
from nybble.engine.limits import EngineStats
from nybble.engine.request import Event, Request
from nybble.errors import Busy, EngineError, NybbleError

log = logging.getLogger("nybble")

OnEvent = Callable[[Event], None]

#: The pace that tells when to come again is that of so many endings, in so much computing.
_ENDINGS = 32
_PACE_S = 60
_LONGEST_WAIT_S = 60
#: An idle engine's cache is walked at most this often.
_WHOLE_CHECK_S = 60


@dataclass(slots=True, eq=False)
class _Open:
    """A request that was taken and has not ended: the choices `left` go on."""

    request: Request
    on_event: OnEvent
    left: set[int]


class EngineLoop:
    """Runs an engine until `stop`; begins at once.

    At most `max_waiting` choices wait beyond those that can run at once; who comes then gets Busy.
    `on_event` of a request is called from the loop's thread, in order, and must not block. After
    `submit` every choice ends with one event that has a `finish`, in the event or in its token.
    `busy_since` is when the step under way began, by time.monotonic; None between steps.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256) -> None:
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 0:
            raise EngineError(f"max_waiting must be a whole number from 0, found {max_waiting!r}")
        self.engine, self.max_waiting = engine, max_waiting
        self._most = engine.most_sequences + max_waiting
        self.busy_since: float | None = None
        self._computed_s = 0.0  # what all steps took until now
        self._checked = -math.inf
        # All below is guarded by the condition; the engine itself is the thread's alone.
        self._changed = threading.Condition()
        self._open: dict[str, _Open] = {}
        self._new: list[_Open] = []
        self._cancelled: list[_Open] = []
        self._ended: deque[float] = deque(maxlen=_ENDINGS)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="nybble-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------ other threads

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def stats(self) -> EngineStats:
        """The engine's figures; those that were submitted a moment ago are not in it."""
        return self.engine.stats

    def submit(self, request: Request, on_event: OnEvent) -> None:
        """`submit_all` of one request."""
        self.submit_all((request,), on_event)

    def submit_all(self, requests: Sequence[Request], on_event: OnEvent) -> None:
        """Take all of these requests, or none of them.

        What is wrong with one is raised here, as by `Engine.validate`; a grammar that cannot be
        used is told by its events. Raises Busy if too many wait, EngineError for more choices than
        can ever be under way, for an id in use and after `stop`.
        """
        for request in requests:
            self.engine.validate(request)
        entries = [_Open(r, on_event, set(range(r.params.n))) for r in requests]
        with self._changed:
            if self._is_stopped or not self._thread.is_alive():
                raise EngineError("the engine is stopping and takes no more requests")
            self._check_ids([request.id for request in requests])
            self._check_room(sum(len(entry.left) for entry in entries))
            self._open |= {entry.request.id: entry for entry in entries}
            self._new += entries
            self._changed.notify_all()

    def _check_ids(self, ids: Sequence[str]) -> None:
        seen: set[str] = set()
        for id in ids:
            if id in self._open or id in seen:
                raise EngineError(f"request {id!r} is already under way; choose another id")
            seen.add(id)

    def _check_room(self, choices: int) -> None:
        if choices > self._most:
            raise EngineError(
                f"{choices} choices are asked for at once, and {self._most} are the most that "
                f"run ({self._most - self.max_waiting}) and wait ({self.max_waiting}); ask for "
                "fewer, or raise max_waiting"
            )
        taken = sum(len(entry.left) for entry in self._open.values())
        if taken + choices > self._most:
            seconds = self._retry_after(taken + choices - self._most)
            raise Busy(
                f"{taken} sequences run or wait, of {self._most} that are taken; come again in "
                f"{seconds} s",
                seconds,
            )

    def cancel(self, id: str) -> None:
        """End a request before its next step; nothing, if it has ended. Its events tell."""
        with self._changed:
            if id in self._open:
                self._cancelled.append(self._open[id])
                self._changed.notify_all()

    def stop(self) -> None:
        """Cancel what is under way and end the thread, after the step that it computes."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _clock(self) -> float:
        """Seconds that the engine has computed: it stands while nobody asks anything."""
        since = self.busy_since
        return self._computed_s + (0.0 if since is None else time.monotonic() - since)

    def _retry_after(self, endings: int) -> int:
        """Seconds until so many sequences will have ended, at the pace of the last ones."""
        now = self._clock()
        times = [at for at in self._ended if at > now - _PACE_S]
        if len(times) < 2:  # too few to tell yet; or it is slow
            return 1 if now < _PACE_S else _LONGEST_WAIT_S
        pace = (times[-1] - times[0]) / (len(times) - 1)
        return max(1, min(_LONGEST_WAIT_S, math.ceil(pace * endings)))

    # ------------------------------------------------------------------------------ its own thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            with self._changed:
                self._is_stopped = True
                self._new = []
            self._lose_all("the engine has stopped")  # nobody waits for a thread that is gone

    def _turn(self) -> bool:
        """Wait for something to do and do it; False when it is time to end."""
        with self._changed:
            while not (self._new or self._cancelled or self._is_stopped) and self.engine.is_idle:
                self._changed.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            is_stopped = self._is_stopped
        for entry in new:
            self._add(entry)
        for entry in tuple(self._open.values()) if is_stopped else cancelled:
            self._end(entry)
        if is_stopped:
            self.engine.close()
        else:
            self._step()
        return not is_stopped

    def _is_open(self, entry: _Open) -> bool:
        """Whether it has not ended meanwhile; another may have its id."""
        return self._open.get(entry.request.id) is entry

    def _add(self, entry: _Open) -> None:
        if not self._is_open(entry):
            return
        id = entry.request.id
        try:
            self.engine.add(entry.request)
        except Exception as error:
            if not isinstance(error, NybbleError):
                log.exception("request %r could not be added; it ends", id)
            self._forget(id, str(error) or type(error).__name__)

    def _forget(self, id: str, reason: str) -> None:
        """End a request of which the engine may have taken a part."""
        try:
            self.engine.cancel(id)
        except Exception as error:
            self._fail(error)
        else:
            self._lose(id, reason)

    def _end(self, entry: _Open) -> None:
        if not self._is_open(entry):
            return
        try:
            self._deliver(self.engine.cancel(entry.request.id))
        except Exception as error:
            self._fail(error)

    def _step(self) -> None:
        self.busy_since = began = time.monotonic()
        try:
            self._deliver(self.engine.step())
            if self.engine.is_idle:
                self._check()
        except Exception as error:
            self._fail(error)
        finally:
            self._computed_s += time.monotonic() - began
            self.busy_since = None

    def _check(self) -> None:
        """Nothing may be lost; now and then the cache is walked for it, too."""
        now = time.monotonic()
        is_whole = now - self._checked >= _WHOLE_CHECK_S
        self._checked = now if is_whole else self._checked
        self.engine.check(is_whole=is_whole)

    def _fail(self, error: Exception) -> None:
        """Nobody knows what state the engine is in: begin with an empty one."""
        log.error("the engine failed; all requests end", exc_info=error)
        reason = str(error) or type(error).__name__
        self.engine.abort(reason)
        self._lose_all(reason)

    def _lose_all(self, reason: str) -> None:
        """End whatever was handed to the engine, also what it has forgotten about in failing."""
        with self._changed:
            kept = {entry.request.id for entry in self._new}
            lost = [id for id in self._open if id not in kept]
        for id in lost:
            self._lose(id, reason)

    def _lose(self, id: str, reason: str) -> None:
        """End a request that the engine does not have."""
        choices = sorted(self._open[id].left)
        self._deliver([Event(id, choice, finish="error", error=reason) for choice in choices])

    def _deliver(self, events: Iterable[Event]) -> None:
        for event in events:
            entry = self._open[event.request]
            try:
                entry.on_event(event)
            except Exception:
                # Who listens is gone; the request would compute for nobody.
                log.exception("request %r: its listener failed; it is cancelled", event.request)
                self.cancel(event.request)
            if event.finish or (event.token is not None and event.token.finish):
                self._note_end(event, entry)

    def _note_end(self, event: Event, entry: _Open) -> None:
        with self._changed:
            entry.left.remove(event.choice)
            self._ended.append(self._clock())
            if not entry.left:
                del self._open[event.request]
