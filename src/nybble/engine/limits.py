"""What an engine can take, and what it does: numbers for those who send requests and those who
watch. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nybble.engine.request import Request
from nybble.errors import ContextTooLong, EngineError, OutOfPages, TextError

#: A priority is at most this far from 0: it is what bounds how long a request can wait.
MOST_PRIORITY = 1_000
#: Log-probabilities of prompts are Python objects: so many of one request, alternatives included.
MOST_PROMPT_LOGPROBS = 4_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests must fit: `context` tokens of a sequence, the pool's pages, the vocabulary, and
    whether there is structured output. Never changes: any thread may ask."""

    context: int
    pages: int
    page_tokens: int
    vocab: int
    has_grammars: bool

    @property
    def room(self) -> int:
        """How many tokens a sequence can have: the context, or all pages if these hold fewer."""
        return min(self.context, self.pages * self.page_tokens)

    def validate(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises TextError for an empty prompt, ContextTooLong or OutOfPages for one that leaves no
        room for a token, EngineError for token ids beyond the vocabulary and for options that this
        engine cannot follow.
        """
        self._check_length(len(request.prompt))
        if not -MOST_PRIORITY <= request.priority <= MOST_PRIORITY:
            raise EngineError(
                f"priority must be from {-MOST_PRIORITY} to {MOST_PRIORITY}, found "
                f"{request.priority}"
            )
        params = request.params
        self._check_scores(len(request.prompt), params.prompt_logprobs)
        self._check_tokens("the prompt", request.prompt)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        self._check_tokens("logit_bias", params.logit_bias)
        if params.grammar is not None and not self.has_grammars:
            raise EngineError("grammar: this engine was made without structured output")

    def _check_length(self, tokens: int) -> None:
        if not tokens:
            raise TextError("the prompt is empty: there is no token to go on from")
        if tokens >= self.context:
            raise ContextTooLong(
                f"the prompt has {tokens:,} tokens and the context is {self.context:,}; shorten "
                "the prompt"
            )
        if tokens >= self.room:
            raise OutOfPages(
                f"the prompt has {tokens:,} tokens and all {self.pages:,} pages of "
                f"{self.page_tokens} hold {self.room:,}; shorten the prompt or give the engine "
                "more memory"
            )

    def _check_scores(self, tokens: int, alternatives: int | None) -> None:
        if alternatives is not None and tokens * (alternatives + 1) > MOST_PROMPT_LOGPROBS:
            raise EngineError(
                f"prompt_logprobs: {alternatives + 1} log-probabilities for each of {tokens:,} "
                f"tokens are {tokens * (alternatives + 1):,}, expected at most "
                f"{MOST_PROMPT_LOGPROBS:,}; ask for fewer alternatives or shorten the prompt"
            )

    def _check_tokens(self, what: str, tokens: Iterable[int]) -> None:
        wrong = next((t for t in tokens if not 0 <= t < self.vocab), None)
        if wrong is not None:
            raise EngineError(
                f"{what}: expected token ids from 0 to {self.vocab - 1}, found {wrong}"
            )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now, and has done since it was made.

    `prompt_tokens` and `generated_tokens` count each once; `recomputed_tokens` those that were
    computed again, after preemption or for another choice of the same prompt. `clipped` keys and
    values were too large for FP8 pages. `pages_used` are those of sequences that run; others may be
    `cached_pages`, which whoever needs them gets. `cache_queries` counts tokens of prompts that
    were looked up, `cache_hits` those found, `cache_misses` the reasons why not all. `draft_steps`
    counts verifications, each of one sequence; `drafted` tokens were guessed, `accepted` rightly,
    also by their position; `drafting` is why nothing is guessed, "" while something is.
    """

    running: int
    waiting: int
    pages: int
    pages_used: int
    slots: int
    slots_used: int
    steps: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    recomputed_tokens: int
    clipped: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    cache_misses: tuple[tuple[str, int], ...] = ()
    cache_evictions: int = 0
    cached_pages: int = 0
    snapshots: int = 0
    snapshots_used: int = 0
    draft_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()
    drafting: str = ""
