"""What is known of steps of about so many sequences: how long they take with drafts and without,
how many drafts that makes best, when to look at something else, and what that may cost.

Knows no sequence by name, and not who drafts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nybble.engine.step_times import SHARES, StepTimes

#: Times that are needed, of steps without drafts and with: the first of a kind may do things once,
#: and drafts that do not seem to pay are given some more, for caches and code to become warm.
LEAST_TIMES = {False: 2, True: 3}
#: While so few times without drafts are known that they may mislead, a step goes without where
#: drafts seem to pay: the sooner the less they do, and the fewer are known; of so many known times
#: each costs this share.
_SURE_TIMES, _CHECK_SHARE = 5, 1 / 100
#: After a step with drafts, and a head that computed them, caches are cold: of a small model the
#: first step without was a fifth slower. Where drafts save less than this share of the steps, the
#: second one counts.
_DOUBT = 0.5

#: Trying something else may cost this share of the time, but comes in so many steps at the least
#: and at the most.
_TRY_SHARE, FIRST_GAP, _LAST_GAP = 1 / 200, 32, 1024
#: Of what drafts gained before, as many steps may be spent on keeping up what they need, but no
#: more than this share of each. A price below the second share is none.
_MOST_CREDIT, _CREDIT_SHARE, _NO_PRICE = 24.0, 0.02, 0.005
#: However much was lost at once, after four hundred steps it is forgiven enough for another try.
_MOST_SPENT = 5.0


@dataclass(slots=True)
class Purse:
    """What may be spent, in steps, on drafting where no draft pays, for numbers of sequences within
    an octave: some patience, a small share of the `seen` steps, and some of what was gained.

    `has_given_up`: nothing is kept up any longer, until drafting is on again.
    """

    seen: int = 0
    spent: float = 0.0
    spent_at: int = 0
    credit: float = 0.0
    has_given_up: bool = False

    def spend(self, steps: float) -> None:
        """So many were lost; what was spent long ago is forgiven."""
        forgiven, self.spent_at = (self.seen - self.spent_at) * _TRY_SHARE, self.seen
        self.spent = min(max(0.0, self.spent - forgiven) + steps, _MOST_SPENT)

    def keep_up(self, price: float, steps: int) -> None:
        """What drafting needs was kept up for so many steps, each of which became longer by so
        much."""
        price = max(0.0, price - _NO_PRICE) * steps
        earned = min(price, _CREDIT_SHARE * steps, self.credit)
        self.credit -= earned
        self.spend(price - earned)

    def gain(self, steps: float) -> None:
        """So many were saved by drafts."""
        self.credit = min(_MOST_CREDIT, self.credit + steps)
        self.spent = max(0.0, self.spent - steps)

    def is_spent(self, patience: float) -> bool:
        """Whether nothing more is to be spent for now."""
        self.spend(0.0)
        return self.spent > patience


@dataclass(slots=True)
class Regime:
    """What is known of steps of about so many sequences.

    `tried` counts the steps of the try under way, None while there is none, and `lost` what it has
    cost, in steps; `turn` says what is tried next. Until `rests` steps were seen nothing is to be
    drafted or decided.

    From `check` steps on the time without drafts may be looked at again, since few are known:
    `known_before` of them were, when last was judged otherwise; `plain` more steps go without.
    `is_close`: drafts do not gain so much that cold caches decide nothing.
    """

    sequences: int
    purse: Purse
    steps: StepTimes = field(default_factory=StepTimes)
    drafts: StepTimes = field(default_factory=lambda: StepTimes((0.0, 0.0)))
    seen: int = 0
    due: int = FIRST_GAP
    check: int = 0
    known_before: int = 0
    plain: int = 0
    rests: int = 0
    tried: int | None = None
    lost: float = 0.0
    turn: int = 0
    does_pay: bool = False
    is_close: bool = True

    # -------------------------------------------------------------------------- what it knows

    @property
    def is_known(self) -> bool:
        """Whether steps with drafts can be compared with those without."""
        return self.is_timed and self.steps.count(is_drafted=True) > 0

    @property
    def is_timed(self) -> bool:
        """Whether it is known how long steps without drafts take."""
        return self.steps.count(is_drafted=False) >= LEAST_TIMES[False]

    def is_like(self, other: Regime) -> bool:
        """Whether numbers of sequences are so near that times rise about alike."""
        return max(self.sequences, other.sequences) <= 2 * min(self.sequences, other.sequences)

    def seconds(self, drafts: float, depth: int) -> float:
        """Of a step with `drafts` for each sequence, at most `depth` for one, and their making; or
        what it takes that some may be made later."""
        return self.steps.at(drafts) + self.drafts.at(depth)

    @property
    def share(self) -> float:
        """Of how many sequences a draft for each can be judged by what is known."""
        return min(1.0, self.steps.reach)

    @property
    def slower(self) -> float:
        """How many times as long a step takes with one draft for each sequence of that share."""
        return self.seconds(self.share, 1) / self.steps.at(0.0)

    def best(self, chances: list[list[float]], worth: float) -> tuple[list[int], float]:
        """The numbers of drafts that give most tokens a second, `worth` times those without at the
        least, and how many steps each such step saves beside steps of an engine without drafts.

        Drafts are taken by how likely they are accepted; none comes before those it follows, which
        are likelier. They are counted in as fine parts of the sequences as times are known by.
        """
        total, gain, depth = len(chances), 0.0, 0
        steps, making = self.steps, 0.0
        plain = total / steps.at(0.0)
        best_rate, best = plain * worth, 0
        ranked = sorted(
            (-chance, at, number)
            for number, one in enumerate(chances)
            for at, chance in enumerate(one)
        )
        reach = steps.reach * total
        for count, (chance, at, _) in enumerate(ranked, 1):
            if count > reach:
                break
            gain -= chance
            if at >= depth:
                depth = at + 1
                making = self.drafts.at(depth)
            if count * SHARES % total < SHARES:
                rate = (total + gain) / (steps.at(count / total) + making)
                if rate > best_rate:
                    best_rate, best = rate, count
        counts = [0] * total
        for _, _, number in ranked[:best]:
            counts[number] += 1
        return counts, best_rate / plain - 1 if best else 0.0

    def loss(self, chances: list[list[float]], counts: list[int], best: list[int]) -> float:
        """How many steps of the best are lost by one with other numbers of drafts."""

        def expected(counts: list[int]) -> tuple[float, float]:
            tokens = sum(1 + sum(c[:n]) for c, n in zip(chances, counts, strict=True))
            return tokens, self.seconds(sum(counts) / len(counts), max(counts))

        (tokens, seconds), (best_tokens, best_seconds) = expected(counts), expected(best)
        return max(0.0, seconds / best_seconds - tokens / best_tokens)

    def explain(self, chances: list[list[float]]) -> str:
        """How often drafts are accepted, and what they cost."""
        accepted, share = sum(one[0] for one in chances) / len(chances), self.share
        crowd = f" for {len(chances)} sequences at once" if len(chances) > 1 else ""
        part = "it" if share == 1 else f"it for {100 * share:.0f} % of them"
        return (
            f"1 draft is accepted {accepted:.2f} of the time, and a step with {part} takes "
            f"{self.slower:.2f} times as long{crowd}"
        )

    # ------------------------------------------------------------------ when to look elsewhere

    def judge(self, gain: float) -> None:
        """Drafts save `gain` steps here, 0.0 where they do not pay; if that they do, or do not, is
        news, something else is tried soon."""
        self.is_close, does_pay = gain < _DOUBT, gain > 0
        if does_pay != self.does_pay:
            self.does_pay, self.due = does_pay, min(self.due, self.seen + FIRST_GAP)
            # A machine may have become slower or faster since steps without drafts were timed.
            count = self.steps.count(is_drafted=False)
            self.check, self.known_before = 0, max(0, count - LEAST_TIMES[False])

    def is_to_check(self, gain: float) -> bool:
        """Whether this step is to go without drafts, though they save `gain` steps, for all that is
        known of few times."""
        if self.plain:
            self.plain -= 1
            return True
        known = self.steps.count(is_drafted=False) - self.known_before
        if known >= _SURE_TIMES or self.seen < self.check:
            return False
        is_first, loss = not self.check, gain / (1 + gain)
        self.check = self.seen + math.ceil(loss * known / _CHECK_SHARE)
        self.plain = int(self.is_close and not is_first)
        return not is_first

    def end_try(self, loss: float) -> None:
        """Back to the best, until what was lost, in steps, is a small share of the time."""
        self.tried, self.lost, self.turn = None, 0.0, self.turn + 1
        self.due = self.seen + int(min(max(FIRST_GAP, loss / _TRY_SHARE), _LAST_GAP))
