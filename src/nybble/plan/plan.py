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

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.layout import Layout, Leaf, Listing
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo, TensorSpec, collector_paused
from nybble.errors import ModelError, RecipeError
from nybble.families import Claimed, Dimensions, Family, find_family, generic_family
from nybble.formats.block import Shape
from nybble.formats.scheme import BF16, Scheme
from nybble.plan.recipe import Recipe

#: Dtypes a weight may have to be quantized.
FLOATS = ("BF16", "F16", "F32")
#: Leaves that only a quantized module has.
QUANTIZED_LEAVES = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "weight_global_scale")
    + ("qweight", "qzeros", "scales", "gate_up_proj_scale", "down_proj_scale")
)
#: Roles that a decoded token does not read: the embedding is a look-up, the others are other
#: models' work.
NOT_PER_TOKEN = ("embedding", "vision", "mtp")


@dataclass(frozen=True, slots=True)
class Member:
    """One matrix [N, K] of the source and the module it becomes.

    `source` is the tensor's name, `expert` its place in a stack [E, rows, K] or None, `first_row`
    where it begins.
    """

    module: str
    source: str
    expert: int | None
    first_row: int
    shape: Shape

    def matrix(self, checkpoint: Checkpoint) -> NDArray[np.generic]:
        """Its rows in the mapped source, [N, K]."""
        array = checkpoint.array(self.source)
        if self.expert is not None:
            array = array[self.expert]
        return array[self.first_row : self.first_row + self.shape[0]]


@dataclass(frozen=True, slots=True)
class Job:
    """The members of one fused group (or one lone matrix): they share a tensor scale and are done
    together."""

    name: str
    role: str
    scheme: Scheme
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that goes over byte for byte."""

    tensor: TensorInfo
    role: str


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
        return tuple(specs)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all tensors of the result, headers not counted."""
        return sum(row.bytes for row in self.rows)

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
    checkpoint: Checkpoint, recipe: Recipe, layout: Layout, *, generic: bool = False
) -> Plan:
    """Decide what happens to every tensor of an unquantized checkpoint.

    Raises ModelError for an unknown model type (unless `generic`), an unclaimed tensor, a shape
    that contradicts the configuration or a missing tensor; RecipeError for a source that is
    quantized already, a rule that matches nothing, a split fused group, experts of a layer that
    differ, or schemes that the layout cannot carry; FormatError for a weight that does not divide
    into blocks.
    """
    checkpoint.side_files()  # what cannot be carried over is refused now, not after hours of work
    notes = [*_refuse_quantized(checkpoint), *_left_behind(checkpoint)]
    tensors = checkpoint.tensors
    family = _family(checkpoint, generic=generic)
    dimensions = family.dimensions(checkpoint.config)
    claims = {name: family.claim(name) for name in tensors}
    notes += _check_tensors(checkpoint, family, dimensions, claims)

    used: set[int] = set()
    drafts: dict[str, Job] = {}
    members: dict[str, list[Member]] = {}
    copies = []
    for name, tensor in tensors.items():
        claimed = claims[name]
        assert claimed is not None
        found = _members(claimed, tensor) if claimed.claim.is_linear else []
        chosen = _schemes(recipe, claimed.claim.role, found, used)
        if claimed.claim.role == "lm_head" and dimensions.tied:
            chosen = [BF16]
        if not any(s.weight for s in chosen):
            copies.append(Copy(tensor, claimed.claim.role))
            continue
        _check_quantizable(tensor, found, chosen)
        for (group, member), scheme in zip(found, chosen, strict=True):
            draft = drafts.get(group)
            if draft is None:
                drafts[group] = Job(group, claimed.claim.role, scheme, ())
                members[group] = []
            elif draft.scheme is not scheme:
                first = members[group][0].module
                raise _split(recipe, group, first, draft.scheme, member.module, scheme)
            members[group].append(member)
    _refuse_mixed_dtypes(tensors, members)
    _refuse_split_copies(recipe, drafts, copies, claims)
    _refuse_mixed_experts(recipe, drafts, members, copies, claims)
    if generic:
        # Its linears have one role: the rules of a recipe for others cannot all match.
        used |= set(range(len(recipe.rules))) if used else set()
    _refuse_idle_rules(recipe, used, family, claims)
    notes += _idle_globs(recipe, claims)
    if refusal := layout.refusal(list({id(j.scheme): j.scheme for j in drafts.values()}.values())):
        raise RecipeError(f"recipe {recipe.name}: {refusal}")
    if dimensions.tied and any("lm_head" in r.roles and r.scheme.weight for r in recipe.rules):
        notes.append("lm_head is tied to the embedding and stays as it is: the look-up needs it")
    notes += _downgrades(recipe, tensors, claims, layout)
    if recipe.kv_cache and not layout.declares_kv_cache:
        notes.append(
            f"the {recipe.kv_cache} KV cache of the recipe is not declared: readers of "
            f"{layout.name} expect measured scales beside it. Ask the engine for it "
            "(vLLM: --kv-cache-dtype fp8)"
        )
    jobs = tuple(Job(g, d.role, d.scheme, tuple(members[g])) for g, d in drafts.items())
    return Plan(checkpoint, family, dimensions, recipe, layout, jobs, tuple(copies), tuple(notes))


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


