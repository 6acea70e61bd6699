"""What may get which format, under a limit of bytes: groups of modules and their options.

What a recipe quantizes is divided into the groups that engines run with one scheme: fused groups,
and all experts of a layer. Each may be NVFP4, FP8 or stay as it is; a damage for each says what
that costs in divergence (`damage.py` measures), and `candidates.py` makes allocations of them.

Bits per weight: 8 times the bytes that the modules in question take in the checkpoint, their scales
included, over the number of their weights. Knows plans; computes nothing of a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

from nybble.checkpoint.layout import Layout
from nybble.errors import FormatError, RecipeError
from nybble.formats.block import NVFP4, BlockFormat
from nybble.formats.element import E4M3
from nybble.formats.scheme import (
    BF16,
    FP8_DYNAMIC,
    FP8_STATIC,
    NVFP4_W4A4,
    NVFP4_W4A16,
    Scheme,
)
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan

#: What a group may become, in words for people.
FORMATS = ("nvfp4", "fp8", "bf16")

Choice = Mapping[str, Scheme]  # of each group, by name


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that engines run with one scheme.

    `layer` is None for the head. `schemes` are its options, the smallest first (W4A4 before W4A16,
    whatever the few bytes of an input scale), and `nbytes` what it takes in each. A group with one
    option is kept as it is.
    """

    name: str
    role: str
    layer: int | None
    modules: tuple[str, ...]
    weights: int
    schemes: tuple[Scheme, ...]
    nbytes: tuple[int, ...]

    def bytes_as(self, scheme: Scheme) -> int:
        """What it takes in one of its schemes."""
        return self.nbytes[self.schemes.index(scheme)]

    @property
    def is_open(self) -> bool:
        """There is something to choose."""
        return len(self.schemes) > 1


@dataclass(frozen=True, slots=True)
class Ground:
    """What there is to divide: the groups of a plan, and the bytes of all that is no group."""

    groups: tuple[Group, ...]
    fixed_bytes: int

    @property
    def open(self) -> tuple[Group, ...]:
        """The groups with something to choose."""
        return tuple(g for g in self.groups if g.is_open)

    @property
    def weights(self) -> int:
        """Of the open groups: what bits per weight are counted over."""
        return sum(g.weights for g in self.open)

    def payload_bytes(self, choice: Choice) -> int:
        """Of the whole checkpoint."""
        return self.fixed_bytes + sum(g.bytes_as(choice[g.name]) for g in self.groups)

    def bits(self, choice: Choice) -> float:
        """Bits per weight of the open groups."""
        return 8 * sum(g.bytes_as(choice[g.name]) for g in self.open) / self.weights

    def smallest(self) -> dict[str, Scheme]:
        """Every group in its smallest option: the uniform checkpoint."""
        return {g.name: g.schemes[0] for g in self.groups}

    def limit(self, *, bits: float | None = None, payload_bytes: int | None = None) -> int:
        """The bytes that the open groups may take, for bits per weight or for a whole checkpoint.

        Raises RecipeError, with what there is, for a target that nothing reaches and for one that
        leaves nothing to choose.
        """
        small, large = (sum(g.nbytes[at] for g in self.open) for at in (0, -1))
        kept = self.payload_bytes(self.smallest()) - small
        if bits is not None:
            limit = floor(bits * self.weights / 8)
            asked, unit = f"{bits:g} bits per weight", 8 / self.weights
            ends = f"{small * unit:.4f} and {large * unit:.4f}"
        else:
            assert payload_bytes is not None
            limit = payload_bytes - kept
            asked = f"{payload_bytes / 2**30:.4g} GiB ({payload_bytes:,} bytes)"
            ends = f"{(small + kept) / 2**30:.4g} and {(large + kept) / 2**30:.4g} GiB"
        if not small <= limit < large:
            raise RecipeError(
                f"{asked} cannot be allocated: this recipe's options lie between {ends} "
                "(everything in the smallest format, everything in the largest); give a target "
                "between the two"
            )
        return limit


