"""`nybble bench engine --multi-turn`: what the prefix cache and drafting save an agent.

A conversation with rules and tools in front goes back and forth; every prompt is all that was said
before and the next message, and what was said are the engine's own answers. The same prompts go to
the engine as it was asked for and to one without cache and drafts, in turn, so that a busy moment
hits both. Tokens are chosen greedily, all conversations begin with an empty cache.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.agent_text import QUESTIONS, RULES, tools
from nybble.api.conditions import Conditions, Watch, conditions
from nybble.api.extras import needs_torch
from nybble.api.traffic import Traffic, read_traffic
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import ContextTooLong, EngineError, TextError
from nybble.progress import Progress
from nybble.text.chat import ChatTemplate, TemplateError
from nybble.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nybble.api.opening import OpenOptions
    from nybble.engine.engine import Engine
    from nybble.engine.limits import EngineStats
    from nybble.engine.request import Event, Request

MOST_TURNS = 64
#: Tokens of rules and tools, where nobody says how many and the context has room for them.
PROMPT = 3_000
#: One conversation runs at a time; the engine has room for a few, as a served one has.
_SEQUENCES = 4
_ANSWER = "the answer that was given here"
#: Tokens of rules and tools at least, those that a cut may add, and those of a prompt to warm up.
_LEAST_PROMPT = 16
_SLACK = 16
_WARM = 130


@dataclass(frozen=True, slots=True)
class TurnsOptions:
    """Sizes: turns of a conversation, tokens of rules and tools in front (None: PROMPT, or fewer
    where the context is short), tokens of each answer, and how many conversations."""

    turns: int = 8
    prompt: int | None = None
    answer: int = 64
    repeats: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (
            ("turns", 1, MOST_TURNS),
            ("prompt", _LEAST_PROMPT, 1 << 20),
            ("answer", 2, 1 << 16),
            ("repeats", 1, 1 << 10),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise EngineError(f"{name} must be from {least} to {most:,}, found {value}")


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation without its answers, as token ids: the first prompt, and what comes after each
    answer up to where the next one begins."""

    opening: tuple[int, ...]
    follow: tuple[tuple[int, ...], ...]

    def tokens(self, answer: int) -> int:
        """All tokens of the conversation, with so many in each answer."""
        turns = 1 + len(self.follow)
        return len(self.opening) + sum(map(len, self.follow)) + turns * answer


def write_script(
    tokenizer: Tokenizer, template: ChatTemplate | None, turns: int, prompt: int
) -> Script:
    """A conversation of so many turns behind so many tokens of rules and tools; in the form of the
    template, or where there is none, with the token between turns that ends a text.

    Raises TextError for a template that leaves out what an assistant said.
    """
    head = _head(tokenizer, prompt)
    asked = list(itertools.islice(itertools.cycle(QUESTIONS), turns))
    if template is not None:
        return _rendered(tokenizer, template, head, asked)
    end = tuple(sorted(tokenizer.eos_ids)[:1])
    follow = tuple((*end, *tokenizer.encode(f"\n{q}\n", add_special=False)) for q in asked)
    opening = (*tokenizer.encode(head, add_special=True), *follow[0])
    return Script(opening, follow[1:])


def _head(tokenizer: Tokenizer, prompt: int) -> str:
    """So many tokens of rules and tools, give or take one where the text is cut."""
    ids, more = tokenizer.encode(RULES, add_special=False), tools()
    while len(ids) < prompt:
        ids += tokenizer.encode(f"{next(more)}\n", add_special=False)
    return tokenizer.decode(ids[:prompt])


def _rendered(
    tokenizer: Tokenizer, template: ChatTemplate, head: str, asked: Sequence[str]
) -> Script:
    begun = [{"role": "system", "content": head}, {"role": "user", "content": asked[0]}]
    try:
        opening = template.render(begun)
    except TemplateError:  # some know no system
        begun = [{"role": "user", "content": f"{head}\n{asked[0]}"}]
        opening = template.render(begun)
    follow = [_after_answer(template, asked[0], question) for question in asked[1:]]
    texts = (tokenizer.encode(text, add_special=False) for text in (opening, *follow))
    first, *rest = (tuple(ids) for ids in texts)
    return Script(first, tuple(rest))


