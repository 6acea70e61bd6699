"""The server as clients meet it: the official client, raw sockets, signals."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nybble.errors import ServeError
from nybble.serve import server
from nybble.serve.access import Keys
from nybble.serve.app import routes
from nybble.serve.connections import Connection, most_connections, raise_open_files
from nybble.serve.errors import Refusal
from nybble.serve.service import Limits, Service
from scripted_engine import ScriptedLoop
from served import CONTEXT, FOLDER, SCRIPT, SEQUENCES, Running, running, served, tokenizer

TESTS = Path(__file__).parent.parent
KEY = "test-key-0123456789abcdef"
CHAT = [{"role": "user", "content": "Say something."}]
#: Longer than any wait here; what takes it has failed.
WAIT_S = 20.0


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    with running(ScriptedLoop(tokenizer(), SCRIPT)) as found:
        yield found


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    with running(ScriptedLoop(tokenizer(), SCRIPT, step_s=0.02)) as found:
        yield found


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# ours\n\n{KEY}\nanother-key-0123456789\n")
    with running(ScriptedLoop(tokenizer(), SCRIPT), keys=Keys(path)) as found:
        yield found


def client(up: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{up.url}/v1", api_key=key, max_retries=0)


def post(up: Running, path: str, body: object, **headers: str) -> httpx.Response:
    return httpx.post(f"{up.url}{path}", json=body, headers=headers, timeout=WAIT_S)


def until(what: Any) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def said(tokens: int) -> str:
    """What the script says in so many tokens."""
    ids = tokenizer().encode(SCRIPT)
    return "".join(tokenizer().decode([ids[i % len(ids)]]) for i in range(tokens))


# ---------------------------------------------------------------------------------- official client


def test_a_chat_is_answered(up: Running) -> None:
    found = client(up).chat.completions.create(model="tiny", messages=CHAT, max_tokens=5)
    assert found.choices[0].message.content == said(5)
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.system_fingerprint == "fp_test"
    assert found.usage is not None
    prompt = len(up.loop.seen[-1].prompt)
    assert found.usage.prompt_tokens == prompt > 5
    assert found.usage.completion_tokens == 5
    assert found.usage.total_tokens == prompt + 5


def test_the_template_makes_the_prompt(up: Running) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    client(up).chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert tokenizer().decode(up.loop.seen[-1].prompt, skip_special=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay something.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_stream_is_the_same_text(up: Running) -> None:
    stream = client(up).chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    *parts, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 7
    assert all(chunk.usage is None for chunk in parts)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == said(7)
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * (len(parts) - 1) + [
        "length"
    ]


def test_choices_of_a_stream_come_side_by_side(up: Running) -> None:
    stream = client(up).chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=4, n=3, stream=True
    )
    texts, finishes, order = ["", "", ""], ["", "", ""], []
    for chunk in stream:
        choice = chunk.choices[0]
        order.append(choice.index)
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason or ""
    assert texts == [said(4)] * 3
    assert finishes == ["length"] * 3
    assert order != sorted(order)


def test_logprobs_of_a_chat_have_the_bytes_of_its_text(up: Running) -> None:
    ids = tokenizer().encode(SCRIPT)
    for stream in (False, True):
        asked: dict[str, Any] = {
            "model": "tiny",
            "messages": CHAT,
            "max_tokens": len(ids),
            "logprobs": True,
            "top_logprobs": 2,
            "stream": stream,
        }
        found = client(up).chat.completions.create(**asked)
        choices = [c.choices[0] for c in found] if stream else [found.choices[0]]
        entries = [e for c in choices if c.logprobs for e in c.logprobs.content or ()]
        assert bytes(byte for e in entries for byte in e.bytes or ()) == SCRIPT.encode()
        assert len(entries) == len(ids)
        assert {len(e.top_logprobs) for e in entries} == {2}
        assert all(e.logprob == -0.5 == e.top_logprobs[0].logprob for e in entries)
        assert any("\ufffd" in e.token for e in entries)


def test_completions_of_many_prompts_keep_their_order(up: Running) -> None:
    found = client(up).completions.create(
        model="tiny-2", prompt=["one", "two and more"], max_tokens=3, n=2
    )
    assert found.model == "tiny-2"
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert [c.text for c in found.choices] == [said(3)] * 4
    one, two = up.loop.seen[-2:]
    assert tokenizer().decode(one.prompt) == "one"
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(one.prompt) + len(two.prompt)
    assert found.usage.completion_tokens == 12


def test_prompts_may_be_token_ids(up: Running) -> None:
    ids = tokenizer().encode("the cat sat")
    client(up).completions.create(model="tiny", prompt=ids, max_tokens=1)
    assert up.loop.seen[-1].prompt == tuple(ids)
    found = client(up).completions.create(
        model="tiny", prompt=[ids, ids[:2]], max_tokens=1, echo=True
    )
    assert [r.prompt for r in up.loop.seen[-2:]] == [tuple(ids), tuple(ids[:2])]
    assert found.choices[0].text == "the cat sat" + said(1)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_harness_scores_a_continuation(up: Running, max_tokens: int) -> None:
    """As lm-eval's local-completions reads the answer."""
    context, continuation = tokenizer().encode("The sea is"), tokenizer().encode(" deep and blue")
    found = client(up).completions.create(
        model="tiny",
        prompt=[context + continuation],
        max_tokens=max_tokens,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1234,
    )
    scores = found.choices[0].logprobs
    assert scores is not None
    length = len(context) + len(continuation)
    assert scores.token_logprobs is not None
    # The script's prompts score -1, -2, -3, ... from the second token.
    expected = [-float(i) for i in range(len(context), length)]
    assert scores.token_logprobs[len(context) : length] == expected
    assert scores.token_logprobs[0] is None
    assert len(scores.tokens or ()) == length + max_tokens
    assert scores.top_logprobs is not None
    for token, top in zip((scores.tokens or ())[1:], scores.top_logprobs[1:], strict=True):
        assert token in top
    text = "The sea is deep and blue"
    assert found.choices[0].text == text + said(max_tokens)
    offsets = zip((scores.tokens or ())[:length], (scores.text_offset or ())[:length], strict=True)
    assert all(text[at:].startswith(token) for token, at in offsets)
    assert found.usage is not None
    assert found.usage.completion_tokens == max_tokens


