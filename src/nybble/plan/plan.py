"""The plan: what happens to every tensor of a checkpoint, what comes out, and how many bytes it
takes.

Made from headers alone. `quantize` executes it, `check` audits against it. A tensor that nobody
claims stops planning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from nybble.checkpoint.layout import Layout, Leaf, Listing
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo, TensorSpec, collector_paused
from nybble.errors import ModelError, RecipeError
from nybble.families import Claimed, Dimensions, Family, find_family, generic_family
from nybble.formats.block import Shape
from nybble.formats.scheme import BF16, Scheme
from nybble.plan.jobs import Copy, Job, KvScale, Member
from nybble.plan.kv_scales import plan_kv_scales
from nybble.plan.listing import make_listing
from nybble.plan.recipe import Recipe
from nybble.plan.refusals import (
    check_quantizable,
    check_tensors,
    refuse_idle_rules,
    refuse_mixed_dtypes,
    refuse_mixed_experts,
    refuse_quantized,
    refuse_split_copies,
    split_refusal,
)

#: Roles that a decoded token does not read: the embedding is a look-up, the others are other
#: models' work.
NOT_PER_TOKEN = ("embedding", "vision", "mtp")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the plan's table: tensors of one role with one scheme.

    `tensors` counts source tensors, `modules` what they become, `active` the parameters a decoded
    token reads.
    """

    role: str
    scheme: Scheme
    dtype: str  # of copies; "" for quantized rows
    tensors: int
    modules: int
    parameters: int
    active: int
    source_bytes: int
    bytes: int
    active_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per parameter, scales included."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Plan:
    """What will happen. Jobs and copies together take every tensor of the source exactly once."""

    checkpoint: Checkpoint
    family: Family
    dimensions: Dimensions
    recipe: Recipe
    layout: Layout
    jobs: tuple[Job, ...]
    copies: tuple[Copy, ...]
    notes: tuple[str, ...]
    kv_scales: tuple[KvScale, ...] = ()  # measured scales of an FP8 cache, where asked for
    _leaves: dict[tuple[str, Shape], tuple[Leaf, ...]] = field(default_factory=dict, repr=False)
    _sizes: dict[tuple[str, Shape], int] = field(default_factory=dict, repr=False)

    def leaves(self, scheme: Scheme, shape: Shape) -> tuple[Leaf, ...]:
        """The tensors that a module of this scheme and shape becomes."""
        key = (scheme.name, shape)
        if key not in self._leaves:
            self._leaves[key] = self.layout.leaves(scheme, shape)
        return self._leaves[key]

    def member_bytes(self, job: Job, member: Member) -> int:
        """Bytes on disk of one member."""
        key = (job.scheme.name, member.shape)
        if key not in self._sizes:
            self._sizes[key] = sum(leaf.nbytes for leaf in self.leaves(job.scheme, member.shape))
        return self._sizes[key]

    @cached_property
    def by_source(self) -> dict[str, list[tuple[Job, Member]]]:
        """The members that come out of each quantized source tensor, in the order of its rows."""
        found: dict[str, list[tuple[Job, Member]]] = {}
        for job in self.jobs:
            for member in job.members:
                found.setdefault(member.source, []).append((job, member))
        for members in found.values():
            members.sort(key=lambda m: (m[1].expert or 0, m[1].first_row))
        return found

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the result, in the order of the source."""
        copies = {c.tensor.name: c for c in self.copies}
        specs: list[TensorSpec] = []
        for name, tensor in self.checkpoint.tensors.items():
            if name in copies:
                specs.append(tensor.spec)
            for job, member in self.by_source.get(name, ()):
                specs.extend(
                    leaf.spec(member.module) for leaf in self.leaves(job.scheme, member.shape)
                )
        return (*specs, *(scale.spec for scale in self.kv_scales))

    @cached_property
    def needs_data(self) -> bool:
        """Some module has a stored input_scale, which only a measurement can give.

        Of the plan, not of the recipe: a rule for roles that this checkpoint lacks needs none.
        """
        return any(job.scheme.needs_input_scale for job in self.jobs)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all tensors of the result, headers not counted."""
        scalars = sum(scale.spec.nbytes for scale in self.kv_scales)
        return sum(row.bytes for row in self.rows) + scalars

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table by role and scheme."""
        return _table(self)

    @cached_property
    def stored_parameters(self) -> int:
        """What model hubs show as the size: stored elements, two four-bit weights in each, no
        scales, no MTP head."""
        total = sum(c.tensor.size for c in self.copies if c.role != "mtp")
        for job in self.jobs:
            for member in job.members:
                n, k = member.shape
                packed = job.scheme.weight is not None and job.scheme.weight.is_packed
                total += n * k // (2 if packed else 1)
        return total

    def digest(self) -> str:
        """A hash of everything that decides the bytes of the result, the source's values
        excepted."""
        text = hashlib.sha256()
        for spec in self.outputs:
            text.update(f"{spec.name} {spec.dtype} {spec.shape}\n".encode())
        for job in self.jobs:
            text.update(f"{job.name} {job.scheme} {[m.module for m in job.members]}\n".encode())
        return text.hexdigest()[:16]

    def listing(self, version: str) -> Listing:
        """What the layout's configuration files say: modules by scheme, experts by container."""
        return _listing(self, version)


