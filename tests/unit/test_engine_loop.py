"""An engine in its thread: it answers whoever asks, sleeps when nobody does, and survives."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fake_runner import VOCAB, FakeRunner, letters
from nybble.engine.engine import Engine, EngineOptions
from nybble.engine.loop import EngineLoop
from nybble.engine.request import Event, Grammar, Request, SamplingParams
from nybble.engine.runner import Work
from nybble.engine.sampler import Sampler
from nybble.errors import Busy, ContextTooLong, EngineError, MissingExtra
from nybble.kernels.compute import Compute
from nybble.models.numbers import Numbers

PATIENCE_S = 60  # before a test that hangs fails; nothing is measured by it


class GatedRunner(FakeRunner):
    """Computes only while its gate is open."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, works: Sequence[Work]) -> Tensor:
        assert self.gate.wait(PATIENCE_S)
        return super().forward(works)


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    options = EngineOptions(max_sequences=2, max_batched_tokens=128, page_tokens=16)
    numbers = Numbers(60, "pages"), Numbers(2, "slots")
    tokenizer = letters(tmp_path_factory.mktemp("letters"))
    sampler = Sampler(VOCAB, Compute(threads=1))
    return Engine(GatedRunner(options, *numbers), tokenizer, options, *numbers, 500, sampler)


@pytest.fixture
def loop(engine: Engine) -> Iterator[EngineLoop]:
    made = EngineLoop(engine, max_waiting=3)
    yield made
    gate(made).set()
    made.stop()
    assert not made.is_alive
    engine.check()


def gate(loop: EngineLoop) -> threading.Event:
    assert isinstance(loop.engine.runner, GatedRunner)
    return loop.engine.runner.gate


def ask(id: str, tokens: int = 5, **options: Any) -> Request:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **options)
    return Request(id, (1, 2, 3, 4), params)


def listen(loop: EngineLoop, request: Request) -> queue.Queue[Event]:
    heard: queue.Queue[Event] = queue.Queue()
    loop.submit(request, heard.put)
    return heard


def wait_until(is_so: Callable[[], bool]) -> None:
    patience = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < patience
        time.sleep(0.001)


def ends(heard: queue.Queue[Event], choices: int = 1) -> tuple[list[str], list[str], int]:
    """How the choices ended, with what errors, and how many tokens came before."""
    finishes, errors, tokens = [], [], 0
    while len(finishes) < choices:
        event = heard.get(timeout=PATIENCE_S)
        tokens += event.token is not None
        finish = event.finish or (event.token.finish if event.token else "")
        if finish:
            finishes.append(finish)
            errors.append(event.error)
    assert heard.empty()
    return finishes, errors, tokens


def test_events_come_from_the_loop(loop: EngineLoop) -> None:
    threads = set()
    done = threading.Event()

    def on_event(event: Event) -> None:
        threads.add(threading.current_thread().name)
        if event.token is not None and event.token.finish:
            done.set()

    loop.submit(ask("r"), on_event)
    assert done.wait(PATIENCE_S)
    assert threads == {"nybble-engine"}
    assert loop.stats.generated_tokens == 5


