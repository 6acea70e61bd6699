"""What is asked of an engine, and what comes back, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nybble.errors import EngineError

Finish = Literal["", "stop", "length", "cancelled", "error"]

#: Bounds of the lists that a request may carry: each is walked for every token.
MOST_CHOICES = 128
MOST_ALTERNATIVES = 20
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1_000
MOST_STOP_TOKENS = 1_024
MOST_BIASES = 1_024
MOST_BAD_WORDS = 256
MOST_GRAMMAR_BYTES = 1 << 20
MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text must look like: a JSON schema (as JSON text; "" for any JSON), a regular
    expression, or a grammar in llguidance's Lark dialect."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "json_object", "regex", "lark"):
            raise EngineError(
                f"grammar: kind must be json_schema, json_object, regex or lark, found "
                f"{self.kind!r}"
            )
        if not isinstance(self.text, str):
            raise EngineError(f"grammar: text must be a text, found {_kind(self.text)}")
        _check_unicode("grammar: text", self.text)
        if len(self.text.encode()) > MOST_GRAMMAR_BYTES:
            raise EngineError(f"grammar: longer than {MOST_GRAMMAR_BYTES:,} bytes")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are chosen, and when to end.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 leave all tokens in. Equal `seed`
    and prompt give equal tokens, whatever else runs beside; None draws a seed for the request.
    `n` choices of one prompt differ in their noise. Penalties follow vLLM: presence and frequency
    count generated tokens, repetition (1: none) those of the prompt too. `logit_bias` maps token
    ids to what is added. `stop` are texts, cut off the result unless `include_stop`; `bad_words`
    texts that never begin; a single text is one of them, a list is taken as a tuple, None as
    nothing. `logprobs` asks for this many alternatives of each generated token,
    `prompt_logprobs` of each token of the prompt; None: not even the token's own.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    n: int = 1
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("ignore_eos", "include_stop"):
            if not isinstance(getattr(self, name), bool):
                raise EngineError(f"{name} must be true or false, found {getattr(self, name)!r}")
        if self.top_p == 0:
            raise EngineError("top_p must be above 0 and at most 1, found 0")
        if self.min_p == 1:
            raise EngineError("min_p must be 0 or more and below 1, found 1")
        if self.repetition_penalty == 0:
            raise EngineError("repetition_penalty must be above 0 and at most 100, found 0")
        if self.min_tokens > self.max_tokens:
            raise EngineError(
                f"min_tokens must be at most max_tokens, {self.max_tokens}, found {self.min_tokens}"
            )
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise EngineError(f"grammar: expected a Grammar, found {_kind(self.grammar)}")
        self._take_lists()
        self._check_texts()
        self._check_ids()

    def _check_numbers(self) -> None:
        for name, lowest, most, expected in _WHOLE:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise EngineError(f"{name} must be a whole number, found {value!r}")
            if not lowest <= value <= most:
                raise EngineError(f"{name} must be {expected}, found {value}")
        for name, low, high, expected in _REAL:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise EngineError(f"{name} must be a number, found {value!r}")
            if not (math.isfinite(value) and low <= value <= high):
                raise EngineError(f"{name} must be {expected}, found {value}")

    def _take_lists(self) -> None:
        """Make what people write, a text, a list or None, what is meant."""
        for name, most in _LISTS:
            given = getattr(self, name)
            if given is None:
                given = ()
            elif isinstance(given, str) and name in _TEXTS:
                given = (given,)
            elif not isinstance(given, (tuple, list, set, frozenset)):
                raise EngineError(f"{name} must be a list, found {_kind(given)}")
            _check_length(name, len(given), most)
            object.__setattr__(self, name, tuple(given))
        biases = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(biases, Mapping):
            raise EngineError(
                f"logit_bias must be a mapping of token ids to numbers, found {_kind(biases)}"
            )
        _check_length("logit_bias", len(biases), MOST_BIASES)
        object.__setattr__(self, "logit_bias", dict(biases))

    def _check_texts(self) -> None:
        for name in _TEXTS:
            for text in getattr(self, name):
                if not isinstance(text, str) or not 0 < len(text) <= MOST_STOP_CHARACTERS:
                    raise EngineError(
                        f"{name} must be texts of 1 to {MOST_STOP_CHARACTERS:,} characters"
                    )
                _check_unicode(name, text)

    def _check_ids(self) -> None:
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
                raise EngineError(f"stop_token_ids must be token ids, found {token!r}")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
                raise EngineError(f"logit_bias: {token!r} is no token id")
            if isinstance(bias, bool) or not isinstance(bias, (int, float)):
                raise EngineError(f"logit_bias must be numbers, found {bias!r} for token {token}")
            if not -100 <= bias <= 100:
                raise EngineError(
                    f"logit_bias must be from -100 to 100, found {bias} for token {token}"
                )


def _kind(value: object) -> str:
    return type(value).__name__


def _check_length(name: str, length: int, most: int) -> None:
    if length > most:
        raise EngineError(f"{name} must have at most {most} entries, found {length:,}")


def _check_unicode(name: str, text: str) -> None:
    """Refuse lone surrogates: half a character, which no file and no tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EngineError(
            f"{name} is not Unicode text: half a character at {error.start}"
        ) from error


