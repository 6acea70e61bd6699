"""Rules about what is declared of a module against what the files hold of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from nybble.check.contents import Module
from nybble.check.declared_files import (
    LINEAR_ROLES,
    VLLM,
    count,
    layer_map,
)
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import CONFIG, Survey
from nybble.checkpoint.declaration import Excluded
from nybble.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT
from nybble.checkpoint.patterns import compile_pattern

#: Engines build these unquantized whatever is declared, in every class.
_NEVER_LINEAR = frozenset(("norm", "linear_attention_state", "rotary", "bias", "embedding"))
_GATES = ("router", "shared_expert_gate")
#: Families whose classes build routers and gates unquantized by construction.
_GATES_BUILT_PLAIN = frozenset(("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"))
#: What towers and MTP heads have beside linears: position tables, norms, routers.
_is_no_linear = re.compile(r"norm|embed|conv|^gate$|router|_gate$").search


def leaves(module: Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Leaf -> dtype and shape of a module's tensors."""
    at = len(module.name) + 1 if module.name else 0
    return {t.name[at:]: (t.dtype, t.shape) for t in module.tensors}


def is_declared(survey: Survey) -> bool:
    """There is a section that could be read, and there are tensors to hold against it."""
    return bool(survey.tensors and survey.declaration.layout) and not survey.faults_of(
        "declaration"
    )


def exclusions(survey: Survey) -> tuple[str, ...]:
    """The entries that exclude modules, in whatever key the dialect has them."""
    found: list[object] = []
    for section in (survey.sections.flat, survey.sections.nested or {}):
        for key in ("ignore", "exclude_modules", "modules_to_not_convert"):
            entries = section.get(key)
            found += entries if isinstance(entries, (list, tuple)) else []
    return tuple(dict.fromkeys(entry for entry in found if isinstance(entry, str)))


def names_of(groups: Iterable[Sequence[Module]]) -> list[str]:
    """The names of the modules of some groups."""
    return [m.name for group in groups for m in group]


# ------------------------------------------------------------------------------------ NB304, NB307


def _absent(survey: Survey) -> Iterator[Finding]:
    file, layers = layer_map(survey)
    if not layers or not survey.tensors:
        return
    present = survey.contents.containers
    absent = [name for name in layers if name not in present]
    if absent:
        yield LISTED_MODULE_ABSENT.finding(
            f"{file}: {count(absent, 'entry')} of quantized_layers, of {len(layers):,} in all: "
            "expected a module path of the files, found no tensor there; llama.cpp's converter "
            "stops at such an entry, other engines ignore it",
            absent,
            file=file,
        )


LISTED_MODULE_ABSENT = Rule(
    "NB304",
    "listed-module-absent",
    Severity.WARNING,
    "quantized_layers names a module that no tensor belongs to",
    "Every name in quantized_layers should be a module of the files, or a container of some. "
    "llama.cpp's converter asserts that; others ignore the entry, and the module that was meant is "
    "built unquantized.",
    "Take the entry out, or correct its name.",
    _absent,
    is_repairable=True,
)


def _differs(survey: Survey) -> Iterator[Finding]:
    if not is_declared(survey):
        return
    pairs: dict[tuple[str, str, str], list[Sequence[Module]]] = {}
    for group in survey.contents.alike:
        kind, declared = group[0].kind, group[0].declared
        if declared and declared.weight and kind.is_quantized:
            if kind.held.partition("/")[0] != declared.weight.partition("/")[0]:
                key = (declared.spelling, declared.weight, kind.held)
                pairs.setdefault(key, []).append(group)
    for (spelling, weight, held), groups in pairs.items():
        names = names_of(groups)
        yield FORMAT_DIFFERS.finding(
            f"{count(names, 'module')}: declared {spelling}, expected {weight}, found {held} by "
            "dtypes and shapes",
            names,
            declared=weight,
            held=held,
        )


FORMAT_DIFFERS = Rule(
    "NB307",
    "format-differs",
    Severity.ERROR,
    "A module holds another format than the one declared",
    "The engine allocates what is declared. Other shapes stop the load; equal shapes of another "
    "meaning (FP8 per tensor and per channel, NVFP4 and MXFP4) are read wrongly.",
    "Declare what the tensors hold.",
    _differs,
    is_repairable=True,
)


