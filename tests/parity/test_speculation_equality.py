"""A prefix cache and drafts, together and with all else that an engine does, change no bit.

Conversations whose turns an engine itself has generated, on real models: against an engine without
cache and drafts, which runs one request after another, every token is the same and every row of
logits equal in all bits, greedy and seeded. The one exception is allowed, bounded, and absent with
`exact`: a prompt that goes on from a state which decoding left. What an MTP head guesses after a
hit is what it guesses without one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import tiny
from conversations import (
    CARRIED,
    DECODED_BOUND,
    ROOMY,
    SHIPPED,
    TIGHT,
    Script,
    Setting,
    Talker,
    check,
    differences,
    openings,
    script,
)
from fake_runner import letters
from nybble.api.quantize import quantize
from nybble.engine.request import Grammar, Request, SamplingParams
from nybble.kernels import dispatch

# Without compiled kernels torch multiplies, whose sums depend on the batch.
needs_library = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")

#: What a setting may be. Guessing: by whom, and how many; None is as it pays. Caching: whether, and
#: whether exactly.
FACTORS = {
    "guessing": (
        *(("mtp", k) for k in (1, 2, 3, 4)),
        ("auto", None),
        ("ngram", 3),
        ("off", None),
    ),
    "caching": ((True, True), (True, False), (False, False)),
    "kv": ("bf16", "fp8"),
    "batched": (1024, 160),
    "preempt": (0, 7),
    "memory": (ROOMY, TIGHT),
    "apart": (False, True),
}


def settings() -> Iterator[Setting]:
    """All combinations."""
    for guessing, caching, *others in itertools.product(*FACTORS.values()):
        rest = dict(zip(list(FACTORS)[2:], others, strict=True))
        yield Setting(
            draft=guessing[0], drafts=guessing[1], cache=caching[0], exact=caching[1], **rest
        )


def pairs(setting: Setting) -> set[tuple[object, object]]:
    """What two factors of a setting are."""
    values = (
        ("guessing", setting.draft, setting.drafts),
        ("caching", setting.cache, setting.exact),
        *((name, getattr(setting, name)) for name in list(FACTORS)[2:]),
    )
    return set(itertools.combinations(values, 2))


def covering() -> list[Setting]:
    """Few settings, among which any two factors have any two values together."""
    everything = list(settings())
    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda s: len(pairs(s) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def try_out(setting: Setting, asked: Script, bound: float) -> None:
    """All is equal, and what was to happen has happened."""
    stats = check(setting, asked, bound).engine.stats
    assert bool(stats.cache_hits) == setting.cache
    assert (stats.preemptions > 0) >= bool(setting.preempt)
    assert (stats.accepted > 0) == (setting.draft != "off")


@needs_library
@pytest.mark.parametrize("setting", SHIPPED, ids=str)
def test_what_is_shipped(setting: Setting) -> None:
    try_out(setting, script(CARRIED, setting.kv), DECODED_BOUND)


@needs_library
@pytest.mark.parametrize("setting", covering(), ids=str)
def test_pairs_of_everything(setting: Setting) -> None:
    try_out(setting, script(CARRIED, setting.kv), DECODED_BOUND)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("setting", list(settings()), ids=str)
def test_everything_together(setting: Setting) -> None:
    try_out(setting, script(CARRIED, setting.kv), DECODED_BOUND)


@needs_library
def test_a_grammar_goes_with_drafts() -> None:
    pytest.importorskip("llguidance")
    grammar = Grammar("regex", "([a-z]{1,9}[ ,]){12,20}")
    params = SamplingParams(max_tokens=60, grammar=grammar, temperature=0.8, seed=7, n=2)
    requests = [
        Request(str(i), prompt, replace(params, temperature=0.8 * i))
        for i, prompt in enumerate(openings()[:2])
    ]
    setting = Setting(draft="mtp", drafts=3, exact=True, preempt=6)
    plain, talker = Talker(CARRIED, setting.plain), Talker(CARRIED, setting)
    try:
        expected = plain.say(requests)
        for _ in range(2):  # the second time from the cache
            assert not differences(expected, talker.say(requests))
        assert talker.engine.stats.accepted > 0
        assert talker.engine.stats.cache_hits > 0
        assert all(said.finish in ("stop", "length") for said in expected.values())
    finally:
        plain.engine.close()
        talker.engine.close()


# -------------------------------------------------------------------------------- random models


@dataclass(frozen=True)
class Random:
    """A random model: how it is quantized, "" for BF16, and how many value heads it has for two of
    keys, where it has such."""

    family: str
    recipe: str = ""
    kv: str = "bf16"
    heads: int = 6

    def folder(self, folder: Path) -> Path:
        changed = {"linear_num_value_heads": self.heads} if self.family in tiny.HYBRIDS else {}
        made = tiny.checkpoint(folder / "bf16", self.family, max_position_embeddings=700, **changed)
        if self.recipe:
            quantize(made, folder / "quantized", self.recipe, data_free=True)
            made = folder / "quantized"
        letters(made)
        return made


RANDOM = (
    Random("qwen3_5"),
    Random("qwen3_5", "nvfp4-all", "fp8", heads=4),
    Random("qwen3_5_moe", "nvfp4-all", "fp8"),
    Random("qwen3_5_moe", heads=10),
    Random("llama", "nvfp4-all", "fp8"),
    Random("qwen3_moe"),
)
RANDOM_VOCABULARY = 131


@needs_library
@pytest.mark.parametrize("model", RANDOM, ids=lambda m: f"{m.family}-{m.recipe}-{m.heads}")
def test_random_models(model: Random, tmp_path: Path) -> None:
    asked = script(model.folder(tmp_path), model.kv, 1, RANDOM_VOCABULARY)
    setting = Setting(kv=model.kv, exact=True, batched=192, memory=TIGHT)
    check(replace(setting, drafts=3, preempt=9), asked)
    check(replace(setting, draft="ngram", drafts=2, apart=True), asked)
    if model.family not in tiny.HYBRIDS:  # then decoding leaves what chunks leave
        check(replace(setting, exact=False), asked)
