"""Drafting leaves the law of every token as it is, under every option, and every seeded text.

A token's law is computed here from the fake model's logits of the text before it, in plain numpy
after the options' definitions, with no code of the sampler's. All tokens of a law's own are made
uniform by it (a randomised probability integral transform), the draft that was verified first of
all tokens: so that one taken too often or too seldom shows in the lowest bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fake_runner import END, VOCAB, FakeRunner, letters
from nybble.engine.drafter import Ask, MtpDrafter
from nybble.engine.engine import Engine, EngineOptions
from nybble.engine.prefix import PrefixCache
from nybble.engine.request import Grammar, Request, SamplingParams, Token
from nybble.engine.runner import Work
from nybble.engine.sampler import Sampler
from nybble.engine.speculation import Speculation
from nybble.kernels.compute import Compute
from nybble.models.numbers import Numbers
from nybble.text.tokenizer import Tokenizer

PROMPT = tuple(1 + (5 * i) % 28 for i in range(9))
TOKENS, SEQUENCES, DRAFTS, PAGE_TOKENS, HABIT = 30, 32, 3, 16, 5.0

BINS = 20
#: How often a right law is called wrong, if seeds were not fixed.
LEVEL = 1e-3
#: A law that is this far from the right one, in total variation of the bins, is found with this
#: probability by so many tokens.
POWER = 0.99
FAR, FAR_TOKENS = 0.05, 6_600
NEAR, NEAR_TOKENS = 0.02, 41_000

Law = NDArray[np.float64]


class Halves:
    """A grammar that allows letters of one half of the alphabet and of the other in turn."""

    def __init__(self) -> None:
        self.accepted: dict[int, int] = {}
        self.asked: list[int] = []

    def start(self, key: int, grammar: Grammar) -> None:
        self.accepted[key] = 0

    def is_ready(self, key: int) -> bool:
        return True

    def ask(self, keys: list[int]) -> None:
        self.asked = list(keys)

    def collect(self) -> list[bytes]:
        return [
            sum(1 << t for t in half(self.accepted[key])).to_bytes(4, "little")
            for key in self.asked
        ]

    def failure(self, key: int) -> str:
        return ""

    def accept(self, key: int, token: int) -> bool:
        assert token in half(self.accepted[key])
        self.accepted[key] += 1
        return False

    def drop(self, key: int) -> None:
        self.accepted.pop(key, None)

    def close(self) -> None:
        self.accepted = {}


def half(count: int) -> range:
    """The tokens that may follow so many."""
    return range(14, 27) if count % 2 else range(1, 14)


class NotingDrafter(MtpDrafter):
    """Notes the drafts for each text, the prompt apart."""

    def __init__(self, runner: FakeRunner) -> None:
        super().__init__(runner)
        self.drafts: dict[tuple[int, ...], list[int]] = {}

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        found = super().draft(asks)
        for ask, drafts in zip(asks, found, strict=True):
            self.drafts[tuple(ask.output)] = list(drafts)
        return found


@dataclass(frozen=True)
class Case:
    """Options, and how each changes logits [V] after the tokens before, where `plain` does not."""

    params: SamplingParams
    change: Callable[[Law, Sequence[int]], None] = lambda logits, before: None


def sampled(**options: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True} | options
    )


def penalised(logits: Law, before: Sequence[int]) -> None:
    for token in {*PROMPT, *before}:
        logits[token] *= 1 / 1.3 if logits[token] > 0 else 1.3
    for token in before:
        logits[token] -= 0.25
    for token in set(before):
        logits[token] -= 0.5


def biased(logits: Law, before: Sequence[int]) -> None:
    logits[3] += 2.0
    logits[20] -= 100.0


def spared(logits: Law, before: Sequence[int]) -> None:
    logits[3] = -np.inf  # "c"
    if before and before[-1] == 1:
        logits[2] = -np.inf  # "ab"
    if tuple(before[-2:]) == (4, 5):
        logits[6] = -np.inf  # "def"


def kept_going(logits: Law, before: Sequence[int]) -> None:
    logits[END] += 4.0
    if len(before) < 12:
        logits[END] = -np.inf


def shaped(logits: Law, before: Sequence[int]) -> None:
    banned = set(range(VOCAB)) - set(half(len(before)))
    logits[list(banned)] = -np.inf


CASES = {
    "temperature": Case(sampled(temperature=0.7)),
    "hot": Case(sampled(temperature=1.8)),
    "top-k": Case(sampled(top_k=5)),
    "top-p": Case(sampled(top_p=0.8)),
    "min-p": Case(sampled(min_p=0.1, temperature=1.5)),
    "all filters": Case(sampled(top_k=12, top_p=0.9, min_p=0.02, temperature=1.3)),
    "penalties": Case(
        sampled(repetition_penalty=1.3, frequency_penalty=0.25, presence_penalty=0.5), penalised
    ),
    "bias": Case(sampled(logit_bias={3: 2.0, 20: -100.0}), biased),
    "bad words": Case(sampled(bad_words=("c", "ab", "def")), spared),
    "min tokens": Case(sampled(min_tokens=12, ignore_eos=False, logit_bias={END: 4.0}), kept_going),
    "grammar": Case(sampled(grammar=Grammar("regex", "halves")), shaped),
    "logprobs": Case(sampled(logprobs=4)),
}


# --------------------------------------------------------------------------------------- the law


def law(logits: Law, case: Case, before: Sequence[int]) -> Law:
    """The probabilities [V] of the token after some, by the options' definitions."""
    params, x = case.params, logits.copy()
    case.change(x, before)
    x /= params.temperature
    kept = np.isfinite(x)
    if params.top_k:
        kept &= x >= np.sort(x)[-params.top_k]
    p = normal(x, kept)
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        reached = np.cumsum(p[order]) - p[order]
        kept[order[reached >= params.top_p]] = False
    kept &= normal(x, np.isfinite(x)) >= params.min_p * normal(x, np.isfinite(x)).max()
    return normal(x, kept)