_TEXTS = ("stop", "bad_words")
_LISTS = (
    ("stop", MOST_STOPS),
    ("stop_token_ids", MOST_STOP_TOKENS),
    ("bad_words", MOST_BAD_WORDS),
)
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")
_WHOLE = (
    ("max_tokens", 1, MOST_TOKENS, f"1 to {MOST_TOKENS:,}"),
    ("min_tokens", 0, MOST_TOKENS, f"0 to {MOST_TOKENS:,}"),
    ("top_k", 0, 2**31 - 1, "0 (all) or more"),
    ("seed", 0, 2**64 - 1, "from 0 to 2^64 - 1"),
    ("n", 1, MOST_CHOICES, f"1 to {MOST_CHOICES}"),
    ("logprobs", 0, MOST_ALTERNATIVES, f"0 to {MOST_ALTERNATIVES}"),
    ("prompt_logprobs", 0, MOST_ALTERNATIVES, f"0 to {MOST_ALTERNATIVES}"),
)
_REAL = (
    ("temperature", 0, 100, "0 to 100"),
    ("top_p", 0, 1, "above 0 and at most 1"),
    ("min_p", 0, 1, "0 or more and below 1"),
    ("presence_penalty", -2, 2, "-2 to 2"),
    ("frequency_penalty", -2, 2, "-2 to 2"),
    ("repetition_penalty", 0, 100, "above 0 and at most 100"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to go on from. `id` is the caller's, unique among those running; of two waiting
    requests the one of lower `priority` goes first. Prefixes are shared among requests of equal
    `salt` alone. `boundaries` are the positions where turns of the prompt end; None: after every
    token that ends a text."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    salt: bytes = b""
    boundaries: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have come, and its log-probability under the model."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `finish` is "" while more follow; a stop token itself has no text.

    `text` is what can be shown now: characters and possible stop texts that are not complete are
    held back and come with a later token. `top` are the likeliest tokens, best first.
    """

    id: int
    text: str
    logprob: float
    finish: Finish = ""
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of each token of a prompt, what the model thought of it: `logprobs` [T] and `top` [T]; the
    first token follows nothing and has None."""

    logprobs: tuple[float | None, ...]
    top: tuple[tuple[Alternative, ...], ...]


@dataclass(frozen=True, slots=True)
class Event:
    """What a step of the engine made for one choice of one request: its prompt's logprobs (once,
    before the first token), a token, or the reason it ended without one. The first of a choice that
    was computed for says how long it had waited for that, `queued_s`, how many tokens of its prompt
    came from the prefix cache, `cached`, and why not more, `missed`. `drafted` and `accepted` count
    the guesses that were verified with its token, and those that were right."""

    request: str
    choice: int = 0
    token: Token | None = None
    prompt: PromptLogprobs | None = None
    finish: Finish = ""
    error: str = ""
    queued_s: float | None = field(default=None, compare=False)
    cached: int | None = field(default=None, compare=False)
    missed: str = field(default="", compare=False)
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)
