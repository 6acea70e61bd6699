"""The benchmark of a conversation: what is asked, what is counted, what is printed. No speed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from nybble.api.agent_text import QUESTIONS, RULES, tools
from nybble.api.turns import (
    Figures,
    Heard,
    Pair,
    Script,
    Turn,
    TurnsOptions,
    acceptance,
    ask,
    converse,
    fit_script,
    measure,
    write_script,
)
from nybble.engine.limits import EngineStats
from nybble.engine.request import Event, Request, Token
from nybble.errors import ContextTooLong, EngineError, TextError
from nybble.text.chat import ChatTemplate
from nybble.text.tokenizer import Tokenizer

FOLDER = tiny.MODELS / "hybrid-chat-mtp"
CONTEXT = 4096


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(FOLDER)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    found = ChatTemplate.open(FOLDER)
    assert found is not None
    return found


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate.compile("tests", source, FOLDER / "tokenizer_config.json", {})


class Answering:
    """An engine that makes `steps` tokens in each of its steps, and calls what it saw known."""

    def __init__(self, steps: Sequence[int], first: int = 100, error: str = "") -> None:
        self.steps, self.first, self.error = steps, first, error
        self.asked: list[Request] = []
        self.left = 0
        self.is_idle = True

    def add(self, request: Request) -> None:
        self.asked.append(request)
        self.left, self.is_idle = request.params.max_tokens, False
        self.turn = iter(self.steps)
        self.id = self.first + 10 * len(self.asked)

    def step(self) -> list[Event]:
        request, is_first = self.asked[-1], self.left == self.asked[-1].params.max_tokens
        if self.error:
            self.is_idle = True
            return [Event(request.id, finish="error", error=self.error)]
        events = []
        for number in range(min(next(self.turn), self.left)):
            told = {"cached": len(request.prompt) // 2, "missed": "parts"} if is_first else {}
            told |= {"drafted": 2, "accepted": 1} if not is_first and not number else {}
            is_first = False
            self.left -= 1
            token = Token(self.id + self.left, "x", -1.0, "" if self.left else "length")
            events.append(Event(request.id, 0, token, **told))  # type: ignore[arg-type]
        self.is_idle = not self.left
        return events


def pair(known: int, cached: int, first_s: float, plain_s: float, tokens: int = 5) -> Pair:
    heard = Heard(tuple(range(tokens)), first_s, first_s + 1.0, 2, cached, "", 6, 3)
    plain = replace(heard, first_s=plain_s, seconds=plain_s + 2.0, steps=tokens - 1, cached=0)
    return Pair(known + 20, known, heard, plain)


# ------------------------------------------------------------------------------------ what is asked


def test_every_prompt_is_all_that_was_said_before_and_the_next_message() -> None:
    script = Script((1, 2, 3), ((4,), (5, 6)))
    ahead, plain = Answering((1, 2, 2)), Answering((1, 1, 1, 1), first=500)
    pairs = list(converse(ahead, plain, script, 4, "talk"))  # type: ignore[arg-type]
    prompts = [request.prompt for request in ahead.asked]
    assert prompts[0] == (1, 2, 3)
    assert prompts[1] == (1, 2, 3, 113, 112, 111, 110, 4)
    assert prompts[2] == (*prompts[1], 123, 122, 121, 120, 5, 6)
    # The engine without cache is asked the same, whatever it answers itself.
    assert [request.prompt for request in plain.asked] == prompts
    # The last token of an answer was chosen, and never computed.
    assert [found.known for found in pairs] == [0, 6, 11]
    assert [found.prompt for found in pairs] == list(map(len, prompts))
    assert all(r.params.ignore_eos and not r.params.temperature for r in ahead.asked)
    assert script.tokens(4) == len(prompts[2]) + 4


def test_conversations_share_nothing() -> None:
    ahead, plain = Answering((1, 1)), Answering((1, 1))
    script = Script((1,), ((2,),))
    found = measure(ahead, plain, script, TurnsOptions(turns=2, answer=2, repeats=3))  # type: ignore[arg-type]
    assert [len(turn.pairs) for turn in found] == [3, 3]
    salts = [request.salt for request in ahead.asked]
    assert salts[0::2] == salts[1::2]
    assert len(set(salts)) == 3
    assert b"" not in salts


def test_the_script_has_the_templates_form(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    script = write_script(tokenizer, template, 3, 200)
    opening = tokenizer.decode(script.opening, skip_special=False)
    follow = [tokenizer.decode(ids, skip_special=False) for ids in script.follow]
    head = RULES[:200]
    assert head in opening
    assert opening.startswith("<|im_start|>system\n")
    # A whole conversation, put together, is what the template makes of it.
    said = ["First.", "Second."]
    text = opening + "".join(a + b for a, b in zip(said, follow, strict=True))
    system = opening.partition("<|im_start|>system\n")[2].partition("<|im_end|>")[0]
    messages = [{"role": "system", "content": system}]
    for number, question in enumerate(QUESTIONS[:3]):
        messages.append({"role": "user", "content": question})
        if number < 2:
            messages.append({"role": "assistant", "content": said[number]})
    assert text == template.render(messages)


def test_without_a_template_turns_end_as_texts_do(tokenizer: Tokenizer) -> None:
    script = write_script(tokenizer, None, 10, 150)
    end = min(tokenizer.eos_ids)
    assert len(script.follow) == 9
    assert all(ids[0] == end and end not in ids[1:] for ids in script.follow)
    assert script.opening.count(end) == 1
    # After the last of the questions comes the first again.
    assert script.follow[7] == script.opening[script.opening.index(end) :]


def test_a_template_that_knows_no_system_gets_the_rules_with_the_question(
    tokenizer: Tokenizer,
) -> None:
    plain = compiled(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    script = write_script(tokenizer, plain, 2, 100)
    opening = tokenizer.decode(script.opening, skip_special=False)
    assert opening.startswith("[user]# Rules for agents")
    assert opening.endswith(f"{QUESTIONS[0]}[assistant]")
    assert tokenizer.decode(script.follow[0]) == f"[user]{QUESTIONS[1]}[assistant]"
    forgetful = compiled("{{ messages[-1].content }}")
    with pytest.raises(TextError, match="leaves out what the assistant said"):
        write_script(tokenizer, forgetful, 2, 100)


@pytest.mark.parametrize("has_template", [True, False])
def test_the_prompt_is_shorter_where_the_context_is(
    tokenizer: Tokenizer, template: ChatTemplate, has_template: bool
) -> None:
    form = template if has_template else None
    options = TurnsOptions()
    found = fit_script(tokenizer, form, options, CONTEXT)
    assert CONTEXT - 64 <= found.tokens(options.answer) <= CONTEXT
    roomy = fit_script(tokenizer, form, options, 100_000)
    assert abs(len(roomy.opening) - len(found.opening)) < 400
    exact = replace(options, prompt=500)
    assert 500 <= len(fit_script(tokenizer, form, exact, CONTEXT).opening) < 600
    for wrong in (replace(options, prompt=4000), replace(options, answer=600)):
        with pytest.raises(ContextTooLong, match=r"context is 4,096; ask for fewer turns"):
            fit_script(tokenizer, form, wrong, CONTEXT)


def test_tools_do_not_end_nor_repeat() -> None:
    found = list(itertools.islice(tools(), 500))
    assert len(set(found)) == 500
    assert found[:20] == list(itertools.islice(tools(), 20))


@pytest.mark.parametrize(
    "wrong", [{"turns": 0}, {"turns": 65}, {"prompt": 15}, {"answer": 1}, {"repeats": 0}]
)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(EngineError, match=f"{next(iter(wrong))} must be from"):
        TurnsOptions(**wrong)


# ---------------------------------------------------------------------------------- what is counted


def test_an_answer_is_counted_in_tokens_steps_and_guesses() -> None:
    engine = Answering((1, 3, 1, 2))
    heard = ask(engine, Request("a", (1, 2, 3, 4), params(7)))  # type: ignore[arg-type]
    assert len(heard.tokens) == 7
    assert heard.steps == 3  # the first token belongs to the prompt
    assert (heard.drafted, heard.accepted, heard.cached, heard.missed) == (6, 3, 2, "parts")
    assert 0 <= heard.first_s <= heard.seconds
    with pytest.raises(EngineError, match="the logits are NaN"):
        ask(Answering((), error="the logits are NaN"), Request("b", (1,), params(3)))  # type: ignore[arg-type]


def params(most: int) -> Any:
    from nybble.engine.request import SamplingParams

    return SamplingParams(max_tokens=most)


def test_figures_of_turns_and_of_all() -> None:
    # Two conversations of two turns each.
    one = Turn(1, (pair(0, 0, 2.0, 2.0), pair(0, 0, 2.0, 2.2)))
    two = Turn(2, (pair(200, 192, 0.25, 5.0), pair(200, 128, 0.5, 6.0)))
    assert Figures((one,)).hit_rate is None
    figures = Figures((one, two))
    assert figures.hit_rate == 128 / 200  # the worst conversation counts
    assert figures.first_s == pytest.approx(2.0 + 0.375)
    assert figures.plain_first_s == pytest.approx(2.1 + 5.5)
    assert figures.saved_s == pytest.approx(5.225)
    assert figures.acceptance == 0.5
    assert figures.accepted_length == 4 * 4 / 8
    assert figures.tokens_per_s == pytest.approx(4.0)
    assert figures.plain_tokens_per_s == pytest.approx(2.0)
    assert figures.speed_up == pytest.approx(2.0)
    assert two.is_equal
    other = replace(two.pairs[0].plain, tokens=(9, 9, 9, 9, 9))
    assert not Turn(2, (replace(two.pairs[0], plain=other),)).is_equal
    nothing = replace(one.pairs[0], ahead=replace(one.pairs[0].ahead, drafted=0, accepted=0))
    assert Figures((Turn(1, (nothing,)),)).acceptance is None


def test_acceptance_is_that_of_the_measured_time() -> None:
    zero = EngineStats(0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0)
    before = replace(zero, drafted_by_position=(10,), accepted_by_position=(10,))
    after = replace(
        zero, drafted_by_position=(30, 8, 0), accepted_by_position=(20, 2, 0), drafting="off"
    )
    assert acceptance(before, after) == (0.5, 0.25)
    assert acceptance(zero, zero) == ()


def test_the_table_has_a_row_for_each_turn_and_one_for_all() -> None:
    from nybble.api.turns import TurnsBench
    from nybble.cli.bench import render_turns

    traffic: Any = SimpleNamespace(stored_bytes=2**30, parameters=10**9)
    about: Any = SimpleNamespace(threads=2)
    missed = replace(pair(200, 64, 0.5, 1.0).ahead, missed="no snapshot nearer")
    turns = (
        Turn(1, (pair(0, 0, 2.0, 2.0),)),
        Turn(2, (pair(200, 192, 0.5, 4.0),)),
        Turn(3, (replace(pair(200, 64, 0.5, 1.0), ahead=missed),)),
    )
    traffic.formats = ("bf16",)
    ahead = "prefix cache: on; drafting: mtp"
    found = TurnsBench("m", traffic, "bf16", turns, ahead, (0.8, 0.5), "", about)
    text = render_turns(found)
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len({len(row) for row in cells}) == 1
    test, hit = cells[0].index("test"), cells[0].index("hit")
    assert [row[test] for row in cells[2:]] == ["turn 1", "turn 2", "turn 3", "all"]
    assert [row[hit] for row in cells[2:]] == ["-", "96.0 %", "32.0 %", "64.0 %"]
    assert "accepted by position: 0.80, 0.50; 3 of 3 answers are equal without them" in text
    assert "turn 3: no snapshot nearer" in text
    assert "turn 2:" not in text
