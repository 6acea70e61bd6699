"""How many drafts the sequences of a step verify: as many as pay for their time, going by what was
measured. Knows neither tokens nor who guesses them, and changes no token.

A step with drafts gives each sequence one token, and one more for each draft accepted in a row; it
takes longer, since it has more rows, and since the drafts had to be made. How much longer depends
on the model: a dense one reads the same weights for any row, while each row of a mixture of experts
may touch other ones. So times are measured, apart for each number of sequences, and so is
acceptance, for each sequence and position; from both follows how many drafts give most tokens a
second (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023, section
3.3, with its c and alpha measured while it runs). Where none pays, none is asked for.

What is not done is not measured, so now and then a few steps try something else: the dearer that
is thought to be, the later.

All this must itself cost next to nothing: what was decided stands for some steps, and while
nothing can be drafted a step is no more than counted, until something is to be tried.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nybble.engine.acceptance import PRIOR_DRAFTS, Acceptance, Outcomes
from nybble.engine.regimes import LEAST_TIMES, Purse, Regime
from nybble.engine.scheduler import MOST_DRAFTS
from nybble.errors import EngineError

log = logging.getLogger("nybble")

#: Acceptance before any draft was verified: of a trained head's first draft, a little below what
#: is reported, so that a model where all turns on it is not tried for long.
_FIRST_ACCEPTANCE = 0.8

#: Steps for which times of a similar number of sequences will do, if by these drafts pay.
_BORROWED_STEPS = 8

#: Drafts must give so many times the tokens a second, or none is asked for: less is noise.
_WORTH = 1.05

#: What was decided stands for one step more for every so many that were seen, at most for so many.
_SEEN_FOR_ONE, _LONGEST_STAND = 8, 8
#: While it is off the time of every so manyth step is noted: often enough for times to stay fresh;
#: a prime, so that it is not always the same step of work that comes in rounds.
_SAMPLE = 17

#: The fewest and most steps in which drafts are tried where they do not pay.
_TRY_STEPS, _LONGEST_TRY = 2, 16
#: A try goes on while drafts are accepted so many standard deviations more often than was believed,
#: and until so many steps are lost by it: where drafts nearly pay, longer, for the first steps of a
#: try find caches cold.
_SURPRISE, _TRY_LOSS = 1.5, 0.5

#: After so many steps in which no draft pays drafting is called off, and on after so many in which
#: it does.
_OFF_AFTER, _ON_AFTER = 24, 8
#: What drafting needs of a sequence is kept up at the price of so many steps where no draft pays,
#: and of more where drafts would give this many times the tokens if they were accepted as usual.
_PATIENCE, _LONG_PATIENCE, _PROMISE = 2.0, 3.0, 1.25
#: While it is off, every so many sequences one begins as though it were on, at first and later; the
#: first after twice as many where drafts would not pay if they were accepted as usual.
_FIRST_START, _LAST_START = 4, 32

#: Sequences that are remembered, more than an engine runs: the oldest are forgotten.
_MOST_KNOWN = 8192


@dataclass(frozen=True, slots=True)
class SpeculationFigures:
    """What drafting has come to: how often drafts of a sequence were verified, how many, and how
    many of them accepted, in all and by position; and why it is off, "" while it is on."""

    steps: int
    drafted: int
    accepted: int
    drafted_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    reason: str


#: What may be tried instead of the best: one draft each where none pays, else fewer, more, none.
_TRIES: tuple[Callable[[int, int], int], ...] = (
    lambda count, most: max(0, count - 1),
    lambda count, most: min(most, count + 1),
    lambda count, most: 0,
)


@dataclass(slots=True)
class _Decision:
    """How many drafts sequences are to have, `depth` at most, for so many plans; and how many steps
    each plan saves. `used` counts the plans that went by it."""

    keys: Sequence[int]
    counts: tuple[int, ...]
    depth: int
    gain: float
    stands: int = 1
    used: int = 1


class Speculation:
    """Says for an engine how many drafts each sequence is to have, from 0 to `most`, or always
    `fixed`. Raises EngineError for numbers that cannot be."""

    def __init__(self, most: int, fixed: int | None = None) -> None:
        for name, value, top in (("most", most, MOST_DRAFTS), ("fixed", fixed or 0, most)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= top:
                raise EngineError(
                    f"{name} drafts of a sequence must be a whole number from 0 to {top}, "
                    f"found {value!r}"
                )
        self.most, self.fixed = most, fixed if most else 0
        self._known: dict[int, Acceptance] = {}
        self._tries: set[int] = set()  # sequences that began while drafting was off
        self._all, self._outcomes, self._gains = Acceptance(most), Outcomes(most), Outcomes(most)
        self._regimes: dict[int, Regime] = {}
        self._purses: dict[int, Purse] = {}
        self._expected = 1  # sequences in the next step
        self._last = _Decision((), (), 0, 0.0)
        self._none: tuple[int, ...] = ()
        self._planned: tuple[Regime, int] | None = None  # for the next step, and most of one
        self._is_planned = False  # since a step was told of
        self._was_plain = True  # the last one that was told of
        self._made: tuple[Regime, int, float] | None = None  # drafts to be verified next
        self._now = 0
        self._idle = self._busy = 0
        self._first_drafts = (0, 0)  # since the last decision: verified, accepted
        self._patience = _PATIENCE
        self._starts, self._start_gap = 0, _FIRST_START
        self._reason = "0 drafts were asked for" if self.fixed == 0 else ""

    @property
    def is_off(self) -> bool:
        """Whether none is asked for but now and then to try."""
        return bool(self._reason)

    @property
    def figures(self) -> SpeculationFigures:
        """What it has come to; may be read from another thread."""
        places = self._outcomes.by_position()
        drafted, accepted = tuple(p[0] for p in places), tuple(p[2] for p in places)
        return SpeculationFigures(
            steps=drafted[0] if drafted else 0,
            drafted=sum(drafted),
            accepted=sum(accepted),
            drafted_by_position=drafted,
            accepted_by_position=accepted,
            reason=self._reason,
        )

    # ------------------------------------------------------------------------ what an engine tells

    def note(self, key: int, proposed: int, accepted: int, *, is_cut: bool = False) -> None:
        """Of a sequence `proposed` drafts were verified; the first `accepted` were right, with the
        last of which the text ended if `is_cut`: then nothing is known of the others, and no token
        came after it."""
        assert is_cut <= accepted <= proposed <= self.most, (proposed, accepted, self.most)
        if not proposed:
            return
        self._outcomes.note(accepted if is_cut else proposed, accepted)
        # A text of twenty tokens loses one in thirty to drafts that end it, or lie beyond its end.
        gained = accepted - is_cut
        self._gains.note(proposed, gained)
        known = self._known.get(key)
        if known is not None:
            known.note(proposed, gained)

    def passes(self, sequences: int) -> bool:
        """Whether a step for which nothing was planned need not be told of: once some were, most
        are no more than counted."""
        if self.fixed is not None:
            return True
        regime = self._regimes.get(sequences) if sequences <= 16 else self._regime(sequences)
        if regime is None or (regime.seen + 1) % _SAMPLE == 0 or not regime.is_timed:
            return False
        regime.seen += 1
        regime.purse.seen += 1
        self._now += 1
        return True

    def note_step(self, sequences: int, rows: int, seconds: float, draft_seconds: float) -> None:
        """A step in which all sequences decoded took `seconds` for `rows`, one and their drafts for
        each; what was planned last, if something was since the last step, took `draft_seconds`
        more to guess, or to keep up where nothing was. More rows than drafts may give are tokens
        computed again, which tell nothing."""
        assert 1 <= sequences <= rows, (sequences, rows)
        is_planned, self._is_planned = self._is_planned, False
        if self.fixed is not None or rows > sequences * (1 + self.most):
            return
        self._now += 1
        regime = self._regimes.get(sequences) if sequences <= 16 else None
        if regime is None:
            regime = self._regime(sequences)
        seen = regime.seen = regime.seen + 1
        regime.purse.seen += 1
        is_sample = seen <= regime.rests
        if is_sample and seen % _SAMPLE:
            return
        was_plain, self._was_plain = self._was_plain, rows == sequences
        if was_plain or rows > sequences or not regime.is_close:
            regime.steps.note((rows - sequences) / sequences, seconds, self._now)
        if self._made is not None and rows > sequences:
            made, depth, took = self._made
            made.drafts.note(depth, took, self._now)
        self._made = None
        if is_planned and self._planned is not None:
            self._note_drafting(seconds, draft_seconds, _SAMPLE if is_sample else 1)

    def _note_drafting(self, seconds: float, draft_seconds: float, steps: int) -> None:
        """What came after each of so many steps took so long: to be held against the drafts, once
        they are verified, or against keeping up what drafting needs."""
        assert self._planned is not None
        regime, depth = self._planned
        if depth:
            self._made = (regime, depth, draft_seconds)
            return
        regime.drafts.note(0, draft_seconds, self._now)
        plain = regime.steps.at(0.0) if regime.is_timed else max(seconds, 1e-9)
        regime.purse.keep_up(min(regime.drafts.at(0) / plain, 1.0), steps)

    def drop(self, key: int) -> None:
        """Forget a sequence."""
        self._known.pop(key, None)
        self._tries.discard(key)

    # ------------------------------------------------------------------------ what an engine asks

    def expect(self, sequences: int) -> None:
        """So many sequences are to run next: what is asked now is asked about such steps."""
        self._expected = max(1, sequences)

    def starts(self, key: int) -> bool:
        """Whether what drafting needs of a sequence, entries of a head, is to be made from its
        prompt on; while it does not pay, only of few, to see whether it does again."""
        if self.fixed is not None:
            return self.fixed > 0
        self._remembered(key)
        regime = self._regime(self._expected)
        source = self._nearest(regime)
        does_pay = source is not None and source.does_pay
        is_spent = regime.purse.is_spent(self._patience)
        if not self._reason and (source is None or does_pay or not is_spent):
            return True
        if not does_pay:
            self._starts += 1
            if self._starts < self._start_gap or is_spent:
                return False
            self._starts, self._start_gap = 0, min(2 * self._start_gap, _LAST_START)
        self._tries.add(key)
        return True

    def is_over(self, key: int) -> bool:
        """Whether what drafting needs of a running sequence is not worth keeping up."""
        if self.fixed is not None:
            return not self.fixed
        if not self._reason or key in self._tries:
            return False
        purse = self._regime(self._expected).purse
        purse.has_given_up = purse.has_given_up or purse.is_spent(self._patience)
        return purse.has_given_up

    def rests(self, sequences: int) -> bool:
        """Whether nothing is to be drafted for so many sequences in the next step, and nothing
        decided: they need not be asked about."""
        if self.fixed is not None:
            return not self.fixed
        regime = self._regime(sequences)
        return regime.seen < regime.rests and not self._tries

    def plan(self, keys: Sequence[int]) -> Sequence[int]:
        """How many drafts each of the sequences that decode in the next step is to have."""
        count = len(keys)
        if self.fixed is not None or not count:
            return (self.fixed or 0,) * count
        regime = self._regime(count)
        self._expected = count
        if self._is_planned:  # the step before was not told of, so what it made is not known
            self._made = None
        self._is_planned = True
        if regime.seen < regime.rests and not (self._tries and self._is_tried(keys)):
            self._planned = regime, 0
            if len(self._none) != count:
                self._none = (0,) * count
            return self._none
        last = self._last
        if last.used < last.stands and last.keys == keys:
            last.used += 1
        else:
            last = self._last = self._decide(keys, regime)
        self._planned = regime, last.depth
        return last.counts

    # ------------------------------------------------------------------------------- how it decides

    def _decide(self, keys: Sequence[int], regime: Regime) -> _Decision:
        self._learn()
        chances = self._chances([self._remembered(key) for key in keys])
        counts, gain, is_settled = self._choose(keys, chances, regime)
        is_quiet = is_settled and not gain and bool(self._reason)
        regime.rests = regime.due if is_quiet else 0
        stands = min(1 + regime.seen // _SEEN_FOR_ONE, _LONGEST_STAND) if is_settled else 1
        return _Decision(keys[:], tuple(counts), max(counts), gain, stands)

    def _learn(self) -> None:
        """What has come of the last decision."""
        last = self._last
        news = self._gains.news()
        for at, (_, reached, right) in enumerate(news):
            if reached:
                self._all.note_many(at, reached, right)
        self._first_drafts = news[0][1:] if news else (0, 0)
        if news and last.gain:
            self._regime(len(last.keys)).purse.gain(last.gain * last.used)
        if last.depth:
            for key, count in zip(last.keys, last.counts, strict=True):
                if not count and key in self._known:
                    self._known[key].fade(last.used)

    def _remembered(self, key: int) -> Acceptance:
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self.drop(next(iter(self._known)))
            known = self._known[key] = Acceptance(self.most)
        return known

    def _regime(self, sequences: int) -> Regime:
        """That of so many sequences: each number its own up to 16, then eight to the octave."""
        at = sequences if sequences <= 16 else 16 + int(8 * math.log2(sequences / 16))
        regime = self._regimes.get(at)
        if regime is None:
            octave = (sequences - 1).bit_length()
            purse = self._purses.setdefault(octave, Purse())
            regime = self._regimes[at] = Regime(sequences, purse)
        return regime

    def _nearest(self, regime: Regime) -> Regime | None:
        """The known regime of the most similar number of sequences; None if there is none."""
        if regime.is_known:
            return regime
        return min(
            (other for other in self._regimes.values() if other.is_known),
            key=lambda other: abs(math.log(other.sequences / regime.sequences)),
            default=None,
        )

    def _choose(
        self, keys: Sequence[int], chances: list[list[float]], regime: Regime
    ) -> tuple[list[int], float, bool]:
        """The drafts of each; how many steps they save a step; whether that is the best, as far as
        is known, and not a lesson."""
        source = self._nearest(regime)
        if source is None or not source.is_like(regime):
            return self._first(regime, len(keys)), 0.0, False
        best, gain = source.best(chances, 1.0 if regime.does_pay else _WORTH)
        if source is not regime and gain:
            is_time = regime.seen >= _BORROWED_STEPS
            return (self._first(regime, len(keys)), 0.0, False) if is_time else (best, gain, False)
        if source is regime and not gain and self._lacks(regime, is_drafted=True):
            return [1] * len(keys), 0.0, False
        regime.judge(gain)
        self._judge(gain > 0, chances, regime, source)
        if gain and regime is source and regime.is_to_check(gain):
            counts = [0] * len(keys)
        elif gain:
            counts = best if regime.seen < regime.due else self._vary(regime, chances, best)
        else:
            counts = self._test(regime, source, keys, chances)
        is_settled = regime.tried is None and counts == best
        return counts, gain if is_settled else 0.0, is_settled

    def _first(self, regime: Regime, count: int) -> list[int]:
        """Drafts of sequences while nothing can be compared: none until enough such steps are known
        or under way, then one, and again."""
        is_plain = self._lacks(regime, is_drafted=False)
        return [int(not is_plain and self._lacks(regime, is_drafted=True))] * count

    def _lacks(self, regime: Regime, *, is_drafted: bool) -> bool:
        """Whether more times are needed than are known, or will be after the step under way."""
        under_way = 0
        if self._planned is not None:
            planned, depth = self._planned
            under_way = int(planned is regime and (depth > 0) == is_drafted)
        return regime.steps.count(is_drafted=is_drafted) + under_way < LEAST_TIMES[is_drafted]

    def _chances(self, known: list[Acceptance]) -> list[list[float]]:
        """How likely each draft of each sequence is to be accepted with all before it."""
        priors = [PRIOR_DRAFTS * prior for prior in self._priors()]
        found = []
        for one in known:
            chance, chances = 1.0, []
            for prior, hits, count in zip(priors, one.hits, one.counts, strict=True):
                chance *= (prior + hits) / (PRIOR_DRAFTS + count)
                chances.append(chance)
            found.append(chances)
        return found

    def _priors(self) -> list[float]:
        """Acceptance by position over all; a position of which little is known is like the one
        before."""
        prior, priors = _FIRST_ACCEPTANCE, []
        for at in range(self.most):
            prior = self._all.mean(at, prior)
            priors.append(prior)
        return priors

    # ------------------------------------------------------------------------------ trying and off

    def _vary(self, regime: Regime, chances: list[list[float]], best: list[int]) -> list[int]:
        """Fewer drafts, more, or none, for as few steps as suffice to see that it became faster."""
        for skipped in range(len(_TRIES)):
            vary = _TRIES[(regime.turn + skipped) % len(_TRIES)]
            counts = [vary(count, self.most) for count in best]
            if counts != best:
                break
        regime.turn += skipped
        regime.plain = int(regime.is_close and not any(counts))
        regime.end_try((1 + regime.plain) * regime.loss(chances, counts, best))
        return counts

    def _test(
        self, regime: Regime, source: Regime, keys: Sequence[int], chances: list[list[float]]
    ) -> list[int]:
        """None, but when it is time to try a draft for each: that for two steps, and on while they
        are accepted more often than thought, or little is lost by them. Steps without a draft that
        could be verified do not count, and cost nothing."""
        ones, none = [1] * len(keys), [0] * len(keys)
        if regime.tried is None:
            if regime.seen < regime.due and not self._is_tried(keys):
                return none
            regime.tried = 0
        proposed, accepted = self._first_drafts
        if not proposed:
            return ones
        # Of few of them that can be drafted for, acceptance is learned, and hardly what it takes.
        is_of_few = 2 * proposed < len(keys)
        verified = [int(at < proposed) for at in range(len(keys))]
        regime.tried += 1
        regime.lost += source.loss(chances, verified, none)
        prior = self._priors()[0]
        surprise = prior * proposed + _SURPRISE * math.sqrt(prior * (1 - prior) * proposed)
        is_over = regime.lost > _TRY_LOSS or (is_of_few and accepted < proposed)
        is_dull = accepted <= surprise and is_over
        if regime.tried < _TRY_STEPS or not (is_dull or regime.tried >= _LONGEST_TRY):
            return ones
        self._tries.difference_update(keys)
        regime.purse.spend(regime.lost)
        regime.end_try(regime.lost)
        return none

    def _is_tried(self, keys: Sequence[int]) -> bool:
        return not self._tries.isdisjoint(keys)

    def _judge(
        self, does_pay: bool, chances: list[list[float]], regime: Regime, source: Regime
    ) -> None:
        """Say so when drafting has not paid for some steps, or has again."""
        steps = self._last.used
        if not does_pay:
            self._idle, self._busy = self._idle + steps, 0
            promise = (1 + _FIRST_ACCEPTANCE * source.share) / source.slower
            self._patience = _LONG_PATIENCE if promise >= _PROMISE else _PATIENCE
            is_spent = regime.purse.is_spent(self._patience)
            if not self._reason and (is_spent or self._idle >= _OFF_AFTER):
                self._reason = source.explain(chances)
                self._start_gap = _FIRST_START if promise > 1 else 2 * _FIRST_START
                log.info("drafting is off: %s", self._reason)
            return
        self._idle, self._busy = 0, self._busy + steps * (self._first_drafts[0] > 0)
        if self._busy >= _ON_AFTER and self._reason:
            self._reason = ""
            for regime in self._regimes.values():
                regime.rests, regime.purse.has_given_up = 0, False
            log.info("drafting is on again: %s", source.explain(chances))