def _after_answer(template: ChatTemplate, before: str, question: str) -> str:
    """What a template writes after an answer: the end of it, the next question, and all up to where
    the next answer begins."""
    text = template.render(
        [
            {"role": "user", "content": before},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": question},
        ]
    )
    _, found, after = text.rpartition(_ANSWER)
    if not found:
        raise TextError(
            f"{template.origin}: leaves out what the assistant said, so there is no conversation "
            "to measure"
        )
    return after


# -------------------------------------------------------------------------------------- one answer


@dataclass(frozen=True, slots=True)
class Heard:
    """One answer: its tokens, when the first and the last were made, in how many `steps` those
    after the first, how much of the prompt came from the cache, and why not more."""

    tokens: tuple[int, ...]
    first_s: float
    seconds: float
    steps: int
    cached: int
    missed: str
    drafted: int
    accepted: int

    @property
    def decode_s(self) -> float:
        """What the tokens after the first took."""
        return self.seconds - self.first_s


def ask(engine: Engine, request: Request) -> Heard:
    """Have one request answered by an engine that does nothing else. Raises EngineError."""
    events: list[tuple[Event, float, int]] = []
    began = time.perf_counter()
    engine.add(request)
    for step in itertools.count():
        if engine.is_idle:
            break
        found = engine.step()
        now = time.perf_counter() - began
        events += [(event, now, step) for event in found]
    error = next((event.error for event, _, _ in events if event.error), "")
    made = [(e.token.id, at, step) for e, at, step in events if e.token is not None]
    if error or not made:
        raise EngineError(error or f"request {request.id} ended without a token")
    (_, first_s, first), (_, seconds, last) = made[0], made[-1]
    return Heard(
        tuple(token for token, _, _ in made),
        first_s,
        seconds,
        last - first,
        sum(e.cached or 0 for e, _, _ in events),
        next((e.missed for e, _, _ in events if e.missed), ""),
        sum(e.drafted for e, _, _ in events),
        sum(e.accepted for e, _, _ in events),
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """One turn of one conversation: tokens of the prompt, those of them that the engine had
    computed before, and the answers with cache and drafts and without."""

    prompt: int
    known: int
    ahead: Heard
    plain: Heard


def converse(
    ahead: Engine, plain: Engine, script: Script, answer: int, name: str
) -> Iterator[Pair]:
    """The turns of one conversation, which shares nothing with one of another `name`."""
    from nybble.engine.request import Request, SamplingParams

    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    prompt, known = script.opening, 0
    for number, after in enumerate((*script.follow, ())):
        request = Request(f"{name}-{number}", prompt, params, salt=name.encode())
        pair = Pair(len(prompt), known, ask(ahead, request), ask(plain, request))
        yield pair
        said = (*prompt, *pair.ahead.tokens)
        # Nobody computed the last token of an answer: it was only chosen.
        prompt, known = (*said, *after), len(said) - 1


# ------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn in every conversation that was measured; figures are medians."""

    number: int
    pairs: tuple[Pair, ...]

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.pairs[0].prompt

    @property
    def known(self) -> int:
        """Those that the engine had computed before."""
        return self.pairs[0].known

    @property
    def cached(self) -> int:
        """Those that came from the cache, in the worst conversation."""
        return min(pair.ahead.cached for pair in self.pairs)

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return statistics.median(pair.ahead.first_s for pair in self.pairs)

    @property
    def plain_first_s(self) -> float:
        """The same without the cache."""
        return statistics.median(pair.plain.first_s for pair in self.pairs)

    @property
    def decode_s(self) -> float:
        """Seconds for the tokens after the first."""
        return statistics.median(pair.ahead.decode_s for pair in self.pairs)

    @property
    def plain_decode_s(self) -> float:
        """The same without drafts."""
        return statistics.median(pair.plain.decode_s for pair in self.pairs)

    @property
    def decoded(self) -> int:
        """How many tokens these are."""
        return len(self.pairs[0].ahead.tokens) - 1

    @property
    def is_equal(self) -> bool:
        """Whether the answers with cache and drafts are those without, token for token."""
        return all(pair.ahead.tokens == pair.plain.tokens for pair in self.pairs)

    @property
    def missed(self) -> str:
        """Why the cache had no more of the prompt."""
        return next((pair.ahead.missed for pair in self.pairs if pair.ahead.missed), "")

    def as_json(self) -> dict[str, object]:
        """One entry of `turns`."""
        figures = Figures((self,))
        return {
            "turn": self.number,
            "prompt_tokens": self.prompt,
            "known_tokens": self.known,
            "cached_tokens": self.cached,
            "missed": self.missed,
            **figures.as_json(),
            "equal_answers": self.is_equal,
            "samples": [
                {
                    "first_token_seconds": pair.ahead.first_s,
                    "first_token_seconds_without_cache": pair.plain.first_s,
                    "decode_seconds": pair.ahead.decode_s,
                    "decode_seconds_without_drafts": pair.plain.decode_s,
                }
                for pair in self.pairs
            ],
        }


@dataclass(frozen=True, slots=True)
class Figures:
    """What some turns come to."""

    turns: Sequence[Turn]

    @property
    def _heard(self) -> list[Heard]:
        return [pair.ahead for turn in self.turns for pair in turn.pairs]

    @property
    def hit_rate(self) -> float | None:
        """The share of the tokens that were computed before which came from the cache; None where
        there are none."""
        known = sum(turn.known for turn in self.turns)
        return sum(turn.cached for turn in self.turns) / known if known else None

    @property
    def first_s(self) -> float:
        """Seconds to the first token, summed."""
        return sum(turn.first_s for turn in self.turns)

    @property
    def plain_first_s(self) -> float:
        """The same without the cache."""
        return sum(turn.plain_first_s for turn in self.turns)

    @property
    def saved_s(self) -> float:
        """Seconds that the cache saves."""
        return self.plain_first_s - self.first_s

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that were right; None where nothing was guessed."""
        drafted = sum(heard.drafted for heard in self._heard)
        return sum(heard.accepted for heard in self._heard) / drafted if drafted else None

    @property
    def accepted_length(self) -> float:
        """Tokens that a step of decoding makes, also one without drafts."""
        steps = sum(heard.steps for heard in self._heard)
        return sum(len(heard.tokens) - 1 for heard in self._heard) / max(steps, 1)

    @property
    def tokens_per_s(self) -> float:
        """Of decoding."""
        return sum(t.decoded for t in self.turns) / sum(t.decode_s for t in self.turns)

    @property
    def plain_tokens_per_s(self) -> float:
        """The same without drafts."""
        return sum(t.decoded for t in self.turns) / sum(t.plain_decode_s for t in self.turns)

    @property
    def speed_up(self) -> float:
        """Decoding with drafts over decoding without."""
        return self.tokens_per_s / self.plain_tokens_per_s

    def as_json(self) -> dict[str, object]:
        """Fields of `nybble.bench.multi-turn/1`."""
        return {
            "hit_rate": self.hit_rate,
            "first_token_seconds": self.first_s,
            "first_token_seconds_without_cache": self.plain_first_s,
            "seconds_saved": self.saved_s,
            "acceptance": self.acceptance,
            "accepted_length": self.accepted_length,
            "tokens_per_second": self.tokens_per_s,
            "tokens_per_second_without_drafts": self.plain_tokens_per_s,
            "speed_up": self.speed_up,
        }


@dataclass(frozen=True, slots=True)
class TurnsBench:
    """All turns, and what they were measured with: `ahead` says what spared work, `acceptance` is
    that of the first guess of a step, of the second and so on, `drafting` why nothing is guessed
    any more, "" while something is."""

    model: str
    traffic: Traffic
    precision: str
    turns: tuple[Turn, ...]
    ahead: str
    acceptance: tuple[float, ...]
    drafting: str
    conditions: Conditions

    @property
    def figures(self) -> Figures:
        """Of all turns."""
        return Figures(self.turns)

    @property
    def format(self) -> str:
        """How the linears are stored."""
        return "+".join(self.traffic.formats)

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.bench.multi-turn/1`."""
        return {
            "schema": "nybble.bench.multi-turn/1",
            "model": self.model,
            "format": self.format,
            "bytes": self.traffic.stored_bytes,
            "parameters": self.traffic.parameters,
            "precision": self.precision,
            "ahead": self.ahead,
            "turns": [turn.as_json() for turn in self.turns],
            **self.figures.as_json(),
            "acceptance_by_position": list(self.acceptance),
            "equal_answers": sum(turn.is_equal for turn in self.turns),
            "drafting": self.drafting,
            "conditions": {
                name: getattr(self.conditions, name) for name in Conditions.__dataclass_fields__
            },
        }


def bench_turns(
    model: str | PathLike[str],
    options: TurnsOptions | None = None,
    opening: OpenOptions | None = None,
    *,
    progress: Progress | None = None,
) -> TurnsBench:
    """Measure a local checkpoint; of `opening`, sequences and context follow the conversation.

    Raises MissingExtra without torch, ContextTooLong for a conversation longer than the model's
    context, TextError for a template that makes none, and what opening an engine raises.
    """
    needs_torch("bench engine --multi-turn")
    from nybble.api.opening import OpenOptions, open_checkpoint
    from nybble.kernels.dispatch import default_threads

    options, opening = options or TurnsOptions(), opening or OpenOptions()
    folder = Path(model)
    with Checkpoint.open(folder) as checkpoint:
        traffic = read_traffic(checkpoint)
        context = _context(checkpoint)
    script = fit_script(Tokenizer.open(folder), ChatTemplate.open(folder), options, context)
    most = script.tokens(options.answer)
    sized = replace(opening, max_sequences=_SEQUENCES, max_context=most)
    bare = replace(sized, prefix_cache=False, snapshot_memory=None, draft="off", draft_tokens=None)
    opened, plain = open_checkpoint(folder, sized), open_checkpoint(folder, bare).engine
    _warm_up((opened.engine, plain), script)
    watch, before = Watch(), opened.engine.stats
    turns = measure(opened.engine, plain, script, options, progress)
    share, after = watch.others_share(), opened.engine.stats
    return TurnsBench(
        folder.resolve().name,
        traffic,
        opening.precision,
        turns,
        opened.ahead,
        acceptance(before, after),
        after.drafting,
        conditions(opening.threads or default_threads(), share),
    )


def _context(checkpoint: Checkpoint) -> int:
    from nybble.models.model import Model

    return Model(checkpoint).network.context


def fit_script(
    tokenizer: Tokenizer, template: ChatTemplate | None, options: TurnsOptions, context: int
) -> Script:
    """The conversation that options ask for. Raises ContextTooLong where the context is shorter,
    but if nobody said how many tokens are to be in front: then these are fewer."""
    asked = PROMPT if options.prompt is None else options.prompt
    script = write_script(tokenizer, template, options.turns, asked)
    over = script.tokens(options.answer) - context
    if over <= 0:
        return script
    # A text that is cut may come out a few tokens longer when it is read again.
    shorter = asked - over - _SLACK
    if options.prompt is not None or shorter < _LEAST_PROMPT:
        raise ContextTooLong(
            f"{options.turns} turns behind {asked:,} tokens take "
            f"{script.tokens(options.answer):,} tokens, and the context is {context:,}; ask for "
            "fewer turns, shorter answers or a shorter prompt"
        )
    return write_script(tokenizer, template, options.turns, shorter)


def _warm_up(engines: Sequence[Engine], script: Script) -> None:
    """A short answer of each: pages of weights are read, buffers are touched."""
    from nybble.engine.request import Request, SamplingParams

    for engine in engines:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        ask(engine, Request("warm-up", script.opening[:_WARM], params, salt=b"warm-up"))


def measure(
    ahead: Engine,
    plain: Engine,
    script: Script,
    options: TurnsOptions,
    progress: Progress | None = None,
) -> tuple[Turn, ...]:
    """All turns of `options.repeats` conversations, one after the other."""
    progress = progress or Progress()
    progress.stage("measuring", options.repeats * (1 + len(script.follow)), "turns")
    pairs: list[list[Pair]] = [[] for _ in (script.opening, *script.follow)]
    for repeat in range(options.repeats):
        talk = converse(ahead, plain, script, options.answer, f"conversation-{repeat}")
        for number, pair in enumerate(talk):
            pairs[number].append(pair)
            progress.advance(1, f"turn {number + 1}")
    return tuple(Turn(number, tuple(found)) for number, found in enumerate(pairs, 1))


def acceptance(before: EngineStats, after: EngineStats) -> tuple[float, ...]:
    """The share of guesses between two moments that were right, by their place in a step."""
    drafted = _grown(before.drafted_by_position, after.drafted_by_position)
    accepted = _grown(before.accepted_by_position, after.accepted_by_position)
    return tuple(a / d for a, d in zip(accepted, drafted, strict=True) if d)


def _grown(before: Sequence[int], after: Sequence[int]) -> list[int]:
    return [b - a for a, b in itertools.zip_longest(before, after, fillvalue=0)]
