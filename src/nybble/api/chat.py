"""A conversation with a model: what was said, and what the model thinks before it answers.

Knows no terminal; `nybble chat` is the command around it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

from nybble.api.completion import Usage
from nybble.api.llm import LLM
from nybble.engine.request import SamplingParams

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, of its thinking or of what is meant to be read."""

    text: str
    is_thinking: bool


class Thinking:
    """Tells thinking from answer in a text that comes in parts.

    Thinking begins with <think> at the start of an answer, or before it, where the template wrote
    the tag; it ends with the first </think>. Later tags are text. The tags themselves are not
    returned, nor the blank space around them.
    """

    def __init__(self, is_open: bool) -> None:
        self._is_thinking, self._is_decided = is_open, is_open
        self._held = ""
        self._is_after_tag = is_open  # blank space behind a tag belongs to it

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        found = []
        if not self._is_decided:
            start = self._held.lstrip()
            if start.startswith(OPEN):
                self._held, self._is_thinking = start[len(OPEN) :], True
                self._is_decided = self._is_after_tag = True
            elif OPEN.startswith(start):
                return []
            self._is_decided = True
        if self._is_thinking and CLOSE in self._held:
            thought, _, self._held = self._held.partition(CLOSE)
            found += self._piece(thought.rstrip(), is_thinking=True)
            self._is_thinking, self._is_after_tag = False, True
        return found + self._certain()

    def finish(self) -> list[Piece]:
        """The rest, when no text follows."""
        rest, self._held = self._held, ""
        return self._piece(rest, is_thinking=self._is_thinking)

    def _certain(self) -> list[Piece]:
        held = _begun(self._held) if self._is_thinking else 0
        cut = len(self._held) - held
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._piece(ready, is_thinking=self._is_thinking)

    def _piece(self, text: str, *, is_thinking: bool) -> list[Piece]:
        if self._is_after_tag:
            text = text.lstrip()
        if not text:
            return []
        self._is_after_tag = False
        return [Piece(text, is_thinking)]


def _begun(text: str) -> int:
    """How many characters at the end may belong to </think> and the blank space before it."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(CLOSE[:size]):
            break
    else:
        size = 0
    return len(text) - len(text[: len(text) - size].rstrip())


class Conversation:
    """Messages back and forth. `variables` are the chat template's, such as enable_thinking.

    `usage` and `finish` are those of the last answer. A question whose answer fails is taken back;
    one whose answer is left early keeps what was said of it.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> None:
        self.llm, self.params, self.system = llm, params, system
        self.variables = dict(variables or {})
        self.messages: list[dict[str, object]] = []
        self.usage: Usage | None = None
        self.finish = ""

    @property
    def context_used(self) -> int:
        """Tokens of the conversation after the last answer."""
        return 0 if self.usage is None else self.usage.prompt_tokens + self.usage.tokens

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for another token."""
        return self.context_used >= self.llm.context

    def everything(self) -> list[dict[str, object]]:
        """All messages, the system's first."""
        if self.system is None:
            return list(self.messages)
        return [{"role": "system", "content": self.system}, *self.messages]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages.clear()
        self.usage = None

    def undo(self) -> str | None:
        """Take the last question and its answer back; the question, None if there is none."""
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                self.usage = None
                return str(last["content"])
        return None

    def ask(self, question: str) -> Generator[Piece, None, None]:
        """The answer, as it comes. Raises TextError and EngineError; then nothing was said."""
        self.usage, self.finish = None, ""
        self.messages.append({"role": "user", "content": question})
        said = {True: "", False: ""}  # by is_thinking
        is_whole = False
        try:
            for piece in self._answer():
                said[piece.is_thinking] += piece.text
                yield piece
            is_whole = True
        except Exception:
            said.clear()
            raise
        finally:
            if is_whole or any(said.values()):
                self._remember(said[True], said[False])
            else:
                self.messages.pop()

    def _remember(self, thoughts: str, answer: str) -> None:
        said: dict[str, object] = {"role": "assistant", "content": answer}
        if thoughts:
            said["reasoning_content"] = thoughts
        self.messages.append(said)

    def _answer(self) -> Generator[Piece, None, None]:
        text = self.llm.render(self.everything(), variables=self.variables)
        prompt = self.llm.encode(text)
        thinking = Thinking(is_open=text.rstrip().endswith(OPEN))
        params = replace(self.params, n=1)
        tokens = self.llm.stream_with_usage(prompt, params)
        try:
            for token, usage in tokens:
                self.usage, self.finish = usage, token.finish
                yield from thinking.push(token.text)
        finally:
            tokens.close()
        yield from thinking.finish()
