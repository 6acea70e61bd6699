"""Choosing the next token of every sequence of a step, in one call of a kernel.

A choice is a function of the sequence's own logits, options and tokens, and of noise keyed by
(seed, choice, position): whatever runs beside, whatever was preempted, it is the same. What is
wrong with one row is said in its `Choice`, and the other rows go on.

Knows options and token ids; refuses to know texts, pools and steps. The arithmetic is in
`nybble.kernels.token_choice`.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.request import Alternative, SamplingParams
from nybble.errors import EngineError
from nybble.kernels.compute import Compute
from nybble.kernels.token_choice import NAN, NOTHING_LEFT, RULE, Choices, Rules, choose


class BadWords:
    """Token sequences that a text must not have: the last token of one is banned where those
    before it have just been generated."""

    __slots__ = ("_after", "_alone")

    def __init__(self, spellings: Iterable[Sequence[int]]) -> None:
        found = [tuple(spelling) for spelling in spellings if spelling]
        self._alone = tuple(s[0] for s in found if len(s) == 1)
        self._after: dict[int, list[tuple[int, ...]]] = {}
        for spelling in found:
            if len(spelling) > 1:
                self._after.setdefault(spelling[-2], []).append(spelling)

    def __bool__(self) -> bool:
        return bool(self._alone or self._after)

    def banned(self, output: Sequence[int]) -> Iterator[int]:
        """The tokens that must not follow `output`."""
        yield from self._alone
        for spelling in self._after.get(output[-1], ()) if output else ():
            before = spelling[:-1]
            if tuple(output[-len(before) :]) == before:
                yield spelling[-1]


@dataclass(slots=True, eq=False)
class Row:
    """What a row of logits belongs to. Made once for each choice of a request and kept: from step
    to step `position`, `banned` and `mask` are set anew, and `output` is the sequence's own list.

    `seed` is that of the request (drawn, where its params have none), `position` how many tokens
    the sequence has. `banned` are token ids that must not come now, such as the end before
    min_tokens. `looks_back`: what comes depends on the text before, beside the logits. `mask` is
    what a grammar allows, a bit for each token, lowest first; tokens behind
    its end are not allowed.
    """

    params: SamplingParams
    seed: int
    choice: int = 0
    position: int = 0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    banned: Collection[int] = ()
    mask: bytes | None = None
    bad_words: BadWords | None = None
    _counts: _Counts | None = field(default=None, init=False, repr=False)
    looks_back: bool = field(default=True, init=False)
    _has_edits: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        p = self.params
        is_penalized = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        self.looks_back = bool(is_penalized or self.bad_words or p.grammar is not None)
        self._has_edits = bool(self.looks_back or p.logit_bias)

    @property
    def is_free(self) -> bool:
        """Whether nothing is to be added to its logits."""
        return not self._has_edits and not self.banned


@dataclass(frozen=True, slots=True)
class Choice:
    """The token of a row, its log-probability under the model itself (before every option), and
    the likeliest tokens, best first; or the reason why there is none, and token -1."""

    token: int
    logprob: float
    top: tuple[Alternative, ...] = ()
    error: str = ""
    is_nan: bool = False


class Sampler:
    """Chooses tokens of a vocabulary of `vocab` logits."""

    def __init__(self, vocab: int, compute: Compute) -> None:
        self.vocab, self.compute = vocab, compute

    def sample(
        self, logits: Tensor, rows: Sequence[Row], ahead: Sequence[int] | None = None
    ) -> list[Choice]:
        """A token for each row; logits float32 [R, V], which are altered. `ahead` is how many
        tokens behind its position each row is meant, 0 where nothing is said."""
        ahead = [0] * len(rows) if ahead is None else ahead
        if tuple(logits.shape) != (len(rows), self.vocab):
            raise EngineError(f"logits {list(logits.shape)} for {len(rows)} rows of {self.vocab:,}")
        edits, errors = self._edits(rows)
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        if any(found is not _NONE for found in edits):
            np.cumsum([len(tokens) for tokens, _, _ in edits], out=starts[1:])
        tokens, factors, shifts = _joined(edits) if starts[-1] else _NONE
        rules = np.array([_rule(*pair) for pair in zip(rows, ahead, strict=True)], dtype=RULE)
        masks = [row.mask for row in rows]
        found = choose(logits, Rules(rules, starts, tokens, factors, shifts, masks), self.compute)
        pairs = zip(found.token.tolist(), found.logprob.tolist(), strict=True)
        return [
            _failed(errors[i]) if i in errors else _choice(*pair, found, i, row)
            for i, (pair, row) in enumerate(zip(pairs, rows, strict=True))
        ]

    def _edits(self, rows: Sequence[Row]) -> tuple[list[_Edits], dict[int, str]]:
        """The edits of each row, and which rows name tokens that are not there."""
        edits: list[_Edits] = []
        errors: dict[int, str] = {}
        for i, row in enumerate(rows):
            if row.is_free:
                edits.append(_NONE)
                continue
            found = _joined([*_penalties(row), *_biases(row), *_bans(row)])
            wrong = found[0][(found[0] < 0) | (found[0] >= self.vocab)]
            if len(wrong):
                errors[i], found = self._no_such_token(int(wrong[0])), _NONE
            edits.append(found)
        return edits, errors

    def _no_such_token(self, token: int) -> str:
        return (
            f"token {token:,} is not in the vocabulary, 0 to {self.vocab - 1:,}; look at "
            "logit_bias, stop_token_ids and bad_words"
        )


class _Counts:
    """How often each token has come: one that is only in the prompt 0 times."""

    def __init__(self, prompt: Sequence[int]) -> None:
        found = np.unique(np.array(prompt, dtype=np.int32))
        self.tokens, self.counts = array("i", found.tolist()), array("q", bytes(8 * len(found)))
        self._place = {token: i for i, token in enumerate(self.tokens)}
        self._seen = 0

    def see(self, output: Sequence[int]) -> None:
        """Count what has been added to `output` since the last call."""
        for token in output[self._seen :]:
            place = self._place.setdefault(token, len(self.tokens))
            if place == len(self.tokens):
                self.tokens.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self._seen = len(output)


_Edits = tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]
_NONE: _Edits = (np.empty(0, np.int32), np.empty(0), np.empty(0))


def _joined(parts: Sequence[_Edits]) -> _Edits:
    if len(parts) < 2:
        return parts[0] if parts else _NONE
    tokens, factors, shifts = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(factors), np.concatenate(shifts)


def _penalties(row: Row) -> Iterator[_Edits]:
    """Repetition for tokens of prompt and output, presence and frequency for those of the output.

    Source: vLLM, vllm/model_executor/layers/utils.py, apply_penalties.
    """
    params = row.params
    repetition, presence = params.repetition_penalty, params.presence_penalty
    if repetition == 1 and presence == 0 and params.frequency_penalty == 0:
        return
    if row._counts is None:
        row._counts = _Counts(row.prompt if repetition != 1 else ())
    row._counts.see(row.output)
    counts = np.array(row._counts.counts, dtype=np.float64)
    shifts = -(params.frequency_penalty * counts + presence * (counts > 0))
    yield np.array(row._counts.tokens, dtype=np.int32), np.full(len(counts), repetition), shifts


def _biases(row: Row) -> Iterator[_Edits]:
    bias = row.params.logit_bias
    if bias:
        shifts = np.fromiter(bias.values(), np.float64)
        yield np.fromiter(bias, np.int32), np.ones(len(bias)), shifts


def _bans(row: Row) -> Iterator[_Edits]:
    tokens = [*row.banned, *(row.bad_words.banned(row.output) if row.bad_words else ())]
    if tokens:
        size = len(tokens)
        yield np.array(tokens, dtype=np.int32), np.ones(size), np.full(size, -np.inf)


def _rule(row: Row, ahead: int) -> tuple[float | int, ...]:
    """A record of RULE."""
    p = row.params
    alternatives = p.logprobs or 0
    noise = (row.seed, row.choice, row.position + ahead)
    return (p.temperature, p.top_p, p.min_p, p.top_k, alternatives, *noise)


def _choice(token: int, logprob: float, found: Choices, i: int, row: Row) -> Choice:
    if token == NAN:
        where = f"the logits after {row.position} tokens are NaN or infinite"
        said = f"{where}; the checkpoint is damaged, or cannot run at this precision"
        return _failed(said, is_nan=True)
    if token == NOTHING_LEFT:
        return _failed(
            f"no token is left to follow {row.position} tokens: the grammar, bad_words, logit_bias "
            "and min_tokens together ban all; relax one of them"
        )
    if not row.params.logprobs:
        return Choice(token, logprob)
    pairs = zip(found.top_tokens[i].tolist(), found.top_logprobs[i].tolist(), strict=True)
    top = tuple(Alternative(t, its_logprob) for t, its_logprob in pairs if t >= 0)
    return Choice(token, logprob, top[: row.params.logprobs])


def _failed(error: str, *, is_nan: bool = False) -> Choice:
    return Choice(-1, float("nan"), error=error, is_nan=is_nan)
