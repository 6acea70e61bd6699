"""What is asked of an engine, and what comes back, token by token."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import EngineError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 leave all tokens in. Equal `seed`
    and prompt give equal tokens, whatever else runs beside.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        ranges = (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "0 or more and below 1"),
            ("seed", 0 <= self.seed < 2**64, "from 0 to 2^64 - 1"),
        )
        for name, is_right, expected in ranges:
            if not is_right:
                raise EngineError(f"{name} must be {expected}, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `finish` is "" while more follow, else "stop" or "length"; a stop token
    itself has no text."""

    id: int
    text: str
    logprob: float
    finish: str = ""