def _group_sizes(survey: Survey) -> Iterator[Finding]:
    if not is_declared(survey):
        return
    found: dict[tuple[int, int], list[Sequence[Module]]] = {}
    for group in survey.contents.alike:
        kind, declared = group[0].kind, group[0].declared
        held, _, block = kind.held.partition("/")
        if declared and held == "nvfp4" and declared.weight.partition("/")[0] == held:
            said = declared.group_size or int(declared.weight.partition("/")[2] or 16)
            if said != int(block or 16):
                found.setdefault((said, int(block or 16)), []).append(group)
    for (said, is_block), groups in found.items():
        yield GROUP_SIZE_DIFFERS.finding(
            f"{count(names_of(groups), 'module')}: declared with group size {said}, found a block "
            f"scale per {is_block} weights",
            names_of(groups),
            declared=said,
            held=is_block,
        )


GROUP_SIZE_DIFFERS = Rule(
    "NB323",
    "group-size-differs",
    Severity.ERROR,
    "The declared group size is not that of the block scales",
    "The group size says how many weights share a block scale. Engines allocate scales by it: "
    "loading stops on their shape, or neighbours' scales are applied.",
    "Declare the group size that the shapes of weight and weight_scale have.",
    _group_sizes,
    is_repairable=True,
)


# ------------------------------------------------------------------------------------ NB308, NB310


def _plain(survey: Survey) -> Iterator[Sequence[Module]]:
    """Groups of plain matrices that are, or may be, declared as quantized."""
    for group in survey.contents.alike:
        first = group[0]
        if not first.kind.is_quantized and first.role not in _NEVER_LINEAR:
            if max((len(t.shape) for t in first.tensors), default=0) >= 2:
                yield group


def _declared_but_plain(survey: Survey) -> Iterator[Finding]:
    if not is_declared(survey):
        return
    found = [
        group
        for group in _plain(survey)
        if group[0].declared is not None
        and not group[0].declared.by_class
        and not _is_built_plain(survey, group[0])
    ]
    if found:
        first = found[0][0]
        yield DECLARED_BUT_PLAIN.finding(
            f"{count(names_of(found), 'module')}: declared {first.declared} by name, expected "
            f"quantized tensors, found {first.kind.held}",
            names_of(found),
        )


def _is_built_plain(survey: Survey, module: Module) -> bool:
    return module.role in _GATES and survey.contents.model_type in _GATES_BUILT_PLAIN


DECLARED_BUT_PLAIN = Rule(
    "NB308",
    "declared-but-plain",
    Severity.ERROR,
    "A module is declared as quantized and stored unquantized",
    "The engine allocates codes and scales and gets a BF16 matrix: loading stops on a shape, or "
    "the scales are never filled ('weight_scale was never loaded').",
    "Take the module out of the declaration, or exclude it.",
    _declared_but_plain,
    threads=(f"{VLLM}40252",),
    is_repairable=True,
)


def _not_excluded(survey: Survey) -> Iterator[Finding]:
    if not is_declared(survey):
        return
    found: dict[Severity, list[Module]] = {}
    for group in _plain(survey):
        for module in _meant_by_class(survey, group):
            severity = _how_bad(survey, module)
            if severity is not None:
                found.setdefault(severity, []).append(module)
    for severity in sorted(found, reverse=True):
        names = [m.name for m in found[severity]]
        declared = survey.declaration.of(names[0])
        yield PLAIN_NOT_EXCLUDED.finding(
            f"{count(names, 'module')}: stored in {found[severity][0].kind.held}, expected an "
            f"exclusion, found none; every linear is declared {declared}. "
            + _consequence(severity, found[severity]),
            names,
            severity=severity,
        )


def _meant_by_class(survey: Survey, group: Sequence[Module]) -> Sequence[Module]:
    """Of a group of plain modules, those that only a declaration by class reaches."""
    first = group[0]
    if first.declared is not None:
        return group if first.declared.by_class else []
    if first.role != "router":
        return []

    def by_class(module: Module) -> bool:
        declared = survey.declaration.of(module.name)
        return declared is not None and declared.by_class

    return [m for m in group if by_class(m)]


def _how_bad(survey: Survey, module: Module) -> Severity | None:
    dialect = survey.declaration.layout
    if survey.contents.model_type == "":
        return Severity.WARNING  # which modules are linears is a guess by name
    if module.role in _GATES:
        return Severity.NOTE if _is_built_plain(survey, module) else Severity.ERROR
    if module.role not in LINEAR_ROLES or _is_no_linear(module.name.rpartition(".")[2]):
        return None
    if module.role == "lm_head":
        # The class `Linear` does not reach vLLM's output head, and a tied one is no linear.
        is_tied = survey.config.get("tie_word_embeddings") is True
        return None if is_tied or dialect != MODELOPT else Severity.ERROR
    if module.role == "mtp" and module.name.endswith(".fc") and dialect == MODELOPT:
        return Severity.WARNING
    return Severity.ERROR


