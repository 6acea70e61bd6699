"""A quantized checkpoint in another container: codes and block scales as they are, scalars and
configuration in the other's convention.

Refuses what the target has no spelling for, and a source whose configuration and tensors disagree:
which of the two would be converted is not for a converter to guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nybble.check.contents import Contents, Kind, Module, read_contents
from nybble.checkpoint.declaration import Declaration
from nybble.checkpoint.dialects import read_declaration
from nybble.checkpoint.layout import Layout, Leaf, Listing
from nybble.checkpoint.modelopt import ALGORITHMS, CONFIG_FILE
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo, TensorSpec, parse_json
from nybble.errors import CheckFailed, CheckpointError, RecipeError
from nybble.families import Family, find_family, generic_family
from nybble.formats.block import Shape
from nybble.formats.element import F32, F32Array
from nybble.formats.scheme import SCHEMES, Scheme
from nybble.plan.jobs import Copy
from nybble.plan.listing import make_listing
from nybble.rewrite.conversion import Conversion, Dropped, Move, Restated, Rounding
from nybble.rewrite.held import Weight, multiplier, plain_tensors, read_weights

_KV_SCALES = {"modelopt": ("F32", ()), "compressed-tensors": ("BF16", (1,))}


@dataclass
class _Draft:
    """The conversion as far as it is decided."""

    checkpoint: Checkpoint
    layout: Layout
    keep_input_scales: bool
    has_data: bool
    outputs: list[TensorSpec] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    restated: list[Restated] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    roundings: list[Rounding] = field(default_factory=list)
    _leaves: dict[tuple[str, Shape], tuple[Leaf, ...]] = field(default_factory=dict)

    def leaves(self, scheme: Scheme, shape: Shape) -> tuple[Leaf, ...]:
        """The tensors that a module of this scheme and shape becomes."""
        key = (scheme.name, shape)
        if key not in self._leaves:
            self._leaves[key] = self.layout.leaves(scheme, shape)
        return self._leaves[key]

    def move(self, source: TensorInfo, spec: TensorSpec) -> None:
        self.moves.append(Move(source, spec))
        self.outputs.append(spec)

    def restate(self, source: TensorInfo, spec: TensorSpec, leaf: Leaf, part: str = "") -> None:
        """A scale in the target's convention, and what that rounds; `part` names it."""
        value = None
        if self.has_data:
            exact = multiplier(self.checkpoint, source).reshape(leaf.shape)
            with np.errstate(over="ignore", divide="ignore"):
                value = np.asarray(self.layout.store(leaf, exact))
                after = self.layout.load(leaf, value).reshape(leaf.shape)
            _refuse_lost(source, exact, after)
            self.roundings += rounding(source.name, part or leaf.part, exact, after)
        self.restated.append(Restated(source, spec, value))
        self.outputs.append(spec)


def rounding(name: str, part: str, before: F32Array, after: F32Array) -> list[Rounding]:
    """What a stored scale gives back otherwise, the worst of many; nothing if all is exact."""
    one, other = before.reshape(-1), after.reshape(-1)
    differ = one.view(np.uint32) != other.view(np.uint32)
    if not differ.any():
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = int(np.argmax(np.where(differ, np.abs(other / one - 1), -1)))
    count = int(np.count_nonzero(differ))
    return [Rounding(name, part, float(one[worst]), float(other[worst]), count)]


def _refuse_lost(source: TensorInfo, before: F32Array, after: F32Array) -> None:
    """A scale that is broken, or leaves the target's range, has no counterpart at all."""
    is_sound = np.isfinite(before) & (before > 0)
    if not is_sound.all():
        value = before[~is_sound].reshape(-1)[0]
        raise CheckpointError(
            f"{source.name}: a scale is {value}, expected finite and positive; `nybble check` "
            "finds all of them, `nybble repair` mends what can be mended"
        )
    if not (np.isfinite(after) & (after > 0)).all():
        value = before[~(np.isfinite(after) & (after > 0))].reshape(-1)[0]
        raise CheckpointError(
            f"{source.name}: the scale {value} has no finite, positive counterpart in the target; "
            "convert --to bf16"
        )


