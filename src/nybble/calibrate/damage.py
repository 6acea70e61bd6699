"""What a format does to a model's answers, measured on a few windows of text: the divergence of
networks that are put together of several checkpoints.

One pass over the layers serves all of them. A *branch* leaves the original's hidden states at the
first layer where it differs, and goes through the rest beside it; at the end the head reads both,
and KL(original || branch) is exact over the vocabulary. A branch that replaces one group is a
probe: its divergence is that group's damage. For further formats of the group one layer is enough:
the divergence is taken to grow with the squared error of the layer's output, and only that is
measured (methods: second order, near its minimum).

Knows no recipe and no bytes; which networks are worth it, `allocate.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.calibrate.allocate import Choice, Group
from nybble.errors import EvaluationError
from nybble.formats.scheme import BF16
from nybble.kernels.vocabulary import divergence
from nybble.models.attention import Attention
from nybble.models.delta import GatedDelta
from nybble.models.feed_forward import MLP, MixtureOfExperts
from nybble.models.layer import Layer
from nybble.models.linear import Experts, Linear, Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.stream.executor import Stream
from nybble.stream.spill import InMemory

#: Hidden states of branches that exist at once; more branches take another pass.
BRANCH_BYTES = 1 << 30
#: Logits that exist at once, of one network.
_LOGITS_BYTES = 1 << 27

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that has every group in some scheme. `is_weight_only`: its weights are taken,
    and the rounding of inputs that it declares is not."""

    model: Model
    is_weight_only: bool = False


@dataclass(frozen=True, slots=True)
class Branch:
    """The original but for some groups, each in the scheme that `choice` says.

    `is_short`: it ends behind its first layer, for the error there.
    """

    choice: Choice
    is_short: bool = False


@dataclass(frozen=True, slots=True)
class Divergences:
    """What became of branches: `kl` float64 [branches, tokens] in nats, NaN for short ones;
    `errors` float64 [branches], the squared distance from the original behind the first layer that
    differs (0 where that is the head); `window` int64 [tokens]."""

    kl: FloatArray
    errors: FloatArray
    window: NDArray[np.int64]


