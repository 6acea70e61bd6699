"""How a checkpoint is opened: what may be asked for, what is made of it, and what is said."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import tiny
from nybble.api.completion import Answer
from nybble.api.opening import (
    ADAPTIVE_DRAFTS,
    Opened,
    OpenOptions,
    draft_source,
    open_checkpoint,
)
from nybble.cli.flags import DRAFT_SOURCES, AheadFlags, EngineFlags
from nybble.engine.request import Event, Request, SamplingParams, Token
from nybble.errors import EngineError, ModelError
from nybble.families import find_family

CARRIED = tiny.MODELS / "hybrid-chat-mtp"


def dims(family: str, **changed: object) -> Any:
    config = tiny.config(family, **changed)
    return find_family(config).dimensions(config)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draft": "eagle"}, "draft must be one of auto, mtp, ngram, off, found 'eagle'"),
        ({"draft_tokens": -1}, "draft_tokens must be a whole number from 0 to 8, found -1"),
        ({"draft_tokens": 9}, "draft_tokens must be a whole number from 0 to 8, found 9"),
        ({"draft_tokens": True}, "draft_tokens must be a whole number"),
        ({"draft_tokens": "auto"}, "draft_tokens must be a whole number"),
        ({"draft": "off", "draft_tokens": 2}, "draft_tokens 2 with draft off"),
        ({"prefix_cache": 1}, "prefix_cache must be true or false, found 1"),
        ({"exact": None}, "exact must be true or false, found None"),
        ({"snapshot_memory": -0.1}, "snapshot_memory must be a number of GiB from 0"),
        ({"snapshot_memory": float("nan")}, "snapshot_memory must be a number of GiB from 0"),
        ({"snapshot_memory": True}, "snapshot_memory must be a number of GiB from 0"),
        ({"snapshot_memory": 1, "prefix_cache": False}, "snapshot_memory 1 without the prefix"),
        ({"memory": 0}, "memory must be a number of GiB above 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        OpenOptions(**wrong)


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ({}, ADAPTIVE_DRAFTS),
        ({"draft_tokens": 8}, 8),
        ({"draft_tokens": 0}, 0),
        ({"draft": "off"}, 0),
        ({"draft": "off", "draft_tokens": 0}, 0),
        ({"draft": "ngram", "draft_tokens": 1}, 1),
    ],
)
def test_how_many_tokens_are_guessed(asked: dict[str, Any], most: int) -> None:
    options = OpenOptions(**asked)
    assert options.most_drafts == options.engine().draft_tokens == most
    assert options.engine(1).draft_tokens == 1  # what the memory holds


def test_a_memory_of_none_for_snapshots_is_one_to_choose() -> None:
    assert OpenOptions(snapshot_memory=0).snapshot_memory == 0
    assert OpenOptions(snapshot_memory=0, prefix_cache=False).snapshot_memory == 0
    assert OpenOptions().snapshot_memory is None


class Headed:
    """A model as far as drafting asks: its head, None without one, or what is wrong with it."""

    def __init__(self, mtp: object) -> None:
        self._mtp = mtp

    @property
    def mtp(self) -> object:
        if isinstance(self._mtp, Exception):
            raise self._mtp
        return self._mtp


def source(asked: str, model: Headed, **options: Any) -> str:
    return draft_source(OpenOptions(draft=asked, **options), Path("x"), model)  # type: ignore[arg-type]


def test_who_guesses() -> None:
    headed, without = Headed(object()), Headed(None)
    for asked, expected in (("auto", "mtp"), ("mtp", "mtp"), ("ngram", "ngram"), ("off", "off")):
        assert source(asked, headed) == expected
    assert source("auto", without) == "ngram"
    assert source("auto", without, draft_tokens=0) == "off"
    with pytest.raises(ModelError, match="x: draft mtp was asked for.*no MTP head"):
        source("mtp", without)
    # Who wants no drafts needs no head.
    assert source("mtp", without, draft_tokens=0) == "off"


def test_a_lost_head_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    lost = Headed(ModelError("mtp.fc.weight is not in the file"))
    assert source("auto", lost) == "ngram"
    assert "promises an MTP head that cannot be used (mtp.fc.weight is not" in caplog.text
    with pytest.raises(ModelError, match=r"mtp\.fc\.weight"):
        source("mtp", lost)


# -------------------------------------------------------------------------------------------- flags


def test_flags_are_the_options_of_their_names() -> None:
    plain = OpenOptions()
    assert EngineFlags().options(AheadFlags()) == plain == EngineFlags().options()
    assert {*asdict(EngineFlags()), *asdict(AheadFlags())} == set(asdict(plain))
    given = AheadFlags(
        prefix_cache=True, exact=True, snapshot_memory=0.5, draft="ngram", draft_tokens="5"
    )
    found = EngineFlags(max_sequences=3).options(given)
    assert found == OpenOptions(
        max_sequences=3, exact=True, snapshot_memory=0.5, draft="ngram", draft_tokens=5
    )
    assert set(DRAFT_SOURCES) == {"auto", "mtp", "ngram", "off"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draft": "eagle"}, "'eagle'; choose auto, mtp, ngram or off"),
        ({"draft_tokens": "many"}, "'many'; write auto, or a number from 0 to 8"),
        ({"draft_tokens": "-1"}, "'-1'; write auto"),
        ({"draft_tokens": "9"}, "draft_tokens must be a whole number from 0 to 8"),
        ({"draft_tokens": "²"}, "write auto"),
        ({"draft": "off", "draft_tokens": "2"}, "draft_tokens 2 with draft off"),
        ({"prefix_cache": False, "snapshot_memory": 1.0}, "without the prefix cache"),
    ],
)
def test_wrong_flags_are_usage_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        EngineFlags().options(AheadFlags(**wrong))


# ------------------------------------------------------------------------------------- what is made


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of attention alone, with the carried tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    config = tiny.config("llama", vocab_size=4096)
    tiny.write(folder, config, tiny.tensors(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((CARRIED / name).read_bytes())
    return folder


def opened(folder: Path, **options: Any) -> Opened:
    return open_checkpoint(folder, OpenOptions(max_context=512, threads=1, **options))


def test_all_is_on_by_default_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nybble")
    found = opened(CARRIED, memory=0.2, max_sequences=2)
    size = found.memory.slot_bytes / 2**20
    expected = f"prefix cache: 64 snapshots of {size:.1f} MiB; drafting: mtp, up to 3 tokens"
    assert found.ahead == expected
    assert expected in caplog.text
    engine = found.engine
    assert engine.options.draft_tokens == 3
    assert engine.most_sequences == 2
    assert engine.slots.count == 2 * 4  # a state for each draft
    stats = engine.stats
    assert (stats.snapshots, stats.snapshots_used, stats.drafting) == (64, 0, "")
    engine.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix_cache": False, "draft": "off"}, "prefix cache: off; drafting: off"),
        ({"snapshot_memory": 0.0}, "no snapshots of recurrent states, so nothing is found"),
        ({"exact": True, "draft_tokens": 1}, "MiB, exact; drafting: mtp, up to 1 token"),
        ({"draft": "ngram"}, "drafting: ngram, up to 3 tokens"),
    ],
)
def test_what_was_asked_for_is_what_is_said(options: dict[str, Any], said: str) -> None:
    found = opened(CARRIED, memory=0.05, max_sequences=2, **options)
    assert said in found.ahead
    assert found.memory.has_mtp == ("mtp" in found.ahead)
    found.engine.close()


def test_pages_alone_are_the_cache_of_models_without_states(small: Path) -> None:
    found = opened(small, memory=0.05, max_sequences=2)
    assert found.ahead.startswith("prefix cache: pages alone, no recurrent states; drafting: ngram")
    assert found.engine.slots.count == found.engine.most_sequences == 2
    with pytest.raises(ModelError, match="no MTP head"):
        opened(small, draft="mtp")
    found.engine.close()


def test_snapshots_take_what_was_said_to_the_byte() -> None:
    slot = opened(CARRIED, memory=0.05, max_sequences=2).memory.slot_bytes
    for bytes_given, expected in ((5 * slot, 5), (6 * slot - 1, 5)):
        found = opened(CARRIED, memory=0.05, max_sequences=2, snapshot_memory=bytes_given / 2**30)
        assert found.memory.snapshots == expected == found.engine.stats.snapshots
        assert found.memory.total_bytes <= 0.05 * 2**30
        found.engine.close()


def test_fewer_drafts_than_asked_for_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    plenty = opened(CARRIED, memory=0.2, max_sequences=4).memory
    little = (plenty.page_bytes * 8 + plenty.slot_bytes * 16) / 2**30
    found = opened(CARRIED, memory=little, max_sequences=4, draft_tokens=8, snapshot_memory=0.0)
    assert found.memory.drafts < 8
    said = f"memory holds the states of {found.memory.drafts} drafts of a sequence, not of 8"
    assert said in caplog.text
    assert found.engine.options.draft_tokens == found.memory.drafts
    found.engine.close()


# ------------------------------------------------------------------------------------------- usage


def test_usage_counts_the_prompt_once_and_all_guesses() -> None:
    answer = Answer(Request("a", (1, 2, 3), SamplingParams(n=2)), 0)
    token = Token(7, "x", -0.5)
    answer.take(Event("a", 0, token, cached=2, missed="parts", queued_s=0.1), 1.0)
    answer.take(Event("a", 1, token, cached=3, queued_s=0.1), 1.0)
    answer.take(Event("a", 0, token, drafted=3, accepted=1), 2.0)
    answer.take(Event("a", 0, token), 2.0)
    answer.take(Event("a", 1, token, drafted=2, accepted=2), 2.0)
    usage = answer.usage
    assert (usage.cached_tokens, usage.drafted, usage.accepted) == (2, 5, 3)
    assert usage.tokens == 5


def test_a_serving_engine_says_what_spares_work() -> None:
    from nybble.cli.serve import render

    serving: Any = SimpleNamespace(
        url="http://x",
        names=("m",),
        has_chat=True,
        has_keys=False,
        context=10,
        tokens=20,
        sequences=3,
        kernels="cpu",
        fingerprint="fp_1",
        ahead="prefix cache: 61 snapshots of 62.8 MiB; drafting: mtp, up to 3 tokens",
    )
    text = " ".join(render(serving).split())
    assert "ahead prefix cache: 61 snapshots of 62.8 MiB; drafting: mtp, up to 3 tokens" in text
