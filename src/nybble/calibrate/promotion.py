"""Which W4A4 linears lose most by the rounding of their inputs, and a recipe that spares them.

Weights can make up for their own rounding, not for that of what is multiplied with them: in W4A4 it
is a floor, and it is uneven. For every group of linears that engines run with one scheme, a few
windows of text go through its layer twice, once with that group's inputs rounded; the damage is

    the mean over tokens of |change of the layer's output|^2 / |the layer's output|^2

so it counts what softmax, gates and routing make of the error, and how much the group's part is of
the residual stream at all, which an error of the linear's own output does not. What later layers
make of it is not measured; `allocate.py` does that, at the price of a pass through all of them.

W4A16 takes the same bytes: what a promoted group gives up is the speed of four-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from nybble.calibrate.activations import QuantizedInputs
from nybble.errors import RecipeError
from nybble.formats.scheme import NVFP4_W4A4, NVFP4_W4A16
from nybble.kernels.compute import Compute
from nybble.models.layer import Layer
from nybble.models.linear import Experts, Linear, Mode
from nybble.models.model import Model
from nybble.models.state import Batch, Cache
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan
from nybble.plan.recipe import Recipe, Rule
from nybble.progress import Progress
from nybble.stream.executor import Stream

#: Of the automatic choice: a group goes when its share of the damage is so many times its share of
#: the weights; evenly spread noise promotes nothing.
OUT_OF_PROPORTION = 4.0
#: The weights that the automatic choice may promote, at most.
MOST_SHARE = 0.125

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class Spot:
    """A W4A4 group: `name` is the fused group's, or the container of a layer's experts; `damage`
    what the rounding of its inputs does to its layer's output."""

    name: str
    role: str
    modules: tuple[str, ...]
    weights: int
    damage: float


@dataclass(frozen=True, slots=True)
class Promotion:
    """What was measured, and what is spared of it: `promoted` are names of `spots`."""

    spots: tuple[Spot, ...]
    promoted: tuple[str, ...]
    recipe: Recipe

    @property
    def share(self) -> float:
        """Of the weights that were measured, those that are promoted."""
        every = sum(s.weights for s in self.spots)
        return sum(s.weights for s in self.spots if s.name in self.promoted) / every

    @property
    def spared(self) -> float:
        """Of all damage, that of what is promoted."""
        every = sum(s.damage for s in self.spots)
        kept = sum(s.damage for s in self.spots if s.name in self.promoted)
        return kept / every if every > 0 else 0.0

    def as_json(self) -> dict[str, object]:
        """For a report: groups in the order of their damage, modules left out."""
        rows = [
            {k: v for k, v in asdict(s).items() if k != "modules"}
            | {"promoted": s.name in self.promoted}
            for s in sorted(self.spots, key=lambda s: -s.damage)
        ]
        return {"weights_share": self.share, "damage_share": self.spared, "groups": rows}


def measure_spots(
    plan: Plan,
    input_scales: Mapping[str, float],
    windows: Sequence[Tensor],
    *,
    threads: int,
    progress: Progress,
    limit_bytes: int | None = None,
) -> list[Spot]:
    """The damage of every W4A4 group of the trunk's layers, on windows int64 [length].

    Windows should not be those that the scales were measured on. The output head and an MTP head
    are in no layer and not judged. Raises RecipeError for a plan without W4A4 layers, and what a
    streamed forward raises.
    """
    refuse_nothing_to_promote(plan)
    quantized = QuantizedInputs(plan, input_scales)
    groups = _groups(plan)
    model = Model(plan.checkpoint)
    mode = Mode(Compute("bf16", threads))
    stream = Stream(model, windows, mode, limit_bytes=limit_bytes, progress=progress)
    layers = model.network.dims.layers
    stream.begin()
    progress.stage("judge inputs", stream.plan.tokens * layers, unit="token layers")
    damage = dict.fromkeys(groups, 0.0)
    for number in range(layers):
        layer = model.weights.layer(number)
        here = {n: jobs for n, jobs in groups.items() if n.startswith(layer.name + ".")}
        variants = {n: rounding_in(layer, _modules(jobs), quantized) for n, jobs in here.items()}
        judged = _Judged(layer, variants, dict.fromkeys(variants, 0.0))
        stream.step(number, judged)
        for name, total in judged.changes.items():
            damage[name] = total / stream.plan.tokens
        model.weights.drop_layer(number)
    stream.close()
    return [_spot(name, jobs, damage[name]) for name, jobs in groups.items()]


def refuse_nothing_to_promote(plan: Plan) -> None:
    """Raise RecipeError for a plan without a W4A4 linear in a layer of the trunk."""
    if not _groups(plan):
        raise RecipeError(
            f"recipe {plan.recipe.name} quantizes no inputs of a layer to four bits, so there is "
            "nothing to promote; leave --promote out"
        )