class Bench:
    """Sources of one model, by the names of schemes ("bf16" is the original), and windows of text,
    int64 [length] each, to hold them against each other on."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        groups: Sequence[Group],
        windows: Sequence[Tensor],
        mode: Mode,
        progress: Progress,
        *,
        branch_bytes: int = BRANCH_BYTES,
    ) -> None:
        """Raises TextError for no windows or an empty one."""
        self.sources, self.mode, self.progress = sources, mode, progress
        self.windows = list(windows)
        self.original = sources[BF16.name].model
        self.group_of = {module: g.name for g in groups for module in g.modules}
        self.layer_of = {g.name: g.layer for g in groups}
        self.layers = self.original.network.dims.layers
        self.tokens = Stream(self.original, self.windows, mode).plan.tokens
        each = 4 * self.tokens * self.original.network.dims.hidden
        self.at_once = max(1, branch_bytes // each)
        self.head_layers = self._head_layers(groups)

    def run(self, branches: Sequence[Branch], title: str) -> Divergences:
        """Compute all branches; the result is in their order.

        Raises EngineError for NaN, naming the layer, and EvaluationError for a head that is not
        finite.
        """
        kl = np.full((len(branches), self.tokens), np.nan)
        errors = np.zeros(len(branches))
        order = sorted(range(len(branches)), key=lambda i: (self.first_layer(branches[i]), i))
        passes = _parts(order, [not b.is_short for b in branches], self.at_once)
        self.progress.stage(title, self._work(branches, passes), unit="token layers")
        for chosen in passes:
            self._pass([branches[i] for i in chosen], chosen, kl, errors)
        window = np.repeat(np.arange(len(self.windows)), [len(w) for w in self.windows])
        return Divergences(kl, errors, window.astype(np.int64))

    def first_layer(self, branch: Branch) -> int:
        """Where it leaves the original; the number of layers for the head."""
        found = [self.layer_of[name] for name, s in branch.choice.items() if s is not BF16]
        return min((self.layers if n is None else n for n in found), default=self.layers)

    def _work(self, branches: Sequence[Branch], passes: Sequence[Sequence[int]]) -> int:
        """Token layers."""
        whole = [b for b in branches if not b.is_short]
        own = len(branches) - len(whole)
        own += sum(self.layers - self.first_layer(b) + self.head_layers for b in whole)
        return self.tokens * (own + len(passes) * self.layers)

    def _head_layers(self, groups: Sequence[Group]) -> int:
        """How many layers' work the output head is: for the display of progress alone."""
        dims = self.original.network.dims
        share = dims.experts_per_token / dims.experts if dims.experts else 1.0
        weights = sum(
            g.weights * (share if g.role == "routed_expert" else 1)
            for g in groups
            if g.layer is not None
        )
        return max(1, round(dims.vocab * dims.hidden * self.layers / max(weights, 1)))

    def _pass(
        self, branches: Sequence[Branch], places: Sequence[int], kl: FloatArray, errors: FloatArray
    ) -> None:
        original = self._stream()
        original.begin()
        live: dict[int, Stream] = {}
        firsts = [self.first_layer(b) for b in branches]
        for number in range(self.layers):
            made = {name: s.model.weights.layer(number) for name, s in self.sources.items()}
            born = [i for i, first in enumerate(firsts) if first == number]
            for i in born:
                live[i] = self._fork(original, number)
            for i, stream in live.items():
                stream.step(number, self._mixed(made, branches[i].choice))
            original.step(number, made[BF16.name])
            for i in born:
                errors[places[i]] = _distance(live[i], original)
                if branches[i].is_short:
                    live.pop(i).close()
            for source in self.sources.values():
                source.model.weights.drop_layer(number)
        for i, first in enumerate(firsts):
            if first == self.layers:
                live[i] = original
        self._read(original, live, branches, places, kl)
        for stream in (original, *live.values()):
            stream.close()

    def _stream(self) -> Stream:
        return Stream(self.original, self.windows, self.mode, progress=self.progress)

    def _fork(self, original: Stream, number: int) -> Stream:
        """A stream whose hidden states are those that the original has before a layer."""
        assert isinstance(original.hidden, InMemory)
        stream = self._stream()
        stream.hidden = InMemory(self.tokens, original.hidden.rows.shape[1])
        stream.hidden.rows.copy_(original.hidden.rows)
        stream.hidden.done = number
        return stream

    def _mixed(self, made: Mapping[str, Layer], choice: Choice) -> Layer:
        return graft(made, lambda module: self._scheme(module, choice), self._is_weight_only)

    def _scheme(self, module: str, choice: Choice) -> str:
        scheme = choice.get(self.group_of.get(module, ""))
        return BF16.name if scheme is None else scheme.name

    def _is_weight_only(self, scheme: str) -> bool:
        return self.sources[scheme].is_weight_only

    def _read(
        self,
        original: Stream,
        live: Mapping[int, Stream],
        branches: Sequence[Branch],
        places: Sequence[int],
        kl: FloatArray,
    ) -> None:
        """The divergences of all whole branches, a few rows of logits at a time."""
        if not live:
            return
        heads = {name: s.model.head for name, s in self.sources.items()}
        ends = {i: self._head(heads, branches[i].choice) for i in live}
        rows = max(1, min(1024, _LOGITS_BYTES // (4 * heads[BF16.name].weight.n)))
        streams = [original.normed(), *(live[i].normed() for i in live)]
        at = 0
        for parts in zip(*streams, strict=True):
            normed = [part for _, part in parts]
            for first in range(0, len(normed[0]), rows):
                pieces = [n[first : first + rows].contiguous() for n in normed]
                known = heads[BF16.name](pieces[0], self.mode)
                targets = torch.zeros(len(known), dtype=torch.int64)  # only KL is asked for
                for i, piece in zip(live, pieces[1:], strict=True):
                    guess = ends[i](piece, self.mode)
                    part = divergence(known, guess, targets, self.mode.compute)
                    kl[places[i], at : at + len(known)] = part.kl.numpy()
                    self.progress.advance(len(known) * self.head_layers, "output head")
                at += len(known)
        for i in live:
            if not np.isfinite(kl[places[i]]).all():
                changed = next(iter(branches[i].choice), "nothing")
                raise EvaluationError(
                    f"the divergence of a network with {changed} replaced is not finite: the head "
                    "or the norm before it is damaged"
                )

    def _head(self, heads: Mapping[str, Linear], choice: Choice) -> Linear:
        return graft(heads, lambda module: self._scheme(module, choice), self._is_weight_only)


_Part = TypeVar("_Part", Layer, Linear)


def graft(
    made: Mapping[str, _Part], scheme: Callable[[str], str], is_weight_only: Callable[[str], bool]
) -> _Part:
    """One part of a network out of several of the same build: every linear from the one that
    `scheme` names for its first module, everything else from the original's."""
    found = _grafted(made, scheme, is_weight_only)
    assert isinstance(found, type(made[BF16.name]))
    return found


_Node = Layer | Attention | GatedDelta | MLP | MixtureOfExperts | Linear | Experts
_INNER = (Attention, GatedDelta, MLP, MixtureOfExperts, Linear, Experts)
_FIELDS = (
    *("mixer", "feed_forward", "qkv", "output", "qkvz", "ba"),
    *("router", "gate_up", "down", "shared", "shared_gate"),
)


def _grafted(
    made: Mapping[str, _Node], scheme: Callable[[str], str], is_weight_only: Callable[[str], bool]
) -> _Node:
    first = made[BF16.name]
    if isinstance(first, Linear | Experts):
        module = first.modules[0] if isinstance(first, Linear) else first.modules[0][0]
        name = scheme(str(module))
        found = made[name]
        if isinstance(found, Linear) and is_weight_only(name):
            return replace(found, activation=None, input_scale=None)
        if isinstance(found, Experts) and is_weight_only(name):
            return replace(found, activation=None, input_scales=None)
        return found
    changed = {
        field: _grafted({k: getattr(v, field) for k, v in made.items()}, scheme, is_weight_only)
        for field in _FIELDS
        if isinstance(getattr(first, field, None), _INNER)
    }
    return replace(first, **changed)  # type: ignore[arg-type]


def _distance(a: Stream, b: Stream) -> float:
    assert isinstance(a.hidden, InMemory)
    assert isinstance(b.hidden, InMemory)
    return float((a.hidden.rows - b.hidden.rows).double().square().sum())


def _parts(order: Sequence[int], is_long: Sequence[bool], most: int) -> list[list[int]]:
    """`order` in parts with at most so many that stay; short ones are in none's way."""
    found: list[list[int]] = [[]]
    count = 0
    for i in order:
        if is_long[i] and count == most:
            found.append([])
            count = 0
        found[-1].append(i)
        count += is_long[i]
    return found


# ---------------------------------------------------------------------------------------- damages


def measure_damages(bench: Bench, groups: Sequence[Group]) -> dict[str, dict[str, float]]:
    """Of each group, the mean divergence that each of its schemes adds alone, in nats.

    The smallest scheme by a probe through the whole network; the others by the ratio of squared
    errors behind the layer, but for the head, where all are measured. Staying as it is adds none.
    """
    probes: list[tuple[Group, str, Branch]] = []
    for g in groups:
        for at, scheme in enumerate(g.schemes):
            if scheme is not BF16:
                is_short = at > 0 and g.layer is not None
                probes.append((g, scheme.name, Branch({g.name: scheme}, is_short)))
    found = bench.run([branch for *_, branch in probes], "damage of each group")
    damages: dict[str, dict[str, float]] = {g.name: {} for g in groups}
    reference: dict[str, tuple[float, float]] = {}
    for (g, scheme_name, branch), kl, error in zip(probes, found.kl, found.errors, strict=True):
        if branch.is_short:
            whole, its_error = reference[g.name]
            damages[g.name][scheme_name] = float(whole * error / its_error) if its_error else 0.0
        else:
            mean = max(0.0, float(kl.mean()))
            reference.setdefault(g.name, (mean, error))
            damages[g.name][scheme_name] = mean
    for g in groups:
        if BF16 in g.schemes:
            damages[g.name][BF16.name] = 0.0
    return damages