def find_ground(
    plan: Plan, formats: Sequence[str] = FORMATS, *, can_measure: bool = True
) -> Ground:
    """The groups of a plan and their options.

    `can_measure`: static scales of inputs can be had; without, a layout whose only FP8 is static
    has none. Raises RecipeError for an unknown format, four-bit schemes other than NVFP4, and a
    plan that leaves nothing to choose.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise RecipeError(f"unknown format {unknown[0]!r}; the formats are {', '.join(FORMATS)}")
    found: dict[str, list[Job]] = {}
    for job in plan.jobs:
        found.setdefault(_group_name(job), []).append(job)
    eight = _eight_bit(plan.layout, can_measure=can_measure)
    groups = tuple(_group(plan, name, jobs, formats, eight) for name, jobs in found.items())
    ground = Ground(
        groups,
        plan.payload_bytes - sum(plan.member_bytes(j, m) for j in plan.jobs for m in j.members),
    )
    if not ground.open:
        raise RecipeError(
            f"recipe {plan.recipe.name} leaves nothing to choose for this model among "
            f"{', '.join(formats)}; name more formats, or a recipe that quantizes more"
        )
    return ground


def _group_name(job: Job) -> str:
    """A fused group's own; of routed experts, the container that holds all of a layer's."""
    if job.role != "routed_expert":
        return job.name
    return job.members[0].module.partition(".experts.")[0] + ".experts"


def _eight_bit(layout: Layout, *, can_measure: bool) -> Scheme | None:
    """The FP8 that engines read in this layout: per channel with dynamic inputs if there is."""
    for scheme in (FP8_DYNAMIC, FP8_STATIC):
        if not layout.refusal([scheme]) and (can_measure or not scheme.needs_input_scale):
            return scheme
    return None


def _group(
    plan: Plan, name: str, jobs: Sequence[Job], formats: Sequence[str], eight: Scheme | None
) -> Group:
    first = jobs[0]
    members = [m for job in jobs for m in job.members]
    claimed = plan.family.claim(members[0].source)
    layer = claimed.layer if claimed is not None else None
    if layer is None and first.role != "lm_head":
        schemes = [first.scheme]  # no trunk reads it (MTP): its damage shows in no divergence
    else:
        schemes = _schemes(first, formats, eight)
    schemes = [s for s in schemes if all(_divides(s.weight, m.shape) for m in members)]
    schemes = schemes or [first.scheme]
    return Group(
        name,
        first.role,
        layer,
        tuple(m.module for m in members),
        sum(m.shape[0] * m.shape[1] for m in members),
        tuple(schemes),
        tuple(_nbytes(plan, jobs, s) for s in schemes),
    )


def _schemes(job: Job, formats: Sequence[str], eight: Scheme | None) -> list[Scheme]:
    own = job.scheme
    assert own.weight is not None
    four = own if own.weight is NVFP4 else NVFP4_W4A16
    if own.weight.is_packed and own.weight is not NVFP4:
        raise RecipeError(
            f"{job.name} is {own} in this recipe; an allocation chooses among NVFP4, FP8 and BF16. "
            "Start from a recipe with NVFP4"
        )
    found = [four] if "nvfp4" in formats else []
    if "nvfp4" in formats and four is NVFP4_W4A4:
        found.append(NVFP4_W4A16)
    if own.weight.element is E4M3:
        eight = own
    elif job.role == "lm_head":
        eight = None  # published mixes have the head in NVFP4 or as it was
    if "fp8" in formats and eight is not None:
        found.append(eight)
    if "bf16" in formats:
        found.append(BF16)
    return found


def _divides(fmt: BlockFormat | None, shape: tuple[int, ...]) -> bool:
    try:
        if fmt is not None:
            fmt.check_shape(shape, "")
    except FormatError:
        return False
    return True


def _nbytes(plan: Plan, jobs: Sequence[Job], scheme: Scheme) -> int:
    if scheme.weight is not None:
        shapes = [m.shape for job in jobs for m in job.members]
        return sum(leaf.nbytes for shape in shapes for leaf in plan.leaves(scheme, shape))
    tensors = plan.checkpoint.tensors
    return sum(
        m.shape[0] * m.shape[1] * tensors[m.source].nbytes // tensors[m.source].size
        for job in jobs
        for m in job.members
    )