def _refuse_mixed_dtypes(
    tensors: Mapping[str, TensorInfo], members: Mapping[str, Sequence[Member]]
) -> None:
    """Members of a fused group are done in one kernel call, which takes one dtype."""
    for group, found in members.items():
        first = tensors[found[0].source]
        for m in found[1:]:
            other = tensors[m.source]
            if other is not first and other.dtype != first.dtype:
                raise RecipeError(
                    f"the fused group {group} holds {first.dtype} ({first.name}) and "
                    f"{other.dtype} ({other.name}); bring them to one dtype, or leave both plain"
                )


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
        kept = "stay as they are" if rule.scheme.weight is None else f"become {rule.scheme}"
        notes.append(
            f"{', '.join(roles)} {kept}: {now:,} bytes instead of {wanted:,} as {rule.wanted}, "
            "whose input scales must be measured with calibration data; this run has none"
        )
    return notes


def _refuse_quantized(checkpoint: Checkpoint) -> list[str]:
    """Raise if the file holds quantized weights; a note if only config.json says so."""
    section = checkpoint.config.get("quantization_config")
    method = section.get("quant_method", "?") if isinstance(section, Mapping) else ""
    marks = [n for n in checkpoint.tensors if n.rpartition(".")[2] in QUANTIZED_LEAVES]
    if marks:
        says = f"quant_method {method}" if method else "nothing of it in config.json"
        raise RecipeError(
            f"{checkpoint.path}: is quantized already ({marks[0]}{_more(marks)}; {says}); "
            "quantizing it again would add its errors to new ones. Start from the BF16 original"
        )
    if section is None:
        return []
    return [
        f"config.json has a quantization_config ({method}), but the file holds plain weights: it "
        "is taken for a leftover and replaced"
    ]


def _check_tensors(
    checkpoint: Checkpoint,
    family: Family,
    dimensions: Dimensions,
    claims: Mapping[str, Claimed | None],
) -> list[str]:
    """Raise for unclaimed, contradicting and missing tensors; return notes on an MTP head or a
    tower that is absent."""
    unclaimed = [name for name, claimed in claims.items() if claimed is None]
    if unclaimed:
        more = _more(unclaimed)
        raise ModelError(
            f"{checkpoint.path}: no rule of the family {family.model_type} claims tensor "
            f"{unclaimed[0]!r}{more}; nothing is dropped or guessed. If the file is right, the "
            "family is missing a fact: please report it. `--generic` plans by names and shapes "
            "alone"
        )
    # What is copied anyway may contradict the configuration: it is said, and stays as it is.
    copied = {n for n, c in claims.items() if c is not None and c.claim.role in ("mtp", "vision")}
    shapes = {name: t.shape for name, t in checkpoint.tensors.items()}
    trunk_shapes = {name: shape for name, shape in shapes.items() if name not in copied}
    if problems := family.contradictions(trunk_shapes, dimensions):
        raise ModelError(f"{checkpoint.path}: {problems[0]}{_more(problems)}")
    notes = []
    if problems := family.contradictions({n: shapes[n] for n in copied}, dimensions):
        notes.append(f"{problems[0]}{_more(problems)}; copied as it is")
    absent = family.missing(checkpoint.tensors, dimensions)
    side: dict[str, list[str]] = {"mtp": [], "vision": []}
    trunk: list[str] = []
    for name in absent:
        claimed = family.claim(name)
        side.get(claimed.claim.role if claimed else "", trunk).append(name)
    if trunk:
        raise ModelError(
            f"{checkpoint.path}: config.json promises {trunk[0]!r}, and no shard holds it"
            f"{_more(trunk)}; the download or an earlier tool lost it"
        )
    words = {"mtp": "an MTP head", "vision": "a vision tower"}
    return notes + [
        f"config.json promises {words[role]}, and the checkpoint lacks {len(names)} of its tensors "
        f"({names[0]}, ...): the result lacks them too, and engines that use them will fail"
        for role, names in side.items()
        if names
    ]


