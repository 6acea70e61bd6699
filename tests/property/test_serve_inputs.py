"""What strangers send: anything becomes a request within bounds or a refusal, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.request import (
    MOST_CHOICES,
    Alternative,
    Event,
    PromptLogprobs,
    Request,
    SamplingParams,
    Token,
)
from nybble.engine.text_stream import TextStream
from nybble.serve.answering import Prepared
from nybble.serve.chat import ChatWriter
from nybble.serve.completions import CompletionWriter, Echo
from nybble.serve.errors import Refusal
from nybble.serve.fields import read_json
from nybble.serve.generation import Bridge, Generation, Step
from nybble.serve.protocol import Asked, Bounds, read_chat, read_completion
from nybble.serve.service import Service
from nybble.serve.streaming import Writer, encode_inside, separated
from nybble.text.chat import ChatTemplate
from nybble.text.pieces import Pieces
from nybble.text.tokenizer import Tokenizer
from served import SCRIPT, served, tokenizer

BOUNDS = Bounds(vocab=4099, context=300, defaults={"temperature": 0.25, "top_k": 7})
NUMBERS = (
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "n",
        "min_tokens",
        "max_tokens",
        "logprobs",
    ),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "prompt_logprobs", "priority"),
    *("logprobs", "top_logprobs", "best_of", "max_completion_tokens"),
)
LISTS = ("stop", "stop_token_ids", "bad_words", "guided_choice", "prompt", "messages")
FLAGS = ("ignore_eos", "stream", "echo", "include_stop_str_in_output", "add_special_tokens")
OBJECTS = (
    *("logit_bias", "response_format", "stream_options", "structured_outputs", "metadata"),
    *("chat_template_kwargs", "guided_json"),
)
TEXTS = ("model", "guided_regex", "guided_grammar", "user", "suffix")
FIELDS = (*NUMBERS, *LISTS, *FLAGS, *OBJECTS, *TEXTS)

EDGES = st.sampled_from(
    [-1, 0, 1, 2, 20, 21, 128, 129, 1024, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, 1e308]
)
VALUES = st.recursive(
    st.none() | st.booleans() | EDGES | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6)


def _tried(read: Callable[..., Any], *given: object) -> tuple[Any, Refusal | None]:
    try:
        return read(*given), None
    except Refusal as refusal:
        return None, refusal


@given(BODIES, st.booleans())
def test_any_object_is_read_or_refused(body: Mapping[str, object], has_prompt: bool) -> None:
    own = {"prompt": "a", "messages": [{"role": "user", "content": "x"}]} if has_prompt else {}
    for read in (read_chat, read_completion):
        found, refusal = _tried(read, own | dict(body), BOUNDS)
        if refusal is None:
            # SamplingParams checks its bounds itself; what it does not know is checked here.
            assert 1 <= found.asked.params.n <= MOST_CHOICES
            assert abs(found.asked.priority) <= 1_000
            continue
        assert refusal.status == 400
        assert refusal.message
        assert json.dumps(refusal.body(), allow_nan=False)


@pytest.mark.parametrize("name", [*NUMBERS, *LISTS, "logit_bias"])
@pytest.mark.parametrize(
    "value",
    [
        2**64,
        -(2**63) - 1,
        10**400,
        1e308,
        float("inf"),
        float("nan"),
        [0] * 1_000_000,
        ["x"] * 1_000_000,
        {str(i): 1 for i in range(100_000)},
        "x" * (1 << 24 | 1),
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:8]}",
)
def test_no_field_is_without_bound(name: str, value: object) -> None:
    own: dict[str, object] = {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}
    for read, other in ((read_chat, "prompt"), (read_completion, "messages")):
        body = {key: given for key, given in own.items() if key != other} | {name: value}
        with pytest.raises(Refusal) as refused:
            read(body, BOUNDS)
        assert refused.value.status == 400
        assert len(refused.value.message) < 1_000


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 100),
            "top_p": st.floats(0.001, 1),
            "min_p": st.floats(0, 0.99),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "repetition_penalty": st.floats(0.01, 100),
            "top_k": st.integers(-1, 2**31 - 1),
            "seed": st.integers(-(2**63), 2**64 - 1),
            "n": st.integers(1, MOST_CHOICES),
            "max_tokens": st.integers(1, 10_000),
            "stop": st.lists(st.text(min_size=1, max_size=9), max_size=16),
            "stop_token_ids": st.lists(st.integers(0, 4098), max_size=9),
            "bad_words": st.lists(st.text(min_size=1, max_size=9), max_size=9),
            "ignore_eos": st.booleans(),
        },
    )
)
def test_what_is_within_bounds_arrives(body: dict[str, Any]) -> None:
    sent = read_json(json.dumps({**body, "prompt": [1, 2]}).encode())
    params = read_completion(sent, BOUNDS).asked.params
    for name, value in body.items():
        expected = tuple(value) if isinstance(value, list) else value
        expected = expected % 2**64 if name == "seed" else expected
        expected = max(expected, 0) if name == "top_k" else expected
        assert getattr(params, name) == expected
    if "temperature" not in body:
        assert params.temperature == 0.25
    if "top_k" not in body:
        assert params.top_k == 7


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    found, refusal = _tried(read_json, body)
    assert json.loads(body) == found if refusal is None else refusal.status == 400


@given(st.dictionaries(st.text(), VALUES, max_size=5).filter(lambda body: "inf" not in str(body)))
def test_json_comes_as_it_was_sent(body: dict[str, Any]) -> None:
    assert read_json(json.dumps(body).encode()) == body


# ------------------------------------------------------------------------------------------ writers


@cache
def _service() -> Service:
    """What writers need of one."""
    return cast(Service, SimpleNamespace(served=served(), pieces=Pieces(tokenizer())))


def _generation(params: SamplingParams) -> Generation:
    metrics = SimpleNamespace(token=lambda times, at: None)
    bridge = cast(Bridge, SimpleNamespace(metrics=metrics))

    async def receive() -> object:
        raise AssertionError

    return Generation(bridge, [Request("r", (5, 6, 7), params)], receive, 0.0)


def _events(texts: list[str], choice: int, has_prompt: bool) -> list[Event]:
    """Texts as tokens: their ids do not matter to the text."""
    top = (Alternative(9, -0.25), Alternative(3, float("-inf")))
    made = [
        Event("r", choice, Token(i % 4000, text, -0.5, "stop" if i == len(texts) - 1 else "", top))
        for i, text in enumerate(texts)
    ]
    scores = PromptLogprobs((None, -1.5, -2.5), ((), top, top))
    return [Event("r", prompt=scores), *made] if has_prompt else made


def _joined(writer: Writer, steps: list[Step]) -> bytes:
    return b"".join(piece for step in steps for piece in writer.chunk(step))


def _documents(out: bytes) -> list[dict[str, Any]]:
    events = out.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


# Lines, quotes, surrogate pairs and separators of lines that JSON does not escape by itself.
PIECES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    | st.sampled_from(["\n\n", '"', "\\", "data: [DONE]", "\u2028", "\r", "🙂", ""]),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)  # the first one loads what the server needs
@given(PIECES, PIECES, st.booleans(), st.booleans())
def test_a_streamed_chat_says_what_the_whole_one_says(
    first: list[str], second: list[str], has_logprobs: bool, has_usage: bool
) -> None:
    params = SamplingParams(n=2, logprobs=2 if has_logprobs else None)
    prepared = Prepared(Asked("tiny", params, True, has_usage, 0), "tiny", "id", ())
    writer, generation = ChatWriter(_service(), prepared), _generation(params)
    pairs = [_events(texts, choice, False) for choice, texts in enumerate((first, second))]
    steps = [generation._step(event, 0.0) for events in pairs for event in events]
    assert generation.is_done
    chunks = _documents(_joined(writer, steps) + writer.end(generation))
    whole = json.loads(b"".join(writer.whole(generation)))
    assert [c["message"]["content"] for c in whole["choices"]] == ["".join(first), "".join(second)]
    if has_usage:
        assert chunks.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == choice["message"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
        scores = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scores == (choice["logprobs"]["content"] if has_logprobs else [])


@given(PIECES, st.booleans(), st.booleans(), st.booleans())
def test_a_streamed_completion_says_what_the_whole_one_says(
    texts: list[str], has_logprobs: bool, has_echo: bool, is_scored_only: bool
) -> None:
    is_scored_only = is_scored_only and has_echo
    texts = texts[:1] if is_scored_only else texts
    params = SamplingParams(logprobs=1 if has_logprobs else None)
    generation = _generation(params)
    asked = Asked("tiny", params, True, False, 0)
    prepared = Prepared(asked, "tiny", "id", tuple(generation.requests))
    echo = Echo(("the prompt",) if has_echo else (), (1,), is_scored_only, False)
    writer = CompletionWriter(_service(), prepared, echo)
    steps = [generation._step(e, 0.0) for e in _events(texts, 0, has_echo and has_logprobs)]
    own = [d["choices"][0] for d in _documents(_joined(writer, steps))]
    whole = CompletionWriter(_service(), prepared, echo).whole(generation)
    choice = json.loads(b"".join(whole))["choices"][0]
    expected = ("the prompt" if has_echo else "") + ("" if is_scored_only else "".join(texts))
    assert "".join(c["text"] for c in own) == choice["text"] == expected
    assert own[-1]["finish_reason"] == choice["finish_reason"]
    streamed: dict[str, list[Any]] = {}
    for one in own:
        for name, values in (one["logprobs"] or {}).items():
            streamed.setdefault(name, []).extend(values)
    whole_scores = {name: values for name, values in (choice["logprobs"] or {}).items() if values}
    assert streamed == whole_scores


STOPS = st.lists(
    st.integers(0, len(SCRIPT) - 2).flatmap(
        lambda at: st.integers(at + 1, len(SCRIPT)).map(lambda end: SCRIPT[at:end])
    ),
    min_size=1,
    max_size=3,
)


@given(STOPS, st.booleans(), st.integers(1, 30), st.booleans())
def test_what_a_stop_cuts_off_has_no_logprobs(
    stops: list[str], include_stop: bool, most: int, is_chat: bool
) -> None:
    params = SamplingParams(logprobs=0, stop=tuple(stops), include_stop=include_stop)
    stream, events, length = TextStream(tokenizer(), params), [], 0
    ids = tokenizer().encode(SCRIPT)[:most]
    for i, id in enumerate(ids):
        text, is_stopped = stream.push(id)
        is_last = is_stopped or i == len(ids) - 1
        if is_last and not is_stopped:
            text += stream.finish()
        finish: Any = "stop" if is_stopped else "length" if is_last else ""
        events.append(Event("r", 0, Token(id, text, -0.5, finish)))
        length += len(text)
        if is_last:
            break
    streamed, whole = _tokens_told(params, events, is_chat)
    assert streamed == whole
    names = [event.token.id for event in events if event.token]
    told, shown = len(whole), tokenizer().decode(names)[:length]
    if events[-1].token and events[-1].token.finish == "length" or include_stop:
        assert told == len(names)
    else:
        assert tokenizer().decode(names[:told]).startswith(shown)
        assert tokenizer().decode(names[: told - 1]) != shown or not told, "one is too many"


def _tokens_told(
    params: SamplingParams, events: list[Event], is_chat: bool
) -> tuple[list[str], list[str]]:
    """The tokens that have log-probabilities, streamed and whole."""
    generation = _generation(params)
    prepared = Prepared(
        Asked("tiny", params, True, False, 0), "tiny", "id", tuple(generation.requests)
    )

    def writer() -> Writer:
        if is_chat:
            return ChatWriter(_service(), prepared)
        return CompletionWriter(_service(), prepared, Echo((), (0,), False, False))

    def tokens(scores: Any) -> list[str]:
        if scores is None:
            return []
        return [e["token"] for e in scores["content"]] if is_chat else list(scores["tokens"])

    steps = [generation._step(event, 0.0) for event in events]
    chunks = _documents(_joined(writer(), steps))
    whole = json.loads(b"".join(writer().whole(generation)))["choices"][0]
    return [t for c in chunks for t in tokens(c["choices"][0]["logprobs"])], tokens(
        whole["logprobs"]
    )


@given(st.lists(VALUES, max_size=300), st.lists(VALUES, max_size=3))
def test_lists_are_the_same_in_pieces(first: list[Any], second: list[Any]) -> None:
    values = [[v for v in one if "inf" not in str(v)] for one in (first, second)]
    inside = (b'["' + name + b'",' for name in (b"a", b"b"))
    lists = [
        [start, b"[", *encode_inside(v), b"]]"] for start, v in zip(inside, values, strict=True)
    ]
    expected = [["a", values[0]], ["b", values[1]]]
    assert json.loads(b"[" + b"".join(separated(lists)) + b"]") == expected
    # What is encoded at a time keeps all other threads waiting.
    assert len(list(encode_inside(values[0]))) == -(-len(values[0]) // 64)


# ----------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{% macro f(a, b) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(d, 1) }}", "c d"),
        (
            "{% for m in xs %}{% if m %}{% set r = 1 %}{% endif %}{{ r }}{{ on }}{% endfor %}",
            "on xs",
        ),
        ("{% if day is not defined %}{% set day = 'Monday' %}{% endif %}{{ day }}", "day"),
        ("{% set ns = namespace(x=0) %}{% set ns.x = y %}{{ ns.x }}", "y"),
        ("{% for a, b in p.items() %}{{ loop.index }}{{ a }}{% endfor %}{{ b }}", "b p"),
        ("{% for x in x %}{{ x }}{% endfor %}", "x"),
    ],
)
def test_switches_are_what_a_template_does_not_set_itself(source: str, names: str) -> None:
    template = ChatTemplate.compile("a test", source, Path("tokenizer_config.json"), {})
    assert sorted(template.variables() - {"namespace"}) == names.split()


# ------------------------------------------------------------------------------------------- pieces


@cache
def _tokenizers() -> list[Tokenizer]:
    from served import FOLDER

    return [tokenizer(), Tokenizer.open(FOLDER.parent / "stories-hybrid-moe")]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(text: str) -> None:
    for own in _tokenizers():
        pieces = Pieces(own)
        ids = own.encode(text)
        whole = b"".join(map(pieces.of, ids))
        assert whole.decode() == own.decode(ids, skip_special=False)


def test_a_part_of_a_character_is_its_bytes() -> None:
    pieces = Pieces(tokenizer())
    found = [pieces.of(i) for i in tokenizer().encode(SCRIPT)]
    assert b"".join(found) == SCRIPT.encode()
    assert any(b"\xe6" in piece and b"\xbc\xa2" not in piece for piece in found)
    assert pieces.of(10**6) == b""