def _consequence(severity: Severity, modules: Sequence[Module]) -> str:
    if severity == Severity.NOTE:
        return "The classes of this family build these unquantized all the same"
    if severity == Severity.WARNING and modules[0].role == "mtp":
        return "Older vLLM stops at it with an AssertionError, newer makes an exception"
    return "Engines allocate packed codes for it and stop, or answer with garbage"


PLAIN_NOT_EXCLUDED = Rule(
    "NB310",
    "plain-not-excluded",
    Severity.ERROR,
    "An unquantized module is missing from the exclusions of a uniform declaration",
    "A declaration by class means every linear but those excluded. Six public Qwen3-Next "
    "checkpoints left linear_attn out of `ignore` and answered with garbage; a router that is not "
    "listed is allocated at half its width ('Tried to load weights of size [E, H] to a parameter "
    "of size [E, H/2]'); an MTP head whose experts are not listed ends in a KeyError. Routers of "
    "families whose classes build them unquantized are a note.",
    "Add the modules to the exclusions; one entry per tree, such as mtp* (re:.*mtp.* in "
    "compressed-tensors).",
    _not_excluded,
    threads=(f"{VLLM}40252", f"{VLLM}38650", f"{VLLM}38832", f"{VLLM}41994", f"{VLLM}53387"),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------ NB309, NB311


def _packed_undeclared(survey: Survey) -> Iterator[Finding]:
    if not is_declared(survey):
        return
    found = [g for g in survey.contents.alike if g[0].kind.is_quantized and g[0].declared is None]
    if found:
        names = names_of(found)
        entry = covering_entry(survey, names[0])
        why = f"excluded by {entry!r}" if entry else "in no declaration"
        yield PACKED_NOT_DECLARED.finding(
            f"{count(names, 'module')}: {why}, expected no scales, found {found[0][0].kind.held}; "
            "engines build it unquantized, and its codes and scales find no parameter",
            names,
            entry=entry,
        )


def covering_entry(survey: Survey, module: str) -> str:
    """The first exclusion that takes a module, as its dialect reads it; "" if none does."""
    for entry in exclusions(survey):
        if survey.declaration.layout != COMPRESSED_TENSORS:
            if Excluded([entry]).covers(module):
                return entry
        elif entry == module or matches(entry, module):
            return entry
    return ""


def matches(entry: str, module: str) -> bool:
    """Whether a `re:` entry of compressed-tensors matches; no other entry does, nor a bad one."""
    try:
        return entry.startswith("re:") and compile_pattern(entry[3:]).match(module) is not None
    except re.error:
        return False


PACKED_NOT_DECLARED = Rule(
    "NB309",
    "packed-not-declared",
    Severity.ERROR,
    "A module is excluded or not declared, and its tensors are quantized",
    "The engine builds a BF16 linear and then meets codes and scales: 'There is no module or "
    "parameter named lm_head.input_scale', a shape error, or, where unknown tensors are skipped, "
    "random weights and '!!!!'.",
    "Declare the module, or take the entry that excludes it out.",
    _packed_undeclared,
    threads=(f"{VLLM}45132", f"{VLLM}44081"),
    is_repairable=True,
)


def _no_section(survey: Survey) -> Iterator[Finding]:
    if survey.declaration.layout or survey.faults_of("declaration"):
        return
    names = [m.name for m in survey.quantized]
    if names:
        held = survey.contents.by_name[names[0]].kind.held
        yield NO_SECTION.finding(
            f"{CONFIG} has no quantization_config, there is no hf_quant_config.json, and "
            f"{count(names, 'module')}, hold quantized weights ({held})",
            names,
            file=CONFIG,
        )


NO_SECTION = Rule(
    "NB311",
    "no-quantization-section",
    Severity.ERROR,
    "Tensors are quantized and no configuration says so",
    "Without a section engines build the unquantized model. Packed codes do not fit its shapes, "
    "and FP8 codes are read without their scales.",
    "Write the section from the tensors, or restore both configuration files.",
    _no_section,
    threads=("https://github.com/vllm-project/llm-compressor/issues/959",),
    is_repairable=True,
)


RULES: tuple[Rule, ...] = (
    LISTED_MODULE_ABSENT,
    FORMAT_DIFFERS,
    DECLARED_BUT_PLAIN,
    PACKED_NOT_DECLARED,
    PLAIN_NOT_EXCLUDED,
    NO_SECTION,
    GROUP_SIZE_DIFFERS,
)