@collector_paused()  # a plan is 100,000s of small objects and no cycle
def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layout: Layout,
    *,
    generic: bool = False,
    kv_scales: bool = False,
) -> Plan:
    """Decide what happens to every tensor of an unquantized checkpoint.

    With `kv_scales`, every attention layer gets the two scales of an FP8 cache.

    Raises ModelError for an unknown model type (unless `generic`), an unclaimed tensor, a shape
    that contradicts the configuration or a missing tensor; RecipeError for a source that is
    quantized already, a rule that matches nothing, a split fused group, experts of a layer that
    differ, a head untied for nothing, or schemes that the layout cannot carry; FormatError for a
    weight that does not divide into blocks.
    """
    checkpoint.side_files()  # what cannot be carried over is refused now, not after hours of work
    notes = [*refuse_quantized(checkpoint), *_left_behind(checkpoint)]
    tensors = checkpoint.tensors
    family = _family(checkpoint, generic=generic)
    dimensions = family.dimensions(checkpoint.config)
    claims = {name: family.claim(name) for name in tensors}
    named = {role for rule in recipe.rules for role in rule.roles}
    notes += check_tensors(checkpoint, family, dimensions, claims, named)

    used: set[int] = set()
    drafts: dict[str, Job] = {}
    members: dict[str, list[Member]] = {}
    copies = []
    for name, tensor in tensors.items():
        claimed = claims[name]
        assert claimed is not None
        is_named = claimed.claim.is_linear and claimed.claim.role in named
        found = _members(claimed, tensor) if is_named else []
        chosen = _schemes(recipe, claimed.claim.role, found, used)
        if claimed.claim.role == "lm_head" and dimensions.tied:
            chosen = [BF16]
        if not any(s.weight for s in chosen):
            copies.append(Copy(tensor, claimed.claim.role))
            continue
        check_quantizable(tensor, found, chosen)
        for (group, member), scheme in zip(found, chosen, strict=True):
            draft = drafts.get(group)
            if draft is None:
                drafts[group] = Job(group, claimed.claim.role, scheme, ())
                members[group] = []
            elif draft.scheme is not scheme:
                first = members[group][0].module
                raise split_refusal(recipe, group, first, draft.scheme, member.module, scheme)
            members[group].append(member)
    refuse_mixed_dtypes(tensors, members)
    refuse_split_copies(recipe, drafts, copies, claims)
    refuse_mixed_experts(recipe, drafts, members, copies, claims)
    if generic:
        # Its linears have one role: the rules of a recipe for others cannot all match.
        used |= set(range(len(recipe.rules))) if used else set()
    refuse_idle_rules(recipe, used, family, claims)
    notes += _idle_globs(recipe, claims)
    if refusal := layout.refusal(list({id(j.scheme): j.scheme for j in drafts.values()}.values())):
        raise RecipeError(f"recipe {recipe.name}: {refusal}")
    if dimensions.tied and any("lm_head" in r.roles and r.scheme.weight for r in recipe.rules):
        notes.append(
            "lm_head is tied to the embedding and stays as it is: the look-up needs it. "
            "--untie-head gives it codes of its own"
        )
    idle = [c.tensor.name for c in copies if c.tensor.name in checkpoint.aliases]
    if idle:
        raise RecipeError(
            f"recipe {recipe.name} leaves {idle[0]} as it is, so a head of its own would only take "
            "more bytes; choose a recipe with a rule for lm_head, or leave --untie-head out"
        )
    notes += [
        f"{alias}: the bytes of {name}, which stays for the look-up, as a tensor of its own; "
        "config.json will not tie them"
        for alias, name in checkpoint.aliases.items()
    ]
    notes += _downgrades(recipe, tensors, claims, layout)
    scalars = plan_kv_scales(recipe, layout, claims) if kv_scales else ()
    if recipe.kv_cache and not layout.declares_kv_cache and not scalars:
        notes.append(
            f"the {recipe.kv_cache} KV cache of the recipe is not declared: readers of "
            f"{layout.name} expect measured scales beside it. Ask the engine for it "
            "(vLLM: --kv-cache-dtype fp8)"
        )
    jobs = tuple(Job(g, d.role, d.scheme, tuple(members[g])) for g, d in drafts.items())
    return Plan(
        checkpoint, family, dimensions, recipe, layout, jobs, tuple(copies), tuple(notes), scalars
    )


