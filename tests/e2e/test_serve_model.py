"""`nybble serve` with a real model: what comes over HTTP is what the engine makes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nybble import LLM, SamplingParams
from nybble.api.llm import OpenOptions, open_engine
from nybble.api.serve import fingerprint

FOLDER = Path(__file__).parents[2] / "models" / "hybrid-chat-mtp"
NAME = "story-teller"
WAIT_S = 60.0
CHAT: list[Any] = [{"role": "user", "content": "Tell me a short story about a cat."}]
PROMPTS = [
    "Once upon a time there was",
    "The sea",
    "A boy named Tim had a red ball, and every day he",
    "One day,",
]


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "nybble", "serve", str(FOLDER), "--port", "0"]
    command += ["--served-model-name", NAME, "--memory", "0.25", "--max-sequences", "8"]
    made = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield made
    made.kill()
    made.communicate()


@pytest.fixture(scope="module")
def shown(process: subprocess.Popen[str]) -> list[str]:
    """What is printed once it is ready."""
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while lines[-1] and "curl" not in lines[-1]:
        lines.append(process.stdout.readline())
    return lines


@pytest.fixture(scope="module")
def url(shown: list[str]) -> str:
    return shown[0].split()[1].removesuffix(",").removesuffix("/v1")


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(FOLDER, memory=0.25, max_sequences=8) as made:
        yield made


def test_the_line_that_is_printed_works(shown: list[str], url: str) -> None:
    assert NAME in "".join(shown)
    assert httpx.get(f"{url}/ready", timeout=WAIT_S).status_code == 200
    done = subprocess.run(shown[-1], shell=True, capture_output=True, check=True, timeout=WAIT_S)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_fingerprint_names_what_decides_about_bits() -> None:
    def made(**options: Any) -> str:
        return fingerprint(FOLDER, open_engine(FOLDER, OpenOptions(memory=0.25, **options)))

    plain = made()
    assert made(threads=1) == plain == made(max_sequences=3) == made(draft="ngram")
    others = {made(precision="f32"), made(precision="int8"), made(kv_cache_dtype="fp8")}
    assert len(others | {plain, made(exact=True)}) == 5
    # Without a cache nothing comes of generated text either.
    assert made(exact=True) == made(prefix_cache=False)


def test_the_next_turn_goes_on_from_the_last(
    client: openai.OpenAI, url: str, shown: list[str]
) -> None:
    assert "snapshots of" in " ".join(shown)
    assert "drafting: mtp, up to 3 tokens" in " ".join(" ".join(shown).split())
    said = "A cat and a dog went to the park to play with a big red ball. " * 8
    messages = [*CHAT, {"role": "assistant", "content": said}]
    turns = []
    for question in ("What did the dog do next?", "And then?"):
        messages.append({"role": "user", "content": question})
        found = client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=8, temperature=0
        )
        messages.append({"role": "assistant", "content": found.choices[0].message.content})
        turns.append(found.usage)
    first, second = turns
    assert first.prompt_tokens_details.cached_tokens == 0
    # At least all turns but the last question, to a multiple of 64.
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens - 2 * 64 > 0
    figures = httpx.get(f"{url}/metrics").text
    hits = re.search(r"^vllm:prefix_cache_hits_total\{.*\} (.*)$", figures, re.MULTILINE)
    assert hits is not None
    assert float(hits[1]) >= second.prompt_tokens_details.cached_tokens


def test_greedy_answers_are_the_engines(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(max_tokens=30)
    expected = llm.generate(PROMPTS, params)
    found = client.completions.create(model=NAME, prompt=PROMPTS, max_tokens=30, temperature=0)
    assert [c.text for c in found.choices] == [done.text for done in expected]
    chat = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=30, temperature=0)
    assert chat.choices[0].message.content == llm.chat(CHAT, params).text


def test_answers_do_not_depend_on_who_else_asks(client: openai.OpenAI) -> None:
    def asked(number: int) -> str:
        found = client.completions.create(
            model=NAME,
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=20,
            seed=number,
            temperature=1.0,
            top_p=1.0,
            stream=True,
        )
        return "".join(chunk.choices[0].text for chunk in found)

    alone = [asked(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(asked, range(12))) == alone
    assert len(set(alone)) > len(PROMPTS), "seeds change the text"


def test_a_prompt_is_scored_as_by_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.encode(PROMPTS[2])
    found = client.completions.create(
        model=NAME, prompt=[ids, ids[:5]], max_tokens=0, echo=True, logprobs=1
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    for choice, prompt in zip(found.choices, (ids, ids[:5]), strict=True):
        expected = llm.generate([prompt], params)[0].prompt_logprobs
        assert expected is not None
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == list(expected.logprobs)
        assert choice.text == llm.tokenizer.decode(prompt)
    assert found.usage is not None
    assert found.usage.completion_tokens == 0


def test_an_answer_ends_at_a_stop(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 60}
    whole = client.completions.create(**asked, temperature=0).choices[0].text
    stop = whole[len(whole) // 2 :][:4]
    found = client.completions.create(**asked, temperature=0, stop=[stop, "never comes"])
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    chunks = client.completions.create(**asked, temperature=0, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text


def test_the_context_bounds_an_answer(client: openai.OpenAI, llm: LLM) -> None:
    prompt = [5] * (llm.context - 8)
    found = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=1000, temperature=0, extra_body={"ignore_eos": True}
    )
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.total_tokens == llm.context
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=NAME, prompt=[5] * llm.context)
    assert refused.value.code == "context_length_exceeded"


def test_an_answer_follows_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 2, 3]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    found = client.chat.completions.create(
        model=NAME,
        messages=CHAT,
        max_tokens=200,
        seed=3,
        n=2,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    for choice in found.choices:
        document = json.loads(choice.message.content or "")
        assert set(document) == {"name", "age"}
        assert document["age"] in (1, 2, 3)
    chosen = client.chat.completions.create(
        model=NAME, messages=CHAT, extra_body={"guided_choice": ['ye"s', "no, никогда"]}
    )
    assert chosen.choices[0].message.content in ('ye"s', "no, никогда")
    with pytest.raises(openai.BadRequestError, match="grammar: ") as refused:
        client.chat.completions.create(
            model=NAME, messages=CHAT, extra_body={"guided_regex": "(unclosed"}
        )
    assert refused.value.code == "invalid_grammar"


def test_nothing_is_held_for_who_left(client: openai.OpenAI, url: str) -> None:
    for stream in (True, False):
        asked: dict[str, Any] = {"model": NAME, "prompt": "The sea", "max_tokens": 3000}
        more = {"ignore_eos": True}
        if stream:
            found = client.completions.create(**asked, stream=True, extra_body=more)
            next(iter(found))
            found.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).completions.create(**asked, extra_body=more)
        _until_idle(url)


def _until_idle(url: str) -> None:
    for _ in range(int(WAIT_S * 20)):
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        figures = {line.split("{")[0]: line.rsplit(" ", 1)[1] for line in lines if "{" in line}
        if figures["vllm:num_requests_running"] == "0.0":
            assert figures["vllm:kv_cache_usage_perc"] == "0.0"
            assert figures["nybble:state_slots_used"] == "0.0"
            return
    raise AssertionError("it still computes for nobody")


def test_it_ends_with_a_signal(process: subprocess.Popen[str], url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "/nonexistent"], "/nonexistent"),
        (["--precision", "int3"], "--precision"),
    ],
)
def test_what_cannot_be_served_says_why(args: list[str], words: str) -> None:
    command = [sys.executable, "-m", "nybble", "serve", str(FOLDER), "--port", "0", *args]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=WAIT_S, check=False, env=environment
    )
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
