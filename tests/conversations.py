"""Conversations with engines of real models, every row of logits noted, so that two runs can be
compared bit by bit: with a prefix cache, drafts, preemption and neighbours, or without.

What the turns of a conversation say comes from the engine itself, run plainly: so the next prompt
holds text that an engine with a cache has generated, and has kept.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import tiny
from nybble.api.llm import OpenOptions, open_engine
from nybble.engine.drafter import Ask, Drafter
from nybble.engine.engine import Engine
from nybble.engine.model_runner import ModelRunner
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import Guess
from nybble.engine.sampler import Choice, Row, Sampler
from nybble.engine.speculation import Speculation

CARRIED = tiny.MODELS / "hybrid-chat-mtp"
PROMPTS = tiny.TESTS / "fixtures" / "prompts" / "hybrid-chat-mtp.json"

#: In GiB, what leaves room for everything that the small models here do, and what holds four
#: sequences of the carried model, with three drafts each, and a dozen snapshots.
ROOMY, TIGHT = 0.5, 0.02

#: A text's name: its prompt, the number of the choice, and which options it was asked with.
Name = tuple[tuple[int, ...], int, int]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """How an engine is opened, and what happens to it. `preempt`: every so many steps the last in
    turn is preempted; `apart`: requests run one after another. The default is what is shipped, but
    for the memory."""

    kv: str = "auto"
    cache: bool = True
    exact: bool = False
    draft: str = "auto"
    drafts: int | None = None
    batched: int = 1024
    memory: float = ROOMY
    preempt: int = 0
    apart: bool = False

    @property
    def plain(self) -> Setting:
        """Without all that may change no bit."""
        return Setting(kv=self.kv, cache=False, draft="off", apart=True)

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in self.__dict__.items() if v != getattr(Setting(), k)]
        return "-".join(changed) or "shipped"


#: What is shipped, with much memory and with little, and with the flag that allows no other bit.
SHIPPED = (Setting(), Setting(memory=TIGHT), Setting(exact=True, memory=TIGHT))


class NotingSampler(Sampler):
    """Notes the logits of every row it is given, before they are altered."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(sampler.vocab, sampler.compute)
        self.rows: dict[Name, dict[int, Logits]] = defaultdict(dict)

    def sample(
        self, logits: Tensor, rows: Sequence[Row], ahead: Sequence[int] | None = None
    ) -> list[Choice]:
        later = ahead or [0] * len(rows)
        for row, by, found in zip(rows, later, logits.numpy(), strict=True):
            name = (tuple(row.prompt), row.choice, id(row.params))
            self.rows[name][row.position + by] = found.copy()
        return super().sample(logits, rows, ahead)


@dataclass(frozen=True)
class Guessed:
    """What is guessed to follow a text, and the bits of the logits of the first guess, none where
    no MTP head guesses."""

    drafts: Sequence[int]
    bits: bytes = b""

    def is_like(self, other: Guessed, *, is_free: bool) -> bool:
        """Whether it is the same, as far as both go: a policy, or the end of the pages, may ask
        for fewer. `is_free`: its bits need not be."""
        both = min(len(self.drafts), len(other.drafts))
        is_same = list(self.drafts[:both]) == list(other.drafts[:both])
        return is_same and (is_free or self.bits == other.bits)


class NotingDrafter:
    """Notes what is guessed to follow each text. `spoils` it then, so that no draft is right and
    each text is met."""

    def __init__(self, drafter: Drafter, runner: ModelRunner, *, spoils: bool = False) -> None:
        self._drafter, self._spoils, self._runner = drafter, spoils, runner
        self.guessed: dict[tuple[int, ...], Guessed] = {}
        self._rows: dict[int, bytes] = {}
        if drafter.needs_hidden:
            self._note_rows()

    def _note_rows(self) -> None:
        head = self._runner._mtp
        assert head is not None
        draft = head.draft

        def noted(guesses: Sequence[Guess]) -> list[list[int]]:
            found = draft(guesses)
            for guess, row in zip(guesses, head.logits.numpy(), strict=False):
                self._rows[id(guess)] = row.tobytes()
            return found

        head.draft = noted  # type: ignore[method-assign]

    @property
    def needs_hidden(self) -> bool:
        return self._drafter.needs_hidden

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        self._rows = {}
        found = self._drafter.draft(asks)
        for ask, drafts in zip(asks, found, strict=True):
            if drafts:
                bits = self._rows[id(ask.guess)] if self._drafter.needs_hidden else b""
                self.guessed[*ask.prompt, *ask.output] = Guessed(drafts, bits)
        if self._spoils:
            vocab = self._runner.vocab
            return [[(token + 1) % vocab for token in drafts] for drafts in found]
        return found

    def drop(self, key: int) -> None:
        self._drafter.drop(key)