def test_a_streamed_completion_is_the_whole_one(up: Running) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["one", "two 漢"],
        "max_tokens": 25,
        "echo": True,
        "logprobs": 2,
    }
    whole = client(up).completions.create(**asked)
    texts, scores = ["", ""], [dict[str, list[Any]](), dict[str, list[Any]]()]
    for chunk in client(up).completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
            scores[choice.index].setdefault(name, []).extend(values)
    assert texts == [c.text for c in whole.choices]
    assert scores == [c.logprobs.model_dump() for c in whole.choices if c.logprobs]
    names = scores[1]["tokens"]
    assert any(name.startswith("bytes:\\x") for name in names), "a part of a character has a name"


def test_prompt_logprobs_come_by_token(up: Running) -> None:
    ids = tokenizer().encode("the cat sat")
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 1}
    scores = post(up, "/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
    assert scores[0] is None
    assert [next(iter(entry)) for entry in scores[1:]] == [str(i) for i in ids[1:]]
    chat = {"messages": CHAT, "max_tokens": 1, "prompt_logprobs": 0}
    found = post(up, "/v1/chat/completions", chat).json()
    assert len(found["prompt_logprobs"]) == found["usage"]["prompt_tokens"]


def test_options_reach_the_engine(up: Running) -> None:
    body = {
        "messages": CHAT,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.25,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "logit_bias": {"17": -100, "3": 2.5},
        "seed": -1,
        "stop": "END",
        "n": 2,
        "top_k": -1,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "bad_words": ["damn"],
        "priority": -7,
        "user": "somebody",
        "service_tier": "auto",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}},
        },
    }
    assert post(up, "/v1/chat/completions", body).status_code == 200
    request, params = up.loop.seen[-1], up.loop.seen[-1].params
    assert (request.priority, params.max_tokens, params.temperature) == (-7, 9, 0.5)
    assert (params.top_p, params.top_k, params.min_p) == (0.25, 0, 0.125)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1.5)
    assert (params.repetition_penalty, params.n, params.min_tokens) == (1.5, 2, 3)
    assert params.logit_bias == {17: -100, 3: 2.5}
    assert (params.seed, params.stop, params.stop_token_ids) == (2**64 - 1, ("END",), (5,))
    assert (params.ignore_eos, params.include_stop, params.bad_words) == (True, True, ("damn",))
    assert params.grammar is not None
    assert (params.grammar.kind, json.loads(params.grammar.text)) == (
        "json_schema",
        {"type": "object"},
    )


def test_silence_means_the_publishers_defaults(up: Running) -> None:
    assert post(up, "/v1/chat/completions", {"messages": CHAT}).status_code == 200
    params = up.loop.seen[-1].params
    # Of the model's generation_config.json.
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.8, 20)
    assert params.seed is None
    assert params.max_tokens == CONTEXT
    post(up, "/v1/completions", {"prompt": "a"})
    assert up.loop.seen[-1].params.max_tokens == 16


@pytest.mark.parametrize(
    ("extra", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"guided_regex": "a+b"}, "regex", "a+b"),
        ({"guided_json": '{"type":"string"}'}, "json_schema", '{"type":"string"}'),
        ({"guided_grammar": 'start: "x"'}, "lark", 'start: "x"'),
        ({"guided_choice": ['a"b', "c"]}, "lark", 'start: "a\\"b" | "c"'),
        ({"structured_outputs": {"regex": "[0-9]"}}, "regex", "[0-9]"),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
def test_structure_can_be_asked_for_in_every_known_way(
    up: Running, extra: dict[str, object], kind: str | None, text: str | None
) -> None:
    body = {"messages": CHAT, "max_tokens": 1, **extra}
    assert post(up, "/v1/chat/completions", body).status_code == 200
    grammar = up.loop.seen[-1].params.grammar
    assert (grammar and grammar.kind, grammar and grammar.text) == (kind, text)


def test_models_are_listed(up: Running) -> None:
    assert [m.id for m in client(up).models.list()] == ["tiny", "tiny-2"]
    assert client(up).models.retrieve("tiny-2").id == "tiny-2"
    with pytest.raises(openai.NotFoundError, match="there is tiny, tiny-2"):
        client(up).models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError) as found:
        client(up).chat.completions.create(model="gpt-4o", messages=CHAT)
    assert found.value.code == "model_not_found"


# ----------------------------------------------------------------------------------------- refusals


def _chat(**extra: object) -> dict[str, object]:
    return {"messages": CHAT, "max_tokens": 1, **extra}


