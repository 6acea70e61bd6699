"""Which tokens a grammar allows next, asked of a process that can be ended.

A schema of one line can take hours or all memory to compile. So grammars live in a process of their
own (`grammar_worker`), with limits to its time and memory. When it ends, whoever made it end is
told, and it begins anew with the grammars of all others, brought to where they were by the tokens
they had accepted.

One thread calls it. Knows neither texts nor logits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nybble.engine.grammar_worker import HEAD, Message, packed
from nybble.engine.request import Grammar
from nybble.errors import EngineError, MissingExtra

#: Beyond the limit that the process keeps itself, before it is taken for stuck.
_GRACE_S = 5.0
#: Exit codes of a process that somebody ended: the system's, when memory is short, or a person.
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may take: to compile, for one token, and together with all others of memory
    beside the tokenizer; and what the process may take to open a tokenizer."""

    compile_s: float = 5.0
    step_s: float = 5.0
    memory_bytes: int = 2 << 30
    open_s: float = 60.0


@dataclass(slots=True)
class _Live:
    """A grammar that is in use, and the tokens it has accepted. `is_suspect`: somebody ended the
    process when it last worked at this one."""

    grammar: Grammar
    tokens: list[int] = field(default_factory=list)
    is_ready: bool = False
    is_suspect: bool = False
    error: str = ""


