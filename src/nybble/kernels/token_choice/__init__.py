"""Choosing a token from each row of logits: edits, filters, noise, log-probabilities, in one call.

Of a row of logits x float32 [V] and its rule:

1. Under the model itself: log_sum = log sum e^x in float64, and the `alternatives` largest x.
2. Edits, one after another: x becomes (x > 0 ? x / factor : x * factor) + shift in float64, rounded
   to float32; a shift of -infinity bans. Then a mask: tokens without a bit become -infinity.
3. temperature 0: the largest x. Else scaled = (x - largest x) / temperature in float64, and
4. the filters, each on what the one before leaves, -infinity never. top_k: x is at least the k-th
   largest. top_p: those tokens before which, among the larger ones, less than top_p of the whole
   weight lies; a weight is e^scaled in units of 2^-40, rounded to an integer, so that sums have no
   order. min_p: scaled >= log(min_p). Equals at a boundary stay.
5. The largest scaled + noise (Gumbel-max: a draw from the softmax of what stays), where
   noise = -log(-log(u)), u = (b + 1/2) / 2^52, and b are the upper 52 of 64 bits of Philox4x32-10
   with key = seed and counter = (token // 2, position, choice, 0): words 0 and 1 (the higher) for
   an even token, 2 and 3 for an odd one.

Ties go to the lowest token. Exponentials and logarithms are sums of products written out, without
fused rounding, so that the chosen token is the same on every instruction set. A row's result does
not depend on other rows or on the number of threads.

`reference.py` is the definition, `cpu.py` calls the C kernel. Source of the noise: Salmon et al.,
Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute

#: In place of a token: the logits have NaN or +infinity; every token is banned or masked.
NAN, NOTHING_LEFT = -1, -2

#: Sums of weights stay below 2^63.
MOST_VOCABULARY = 1 << 22

#: How a row is sampled; the C struct of cpu.c.
RULE = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),
        ("alternatives", np.int64),
        ("seed", np.uint64),
        ("choice", np.uint32),
        ("position", np.uint32),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for R rows: `rules` RULE [R]; the edits of row r are starts[r] .. starts[r + 1]
    (int64 [R + 1]) of `tokens` int32, `factors` and `shifts` float64 [E]; `masks` [R] are bits of
    tokens, lowest first, or None. What lies behind the end of a mask is not allowed."""

    rules: NDArray[Any]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    factors: NDArray[np.float64]
    shifts: NDArray[np.float64]
    masks: Sequence[bytes | None]


@dataclass(frozen=True, slots=True)
class Choices:
    """Of R rows: `token` int64 [R], or NAN, NOTHING_LEFT; `logprob` float64 [R] of it; the largest
    logits' `top_tokens` int64 and `top_logprobs` float64 [R, most alternatives], best first, -1
    where a row wants or has fewer."""

    token: NDArray[np.int64]
    logprob: NDArray[np.float64]
    top_tokens: NDArray[np.int64]
    top_logprobs: NDArray[np.float64]


def choose(logits: Tensor, rules: Rules, compute: Compute) -> Choices:
    """A token for each row of logits float32 [R, V], which may be altered.

    Raises EngineError for shapes, dtypes and token ids that do not fit together.
    """
    _check_logits(logits)
    _check_rules(rules, *logits.shape)
    return _backend().choose(logits, rules, compute)  # type: ignore[no-any-return]


def _backend() -> ModuleType:
    if dispatch.choose().backend == "cpu":
        from nybble.kernels.token_choice import cpu

        return cpu
    from nybble.kernels.token_choice import reference

    return reference


def _check_logits(logits: Tensor) -> None:
    is_plain = logits.dtype == torch.float32 and logits.is_contiguous() and logits.is_cpu
    if logits.ndim != 2 or not 0 < logits.shape[1] <= MOST_VOCABULARY or not is_plain:
        raise EngineError(
            f"logits must be contiguous float32 [R, V] in main memory with V from 1 to "
            f"{MOST_VOCABULARY:,}, found {logits.dtype} {list(logits.shape)}"
            f"{'' if logits.is_contiguous() else ', strided'}"
        )


def _check_rules(rules: Rules, rows: int, vocabulary: int) -> None:
    edits = len(rules.tokens)
    sizes = (len(rules.rules), len(rules.starts) - 1, len(rules.masks))
    if set(sizes) != {rows} or not len(rules.factors) == len(rules.shifts) == edits:
        raise EngineError(f"rules, starts and masks of {sizes} rows for {rows} rows of logits")
    arrays: list[NDArray[Any]] = [rules.rules, rules.starts, rules.tokens]
    arrays += [rules.factors, rules.shifts]
    dtypes = (RULE, np.int64, np.int32, np.float64, np.float64)
    for array, dtype in zip(arrays, dtypes, strict=True):
        if array.dtype != dtype:
            raise EngineError(f"rules: expected {dtype}, found {array.dtype}")
    starts = rules.starts
    is_wrong = (starts[1:] < starts[:-1]).any() if edits else starts.any()
    if is_wrong or starts[0] != 0 or starts[-1] != edits:
        raise EngineError(f"starts {starts.tolist()} of {edits} edits must go from 0 up to all")
    if edits and not 0 <= rules.tokens.min() <= rules.tokens.max() < vocabulary:
        raise EngineError(
            f"edits of tokens from {rules.tokens.min()} to {rules.tokens.max()} for a vocabulary "
            f"of {vocabulary:,}"
        )