REFUSED = [
    (_chat(tools=[{"type": "function"}]), "tools", "not supported yet"),
    (_chat(audio={"voice": "x"}), "audio", "not supported yet"),
    (_chat(reasoning_effort="low"), "reasoning_effort", "chat_template_kwargs"),
    (_chat(modalities=["audio"]), "modalities", "not supported yet"),
    (_chat(temprature=1), "temprature", "unknown field"),
    (_chat(temperature=-0.1), "temperature", "0 to 100"),
    (_chat(temperature="hot"), "temperature", "a number, found a string"),
    (_chat(temperature=True), "temperature", "found a boolean"),
    (_chat(top_p=0), "top_p", "above 0"),
    (_chat(top_p=10**400), "top_p", "401 digits"),
    (_chat(n=129), "n", "1 to 128"),
    (_chat(n=0), "n", "1 to 128"),
    (_chat(n=1.5), "n", "whole number"),
    (_chat(seed=2**64), "seed", "18,446,744,073,709,551,615"),
    (_chat(max_tokens=2**63), "max_tokens", "1 to"),
    (_chat(max_completion_tokens=2), "max_tokens", "differ"),
    (_chat(min_tokens=2), "min_tokens", "at most max_tokens"),
    (_chat(top_logprobs=21, logprobs=True), "top_logprobs", "0 to 20"),
    (_chat(top_logprobs=1), "top_logprobs", "needs logprobs"),
    (_chat(stop=["a"] * 17), "stop", "at most 16"),
    (_chat(stop=[""]), "stop[0]", "1 to 1,000"),
    (_chat(stop=7), "stop", "a list, found a number"),
    (_chat(logit_bias={"-1": 1}), "logit_bias", "no token id"),
    (_chat(logit_bias={"99999999999": 1}), "logit_bias", "no token id"),
    (_chat(logit_bias={"1": 101}), "logit_bias", "-100 to 100"),
    (_chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "1,024"),
    (_chat(stop_token_ids=[10**6]), "stop_token_ids", "token ids"),
    (_chat(stop_token_ids=[1.0]), "stop_token_ids", "token id"),
    (_chat(bad_words=["x"] * 257), "bad_words", "256"),
    (_chat(priority=10**9), "priority", "1,000"),
    (_chat(cache_salt=7), "cache_salt", "a string, found a number"),
    (_chat(cache_salt=""), "cache_salt", "not be empty"),
    (_chat(cache_salt="x" * 1001), "cache_salt", "1,000 characters"),
    (_chat(stream_options={"include_usage": True}), "stream_options", "needs stream"),
    (_chat(stream=True, stream_options={"x": 1}), "stream_options.x", "unknown field"),
    (_chat(stream=True, prompt_logprobs=1), "prompt_logprobs", "cannot be streamed"),
    (_chat(response_format={"type": "xml"}), "response_format.type", "json_schema"),
    (_chat(response_format={"type": "json_schema"}), "response_format.json_schema", "missing"),
    (_chat(response_format={"type": "json_object"}, guided_regex="a"), "response_format", "one of"),
    (_chat(guided_choice=[]), "guided_choice", "at least one"),
    (_chat(structured_outputs={}), "structured_outputs", "needs one of"),
    (_chat(chat_template_kwargs={"nope": 1}), "chat_template_kwargs", "it has"),
    (_chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "it has"),
    (_chat(chat_template_kwargs={"time_limit_s": 1e9}), "chat_template_kwargs", "it has"),
    (_chat(chat_template_kwargs={"eos_token": "x"}), "chat_template_kwargs", "it has"),
    (_chat(chat_template="{{ x }}"), "chat_template", "unknown field"),
    (_chat(messages=[]), "messages", "at least one"),
    (_chat(messages="hi"), "messages", "a list"),
    (_chat(messages=[7]), "messages[0]", "an object"),
    (_chat(messages=[{"content": "x"}]), "messages[0].role", "whose message"),
    (_chat(messages=[{"role": "user"}]), "messages[0].content", "missing"),
    (_chat(messages=[{"role": "user", "content": None}]), "messages[0].content", "missing"),
    (
        _chat(messages=[{"role": "developer", "content": "x"}, *CHAT]),
        "messages[0].role",
        "knows no role developer; send it as system",
    ),
    (
        _chat(chat_template_kwargs={"enable_thinking": "\ud800"}),
        "chat_template_kwargs",
        "surrogate",
    ),
    (_chat(messages=[{"role": "user", "content": 7}]), "messages[0].content", "a string"),
    (_chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].role", "not supported"),
    (_chat(messages=[{"role": "user", "content": "x", "y": 1}]), "messages[0].y", "unknown"),
    (
        _chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content[0].type",
        "takes text",
    ),
    (_chat(messages=[{"role": "wizard", "content": "x"}]), "messages", "Unknown role: wizard"),
    (_chat(messages=[*CHAT, {"role": "system", "content": "x"}]), "messages", "must come first"),
    (_chat(messages=[{"role": "user", "content": "\ud800"}]), "messages[0].content", "surrogate"),
    (_chat(stop="a\ud800"), "stop", "Unicode"),
    (_chat(stop=["a", "\udfff"]), "stop[1]", "surrogate"),
    (_chat(bad_words=["\ud800"]), "bad_words[0]", "surrogate"),
    (_chat(guided_regex="\ud800"), "guided_regex", "surrogate"),
    (_chat(guided_choice=["\ud800"]), "guided_choice[0]", "surrogate"),
    (_chat(guided_grammar="\ud800"), "guided_grammar", "surrogate"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    (_chat(messages=[{"role": "user", "content": "cat " * 600}]), "messages", "room for 512"),
    (_chat(messages=[{"role": "user", "content": "cat " * 9000}]), "messages", "characters"),
    ({"prompt": "", "max_tokens": 1}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "none found"),
    ({"prompt": 7}, "prompt", "a list"),
    ({"prompt": ["a", 7]}, "prompt[1]", "a string or a list"),
    ({"prompt": ["a", []]}, "prompt[1]", "a string or a list"),
    ({"prompt": [1, "a"]}, "prompt", "token id"),
    ({"prompt": [1, True]}, "prompt", "token id"),
    ({"prompt": [-1]}, "prompt", "token ids of 0 to"),
    ({"prompt": [1] * CONTEXT}, "prompt", "512 tokens"),
    ({"prompt": [1] * 100_000}, "prompt", "at most 512"),
    ({"prompt": ["a"] * 257}, "prompt", "256"),
    ({"prompt": ["a"] * 9, "n": 128}, "n", "1,024"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "not supported yet"),
    ({"prompt": "a", "best_of": 2}, "best_of", "not supported yet"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "0 to 20"),
    (
        {
            "prompt": [5] * 500,
            "echo": True,
            "logprobs": 20,
            "prompt_logprobs": 20,
            "n": 100,
            "max_tokens": 0,
        },
        "prompt",
        "2,100,000 log-probabilities of prompts (500 tokens, shown 200 times, 21 for each)",
    ),
    ({"prompt": ["a " * 400] * 8, "echo": True, "logprobs": 5, "n": 128}, "prompt", "1,048,576"),
    ({"prompt": "a" + " " * 20_000, "echo": True, "n": 128}, "prompt", "512"),
    (
        {"prompt": ["a"] * 8, "n": 128, "logprobs": 20, "max_tokens": 500},
        "max_tokens",
        "10,752,000 log-probabilities (4,000 tokens of 8 prompts, 128 choices, 21 for each)",
    ),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_done_is_refused_by_name(
    up: Running, body: dict[str, object], param: str | None, words: str
) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    found = httpx.post(
        up.url + path,
        content=json.dumps(body),
        headers={"content-type": "application/json"},
        timeout=WAIT_S,
    )
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert str(FOLDER) not in error["message"]


def test_an_assistant_may_have_said_nothing(up: Running) -> None:
    messages = [*CHAT, {"role": "assistant", "content": None}, *CHAT]
    assert post(up, "/v1/chat/completions", _chat(messages=messages)).status_code == 200


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({}, None),
    ],
)
def test_an_error_of_a_grammar_names_its_field(
    up: Running,
    options: dict[str, object],
    param: str | None,
) -> None:
    up.loop.broken, up.loop.failure = tokenizer().encode(" broken")[-1], "grammar: it is none"
    try:
        body = {"prompt": "this is broken", "max_tokens": 9, **options}
        found = post(up, "/v1/completions", body)
    finally:
        up.loop.broken, up.loop.failure = None, "the logits are NaN"
    assert found.status_code == 400
    error = found.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_grammar")