@dataclass
class Said:
    """One choice of a request: its tokens, the logits that each was sampled from, what came of the
    cache, and how it ended."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    rows: list[Logits] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cached: int = 0
    missed: str = ""
    finish: str = ""
    error: str = ""


Spoken = dict[tuple[str, int], Said]


class Talker:
    """An engine that is listened to. Its clock says that drafts pay, so that its policy does the
    same today and tomorrow."""

    def __init__(self, folder: Path, setting: Setting, *, spoils: bool = False) -> None:
        options = OpenOptions(
            memory=setting.memory,
            kv_cache_dtype=setting.kv,  # type: ignore[arg-type]
            max_batched_tokens=setting.batched,
            prefix_cache=setting.cache,
            exact=setting.exact,
            draft=setting.draft,  # type: ignore[arg-type]
            draft_tokens=setting.drafts,
            threads=2,
        )
        self.setting = setting
        self.engine: Engine = open_engine(folder, options)
        self.sampler = self.engine.sampler = NotingSampler(self.engine.sampler)
        self.drafter: NotingDrafter | None = None
        if self.engine._drafting is not None:
            runner = self.engine.runner
            assert isinstance(runner, ModelRunner)
            self.drafter = NotingDrafter(self.engine._drafting.drafter, runner, spoils=spoils)
            self.engine._drafting.drafter = self.drafter
            self._pay(self.engine._drafting.speculation)
        self._steps = 0
        self._asked: dict[str, Request] = {}
        self._spoken: Spoken = {}

    def _pay(self, policy: Speculation) -> None:
        note = policy.note_step

        def note_step(sequences: int, rows: int, seconds: float, draft_seconds: float) -> None:
            note(sequences, rows, 1 + 0.05 * rows, 0.02)

        policy.note_step = note_step  # type: ignore[method-assign]

    def hold(self, request: Request) -> None:
        """Let a request run beside what is said; `release` it later."""
        self.engine.add(request)
        self._asked[request.id] = request

    def release(self, request: Request) -> Spoken:
        """All that is generated for a request under way."""
        choices = [(request.id, choice) for choice in range(request.params.n)]
        while not all(c in self._spoken and self._spoken[c].finish for c in choices):
            self.step()
        del self._asked[request.id]
        return {choice: self._spoken.pop(choice) for choice in choices}

    def say(self, requests: Sequence[Request]) -> Spoken:
        """All that is generated for some requests."""
        found: Spoken = {}
        for group in [[r] for r in requests] if self.setting.apart else [list(requests)]:
            for request in group:
                self.hold(request)
            for request in group:
                found |= self.release(request)
        return found

    def other_guesses(self, expected: Mapping[tuple[int, ...], Guessed], *, is_free: bool) -> float:
        """The share of what an MTP head has guessed since the last call that was not expected;
        `is_free`: with other bits it may be."""
        if self.drafter is None or not self.drafter.needs_hidden:
            return 0.0
        guessed, self.drafter.guessed = self.drafter.guessed, {}
        met = guessed.keys() & expected.keys()
        others = [t for t in met if not guessed[t].is_like(expected[t], is_free=is_free)]
        return len(others) / max(1, len(met))

    def heard(self, id: str) -> Said:
        """What was said so far by the first choice of a request that is held."""
        return self._spoken.get((id, 0), Said(()))

    def step(self) -> None:
        """A step of the engine; its pools must be whole after it."""
        scheduler = self.engine.scheduler
        self._steps += 1
        if self.setting.preempt and scheduler.running and self._steps % self.setting.preempt == 0:
            scheduler.preempt(scheduler.running[-1])
        for event in self.engine.step():
            request = self._asked[event.request]
            prompt = request.prompt
            said = self._spoken.setdefault((event.request, event.choice), Said(prompt))
            if event.cached is not None:
                said.cached, said.missed = event.cached, event.missed
            if event.token is not None:
                rows = self.sampler.rows[prompt, event.choice, id(request.params)]
                at = len(prompt) + len(said.tokens)
                assert at in rows, f"the token at {at} was sampled as though it were elsewhere"
                said.rows.append(rows[at])
                said.tokens.append(event.token.id)
                said.texts.append(event.token.text)
                said.finish = event.token.finish
            said.finish, said.error = event.finish or said.finish, event.error
        self.engine.check()


# -------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Difference:
    """Where two runs of a request part: at which token, and how far the log-probabilities are."""

    request: str
    choice: int
    at: int
    distance: float
    is_other_token: bool


def log_probabilities(row: Logits) -> NDArray[np.float64]:
    wide = row.astype(np.float64)
    wide -= wide.max()
    found: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return found


def distance(a: Logits, b: Logits) -> float:
    """The largest difference of two rows' log-probabilities, among tokens that ever come."""
    x, y = log_probabilities(a), log_probabilities(b)
    likely = (x > np.log(1e-6)) | (y > np.log(1e-6))
    return float(np.abs(x - y)[likely].max())


