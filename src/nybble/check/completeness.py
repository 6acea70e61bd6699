"""Rules about what must be there: experts, MTP head, vision tower, and the shapes of it all
(NB1xx).

What config.json promises is the family's to say. The rules that compare with a source, and those
about parts that should not be quantized, are in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator

from nybble.check import (
    completeness_config,
    completeness_copies,
    completeness_quantized,
    completeness_source,
    completeness_weights,
)
from nybble.check.completeness_inventory import (
    PACKED,
    is_mtp,
    leaf_of,
    looks_like_vision,
    promised_mtp_layers,
    take_inventory,
    unpacked_shapes,
)
from nybble.check.completeness_source import STACKS
from nybble.check.contents import Module
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.check.wording import first_of, plural

#: What the names of vision towers have in common, whoever made them.
VISION_WORDS = ("visi", "visual", "vit.", "image", "img", "siglip", "clip", "radio", "patch_embed")
#: Roles whose absence a rule of its own reports.
_WITH_OWN_RULE = ("mtp", "vision", "routed_expert", "lm_head", "embedding")


# -------------------------------------------------------------------------------------------- MTP


def _mtp_absent(survey: Survey) -> Iterator[Finding]:
    key, layers = promised_mtp_layers(survey)
    if not layers or not survey.tensors or _has_mtp(survey):
        return
    lost = take_inventory(survey).missing.get("mtp", [])
    yield MTP_ABSENT.finding(
        f"config.json promises an MTP head ({key} is {layers}), and no tensor of one is there: "
        "speculative decoding would run on noise",
        lost,
        file="config.json",
        tensors=lost,
        key=key,
    )


def _has_mtp(survey: Survey) -> bool:
    """A module of an MTP head, or of the layers after the last that DeepSeek and GLM make it."""
    if survey.family is not None and survey.dimensions is not None:
        inventory = take_inventory(survey)
        return bool(inventory.by_role.get("mtp")) or any(
            name.startswith(("mtp.", "model.mtp.")) for name in inventory.names
        )
    layers = survey.text_config.get("num_hidden_layers")
    after = f".layers.{layers}."
    return any("mtp" in n or "nextn" in n or after in n for n in survey.tensors)


def _mtp_incomplete(survey: Survey) -> Iterator[Finding]:
    lost = take_inventory(survey).missing.get("mtp", [])
    if lost and _has_mtp(survey):
        yield MTP_INCOMPLETE.finding(
            f"{plural(len(lost), 'tensor')} of the MTP head missing, "
            f"{first_of(lost, len(lost))}, and the others are there",
            lost,
            tensors=lost,
        )


# ----------------------------------------------------------------------- what config.json promises


def _vision_absent(survey: Survey) -> Iterator[Finding]:
    vision = survey.config.get("vision_config")
    if not isinstance(vision, dict) or not vision or not survey.tensors:
        return
    if survey.config.get("language_model_only") is True:
        return
    is_known = survey.family is not None and survey.dimensions is not None
    inventory = take_inventory(survey)
    lost = inventory.missing.get("vision", [])
    if not _has_vision(survey) and (lost or not is_known):
        yield VISION_ABSENT.finding(
            "config.json has a vision_config, and no tensor of a vision tower is there: images are "
            "accepted and seen as noise, or thrown away",
            lost,
            file="config.json",
            severity=Severity.ERROR if is_known else Severity.WARNING,
            tensors=lost,
        )
    elif lost:
        yield VISION_ABSENT.finding(
            f"{plural(len(lost), 'tensor')} of the vision tower missing, "
            f"{first_of(lost, len(lost))}, and the others are there",
            lost,
            tensors=lost,
        )


def _has_vision(survey: Survey) -> bool:
    inventory = take_inventory(survey)
    if survey.family is not None:
        return bool(inventory.by_role.get("vision")) or any(map(looks_like_vision, inventory.names))
    return any(word in name for name in survey.tensors for word in VISION_WORDS)


def _experts_missing(survey: Survey) -> Iterator[Finding]:
    lost = take_inventory(survey).missing.get("routed_expert", [])
    if lost and survey.dimensions is not None:
        layers = {name.partition(".layers.")[2].partition(".")[0] for name in lost}
        yield EXPERT_MISSING.finding(
            f"{plural(len(lost), 'weight')} of experts missing in {plural(len(layers), 'layer')}, "
            f"{first_of(lost, len(lost))}: config.json has num_experts {survey.dimensions.experts}",
            lost,
            tensors=lost,
        )


def _ends_missing(survey: Survey) -> Iterator[Finding]:
    missing = take_inventory(survey).missing
    lost = [*missing.get("embedding", []), *missing.get("lm_head", [])]
    if lost:
        is_head = bool(missing.get("lm_head"))
        yield ENDS_MISSING.finding(
            f"{' and '.join(lost)} {'is' if len(lost) == 1 else 'are'} not there"
            f"{', and config.json ties no weights' if is_head else ''}",
            lost,
            tensors=lost,
        )


def _others_missing(survey: Survey) -> Iterator[Finding]:
    missing = take_inventory(survey).missing
    lost = [n for role, names in missing.items() if role not in _WITH_OWN_RULE for n in names]
    if lost:
        yield PROMISED_MISSING.finding(
            f"{plural(len(lost), 'tensor')} that config.json promises "
            f"{'is' if len(lost) == 1 else 'are'} not there, {first_of(lost, len(lost))}",
            lost,
            tensors=lost,
        )


def _shapes(survey: Survey) -> Iterator[Finding]:
    if survey.family is None or survey.dimensions is None:
        return
    experts: dict[tuple[str, str, int], list[Module]] = {}
    others = []
    for module in survey.modules:
        container, dot, place = module.name.partition(".experts.")
        if dot:
            # One expert of a layer speaks for all of the same kind: the one of the highest number.
            projection = place.partition(".")[2]
            experts.setdefault((container, projection, id(module.kind)), []).append(module)
        else:
            others.append(module)
    chosen = [*others, *(max(group, key=_expert_number) for group in experts.values())]
    found = survey.family.contradictions(unpacked_shapes(chosen), survey.dimensions)
    if not found:
        return
    found = survey.family.contradictions(unpacked_shapes(survey.modules), survey.dimensions)
    names = [sentence.partition(": ")[0] for sentence in found]
    more = f" ({len(found) - 1:,} more like it)" if len(found) > 1 else ""
    yield SHAPE.finding(f"{found[0]}{more}", names, reasons=found)


def _expert_number(module: Module) -> int:
    number = module.name.partition(".experts.")[2].partition(".")[0]
    return int(number) if number.isdecimal() else -1


# ------------------------------------------------------------------------------- two of a kind


def _packed_and_plain(survey: Survey) -> Iterator[Finding]:
    """`weight` beside `weight_packed`, and stacks of experts beside single ones."""
    leaves: dict[int, set[str]] = {}  # by kind: modules of one kind have the same leaves
    twice: list[str] = []
    stacks: list[tuple[str, str]] = []
    for module in survey.modules:
        kind = id(module.kind)
        if kind not in leaves:
            leaves[kind] = {leaf_of(module, t.name) for t in module.tensors}
        here = leaves[kind]
        if "weight" in here and not here.isdisjoint(PACKED):
            twice.append(module.name)
        elif not here.isdisjoint(STACKS) and module.name.endswith(".experts"):
            stacks += [(module.name, stack) for stack in STACKS if stack in here]
    if twice:
        yield PACKED_AND_PLAIN.finding(
            f"{plural(len(twice), 'module')} with a packed weight and a plain one, "
            f"{first_of(twice, len(twice))}",
            twice,
            tensors=[f"{module}.weight" for module in twice],
        )
    by_name = survey.contents.by_name if stacks else {}
    both = [(name, stack) for name, stack in stacks if f"{name}.0.{STACKS[stack][0]}" in by_name]
    if both:
        tensors = [f"{name}.{stack}" for name, stack in both]
        yield PACKED_AND_PLAIN.finding(
            f"{plural(len(both), 'stack')} of experts beside the same experts one by one, "
            f"{first_of(tensors, len(tensors))}",
            dict.fromkeys(name for name, _ in both),
            tensors=tensors,
        )


def _nothing_packed(survey: Survey) -> Iterator[Finding]:
    if survey.faults_of("missing", "header") or any(True for _ in survey.quantized):
        return
    declared = [m for m in survey.modules if m.declared is not None and not is_mtp(m)]
    if declared:
        total = sum(t.nbytes for t in survey.tensors.values())
        yield NOTHING_PACKED.finding(
            f"{plural(len(declared), 'module')} declared as {declared[0].declared}, "
            f"{first_of((m.name for m in declared), len(declared))}, and not one is quantized: "
            f"{total:,} bytes of plain weights",
            [m.name for m in declared],
        )


# -------------------------------------------------------------------------------------- the rules

_GITHUB = "https://github.com/"

MTP_ABSENT = Rule(
    "NB103",
    "mtp-absent",
    Severity.WARNING,
    "config.json promises an MTP head that is not there",
    "transformers does not build MTP heads, so tools that save what it built lose them, while "
    "config.json goes on promising one. Without speculative decoding nothing is wrong; with it, an "
    "engine drafts from memory that was never set: no draft is accepted, and decoding is up to "
    "half slower than without.",
    "Copy the mtp tensors from the source and exclude them from quantization, or set the key to 0.",
    _mtp_absent,
    threads=(
        f"{_GITHUB}z-lab/paroquant/issues/47",
        f"{_GITHUB}sgl-project/sglang/issues/35797",
        f"{_GITHUB}vllm-project/llm-compressor/issues/2735",
    ),
    is_repairable=True,
)
MTP_INCOMPLETE = Rule(
    "NB104",
    "mtp-incomplete",
    Severity.ERROR,
    "Part of the MTP head is missing",
    "Engines that load the head stop at what is missing, or draft from memory that was never set. "
    "Copying MTP tensors by a prefix that covers only its layers leaves out fc and the norms.",
    "Copy the missing tensors from the source.",
    _mtp_incomplete,
    threads=(f"{_GITHUB}intel/auto-round/issues/1731",),
    is_repairable=True,
)
VISION_ABSENT = Rule(
    "NB107",
    "vision-absent",
    Severity.ERROR,
    "config.json advertises a vision tower that is not there",
    "The engine builds the tower and leaves its weights unset, or drops images without a word: "
    "requests with pictures are answered with 200 and nonsense.",
    "Copy the tower from the source, or make config.json that of a text model.",
    _vision_absent,
    threads=(
        f"{_GITHUB}ollama/ollama/issues/17501",
        f"{_GITHUB}FlashML-org/FreeToken/issues/321",
    ),
    is_repairable=True,
)
EXPERT_MISSING = Rule(
    "NB109",
    "expert-missing",
    Severity.ERROR,
    "Weights of experts are missing",
    "Experts are loaded in a loop over what the files hold, so that one which is not there is no "
    "error in several engines: tokens routed to it are computed with memory that was never set.",
    "Quantize the missing experts from the source; their weights cannot be made up.",
    _experts_missing,
    threads=(f"{_GITHUB}vllm-project/vllm/issues/45212",),
)
PROMISED_MISSING = Rule(
    "NB110",
    "promised-tensor-missing",
    Severity.ERROR,
    "A tensor that config.json promises is missing",
    "A layer lacks a weight that its kind must have. Engines that keep count stop; for quantized "
    "models most do not, and compute with memory that was never set. Names under a prefix that no "
    "engine knows look the same.",
    "Restore the tensors from the source, or rename what is there.",
    _others_missing,
    threads=(
        f"{_GITHUB}vllm-project/vllm/issues/40252",
        f"{_GITHUB}FlashML-org/FreeToken/issues/263",
    ),
    is_repairable=True,
)
SHAPE = Rule(
    "NB111",
    "shape-contradicts-config",
    Severity.ERROR,
    "A weight has another shape than config.json says",
    "Unpacked, the weight does not have the rows or columns that the sizes of config.json give, or "
    "belongs to a layer or an expert that does not exist: it is transposed, packed along the wrong "
    "side, or of another model.",
    "Take config.json and weights from the same model.",
    _shapes,
)
PACKED_AND_PLAIN = Rule(
    "NB112",
    "packed-and-plain",
    Severity.ERROR,
    "A weight is there twice, quantized and plain",
    "Stale full-precision weights stay behind when a run is resumed or a folder reused; one public "
    "case had 47.4 GB instead of 17.7. Engines stop at the name that they do not expect, or load "
    "whichever comes last.",
    "Remove the plain copy.",
    _packed_and_plain,
    threads=(f"{_GITHUB}intel/auto-round/issues/2350",),
    is_repairable=True,
)
NOTHING_PACKED = Rule(
    "NB114",
    "nothing-quantized",
    Severity.ERROR,
    "Declared as quantized, and nothing is",
    "The configuration declares a quantized model and every weight is plain: the modules had other "
    "names than the recipe expected. Engines look for scales and stop, or read BF16 as codes.",
    "Quantize again with a recipe that names the modules, or remove the quantization section.",
    _nothing_packed,
    threads=(f"{_GITHUB}NVIDIA/Model-Optimizer/issues/1255",),
)
ENDS_MISSING = Rule(
    "NB119",
    "ends-missing",
    Severity.ERROR,
    "Embedding or lm_head is missing",
    "config.json does not tie them, so both must be there. A saver that dropped a whole file lost "
    "lm_head this way, and a writer that took equal addresses for tied weights did too.",
    "Copy the tensor from the source, or set tie_word_embeddings if the model is tied.",
    _ends_missing,
    threads=(f"{_GITHUB}areal-project/AReaL/pull/1403",),
    is_repairable=True,
)

RULES: tuple[Rule, ...] = (
    *(MTP_ABSENT, MTP_INCOMPLETE, VISION_ABSENT, EXPERT_MISSING, PROMISED_MISSING, SHAPE),
    *(PACKED_AND_PLAIN, NOTHING_PACKED, ENDS_MISSING),
    *completeness_source.RULES,
    *completeness_copies.RULES,
    *completeness_weights.RULES,
    *completeness_config.RULES,
    *completeness_quantized.RULES,
)