def test_every_refusal_is_told_to_the_official_client(up: Running) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client(up).chat.completions.create(
            model="tiny", messages=CHAT, stream=True, extra_body={"min_p": 2}
        )
    assert found.value.param == "min_p"
    assert found.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object, found a list"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "a", "n": NaN}', "it has NaN"),
        (b'{"prompt": "a", "min_p": -Infinity}', "it has -Infinity"),
        (b'{"prompt": "a", "min_p": 1e999}', "min_p must be 0 to 1, found inf"),
        (b'{"prompt": "a", "prompt": "b"}', "comes twice"),
        (b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_other_bytes_than_json_are_refused(up: Running, body: bytes, words: str) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    found = httpx.post(f"{up.url}/v1/completions", content=body, headers=headers)
    assert found.status_code == 400
    assert words in found.json()["error"]["message"]


def test_a_body_must_say_that_it_is_json(up: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        found = httpx.post(
            f"{up.url}/v1/completions", content=b'{"prompt":"a"}', headers={"content-type": kind}
        )
        assert found.status_code == 415
        assert kind in found.json()["error"]["message"]


def test_a_long_body_is_refused_before_it_is_read() -> None:
    limits = Limits(body_bytes=1000)
    with running(ScriptedLoop(tokenizer(), SCRIPT), limits=limits) as up:
        assert post(up, "/v1/completions", {"prompt": "a"}).status_code == 200
        assert post(up, "/v1/completions", {"prompt": "a" * 2000}).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(10_000):
                yield b" " * 100

        kind = {"content-type": "application/json"}
        try:
            found = httpx.post(f"{up.url}/v1/completions", content=pieces(), headers=kind)
            assert found.status_code == 413
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            pass  # the server closed while this end still wrote
        for length in (b"999999999999999999999", b"+5", b"-1"):
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + length
            answer = up.ask(head + b"\r\nContent-Type: application/json\r\n\r\n")
            assert answer.split(b" ")[1] in (b"400", b"413")
        assert post(up, "/v1/completions", {"prompt": "a"}).status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    limits = Limits(body_s=0.2)
    with running(ScriptedLoop(tokenizer(), SCRIPT), limits=limits) as up:
        answer = up.ask(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        assert answer.startswith(b"HTTP/1.1 408")
        assert up.service.active == 0


def test_long_headers_are_refused(up: Running) -> None:
    for size in (100_000, 10**6):
        try:
            answer = up.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * size)
        except ConnectionError:
            continue  # the server closed while this end still wrote
        assert answer.startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{up.url}/health").status_code == 200


def test_a_chat_needs_a_template() -> None:
    with running(ScriptedLoop(tokenizer(), SCRIPT), has_template=False) as up:
        found = post(up, "/v1/chat/completions", {"messages": CHAT})
        assert found.status_code == 400
        assert "/v1/completions" in found.json()["error"]["message"]


def test_unknown_paths_and_methods_have_the_shape(up: Running) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ):
        found = httpx.request(method, up.url + path)
        assert found.status_code == status
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        if path in ("/", "/v1/embeddings"):
            assert "POST /v1/chat/completions" in found.json()["error"]["message"]


# --------------------------------------------------------------------------------------- access log


def _lines(caplog: pytest.LogCaptureFixture, count: int) -> list[tuple[int, str]]:
    """The access log's lines, which are written after the answer has been read."""

    def found() -> list[tuple[int, str]]:
        return [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "nybble.access"]

    until(lambda: len(found()) >= count)
    return found()


def test_a_line_says_how_each_request_ended(up: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nybble.access")
    prompt = tokenizer().encode("the secret cat")
    client(up, "the-key").completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2)
    ((level, line),) = _lines(caplog, 1)
    assert level == logging.INFO
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 127\.0\.0\.1:\d+ POST /v1/completions 200 "
        rf"prompt={len(prompt)} cached=0 completion=10 seconds=\d+\.\d{{3}} finish=length",
        line,
    )


MISSED = "parts at token 1,842, inside turn 3; nearest snapshot 1,792"


def test_a_line_says_why_the_cache_had_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nybble.access")
    with running(ScriptedLoop(tokenizer(), SCRIPT)) as own:
        own.loop.cached, own.loop.missed = 3, MISSED
        body = {"prompt": ["the secret cat sat here"] * 6, "max_tokens": 2}
        assert post(own, "/v1/completions", body).status_code == 200
    ((_, line),) = _lines(caplog, 1)
    assert " cached=18 " in line
    # Of many prompts some speak for all.
    assert line.endswith(" finish=length" + f' missed="{MISSED}"' * 4)
    assert "secret" not in line