def differences(expected: Spoken, found: Spoken) -> list[Difference]:
    """Of each choice the places where its bits are others, up to the first token that is."""
    assert expected.keys() == found.keys()
    return [
        difference
        for (request, choice), said in expected.items()
        for difference in _parted(request, choice, said, found[request, choice])
    ]


def _parted(request: str, choice: int, expected: Said, found: Said) -> list[Difference]:
    assert expected.finish, "the plain engine has not ended it"
    assert not expected.error, expected.error
    made = []
    for at, (x, y) in enumerate(zip(expected.rows, found.rows, strict=False)):
        is_other = expected.tokens[at] != found.tokens[at]
        if is_other or x.tobytes() != y.tobytes():
            made.append(Difference(request, choice, at, distance(x, y), is_other))
        if is_other:
            return made
    same = ("tokens", "texts", "finish", "error")
    if any(getattr(expected, name) != getattr(found, name) for name in same):
        made.append(Difference(request, choice, len(expected.rows), np.inf, is_other_token=True))
    return made


# ---------------------------------------------------------------------------------- conversations


@cache
def dialogues() -> list[tuple[int, ...]]:
    """Texts of the carried model's kind."""
    found = json.loads(PROMPTS.read_text("utf-8"))["dialogues"]
    return [tuple(tokens) for tokens in found]


#: What is guessed at each text, to compare with.
MOST_GUESSED = 4

#: Options that requests of one batch differ in. The first is greedy; the others try all the rest.
PARAMS = (
    SamplingParams(max_tokens=36, ignore_eos=True, logprobs=5),
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8, seed=1, top_p=0.9, logprobs=2),
    SamplingParams(
        max_tokens=30, temperature=0.7, seed=2, presence_penalty=0.5, frequency_penalty=0.2, n=2
    ),
    SamplingParams(max_tokens=33, ignore_eos=True, repetition_penalty=1.1, min_tokens=8),
    SamplingParams(max_tokens=28, temperature=1.0, seed=3, min_p=0.05, top_k=40, stop=(" the",)),
    SamplingParams(
        max_tokens=25, ignore_eos=True, seed=4, temperature=0.5, logit_bias={300: 4.0, 17: -100.0}
    ),
)


def openings() -> list[tuple[int, ...]]:
    """First prompts: four with one long beginning, one that parts in the middle of it, another."""
    d = dialogues()
    system = (*d[3], *d[8])
    return [
        (*system, *d[4]),
        (*system, *d[7]),
        (*system, *d[9][:9]),
        (*system[:170], *d[2], *d[5]),
        d[10],
        (*system, *d[16]),
    ]


