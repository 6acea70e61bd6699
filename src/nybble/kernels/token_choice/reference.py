"""The definition in plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.kernels.compute import Compute
from nybble.kernels.token_choice import NAN, NOTHING_LEFT, Choices, Rules

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]
_Bits = NDArray[np.uint64]
_Flags = NDArray[np.bool_]

#: Coefficients of 2^r for |r| <= 1/2, highest first; 4e-14 relative.
_POWERS = tuple(
    float.fromhex(digits)
    for digits in (
        "0x1.b63880a30e9ffp-24",
        "0x1.63d136366db24p-20",
        "0x1.ffcb9515a8016p-17",
        "0x1.4308ac85aa947p-13",
        "0x1.5d87fe86fe88ep-10",
        "0x1.3b2ab7181b755p-7",
        "0x1.c6b08d7047e52p-5",
        "0x1.ebfbdff823cedp-3",
        "0x1.62e42fefa39efp-1",
        "0x1.0000000000000p+0",
    )
)
_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
_LN_2 = float.fromhex("0x1.62e42fefa39efp-1")
_ROOT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")


def choose(logits: Tensor, rules: Rules, compute: Compute) -> Choices:
    """See the package."""
    rows, most = len(logits), int(rules.rules["alternatives"].max(initial=0))
    found = Choices(
        np.full(rows, NAN),
        np.full(rows, np.nan),
        np.full((rows, most), -1),
        np.full((rows, most), np.nan),
    )
    for r in range(rows):
        _row(logits[r].numpy(), rules, r, found)
    return found


def _row(raw: _Floats, rules: Rules, r: int, found: Choices) -> None:
    rule = rules.rules[r]
    log_sum = _log_sum(raw)
    if np.isnan(log_sum):
        return
    top = np.argsort(-raw, kind="stable")[: rule["alternatives"]]
    top = top[raw[top] > -np.inf]
    found.top_tokens[r, : len(top)] = top
    found.top_logprobs[r, : len(top)] = raw[top].astype(np.float64) - log_sum
    x = masked(edited(raw, rules, r), rules.masks[r])
    token = int(x.argmax())
    if x[token] == -np.inf:
        found.token[r] = NOTHING_LEFT
        return
    if rule["temperature"] > 0:
        with np.errstate(over="ignore"):  # -infinity, close to temperature 0
            scaled = (x.astype(np.float64) - np.float64(x[token])) / rule["temperature"]
        kept = keep(x, scaled, rule)
        noise = gumbel(int(rule["seed"]), int(rule["choice"]), int(rule["position"]), len(x))
        token = int(np.where(kept, scaled + noise, -np.inf).argmax())
    found.token[r], found.logprob[r] = token, float(raw[token]) - log_sum


def _log_sum(raw: _Floats) -> float:
    """log of the sum of e^x; NaN with NaN or +infinity."""
    peak = float(raw.max())
    if np.isnan(peak) or peak == np.inf:
        return np.nan
    if peak == -np.inf:
        return peak
    return peak + float(np.log(np.exp(raw.astype(np.float64) - peak).sum()))


def edited(raw: _Floats, rules: Rules, r: int) -> _Floats:
    """The logits [V] after the edits of row r."""
    x = raw.copy()
    for e in range(rules.starts[r], rules.starts[r + 1]):
        token, factor = rules.tokens[e], rules.factors[e]
        wide = np.float64(x[token])
        wide = wide / factor if wide > 0 else wide * factor
        with np.errstate(over="ignore"):
            x[token] = np.float32(wide + rules.shifts[e])
    return x


def masked(x: _Floats, mask: bytes | None) -> _Floats:
    """The logits [V] with -infinity where a mask has no bit."""
    if mask is None:
        return x
    whole = np.frombuffer(mask.ljust(-(-len(x) // 8), b"\0"), np.uint8)
    bits = np.unpackbits(whole, count=len(x), bitorder="little")
    return np.where(bits != 0, x, np.float32(-np.inf))


def keep(x: _Floats, scaled: _Doubles, rule: np.void) -> _Flags:
    """Which tokens the filters leave, bool [V]."""
    kept = x > -np.inf
    if 0 < rule["top_k"] < kept.sum():
        kept &= x >= np.sort(x)[-rule["top_k"]]
    if rule["top_p"] < 1:
        kept &= x >= _nucleus(x[kept], weights(scaled[kept]), rule["top_p"])
    if rule["min_p"] > 0:
        kept &= scaled >= log(np.array([rule["min_p"]]))[0]
    return kept


def _nucleus(x: _Floats, weight: _Bits, top_p: float) -> float:
    """The least x before which less than top_p of the weight lies."""
    values, group = np.unique(-x, return_inverse=True)  # largest x first
    sums = np.zeros(len(values), dtype=np.uint64)
    np.add.at(sums, group, weight)
    before = np.cumsum(sums) - sums
    inside = before.astype(np.float64) < top_p * np.float64(sums.sum())
    return -float(values[inside][-1])


def weights(scaled: _Doubles) -> _Bits:
    """e^scaled in units of 2^-40, rounded, for scaled <= 0."""
    power = np.maximum(scaled, -30.0) * _LOG2_E  # 2^-40 e^-30 rounds to 0
    whole = np.rint(power)
    r = power - whole
    p = np.full_like(r, _POWERS[0])
    for coefficient in _POWERS[1:]:
        p = p * r + coefficient
    return np.rint(np.ldexp(p, whole.astype(np.int64) + 40)).astype(np.uint64)


def log(x: _Doubles) -> _Doubles:
    """The natural logarithm of normal numbers: e log 2 + 2 artanh((m - 1) / (m + 1)) for
    x = m 2^e with m from sqrt(1/2) to sqrt(2); the series of artanh to its 12th term."""
    m, e = np.frexp(x)
    is_small = m < _ROOT_HALF
    m, e = np.where(is_small, 2 * m, m), np.where(is_small, e - 1, e)
    s = (m - 1) / (m + 1)
    z = s * s
    p = np.full_like(z, 1 / 23)
    for n in range(21, 0, -2):
        p = p * z + 1 / n
    found: _Doubles = e * _LN_2 + 2 * s * p
    return found


def gumbel(seed: int, choice: int, position: int, size: int) -> _Doubles:
    """Standard Gumbel noise float64 [size] of one position."""
    block = np.arange(-(-size // 2), dtype=np.uint64)
    words = philox((block, position, choice, 0), seed)
    bits = np.stack([words[0] | words[1] << np.uint64(32), words[2] | words[3] << np.uint64(32)], 1)
    u = ((bits.reshape(-1)[:size] >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -log(-log(u))


def philox(counter: tuple[Any, int, int, int], seed: int) -> list[_Bits]:
    """Philox4x32-10: four words of 32 bits for each counter, uint64 [N] each.

    The first word of the counters is uint64 [N], below 2^32 as the others are; the key is `seed`,
    its low word first.
    """
    low = np.uint64(0xFFFFFFFF)
    a, *rest = counter
    b, c, d = (np.full_like(a, word) for word in rest)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (
            second >> np.uint64(32) ^ b ^ np.uint64(key[0]),
            second & low,
            first >> np.uint64(32) ^ d ^ np.uint64(key[1]),
            first & low,
        )
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [a, b, c, d]