def normal(x: Law, kept: NDArray[np.bool_]) -> Law:
    weights = np.where(kept, np.exp(x - x.max()), 0.0)
    found: Law = weights / weights.sum()
    return found


def transformed(law: Law, token: int, draft: int | None, share: float) -> float:
    """Where a token lies in its law, from 0 to 1, the draft before all others; `share` is uniform,
    for the place within the token's own probability."""
    order = list(range(VOCAB))
    if draft is not None:
        order.remove(draft)
        order.insert(0, draft)
    at = order.index(token)
    return float(law[order[:at]].sum() + share * law[token])


def chance(values: Sequence[float]) -> float:
    """How probable it is that uniform values are as uneven as these, or more: chi-square."""
    counts = np.histogram(values, BINS, (0.0, 1.0))[0]
    even = len(values) / BINS
    return survival(BINS - 1, float(((counts - even) ** 2 / even).sum()))


def survival(freedom: float, x: float) -> float:
    """How probable a chi-square variable above x is."""
    half_freedom, half_x = (torch.tensor(v / 2, dtype=torch.float64) for v in (freedom, x))
    return float(torch.special.gammaincc(half_freedom, half_x))


def power(tokens: int, variation: float) -> float:
    """How probable it is that so many tokens show a law this far from the right one, at least: of
    all bins with that total variation, those apart by equal shares have the smallest chi-square."""
    noncentrality = tokens * (2 * variation) ** 2
    limit = 0.0
    while survival(BINS - 1, limit) > LEVEL:
        limit += 0.01
    found, weight = 0.0, math.exp(-noncentrality / 2)
    for i in range(int(4 * noncentrality) + 50):
        found += weight * survival(BINS - 1 + 2 * i, limit)
        weight *= noncentrality / 2 / (i + 1)
    return found


# ------------------------------------------------------------------------------------ generating


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return letters(tmp_path_factory.mktemp("letters"))