#: Which of them begin first, and which when these have left something. The last is somebody
#: else's, who has a key of his own.
FIRST, SECOND = (0, 3, 4), (1, 2, 5)
STRANGER = b"another key"


@dataclass(frozen=True)
class Script:
    """The requests of each turn, made with the answers that a plain engine gave; what it said to
    each turn; and what an MTP head guesses to follow each text, where there is one. In the first
    two turns no prompt holds generated text."""

    folder: Path
    kv: str
    turns: tuple[tuple[Request, ...], ...]
    said: tuple[Spoken, ...]
    guessed: Mapping[tuple[int, ...], Guessed]


@cache
def script(folder: Path, kv: str, rounds: int = 2, vocab: int = 4096) -> Script:
    """Conversations with a plain engine: some begin, then others that begin alike, then all go on
    for some rounds. Prompts for a smaller vocabulary are folded into it."""
    talker = Talker(folder, Setting(kv=kv).plain)
    prompts = [tuple(t % vocab for t in prompt) for prompt in openings()]
    asked, answered = [], []
    for turn, speakers in enumerate((FIRST, SECOND, *[range(len(prompts))] * rounds)):
        requests = tuple(_request(turn, i, prompts[i], vocab) for i in speakers)
        said = talker.say(requests)
        assert not any(answer.error for answer in said.values())
        asked.append(requests)
        answered.append(said)
        for i, request in zip(speakers, requests, strict=True):
            answer = said[request.id, 0].tokens
            prompts[i] = (*request.prompt, *answer, *_user(turn, i, vocab))
    turns = tuple(asked)
    return Script(folder, kv, turns, tuple(answered), _guessed(folder, kv, turns))


def _guessed(
    folder: Path, kv: str, turns: Sequence[Sequence[Request]]
) -> Mapping[tuple[int, ...], Guessed]:
    setting = replace(Setting(kv=kv).plain, draft="auto", drafts=MOST_GUESSED)
    talker = Talker(folder, setting, spoils=True)
    for requests in turns:
        talker.say(requests)
    assert talker.drafter is not None
    return talker.drafter.guessed if talker.drafter.needs_hidden else {}


def _request(turn: int, i: int, prompt: tuple[int, ...], vocab: int) -> Request:
    params = PARAMS[i]
    biases = {token % vocab: bias for token, bias in params.logit_bias.items()}
    salt = STRANGER if i == SECOND[-1] else b""
    return Request(f"{turn}.{i}", prompt, replace(params, logit_bias=biases), salt=salt)


def _user(turn: int, i: int, vocab: int) -> tuple[int, ...]:
    """What a user says next."""
    text = dialogues()[(11 + 5 * turn + i) % 32]
    return tuple(t % vocab for t in text[: 20 + 13 * i])


# --------------------------------------------------------------------------------- the comparison

#: How far log-probabilities of tokens above 1e-6 are, at most, where a prompt goes on from a state
#: that decoding left, on the carried model: measured 0.04 over the conversations here.
DECODED_BOUND = 0.1
#: Of the drafts there, how many may be others: a head's guesses part where two are as likely.
DECODED_GUESSES = 0.05


def check(setting: Setting, asked: Script, bound: float = 0.0) -> Talker:
    """All that is said and guessed is equal; but within `bound` where a prompt may go on from
    generated text: where another token comes, it was as near as that, and the texts part."""
    talker = Talker(asked.folder, setting)
    for number, (requests, expected) in enumerate(zip(asked.turns, asked.said, strict=True)):
        said = talker.say(requests)
        parted = differences(expected, said)
        is_free = number > 1 and setting.cache and not setting.exact and bound > 0
        assert all(d.distance <= (bound if is_free else -1.0) for d in parted), parted
        share = talker.other_guesses(asked.guessed, is_free=is_free)
        assert share <= (DECODED_GUESSES if is_free else 0.0), f"{share:.1%} of guesses are others"
        for request in requests:
            # Preempted before it answers, it finds what it left itself.
            is_first = number < 2 and not setting.preempt
            assert not (is_first and request.salt and said[request.id, 0].cached), "a leak"
    return talker