def _family(checkpoint: Checkpoint, *, generic: bool) -> Family:
    if generic:
        shapes = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
        return generic_family(shapes)
    if not checkpoint.config:
        raise ModelError(f"{checkpoint.path}: has no config.json; complete the download")
    return find_family(checkpoint.config)


def _left_behind(checkpoint: Checkpoint) -> list[str]:
    return [
        f"{name}: the index does not name it, so it is no part of the model and stays behind"
        for name in checkpoint.unindexed
    ]


def _idle_globs(recipe: Recipe, claims: Mapping[str, Claimed | None]) -> list[str]:
    """A sentence for every path pattern that matches nothing beside others that do."""
    notes = []
    for rule in recipe.rules:
        for glob in rule.modules:
            one = replace(rule, modules=(glob,))
            if not any(
                one.matches(c.claim.role, module)
                for c in claims.values()
                if c is not None and c.claim.is_linear
                for module in _module_names(c)
            ):
                notes.append(f"{glob!r} in the rule {rule} matches no linear of these roles")
    return notes


def _module_names(claimed: Claimed) -> list[str]:
    if not claimed.claim.stack:
        return [claimed.module]
    return [f"{claimed.module}.0.{part}" for part in claimed.claim.stack]


def _downgrades(
    recipe: Recipe,
    tensors: Mapping[str, TensorInfo],
    claims: Mapping[str, Claimed | None],
    layout: Layout,
) -> list[str]:
    """What the data-free form of a recipe leaves in a wider format, with its bytes."""
    notes = []
    for rule in recipe.rules:
        if rule.wanted is None:
            continue
        now = wanted = 0
        roles: dict[str, None] = {}  # those that this checkpoint has, in order
        for name, claimed in claims.items():
            if claimed is None or claimed.claim.role not in rule.roles:
                continue
            tensor = tensors[name]
            for _, m in _members(claimed, tensor) if claimed.claim.is_linear else ():
                if rule.matches(claimed.claim.role, m.module):
                    roles[claimed.claim.role] = None
                    leaves = layout.leaves(rule.scheme, m.shape) if rule.scheme.weight else ()
                    plain = m.shape[0] * m.shape[1] * tensor.nbytes // tensor.size
                    now += sum(leaf.nbytes for leaf in leaves) or plain
                    wanted += sum(leaf.nbytes for leaf in layout.leaves(rule.wanted, m.shape))
        if not roles:
            continue
        kept = "stay as they are" if rule.scheme.weight is None else f"become {rule.scheme}"
        notes.append(
            f"{', '.join(roles)} {kept}: {now:,} bytes instead of {wanted:,} as {rule.wanted}, "
            "whose input scales are measured with text; the data-free form measures none"
        )
    return notes


