"""An engine: requests go in between steps, each step gives some of them tokens.

One step is: schedule, forward, commit, sample and verify, draft, remember in the cache. The
scheduler knows no tensor, the runner no request, the sampler no page; here they meet.
 An error of one request ends that request, and the
others go on. Belongs to one thread; `loop.EngineLoop` gives it one.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from nybble.engine import prompt_scores
from nybble.engine.drafter import Drafter
from nybble.engine.drafting import Drafting, Part
from nybble.engine.limits import EngineStats as EngineStats
from nybble.engine.limits import Limits
from nybble.engine.prefix import PrefixCache
from nybble.engine.remembering import Remembering
from nybble.engine.request import Event, Finish, Grammar, Request, Token
from nybble.engine.runner import Runner
from nybble.engine.sampler import BadWords, Choice, Row, Sampler
from nybble.engine.scheduler import EngineOptions as EngineOptions
from nybble.engine.scheduler import Scheduler, Share, turn
from nybble.engine.sequence import Sequence
from nybble.engine.speculation import Speculation
from nybble.engine.text_stream import TextStream, spellings
from nybble.errors import DoesNotFit, EngineError, NybbleError
from nybble.models.numbers import Numbers
from nybble.models.threads import torch_alone
from nybble.text.tokenizer import Tokenizer

log = logging.getLogger("nybble")

#: How long a step sleeps that has only grammars to wait for.
_COMPILING_S = 0.002


class Grammars(Protocol):
    """Who knows what a grammar allows next, for each sequence by its key: `GrammarWorker`."""

    def start(self, key: int, grammar: Grammar) -> None:
        """Begin to compile a grammar. Raises MissingExtra where nothing can."""
        ...

    def is_ready(self, key: int) -> bool:
        """Whether it is compiled; never waits. Raises EngineError if it cannot be used."""
        ...

    def ask(self, keys: list[int]) -> None:
        """Begin to find the masks of these sequences."""
        ...

    def collect(self) -> list[bytes]:
        """The masks asked for, a bit for each token; none for a grammar that failed."""
        ...

    def failure(self, key: int) -> str:
        """Why a grammar cannot be used any further, "" if it can."""
        ...

    def accept(self, key: int, token: int) -> bool:
        """Take a token; whether the text is complete and nothing may follow. Raises EngineError for
        a grammar that failed."""
        ...

    def drop(self, key: int) -> None:
        """Forget a sequence."""
        ...

    def close(self) -> None:
        """End the process that it needs; a later grammar begins another."""
        ...


@dataclass(slots=True)
class _Counts:
    steps: int = 0
    prompt: int = 0
    generated: int = 0
    recomputed: int = 0
    arrivals: int = 0


@dataclass(slots=True)
class _Pick:
    """A sequence to be sampled from row `at` of a step's logits, and from those after it as long as
    the `drafts` turn out right. `rows` are sampled at once: with options that look back at the
    text, one. `guesses` counts those that were right; `is_cut`: the last of them ended the text."""

    sequence: Sequence
    at: int
    mask: bytes | None
    drafts: tuple[int, ...] = ()
    guesses: int = 0
    rows: int = 1
    is_cut: bool = False


@dataclass(slots=True)
class _Step:
    """What becomes of a step: its events; the sequences that were computed, each with the number of
    its work; and of how many shares the cache has what they leave. It began at `begun`, and took
    `drafting_s` to guess; `is_timed`: the policy of drafting is to know how long the rest took."""

    begun: float
    shares: list[Share]
    events: list[Event]
    parts: list[tuple[Sequence, int]] = field(default_factory=list)
    kept: int = 0
    drafting_s: float = 0.0
    is_timed: bool = False


class Engine:
    """A runner, its pools, and the requests under way.

    `pages` and `slots` are the numbers of the runner's pools, `context` the most tokens a sequence
    may have, `clipped` what counts values that FP8 pages could not hold. Every choice of a request
    ends with one event that has a `finish`, in the event or in its token.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        options: EngineOptions,
        pages: Numbers,
        slots: Numbers,
        context: int,
        sampler: Sampler,
        grammar: Grammars | None = None,
        clipped: Callable[[], int] | None = None,
        *,
        cache: PrefixCache | None = None,
        drafter: Drafter | None = None,
        speculation: Speculation | None = None,
        slots_each: int = 1,
    ) -> None:
        """`slots_each`: how many slots a sequence has, one more than drafts where they move a state
        on. `drafter` needs `speculation`."""
        self.runner, self.tokenizer, self.options = runner, tokenizer, options
        self.pages, self.slots = pages, slots
        self.sampler, self.grammar = sampler, grammar
        self._clipped = clipped or int
        self.limits = Limits(
            context, pages.count, options.page_tokens, runner.vocab, grammar is not None
        )
        self.scheduler = Scheduler(
            options,
            pages,
            slots,
            options.prompt_rows(runner.vocab),
            cache=cache,
            slots_each=slots_each,
        )
        self._drafting: Drafting | None = None
        if drafter is not None and speculation is not None:
            self._drafting = Drafting(drafter, speculation, self.scheduler)
        self._remembering: Remembering | None = None
        if cache is not None:
            self._remembering = Remembering(
                cache, options.page_tokens, lambda source, to: runner.copy((), (), source, to)
            )
        self._living: dict[str, list[Sequence]] = {}
        self._compiling: list[Sequence] = []  # the first choices of requests that wait for it
        self._counts = _Counts()

    # ---------------------------------------------------------------------------------- requests

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended."""
        return not self._living

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its continuation."""
        return self.limits.context

    @property
    def most_sequences(self) -> int:
        """How many sequences run at once: as many as were asked for, or have slots."""
        return min(self.options.max_sequences, self.slots.count // self.scheduler.slots_each)

    @property
    def stats(self) -> EngineStats:
        """Figures for people who watch; may be read from another thread."""
        scheduler, counts = self.scheduler, self._counts
        running = len(scheduler.running)
        cached = 0 if scheduler.cache is None else scheduler.cache.available - self.pages.free
        return EngineStats(
            running=running,
            waiting=max(0, sum(map(len, tuple(self._living.values()))) - running),
            pages=self.pages.count,
            pages_used=self.pages.count - self.pages.free - cached,
            slots=self.slots.count,
            slots_used=self.slots.count - self.slots.free,
            steps=counts.steps,
            preemptions=scheduler.preemptions,
            prompt_tokens=counts.prompt,
            generated_tokens=counts.generated,
            recomputed_tokens=counts.recomputed,
            clipped=self._clipped(),
            **self._cache_figures(),
            **self._draft_figures(),
        )

    def _cache_figures(self) -> dict[str, Any]:
        cache = self.scheduler.cache
        if cache is None:
            return {}
        found = cache.figures
        return {
            "cache_queries": found.queries,
            "cache_hits": found.hits,
            "cache_misses": tuple(found.reasons.items()),
            "cache_evictions": found.evicted_pages + found.evicted_snapshots,
            "cached_pages": found.pages,
            "snapshots": 0 if cache.snapshots is None else cache.snapshots.count,
            "snapshots_used": found.snapshots,
        }

    def _draft_figures(self) -> dict[str, Any]:
        if self._drafting is None:
            return {
                "drafting": "nobody guesses: it was not asked for, or memory has no states for it"
            }
        found = self._drafting.speculation.figures
        return {
            "draft_steps": found.steps,
            "drafted": found.drafted,
            "accepted": found.accepted,
            "drafted_by_position": found.drafted_by_position,
            "accepted_by_position": found.accepted_by_position,
            "drafting": found.reason,
        }

    def validate(self, request: Request) -> None:
        """Raise what `add` would raise, but for an id in use and a grammar that does not compile.
        Any thread may call it."""
        self.limits.validate(request)

    def add(self, request: Request) -> None:
        """Take a request; its first token comes with a later step.

        Generation ends at `max_tokens`, or before it where `limits.room` ends, with "length". A
        grammar that cannot be used is told by an event. Raises as `validate`, EngineError for an id
        in use, and MissingExtra where no grammar can be compiled.
        """
        self.validate(request)
        if request.id in self._living:
            raise EngineError(f"request {request.id!r} is already under way; choose another id")
        sequences = self._sequences(request)
        leader, *leader.followers = sequences
        if request.params.grammar is None or self.grammar is None:
            self.scheduler.add(leader)
        else:
            self._start(self.grammar, request.params.grammar, sequences)
            self._compiling.append(leader)
        self._living[request.id] = sequences

    def _start(self, grammars: Grammars, grammar: Grammar, sequences: list[Sequence]) -> None:
        """Have a grammar compiled for all choices of a request, or for none."""
        started: list[Sequence] = []
        try:
            for sequence in sequences:
                grammars.start(sequence.key, grammar)
                started.append(sequence)
        except BaseException:
            for sequence in started:
                grammars.drop(sequence.key)
            raise

    def _sequences(self, request: Request) -> list[Sequence]:
        params = request.params
        eos = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
        # An end that the model has no logit for cannot come, nor be banned.
        ends = frozenset(t for t in (*eos, *params.stop_token_ids) if t < self.runner.vocab)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        most = min(params.max_tokens, self.limits.room - len(request.prompt))
        bad_words = BadWords(spellings(self.tokenizer, params.bad_words))
        arrival = self._counts.arrivals
        self._counts.arrivals += 1
        boundaries = self._boundaries(request)
        now = time.monotonic()
        made = []
        for choice in range(params.n):
            output: list[int] = []
            row = Row(
                params, seed, choice, prompt=request.prompt, output=output, bad_words=bad_words
            )
            made.append(
                Sequence(
                    request,
                    choice,
                    turn(arrival, request.priority, choice),
                    most,
                    ends,
                    TextStream(self.tokenizer, params),
                    row,
                    output,
                    computed=len(request.prompt) if choice else 0,
                    arrived=now,
                    boundaries=boundaries,
                )
            )
        return made

    def _boundaries(self, request: Request) -> tuple[int, ...]:
        """Where turns of a prompt end."""
        if request.boundaries is not None or self.scheduler.cache is None:
            return request.boundaries or ()
        ends = self.tokenizer.eos_ids
        return tuple(at for at, token in enumerate(request.prompt, 1) if token in ends)

    def cancel(self, id: str) -> list[Event]:
        """End a request now and free what it holds; nothing, if it has ended or never began."""
        return self._end_request(id, "cancelled")

    def abort(self, reason: str) -> list[Event]:
        """End every request with an error and free everything."""
        return [e for id in tuple(self._living) for e in self._end_request(id, "error", reason)]

    def _end_request(self, id: str, finish: Finish, error: str = "") -> list[Event]:
        sequences = list(self._living.get(id, ()))
        for sequence in sequences:
            self._forget(sequence)
        return [s.event(finish=finish, error=error) for s in sequences if not s.is_ended]

    def _forget(self, sequence: Sequence) -> None:
        """A choice has ended: free what it holds."""
        self.scheduler.remove(sequence)
        if self._drafting is not None:
            self._drafting.drop((sequence,))
        if sequence.request.params.grammar is not None and self.grammar is not None:
            self.grammar.drop(sequence.key)
            self._compiling = [other for other in self._compiling if other is not sequence]
        living = self._living[sequence.request.id]
        living.remove(sequence)
        if not living:
            del self._living[sequence.request.id]

    def check(self, *, is_whole: bool = True) -> None:
        """Raise EngineError unless every page and slot has one owner, and is free, or the cache's,
        when idle. `is_whole`: the cache is walked too, which takes milliseconds for a large one."""
        cache, held = self.scheduler.cache, 0
        if cache is not None:
            if is_whole:
                cache.check(
                    [
                        page
                        for s in self.scheduler.running
                        for page in s.state.pages[len(s.lease.nodes) if s.lease else 0 :]
                    ]
                )
            if cache.reserved:
                raise EngineError(f"{cache.reserved} snapshots are reserved between steps: lost")
            held = cache.figures.pages
        for numbers, cached in ((self.pages, held), (self.slots, 0)):
            numbers.check()
            if self.is_idle and numbers.free + cached < numbers.count:
                raise EngineError(
                    f"the engine is idle and {numbers.count - numbers.free - cached} of "
                    f"{numbers.count} pages or slots are not free: they are lost"
                )

    def close(self) -> None:
        """End the process of grammars, when nothing is under way; a later one begins another."""
        if self.grammar is not None:
            self.grammar.close()

    # -------------------------------------------------------------------------------------- a step

    def step(self) -> list[Event]:
        """Compute once for whoever is in turn; what came of it.

        Raises EngineError if the pools are not what they should be; `abort` then ends everything.
        """
        begun = time.monotonic()
        events = self._begin_compiled()
        shares = self.scheduler.schedule()
        if not shares:
            self._rest()
            return events
        step = _Step(begun, shares, events)
        try:
            self._run(step)
        except Exception as error:  # whatever it is, it is about these requests
            reason = str(error) or type(error).__name__
            is_ours = not isinstance(error, NybbleError)
            log.error("a step of %d sequences failed: %s", len(shares), reason, exc_info=is_ours)
            for share in shares[step.kept :]:
                self.scheduler.drop(share)
            for share in shares:
                events += self._end_request(share.sequence.request.id, "error", reason)
        self._counts.steps += 1
        return events

    def _begin_compiled(self) -> list[Event]:
        """Let those wait for their turn whose grammars are compiled; the ends of the others."""
        events: list[Event] = []
        for leader in tuple(self._compiling):
            try:
                is_ready = all(self._is_ready(s) for s in (leader, *leader.followers))
            except EngineError as error:
                events += self._end_request(leader.request.id, "error", str(error))
                continue
            if is_ready:
                self._compiling.remove(leader)
                self.scheduler.add(leader)
        return events

    def _is_ready(self, sequence: Sequence) -> bool:
        return self.grammar is None or self.grammar.is_ready(sequence.key)

    def _rest(self) -> None:
        """There is nothing to compute."""
        if self._compiling:
            time.sleep(_COMPILING_S)
            return
        self.check()
        if not self.is_idle:
            raise EngineError(f"none of {len(self._living)} requests can go on: a lost turn")

    def _run(self, step: _Step) -> None:
        """One step; its events are filled as they come, so that an error loses none."""
        for share in step.shares:
            self._begin(share.sequence, step.begun)
        try:
            logits, masks = self._forward(step.shares)
        except DoesNotFit as error:
            step.events += self._shrink(step.shares, str(error))
            step.kept = len(step.shares)
            return
        self._verify(step, self._commit_all(step, logits, masks), logits)
        if self._drafting is not None:
            self._draft(self._drafting, step)
        if self._remembering is not None:
            for share in step.shares:
                step.kept += 1
                self._remembering.keep(share)
        for sequence, _ in step.parts:
            # One that ended is gone already where another choice of its request failed after it.
            if sequence.is_ended and self._lives(sequence):
                self._forget(sequence)
        if self._drafting is not None and step.is_timed:
            rows = sum(len(share.work.tokens) for share in step.shares)
            took = time.monotonic() - step.begun - step.drafting_s
            self._drafting.speculation.note_step(len(step.shares), rows, took, step.drafting_s)

    def _begin(self, sequence: Sequence, now: float) -> None:
        """A step computes for a sequence, maybe its first."""
        if sequence.is_new and self._drafting is not None:
            self._drafting.begin(sequence)
        sequence.is_new = False
        if sequence.arrived is not None:
            self._counts.prompt += max(0, sequence.cached - sequence.computed)
            sequence.computed = max(sequence.computed, sequence.cached)
        sequence.begin(now)

    def _commit_all(self, step: _Step, logits: Tensor, masks: dict[int, bytes]) -> list[_Pick]:
        """Note what is computed, and what it tells of prompts; who is sampled now."""
        picks: list[_Pick] = []
        end = 0
        for number, share in enumerate(step.shares):
            end += share.work.outputs
            sequence = share.sequence
            self._commit(share)
            step.parts.append((sequence, number))
            if share.scored:
                step.events += self._score(share, logits[end - share.scored : end])
            if not (share.is_sampled and self._lives(sequence)):
                continue
            mask, first = masks.get(sequence.key), end - 1 - len(share.drafts)
            picks.append(_Pick(sequence, first, mask, share.drafts))
            for other in self._forked(sequence):
                step.parts.append((other, number))
                picks.append(_Pick(other, first, mask))
        return picks

    def _lives(self, sequence: Sequence) -> bool:
        return sequence in self._living.get(sequence.request.id, ())

    def _draft(self, drafting: Drafting, step: _Step) -> None:
        """Have the next tokens of sequences guessed."""
        if drafting.can_draft(len(step.parts)):
            begun = time.monotonic()
            self._propose(drafting, step)
            step.drafting_s = time.monotonic() - begun
        elif drafting.speculation.passes(len(step.parts)):
            return
        step.is_timed = all(s.is_sampled and s.work.is_recurrent for s in step.shares)

    def _propose(self, drafting: Drafting, step: _Step) -> None:
        parts = [Part(s, n, s.is_ended) for s, n in step.parts if self._lives(s)]
        try:
            drafting.propose(parts)
        except DoesNotFit as error:  # tokens come without drafts too
            log.warning("no memory for drafts: %s; these sequences go on without", error)
            drafting.give_up(parts)

    def _shrink(self, shares: list[Share], reason: str) -> list[Event]:
        """A batch found no memory: its last in turn ends, and the others begin again, since a
        part of their states may have been moved on."""
        sequences = [share.sequence for share in shares]
        for share in shares:
            self.scheduler.drop(share)
            self.scheduler.preempt(share.sequence)
        last = max(sequences, key=lambda sequence: sequence.turn)
        log.error("a step of %d sequences failed: %s; the last in turn ends", len(shares), reason)
        return self._end_request(last.request.id, "error", reason)

    def _forward(self, shares: list[Share]) -> tuple[Tensor, dict[int, bytes]]:
        """The logits of a step, and by key the masks of those that are sampled under a grammar,
        which are found while the runner computes."""
        sampled = (share.sequence for share in shares if share.is_sampled)
        keys = [s.key for s in sampled if s.request.params.grammar is not None]
        if not keys or self.grammar is None:
            return self.runner.forward([share.work for share in shares]), {}
        self.grammar.ask(keys)
        try:
            logits = self.runner.forward([share.work for share in shares])
        finally:
            masks = dict(zip(keys, self.grammar.collect(), strict=True))
        return logits, masks

    def _commit(self, share: Share) -> None:
        sequence, counts = share.sequence, self._counts
        is_prompt, before = sequence.is_prefilling, sequence.computed
        self.scheduler.commit(share)
        fresh = sequence.computed - before
        counts.recomputed += len(share.work.tokens) - len(share.drafts) - fresh
        if is_prompt:
            counts.prompt += fresh

    def _score(self, share: Share, logits: Tensor) -> list[Event]:
        """Note what rows tell of a prompt; the event, once they have told all."""
        sequence = share.sequence
        start = sequence.state.length - len(logits)
        try:
            prompt_scores.score(sequence, start, logits, self.sampler.compute, self.runner.explain)
        except EngineError as error:
            return self._end_request(sequence.request.id, "error", str(error))
        if sequence.is_prefilling:
            return []
        return [sequence.event(prompt=prompt_scores.told(sequence))]

    def _forked(self, leader: Sequence) -> list[Sequence]:
        """The other choices of a sequence whose prompt was just computed, those that have found
        room for a copy of its state."""
        forked = self.scheduler.fork(leader) if leader.followers else []
        source, now = leader.state, time.monotonic()
        for sequence in forked:
            sequence.begin(now)
            state = sequence.state
            shared = 0 if sequence.lease is None else len(sequence.lease.nodes)
            pages, own = source.pages[shared : len(state.pages)], state.pages[shared:]
            self.runner.copy(pages, own, source.slots[source.slot], state.slots[state.slot])
        return forked

    def _verify(self, step: _Step, picks: list[_Pick], logits: Tensor) -> None:
        """Sample the next token of each, and further ones as long as drafts equal what is sampled.

        The noise of a token is keyed by its position, and what looks back at a text looks at the
        text itself: so tokens are those that would have come without drafts.
        """
        drafted = [(pick, len(pick.drafts)) for pick in picks if pick.drafts]
        while picks:
            found = iter(self._sample(picks, logits))
            picks = [p for p in picks if self._follow(step, p, list(islice(found, p.rows)))]
            self._find_masks(picks)
        if self._drafting is not None:
            for pick, count in drafted:
                if self._lives(pick.sequence):
                    told = (pick.sequence.key, count, pick.guesses)
                    self._drafting.speculation.note(*told, is_cut=pick.is_cut)

    def _follow(self, step: _Step, pick: _Pick, choices: list[Choice]) -> bool:
        """Take tokens as far as drafts were right; whether more may come of this step."""
        drafted = len(pick.drafts) if not pick.guesses else 0
        for choice in choices:
            is_right = bool(pick.drafts) and choice.token == pick.drafts[0]
            told = {"drafted": drafted, "accepted": int(is_right)}
            step.events += self._take(pick.sequence, choice, told)
            drafted = 0
            if not is_right or not self._lives(pick.sequence):
                return False
            pick.at, pick.drafts, pick.guesses = pick.at + 1, pick.drafts[1:], pick.guesses + 1
            if pick.sequence.is_ended:
                pick.is_cut = True
                return False
            self.scheduler.accept(pick.sequence)
        return True

    def _find_masks(self, picks: list[_Pick]) -> None:
        """What grammars allow after a draft that was right."""
        ruled = [p for p in picks if p.sequence.request.params.grammar is not None]
        if ruled and self.grammar is not None:
            self.grammar.ask([pick.sequence.key for pick in ruled])
            for pick, mask in zip(ruled, self.grammar.collect(), strict=True):
                pick.mask = mask

    def _sample(self, picks: list[_Pick], logits: Tensor) -> list[Choice]:
        """The choices of all rows of the picks, in their order."""
        at: list[int] = []
        rows: list[Row] = []
        ahead: list[int] = []
        for pick in picks:
            sequence, row = pick.sequence, pick.sequence.row
            is_early = len(sequence.output) < sequence.request.params.min_tokens
            row.position, row.mask = sequence.known, pick.mask
            row.banned = sequence.ends if is_early else ()
            pick.rows = 1 + len(pick.drafts) if sequence.is_memoryless else 1
            at += range(pick.at, pick.at + pick.rows)
            rows += [row] * pick.rows
            ahead += range(pick.rows)
        if at == list(range(len(logits))):
            return self.sampler.sample(logits, rows, ahead)
        with torch_alone():
            chosen = logits[torch.tensor(at)]
        return self.sampler.sample(chosen, rows, ahead)

    def _take(self, sequence: Sequence, choice: Choice, told: dict[str, int]) -> list[Event]:
        """Add a token to a sequence, and say so."""
        request = sequence.request.id
        if not self._lives(sequence):  # another choice of its request has just failed
            return []
        if choice.error:
            reason = self._failure(sequence) or choice.error
            if choice.is_nan and (culprit := self.runner.explain()):
                reason = f"{reason}; {culprit}"
            return self._end_request(request, "error", reason)
        sequence.output.append(choice.token)
        self._counts.generated += 1
        try:
            text, finish = self._read(sequence, choice.token)
        except NybbleError as error:
            return self._end_request(request, "error", str(error))
        sequence.is_ended = bool(finish)
        token = Token(choice.token, text, choice.logprob, finish, choice.top)
        return [sequence.event(token, drafted=told["drafted"], accepted=told["accepted"])]

    def _failure(self, sequence: Sequence) -> str:
        has_grammar = sequence.request.params.grammar is not None
        return self.grammar.failure(sequence.key) if has_grammar and self.grammar else ""

    def _read(self, sequence: Sequence, token: int) -> tuple[str, Finish]:
        """The text that a token completes, and whether it is the last."""
        stream = sequence.stream
        if token in sequence.ends:
            return stream.finish(), "stop"
        text, is_stopped = stream.push(token)
        if is_stopped:
            return text, "stop"
        if sequence.request.params.grammar is not None and self.grammar is not None:
            if self.grammar.accept(sequence.key, token):
                return text + stream.finish(), "stop"
        if len(sequence.output) >= sequence.most:
            return text + stream.finish(), "length"
        return text, ""
