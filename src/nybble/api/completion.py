"""What becomes of a prompt: its tokens and texts, how each choice ended, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass

from nybble.engine.request import Alternative, Event, Finish, PromptLogprobs, Request, Token
from nybble.errors import EngineError


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. `first_token_s` and `seconds` count from when it was asked until the
    engine had made the first and the last token, waiting for its turn, `queued_s`, included;
    `tokens` are those of all choices. `cached_tokens` of the prompt came from the prefix cache;
    `drafted` tokens were guessed and verified, `accepted` of them were right."""

    prompt_tokens: int
    tokens: int
    first_token_s: float
    seconds: float
    queued_s: float = 0.0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def prefill_s(self) -> float:
        """What computing the prompt took, without waiting for it to begin."""
        return max(self.first_token_s - self.queued_s, 0.0)

    @property
    def tokens_per_s(self) -> float:
        """Tokens each second after the first, which belongs to the prompt."""
        spent = self.seconds - self.first_token_s
        return (self.tokens - 1) / spent if self.tokens > 1 and spent > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation of a prompt.

    A token that ended it is the last of `tokens` and has no text. `logprobs` are under the model
    itself, without temperature or filters; `top` are the likeliest tokens where params ask for
    them. `finish` is "stop", "length", or "error", which `error` explains.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[Alternative, ...], ...]
    finish: Finish
    error: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one prompt: its choices, params.n of them.

    `text`, `tokens`, `logprobs` and `finish` are those of the first choice, and raise EngineError
    if it failed: one broken request of many harms nobody else, and is not overlooked.
    """

    prompt_tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def first(self) -> Choice:
        """The first choice. Raises EngineError if it failed."""
        if self.choices[0].error:
            raise EngineError(self.choices[0].error)
        return self.choices[0]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.first.text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids of the first choice."""
        return self.first.tokens

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The log-probabilities of the first choice's tokens."""
        return self.first.logprobs

    @property
    def finish(self) -> Finish:
        """How the first choice ended."""
        return self.first.finish


class Answer:
    """One request while its events come in."""

    def __init__(self, request: Request, number: int) -> None:
        self.request, self.number = request, number
        n = request.params.n
        self.tokens: list[list[Token]] = [[] for _ in range(n)]
        self.finish: list[Finish] = [""] * n
        self.errors = [""] * n
        self.prompt: PromptLogprobs | None = None
        self.queued_s = 0.0
        self.cached_tokens = self.drafted = self.accepted = 0
        self.began = self.first = self.ended = time.perf_counter()

    @property
    def is_done(self) -> bool:
        """No choice goes on."""
        return all(self.finish)

    @property
    def usage(self) -> Usage:
        """What it took until now."""
        return Usage(
            len(self.request.prompt),
            sum(map(len, self.tokens)),
            self.first - self.began,
            self.ended - self.began,
            self.queued_s,
            self.cached_tokens,
            self.drafted,
            self.accepted,
        )

    def take(self, event: Event, made: float) -> None:
        """Note what a step made, and when, by time.perf_counter."""
        self.ended = made
        i = event.choice
        if event.queued_s is not None and i == 0:
            self.queued_s = event.queued_s
        if event.cached is not None and i == 0:
            self.cached_tokens = event.cached
        self.drafted += event.drafted
        self.accepted += event.accepted
        if event.prompt is not None:
            self.prompt = event.prompt
        if event.token is not None:
            if not any(self.tokens):
                self.first = made
            self.tokens[i].append(event.token)
            self.finish[i] = event.token.finish
        if event.error or event.finish in ("error", "cancelled"):
            self.finish[i] = "error"
            self.errors[i] = event.error or "the request was cancelled: its LLM was closed"
        elif event.finish:
            self.finish[i] = event.finish

    def completion(self) -> Completion:
        """All of it."""
        choices = tuple(
            Choice(
                "".join(t.text for t in tokens),
                tuple(t.id for t in tokens),
                tuple(t.logprob for t in tokens),
                tuple(t.top for t in tokens),
                finish,
                error,
            )
            for tokens, finish, error in zip(self.tokens, self.finish, self.errors, strict=True)
        )
        return Completion(self.request.prompt, choices, self.usage, self.prompt)