def promote(plan: Plan, spots: Sequence[Spot], share: float | None = None) -> Promotion:
    """Spare the worst: groups in the order of damage per weight, until the next would take more
    than `share` of the measured weights; None: those out of proportion, MOST_SHARE at most.

    Raises RecipeError for a share that is none.
    """
    if share is not None and not 0 < share <= 1:
        raise RecipeError(f"--promote {share}: expected a share of the weights, above 0, at most 1")
    weights, damage = sum(s.weights for s in spots), sum(s.damage for s in spots)
    left = round((MOST_SHARE if share is None else share) * weights)
    chosen: list[str] = []
    for s in sorted(spots, key=lambda s: -s.damage / s.weights):
        if share is None and s.damage * weights <= OUT_OF_PROPORTION * damage * s.weights:
            break
        if s.weights <= left:
            chosen.append(s.name)
            left -= s.weights
    spared = [s for s in spots if s.name in chosen]
    return Promotion(tuple(spots), tuple(s.name for s in spared), _derived(plan.recipe, spared))


def rounding_in(part: _Part, modules: frozenset[str], quantized: QuantizedInputs) -> _Part:
    """A part of a network (a layer, say) whose linears among `modules` round their inputs as the
    plan's schemes do when a forward simulates; all others, and all weights, stay as they are."""
    if isinstance(part, Linear):
        found = [r for m in part.modules if m in modules and (r := quantized.of(m)) is not None]
        if not found:
            return part
        scale = max((r.scale for r in found if r.scale is not None), default=None)
        return replace(part, activation=found[0].activation, input_scale=scale)
    if isinstance(part, Experts):
        first = quantized.of(part.modules[0][0]) if part.modules[0][0] in modules else None
        if first is None:
            return part
        rounded = [max(r.scale or 0.0 for m in e if (r := quantized.of(m))) for e in part.modules]
        scales = torch.tensor(rounded) if first.activation.has_input_scale else None
        return replace(part, activation=first.activation, input_scales=scales)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changed = {}
    for field in fields(part):
        value = getattr(part, field.name)
        other = rounding_in(value, modules, quantized) if is_dataclass(value) else value
        if other is not value:
            changed[field.name] = other
    return replace(part, **changed) if changed else part


@dataclass(frozen=True, slots=True)
class _Judged:
    """Stands in for a layer in `Stream.step`, computes the same, and adds up how much the output of
    each variant differs: `changes`, a sum over tokens."""

    layer: Layer
    variants: Mapping[str, Layer]
    changes: dict[str, float]

    @property
    def name(self) -> str:
        """The layer's."""
        return self.layer.name

    def __call__(self, x: Tensor, batch: Batch, cache: Cache, mode: Mode) -> Tensor:
        """As the layer."""
        rounding = Mode(mode.compute, simulate=True)
        found = self.layer(x.clone(), batch, cache, mode)
        energy = found.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        for name, variant in self.variants.items():
            other = variant(x.clone(), batch, cache, rounding)
            self.changes[name] += float(((other - found).square().sum(-1) / energy).sum())
        return found


def _groups(plan: Plan) -> dict[str, list[Job]]:
    """The W4A4 jobs of the trunk's layers by group; all experts of a layer are one."""
    found: dict[str, list[Job]] = {}
    for job in plan.jobs:
        if job.scheme is not NVFP4_W4A4 or job.role in ("lm_head", "mtp"):
            continue
        container, is_expert, _ = job.members[0].module.rpartition(".experts.")
        is_stack = is_expert and job.role == "routed_expert"
        found.setdefault(f"{container}.experts" if is_stack else job.name, []).append(job)
    return found


def _modules(jobs: Sequence[Job]) -> frozenset[str]:
    return frozenset(m.module for job in jobs for m in job.members)


def _spot(name: str, jobs: Sequence[Job], damage: float) -> Spot:
    members = [m for job in jobs for m in job.members]
    weights = sum(m.shape[0] * m.shape[1] for m in members)
    return Spot(name, jobs[0].role, tuple(m.module for m in members), weights, damage)


def _derived(recipe: Recipe, spared: Sequence[Spot]) -> Recipe:
    """The recipe with rules before its own: what is spared, role by role, is W4A16."""
    if not spared:
        return recipe
    rules = []
    for role in dict.fromkeys(s.role for s in spared):
        globs = [
            glob
            for s in spared
            if s.role == role
            for glob in ((f"{s.name}.*",) if role == "routed_expert" else s.modules)
        ]
        rules.append(Rule((role,), tuple(globs), NVFP4_W4A16, None))
    title = f"{recipe.title}; the groups whose inputs suffer most W4A16"
    return replace(
        recipe, name=f"{recipe.name}-promoted", title=title, rules=(*rules, *recipe.rules)
    )