def test_failures_are_said_unasked_and_nothing_else(
    up: Running, caplog: pytest.LogCaptureFixture
) -> None:
    httpx.get(f"{up.url}/v1/models")
    post(up, "/v1/completions?key=hidden", {"prompt": "secret", "n": 0}, authorization="hidden")
    httpx.get(f"{up.url}/a%0Ab%20c%E2%80%A8d")
    (bad, missing) = _lines(caplog, 2)
    assert bad[0] == missing[0] == logging.WARNING
    assert " POST /v1/completions 400 prompt=- cached=- completion=- " in bad[1]
    assert bad[1].endswith(" finish=-")
    assert " GET /a%0Ab%20c%E2%80%A8d 404 " in missing[1]
    assert not any(word in bad[1] for word in ("secret", "hidden"))


def test_a_stream_that_fails_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    with running(ScriptedLoop(tokenizer(), SCRIPT, step_s=0.2)) as own:
        own.loop.broken = tokenizer().encode(" broken")[-1]
        body = {"prompt": "this is broken", "max_tokens": 9, "stream": True}
        assert post(own, "/v1/completions", body).status_code == 200
    ((level, line),) = _lines(caplog, 1)
    assert level == logging.WARNING
    assert " 200 " in line
    assert line.endswith("finish=abort")


def test_probes_fail_quietly(caplog: pytest.LogCaptureFixture) -> None:
    with running(ScriptedLoop(tokenizer(), SCRIPT), is_warm=False) as own:
        assert httpx.get(f"{own.url}/ready").status_code == 503
        httpx.get(f"{own.url}/nowhere")
        ((_, line),) = _lines(caplog, 1)
    assert " GET /nowhere 404 " in line


# ------------------------------------------------------------------------------------------- access


def test_every_route_needs_a_key_but_the_probes(locked: Running) -> None:
    paths = [route.path.replace("{id:path}", "tiny") for route in routes(locked.service)]
    assert len(paths) >= 7
    for path in [*paths, "/", "/docs", "/openapi.json", "/v1/embeddings"]:
        for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "PATCH"):
            found = httpx.request(method, locked.url + path)
            is_open = path in ("/health", "/ready")
            assert (found.status_code == 401) != is_open, (method, path, found.status_code)
    assert httpx.get(f"{locked.url}/health").status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/v1/%2e%2e/v1/models",
        "/health/../v1/models",
        "/health/..;/v1/models",
        "/health%2f..%2fv1%2fmodels",
        "/v1/models?path=/health",
        "/v1/models#/health",
        "/v1/models;/health",
        "http://localhost/v1/models",
        "http://localhost/health",
        "/HEALTH",
        "/health/",
        "*",
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("host", ["localhost", "localhost/health", "health", "x@/health?"])
def test_no_spelling_goes_past_the_door(
    locked: Running, target: str, version: str, host: str
) -> None:
    answer = locked.ask(
        f"GET {target} HTTP/{version}\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.split(b" ")[1] in (b"401", b"400"), answer
    assert b'"data"' not in answer


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer")],
        [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", f"Bearer {KEY[:-1]}")],
        [("Authorization", f"Bearer {KEY}x")],
        [("Authorization", f"Bearer {KEY.upper()}")],
        [("Authorization", "Bearer # ours")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")],
        [("X-Api-Key", KEY)],
    ],
)
def test_only_a_whole_key_opens(locked: Running, headers: list[tuple[str, str]]) -> None:
    found = httpx.get(f"{locked.url}/v1/models", headers=headers)
    assert found.status_code == 401
    assert found.headers["www-authenticate"] == "Bearer"
    assert found.json()["error"]["code"] == "invalid_api_key"


def test_each_key_opens(locked: Running) -> None:
    for key in (KEY, "another-key-0123456789"):
        assert client(locked, key).models.list().data[0].id == "tiny"
    with pytest.raises(openai.AuthenticationError):
        client(locked, "wrong-key-0123456789").models.list()


def _salt(up: Running, key: str, path: str = "completions", **more: str) -> bytes:
    """The salt of the engine's request when a key asks something."""
    body = {"messages": CHAT} if path == "chat/completions" else {"prompt": "a"}
    up.loop.seen.clear()
    bearer = {"authorization": f"Bearer {key}"} if key else {}
    body |= {"max_tokens": 1, **more}
    assert post(up, f"/v1/{path}", body, **bearer).status_code == 200
    (request,) = up.loop.seen
    return request.salt


def test_no_key_shares_what_another_ones_prompts_left(up: Running, locked: Running) -> None:
    other = "another-key-0123456789"
    assert _salt(up, "") == b""  # without keys all are one
    salts = {
        (key, word): _salt(locked, key, **({"cache_salt": word} if word else {}))
        for key in (KEY, other)
        for word in ("", "team a", "team b", "a")
    }
    assert len(set(salts.values())) == len(salts) == 8
    assert b"" not in salts.values()
    assert _salt(locked, KEY, "chat/completions") == salts[KEY, ""]
    assert _salt(locked, KEY, "chat/completions", cache_salt="a") == salts[KEY, "a"]
    assert not any(KEY.encode() in salt or other.encode() in salt for salt in salts.values())
    # Who knows a key of another server, or guesses one, does not come to a salt of no key.
    assert _salt(up, "", cache_salt="a") not in {b"", *salts.values()}


def test_keys_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    keys = Keys(path)
    path.write_text("other-key-0123456789")
    keys.reload()
    assert keys.find(b"other-key-0123456789")
    assert not keys.find(KEY.encode())
    path.write_text("short")
    with pytest.raises(ServeError, match="key 1 must be 16 or more"):
        keys.reload()
    assert keys.find(b"other-key-0123456789")


@pytest.mark.parametrize("text", ["", "# only\n", "tooshort", "ключ-ключ-ключ-ключ"])
def test_a_file_without_a_good_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ServeError, match="openssl rand"):
        Keys(tmp_path / "keys")
    with pytest.raises(ServeError, match="No such file"):
        Keys(tmp_path / "none")


