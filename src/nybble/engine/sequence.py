"""One choice of one request: its tokens, what it holds of the pools, and how far it has come.

Knows no tensor and no other sequence but its siblings. A scheduler moves it; the engine gives it
its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, Unpack

from nybble.engine.request import (
    MOST_CHOICES,
    Alternative,
    Event,
    Finish,
    PromptLogprobs,
    Request,
    Token,
)
from nybble.models.sequence import SequenceState

if TYPE_CHECKING:
    from nybble.engine.prefix import Lease
    from nybble.engine.sampler import Row
    from nybble.engine.text_stream import TextStream

#: Whose turn comes first: smaller goes first. (arrival, later by priority; arrival; choice)
Turn = tuple[int, int, int]


def nothing_held() -> SequenceState:
    """The state of a sequence that waits: no page, no slot, nothing computed."""
    return SequenceState([], slots=[])


class _Told(TypedDict, total=False):
    """Fields of an Event."""

    prompt: PromptLogprobs
    finish: Finish
    error: str
    cached: int | None
    missed: str
    drafted: int
    accepted: int


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens that follow it so far.

    `most` tokens may be generated, one of `ends` ends it. `row` is what the sampler knows of it,
    with the same `output`. The state of `state.length` tokens is computed; a preempted sequence
    begins again at 0 and keeps its output, and `computed` tells how far it once was. `followers`
    are the other choices of the request while they wait for this one's prompt. `scores` and
    `alternatives` are the prompt's log-probabilities as far as they are known, by position;
    `is_scored` once they were told. It came at `arrived`, None once its first step has begun;
    `queued_s` is how long that took, None once it was told.

    `boundaries` are the positions where turns of the prompt end. Of its pages, the cache shares
    those of `lease`; `source` is the snapshot from which its next step begins, None for its own
    slot; `cached` tokens came from the cache, `missed` says why not more.
    States after `planned` lengths of its prompt go to the cache, those worth most first.
    `is_drafting`: whether tokens are to be guessed for it, None while nobody has said. `is_new`
    until the first step since it runs; `is_ended` once its last token was told.
    """

    request: Request
    choice: int
    turn: Turn
    most: int
    ends: frozenset[int]
    stream: TextStream
    row: Row
    output: list[int] = field(default_factory=list)
    computed: int = 0
    state: SequenceState = field(default_factory=nothing_held)
    followers: list[Sequence] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    alternatives: list[tuple[Alternative, ...]] = field(default_factory=list)
    is_scored: bool = False
    arrived: float | None = None
    queued_s: float | None = None
    boundaries: tuple[int, ...] = ()
    lease: Lease | None = None
    source: int | None = None
    cached: int = 0
    missed: str = ""
    planned: list[int] = field(default_factory=list)
    is_drafting: bool | None = None
    is_new: bool = False
    is_ended: bool = False

    def begin(self, now: float) -> None:
        """A step computes for it; the first time, note how long it has waited."""
        if self.arrived is not None:
            self.queued_s, self.arrived = now - self.arrived, None

    def event(self, token: Token | None = None, **told: Unpack[_Told]) -> Event:
        """An event of it; the first says how it began."""
        queued_s, self.queued_s = self.queued_s, None
        if queued_s is not None:
            told |= {"cached": self.cached, "missed": self.missed}
        return Event(self.request.id, self.choice, token, queued_s=queued_s, **told)

    @property
    def key(self) -> int:
        """A number of its own among all that an engine ever had."""
        return self.turn[1] * MOST_CHOICES + self.choice

    @property
    def known(self) -> int:
        """How many tokens it has, prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of the prompt are to be computed, in chunks; those after it go through the
        kernels of decoding, the first time and when they are replayed."""
        return self.state.length < len(self.request.prompt)

    @property
    def is_decoding(self) -> bool:
        """Whether one token is all that is to be computed before the next is sampled."""
        return not self.is_prefilling and self.state.length + 1 == self.known

    @property
    def is_memoryless(self) -> bool:
        """Whether the choice of its next tokens depends on nothing but logits and position."""
        return not self.row.looks_back and len(self.output) >= self.request.params.min_tokens

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to be found. Its choices share the
        prompt: the first of them finds them."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and self.choice == 0 and not self.is_scored

    def unscored(self, end: int) -> int:
        """How many of the logits before position `end`, in what is computed next, tell something
        new about the prompt: those of the last tokens."""
        start = max(self.state.length, len(self.scores) - 1)
        return max(0, end - start) if self.wants_scores else 0

    def tokens(self, start: int, end: int) -> tuple[int, ...] | list[int]:
        """The tokens from `start` to before `end`."""
        prompt = len(self.request.prompt)
        if end <= prompt:
            return self.request.prompt[start:end]
        if start >= prompt:
            return self.output[start - prompt : end - prompt]
        return [*self.request.prompt[start:], *self.output[: end - prompt]]
