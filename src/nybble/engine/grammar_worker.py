"""The process that knows grammars: compiles them and says which tokens each allows next.

It answers frames on standard input with frames on standard output and ends with its input. It ends
itself where a grammar takes too long to compile or too much memory; `grammar.py` then begins
another. Compiling is a thread of its own, one grammar after another, so that the masks of those
already compiled go on meanwhile; answers leave through another, so that nobody waits for a reader.

A frame: the bytes of a JSON object and of what comes with it, both counted before them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import struct
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import llguidance

HEAD = struct.Struct("<II")
#: Of a message from llguidance that is handed on: the rest repeats the grammar.
MOST_CHARACTERS = 300
#: Compiled grammars kept for requests that ask for the same.
MOST_KEPT = 16
#: Between two pieces of JSON, once: a space, or a new line and how far it is indented. A model that
#: has lost its way chooses whitespace wherever it may, for as long as it may.
_WHITESPACE = r"\x20|\x0A\x20{0,40}"

Message = dict[str, Any]


def packed(message: Message, data: bytes = b"") -> bytes:
    """A frame."""
    text = json.dumps(message).encode()
    return HEAD.pack(len(text), len(data)) + text + data


class _Worker:
    """The grammars of this process, by the keys of their sequences."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, compile_s: float) -> None:
        self._tokenizer, self._compile_s = tokenizer, compile_s
        self._nowhere = open(os.devnull, "w")  # as long as the process lives
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        self._dropped: set[int] = set()
        self._kept: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()
        self._compiling: SimpleQueue[tuple[Message, str]] = SimpleQueue()
        self._answers: SimpleQueue[bytes] = SimpleQueue()
        for work in (self._compile, self._write):
            threading.Thread(target=work, daemon=True).start()

    def answer(self, message: Message, data: bytes = b"") -> None:
        """Send a frame, when its turn comes."""
        self._answers.put(packed(message, data))

    def take(self, message: Message, data: bytes) -> None:
        """Do what a frame asks for."""
        match message["do"]:
            case "start":
                self._compiling.put((message, data.decode()))
            case "mask":
                self._mask(message["key"])
            case "accept":
                self._accept(message["key"], message["token"])
            case "drop":
                if self._matchers.pop(message["key"], None) is None:
                    self._dropped.add(message["key"])

    def _mask(self, key: int) -> None:
        matcher = self._matchers[key]
        bits = matcher.compute_bitmask()
        error = _error(matcher)
        self.answer({"did": "mask", "key": key, "error": error}, b"" if error else bits)

    def _accept(self, key: int, token: int) -> None:
        matcher = self._matchers[key]
        matcher.consume_token(token)
        is_complete = matcher.is_stopped()
        answer = {"did": "accept", "key": key, "is_complete": is_complete}
        self.answer(answer | {"error": _error(matcher)})

    def _write(self) -> None:
        while True:
            frame = self._answers.get()
            sys.stdout.buffer.write(frame)
            sys.stdout.buffer.flush()

    def _compile(self) -> None:
        while True:
            message, text = self._compiling.get()
            key = message["key"]
            # A timer that needs no interpreter: it ends the process with exit code 1.
            faulthandler.dump_traceback_later(self._compile_s, exit=True, file=self._nowhere)
            try:
                matcher = self._compiled(message["kind"], text)
                matcher.consume_tokens(message["tokens"])
                error = _error(matcher)
            except BaseException as problem:  # a Rust panic is no Exception
                error = _shortened(problem)
            faulthandler.cancel_dump_traceback_later()
            if key in self._dropped:
                self._dropped.remove(key)
            elif not error:
                self._matchers[key] = matcher
            self.answer({"did": "start", "key": key, "error": error})

    def _compiled(self, kind: str, text: str) -> llguidance.LLMatcher:
        """A matcher at its beginning."""
        found = self._kept.pop((kind, text), None)
        if found is None:
            found = _matcher(self._tokenizer, kind, text)
            found.compute_bitmask()  # what a first mask builds is shared by the copies
        if not found.is_error():
            self._kept[kind, text] = found
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return found.deep_copy()


def _matcher(tokenizer: llguidance.LLTokenizer, kind: str, text: str) -> llguidance.LLMatcher:
    import llguidance

    matcher = llguidance.LLMatcher
    if kind == "regex":
        grammar = matcher.grammar_from_regex(text)
    elif kind == "lark":
        grammar = matcher.grammar_from_lark(text)
    else:
        schema = json.loads(text) if text else {}
        if kind == "json_object":
            schema = {"type": "object"}
        if not isinstance(schema, dict):
            raise ValueError("a JSON schema must be an object")
        grammar = matcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _WHITESPACE}
        )
    limits = llguidance.LLParserLimits(verbose_errors=False)
    return matcher(tokenizer, grammar, log_level=0, limits=limits)


def _error(matcher: llguidance.LLMatcher) -> str:
    return _shortened(matcher.get_error()) if matcher.is_error() else ""


def _shortened(problem: object) -> str:
    return str(problem).strip()[:MOST_CHARACTERS] or "no reason given"


def _open(message: Message) -> _Worker:
    """The tokenizer, and from then on a limit to memory."""
    import llguidance

    text = Path(message["tokenizer"]).read_text(encoding="utf-8")
    tokenizer = llguidance.LLTokenizer(text, eos_token=message["eos"] or None)
    if tokenizer.vocab_size < message["vocab"]:  # the padded end of a model's vocabulary
        tokenizer = llguidance.LLTokenizer(
            text, n_vocab=message["vocab"], eos_token=message["eos"] or None
        )
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + message["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return _Worker(tokenizer, message["compile_s"])


def _frame(source: BinaryIO) -> tuple[Message, bytes] | None:
    head = source.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    text, data = (source.read(size) for size in HEAD.unpack(head))
    return json.loads(text), data


def main() -> None:
    """Answer frames until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is interrupted closes the input
    first = _frame(sys.stdin.buffer)
    if first is None:
        return
    try:
        worker = _open(first[0])
    except Exception as problem:  # whatever a library makes of a foreign file
        sys.stdout.buffer.write(packed({"did": "open", "error": _shortened(problem)}))
        sys.stdout.buffer.flush()
        return
    worker.answer({"did": "open", "error": ""})
    while frame := _frame(sys.stdin.buffer):
        worker.take(*frame)
    os._exit(0)  # a grammar that is being compiled would keep the process


if __name__ == "__main__":
    main()
