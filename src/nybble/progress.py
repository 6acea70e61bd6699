"""The one progress display: a stage, how far it is, how fast, how long still.

A terminal gets a line that is rewritten; anything else gets a whole line now and then. Nothing is
silent for longer than 3 s on a terminal, 10 s otherwise, as long as the work calls `advance`. Goes
to stderr; results go to stdout.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

#: A wait without progress of its own is told of after this long, and as often.
TELL_EVERY_S = 2.0


class Progress:
    """What a long job tells the person in front of it. This base class is silent: the library's
    default."""

    def stage(self, title: str, total: int, unit: str = "bytes") -> None:
        """Begin a stage of `total` units: bytes, or token layers."""

    def advance(self, count: int, note: str = "") -> None:
        """Count so many units as done; `note` names what was done last."""

    def say(self, line: str) -> None:
        """A line that stays: what is about to happen, and what it needs."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the display."""


class Display(Progress):
    """Progress on stderr."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.every_s = 0.1 if self.is_terminal else 5.0
        self.title, self.unit = "", "bytes"
        self.total = self.done = 0
        self.started = self.shown = time.monotonic()
        self.open_line = False

    def stage(self, title: str, total: int, unit: str = "bytes") -> None:
        """Begin a stage; it is announced at once."""
        self._end_line()
        self.title, self.unit, self.total, self.done = title, unit, total, 0
        self.started = time.monotonic()
        self._show("")

    def advance(self, count: int, note: str = "") -> None:
        """Count units; redraw when it is time."""
        self.done += count
        if time.monotonic() - self.shown >= self.every_s or self.done >= self.total:
            self._show(note)

    def say(self, line: str) -> None:
        """A whole line on stderr."""
        self._end_line()
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def _show(self, note: str) -> None:
        self.shown = now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        share = self.done / self.total if self.total else 1.0
        text = f"{self.title}: {share:4.0%} of {self._amount(self.total)}"
        if self.done:
            left = elapsed / self.done * (self.total - self.done)
            text += f", {self._rate(self.done / elapsed)}, {left:.0f} s left"
        if note:
            text += f"  {note}"
        if self.is_terminal:
            sys.stderr.write("\r\x1b[2K" + text[:150])
            self.open_line = True
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _amount(self, count: int) -> str:
        return f"{count / 2**30:.2f} GiB" if self.unit == "bytes" else f"{count:,} {self.unit}"

    def _rate(self, each_second: float) -> str:
        if self.unit == "bytes":
            return f"{each_second / 1e9:.2f} GB/s"
        return f"{each_second:,.0f} {self.unit}/s"

    def _end_line(self) -> None:
        if self.open_line:
            sys.stderr.write("\n")
            self.open_line = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cursor on a fresh line."""
        self._end_line()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say every two seconds on stderr that something without progress of its own still goes on."""
    over = threading.Event()
    started = time.monotonic()

    def tell() -> None:
        while not over.wait(TELL_EVERY_S):
            sys.stderr.write(f"{what}: {time.monotonic() - started:.0f} s\n")
            sys.stderr.flush()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
