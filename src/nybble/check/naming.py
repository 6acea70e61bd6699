"""Rules about names of tensors and modules, in the files and in the configuration (NB4xx)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nybble.check import naming_entries, naming_patterns
from nybble.check.contents import CODES, INPUT_SCALES, SIDE, Module
from nybble.check.declared_files import SGLANG, count
from nybble.check.declared_modules import leaves, names_of
from nybble.check.engines.matching import FUSED
from nybble.check.naming_entries import FREETOKEN, MODEL_OPTIMIZER_PULL
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT

_HUB = "model.language_model."
#: Beginnings that a text model's tensors have nowhere.
_DOUBLED = (
    "model.language_model.model.",
    "model.language_model.language_model.",
    "language_model.model.language_model.",
    "model.model.",
)
_TEXT_PREFIXES = frozenset(
    ("", "model.", _HUB, "language_model.", "language_model.model.", "language_model.model.model.")
)
_CT_LEAVES = frozenset(("weight_packed", "weight_global_scale", "input_global_scale"))
#: Beside codes and scales; k_bias and v_bias belong to an affine KV cache.
_ALLOWED = SIDE | frozenset((*CODES, "bias", "k_bias", "v_bias"))
#: Reported by the rule on smoothing.
_SMOOTHING = frozenset(("svdquant_lora_a", "svdquant_lora_b"))


# ------------------------------------------------------------------------------------ NB403, NB404


def _prefix_order(survey: Survey) -> Iterator[Finding]:
    family = survey.family
    is_wrapped = family is not None and _HUB in family.prefixes
    odd = (*_DOUBLED, "language_model.") if is_wrapped else _DOUBLED
    wrong: dict[str, list[str]] = {}
    for module in survey.modules:
        name = module.name
        if name.startswith(odd):
            doubled = next((p for p in _DOUBLED if name.startswith(p)), "")
            wrong.setdefault(doubled or _beginning(name), []).append(name)
    for prefix, names in wrong.items():
        expected = _HUB if is_wrapped else "the model's own prefix, once"
        yield PREFIX_ORDER.finding(
            f"{count(names, 'module')}: expected to begin with {expected}, found {prefix}; loaders "
            "map names by their beginning and skip or refuse these",
            names,
            prefix=prefix,
        )


def _beginning(name: str) -> str:
    after = "language_model.model."
    return after if name.startswith(after) else "language_model."


PREFIX_ORDER = Rule(
    "NB403",
    "prefix-order",
    Severity.ERROR,
    "Tensor names begin with language_model.model., or with a prefix twice",
    "On the hub these models' tensors begin with `model.language_model.`; `language_model.model.` "
    "is an engine's or an older library's spelling in memory, and an export that renames twice "
    "nests one in the other. Engines map names by their beginning: what they do not know is "
    "skipped, and answers are '!!!!', or loading stops.",
    "Rename the tensors, and the lists of the configuration with them.",
    _prefix_order,
    threads=(f"{FREETOKEN}263", f"{MODEL_OPTIMIZER_PULL}2032"),
    is_repairable=True,
)


def _mixed_prefixes(survey: Survey) -> Iterator[Finding]:
    found: dict[str, list[str]] = {}
    for module in survey.modules:
        name = module.name
        at = name.find("layers.")
        if at >= 0 and name[:at] in _TEXT_PREFIXES:
            found.setdefault(name[:at], []).append(name)
    if len(found) > 1:
        usual = max(found, key=lambda prefix: len(found[prefix]))
        odd = [name for prefix, names in found.items() if prefix != usual for name in names]
        yield MIXED_PREFIXES.finding(
            f"{count(odd, 'module')}: the other {len(found[usual]):,} modules of the layers begin "
            f"with {usual!r}, expected one beginning for all",
            odd,
            prefixes={prefix: len(names) for prefix, names in found.items()},
        )


MIXED_PREFIXES = Rule(
    "NB404",
    "mixed-prefixes",
    Severity.ERROR,
    "The layers of one model are named under several prefixes",
    "Two tools wrote into one folder, or a rename stopped half-way. An engine's mapping fits one "
    "of the spellings; tensors in the other are skipped or refused.",
    "Rename the odd ones.",
    _mixed_prefixes,
    threads=(f"{FREETOKEN}263",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB406


def _fused_on_disk(survey: Survey) -> Iterator[Finding]:
    if survey.family is None:
        return  # other families have such names of their own
    fused = [
        module
        for group in survey.contents.alike
        if group[0].kind.is_quantized and not group[0].role
        for module in group
        if module.name.rpartition(".")[2] in FUSED
    ]
    if fused:
        first = fused[0].name
        parts = FUSED[first.rpartition(".")[2]]
        yield FUSED_ON_DISK.finding(
            f"{count([m.name for m in fused], 'quantized module')}: expected {', '.join(parts)}, "
            "found them in one; loaders of this family map the parts and cannot split scales",
            [m.name for m in fused],
            kind="fused",
        )
    stacked = [group for group in survey.contents.alike if _is_packed_stack(group[0])]
    if stacked:
        yield FUSED_ON_DISK.finding(
            f"{count(names_of(stacked), 'module')}: packed codes of all experts in one tensor, "
            "expected experts.E.gate_proj, up_proj and down_proj; vLLM defines no tensor scale for "
            "packed stacks of this family",
            names_of(stacked),
            kind="stacked",
        )


def _is_packed_stack(module: Module) -> bool:
    """Four-bit codes in three dimensions, whatever the tensor is called."""
    if module.kind.is_quantized:
        codes = module.tensor(*CODES)
        return codes is not None and codes.dtype == "U8" and len(codes.shape) == 3
    return module.name.endswith(".experts") and any(
        t.dtype == "U8" and len(t.shape) == 3 for t in module.tensors
    )


FUSED_ON_DISK = Rule(
    "NB406",
    "fused-on-disk",
    Severity.ERROR,
    "Quantized linears are stored fused, under an engine's name",
    "Engines fuse q/k/v, gate/up and in_proj_qkv/z themselves while they load, from the parts. A "
    "file that holds the fused linear packed, or all experts of a layer in one packed stack, has "
    "scales that no loader of the family can divide.",
    "Store the parts: rows of codes and block scales can be split without loss.",
    _fused_on_disk,
    threads=(f"{SGLANG}36596",),
)


# ------------------------------------------------------------------------------------ NB408, NB409


def _scale_spelling(survey: Survey) -> Iterator[Finding]:
    dialect = survey.declaration.layout
    found: dict[str, list[Sequence[Module]]] = {}
    for group in survey.contents.alike:
        if group[0].kind.is_quantized and (fault := _misspelled(group[0], dialect)):
            found.setdefault(fault, []).append(group)
    for fault, groups in found.items():
        yield SCALE_SPELLING.finding(
            f"{count(names_of(groups), 'module')}: {fault}", names_of(groups), fault=fault
        )


def _misspelled(module: Module, dialect: str) -> str:
    """How the scales are named or shaped otherwise than the declared layout has them."""
    have = leaves(module)
    is_inverse = "weight_scale_inv" in have
    if dialect in (MODELOPT, COMPRESSED_TENSORS) and is_inverse:
        if module.declared is not None and module.declared.spelling.startswith("fp8 "):
            return ""  # the block FP8 of an original, beside ModelOpt's map
        return f"expected weight_scale, as {dialect} names it, found weight_scale_inv"
    if module.kind.held != "fp8_block" or module.declared is None:
        return ""
    if dialect == "fp8" and not is_inverse and "weight_scale" in have:
        return "expected weight_scale_inv, as quant_method fp8 names it, found weight_scale"
    if dialect == COMPRESSED_TENSORS and len(have["weight_scale"][1]) != 2:
        shape = list(have["weight_scale"][1])
        return f"expected a weight_scale of two dimensions, found {shape}, as ModelOpt shapes it"
    return ""


SCALE_SPELLING = Rule(
    "NB408",
    "scale-spelling",
    Severity.ERROR,
    "Scales are named or shaped as another layout does",
    "The same FP8 block scales are `weight_scale` with four dimensions in ModelOpt, `weight_scale` "
    "with two in compressed-tensors, and `weight_scale_inv` with two in DeepSeek's and Qwen's own "
    "files. The numbers are equal; a loader finds only its own spelling.",
    "Rename or reshape the scales to the declared layout; no value changes.",
    _scale_spelling,
    threads=(
        "https://github.com/vllm-project/vllm/issues/43564",
        "https://github.com/vllm-project/vllm/issues/54126",
        "https://github.com/amd/Quark/issues/42",
    ),
)


def _mixed_layouts(survey: Survey) -> Iterator[Finding]:
    ct: list[Sequence[Module]] = []
    modelopt: list[Sequence[Module]] = []
    for group in survey.contents.alike:
        have = leaves(group[0])
        if not group[0].kind.is_quantized:
            continue
        if not _CT_LEAVES.isdisjoint(have):
            ct.append(group)
        if "weight_scale_2" in have or (group[0].kind.held == "nvfp4" and "weight" in have):
            modelopt.append(group)
    dialect = survey.declaration.layout
    odd = {MODELOPT: ct, COMPRESSED_TENSORS: modelopt}.get(dialect, [])
    if not odd and ct and modelopt:
        odd = min(ct, modelopt, key=lambda groups: sum(map(len, groups)))
    if odd:
        is_ct = odd is ct
        names = names_of(odd)
        of = COMPRESSED_TENSORS if is_ct else "ModelOpt"
        told = f"the configuration declares {dialect}" if dialect else "others are not"
        yield MIXED_LAYOUTS.finding(
            f"{count(names, 'module')}: stored in the tensors of {of} "
            f"({', '.join(sorted(_telling(odd[0][0])))}), {told}; scales of the one multiply, of "
            "the other divide",
            names,
        )


def _telling(module: Module) -> list[str]:
    return [leaf for leaf in leaves(module) if leaf in _CT_LEAVES or leaf == "weight_scale_2"] or [
        "weight"
    ]


MIXED_LAYOUTS = Rule(
    "NB409",
    "mixed-layouts",
    Severity.ERROR,
    "Tensors of ModelOpt and of compressed-tensors in one checkpoint",
    "ModelOpt's weight_scale_2 multiplies, compressed-tensors' weight_global_scale divides. A file "
    "with both, or with those that the configuration does not declare, loads in no engine, or is "
    "read with reciprocal scales.",
    "Convert the checkpoint to one layout.",
    _mixed_layouts,
)


# ------------------------------------------------------------------------------------------- NB410


def _unknown_leaves(survey: Survey) -> Iterator[Finding]:
    found: dict[str, list[str]] = {}
    for group in survey.contents.alike:
        first = group[0]
        if first.kind.is_quantized:
            for leaf in leaves(first):
                if leaf not in _ALLOWED and leaf not in _SMOOTHING:
                    found.setdefault(leaf, []).extend(names_of([group]))
        elif not first.role:
            for module in group:  # MODULE.weight_quantizer._amax, a module by its name
                parent, _, part = module.name.rpartition(".")
                if _is_quantized(survey, parent):
                    for leaf in leaves(module):
                        found.setdefault(f"{part}.{leaf}", []).append(parent)
    if found:
        names = list(dict.fromkeys(name for names in found.values() for name in names))
        known = ", ".join(("weight_scale", *INPUT_SCALES))
        yield UNKNOWN_LEAVES.finding(
            f"{count(names, 'quantized module')}: expected tensors such as {known}, found "
            f"{', '.join(repr(leaf) for leaf in sorted(found)[:4])} too; vLLM stops at tensors "
            "that it has no parameter for",
            names,
            leaves=sorted(found),
        )


def _is_quantized(survey: Survey, name: str) -> bool:
    module = survey.contents.by_name.get(name)
    return module is not None and module.kind.is_quantized


UNKNOWN_LEAVES = Rule(
    "NB410",
    "unknown-leaves",
    Severity.WARNING,
    "Quantized modules have tensors that belong to no known format",
    "State of a quantizer that was saved along (`weight_quantizer._amax`), a correction, or a "
    "misspelled scale. vLLM stops with 'There is no module or parameter named ...', others skip "
    "it without a word.",
    "Take the tensors out, or rename them if they are scales.",
    _unknown_leaves,
)


RULES: tuple[Rule, ...] = (
    *naming_entries.RULES,
    *naming_patterns.RULES,
    PREFIX_ORDER,
    MIXED_PREFIXES,
    FUSED_ON_DISK,
    SCALE_SPELLING,
    MIXED_LAYOUTS,
    UNKNOWN_LEAVES,
)