def convert_to_layout(
    checkpoint: Checkpoint,
    contents: Contents,
    declaration: Declaration,
    layout: Layout,
    *,
    version: str,
    keep_input_scales: bool = False,
    generic: bool = False,
) -> Conversion:
    """Decide what every tensor becomes in `layout`.

    Raises CheckpointError for modules that are not whole, or not as declared; RecipeError for what
    the layout cannot carry; ModelError for an unknown model type unless `generic`.
    """
    _refuse_source(checkpoint, declaration, layout)
    weights = read_weights(contents)
    if not weights:
        raise RecipeError(
            f"{checkpoint.path}: holds no quantized weight, so there is nothing to convert; "
            "`nybble quantize` makes a quantized checkpoint, --to gguf takes a plain one"
        )
    schemes = _schemes(contents, weights, layout)
    has_data = all(shard.has_data for shard in checkpoint.shards)
    draft = _Draft(checkpoint, layout, keep_input_scales, has_data)
    _draft_tensors(draft, contents, weights, schemes)
    family = _family(checkpoint, contents, weights, generic=generic)
    plain = plain_tensors(checkpoint, contents, weights)
    notes = _notes(contents, declaration, weights, draft, family)
    kv_cache = _kv_cache(contents, declaration, layout, notes)
    listing = make_listing(
        ((w.name, _role(family, w.name), schemes[w.name]) for w in weights),
        (Copy(t, _tensor_role(family, t)) for t in plain),
        family,
        kv_cache=kv_cache,
        version=version,
        has_kv_scales=bool(contents.kv_scales),
    )
    _refuse_mixed_experts(weights, schemes, listing, family, plain)
    documents = layout.documents(without_quantization(checkpoint.config), listing)
    _check_documents(draft.outputs, documents, schemes)
    made = Conversion(
        checkpoint,
        declaration.layout,
        layout.name,
        tuple(weights),
        tuple(draft.outputs),
        tuple(draft.moves),
        tuple(draft.restated),
        (),
        tuple(draft.dropped),
        tuple(draft.roundings),
        (),
        tuple(notes),
        documents,
        sum(m.kind.stored for m in contents.modules if m.role != "mtp"),
    )
    made.check_complete()
    return made


# ------------------------------------------------------------------------------------- the refusals


def _refuse_source(checkpoint: Checkpoint, declaration: Declaration, layout: Layout) -> None:
    if declaration.layout == layout.name:
        raise RecipeError(
            f"{checkpoint.path}: is in the {layout.name} layout already; name another one with --to"
        )
    if declaration.kv_cache not in ("", "fp8"):
        raise RecipeError(
            f"{checkpoint.path}: declares a {declaration.kv_cache} KV cache, and {layout.name} "
            "files are written with an FP8 one or none; convert --to bf16"
        )


def _schemes(contents: Contents, weights: Sequence[Weight], layout: Layout) -> dict[str, Scheme]:
    """The scheme of every quantized module, as declared; refuses what is not what it says."""
    found: dict[str, Scheme] = {}
    faults: list[tuple[str, str]] = []
    for weight in weights:
        declared, kind = weight.module.declared, weight.module.kind
        if declared is None:
            faults.append((weight.name, f"is declared plain, but holds {kind.held}"))
        elif not kind.agrees:
            faults.append((weight.name, f"is declared {declared}, but holds {kind.held}"))
        elif not declared.scheme:
            words = f"{declared} (weights {declared.weight}, input {declared.activation})"
            faults.append((weight.name, f"is {words}, which {layout.name} files here cannot say"))
        else:
            found[weight.name] = SCHEMES[declared.scheme]
    if faults:
        name, fault = faults[0]
        raise CheckpointError(
            f"{len(faults)} quantized modules cannot be converted, the first {name}: it {fault}; "
            "`nybble check` shows the contradictions, --to bf16 decodes what is there"
        )
    _refuse_schemes(found, layout)
    return found


def _refuse_schemes(found: Mapping[str, Scheme], layout: Layout) -> None:
    if not layout.refusal(list({s.name: s for s in found.values()}.values())):
        return
    # Today's only layout that refuses any: its algorithms are the reason.
    foreign = [name for name, s in found.items() if s not in ALGORITHMS]
    kinds = sorted({found[name].name for name in foreign})
    raise RecipeError(
        f"the {layout.name} layout cannot carry {', '.join(kinds)} ({len(foreign)} modules, the "
        f"first {foreign[0]}): engines dispatch only "
        f"{', '.join(sorted(s.name for s in ALGORITHMS))} per layer and read anything else as "
        "BF16; convert --to bf16, or quantize the original anew with a recipe that it can carry"
    )