def engine(tokenizer: Tokenizer, drafts: int) -> tuple[Engine, NotingDrafter | None]:
    options = EngineOptions(SEQUENCES, SEQUENCES * (1 + drafts) + 64, PAGE_TOKENS, drafts)
    each = -(-(len(PROMPT) + TOKENS + 2 * DRAFTS) // PAGE_TOKENS)
    pages, slots = Numbers(SEQUENCES * each, "pages"), Numbers(SEQUENCES * (1 + drafts), "slots")
    snapshots = Numbers(4, "snapshots", slots.count)
    runner = FakeRunner(options, pages, slots, snapshots, habit=HABIT)
    drafter = NotingDrafter(runner) if drafts else None
    made = Engine(
        runner,
        tokenizer,
        options,
        pages,
        slots,
        200,
        Sampler(VOCAB, Compute(threads=1)),
        Halves(),
        cache=PrefixCache(pages, snapshots, PAGE_TOKENS, has_states=True),
        drafter=drafter,
        speculation=Speculation(drafts, drafts) if drafts else None,
        slots_each=1 + drafts,
    )
    return made, drafter


def generated(made: Engine, params: SamplingParams, seeds: Collection[int]) -> list[list[Token]]:
    """What each seed gives, in their order."""
    found: dict[str, list[Token]] = {str(seed): [] for seed in seeds}
    for seed in seeds:
        made.add(Request(str(seed), PROMPT, replace(params, seed=seed)))
    while not made.is_idle:
        for event in made.step():
            assert not event.error
            assert event.token is not None
            found[event.request].append(event.token)
    return list(found.values())


class Model:
    """The fake model without an engine: the logits after each token of a text."""

    def __init__(self) -> None:
        options = EngineOptions(1, 200, 64)
        pages, slots = Numbers(1, "pages"), Numbers(1, "slots")
        self._page, self._slot = pages.take(), slots.take()
        self._runner = FakeRunner(options, pages, slots, habit=HABIT)

    def logits(self, output: Sequence[int]) -> Law:
        """Those that each token of the output was chosen from, float64 [T, V]."""
        work = Work(PROMPT, self._page, self._slot[0], 0, is_recurrent=False, outputs=1)
        rows = [self._runner.forward([work]).clone()]
        if len(output) > 1:
            run = Work(output[:-1], self._page, self._slot[0], len(PROMPT), True, len(output) - 1)
            rows.append(self._runner.forward([run]))
        found: Law = torch.cat(rows).numpy().astype(np.float64)
        return found


@dataclass(frozen=True)
class Tried:
    """A token that came, its law, and the draft that was verified there."""

    token: int
    law: Law
    draft: int | None


def tried(case: Case, texts: Sequence[Sequence[Token]], drafter: NotingDrafter) -> list[Tried]:
    found, model = [], Model()
    for text in texts:
        output = [token.id for token in text]
        drafts: list[int] = []
        for at, logits in enumerate(model.logits(output)):
            found.append(
                Tried(output[at], law(logits, case, output[:at]), drafts[0] if drafts else None)
            )
            is_right = bool(drafts) and drafts[0] == output[at]
            made = drafter.drafts.get(tuple(output[: at + 1]), [])
            drafts = drafts[1:] if is_right and len(drafts) > 1 else made
    return found


def places(found: Sequence[Tried]) -> list[float]:
    draw = np.random.default_rng(5)
    return [transformed(t.law, t.token, t.draft, float(draw.random())) for t in found]


def seeds_for(case: Case, tokens: int, first: int) -> range:
    """Seeds whose texts have so many tokens together; those that may end early are more."""
    each = TOKENS if case.params.ignore_eos or case.params.grammar else 13
    return range(first, first + -(-tokens // each))


def check(case: Case, tokenizer: Tokenizer, tokens: int) -> None:
    """The law holds, and would not be found to hold if drafts were preferred."""
    seeds = seeds_for(case, tokens, 1_000)
    made, drafter = engine(tokenizer, DRAFTS)
    assert drafter is not None
    texts = generated(made, case.params, seeds)
    found = tried(case, texts, drafter)
    assert len(found) >= tokens
    stats = made.stats
    assert 0.05 * stats.draft_steps < stats.accepted < 0.9 * stats.drafted
    assert all(t.law[t.token] > 0 for t in found)
    assert chance(places(found)) > LEVEL
    some = seeds[: len(seeds) // 4]
    plain, _ = engine(tokenizer, 0)
    assert generated(plain, case.params, some) == texts[: len(some)]


@pytest.mark.parametrize("name", CASES)
def test_the_law_is_that_of_plain_sampling(name: str, tokenizer: Tokenizer) -> None:
    check(CASES[name], tokenizer, FAR_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_law_is_that_of_plain_sampling_closely(name: str, tokenizer: Tokenizer) -> None:
    check(CASES[name], tokenizer, NEAR_TOKENS)


def test_so_many_tokens_have_the_power_that_is_stated() -> None:
    assert power(FAR_TOKENS, FAR) >= POWER
    assert power(NEAR_TOKENS, NEAR) >= POWER
    assert power(FAR_TOKENS, 1e-9) == pytest.approx(LEVEL, rel=0.01)


def test_drafts_preferred_in_one_of_twelve_tokens_are_found(tokenizer: Tokenizer) -> None:
    made, drafter = engine(tokenizer, DRAFTS)
    assert drafter is not None
    case, draw = CASES["temperature"], np.random.default_rng(6)
    texts = generated(made, case.params, seeds_for(case, FAR_TOKENS, 1_000))
    found = [
        replace(t, token=t.draft) if t.draft is not None and draw.random() < 1 / 12 else t
        for t in tried(case, texts, drafter)
    ]
    assert chance(places(found)) < LEVEL
