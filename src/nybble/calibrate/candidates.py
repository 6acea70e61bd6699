"""Allocations that keep a limit of bytes, made of what each group's formats cost alone.

Damages of one group at a time add up only roughly, so there are several readings of them, and a
control that reads none; `api/allocate.py` measures each as a whole network. Computes nothing of
one itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, floor, log

from nybble.calibrate.allocate import FORMATS, Choice, Ground, Group
from nybble.calibrate.knapsack import Option, climb, solve
from nybble.formats.scheme import NVFP4_W4A4, NVFP4_W4A16, Scheme

#: W4A16 takes no more bytes than W4A4 and gives up its speed: so many of the weights may, at most.
WEIGHT_ONLY_SHARE = 0.125

#: Of each open group, the divergence that each of its schemes adds alone, in nats.
Damages = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An allocation and what the damages predict of it."""

    name: str
    choice: Choice
    predicted: float
    reason: str


def candidates(ground: Ground, damages: Damages, limit_bytes: int) -> list[Candidate]:
    """Allocations that keep the limit, the most trusting first, the control last; none twice.

    Four readings of the damages: as measured; each pulled half-way (geometrically) to what its
    role has per weight, for a figure from some hundred tokens is noisy; with one step up only; and
    trusted for half of the room alone.
    """
    readings = [
        ("frontier", damages, len(FORMATS), "damages as measured"),
        ("smoothed", _smoothed(ground, damages), len(FORMATS), "damages pulled to their role's"),
        ("one step", damages, 2, "damages as measured, no group more than one format up"),
    ]
    found = []
    for name, read, steps, reason in readings:
        options = [
            [
                Option(n, read[g.name][s.name])
                for s, n in zip(g.schemes[:steps], g.nbytes, strict=False)
            ]
            for g in ground.open
        ]
        choice = _choice(ground, solve(options, limit_bytes))
        found.append(Candidate(name, choice, predicted(choice, damages), reason))
    measured = [
        [Option(n, damages[g.name][s.name]) for s, n in zip(g.schemes, g.nbytes, strict=True)]
        for g in ground.open
    ]
    choice = _hedged(ground, measured, limit_bytes)
    reason = "half of the room by damages, the rest evenly spaced"
    found.append(Candidate("hedged", choice, predicted(choice, damages), reason))
    choice = control(ground, limit_bytes)
    reason = "evenly spaced layers raised until the bytes are used, damages unread"
    found.append(Candidate("control", choice, predicted(choice, damages), reason))
    unlike: list[Candidate] = []
    for candidate in found:
        if all(candidate.choice != other.choice for other in unlike):
            unlike.append(candidate)
    return unlike


def settle_inputs(
    ground: Ground, damages: Damages, share: float = WEIGHT_ONLY_SHARE
) -> tuple[Ground, tuple[str, ...]]:
    """Decide between W4A4 and W4A16, so that each group has one of them: a ground of what is left
    to choose, and the groups that become W4A16.

    Those are the groups whose inputs, rounded, add most divergence per weight, up to `share` of all
    weights that could be W4A4.
    """
    four = [g for g in ground.open if NVFP4_W4A4 in g.schemes and NVFP4_W4A16 in g.schemes]

    def rate(g: Group) -> float:
        by = damages[g.name]
        return (by[NVFP4_W4A4.name] - by[NVFP4_W4A16.name]) / g.weights

    left = share * sum(g.weights for g in four)
    promoted: dict[str, None] = {}
    for g in sorted(four, key=lambda g: (-rate(g), g.name)):
        if rate(g) > 0 and g.weights <= left:
            promoted[g.name] = None
            left -= g.weights
    groups = []
    for g in ground.groups:
        out = NVFP4_W4A4 if g.name in promoted else NVFP4_W4A16
        kept = [i for i, s in enumerate(g.schemes) if g not in four or s is not out]
        groups.append(
            replace(
                g,
                schemes=tuple(g.schemes[i] for i in kept),
                nbytes=tuple(g.nbytes[i] for i in kept),
            )
        )
    return Ground(tuple(groups), ground.fixed_bytes), tuple(promoted)


def predicted(choice: Choice, damages: Damages) -> float:
    """The sum of the damages, in nats."""
    return sum(by[choice[name].name] for name, by in damages.items() if name in choice)


def control(ground: Ground, limit_bytes: int) -> dict[str, Scheme]:
    """As many evenly spaced layers raised whole as the bytes allow, the rest group by group."""
    options = [[Option(n, 0.0) for n in g.nbytes] for g in ground.open]
    return _choice(ground, _spread(ground, options, limit_bytes))


def _hedged(
    ground: Ground, options: Sequence[Sequence[Option]], limit_bytes: int
) -> dict[str, Scheme]:
    """Half of the room by damages; what that leaves alone is raised as in the control."""
    small = sum(g.nbytes[0] for g in ground.open)
    first = solve(options, small + (limit_bytes - small) // 2)
    left = [o[at:] if at == 0 else [o[at]] for o, at in zip(options, first, strict=True)]
    second = _spread(ground, left, limit_bytes)
    return _choice(ground, [a + b for a, b in zip(first, second, strict=True)])


def _spread(
    ground: Ground, options: Sequence[Sequence[Option]], limit_bytes: int
) -> tuple[int, ...]:
    """The largest number of evenly spaced layers of which every group that can be is raised."""
    numbers = sorted({g.layer for g in ground.open if g.layer is not None})
    places = {g.name: i for i, g in enumerate(ground.open)}
    of_layer = {n: [places[g.name] for g in ground.open if g.layer == n] for n in numbers}
    head = [places[g.name] for g in ground.open if g.layer is None]
    found: tuple[int, ...] = ()
    for count in range(len(numbers), -1, -1):
        chosen = [numbers[floor((i + 0.5) * len(numbers) / count)] for i in range(count)]
        others = [n for n in numbers if n not in chosen]
        order = [of_layer[n] for n in (*chosen, *others)]
        found = climb(options, [*order, head], limit_bytes)
        raised = (found[at] > 0 or len(options[at]) == 1 for n in chosen for at in of_layer[n])
        if all(raised):
            break
    return found


def _choice(ground: Ground, chosen: Sequence[int]) -> dict[str, Scheme]:
    picked = {g.name: g.schemes[at] for g, at in zip(ground.open, chosen, strict=True)}
    return {g.name: picked.get(g.name, g.schemes[0]) for g in ground.groups}


def _smoothed(ground: Ground, damages: Damages) -> dict[str, dict[str, float]]:
    """sqrt(own x role's mean), both per weight."""
    sums: dict[tuple[str, str], list[float]] = {}
    for g in ground.open:
        for scheme, damage in damages[g.name].items():
            entry = sums.setdefault((g.role, scheme), [0.0, 0.0])
            entry[0] += damage
            entry[1] += g.weights

    def mean(g: Group, scheme: str, damage: float) -> float:
        total, weights = sums[g.role, scheme]
        usual = total / weights * g.weights
        return exp((log(damage) + log(usual)) / 2) if damage > 0 and usual > 0 else 0.0

    return {
        g.name: {s: mean(g, s, damage) for s, damage in damages[g.name].items()}
        for g in ground.open
    }