def test_an_idle_loop_sleeps(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    step = loop.engine.step
    monkeypatch.setattr(loop.engine, "step", lambda: (turns.append(1), step())[1])
    for i in range(20):
        assert ends(listen(loop, ask(str(i), 3)))[0] == ["length"]
    assert len(turns) <= 20 * (3 + 1)


def test_what_cannot_run_is_told_at_once(loop: EngineLoop) -> None:
    with pytest.raises(ContextTooLong):
        listen(loop, Request("r", (1,) * 500))
    gate(loop).clear()
    first = listen(loop, ask("r"))
    with pytest.raises(EngineError, match="already under way"):
        listen(loop, ask("r"))
    gate(loop).set()
    assert ends(first) == (["length"], [""], 5)


def test_too_many_are_told_when_to_come_again(loop: EngineLoop) -> None:
    assert ends(listen(loop, ask("before", n=2)), 2)[0] == ["length"] * 2
    gate(loop).clear()
    taken = [listen(loop, ask(str(i))) for i in range(4)]
    with pytest.raises(Busy, match="4 sequences run or wait, of 5"):
        listen(loop, ask("two", n=2))
    taken.append(listen(loop, ask("last")))
    with pytest.raises(Busy, match="5 sequences run or wait, of 5") as told:
        listen(loop, ask("more"))
    assert 1 <= told.value.retry_after_s <= 60
    gate(loop).set()
    assert [ends(heard)[0][0] for heard in taken] == ["length"] * 5
    assert ends(listen(loop, ask("again")))[0] == ["length"]


def test_the_first_to_come_too_many_waits_a_second(loop: EngineLoop) -> None:
    gate(loop).clear()
    heard = listen(loop, ask("r", n=5))
    with pytest.raises(Busy) as told:
        listen(loop, ask("more"))
    assert told.value.retry_after_s == 1
    gate(loop).set()
    assert ends(heard, 5)[2] == 25


def test_cancelling_ends_a_request(loop: EngineLoop) -> None:
    gate(loop).clear()
    running, waiting = listen(loop, ask("a", 400, n=2)), listen(loop, ask("b"))
    loop.cancel("a")
    loop.cancel("never")
    gate(loop).set()
    assert ends(running, 2)[0] == ["cancelled"] * 2
    assert ends(waiting) == (["length"], [""], 5)
    loop.cancel("a")


def test_more_choices_than_there_is_room_for_are_not_told_to_wait(loop: EngineLoop) -> None:
    with pytest.raises(EngineError, match=r"6 choices .* 5 are the most") as told:
        listen(loop, ask("r", n=6))
    assert not isinstance(told.value, Busy)


def test_all_are_taken_or_none(loop: EngineLoop) -> None:
    gate(loop).clear()
    first = listen(loop, ask("a", n=2))
    heard: queue.Queue[Event] = queue.Queue()
    with pytest.raises(Busy):
        loop.submit_all([ask("b"), ask("c", n=3)], heard.put)
    with pytest.raises(EngineError, match="'b' is already under way"):
        loop.submit_all([ask("b"), ask("b")], heard.put)
    with pytest.raises(EngineError, match="'a' is already under way"):
        loop.submit_all([ask("b"), ask("a")], heard.put)
    with pytest.raises(ContextTooLong):
        loop.submit_all([ask("b"), Request("c", (1,) * 500)], heard.put)
    loop.submit_all([ask("b"), ask("c", n=2)], heard.put)
    gate(loop).set()
    assert ends(first, 2)[0] == ["length"] * 2
    assert ends(heard, 3) == (["length"] * 3, [""] * 3, 15)


def test_places_are_those_that_have_slots(tmp_path: Path) -> None:
    options = EngineOptions(max_sequences=7, max_batched_tokens=128, page_tokens=16)
    numbers = Numbers(60, "pages"), Numbers(3, "slots")
    sampler = Sampler(VOCAB, Compute(threads=1))
    runner = GatedRunner(options, *numbers)
    made = Engine(runner, letters(tmp_path), options, *numbers, 500, sampler)
    assert made.most_sequences == 3
    loop = EngineLoop(made, max_waiting=1)
    with pytest.raises(EngineError, match=r"5 choices .* run \(3\) and wait \(1\)"):
        listen(loop, ask("r", n=5))
    loop.stop()


def test_the_pace_is_that_of_computing(loop: EngineLoop) -> None:
    """Idle time does not count, nor what was long ago."""
    gate(loop).clear()
    heard = listen(loop, ask("r", n=5))
    now = loop._clock()
    for clock, ended, expected in [
        (10.0, [], 1),
        (10.0, [2.0, 4.0, 6.0, 8.0], 2),
        (100.0, [2.0, 4.0, 6.0, 8.0], 60),
        (100.0, [2.0, 4.0, 90.0, 97.0], 7),
        (100.0, [2.0], 60),
    ]:
        loop._computed_s = clock - now
        loop._ended.extend(ended)
        with pytest.raises(Busy) as told:
            listen(loop, ask("more"))
        assert told.value.retry_after_s == expected
        loop._ended.clear()
    gate(loop).set()
    assert ends(heard, 5)[2] == 25


def test_how_long_a_step_takes_can_be_seen(loop: EngineLoop) -> None:
    assert loop.busy_since is None
    before = time.monotonic()
    gate(loop).clear()
    heard = listen(loop, ask("r"))
    while (since := loop.busy_since) is None:
        time.sleep(0.001)
    assert before <= since <= time.monotonic()
    gate(loop).set()
    ends(heard)
    wait_until(lambda: loop.busy_since is None)


def test_a_request_that_cannot_be_added_ends_alone(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add = loop.engine.add

    def broken(request: Request) -> None:
        add(request)
        if request.id == "bad":
            raise RuntimeError("a bug of ours")

    monkeypatch.setattr(loop.engine, "add", broken)
    gate(loop).clear()
    heard = [listen(loop, ask(id, n=n)) for id, n in (("a", 1), ("bad", 2), ("b", 1))]
    gate(loop).set()
    assert ends(heard[0]) == (["length"], [""], 5)
    assert ends(heard[1], 2) == (["error"] * 2, ["a bug of ours"] * 2, 0)
    assert ends(heard[2]) == (["length"], [""], 5)
    assert "'bad' could not be added" in caplog.text
    assert loop.engine.is_idle


@pytest.mark.parametrize("bad", ["add", "cancel"])
def test_a_failing_cancel_ends_all_and_the_engine_goes_on(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    cancel, add = loop.engine.cancel, loop.engine.add

    def broken(id: str) -> list[Event]:
        if id == "x":
            raise RuntimeError("a bug of ours")
        return cancel(id)

    def half(request: Request) -> None:
        add(request)
        if request.id == "x" and bad == "add":
            raise RuntimeError("another")

    monkeypatch.setattr(loop.engine, "cancel", broken)
    monkeypatch.setattr(loop.engine, "add", half)
    gate(loop).clear()
    heard = [listen(loop, ask("a", 400))]
    wait_until(lambda: loop.busy_since is not None)
    heard += [listen(loop, ask(id, 400)) for id in ("x", "b")]
    loop.cancel("x")
    gate(loop).set()
    for one in heard:
        finishes, errors, _ = ends(one)
        assert (finishes, errors) == (["error"], ["a bug of ours"])
    assert ends(listen(loop, ask("again"))) == (["length"], [""], 5)


def test_a_late_cancel_spares_the_next_of_the_same_id(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: queue.Queue[Event] = queue.Queue()
    again: queue.Queue[Event] = queue.Queue()
    check = loop.engine.check

    def on_event(event: Event) -> None:
        heard.put(event)
        if event.token is not None and event.token.finish:
            loop.cancel("r")  # of one that ends right now

    def check_and_submit() -> None:
        monkeypatch.setattr(loop.engine, "check", check)
        loop.submit(ask("r"), again.put)

    monkeypatch.setattr(loop.engine, "check", check_and_submit)
    loop.submit(ask("r"), on_event)
    assert ends(heard) == (["length"], [""], 5)
    assert ends(again) == (["length"], [""], 5)


def test_stopping_cancels(loop: EngineLoop) -> None:
    gate(loop).clear()
    heard = [listen(loop, ask(str(i), 400)) for i in range(4)]
    threading.Timer(0.01, gate(loop).set).start()
    loop.stop()
    assert [ends(one)[0] for one in heard] == [["cancelled"]] * 4
    loop.stop()
    with pytest.raises(EngineError, match="stopping"):
        listen(loop, ask("more"))


def test_a_grammar_that_is_refused_is_told_to_each_choice(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        def start(self, key: int, grammar: Grammar) -> None:
            raise MissingExtra("grammar: needs llguidance")

        def drop(self, key: int) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(loop.engine, "grammar", Refuses())
    monkeypatch.setattr(type(loop.engine.limits), "validate", lambda *_: None)
    heard = listen(loop, ask("r", n=2, grammar=Grammar("regex", "a")))
    assert ends(heard, 2) == (["error"] * 2, ["grammar: needs llguidance"] * 2, 0)
    assert ends(listen(loop, ask("s")))[0] == ["length"]


def test_a_failing_engine_ends_its_requests_and_goes_on(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate(loop).clear()
    schedule = loop.engine.scheduler.schedule
    failures = iter([ValueError("a bug of ours")])

    def broken() -> Any:
        for failure in failures:
            loop.engine.cancel("a")  # and its events are lost on the way
            raise failure
        return schedule()

    monkeypatch.setattr(loop.engine.scheduler, "schedule", broken)
    heard = [listen(loop, ask("a")), listen(loop, ask("b", n=2))]
    gate(loop).set()
    assert ends(heard[0]) == (["error"], ["a bug of ours"], 0)
    ends(heard[1], 2)  # with it or, if it came later, as it should
    assert "a bug of ours" in caplog.text
    assert ends(listen(loop, ask("c"))) == (["length"], [""], 5)


def test_a_listener_that_fails_loses_its_request_alone(
    loop: EngineLoop, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def deaf(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("gone")

    gate(loop).clear()
    loop.submit(ask("deaf", 400), deaf)
    heard = listen(loop, ask("other"))
    gate(loop).set()
    assert ends(heard) == (["length"], [""], 5)
    wait_until(lambda: len(calls) == 2)
    assert [bool(e.token) for e in calls] == [True, False]
    assert "listener failed" in caplog.text


def test_whoever_waits_for_a_dead_engine_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each choice once: the second of these has ended before."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("beyond repair")

    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(engine, "abort", broken)
    loop = EngineLoop(engine)
    heard: list[tuple[int, str, str]] = []

    def on_event(event: Event) -> None:
        finish = event.finish or (event.token.finish if event.token else "")
        if finish:
            heard.append((event.choice, finish, event.error))
            engine.scheduler.schedule = broken  # type: ignore[method-assign]

    loop.submit(ask("r", 100, n=2, temperature=1.0, seed=1, stop=("a", "e", "i")), on_event)
    wait_until(lambda: not loop.is_alive)
    loop.stop()
    assert not loop.is_alive
    assert [finish for _, finish, _ in heard] == ["stop", "error"]
    assert heard[1][2] == "the engine has stopped"
    assert {choice for choice, _, _ in heard} == {0, 1}
    with pytest.raises(EngineError, match="stopping"):
        listen(loop, ask("more"))


@pytest.mark.parametrize("wrong", [-1, 1.0, True])
def test_a_queue_has_a_length(engine: Engine, wrong: Any) -> None:
    with pytest.raises(EngineError, match="max_waiting"):
        EngineLoop(engine, max_waiting=wrong)


def test_many_threads_get_what_one_would(engine: Engine) -> None:
    loop = EngineLoop(engine)
    found: dict[str, list[Event]] = {}

    def user(name: str) -> None:
        heard = listen(loop, ask(name, temperature=1.0, seed=int(name) % 3))
        found[name] = [heard.get(timeout=PATIENCE_S) for _ in range(5)]

    threads = [threading.Thread(target=user, args=(str(i),)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.stop()
    assert len(found) == 24
    for name, events in found.items():
        alike = found[str(int(name) % 3)]
        assert [e.token for e in events] == [e.token for e in alike]