def _members(claimed: Claimed, tensor: TensorInfo) -> list[tuple[str, Member]]:
    """The matrices in a tensor, each with the name of its fused group."""
    if not claimed.claim.stack:
        group = claimed.group_key or claimed.module
        return [(group, Member(claimed.module, tensor.name, None, 0, tensor.shape))]
    experts, rows, k = tensor.shape
    parts = claimed.claim.stack
    n = rows // len(parts)
    # As the per-expert layout has it: "...experts.3:gate_up", "...experts.3.down_proj".
    end = (
        ":" + "_".join(p.removesuffix("_proj") for p in parts) if len(parts) > 1 else f".{parts[0]}"
    )
    found = []
    for e in range(experts):
        base = f"{claimed.module}.{e}"
        group = base + end
        for i, part in enumerate(parts):
            found.append((group, Member(f"{base}.{part}", tensor.name, e, i * n, (n, k))))
    return found


def _schemes(
    recipe: Recipe, role: str, found: Sequence[tuple[str, Member]], used: set[int]
) -> list[Scheme]:
    """The scheme of each matrix in a tensor, by the first rule that names it; notes the rules that
    did."""
    rules = [(i, rule) for i, rule in enumerate(recipe.rules) if role in rule.roles]
    if found and rules and not rules[0][1].modules:  # one rule for all of a stack
        used.add(rules[0][0])
        return [rules[0][1].scheme] * len(found)
    chosen = []
    for _, member in found:
        at = next((i for i, rule in rules if rule.matches(role, member.module)), None)
        if at is not None:
            used.add(at)
        chosen.append(BF16 if at is None else recipe.rules[at].scheme)
    return chosen


def _active_share(role: str, dimensions: Dimensions) -> float:
    """The share of a role's parameters that one decoded token reads."""
    if role in NOT_PER_TOKEN and not (role == "embedding" and dimensions.tied):
        return 0.0
    if role == "routed_expert" and dimensions.experts:
        return dimensions.experts_per_token / dimensions.experts
    return 1.0


def _table(plan: Plan) -> tuple[Row, ...]:
    sums: dict[tuple[str, str, str], list[int]] = {}
    schemes: dict[str, Scheme] = {BF16.name: BF16}
    sources: dict[tuple[str, str, str], set[str]] = {}
    for copy in plan.copies:
        key = (copy.role, BF16.name, copy.tensor.dtype)
        t = copy.tensor
        _add(sums, key, 0, t.size, t.nbytes, t.nbytes)
        sources.setdefault(key, set()).add(t.name)
    width = {name: t.nbytes // max(t.size, 1) for name, t in plan.checkpoint.tensors.items()}
    for job in plan.jobs:
        key = (job.role, job.scheme.name, "")
        schemes[job.scheme.name] = job.scheme
        for m in job.members:
            size = m.shape[0] * m.shape[1]
            _add(sums, key, 1, size, size * width[m.source], plan.member_bytes(job, m))
            sources.setdefault(key, set()).add(m.source)
    order = {c.role: i for i, c in reversed(list(enumerate(plan.family.claims)))}
    rows = []
    for (role, scheme, dtype), (modules, parameters, before, after) in sums.items():
        share = _active_share(role, plan.dimensions)
        rows.append(
            Row(
                role,
                schemes[scheme],
                dtype,
                len(sources[role, scheme, dtype]),
                modules,
                parameters,
                round(parameters * share),
                before,
                after,
                round(after * share),
            )
        )
    rows.sort(key=lambda r: (-r.source_bytes, order.get(r.role, 0)))
    return tuple(rows)


def _add(
    sums: dict[tuple[str, str, str], list[int]], key: tuple[str, str, str], *amounts: int
) -> None:
    row = sums.setdefault(key, [0] * len(amounts))
    for i, amount in enumerate(amounts):
        row[i] += amount


def _listing(plan: Plan, version: str) -> Listing:
    modules = ((m.module, job.role, job.scheme) for job in plan.jobs for m in job.members)
    return make_listing(
        modules,
        plan.copies,
        plan.family,
        kv_cache=plan.recipe.kv_cache,
        version=version,
        has_kv_scales=bool(plan.kv_scales),
    )