def _refuse_mixed_experts(
    weights: Sequence[Weight],
    schemes: Mapping[str, Scheme],
    listing: Listing,
    family: Family,
    plain: Sequence[TensorInfo],
) -> None:
    """Experts are declared by container: one scheme for all, or the declaration would lie."""
    for weight in weights:
        container = weight.name.partition(".experts.")[0] + ".experts"
        said = listing.quantized.get(container, schemes[weight.name])
        if said is not schemes[weight.name]:
            raise RecipeError(
                f"{weight.name}: is {schemes[weight.name]}, other experts of {container} are "
                f"{said}; engines build all experts of a layer alike. Convert --to bf16"
            )
    for tensor in plain:
        container, found, _ = tensor.name.partition(".experts.")
        if found and f"{container}.experts" in listing.quantized and len(tensor.shape) == 2:
            raise RecipeError(
                f"{tensor.name}: is plain, other experts of {container}.experts are quantized; "
                "engines build all experts of a layer alike. Convert --to bf16"
            )


@dataclass(frozen=True)
class _Promised:
    """The headers of the result, and the configuration that is to go with them."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, object]


def _check_documents(
    outputs: Sequence[TensorSpec], documents: Mapping[str, bytes], schemes: Mapping[str, Scheme]
) -> None:
    """Read the configuration back: it must say of every module what the source says."""
    objects = {name: parse_json(data, name) for name, data in documents.items()}
    tensors = {s.name: TensorInfo(s.name, s.dtype, s.shape, "", 0) for s in outputs}
    promised = _Promised(tensors, objects["config.json"])
    declaration = read_declaration(promised.config, objects.get(CONFIG_FILE))
    for module in read_contents(promised, declaration).modules:
        said = module.declared.scheme if module.declared else ""
        scheme = schemes.get(module.name)
        if said != (scheme.name if scheme else "") or module.kind.agrees is False:
            raise CheckFailed(
                f"{module.name}: is {scheme or 'plain'}, and the new configuration would say "
                f"{said or 'plain'} of {module.kind.held} {module.kind.problem}; nothing was "
                "written: please report it"
            )


# -------------------------------------------------------------------------------------- the tensors


def _draft_tensors(
    draft: _Draft,
    contents: Contents,
    weights: Sequence[Weight],
    schemes: Mapping[str, Scheme],
) -> None:
    """Modules in file order, each whole, so that a shard ends between two of them."""
    by_part = {t.name: w for w in weights for t in w.tensors}
    kv_scales = {t.name for t in contents.kv_scales}
    done: set[str] = set()
    for name, tensor in draft.checkpoint.tensors.items():
        weight = by_part.get(name)
        if name in kv_scales:
            _draft_kv_scale(draft, tensor)
        elif weight is None:
            draft.move(tensor, tensor.spec)
        elif weight.name not in done:
            done.add(weight.name)
            _draft_weight(draft, weight, schemes[weight.name])


def _draft_weight(draft: _Draft, weight: Weight, scheme: Scheme) -> None:
    is_stated = False
    for leaf in draft.leaves(scheme, weight.shape):
        spec = leaf.spec(weight.name)
        if leaf.part == "codes":
            draft.move(weight.codes, spec)
        elif leaf.part == "scale":
            draft.move(weight.scale, spec)
        elif leaf.part == "tensor_scale":
            assert weight.float_scale is not None
            draft.restate(weight.float_scale, spec, leaf)
        else:
            assert weight.input_scale is not None, (
                "a declared input scale that is absent is a fault"
            )
            is_stated = True
            draft.restate(weight.input_scale, spec, leaf)
    if weight.input_scale is not None and not is_stated:
        _draft_residual(draft, weight)


def _draft_residual(draft: _Draft, weight: Weight) -> None:
    """An input scale that nothing declared reads."""
    assert weight.input_scale is not None
    if draft.keep_input_scales:
        is_divided = draft.layout.name == "compressed-tensors" and weight.format.scale is not F32
        suffix = "input_global_scale" if is_divided else "input_scale"
        is_modelopt = draft.layout.name == "modelopt"
        dtype = "F32" if is_modelopt or is_divided else "BF16"
        leaf = Leaf(suffix, "input_scale", dtype, () if is_modelopt else (1,))
        draft.restate(weight.input_scale, leaf.spec(weight.name), leaf)
    else:
        draft.dropped.append(Dropped(weight.input_scale, "input scale of a weight-only module"))


def kv_scale_name(name: str, target: str) -> str:
    """`...self_attn.k_proj.k_scale` in ModelOpt files, `...self_attn.k_scale` in the others."""
    module, _, leaf = name.rpartition(".")
    projection = f".{leaf[0]}_proj"
    above = module.removesuffix(projection)
    if not above.endswith(("attn", "attention")):
        raise CheckpointError(
            f"{name}: is no scale of a KV cache by its place (expected ...self_attn.{leaf} or "
            f"...self_attn{projection}.{leaf}); `nybble check` shows more"
        )
    return f"{above}{projection if target == 'modelopt' else ''}.{leaf}"


def _draft_kv_scale(draft: _Draft, tensor: TensorInfo) -> None:
    dtype, shape = _KV_SCALES[draft.layout.name]
    if tensor.size != 1:
        raise CheckpointError(
            f"{tensor.name}: has {tensor.size} scales, expected one per tensor; convert --to bf16"
        )
    spec = TensorSpec(kv_scale_name(tensor.name, draft.layout.name), dtype, shape)
    draft.restate(tensor, spec, Leaf("", "tensor_scale", dtype, shape), part="kv_scale")


# -------------------------------------------------------------------------------- what it is called


def _family(
    checkpoint: Checkpoint, contents: Contents, weights: Sequence[Weight], *, generic: bool
) -> Family:
    if not generic:
        return find_family(checkpoint.config)
    shapes = {f"{w.name}.weight": ("BF16", w.shape) for w in weights}
    for tensor in plain_tensors(checkpoint, contents, weights):
        shapes.setdefault(tensor.name, (tensor.dtype, tensor.shape))
    return generic_family(shapes)


def _role(family: Family, module: str) -> str:
    claimed = family.claim_module(module)
    return claimed.claim.role if claimed else "other"


def _tensor_role(family: Family, tensor: TensorInfo) -> str:
    claimed = family.claim(tensor.name)
    return claimed.claim.role if claimed else "other"


def without_quantization(config: Mapping[str, object]) -> dict[str, object]:
    """config.json without its sections on quantization, wherever they stand."""
    keys = ("quantization_config", "compression_config")
    plain = {key: value for key, value in config.items() if key not in keys}
    text = plain.get("text_config")
    if isinstance(text, Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key not in keys}
    return plain


def _kv_cache(
    contents: Contents, declaration: Declaration, layout: Layout, notes: list[str]
) -> str:
    """What the target declares of the KV cache; a note on what it cannot."""
    kv_cache = declaration.kv_cache
    if contents.kv_scales and not kv_cache:
        notes.append(
            f"{len(contents.kv_scales)} scales of a KV cache that no file declares go over, still "
            "undeclared"
        )
    if kv_cache and not layout.declares_kv_cache and not contents.kv_scales:
        notes.append(
            f"the {kv_cache} KV cache is not declared any more: readers of {layout.name} expect "
            "measured scales beside it, and the source has none. Ask the engine for it (vLLM: "
            "--kv-cache-dtype fp8)"
        )
    return kv_cache


def _notes(
    contents: Contents,
    declaration: Declaration,
    weights: Sequence[Weight],
    draft: _Draft,
    family: Family,
) -> list[str]:
    notes = [f"the source's files disagree: {line}" for line in declaration.disagreements]
    lost = [m.name for m in contents.modules if m.declared and not m.kind.is_quantized]
    if lost:
        notes.append(
            f"{len(lost)} modules are declared quantized and hold plain weights, the first "
            f"{lost[0]}: the new configuration says plain"
        )
    if draft.dropped:
        notes.append(
            f"{len(draft.dropped)} input scales of weight-only modules are left out "
            "(--keep-input-scales keeps them)"
        )
    kept = [w for w in weights if _is_kept_residual(w.module, draft)]
    if kept:
        notes.append(
            f"{len(kept)} input scales of weight-only modules are kept; readers that allow only "
            "what is declared may refuse them"
        )
    unequal = list(_unequal_groups(draft, weights, family)) if draft.has_data else []
    if unequal:
        notes.append(
            f"{len(unequal)} fused groups have members with different tensor scales, the first "
            f"{unequal[0]}; they go over as they are, `nybble repair` mends them"
        )
    return notes


def _is_kept_residual(module: Module, draft: _Draft) -> bool:
    kind: Kind = module.kind
    declares = module.declared is not None and module.declared.needs_input_scale
    return draft.keep_input_scales and kind.has_input_scale and not declares


def _unequal_groups(draft: _Draft, weights: Sequence[Weight], family: Family) -> Iterator[str]:
    """Fused groups of four-bit modules that engines would run with one member's scale."""
    seen: dict[str, float] = {}
    told: set[str] = set()
    for weight in weights:
        claimed = family.claim_module(weight.name)
        if weight.tensor_scale is None or claimed is None or not claimed.group_key:
            continue
        scale = float(multiplier(draft.checkpoint, weight.tensor_scale).reshape(()))
        key = claimed.group_key
        if seen.setdefault(key, scale) != scale and key not in told:
            told.add(key)
            yield key