def test_without_keys_other_hosts_are_refused(up: Running) -> None:
    for host in ("localhost", "127.0.0.1:80", "[::1]:9", "LOCALHOST", "a.localhost"):
        answer = up.ask(
            f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer.startswith(b"HTTP/1.1 200"), host
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        answer = up.ask(
            f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer.startswith(b"HTTP/1.1 403"), host


def test_nothing_listens_beyond_this_machine_without_keys() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ServeError, match="--api-key-file"):
            server.bind(host, 0, has_keys=False)
    with server.bind("0.0.0.0", 0, has_keys=True) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"
    with server.bind("localhost", 0, has_keys=False) as sock:
        port = sock.getsockname()[1]
        assert server.url(sock).endswith(f":{port}")


def test_a_port_in_use_is_named() -> None:
    with server.bind("127.0.0.1", 0, has_keys=False) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ServeError, match=f"--port {port}: Address already in use"):
            server.bind("127.0.0.1", port, has_keys=False)


# ------------------------------------------------------------------------- engines and their faults


def test_a_full_queue_says_when_to_come_again() -> None:
    loop = ScriptedLoop(tokenizer(), SCRIPT, step_s=0.02, most=1)
    with running(loop) as up:
        first = client(up).completions.create(model="tiny", prompt="a", max_tokens=400, stream=True)
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as found:
            client(up).completions.create(model="tiny", prompt="b", max_tokens=1)
        assert found.value.response.headers["retry-after"] == "7"
        assert found.value.code == "queue_full"
        first.close()
        until(lambda: loop.stats.running == 0)
        client(up).completions.create(model="tiny", prompt="b", max_tokens=1)


def test_all_prompts_of_a_request_are_taken_or_none() -> None:
    loop = ScriptedLoop(tokenizer(), SCRIPT, step_s=0.02, most=2)
    with running(loop) as up:
        with _asked(up, {"prompt": "a", "max_tokens": 400}):
            until(lambda: loop.stats.running == 1)
            found = post(up, "/v1/completions", {"prompt": ["b", "c"], "max_tokens": 1})
            assert found.status_code == 429
            assert "retry-after" in found.headers
            assert len(loop.seen) == 1
        until(lambda: loop.stats.running == 0)
        assert len(loop.cancelled) == 1
        assert post(up, "/v1/completions", {"prompt": ["b", "c"], "max_tokens": 1}).is_success


def test_who_asks_for_more_than_ever_runs_is_not_told_to_wait() -> None:
    with running(ScriptedLoop(tokenizer(), SCRIPT, most=2)) as up:
        found = post(up, "/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 1})
        assert found.status_code == 400
        assert "retry-after" not in found.headers
        assert "3 are asked for, and 2 are the most" in found.json()["error"]["message"]


def test_a_request_that_excludes_every_token_is_at_fault_itself(up: Running) -> None:
    ids = tokenizer().encode("the cat sat")
    up.loop.broken, failure = ids[-1], up.loop.failure
    up.loop.failure = "no token is left to follow 3 tokens"
    try:
        found = post(up, "/v1/completions", {"prompt": ids, "max_tokens": 9})
    finally:
        up.loop.broken, up.loop.failure = None, failure
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "no_token_left"


@pytest.mark.parametrize("stop", ["", [], None])
def test_an_empty_stop_is_none(up: Running, stop: object) -> None:
    body = {"prompt": "a", "max_tokens": 1, "stop": stop}
    assert post(up, "/v1/completions", body).status_code == 200
    assert up.loop.seen[-1].params.stop == ()


def test_every_choice_repeats_its_prompts_scores(up: Running) -> None:
    ids = [tokenizer().encode("the cat sat"), tokenizer().encode("漢字 and one")]
    body = {"prompt": ids, "max_tokens": 3, "echo": True, "logprobs": 1, "prompt_logprobs": 2}
    choices = post(up, "/v1/completions", {**body, "n": 3}).json()["choices"]
    single = post(up, "/v1/completions", body).json()["choices"]
    assert [c["index"] for c in choices] == list(range(6))
    for choice in choices:
        assert {**choice, "index": 0} == {**single[choice["index"] // 3], "index": 0}


# -------------------------------------------------------------------------------------- connections


def test_who_connects_and_asks_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.2)
    with running(ScriptedLoop(tokenizer(), SCRIPT, step_s=0.1)) as up:
        for begun in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-", b"GET"):
            with socket.create_connection(("127.0.0.1", up.port), timeout=WAIT_S) as sock:
                sock.sendall(begun)
                with contextlib.suppress(ConnectionError):
                    assert sock.recv(100) == b""
        # An answer may take as long as it takes.
        assert post(up, "/v1/completions", {"prompt": "a", "max_tokens": 8}).status_code == 200


def test_a_connection_that_was_answered_does_not_wait_for_the_rest_of_its_body(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.2)
    (tmp_path / "keys").write_text(KEY)
    loop = ScriptedLoop(tokenizer(), SCRIPT)
    with running(loop, keys=Keys(tmp_path / "keys")) as up:
        request = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", up.port), timeout=WAIT_S) as sock:
            sock.sendall(request)
            assert sock.recv(65536).startswith(b"HTTP/1.1 401")
            with contextlib.suppress(ConnectionError):
                while True:
                    sock.sendall(b" ")
                    time.sleep(0.01)
                    sock.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        if not sock.recv(100):
                            break
                    sock.setblocking(True)


def test_the_next_request_of_a_connection_has_its_time_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(ScriptedLoop(tokenizer(), SCRIPT)) as up:
        monkeypatch.setattr(Connection, "head_s", 0.2)
        with socket.create_connection(("127.0.0.1", up.port), timeout=WAIT_S) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            assert answer.count(b"HTTP/1.1") <= 1


def test_of_too_many_connections_the_idlest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "most", 8)
    with running(ScriptedLoop(tokenizer(), SCRIPT, step_s=0.02)) as up:
        with contextlib.ExitStack() as stack:
            asked = stack.enter_context(_asked(up, {"prompt": "a", "max_tokens": 200}))
            until(lambda: up.loop.stats.running == 1)
            idle = [
                stack.enter_context(socket.create_connection(("127.0.0.1", up.port), WAIT_S))
                for _ in range(30)
            ]
            assert httpx.get(f"{up.url}/health").status_code == 200
            with contextlib.suppress(ConnectionError):
                assert idle[0].recv(1) == b""
            assert asked.recv(100).startswith(b"HTTP/1.1 200")


def test_more_requests_than_are_answered_at_a_time_are_told() -> None:
    loop = ScriptedLoop(tokenizer(), SCRIPT, step_s=0.02)
    with running(loop, limits=Limits(active=1)) as up:
        with _asked(up, {"prompt": "a", "max_tokens": 400}):
            until(lambda: up.service.active == 1)
            found = post(up, "/v1/completions", {"prompt": "a"})
            assert (found.status_code, found.json()["error"]["code"]) == (503, "busy")
            assert httpx.get(f"{up.url}/health").status_code == 200


def test_all_files_that_may_be_open_are() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        files = raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert most_connections(files) <= 1024
    assert most_connections(100) == 36


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_is_told_and_survived(up: Running, stream: bool) -> None:
    ids = tokenizer().encode("the cat sat")

    def ask() -> None:
        found: Any = client(up).completions.create(
            model="tiny", prompt=ids, max_tokens=9, stream=stream
        )
        list(found)

    up.loop.broken = ids[-1]
    try:
        with pytest.raises(openai.APIError, match="the logits are NaN") as found:
            ask()
    finally:
        up.loop.broken = None
    if not stream:
        assert isinstance(found.value, openai.InternalServerError)
    assert client(up).completions.create(model="tiny", prompt=ids, max_tokens=2).choices


def test_a_failed_stream_does_not_end_as_if_it_were_whole(up: Running) -> None:
    ids = tokenizer().encode("the cat sat")
    up.loop.broken = ids[-1]
    try:
        answer = post(up, "/v1/completions", {"prompt": ids, "max_tokens": 9, "stream": True})
    finally:
        up.loop.broken = None
    events = answer.text.strip().split("\n\n")
    assert "[DONE]" not in answer.text
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_error")


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_computed_for_no_longer(slow: Running, stream: bool) -> None:
    slow.loop.cancelled.clear()
    before = len(slow.loop.seen)
    with _asked(slow, {"prompt": "a", "max_tokens": 400, "stream": stream}) as sock:
        until(lambda: len(slow.loop.seen) > before)
        if stream:
            assert b"200 OK" in sock.recv(65536)
        assert _figure(slow, "vllm:num_requests_running") == 1
    until(lambda: slow.loop.cancelled == [slow.loop.seen[-1].id])
    assert _figure(slow, "vllm:num_requests_running") == 0
    until(lambda: slow.service.active == 0)


def test_who_stays_is_not_cancelled(up: Running) -> None:
    up.loop.cancelled.clear()
    client(up).chat.completions.create(model="tiny", messages=CHAT, max_tokens=3)
    list(client(up).chat.completions.create(model="tiny", messages=CHAT, max_tokens=3, stream=True))
    until(lambda: up.service.active == 0)
    assert up.loop.cancelled == []


def test_many_streams_keep_apart(up: Running) -> None:
    import asyncio

    async def one(asked: openai.AsyncOpenAI, tokens: int) -> str:
        stream = await asked.completions.create(
            model="tiny", prompt="x", max_tokens=tokens, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="x") as asked:
            return await asyncio.gather(*(one(asked, 1 + 3 * i) for i in range(40)))

    assert asyncio.run(all_of_them()) == [said(1 + 3 * i) for i in range(40)]


# --------------------------------------------------------------------------------------- the cache


def test_usage_says_what_came_from_the_cache() -> None:
    with running(ScriptedLoop(tokenizer(), SCRIPT)) as own:
        own.loop.cached = 4
        asked = client(own)
        text = {"model": "tiny", "prompt": ["the cat sat here", "a boy had a ball"], "n": 2}
        found = asked.completions.create(**text, max_tokens=2)
        assert _cached(found.usage) == 8  # of two prompts; choices share them
        chat = asked.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2)
        assert _cached(chat.usage) == 4
        streamed = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2}
        *_, last = asked.completions.create(**text, **streamed)
        assert _cached(last.usage) == 8
        *_, end = asked.chat.completions.create(model="tiny", messages=CHAT, **streamed)
        assert _cached(end.usage) == 4


