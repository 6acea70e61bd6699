"""What people write for sampling options is taken as it is meant, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.limits import MOST_PROMPT_LOGPROBS, Limits
from nybble.engine.request import Event, Grammar, Request, SamplingParams
from nybble.errors import EngineError


def made(**options: Any) -> SamplingParams:
    return SamplingParams(**options)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_a_single_text_is_one_text(name: str) -> None:
    assert getattr(made(**{name: "abc"}), name) == ("abc",)
    assert getattr(made(**{name: ["abc", "d"]}), name) == ("abc", "d")


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20))
def test_lists_become_tuples(ids: list[int]) -> None:
    assert made(stop_token_ids=ids) == made(stop_token_ids=tuple(ids))
    assert set(made(stop_token_ids=frozenset(ids)).stop_token_ids) == set(ids)


def test_nothing_is_empty() -> None:
    assert made(stop=None, stop_token_ids=None, bad_words=None, logit_bias=None) == made()


def test_a_bias_that_is_altered_later_does_not_count() -> None:
    bias = {3: 1.0}
    params = made(logit_bias=bias)
    bias[-1] = 1e9
    assert params.logit_bias == {3: 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 5}, "stop must be a list, found int"),
        ({"stop": b"abc"}, "stop must be a list, found bytes"),
        ({"stop": ""}, "stop must be texts of 1 to"),
        ({"stop": [["a"]]}, "stop must be texts of 1 to"),
        ({"stop": ["a"] * 17}, "stop must have at most 16 entries, found 17"),
        ({"stop": "a\ud800"}, "stop is not Unicode text: half a character at 1"),
        ({"bad_words": ["\udfff"]}, "bad_words is not Unicode text"),
        ({"bad_words": {"a": 1}}, "bad_words must be a list, found dict"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a list, found str"),
        ({"stop_token_ids": 12}, "stop_token_ids must be a list, found int"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids must be token ids"),
        ({"logit_bias": [(1, 2)]}, "logit_bias must be a mapping .* found list"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias must be from -100 to 100"),
        ({"grammar": "a+"}, "grammar: expected a Grammar, found str"),
        ({"grammar": {"kind": "regex"}}, "grammar: expected a Grammar, found dict"),
        ({"ignore_eos": "false"}, "ignore_eos must be true or false, found 'false'"),
        ({"include_stop": 1}, "include_stop must be true or false"),
    ],
)
def test_what_is_meant_by_nobody_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        made(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [(5, "grammar: text must be a text, found int"), ("a\ud800", "grammar: text is not Unicode")],
)
def test_a_grammar_is_a_text(text: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Grammar("regex", text)


def test_log_probabilities_of_a_prompt_are_bounded() -> None:
    limits = Limits(1 << 21, 1 << 20, 64, 1000, has_grammars=False)
    for length, alternatives in ((MOST_PROMPT_LOGPROBS // 20, 19), (1_000_000, 3)):
        for more in (0, 1):
            request = Request("r", (1,) * (length + more), made(prompt_logprobs=alternatives))
            if more:
                with pytest.raises(EngineError, match=f"{alternatives + 1} .* {length + 1:,}"):
                    limits.validate(request)
            else:
                limits.validate(request)


def test_when_an_event_came_is_no_part_of_what_it_tells() -> None:
    assert Event("r", queued_s=1.0) == Event("r")
