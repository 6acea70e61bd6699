"""Perplexity from per-token negative log-likelihoods, with an interval from whole windows.

exp of the mean NLL over all scored tokens, each with the same weight: not the mean of windows'
perplexities. Knows no model: somebody else has computed the NLLs, under conditions that
report.Conditions records.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from nybble.errors import EvaluationError
from nybble.evaluate.significance import (
    Bootstrap,
    Interval,
    mean_estimate,
    standard_error,
)

#: exp of more overflows a double; a mean NLL of this size is a broken model, not a bad one.
_NLL_LIMIT = 700.0


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`value` = exp(`nll`); `nll` is the mean in nats per token.

    `interval` (of the value) comes from resampling windows, and is None with one window.
    `standard_error` (of the value) treats tokens as independent, which makes it too small: it is
    what llama-perplexity prints after "+/-". `bits_per_byte` does not depend on the tokenizer.
    """

    value: float
    nll: float
    interval: Interval | None
    standard_error: float
    tokens: int
    windows: int
    bits_per_byte: float | None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def measure_perplexity(
    nll: ArrayLike,
    windows: ArrayLike,
    *,
    scored_bytes: int | None = None,
    bootstrap: Bootstrap | None = None,
) -> Perplexity:
    """The perplexity of scored tokens.

    nll: float [tokens] in nats; windows: int [tokens], which window a token is of. `scored_bytes`
    counts the UTF-8 bytes of the scored tokens' text, where known. Raises EvaluationError if there
    are no tokens or an NLL is not finite.
    """
    values = np.asarray(nll, dtype=np.float64)
    if scored_bytes is not None and scored_bytes < 1:
        raise EvaluationError(f"{scored_bytes} bytes of scored text; expected at least 1")
    mean = mean_estimate(values, windows, bootstrap)
    if not abs(mean.value) < _NLL_LIMIT:
        raise EvaluationError(
            f"mean negative log-likelihood of {mean.value:.6g} nats per token: its exp overflows; "
            "the model's output is broken"
        )
    value = math.exp(mean.value)
    return Perplexity(
        value,
        mean.value,
        None if mean.interval is None else mean.interval.mapped(_exp),
        value * standard_error(values),
        len(values),
        len(np.unique(np.asarray(windows))),
        None if scored_bytes is None else float(values.sum()) / math.log(2) / scored_bytes,
    )


def _exp(nll: float) -> float:
    """exp, infinite where a double cannot hold it: the end of an interval may lie there."""
    return math.exp(nll) if nll < _NLL_LIMIT else math.inf
