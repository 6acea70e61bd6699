"""An engine: requests go in between steps, each step gives some of them tokens.

One step is: schedule, forward, sample, commit. The scheduler knows no tensor, the runner no
request, the sampler no page; here they meet. An error of one request ends that request, and the
others go on. Belongs to one thread; `loop.EngineLoop` gives it one.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nybble.engine import prompt_scores
from nybble.engine.limits import EngineStats as EngineStats
from nybble.engine.limits import Limits
from nybble.engine.request import Event, Finish, Grammar, Request, Token
from nybble.engine.runner import Runner
from nybble.engine.sampler import BadWords, Choice, Row, Sampler
from nybble.engine.scheduler import EngineOptions as EngineOptions
from nybble.engine.scheduler import Scheduler, Share, turn
from nybble.engine.sequence import Sequence
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


@dataclass(frozen=True, slots=True)
class _Pick:
    """A sequence to be sampled from row `at` of a step's logits."""

    sequence: Sequence
    at: int
    mask: bytes | None


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
    ) -> None:
        self.runner, self.tokenizer, self.options = runner, tokenizer, options
        self.pages, self.slots = pages, slots
        self.sampler, self.grammar = sampler, grammar
        self._clipped = clipped or int
        self.limits = Limits(
            context, pages.count, options.page_tokens, runner.vocab, grammar is not None
        )
        self.scheduler = Scheduler(options, pages, slots, options.prompt_rows(runner.vocab))
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
        return min(self.options.max_sequences, self.slots.count)

    @property
    def stats(self) -> EngineStats:
        """Figures for people who watch; may be read from another thread."""
        scheduler, counts = self.scheduler, self._counts
        running = len(scheduler.running)
        return EngineStats(
            running=running,
            waiting=max(0, sum(map(len, tuple(self._living.values()))) - running),
            pages=self.pages.count,
            pages_used=self.pages.count - self.pages.free,
            slots=self.slots.count,
            slots_used=self.slots.count - self.slots.free,
            steps=counts.steps,
            preemptions=scheduler.preemptions,
            prompt_tokens=counts.prompt,
            generated_tokens=counts.generated,
            recomputed_tokens=counts.recomputed,
            clipped=self._clipped(),
        )

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
                )
            )
        return made

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
        return [
            Event(id, s.choice, finish=finish, error=error, queued_s=s.told_wait())
            for s in sequences
        ]

    def _forget(self, sequence: Sequence) -> None:
        """A choice has ended: free what it holds."""
        self.scheduler.remove(sequence)
        if sequence.request.params.grammar is not None and self.grammar is not None:
            self.grammar.drop(sequence.key)
            self._compiling = [other for other in self._compiling if other is not sequence]
        living = self._living[sequence.request.id]
        living.remove(sequence)
        if not living:
            del self._living[sequence.request.id]

    def check(self) -> None:
        """Raise EngineError unless every page and slot has one owner, and is free when idle."""
        for numbers in (self.pages, self.slots):
            numbers.check()
            if self.is_idle and numbers.free < numbers.count:
                raise EngineError(
                    f"the engine is idle and {numbers.count - numbers.free} of {numbers.count} "
                    "pages or slots are not free: they are lost"
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
        events = self._begin_compiled()
        shares = self.scheduler.schedule()
        if not shares:
            self._rest()
            return events
        try:
            self._run(shares, events)
        except Exception as error:  # whatever it is, it is about these requests
            reason = str(error) or type(error).__name__
            is_ours = not isinstance(error, NybbleError)
            log.error("a step of %d sequences failed: %s", len(shares), reason, exc_info=is_ours)
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

    def _run(self, shares: list[Share], events: list[Event]) -> None:
        """One step; `events` is filled as they come, so that an error loses none."""
        now = time.monotonic()
        for share in shares:
            share.sequence.begin(now)
        try:
            logits, masks = self._forward(shares)
        except DoesNotFit as error:
            events += self._shrink(shares, str(error))
            return
        picks: list[_Pick] = []
        end = 0
        for share in shares:
            end += share.work.outputs
            self._commit(share)
            if share.scored:
                events += self._score(share, logits[end - share.scored : end])
            if share.is_sampled and share.sequence.request.id in self._living:
                mask = masks.get(share.sequence.key)
                picks += [_Pick(s, end - 1, mask) for s in self._sharing(share.sequence)]
        for pick, choice in zip(picks, self._sample(picks, logits), strict=True):
            events += self._take(pick.sequence, choice)

    def _shrink(self, shares: list[Share], reason: str) -> list[Event]:
        """A batch found no memory: its last in turn ends, and the others begin again, since a
        part of their states may have been moved on."""
        sequences = [share.sequence for share in shares]
        for sequence in sequences:
            self.scheduler.preempt(sequence)
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
        counts.recomputed += len(share.work.tokens) - fresh
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
        told, queued_s = prompt_scores.told(sequence), sequence.told_wait()
        return [Event(sequence.request.id, sequence.choice, prompt=told, queued_s=queued_s)]

    def _sharing(self, leader: Sequence) -> list[Sequence]:
        """Who is sampled from a sequence's row: it, and its followers, once its prompt is computed
        and they have found room for a copy of its state."""
        forked = self.scheduler.fork(leader) if leader.followers else []
        source, now = leader.state, time.monotonic()
        for sequence in forked:
            sequence.begin(now)
            state = sequence.state
            pages = source.pages[: len(state.pages)]
            self.runner.copy(pages, state.pages, source.slots[source.slot], state.slots[state.slot])
        return [leader, *forked]

    def _sample(self, picks: list[_Pick], logits: Tensor) -> list[Choice]:
        if not picks:
            return []
        for pick in picks:
            sequence, row = pick.sequence, pick.sequence.row
            is_early = len(sequence.output) < sequence.request.params.min_tokens
            row.position, row.mask = sequence.known, pick.mask
            row.banned = sequence.ends if is_early else ()
        at = [pick.at for pick in picks]
        with torch_alone():
            rows = logits if at == list(range(len(logits))) else logits[torch.tensor(at)]
        return self.sampler.sample(rows, [pick.sequence.row for pick in picks])

    def _take(self, sequence: Sequence, choice: Choice) -> list[Event]:
        """Add a token to a sequence, and say so."""
        request = sequence.request.id
        if request not in self._living:  # another choice of it has just failed
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
        if finish:
            self._forget(sequence)
        token = Token(choice.token, text, choice.logprob, finish, choice.top)
        return [Event(request, sequence.choice, token, queued_s=sequence.told_wait())]

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
