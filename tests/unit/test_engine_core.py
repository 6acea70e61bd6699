"""An engine gives each request its tokens, texts, scores and one end, and keeps its pools whole."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fake_runner import END, VOCAB, FakeRunner, letters
from nybble.engine.engine import Engine, EngineOptions
from nybble.engine.limits import MOST_PRIORITY
from nybble.engine.request import Event, Grammar, PromptLogprobs, Request, SamplingParams, Token
from nybble.engine.runner import Work
from nybble.engine.sampler import Choice, Row, Sampler
from nybble.errors import ContextTooLong, DoesNotFit, EngineError, OutOfPages, TextError
from nybble.kernels.compute import Compute
from nybble.models.numbers import Numbers
from nybble.text.tokenizer import Tokenizer

PROMPT = tuple(1 + (7 * i) % 26 for i in range(30))

#: The kernel's own exp is good to about 1e-12.
TOLERANCE = 1e-10

#: Every token a letter, and every few tokens the end.
LETTERS = {27: -100.0, 28: -100.0}
ENDING: dict[str, Any] = {"max_tokens": 50, "temperature": 1.0, "logit_bias": {END: 2.0}}

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return letters(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def make(tokenizer: Tokenizer) -> Make:
    def made(
        pages: int = 50,
        slots: int = 8,
        context: int = 500,
        grammar: Any = None,
        **options: int,
    ) -> Engine:
        sizes = {"max_sequences": 8, "max_batched_tokens": 256, "page_tokens": 16} | options
        chosen = EngineOptions(**sizes)
        numbers = Numbers(pages, "pages"), Numbers(slots, "slots")
        runner = FakeRunner(chosen, *numbers)
        sampler = Sampler(VOCAB, Compute(threads=1))
        return Engine(runner, tokenizer, chosen, *numbers, context, sampler, grammar)

    return made


def fake(engine: Engine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 6, "ignore_eos": True, "seed": 0} | options)


def run(engine: Engine, *requests: Request) -> dict[str, list[Event]]:
    """All events of some requests, and of those that are under way."""
    for request in requests:
        engine.add(request)
    events: dict[str, list[Event]] = defaultdict(list)
    while not engine.is_idle:
        for event in engine.step():
            events[event.request].append(event)
    assert engine.step() == []
    return events


def one(engine: Engine, **options: Any) -> list[Token]:
    """The tokens of one request, from an engine of its own."""
    events = run(engine, Request("r", PROMPT, params(**options)))["r"]
    return [e.token for e in events if e.token is not None]


def text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


# -------------------------------------------------------------------------------- the end of a text


def test_a_request_gets_its_tokens_and_an_end(make: Make, tokenizer: Tokenizer) -> None:
    tokens = one(make())
    assert [t.finish for t in tokens] == ["", "", "", "", "", "length"]
    assert text_of(tokens) == tokenizer.decode([t.id for t in tokens])
    assert all(t.logprob < 0 for t in tokens)
    assert all(t.top == () for t in tokens)


def test_an_end_token_ends_without_a_text(make: Make) -> None:
    free = one(make(), **ENDING)
    at = [t.id for t in free].index(END)
    tokens = one(make(), **ENDING, ignore_eos=False)
    assert [t.id for t in tokens] == [t.id for t in free[: at + 1]]
    assert (tokens[-1].finish, tokens[-1].text) == ("stop", "")


def test_a_stop_token_ends_with_what_was_held_back(make: Make) -> None:
    free = one(make())
    ids = [t.id for t in free]
    assert len(set(ids)) == len(ids)
    letter = chr(96 + ids[2])
    tokens = one(make(), stop_token_ids=(ids[3],), stop=(letter + "0",))
    assert [t.id for t in tokens] == ids[:4]
    assert [t.text for t in tokens[2:]] == ["", letter]  # held back, as "0" could follow
    assert tokens[-1].finish == "stop"


def test_a_stop_text_ends_over_tokens(make: Make) -> None:
    text = text_of(one(make(), logit_bias=LETTERS))
    assert len(text) == 6
    tokens = one(make(), logit_bias=LETTERS, stop=(text[2:4],))
    assert len(tokens) == 4
    assert text_of(tokens) == text[:2]
    assert tokens[-1].finish == "stop"


def test_no_end_comes_before_min_tokens(make: Make) -> None:
    free = one(make(), **ENDING)
    at = [t.id for t in free].index(END)
    assert at > 0
    tokens = one(make(), **ENDING, ignore_eos=False, min_tokens=at + 1)
    ids = [t.id for t in tokens]
    assert ids[:at] == [t.id for t in free[:at]]
    assert END not in ids[: at + 1]
    just = one(make(), **ENDING, ignore_eos=False, min_tokens=at)
    assert [t.id for t in just] == [t.id for t in free[: at + 1]]


def test_bad_words_do_not_come(make: Make) -> None:
    text = text_of(one(make(), logit_bias=LETTERS))
    tokens = one(make(), logit_bias=LETTERS, bad_words=(text[1:3],))
    assert text_of(tokens)[0] == text[0]
    assert text[1:3] not in text_of(tokens)


def test_alternatives_hold_the_greedy_token(make: Make) -> None:
    for token in one(make(), logprobs=3):
        assert [a.token for a in token.top][0] == token.id
        assert token.top[0].logprob == token.logprob
        assert len(token.top) == 3


def test_generation_ends_where_the_context_ends(make: Make) -> None:
    tokens = one(make(context=len(PROMPT) + 3))
    assert [t.finish for t in tokens] == ["", "", "length"]
    assert tokens[:2] == one(make())[:2]


def test_generation_ends_where_the_pages_end(make: Make) -> None:
    tokens = one(make(pages=2, page_tokens=16))
    assert [t.finish for t in tokens] == ["", "length"]


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request("r", ()), TextError, "empty"),
        (Request("r", (1,) * 500), ContextTooLong, "500 tokens and the context is 500"),
        (Request("r", (1,) * 400), OutOfPages, "400 tokens and all 25 pages of 16 hold 400"),
        (Request("r", (1, VOCAB)), EngineError, "the prompt.*0 to 28, found 29"),
        (Request("r", (-1,)), EngineError, "the prompt.*found -1"),
        (Request("r", (1,), priority=MOST_PRIORITY + 1), EngineError, "priority"),
        (Request("r", (1,), params(stop_token_ids=(29,))), EngineError, "stop_token_ids"),
        (Request("r", (1,), params(logit_bias={40: 1.0})), EngineError, "logit_bias"),
        (Request("r", (1,), params(grammar=Grammar("regex", "a"))), EngineError, "grammar"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(
    make: Make, request_: Request, error: type[Exception], message: str
) -> None:
    engine = make(pages=25)
    for refuse in (engine.validate, engine.add):
        with pytest.raises(error, match=message):
            refuse(request_)
    assert engine.is_idle
    assert len(run(engine, Request("r", (1,), params()))["r"]) == 6


def test_an_id_is_free_again_after_its_request(make: Make) -> None:
    engine = make()
    engine.add(Request("r", PROMPT, params()))
    with pytest.raises(EngineError, match="'r' is already under way"):
        engine.add(Request("r", PROMPT, params()))
    first = run(engine)["r"]
    assert run(engine, Request("r", PROMPT, params()))["r"] == first


# ------------------------------------------------------------------------------------- cancellation


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_request_may_be_cancelled_at_any_step(make: Make, steps: int) -> None:
    engine = make(max_sequences=2, max_batched_tokens=66)
    engine.add(Request("r", PROMPT * 4, params(n=3)))
    for _ in range(steps):
        engine.step()
    events = engine.cancel("r")
    assert {(e.request, e.choice, e.finish) for e in events} == {
        ("r", choice, "cancelled") for choice in range(3)
    }
    assert engine.is_idle
    engine.check()
    assert engine.cancel("r") == engine.cancel("never") == []


# ---------------------------------------------------------------------------------------- n choices


def test_choices_are_those_of_a_crowded_engine_and_of_a_lonely_one(make: Make) -> None:
    asked = Request("r", PROMPT * 3, params(n=4, temperature=1.0, seed=5))
    wide, narrow = make(), make(slots=1)
    events = [run(engine, asked)["r"] for engine in (wide, narrow)]
    assert fake(wide).copies == 3
    assert fake(narrow).copies == 0
    texts = [
        [text_of([e.token for e in found if e.token and e.choice == c]) for c in range(4)]
        for found in events
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4
    assert wide.stats.prompt_tokens == narrow.stats.prompt_tokens == 90
    assert wide.stats.recomputed_tokens == 0
    assert narrow.stats.recomputed_tokens == 3 * 90


def test_seeds_are_drawn_where_none_is_given(make: Make) -> None:
    engine = make()
    same = [Request(str(i), PROMPT, params(seed=None, temperature=5.0)) for i in range(4)]
    texts = {
        text_of([e.token for e in events if e.token]) for events in run(engine, *same).values()
    }
    assert len(texts) > 1


# ---------------------------------------------------------------------------------- prompt logprobs


def expected_scores(tokenizer: Tokenizer, prompt: tuple[int, ...], top: int) -> PromptLogprobs:
    """From logits of one forward over the whole prompt, by torch's own log_softmax."""
    options = EngineOptions(1, 1000, 1000)
    pages, slots = Numbers(1, "pages"), Numbers(1, "slots")
    runner = FakeRunner(options, pages, slots)
    logits = runner.forward([Work(prompt, pages.take(), slots.take()[0], 0, False, len(prompt))])
    logprobs = torch.log_softmax(logits.double(), -1)
    own = [float(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
    best = logprobs.argsort(descending=True)[:-1, :top].tolist()
    found: list[tuple[Any, ...]] = [
        tuple((t, float(logprobs[i, t])) for t in ids) for i, ids in enumerate(best)
    ]
    return PromptLogprobs((None, *own), ((), *found))


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("length", [1, 30, 64, 200])
def test_a_prompt_is_scored_once_before_its_tokens(
    make: Make, tokenizer: Tokenizer, length: int, top: int
) -> None:
    prompt = (PROMPT * 7)[:length]
    events = run(make(), Request("r", prompt, params(prompt_logprobs=top, n=2)))["r"]
    told = [e for e in events if e.prompt is not None]
    assert told == events[:1]
    assert told[0].choice == 0
    assert told[0].token is None
    found, expected = told[0].prompt, expected_scores(tokenizer, prompt, top)
    assert found is not None
    assert len(found.logprobs) == len(found.top) == length
    assert found.logprobs[0] is None
    assert found.logprobs[1:] == pytest.approx(expected.logprobs[1:], abs=TOLERANCE)
    for ours, theirs in zip(found.top, expected.top, strict=True):
        assert [(a.token, pytest.approx(a.logprob, abs=TOLERANCE)) for a in ours] == list(theirs)


def test_scores_survive_preemption(make: Make) -> None:
    asked = Request("late", PROMPT * 4, params(prompt_logprobs=2))
    expected = run(make(), asked)["late"]
    engine = make(pages=15, max_batched_tokens=72)
    engine.add(Request("first", PROMPT, params(max_tokens=150)))
    engine.step()
    engine.add(asked)
    engine.step()
    late = next(s for s in engine.scheduler.running if s.request.id == "late")
    assert late.is_prefilling
    assert len(late.scores) > 60
    engine.scheduler.preempt(late)
    assert run(engine)["late"] == expected


def test_the_first_event_of_a_choice_says_how_long_it_waited(make: Make) -> None:
    engine = make(max_sequences=2)
    begun = time.monotonic()
    events = run(
        engine,
        Request("scored", PROMPT, params(n=2, prompt_logprobs=0)),
        Request("late", PROMPT, params(n=3)),
    )
    passed = time.monotonic() - begun
    for of_request, choices in ((events["scored"], 2), (events["late"], 3)):
        for choice in range(choices):
            waited = [e.queued_s for e in of_request if e.choice == choice]
            assert waited[0] is not None
            assert 0 <= waited[0] <= passed
            assert waited[1:] == [None] * (len(waited) - 1)
    waits = [max(e.queued_s or 0.0 for e in events["late"] if e.choice == i) for i in (0, 2)]
    assert waits[0] < waits[1]  # two run at once
    engine.add(Request("never", PROMPT))
    (event,) = engine.cancel("never")
    assert event.queued_s is None


# ------------------------------------------------------------------------------------------- errors


def test_nan_ends_its_request_alone(make: Make) -> None:
    other = Request("other", PROMPT[:5], params())
    expected = run(make(), other)["other"]
    engine = make()
    fake(engine).nan_after = (PROMPT[-2], PROMPT[-1])
    events = run(engine, Request("r", PROMPT, params(n=2)), other)
    assert events["other"] == expected
    assert {(e.choice, e.finish) for e in events["r"]} == {(0, "error"), (1, "error")}
    assert all("NaN" in e.error and "layer 3 is damaged" in e.error for e in events["r"])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_choice_that_fails_as_another_ends_fails_its_request_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Both in one step, in either order: the other requests of that step go on."""
    others = [Request("a", PROMPT[:5], params()), Request("z", PROMPT[:7], params())]
    expected = run(make(), *others)
    engine = make()
    true = engine.sampler.sample

    def sample(logits: Any, rows: Sequence[Row], ahead: Any = None) -> list[Choice]:
        return [
            replace(found, token=-1, error="planted")
            if (row.seed, row.choice, len(row.output)) == (77, failing, 1)
            else found
            for found, row in zip(true(logits, rows, ahead), rows, strict=True)
        ]

    monkeypatch.setattr(engine.sampler, "sample", sample)
    request = Request("r", PROMPT, params(n=2, max_tokens=2, seed=77))
    events = run(engine, others[0], request, others[1])
    assert {name: events[name] for name in ("a", "z")} == expected
    ends = {e.choice: (e.finish or e.token.finish if e.token else e.finish) for e in events["r"]}
    assert ends[failing] == "error"
    assert ends[1 - failing] == ("length" if failing else "error")
    engine.check()


def test_nan_in_a_scored_prompt_names_the_place(make: Make) -> None:
    engine = make()
    fake(engine).nan_after = (PROMPT[3], PROMPT[4])
    (event,) = run(engine, Request("r", PROMPT, params(prompt_logprobs=0)))["r"]
    assert event.finish == "error"
    assert "after 5 tokens of the prompt" in event.error
    assert "layer 3 is damaged" in event.error


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_batch_without_memory_loses_its_last_and_the_others_begin_again(
    make: Make, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    requests = [
        Request("a", PROMPT, params(prompt_logprobs=1, temperature=1.0)),
        Request("b", PROMPT * 3, params(n=2, temperature=1.0)),
        Request("c", PROMPT[:9], params(n=2)),
    ]
    expected = run(make(), *requests)
    engine = make()
    for request in requests:
        engine.add(request)
    events: dict[str, list[Event]] = defaultdict(list)
    for _ in range(steps):
        for event in engine.step():
            events[event.request].append(event)
    fake(engine).fails = DoesNotFit("nyb_matmul: no memory for its scratch")
    lost = engine.step()
    assert [(e.request, e.choice, e.finish) for e in lost] == [("c", i, "error") for i in (0, 1)]
    assert all("no memory" in e.error for e in lost)
    assert "the last in turn ends" in caplog.text
    engine.check()
    for name, more in run(engine).items():
        events[name] += more
    assert set(events) == ({"a", "b", "c"} if steps else {"a", "b"})
    for name in "ab":
        assert sorted(events[name], key=by_choice) == sorted(expected[name], key=by_choice)


def by_choice(event: Event) -> int:
    return event.choice


def test_one_for_whom_there_is_no_memory_ends(make: Make) -> None:
    engine = make()
    fake(engine).fails = DoesNotFit("no memory")
    (event,) = run(engine, Request("r", PROMPT, params()))["r"]
    assert (event.finish, event.error) == ("error", "no memory")
    engine.check()


@pytest.mark.parametrize("error", [EngineError("layer 3 of a b"), ZeroDivisionError("oh")])
def test_a_failed_batch_ends_its_requests_and_no_other(
    make: Make, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make(max_sequences=2)
    names = "abc"
    for name in names:
        engine.add(Request(name, PROMPT, params(n=1)))
    expected = run(make(), Request("c", PROMPT, params()))["c"]
    engine.step()
    fake(engine).fails = error
    events = engine.step()
    assert [(e.request, e.finish, e.error) for e in events] == [
        ("a", "error", str(error)),
        ("b", "error", str(error)),
    ]
    assert str(error) in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, ZeroDivisionError)
    assert run(engine)["c"] == expected


def test_a_token_without_a_text_ends_its_request_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    engine.add(Request("r", PROMPT, params(n=2)))
    engine.add(Request("other", PROMPT, params()))
    engine.step()
    broken = engine.scheduler.running[0]
    assert broken.request.id == "r"

    def push(token: int) -> tuple[str, bool]:
        raise TextError("this decoder changes earlier text")

    monkeypatch.setattr(broken, "stream", type("Broken", (), {"push": staticmethod(push)}))
    events = engine.step()
    assert [e.error for e in events if e.request == "r"] == [
        "this decoder changes earlier text"
    ] * 2
    assert len([e for e in events if e.request == "other"]) == 1


def test_abort_ends_everything(make: Make) -> None:
    engine = make(max_sequences=1)
    for name in "ab":
        engine.add(Request(name, PROMPT, params(n=2)))
    engine.step()
    assert [(e.request, e.finish, e.error) for e in engine.abort("over")] == [
        (name, "error", "over") for name in "aabb"
    ]
    engine.check()


def test_what_is_lost_is_noticed(make: Make) -> None:
    engine = make()
    engine.pages.take()
    with pytest.raises(EngineError, match="1 of 50"):
        engine.step()
    engine = make()
    engine.add(Request("r", PROMPT, params()))
    engine.scheduler.waiting.clear()
    with pytest.raises(EngineError, match="lost turn"):
        engine.step()


# ----------------------------------------------------------------------------------------- grammars


class Spells:
    """A grammar whose only text is its own; complete with its last letter. "bomb" takes long and
    then cannot be used, "mute" fails when it has begun."""

    def __init__(self) -> None:
        self.left: dict[int, str] = {}
        self.asked: list[int] = []
        self.log: list[str] = []
        self.patience: dict[int, int] = {}
        self.is_closed = False

    def start(self, key: int, grammar: Grammar) -> None:
        self.left[key], self.patience[key] = grammar.text, 3

    def is_ready(self, key: int) -> bool:
        self.patience[key] -= 1
        if self.left[key] == "bomb" and self.patience[key] < 0:
            raise EngineError("grammar: takes too long")
        return self.patience[key] < 0

    def ask(self, keys: Sequence[int]) -> None:
        assert all(self.patience[key] < 0 for key in keys)
        self.asked = list(keys)
        self.log.append("ask")

    def collect(self) -> list[bytes]:
        self.log.append("collect")
        return [b"" if self.failure(key) else self.mask(key) for key in self.asked]

    def mask(self, key: int) -> bytes:
        return (1 << (ord(self.left[key][0]) - 96)).to_bytes(4, "little")

    def failure(self, key: int) -> str:
        return "grammar: has failed" if self.left[key] == "mute" else ""

    def close(self) -> None:
        self.is_closed = True

    def accept(self, key: int, token: int) -> bool:
        assert chr(96 + token) == self.left[key][0]
        self.left[key] = self.left[key][1:]
        return not self.left[key]

    def drop(self, key: int) -> None:
        del self.left[key]


def test_a_grammar_is_followed_to_its_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    spells = Spells()
    engine = make(grammar=spells)
    forward = engine.runner.forward

    def logged(works: Any) -> torch.Tensor:
        spells.log.append("forward")
        return forward(works)

    monkeypatch.setattr(engine.runner, "forward", logged)
    asked = params(n=2, grammar=Grammar("regex", "abc"), temperature=1.0)
    events = run(engine, Request("r", PROMPT, asked), Request("other", PROMPT[:3], params()))
    for choice in range(2):
        tokens = [e.token for e in events["r"] if e.token and e.choice == choice]
        assert text_of(tokens) == "abc"
        assert tokens[-1].finish == "stop"
    assert events["other"] == run(make(), Request("other", PROMPT[:3], params()))["other"]
    at = spells.log.index("ask")
    assert spells.log[at : at + 3] == ["ask", "forward", "collect"]  # made while it computes
    assert spells.left == {}


def test_masks_are_collected_when_a_step_fails(make: Make) -> None:
    spells = Spells()
    engine = make(grammar=spells)
    engine.add(Request("r", PROMPT, params(grammar=Grammar("regex", "abc"))))
    fake(engine).fails = EngineError("no")
    (event,) = run(engine)["r"]
    assert event.error == "no"
    assert spells.log == ["ask", "collect"]
    assert spells.left == {}


@pytest.mark.parametrize(("text", "reason"), [("bomb", "takes too long"), ("mute", "has failed")])
def test_a_grammar_that_cannot_be_used_ends_its_request_alone(
    make: Make, text: str, reason: str
) -> None:
    spells = Spells()
    engine = make(grammar=spells)
    other = Request("other", PROMPT[:3], params())
    events = run(engine, Request("r", PROMPT, params(n=2, grammar=Grammar("regex", text))), other)
    assert [(e.finish, e.error) for e in events["r"]] == [("error", f"grammar: {reason}")] * 2
    assert events["other"] == run(make(), other)["other"]
    assert spells.left == {}


def test_others_go_on_while_a_grammar_compiles(make: Make) -> None:
    spells = Spells()
    engine = make(grammar=spells)
    engine.add(Request("r", PROMPT, params(grammar=Grammar("regex", "abc"))))
    engine.add(Request("other", PROMPT, params()))
    assert engine.stats.waiting == 2
    assert [e.request for _ in range(3) for e in engine.step()] == ["other"] * 3
    assert [e.request for e in engine.step()] == ["other", "r"]
    engine.cancel("r")
    engine.add(Request("s", PROMPT, params(grammar=Grammar("regex", "abc"))))
    assert [e.choice for e in engine.cancel("s")] == [0]
    assert spells.left == {}
    run(engine)
    engine.close()
    assert spells.is_closed


# ------------------------------------------------------------------------------------------ figures


def test_figures_tell_what_goes_on(make: Make) -> None:
    engine = make(max_sequences=2)
    assert engine.context == 500
    for name in "abc":
        engine.add(Request(name, PROMPT, params()))
    engine.step()
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.slots_used, stats.pages_used) == (2, 1, 2, 4)
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (1, 60, 2)
    run(engine)
    done = replace(engine.stats, steps=0)
    assert (done.running, done.waiting, done.slots_used, done.pages_used) == (0, 0, 0, 0)
    assert (done.prompt_tokens, done.generated_tokens, done.recomputed_tokens) == (90, 18, 0)
    assert done.clipped == 0


def test_clipped_values_are_those_that_the_pool_counts(make: Make) -> None:
    plain = make()
    parts = (plain.options, plain.pages, plain.slots, 500, plain.sampler)
    counting = Engine(plain.runner, plain.tokenizer, *parts, clipped=lambda: 7)
    assert counting.stats.clipped == 7