class GrammarWorker:
    """Grammars of sequences, by keys that are never used twice.

    `tokenizer` is the path of a tokenizer.json, `vocab` how many logits the model has: tokens that
    the tokenizer does not have are never allowed, `eos` wherever the grammar may end. The process
    begins with the first grammar.
    """

    def __init__(
        self,
        tokenizer: Path,
        vocab: int,
        eos: Collection[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        self.limits = limits or GrammarLimits()
        self._opening: Message = {
            "tokenizer": str(tokenizer.absolute()),
            "vocab": vocab,
            "eos": sorted(eos),
            "memory_bytes": self.limits.memory_bytes,
            "compile_s": self.limits.compile_s,
        }
        self._live: dict[int, _Live] = {}
        self._child: _Child | None = None
        self._asked: list[int] = []
        # Steps wanted of the process, and what it said: by what is to be done, and the key.
        self._wanted: dict[_Step, Message] = {}
        self._answers: dict[_Step, tuple[Message, bytes]] = {}

    def start(self, key: int, grammar: Grammar) -> None:
        """Begin to compile a grammar; `is_ready` tells when that is done, and what asks for its
        masks waits for it. Raises MissingExtra without llguidance, EngineError for a key in use and
        for a process that cannot begin."""
        if importlib.util.find_spec("llguidance") is None:
            raise MissingExtra(
                "grammar: structured output needs the library llguidance: "
                "pip install 'nybble[serve]'"
            )
        if key in self._live:
            raise EngineError(f"grammar: the key {key} is in use")
        is_new = self._child is None
        self._live[key] = _Live(grammar)
        try:
            child = self._running()
        except EngineError:
            del self._live[key]
            raise
        if not is_new:
            self._send_start(child, key)

    def is_ready(self, key: int) -> bool:
        """Whether a grammar is compiled; never waits. Raises EngineError if it cannot be used."""
        self._wait(lambda: True)
        live = self._live[key]
        if live.error:
            raise EngineError(live.error)
        return live.is_ready

    def ask(self, keys: Sequence[int]) -> None:
        """Begin to find the masks of these grammars, for `collect`."""
        self._asked = list(keys)
        for key in keys:
            self._wanted["mask", key] = {"do": "mask", "key": key}
        self._send_wanted()

    def collect(self) -> list[bytes]:
        """The masks asked for, a bit for each token, lowest first; none for a grammar that failed
        (`failure`), and so no token is allowed."""
        steps: list[_Step] = [("mask", key) for key in self._asked]
        self._asked = []
        self._wait(lambda: not any(step in self._wanted for step in steps))
        return [self._answers.pop(step, ({}, b""))[1] for step in steps]

    def masks(self, keys: Sequence[int]) -> list[bytes]:
        """`ask` and `collect`."""
        self.ask(keys)
        return self.collect()

    def accept(self, key: int, token: int) -> bool:
        """Take a token; whether the text is complete and nothing may follow. Raises EngineError for
        a token that the grammar does not allow, and for a grammar that failed."""
        step: _Step = ("accept", key)
        self._wanted[step] = {"do": "accept", "key": key, "token": token}
        self._wait(lambda: step not in self._wanted)
        answer, _ = self._answers.pop(step, ({}, b""))
        live = self._live[key]
        if live.error:
            raise EngineError(live.error)
        live.tokens.append(token)
        return bool(answer["is_complete"])

    def failure(self, key: int) -> str:
        """Why a grammar cannot be used (any further); "" if it can."""
        return self._live[key].error

    def drop(self, key: int) -> None:
        """Forget a grammar."""
        if self._live.pop(key, None) is None:
            return
        for step in (("mask", key), ("accept", key)):
            self._wanted.pop(step, None)
            self._answers.pop(step, None)
        if self._child is not None:
            self._child.send({"do": "drop", "key": key})

    def close(self) -> None:
        """End the process; the next grammar begins another."""
        if self._child is not None:
            self._child.kill()
        self._child = None
        self._live.clear()

    # ------------------------------------------------------------------------- one process's life

    def _running(self) -> _Child:
        """The process, with every grammar that has not failed on its way. Raises EngineError if it
        cannot begin."""
        if self._child is None:
            self._child = _Child(self._opening, self.limits)
            for key, live in self._live.items():
                live.is_ready = False
                if not live.error:
                    self._send_start(self._child, key)
        return self._child

    def _send_start(self, child: _Child, key: int) -> None:
        live = self._live[key]
        message = {"do": "start", "key": key, "kind": live.grammar.kind, "tokens": live.tokens}
        child.start(key, message, live.grammar.text.encode())

    def _send_wanted(self) -> _Child | None:
        """Send the steps of compiled grammars, and give up those of failed ones; all have failed,
        and there is no process, where none can begin."""
        try:
            child = self._running()
        except EngineError as error:
            for each in self._live.values():
                each.error = each.error or str(error)
            self._wanted.clear()
            return None
        for step, message in tuple(self._wanted.items()):
            live = self._live.get(step[1])
            if live is None or live.error:
                del self._wanted[step]
            elif live.is_ready and step not in child.steps:
                child.step(step, message)
        return child

    def _wait(self, is_done: Callable[[], bool]) -> None:
        """Read answers until it is done, and then as far as they are there."""
        while True:
            child = self._send_wanted()
            if child is None:
                return
            try:
                answer = child.receive(must_wait=not is_done())
            except _Ended as ended:
                self._blame(child, ended)
                continue
            if answer is None:
                return
            self._note(*answer)

    def _note(self, answer: Message, data: bytes) -> None:
        did, live = answer["did"], self._live.get(answer.get("key", -1))
        if did == "open" and answer["error"]:
            for other in self._live.values():
                other.error = f"grammar: llguidance cannot use the tokenizer: {answer['error']}"
        if live is None:
            return
        if answer["error"]:
            live.error = f"grammar: {answer['error']}"
        elif did == "start":
            live.is_ready = True
        else:
            live.is_suspect = False
            step: _Step = (did, answer["key"])
            if self._wanted.pop(step, None):
                self._answers[step] = answer, data

    def _blame(self, child: _Child, ended: _Ended) -> None:
        """The process has ended: note whose fault it was, and let another begin.

        Who ends processes from outside may have had no reason, or found too little memory: the
        first time it is nobody's fault.
        """
        child.kill()
        self._child = None
        guilty = [self._live[key] for key in child.suspects() if key in self._live]
        if not child.is_open:  # it would never open
            guilty = list(self._live.values())
        for live in guilty:
            if ended.is_from_outside and not live.is_suspect:
                live.is_suspect = True
            else:
                live.error = f"grammar: {ended}; make it simpler"


_Step = tuple[str, int]


class _Ended(Exception):
    """The process has ended, or must be; why."""

    def __init__(self, reason: str, *, is_from_outside: bool = False) -> None:
        super().__init__(reason)
        self.is_from_outside = is_from_outside


class _Child:
    """A process, what it has been asked for, and how long it may still take."""

    def __init__(self, opening: Message, limits: GrammarLimits) -> None:
        # -P: nothing is imported from the current folder, which may be the checkpoint.
        command = [sys.executable, "-P", "-m", "nybble.engine.grammar_worker"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        except OSError as error:
            raise EngineError(
                f"grammar: the process that compiles cannot begin: {error}"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        for pipe in (self._input, self._output):
            os.set_blocking(pipe.fileno(), False)
        self._end = weakref.finalize(self, _end, self._process)
        self._limits = limits
        self._unread = bytearray()
        self._broken = ""
        self.is_open = False
        self.compiling: deque[int] = deque()
        self.steps: dict[_Step, None] = {}  # in the order sent
        self._since = dict.fromkeys(("open", "start", "step"), time.monotonic())
        self.send(opening)

    def start(self, key: int, message: Message, data: bytes) -> None:
        """Have a grammar compiled, after those before it."""
        if not self.compiling:
            self._since["start"] = time.monotonic()
        self.compiling.append(key)
        self.send(message, data)

    def step(self, step: _Step, message: Message) -> None:
        """Have a mask found or a token accepted."""
        if not self.steps:
            self._since["step"] = time.monotonic()
        self.steps[step] = None
        self.send(message)

    def suspects(self) -> list[int]:
        """Whose grammar it was working at."""
        if self.compiling:
            return [self.compiling[0]]
        return [key for _, key in self.steps][:1]

    def send(self, message: Message, data: bytes = b"") -> None:
        """Write a frame. A process that does not read is ended; `receive` tells."""
        left = memoryview(packed(message, data))
        while left:
            try:
                left = left[os.write(self._input.fileno(), left) :]
            except BlockingIOError:
                if not _is_ready(self._input, select.POLLOUT, self._limits.step_s):
                    self.kill()
                    return
            except (BrokenPipeError, ValueError):  # it has ended; or it was ended and closed
                return
            except OSError as error:
                self._broken = f": {error}"
                self.kill()
                return

    def receive(self, *, must_wait: bool) -> tuple[Message, bytes] | None:
        """The next frame; None if there is none yet and it need not wait. Raises _Ended."""
        while True:
            found = self._frame()
            if found is not None:
                self._note(found[0])
                return found
            if self._output.closed:
                raise _Ended(f"its process took no more input{self._broken}")
            left, what = self._left()
            if left <= 0:
                raise _Ended(f"{what} takes too long")
            if _is_ready(self._output, select.POLLIN, left if must_wait else 0):
                self._read()
            elif not must_wait:
                return None

    def kill(self) -> None:
        """End it."""
        self._end()

    def _note(self, answer: Message) -> None:
        did = answer["did"]
        if did == "open":
            self.is_open = True
            self._since["start"] = time.monotonic()
        elif did == "start":
            self.compiling.popleft()
            self._since["start"] = time.monotonic()
        else:
            del self.steps[did, answer["key"]]
            self._since["step"] = time.monotonic()

    def _left(self) -> tuple[float, str]:
        """How many seconds it may still take, for what."""
        limits, dues = self._limits, [(float("inf"), "")]
        if not self.is_open:
            dues = [(self._since["open"] + limits.open_s, "opening the tokenizer")]
        elif self.compiling:
            dues += [(self._since["start"] + limits.compile_s + _GRACE_S, "compiling it")]
        if self.is_open and self.steps:
            dues += [(self._since["step"] + limits.step_s, "finding the tokens it allows")]
        due, what = min(dues)
        return min(due - time.monotonic(), 3600.0), what

    def _read(self) -> None:
        found = os.read(self._output.fileno(), 1 << 20)
        if found:
            self._unread += found
            return
        code = self._process.wait()
        if code == 1 and self.compiling:
            raise _Ended(f"compiling it takes more than {self._limits.compile_s:g} s")
        size = self._limits.memory_bytes / 2**30
        raise _Ended(
            f"it takes more than {size:.2f} GiB, or breaks llguidance (exit {code})",
            is_from_outside=code in _FROM_OUTSIDE,
        )

    def _frame(self) -> tuple[Message, bytes] | None:
        if len(self._unread) < HEAD.size:
            return None
        text, data = HEAD.unpack_from(self._unread)
        begin, end = HEAD.size + text, HEAD.size + text + data
        if len(self._unread) < end:
            return None
        message = json.loads(self._unread[HEAD.size : begin])
        found = message, bytes(self._unread[begin:end])
        del self._unread[:end]
        return found


def _is_ready(pipe: IO[bytes], event: int, seconds: float) -> bool:
    """Wait until a pipe can be read or written, or is broken. select() would refuse the file
    numbers above 1,023 that a server of many connections has."""
    poll = select.poll()
    poll.register(pipe, event)
    return bool(poll.poll(seconds * 1000))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
