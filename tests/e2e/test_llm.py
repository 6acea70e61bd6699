"""An LLM as a program uses it: prompts in, completions out, whoever else asks."""

from __future__ import annotations

import gc
import json
import logging
import random
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fake_runner import letters
from nybble import LLM, SamplingParams
from nybble.api.llm import OpenOptions, open_engine
from nybble.api.quantize import quantize
from nybble.engine.request import Grammar, Token
from nybble.engine.speculation import Speculation
from nybble.errors import (
    ContextTooLong,
    DoesNotFit,
    EngineError,
    NybbleError,
    OutOfPages,
    TextError,
)

CARRIED = tiny.MODELS / "hybrid-chat-mtp"
PROMPTS = [
    "Once upon a time,",
    "Lily",
    "The cat sat on the mat, and the dog sat beside the cat. " * 9,  # more than two chunks
    "One day, a",
    "Tom and his mom went to the park to play with a ball.",
]
SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
USER = {"role": "user", "content": "Hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "file:///x.png"}}
DRAWN = replace(SHORT, temperature=0.9, top_p=0.95, seed=7)

#: Generated and then read as a prompt, a text goes through other kernels (recurrent, in chunks),
#: whose sums have another order, with BF16 pages between.
READ_AGAIN = 0.05


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(CARRIED, memory=0.5, max_sequences=4, max_context=2048) as made:
        yield made


def is_idle(llm: LLM) -> bool:
    """All pages and slots are free again, soon."""
    for _ in range(200):
        stats = llm.stats
        if stats.running == stats.waiting == stats.pages_used == stats.slots_used == 0:
            return True
        time.sleep(0.02)
    return False


# ---------------------------------------------------------------------------------------- the bits


@pytest.mark.parametrize("params", [SHORT, DRAWN], ids=["greedy", "drawn"])
def test_many_prompts_give_what_each_gives_alone(llm: LLM, params: SamplingParams) -> None:
    together = llm.generate(PROMPTS, params)
    for prompt, done in zip(PROMPTS, together, strict=True):
        [alone] = llm.generate(prompt, params)
        assert (alone.tokens, alone.logprobs) == (done.tokens, done.logprobs)
        assert alone.text == done.text
        assert len(done.tokens) == 12
    assert is_idle(llm)


def test_neither_threads_nor_sizes_change_a_bit(llm: LLM) -> None:
    expected = [(done.tokens, done.logprobs) for done in llm.generate(PROMPTS, DRAWN)]
    with LLM(
        CARRIED, memory=0.0025, max_context=512, max_sequences=3, max_batched_tokens=128, threads=1
    ) as other:
        assert other.stats.slots == 2  # what the memory holds
        found = other.generate(PROMPTS, DRAWN)
        assert [(done.tokens, done.logprobs) for done in found] == expected


def test_a_stream_is_what_generate_returns(llm: LLM) -> None:
    [done] = llm.generate(PROMPTS[0], DRAWN)
    tokens = list(llm.stream(PROMPTS[0], DRAWN))
    assert tuple(t.id for t in tokens) == done.tokens
    assert "".join(t.text for t in tokens) == done.text
    assert [t.finish for t in tokens] == [""] * 11 + ["length"]


def test_usage_says_what_was_spared(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nybble")
    with LLM(CARRIED, memory=0.1, max_sequences=2, max_context=1024, draft_tokens=2) as llm:
        ids = llm.encode("A story of a girl, a boat and a very long day at sea. " * 12)
        [done] = llm.generate(ids, SHORT)
        assert done.usage.cached_tokens == 0
        before = llm.stats
        [again] = llm.generate(ids, replace(SHORT, n=2))
        after = llm.stats
        whole = (len(ids) - 1) // 64 * 64
        assert again.usage.cached_tokens == after.cache_hits - before.cache_hits == whole > 0
        assert [choice.tokens for choice in again.choices] == [done.tokens] * 2
        assert after.drafted - before.drafted == again.usage.drafted > 0
        assert after.accepted - before.accepted == again.usage.accepted <= again.usage.drafted
        caplog.clear()
        other = [*ids[:100], *llm.encode("But then it began to rain, and she went home." * 3)]
        [parted] = llm.generate(other, SHORT)
        assert parted.usage.cached_tokens == 0
        assert f"0 of {len(other)} tokens of the prompt came from the cache" in caplog.text
        assert "parts at token 100; nearest snapshot 0" in caplog.text
        assert is_idle(llm)


def test_texts_and_ids_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[4], add_special=True)
    by_text, by_ids, by_array = (
        llm.generate(p, SHORT)[0].tokens for p in (PROMPTS[4], ids, np.array(ids))
    )
    assert by_text == by_ids == by_array
    assert [c.tokens for c in llm.generate([ids, ids[:3]], SHORT)][0] == by_text


def test_choices_differ_and_the_first_is_that_of_one(llm: LLM) -> None:
    [done] = llm.generate(PROMPTS[0], replace(DRAWN, n=5))
    assert len({choice.tokens for choice in done.choices}) > 2
    assert done.choices[0].tokens == llm.generate(PROMPTS[0], DRAWN)[0].tokens
    assert done.usage.tokens == sum(len(choice.tokens) for choice in done.choices)


def test_what_was_generated_is_as_likely_when_read(llm: LLM) -> None:
    [done] = llm.generate(PROMPTS[2], SHORT)
    whole = [*done.prompt_tokens, *done.tokens]
    [read] = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=2))
    scores = read.prompt_logprobs
    assert scores is not None
    assert scores.logprobs[0] is None
    assert len(scores.logprobs) == len(whole)
    found = np.array(scores.logprobs[-12:], dtype=float)
    np.testing.assert_allclose(found, done.logprobs, atol=READ_AGAIN)
    assert all(len(top) == 2 for top in scores.top[1:])


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    found = llm.generate(PROMPTS[:3], [replace(SHORT, max_tokens=n) for n in (1, 5, 3)])
    assert [len(done.tokens) for done in found] == [1, 5, 3]
    assert found[0].usage.tokens_per_s == 0
    with pytest.raises(EngineError, match="3 prompts and 2 params"):
        llm.generate(PROMPTS[:3], [SHORT, SHORT])