def _cached(usage: Any) -> int:
    assert usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens
    return int(usage.prompt_tokens_details.cached_tokens)


# ------------------------------------------------------------------------------- probes and figures


def _figure(up: Running, name: str) -> float:
    lines = httpx.get(f"{up.url}/metrics").text.splitlines()
    found = [line for line in lines if line.split("{")[0] == name]
    assert found, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def test_figures_have_the_names_that_people_chart(up: Running) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    counts = ("time_to_first_token_seconds", "inter_token_latency_seconds")
    counts += ("e2e_request_latency_seconds", "request_queue_time_seconds")
    names += tuple(f"{name}_count" for name in counts)
    client(up).completions.create(model="tiny", prompt="a", max_tokens=1)
    before = {name: _figure(up, f"vllm:{name}") for name in names}
    ids = tokenizer().encode("the cat sat")
    client(up).completions.create(model="tiny", prompt=ids, max_tokens=5, n=2)
    grown = {name: _figure(up, f"vllm:{name}") - before[name] for name in names}
    assert grown == {
        "prompt_tokens_total": len(ids),
        "generation_tokens_total": 10,
        "request_success_total": 1,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 8,
        "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 2,
    }
    assert _figure(up, "nybble:max_sequences") == SEQUENCES
    assert _figure(up, "nybble:state_slots") == 10
    assert _figure(up, "nybble:kv_cache_clipped_total") == 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert _figure(up, f"vllm:{name}") == 0
    assert _figure(up, "vllm:num_preemptions_total") == 0
    assert "_created" not in httpx.get(f"{up.url}/metrics").text