def _more(found: Sequence[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


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


def _check_quantizable(
    tensor: TensorInfo, found: Sequence[tuple[str, Member]], chosen: Sequence[Scheme]
) -> None:
    """Raise unless all matrices of a tensor are quantized, from floats, in whole blocks."""
    plain = [m.module for (_, m), s in zip(found, chosen, strict=True) if s.weight is None]
    if plain:
        raise RecipeError(
            f"tensor {tensor.name} holds {len(found)} matrices, and the recipe quantizes only some "
            f"of them ({plain[0]} stays); a stacked tensor is quantized whole or not at all"
        )
    if tensor.dtype not in FLOATS:
        raise RecipeError(
            f"tensor {tensor.name} is {tensor.dtype}; only {', '.join(FLOATS)} weights can be "
            "quantized"
        )
    shapes = {m.shape for _, m in found}
    for scheme in {id(s): s for s in chosen}.values():
        for shape in shapes:
            if scheme.weight is not None:
                scheme.weight.check_shape(shape, f"tensor {tensor.name}")


def _split(
    recipe: Recipe, group: str, first: str, first_scheme: Scheme, second: str, second_scheme: Scheme
) -> RecipeError:
    return RecipeError(
        f"recipe {recipe.name} splits the fused group {group}: {first} would be {first_scheme}, "
        f"{second} {second_scheme}. Engines run them as one matmul with one scheme; give all "
        "members the same"
    )


def _refuse_split_copies(
    recipe: Recipe,
    jobs: Mapping[str, Job],
    copies: Sequence[Copy],
    claims: Mapping[str, Claimed | None],
) -> None:
    for copy in copies:
        claimed = claims[copy.tensor.name]
        if claimed is None or not claimed.claim.is_linear or claimed.group_key not in jobs:
            continue
        job = jobs[claimed.group_key]
        quantized = next(
            n for n, c in claims.items() if c and c.group_key == job.name and n != copy.tensor.name
        )
        raise _split(recipe, job.name, quantized, job.scheme, copy.tensor.name, BF16)


def _refuse_mixed_experts(
    recipe: Recipe,
    jobs: Mapping[str, Job],
    members: Mapping[str, Sequence[Member]],
    copies: Sequence[Copy],
    claims: Mapping[str, Claimed | None],
) -> None:
    """Engines build all experts of a layer alike, and the configuration files say one thing of
    them."""
    seen: dict[str, tuple[str, Scheme]] = {}
    experts = [
        (members[g][0].module, j.scheme) for g, j in jobs.items() if j.role == "routed_expert"
    ]
    plain = [claims[c.tensor.name] for c in copies if c.role == "routed_expert"]
    for module, scheme in (*experts, *((c.module, BF16) for c in plain if c)):
        container = module.partition(".experts")[0]
        first, its_scheme = seen.setdefault(container, (module, scheme))
        if scheme is not its_scheme:
            raise RecipeError(
                f"recipe {recipe.name}: the experts of {container} would be quantized differently: "
                f"{first} {its_scheme}, {module} {scheme}. Engines build all experts of a layer "
                "alike; give them one scheme"
            )


def _refuse_idle_rules(
    recipe: Recipe, used: set[int], family: Family, claims: Mapping[str, Claimed | None]
) -> None:
    for i, rule in enumerate(recipe.rules):
        if i in used:
            continue
        linear = sorted({c.claim.role for c in claims.values() if c and c.claim.is_linear})
        raise RecipeError(
            f"recipe {recipe.name}: the rule {rule} matches no linear of this {family.model_type} "
            f"checkpoint, whose linears have the roles {', '.join(linear)}; a rule without effect "
            "is taken for a mistake"
        )


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
    quantized: dict[str, Scheme] = {}
    experts: dict[str, list[str]] = {}
    for job in plan.jobs:
        for m in job.members:
            container, found, below = m.module.rpartition(".experts.")
            if job.role == "routed_expert" and found:
                experts.setdefault(f"{container}.experts", []).append(below)
                quantized[f"{container}.experts"] = job.scheme
            else:
                quantized[m.module] = job.scheme
    plain, plain_experts, others = [], [], []
    for copy in plan.copies:
        claimed = plan.family.claim(copy.tensor.name)
        assert claimed is not None
        if not _is_linear_module(claimed):
            if copy.tensor.name.endswith(".weight") and len(copy.tensor.shape) == 2:
                others.append(claimed.module)
        elif claimed.claim.role == "routed_expert":
            name = claimed.module.partition(".experts")[0] + ".experts"
            if name not in plain_experts:
                plain_experts.append(name)
                experts[name] = ["0.gate_proj", "0.up_proj", "0.down_proj"]
        else:
            plain.append(claimed.module)
    return Listing(
        quantized,
        experts,
        plain,
        plain_experts,
        others,
        has_mtp=any(c.role == "mtp" for c in plan.copies),
        has_vision=any(c.role == "vision" for c in plan.copies),
        kv_cache=plan.recipe.kv_cache,
        version=version,
    )


def _is_linear_module(claimed: Claimed) -> bool:
    """A module that engines build as a linear layer, so that a config must say it stays plain."""
    return claimed.claim.is_linear or claimed.claim.role in ("router", "shared_expert_gate")
