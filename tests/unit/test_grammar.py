"""Masks leave what the grammar allows, bombs harm nobody else, and what was lost with a process is
brought back."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.engine.grammar import GrammarLimits, GrammarWorker
from nybble.engine.request import Grammar, SamplingParams
from nybble.engine.sampler import Row, Sampler
from nybble.errors import EngineError, MissingExtra
from nybble.kernels.compute import Compute
from nybble.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

CHAT = Path(__file__).parents[2] / "models" / "hybrid-chat-mtp"
TOKENIZER = Tokenizer.open(CHAT)
SIZE = TOKENIZER.vocab_size
#: As models have them: more logits than tokens, and no multiple of 32.
VOCAB = SIZE + 77
EOS = sorted(TOKENIZER.eos_ids)
#: llguidance works at it for minutes.
BOMB = json.dumps(
    {"allOf": [{"type": "string", "pattern": "a.{%d}b" % i} for i in range(3, 60)]}  # noqa: UP031
)


def worker(limits: GrammarLimits | None = None) -> GrammarWorker:
    return GrammarWorker(CHAT / "tokenizer.json", VOCAB, EOS, limits)


@pytest.fixture(scope="module")
def shared() -> Iterator[GrammarWorker]:
    found = worker()
    yield found
    found.close()


@pytest.fixture
def key() -> int:
    """One that was not used."""
    return next(_keys)


_keys = iter(range(10**6))


def allowed(mask: bytes) -> list[int]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()


def mask_of(found: GrammarWorker, key: int) -> list[int]:
    return allowed(found.masks([key])[0])


def feed(found: GrammarWorker, key: int, text: str) -> bool:
    """Accept a text's tokens; whether it is complete."""
    return [found.accept(key, token) for token in TOKENIZER.encode(text)][-1]


def generate(
    found: GrammarWorker, key: int, seed: int, most: int = 800, liked: Sequence[int] = ()
) -> str:
    """A text drawn from what the masks allow, as the engine would, with `liked` tokens far likelier
    than others. Raises if it does not end."""
    sampler, random_ = Sampler(VOCAB, Compute(threads=1)), np.random.default_rng(seed)
    params = SamplingParams(temperature=1.0)
    tokens: list[int] = []
    for position in range(most):
        logits = torch.from_numpy(random_.normal(size=(1, VOCAB)).astype(np.float32))
        logits[0, list(liked)] += 12
        row = Row(params, seed, 0, position, mask=found.masks([key])[0])
        (choice,) = sampler.sample(logits, [row])
        assert not choice.error
        if choice.token in EOS:
            return TOKENIZER.decode(tokens)
        tokens.append(choice.token)
        if found.accept(key, choice.token):
            return TOKENIZER.decode(tokens)
    raise AssertionError(f"no end after {most} tokens: {TOKENIZER.decode(tokens)}")