def test_cache_and_drafts_are_charted_under_vllms_names() -> None:
    own_names = ("prefix_cache_pages", "prefix_cache_snapshots", "prefix_cache_snapshots_used")
    with running(ScriptedLoop(tokenizer(), SCRIPT)) as own:
        text = httpx.get(f"{own.url}/metrics").text
        assert "nybble:drafting_off{" not in text
        assert "_per_pos_total{" not in text
        own.loop.figures = {
            "cache_queries": 1000,
            "cache_hits": 640,
            "cache_evictions": 5,
            "cached_pages": 9,
            "cache_misses": (("parts", 3), ("hit", 2)),
            "snapshots": 7,
            "snapshots_used": 4,
            "draft_steps": 30,
            "drafted": 80,
            "accepted": 44,
            "accepted_by_position": (27, 17),
            "drafted_by_position": (40, 40),
            "drafting": "1 draft is accepted 0.62 of the time",
        }
        vllm = {
            name: _figure(own, f"vllm:{name}_total")
            for name in (
                *("prefix_cache_queries", "prefix_cache_hits", "spec_decode_num_drafts"),
                *("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
            )
        }
        assert list(vllm.values()) == [1000, 640, 30, 80, 44]
        assert [_figure(own, f"nybble:{name}") for name in own_names] == [9, 7, 4]
        assert _figure(own, "nybble:prefix_cache_evictions_total") == 5
        text = httpx.get(f"{own.url}/metrics").text
    per_position = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position='
    assert f'{per_position}"0"}} 27.0' in text
    assert f'{per_position}"1"}} 17.0' in text
    misses = 'nybble:prefix_cache_misses_total{model_name="tiny",reason='
    assert f'{misses}"parts"}} 3.0' in text
    assert f'{misses}"hit"' not in text
    # A reason with figures in it would be a new series each time it changes.
    assert 'nybble:drafting_off{model_name="tiny",reason="does not pay"} 1.0' in text
    assert "0.62" not in text


def test_strange_paths_make_no_figures(up: Running) -> None:
    httpx.get(f"{up.url}/nowhere/12345")
    text = httpx.get(f"{up.url}/metrics").text
    assert "12345" not in text
    assert 'path="other",status="404"' in text


def test_ready_means_that_a_token_was_generated() -> None:
    loop = ScriptedLoop(tokenizer(), SCRIPT)
    with running(loop, is_warm=False) as up:
        assert httpx.get(f"{up.url}/health").status_code == 200
        found = httpx.get(f"{up.url}/ready")
        assert found.status_code == 503
        assert "first token" in found.json()["status"]
        import asyncio

        asyncio.run_coroutine_threadsafe(up.service.warm_up(), up.asyncio).result(WAIT_S)
        assert httpx.get(f"{up.url}/ready").status_code == 200
        assert loop.generated == 1
        loop.stop()
        assert httpx.get(f"{up.url}/ready").status_code == 503
        assert httpx.get(f"{up.url}/health").status_code == 503
        assert post(up, "/v1/completions", {"prompt": "a"}).status_code == 503


def test_an_engine_that_hangs_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = ScriptedLoop(tokenizer(), SCRIPT)
    with running(loop) as up, httpx.Client() as probe:
        assert probe.get(f"{up.url}/health").status_code == 200
        loop.may_step.clear()
        monkeypatch.setattr("nybble.serve.service.STALL_S", 0.2)
        with _asked(up, {"prompt": "a"}):
            until(lambda: loop.stats.running == 1)
            until(lambda: probe.get(f"{up.url}/health").status_code == 503)
        loop.may_step.set()
        until(lambda: probe.get(f"{up.url}/health").status_code == 200)


def _asked(up: Running, body: dict[str, object]) -> socket.socket:
    """A connection on which a completion was asked for."""
    text = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", up.port), timeout=WAIT_S)
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(text) + text
    )
    return sock


def test_a_model_that_generates_nothing_ends_the_server() -> None:
    loop = ScriptedLoop(tokenizer(), SCRIPT)
    loop.stop()
    sock = server.bind("127.0.0.1", 0, has_keys=False)
    with pytest.raises(Exception, match="stopping"):
        server.run(sock, lambda: Service(served(), loop, Limits()), None, lambda: None)
    assert issubclass(Refusal, Exception)


# ------------------------------------------------------------------------------------------ signals


class Process:
    """A server in a process of its own."""

    def __init__(self, *args: str) -> None:
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "served.py"), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_signal_lets_answers_come_to_their_end() -> None:
    with Process("0.02", "20") as own:
        body = {"prompt": "a", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{own.url}/v1/completions", json=body, timeout=WAIT_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            own.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{own.url}/ready").status_code == 503)
            assert httpx.get(f"{own.url}/health").status_code == 200
            found = httpx.post(f"{own.url}/v1/completions", json={"prompt": "b"})
            assert found.status_code == 503
            assert found.headers["retry-after"] == "5"
            assert found.json()["error"]["code"] == "draining"
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert own.process.wait(WAIT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(number: int) -> None:
    with Process("0", "20") as own, httpx.Client() as idle:
        idle.get(f"{own.url}/health")  # its connection stays open
        own.process.send_signal(number)
        assert own.process.wait(WAIT_S) == 0
        assert own.process.stderr is not None
        assert own.process.stderr.read() == "stopped\n"


def test_answers_that_take_too_long_are_cut_off_and_told() -> None:
    with Process("0.05", "0.2") as own:
        body = {"prompt": "a", "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{own.url}/v1/completions", json=body, timeout=WAIT_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            own.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert own.process.wait(WAIT_S) == 0
        assert own.process.stderr is not None
        log = own.process.stderr.read()
        assert "going down; 1 answer has 0.2 s to end\n1 answer did not end in time" in log


def test_a_second_signal_ends_it_now() -> None:
    with Process("0.02", "60") as own:
        body = {"prompt": "a", "max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{own.url}/v1/completions", json=body, timeout=WAIT_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            own.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{own.url}/ready").status_code == 503)
            own.process.send_signal(signal.SIGTERM)
            assert own.process.wait(WAIT_S) == 128 + signal.SIGTERM


def test_hangup_reads_the_keys_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(KEY)
    with Process("0", "1", str(path)) as own:
        headers = {"authorization": "Bearer second-key-0123456789"}
        assert httpx.get(f"{own.url}/v1/models", headers=headers).status_code == 401
        path.write_text("second-key-0123456789")
        own.process.send_signal(signal.SIGHUP)
        until(lambda: httpx.get(f"{own.url}/v1/models", headers=headers).status_code == 200)
