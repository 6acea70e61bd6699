"""What planning refuses: a source that is quantized or incomplete, and a recipe that splits what
engines run as one.

Each function raises for one reason, and says what to do; whatever else is true of the source is the
business of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.errors import ModelError, RecipeError
from nybble.families import Claimed, Dimensions, Family
from nybble.formats.scheme import BF16, Scheme
from nybble.plan.jobs import Copy, Job, Member
from nybble.plan.recipe import Recipe

#: Dtypes a weight may have to be quantized.
FLOATS = ("BF16", "F16", "F32")
#: Leaves that only a quantized module has.
QUANTIZED_LEAVES = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "weight_global_scale")
    + ("qweight", "qzeros", "scales", "gate_up_proj_scale", "down_proj_scale")
)


def refuse_quantized(checkpoint: Checkpoint) -> list[str]:
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


def check_tensors(
    checkpoint: Checkpoint,
    family: Family,
    dimensions: Dimensions,
    claims: Mapping[str, Claimed | None],
    named: Collection[str],
) -> list[str]:
    """Raise for unclaimed, contradicting and missing tensors; return notes on an MTP head or a
    tower that is absent. `named` are the roles that the recipe speaks of."""
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
    sides = {"mtp", "vision"} - set(named)
    copied = {n for n, c in claims.items() if c is not None and c.claim.role in sides}
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


def check_quantizable(
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


def refuse_mixed_dtypes(
    tensors: Mapping[str, TensorInfo], members: Mapping[str, Sequence[Member]]
) -> None:
    """Raise if members of a fused group differ in dtype: one kernel call does them, and takes
    one."""
    for group, found in members.items():
        first = tensors[found[0].source]
        for m in found[1:]:
            other = tensors[m.source]
            if other is not first and other.dtype != first.dtype:
                raise RecipeError(
                    f"the fused group {group} holds {first.dtype} ({first.name}) and "
                    f"{other.dtype} ({other.name}); bring them to one dtype, or leave both plain"
                )


def split_refusal(
    recipe: Recipe, group: str, first: str, first_scheme: Scheme, second: str, second_scheme: Scheme
) -> RecipeError:
    """The refusal of a fused group whose members would get two schemes."""
    return RecipeError(
        f"recipe {recipe.name} splits the fused group {group}: {first} would be {first_scheme}, "
        f"{second} {second_scheme}. Engines run them as one matmul with one scheme; give all "
        "members the same"
    )


def refuse_split_copies(
    recipe: Recipe,
    jobs: Mapping[str, Job],
    copies: Sequence[Copy],
    claims: Mapping[str, Claimed | None],
) -> None:
    """Raise if a member of a fused group that is quantized would stay as it is."""
    for copy in copies:
        claimed = claims[copy.tensor.name]
        if claimed is None or not claimed.claim.is_linear or claimed.group_key not in jobs:
            continue
        job = jobs[claimed.group_key]
        quantized = next(
            n for n, c in claims.items() if c and c.group_key == job.name and n != copy.tensor.name
        )
        raise split_refusal(recipe, job.name, quantized, job.scheme, copy.tensor.name, BF16)


def refuse_mixed_experts(
    recipe: Recipe,
    jobs: Mapping[str, Job],
    members: Mapping[str, Sequence[Member]],
    copies: Sequence[Copy],
    claims: Mapping[str, Claimed | None],
) -> None:
    """Raise if the experts of one layer differ: engines build them alike, and the configuration
    files say one thing of them."""
    seen: dict[str, tuple[str, Scheme]] = {}
    experts = [
        (members[g][0].module, j.scheme)
        for g, j in jobs.items()
        if (c := claims[members[g][0].source]) and c.claim.layout
    ]
    plain = [c for copy in copies if (c := claims[copy.tensor.name]) and c.claim.layout]
    for module, scheme in (*experts, *((c.module, BF16) for c in plain)):
        container = module.partition(".experts")[0]
        first, its_scheme = seen.setdefault(container, (module, scheme))
        if scheme is not its_scheme:
            raise RecipeError(
                f"recipe {recipe.name}: the experts of {container} would be quantized differently: "
                f"{first} {its_scheme}, {module} {scheme}. Engines build all experts of a layer "
                "alike; give them one scheme"
            )


def refuse_idle_rules(
    recipe: Recipe, used: set[int], family: Family, claims: Mapping[str, Claimed | None]
) -> None:
    """Raise for a rule that names no linear of this checkpoint; `used` numbers those that do."""
    for i, rule in enumerate(recipe.rules):
        if i in used:
            continue
        linear = sorted({c.claim.role for c in claims.values() if c and c.claim.is_linear})
        raise RecipeError(
            f"recipe {recipe.name}: the rule {rule} matches no linear of this {family.model_type} "
            f"checkpoint, whose linears have the roles {', '.join(linear)}; a rule without effect "
            "is taken for a mistake"
        )


def _more(found: Sequence[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