# ------------------------------------------------------------------------------ what is generated


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that these tests use."""
    kind = schema.get("type")
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if kind == "object":
        known = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", ())) <= set(value) <= set(known)
            and all(valid(value[name], known[name]) for name in value)
        )
    if kind == "array":
        sizes = schema.get("minItems", 0), schema["maxItems"]
        return (
            isinstance(value, list)
            and sizes[0] <= len(value) <= sizes[1]
            and all(valid(item, schema["items"]) for item in value)
        )
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and schema["minimum"] <= value <= schema["maximum"]
    return isinstance(value, bool) if kind == "boolean" else value is None


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties)[:1],
        "additionalProperties": False,
    }


WORD = {"type": "string", "maxLength": 6}
SMALL = {"type": "integer", "minimum": -7, "maximum": 120}
SCHEMAS = {
    "flat": closed(name=WORD, age=SMALL, alive={"type": "boolean"}),
    "nested": closed(a=closed(b=closed(c=SMALL, d={"type": "null"}))),
    "array": {"type": "array", "items": closed(x=SMALL), "minItems": 1, "maxItems": 3},
    "choice": closed(v={"anyOf": [SMALL, WORD, {"type": "null"}]}, w={"enum": ["ä", "b c", 3]}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_generated_is_valid(shared: GrammarWorker, name: str) -> None:
    text = json.dumps(SCHEMAS[name])
    for seed in range(4):
        key = next(_keys)
        shared.start(key, Grammar("json_schema", text))
        assert valid(json.loads(generate(shared, key, seed)), SCHEMAS[name])
        shared.drop(key)


def test_any_object_is_an_object(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("json_object"))
    assert not feed(shared, key, '{"a": [1, {"b": null}]')
    assert feed(shared, key, "}")
    other = next(_keys)
    shared.start(other, Grammar("json_object"))
    with pytest.raises(EngineError, match="grammar"):
        feed(shared, other, "[1]")


def test_any_json_need_be_no_object(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("json_schema"))
    assert feed(shared, key, '["a", 1]')


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"[a-f]{2,5}(-\d\d?){1,3}", r"[a-f]{2,5}(-\d\d?){1,3}"),
        ("lark", 'start: "x" n ("," n)~1..2\nn: /[0-9]{1,3}/', r"x\d{1,3}(,\d{1,3}){1,2}"),
    ],
)
def test_expressions_and_grammars(
    shared: GrammarWorker, kind: Any, text: str, pattern: str
) -> None:
    for seed in range(4):
        key = next(_keys)
        shared.start(key, Grammar(kind, text))
        assert re.fullmatch(pattern, generate(shared, key, seed))


def test_the_end_is_allowed_where_the_grammar_accepts(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("regex", "(ab)*"))
    for text, may_end in (("", True), ("a", False), ("b", True), ("a", False)):
        if text:
            assert not feed(shared, key, text)
        assert [e in mask_of(shared, key) for e in EOS] == [may_end] * len(EOS)


def test_a_finished_text_is_complete(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("regex", "abc"))
    assert feed(shared, key, "abc")


def test_tokens_that_are_not_there_are_never_allowed(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("regex", r"(.|\n)*"))
    (mask,) = shared.masks([key])
    assert len(mask) * 8 >= VOCAB
    found = allowed(mask)
    assert max(found) < SIZE
    assert len(found) > SIZE // 2


def test_spaces_come_to_an_end(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("json_object"))
    feed(shared, key, "{")
    space = TOKENIZER.encode(" ")[0]
    count = 0
    while space in mask_of(shared, key):
        shared.accept(key, space)
        count += 1
        assert count <= 1


@pytest.mark.parametrize("text", ['{"a": true}', '{\n    "a": true\n}', '{"a":true}'])
def test_usual_spaces_are_allowed(shared: GrammarWorker, key: int, text: str) -> None:
    shared.start(key, Grammar("json_schema", json.dumps(closed(a={"type": "boolean"}))))
    assert feed(shared, key, text)


@pytest.mark.parametrize("seed", range(4))
def test_between_two_pieces_of_json_is_one_space_or_one_line(
    shared: GrammarWorker, key: int, seed: int
) -> None:
    shared.start(key, Grammar("json_schema", json.dumps(closed(a={"type": "boolean"}))))
    spaces = [i for i in range(SIZE) if TOKENIZER.decode([i]).isspace()]
    assert len(spaces) > 2
    text = generate(shared, key, seed, liked=spaces)
    gaps = re.findall(r"\s+", text)
    assert len(gaps) >= 3  # spaces were liked
    assert all(re.fullmatch(r" |\n {0,40}", gap) for gap in gaps)
    assert json.loads(text).keys() == {"a"}


def test_equal_grammars_of_two_sequences_go_their_own_ways(shared: GrammarWorker) -> None:
    first, second = next(_keys), next(_keys)
    for key in (first, second):
        shared.start(key, Grammar("regex", "abcd|xyz"))
    feed(shared, first, "ab")
    before = shared.masks([first, second])
    assert before[0] != before[1]
    assert "c" in {TOKENIZER.decode([t]) for t in allowed(before[0])}
    assert "x" in {TOKENIZER.decode([t]) for t in allowed(before[1])}
    assert shared.masks([second, first]) == before[::-1]


def test_masks_are_found_between_asking_and_collecting(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("regex", "abc"))
    wanted = shared.masks([key])
    shared.ask([key])
    assert shared.collect() == wanted
    shared.ask([key])
    shared.drop(key)
    assert shared.collect() == [b""]


# ------------------------------------------------------------------------------------- bad grammars


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "{"),
        ("json_schema", "[1]"),
        ("json_schema", '{"type": "no such type"}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("json_schema", "[" * 100_000),
        ("regex", "(a"),
        ("lark", "start: nowhere"),
    ],
)
def test_what_is_no_grammar_is_refused(
    shared: GrammarWorker, key: int, kind: Any, text: str
) -> None:
    good = next(_keys)
    shared.start(good, Grammar("regex", "abc"))
    shared.start(key, Grammar(kind, text))
    assert shared.masks([key, good])[0] == b""
    with pytest.raises(EngineError, match="grammar: "):
        shared.is_ready(key)
    with pytest.raises(EngineError, match="grammar: "):
        shared.accept(key, 5)
    assert shared.failure(key).startswith("grammar: ")
    assert feed(shared, good, "abc")


def test_a_token_that_is_not_allowed_is_an_error(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("regex", "abc"))
    with pytest.raises(EngineError, match="grammar"):
        feed(shared, key, "x")
    assert shared.masks([key]) == [b""]


def test_a_key_is_used_once(shared: GrammarWorker, key: int) -> None:
    shared.start(key, Grammar("regex", "abc"))
    with pytest.raises(EngineError, match="in use"):
        shared.start(key, Grammar("regex", "abc"))
    shared.drop(key)
    shared.drop(key)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"nybble\[serve\]"):
        worker().start(1, Grammar("json_object"))


def test_a_tokenizer_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("tokenizer.json", "absent.json"):
        found = GrammarWorker(tmp_path / name, VOCAB, EOS)
        found.start(1, Grammar("regex", "a"))
        found.start(2, Grammar("regex", "a"))
        assert found.masks([1, 2]) == [b"", b""]
        assert "cannot use the tokenizer" in found.failure(2)
        found.close()


# -------------------------------------------------------------------------------------------- bombs


def nested(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for i in range(depth):
        schema = {"oneOf": [{"type": "integer"}, closed(**{f"x{i}": schema})]}
    return json.dumps(schema)


def branching(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for i in range(depth):
        schema = {"oneOf": [schema, closed(**{f"x{i}": schema})]}
    return json.dumps(schema)


def lines(count: int) -> str:
    words = {f"p{i}": {"type": "string", "pattern": f"^(a|b){{1,{i}}}$"} for i in range(1, count)}
    return json.dumps(closed(**words), indent=1)


RECURSIVE = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, SMALL]}}}
CORPUS = {
    **{f"nested oneOf {depth}": ("json_schema", nested(depth)) for depth in (1, 2, 8, 31, 64)},
    **{f"branching oneOf {depth}": ("json_schema", branching(depth)) for depth in (4, 12)},
    "recursion": ("json_schema", json.dumps(RECURSIVE)),
    "recursion without end": ("json_schema", '{"$ref": "#"}'),
    "1,000 lines": ("json_schema", lines(200)),
    "nested repetition": ("regex", "(a+)+$"),
    "long repetition": ("regex", "a{1,100000}"),
    "repetition of repetitions": ("regex", "((a{1,100}){1,100}){1,100}"),
    "three crossings": ("lark", "start: A\nA: /(.*a.{12})/ & /(.*b.{13})/ & ~/(.*c.{14})/"),
    "ambiguity": ("lark", 'start: s\ns: s s | "a" | s s s'),
    "bomb": ("json_schema", BOMB),
}


@pytest.mark.parametrize("name", CORPUS)
def test_each_ends_in_time_and_harms_no_other(name: str, bombed: GrammarWorker) -> None:
    kind, text = CORPUS[name]
    good, key = next(_keys), next(_keys)
    bombed.start(good, Grammar("regex", "abc"))
    feed(bombed, good, "a")
    wanted = bombed.masks([good])
    bombed.start(key, Grammar(kind, text))  # type: ignore[arg-type]
    start = time.monotonic()
    (mask,) = bombed.masks([key])
    assert time.monotonic() - start < LIMITS.compile_s + LIMITS.open_s
    assert bool(mask) != bool(bombed.failure(key))
    for _ in range(20):  # as far as it goes
        tokens = allowed(mask)
        if not tokens:
            break
        bombed.accept(key, random.Random(len(tokens)).choice(tokens))
        (mask,) = bombed.masks([key])
    assert bombed.masks([good]) == wanted
    assert feed(bombed, good, "bc")


LIMITS = GrammarLimits(compile_s=1.0)


@pytest.fixture(scope="module")
def bombed() -> Iterator[GrammarWorker]:
    found = worker(LIMITS)
    yield found
    found.close()


def test_others_go_on_while_one_compiles_and_after_it_was_ended() -> None:
    found = worker(GrammarLimits(compile_s=2.0))
    found.start(1, Grammar("regex", "(abc)+"))
    feed(found, 1, "abca")
    wanted = found.masks([1])
    found.start(2, Grammar("json_schema", BOMB))
    count = 0
    process = found._child
    while found._child is process:
        assert found.masks([1]) == wanted
        count += 1
        try:
            assert not found.is_ready(2)
        except EngineError as error:
            assert "more than 2 s" in str(error)  # noqa: PT017
            break
    assert count >= 5
    assert found.failure(2)
    assert found.masks([1]) == wanted
    found.close()


def test_a_bomb_that_was_dropped_ends_too() -> None:
    found = worker(GrammarLimits(compile_s=0.3))
    found.start(1, Grammar("regex", "abc"))
    feed(found, 1, "a")
    found.start(2, Grammar("json_schema", BOMB))
    found.drop(2)
    process = found._child
    assert process is not None
    process._process.wait(timeout=60)
    assert feed(found, 1, "bc")
    found.close()


def test_too_much_memory_ends_the_one_who_takes_it() -> None:
    names = range(20_000)
    rules = "\n".join(f'r{i}: "{i}" r{(i * 7) % 20_000} | "x{i}"' for i in names)
    huge = "start: " + " | ".join(f"r{i}" for i in names) + "\n" + rules
    found = worker(GrammarLimits(compile_s=60.0, memory_bytes=40 << 20))
    found.start(1, Grammar("regex", "abc"))
    feed(found, 1, "a")
    found.start(2, Grammar("lark", huge))
    assert found.masks([2]) == [b""]
    assert "GiB" in found.failure(2)
    assert feed(found, 1, "bc")
    found.close()


# --------------------------------------------------------------------------------------- accidents


def pid(found: GrammarWorker) -> int:
    assert found._child is not None
    return found._child._process.pid


def test_a_killed_process_is_replaced_and_nothing_is_lost() -> None:
    found = worker()
    for key, text in ((1, "ab"), (2, "abca"), (3, "")):
        found.start(key, Grammar("regex", "(abc)+"))
        if text:
            feed(found, key, text)
    wanted = found.masks([1, 2, 3])
    os.kill(pid(found), signal.SIGKILL)
    assert found.masks([1, 2, 3]) == wanted
    os.kill(pid(found), signal.SIGKILL)
    assert not feed(found, 1, "c")
    assert found.masks([2, 3]) == wanted[1:]
    os.kill(pid(found), signal.SIGKILL)
    while not found.is_ready(1):
        time.sleep(0.01)
    found.close()


def test_a_process_that_is_killed_again_and_again_is_given_up() -> None:
    found = worker()
    found.start(1, Grammar("regex", "abc"))
    for _ in range(2):
        assert not found.failure(1)
        process = pid(found)
        os.kill(process, signal.SIGKILL)
        found._child._process.wait()  # type: ignore[union-attr]
        with suppress(EngineError):
            found.is_ready(1)
    assert "exit -9" in found.failure(1)
    found.close()


def stuck(do: Callable[[GrammarWorker], object]) -> None:
    """While the process does nothing: the one who waits for it fails, the other is served."""
    found = worker(GrammarLimits(step_s=0.3))
    for key in (1, 2):
        found.start(key, Grammar("regex", "(abc)+"))
    wanted = found.masks([1, 2])
    os.kill(pid(found), signal.SIGSTOP)
    do(found)
    assert "too long" in found.failure(1)
    assert found.masks([2]) == wanted[1:]
    found.close()


def test_a_mask_that_does_not_come() -> None:
    stuck(lambda found: found.masks([1, 2]))


def test_a_token_that_is_not_taken() -> None:
    def accept(found: GrammarWorker) -> None:
        with pytest.raises(EngineError, match="too long"):
            found.accept(1, TOKENIZER.encode("a")[0])

    stuck(accept)


def no_process(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_process_that_cannot_begin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = worker()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_process)
        with pytest.raises(EngineError, match=r"^grammar: .*Too many open files"):
            found.start(1, Grammar("regex", "abc"))
    found.start(1, Grammar("regex", "abc"))
    assert feed(found, 1, "abc")
    found.close()


def test_a_process_that_cannot_begin_again_fails_its_grammars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And raises nothing that would end others in the step."""
    found = worker()
    found.start(1, Grammar("regex", "(abc)+"))
    found.start(2, Grammar("regex", "(abc)+"))
    found.masks([1, 2])
    os.kill(pid(found), signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_process)
        assert found.masks([1, 2]) == [b"", b""]
        for key in (1, 2):
            assert found.failure(key).startswith("grammar: ")
            assert "Too many open files" in found.failure(key)
            with pytest.raises(EngineError, match="Too many open files"):
                found.is_ready(key)
            with pytest.raises(EngineError, match="Too many open files"):
                found.accept(key, 5)
            found.drop(key)
    found.start(3, Grammar("regex", "abc"))
    assert feed(found, 3, "abc")
    found.close()


def test_a_broken_pipe_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    found = worker()
    found.start(1, Grammar("regex", "(abc)+"))
    wanted = found.masks([1])
    write, failures = os.write, iter([OSError(errno.EIO, "Input/output error")])

    def broken(to: int, data: bytes) -> int:
        for failure in failures:
            raise failure
        return write(to, data)

    monkeypatch.setattr(os, "write", broken)
    found.start(2, Grammar("regex", "(abc)+"))  # is not written
    with pytest.raises(EngineError, match=r"^grammar: .*Input/output error"):
        found.is_ready(2)
    assert found.masks([1]) == wanted
    found.close()


def test_many_open_files_are_no_hindrance() -> None:
    """select() knows numbers up to 1,023; a server of many connections has higher ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
    taken: list[int] = []
    try:
        while not taken or taken[-1] < 1100:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        found = worker()
        found.start(1, Grammar("regex", "abc"))
        assert feed(found, 1, "abc")
        found.close()
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_goes_on_after_it_was_closed() -> None:
    found = worker()
    for _ in range(2):
        found.start(1, Grammar("regex", "abc"))
        process = pid(found)
        assert feed(found, 1, "abc")
        found.close()
        assert not Path(f"/proc/{process}").exists()