def test_more_prompts_than_are_submitted_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.api.llm.MOST_SUBMITTED", 3)
    found = llm.generate([PROMPTS[1]] * 8, replace(SHORT, max_tokens=3))
    assert len({done.tokens for done in found}) == 1
    assert [len(done.tokens) for done in found] == [3] * 8


def test_threads_share_a_model(llm: LLM) -> None:
    expected = [done.tokens for done in llm.generate(PROMPTS, DRAWN)]
    found: list[list[tuple[int, ...]]] = []

    def work() -> None:
        found.append([done.tokens for done in llm.generate(PROMPTS, DRAWN)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 4


# ----------------------------------------------------------------------------------- conversations


def test_a_conversation_is_rendered_and_sampled_as_recommended(llm: LLM) -> None:
    asked = [{"role": "user", "content": "Tell me a short story about a cat."}]
    recommended = llm.default_params
    assert (recommended.temperature, recommended.top_p, recommended.top_k) == (0.7, 0.8, 20)
    done = llm.chat(asked, replace(recommended, max_tokens=8))
    text = llm.render(asked)
    assert text.endswith("<|im_start|>assistant\n")
    assert done.prompt_tokens == tuple(llm.encode(text))
    assert len(done.tokens) == 8
    assert "<think>" in llm.render(asked, variables={"enable_thinking": True})


def test_an_answer_ends_at_the_end_of_the_turn(llm: LLM) -> None:
    asked = [{"role": "user", "content": "I want to find a restaurant in San Jose."}]
    done = llm.chat(asked, SamplingParams())
    assert done.finish == "stop"
    assert done.tokens[-1] in llm.tokenizer.eos_ids
    assert "<|im_end|>" not in done.text


def test_parts_of_text_are_lines_of_one_text(llm: LLM) -> None:
    parts = [{"type": "text", "text": "a cat"}, {"type": "text", "text": "a dog"}]
    by_parts = llm.render([{"role": "user", "content": parts}])
    assert by_parts == llm.render([{"role": "user", "content": "a cat\na dog"}])
    assert "a cat\na dog" in by_parts


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hello", "messages: expected a list .* found a str"),
        (None, "messages: expected a list .* found a NoneType"),
        ({"role": "user", "content": "x"}, "messages: expected a list .* found a dict"),
        ([], "messages: the list is empty"),
        ([USER, "x"], r"messages\[1\]: expected a mapping .* found a str"),
        ([{"content": "x"}], r"messages\[0\]: role: expected a text .* found none"),
        ([{"role": 1}], r"messages\[0\]: role: .* found a int"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: content: .* found a int"),
        ([USER, {"role": "user", "content": ["x"]}], r"messages\[1\]: content\[0\]: .* a str"),
        ([{"role": "user", "content": [IMAGE]}], r"messages\[0\]: content\[0\]: .*'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: text: .* NoneType"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(llm: LLM, messages: Any, words: str) -> None:
    for ask in (llm.render, llm.chat):
        with pytest.raises(TextError, match=words):
            ask(messages)


def test_a_folder_without_a_template_names_the_other_way(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(CARRIED, folder)
    (folder / "chat_template.jinja").unlink()
    with LLM(folder, memory=0.1, max_context=256) as bare:
        with pytest.raises(TextError, match="no chat template.*nybble generate"):
            bare.chat([{"role": "user", "content": "x"}])


def test_a_recommendation_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(CARRIED, folder)
    file = folder / "generation_config.json"
    for changed, words in (
        ({"top_p": 0}, "top_p must be above 0"),
        ({"temperature": "hot"}, "temperature: expected a number, found a string"),
        ({"top_k": 2.5}, "top_k: expected a whole number"),
    ):
        file.write_text(json.dumps({"do_sample": True, **changed}))
        with LLM(folder, memory=0.1, max_context=256) as made:
            with pytest.raises(TextError, match=f"generation_config.json.*{words}"):
                _ = made.default_params


# ----------------------------------------------------------------------------------------- refusals


def test_prompts_that_cannot_run_are_refused_before_any_runs(llm: LLM) -> None:
    came: list[Token] = []
    long = [5] * 2048
    for prompts, error, words in (
        ([PROMPTS[0], long], ContextTooLong, "prompt 1: the prompt has 2,048 tokens.*2,048"),
        ([PROMPTS[0], []], TextError, "prompt 1: the prompt is empty"),
        ([[1, 2], [3, 1 << 20]], EngineError, f"prompt 1:.*found {1 << 20}"),
        ([[1, 2], [3, -1]], EngineError, "prompt 1:.*found -1"),
        (["fine", "half \ud83d a pair"], TextError, "prompt 1:.*surrogate"),
        ([[]], TextError, "^the prompt is empty"),
        ("", TextError, "^the prompt is empty"),
    ):
        with pytest.raises(error, match=words):
            llm.generate(prompts, SHORT, on_token=lambda i, j, token: came.append(token))  # type: ignore[arg-type]
    assert came == []
    with pytest.raises(EngineError, match="expected token ids"):
        llm.generate("x", replace(SHORT, logit_bias={1 << 20: 1.0}))
    with pytest.raises(EngineError, match="one choice"):
        llm.stream("x", replace(SHORT, n=2))
    assert llm.generate([], SHORT) == []


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts: expected .* found a NoneType"),
        (5, "prompts: expected .* found a int"),
        (b"abc", "prompts: .* found a bytes"),
        ({1, 2}, "prompts: .* found a set"),
        ([1.5], r"expected token ids, found 1\.5"),
        ([5, 1.5], r"expected token ids, found 1\.5"),
        ([True], "expected token ids, found True"),
        ([np.True_], "expected .* token ids, found a bool"),
        ([[1, 2], [3, "x"]], "prompt 1: .*expected token ids, found 'x'"),
        (["x", None], "prompt 1: .* found a NoneType"),
        ([{"role": "user"}], "found a dict; a conversation is for chat"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(llm: LLM, prompts: Any, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        llm.generate(prompts, SHORT)


def test_what_is_no_params_is_refused_by_name(llm: LLM) -> None:
    wrong: Any = {"max_tokens": 3}
    for ask in (llm.generate, llm.stream):
        with pytest.raises(EngineError, match="expected SamplingParams, found a dict"):
            ask("x", wrong)
    with pytest.raises(EngineError, match=r"params\[1\]: expected SamplingParams, found a dict"):
        llm.generate(["x", "y"], [SHORT, wrong])


def test_rows_of_an_array_are_prompts(llm: LLM) -> None:
    rows = np.array([[5, 6, 7], [8, 9, 10]])
    found = llm.generate(rows, SHORT)  # type: ignore[arg-type]
    assert [done.prompt_tokens for done in found] == [(5, 6, 7), (8, 9, 10)]


def test_each_request_is_drawn_anew_unless_it_has_a_seed(llm: LLM) -> None:
    free = replace(DRAWN, seed=None, temperature=5.0, top_p=1.0)
    assert SamplingParams().seed is None
    assert len({done.tokens for done in llm.generate([PROMPTS[0]] * 4, free)}) == 4


def test_who_reads_late_does_not_change_the_time_a_token_took(llm: LLM) -> None:
    began = time.perf_counter()
    stream = llm.stream_with_usage(PROMPTS[0], replace(SHORT, max_tokens=3))
    next(stream)
    assert is_idle(llm)  # the engine has made all three
    made = time.perf_counter() - began
    usage = [usage for _, usage in stream][-1]
    assert usage.tokens == 3
    assert usage.queued_s <= usage.first_token_s < usage.seconds <= made
    assert usage.prefill_s == usage.first_token_s - usage.queued_s


def test_a_long_generation_ends_with_the_context() -> None:
    with LLM(CARRIED, memory=0.1, max_context=70, max_sequences=1) as made:
        [done] = made.generate(
            [list(range(20, 60))], SamplingParams(max_tokens=500, ignore_eos=True)
        )
        assert (len(done.tokens), done.finish) == (30, "length")


def test_snapshots_of_what_has_no_states_are_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    letters(tmp_path)
    with pytest.raises(EngineError, match="has no recurrent states, so pages alone are its prefix"):
        open_engine(tmp_path, OpenOptions(memory=0.1, snapshot_memory=0.01))


def test_other_choices_of_a_prompt_longer_than_a_step_draft_too() -> None:
    """All lack the entries of the head that the first one's step made, more than fit one pass."""
    with LLM(CARRIED, memory=0.1, max_sequences=8, max_batched_tokens=256, draft_tokens=2) as llm:
        ids = llm.encode("A story of a girl, a boat and a very long day at sea. " * 40)
        [found] = llm.generate(ids, replace(DRAWN, n=4, max_tokens=8))
        assert len(ids) > 256
        assert [(len(c.tokens), c.error) for c in found.choices] == [(8, "")] * 4
        assert llm.stats.drafted > 0
        alone = [llm.generate(ids, replace(DRAWN, n=4, max_tokens=8))[0]]
        assert [c.tokens for c in found.choices] == [c.tokens for c in alone[0].choices]


def conversation(llm: LLM) -> list[tuple[object, ...]]:
    """Of each turn: its tokens, their log-probabilities, and how much of it was in the cache."""
    history, found = llm.encode("A story of a girl, a boat and a very long day. " * 6), []
    for turn in range(9):
        params = replace(DRAWN, max_tokens=100, seed=turn, logprobs=2)
        [done] = llm.generate(history, params)
        alternatives = [choice.logprobs for choice in done.choices]
        found.append((done.tokens, alternatives, done.usage.cached_tokens))
        history = [*history, *done.tokens, *llm.encode(f" And then? {turn}")]
    return found


def test_a_policy_that_changes_its_mind_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a hybrid generated text is not what reading it again makes, bit for bit: so what is read
    again must not depend on whether somebody guessed when it was generated."""
    options: dict[str, Any] = {"memory": 0.2, "max_sequences": 2, "max_context": 2048}
    with LLM(CARRIED, **options, draft="off") as llm:
        expected = conversation(llm)
    assert [cached for *_, cached in expected[1:]] == sorted(c for *_, c in expected[1:]) > [0] * 8
    draw = random.Random(5)
    monkeypatch.setattr(Speculation, "starts", lambda *_: draw.random() < 0.8)
    monkeypatch.setattr(Speculation, "is_over", lambda *_: draw.random() < 0.01)
    drafted = 0
    for _ in range(3):
        with LLM(CARRIED, **options, draft_tokens=2) as llm:
            assert conversation(llm) == expected
            drafted += llm.stats.drafted
    assert drafted > 0


def test_options_out_of_bounds_are_named() -> None:
    for options, words in (
        ({"memory": 0}, "memory must be"),
        ({"memory": float("nan")}, "memory must be"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of auto, bf16, fp8, f32"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"memory": True}, "memory must be"),
        ({"memory": "8"}, "memory must be"),
        ({"threads": True}, "threads must be"),
        ({"threads": 257}, "threads must be a whole number from 1 to 256, found 257"),
        ({"max_context": 1}, "max_context must be a whole number from 2"),
        ({"max_sequences": 0}, "max_sequences must be"),
        ({"max_batched_tokens": 64}, "max_batched_tokens must be at least"),
        ({"threads": 0}, "threads must be"),
        ({"max_context": 1.5}, "max_context must be"),
    ):
        with pytest.raises(EngineError, match=words):
            OpenOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ContextTooLong, match="more than the model's own"):
        open_engine(CARRIED, OpenOptions(memory=0.1, max_context=1 << 20))


def test_a_budget_that_holds_nothing_is_refused_and_a_small_one_names_its_room() -> None:
    with pytest.raises(DoesNotFit, match="holds no sequence"):
        LLM(CARRIED, memory=1e-6)
    with LLM(CARRIED, memory=0.004, max_sequences=1) as small:
        room = small.context
        assert room < small.limits.context
        with pytest.raises(OutOfPages, match="more memory"):
            small.generate([[5] * (room + 1)], SHORT)
        [done] = small.generate([[5] * (room - 3)], SHORT)
        assert (len(done.tokens), done.finish) == (3, "length")


def test_fewer_states_than_sequences_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = open_engine(CARRIED, OpenOptions(memory=0.004, max_context=256, max_sequences=32))
    assert engine.most_sequences == engine.slots.count < 32
    assert f"asked for 32 sequences at once, memory holds the states of {engine.slots.count}" in (
        caplog.text
    )
    caplog.clear()
    engine = open_engine(CARRIED, OpenOptions(memory=0.1, max_context=256, max_sequences=2))
    assert engine.most_sequences == 2
    assert not caplog.text


def test_a_closed_llm_says_so(llm: LLM) -> None:
    other = LLM(CARRIED, memory=0.1, max_context=256)
    other.close()
    other.close()
    with pytest.raises(EngineError, match="closed"):
        other.generate("x", SHORT)
    with pytest.raises(EngineError, match="closed"):
        list(other.stream("x", SHORT))


# -------------------------------------------------------------------------------- leaving, breaking


def test_leaving_a_stream_frees_what_it_held(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=1500, ignore_eos=True))
    assert next(stream).id >= 0
    stream.close()
    assert is_idle(llm)
    assert llm.stats.generated_tokens > 0


def test_an_interrupt_cancels_all_and_the_next_call_works(llm: LLM) -> None:
    def interrupt(prompt: int, choice: int, token: Token) -> None:
        raise KeyboardInterrupt

    endless = SamplingParams(max_tokens=1500, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, endless, on_token=interrupt)
    assert is_idle(llm)
    assert len(llm.generate(PROMPTS[0], SHORT)[0].tokens) == 12


def test_closing_ends_what_another_thread_waits_for() -> None:
    other = LLM(CARRIED, memory=0.2, max_context=2048)
    endless = SamplingParams(max_tokens=2000, ignore_eos=True)
    started, told = threading.Event(), list[str]()

    def work() -> None:
        [done] = other.generate(PROMPTS[0], endless, on_token=lambda *_: started.set())
        try:
            _ = done.text
        except EngineError as error:
            told.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    other.close()
    thread.join(30)
    assert told
    assert "closed" in told[0]


def test_one_broken_request_harms_no_other(tmp_path: Path) -> None:
    """A damaged row of the embedding: whoever reads that token fails, when it is read."""
    folder = tmp_path / "m"
    shutil.copytree(CARRIED, folder)
    token = 77
    spoil_embedding(folder, token)
    with LLM(folder, memory=0.2, max_context=512, max_sequences=1) as made:
        good, bad, more = made.generate([[5, 6, 7], [5, token, 7], [8, 9]], SHORT)
        assert len(good.tokens) == len(more.tokens) == 12
        with pytest.raises(EngineError, match="NaN|damaged"):
            _ = bad.text
        assert bad.choices[0].finish == "error"
        with pytest.raises(EngineError, match="NaN|damaged"):
            list(made.stream([5, token], SHORT))


def spoil_embedding(folder: Path, token: int) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in index if name.endswith("embed_tokens.weight"))
    file = folder / index[name]
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + size])[name]
    width = entry["shape"][1] * 2
    at = 8 + size + entry["data_offsets"][0] + token * width
    assert entry["dtype"] == "BF16"
    file.write_bytes(data[:at] + b"\xc0\x7f" * (width // 2) + data[at + width :])


def test_an_llm_that_is_dropped_ends_its_thread() -> None:
    made = LLM(CARRIED, memory=0.1, max_context=256)
    loop = weakref.ref(made._loop)
    thread = made._running()._thread
    del made
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert loop() is None


def test_a_program_that_closes_nothing_ends_well() -> None:
    program = (
        "from nybble import LLM, SamplingParams\n"
        f"llm = LLM({str(CARRIED)!r}, memory=0.1, max_context=512)\n"
        "stream = llm.stream('Once', SamplingParams(max_tokens=400, ignore_eos=True))\n"
        "print(next(stream).id)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert int(done.stdout) > 0


# ----------------------------------------------------------------------------------------- grammars


def test_a_grammar_shapes_the_text_and_a_bad_one_harms_nobody(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    drawn = replace(DRAWN, ignore_eos=False, max_tokens=30)
    asked = (
        replace(drawn, grammar=Grammar("regex", "(yes|no), (sir|madam)"), n=3),
        replace(drawn, grammar=Grammar("regex", "(unclosed")),
        drawn,
    )
    shaped, refused, free = llm.generate([PROMPTS[0]] * 3, asked)
    for choice in shaped.choices:
        assert choice.text in {"yes, sir", "yes, madam", "no, sir", "no, madam"}
        assert choice.finish == "stop"
    with pytest.raises(EngineError, match="grammar"):
        _ = refused.text
    assert free.tokens == llm.generate(PROMPTS[0], drawn)[0].tokens
    assert is_idle(llm)


def test_closing_ends_the_process_of_grammars() -> None:
    pytest.importorskip("llguidance")
    before = children()
    with LLM(CARRIED, memory=0.1, max_context=256) as made:
        made.generate("x", SamplingParams(grammar=Grammar("regex", "ab")))
        assert len(children() - before) == 1
    gc.collect()
    assert children() <= before


def children() -> set[int]:
    """Processes that any thread of this one began, and that have not ended."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        found.update(map(int, file.read_text().split()))
    return found


# --------------------------------------------------------------------------------------- the caches


def test_the_cache_is_what_the_checkpoint_declares(tmp_path: Path) -> None:
    out = tmp_path / "nvfp4"
    quantize(CARRIED, out, "nvfp4", search="absmax", data_free=True)
    declared = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert declared["kv_cache_quant_algo"] == "FP8"
    bf16 = LLM(out, memory=0.002, kv_cache_dtype="bf16", max_sequences=1)
    with bf16, LLM(out, memory=0.002, max_sequences=1) as auto:
        assert auto.context < auto.limits.context  # so that the budget is what counts
        assert auto.limits.pages in (2 * bf16.limits.pages, 2 * bf16.limits.pages + 1)
        [done] = auto.generate(PROMPTS[0], SHORT)
        with LLM(out, memory=0.002, kv_cache_dtype="fp8", max_sequences=1) as fp8:
            assert fp8.generate(PROMPTS[0], SHORT)[0].logprobs == done.logprobs
            assert fp8.stats.clipped == 0  # keys and values of this model are far below 448
    with LLM(CARRIED, memory=0.002, max_sequences=1) as plain:
        assert plain.limits.pages == bf16.limits.pages


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_other_precisions_run(precision: str) -> None:
    with LLM(CARRIED, memory=0.1, max_context=512, precision=precision) as made:  # type: ignore[arg-type]
        [done] = made.generate(PROMPTS[0], SHORT)
        assert len(done.tokens) == 12
        assert all(logprob <= 0 for logprob in done.logprobs)


def test_folders_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(NybbleError, match="no such folder"):
        LLM(tmp_path / "nowhere")
