"""Rules about parts that should not be quantized, or are so by half: MTP, vision, routers, gates,
norms, modules without their scales (NB105-NB118).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from nybble.check.completeness_inventory import (
    is_mtp,
    is_vision,
    leaf_of,
    take_inventory,
)
from nybble.check.contents import CODES, SIDE, Module, is_four_bit
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.check.wording import first_of, plural

ROUTERS = ("router", "shared_expert_gate")
_numbers = re.compile(r"\d+").sub


def _finding(
    rule: Rule, modules: list[Module], words: str, severity: Severity | None = None
) -> Finding:
    """One finding about modules; `words` say what they are, `{}` stands for the first."""
    names = [m.name for m in modules]
    count = plural(len(names), "module")
    return rule.finding(
        f"{count} {words}, {first_of(names, len(names))} in {modules[0].kind.held}",
        names,
        severity=severity,
        modules=names,
        tensors=[t.name for m in modules for t in m.tensors],
    )


def _quantized(survey: Survey, role: str, is_meant: Callable[[Module], bool]) -> list[Module]:
    """The quantized modules of a role, or of no known one, that a test by name takes too."""
    return [m for m in take_inventory(survey).of(role) if m.kind.is_quantized and is_meant(m)]


def _by_role(survey: Survey, role: str) -> list[Module]:
    return take_inventory(survey).by_role.get(role, [])


# -------------------------------------------------------------------------------------------- MTP


def _mtp_quantized(survey: Survey) -> Iterator[Finding]:
    modules = _quantized(survey, "mtp", is_mtp)
    four = [m for m in modules if is_four_bit(m)]
    eight = [m for m in modules if not is_four_bit(m)]
    if four:
        yield _finding(MTP_QUANTIZED, four, "of the MTP head quantized to four bits")
    if eight:
        yield _finding(MTP_QUANTIZED, eight, "of the MTP head quantized", Severity.NOTE)


def _mtp_not_excluded(survey: Survey) -> Iterator[Finding]:
    """MTP modules that are plain in the file and quantized by the configuration."""
    names = []
    for module in take_inventory(survey).of("mtp"):
        if not is_mtp(module) or module.kind.is_quantized:
            continue
        if module.declared is not None or _covers_experts(survey, module):
            names.append(module.name)
    if not names:
        return
    is_lenient = survey.declaration.layout.startswith("modelopt")
    yield MTP_NOT_EXCLUDED.finding(
        f"{plural(len(names), 'module')} of the MTP head plain in the file and declared as "
        f"quantized, {first_of(names, len(names))}: the lists of exclusions cover only a part of "
        "the head",
        names,
        file="config.json",
        severity=Severity.WARNING if is_lenient else Severity.ERROR,
        modules=names,
    )


def _covers_experts(survey: Survey, module: Module) -> bool:
    """Whether the experts that a plain stack holds are declared as quantized."""
    is_stack = any(leaf_of(module, t.name) == "gate_up_proj" for t in module.tensors)
    return is_stack and survey.declaration.of(f"{module.name}.0.gate_proj") is not None


# ------------------------------------------------------------------------------------ other parts


def _vision_quantized(survey: Survey) -> Iterator[Finding]:
    modules = _quantized(survey, "vision", is_vision)
    four = [m for m in modules if is_four_bit(m)]
    eight = [m for m in modules if not is_four_bit(m)]
    if four:
        # Of an unknown family's tower nobody knows what its engine expects.
        severity = Severity.WARNING if survey.family is None else Severity.ERROR
        words = "of the vision tower quantized to four bits"
        yield _finding(VISION_QUANTIZED, four, words, severity)
    if eight:
        yield _finding(VISION_QUANTIZED, eight, "of the vision tower quantized", Severity.WARNING)


def _routers(survey: Survey) -> Iterator[Finding]:
    inventory = take_inventory(survey)
    modules = [m for m in inventory.of("mtp", *ROUTERS) if m.kind.is_quantized and _is_router(m)]
    if modules:
        yield _finding(ROUTER_QUANTIZED, modules, "that route tokens are quantized")


def _is_router(module: Module) -> bool:
    last = module.name.rpartition(".")[2]
    if module.role in ("", "mtp"):
        return last in ("router", "shared_expert_gate") or module.name.endswith(".mlp.gate")
    return module.role in ROUTERS


def _delta_gates(survey: Survey) -> Iterator[Finding]:
    modules = [m for m in _by_role(survey, "linear_attention_gate") if is_four_bit(m)]
    if modules:
        yield _finding(DELTA_GATE, modules, "that gate linear attention are in four bits")


def _norms_and_state(survey: Survey) -> Iterator[Finding]:
    modules = [
        m
        for role in ("norm", "linear_attention_state", "embedding")
        for m in _by_role(survey, role)
        if m.kind.is_quantized
    ]
    if modules:
        yield _finding(STATE_QUANTIZED, modules, "that no engine expects quantized")


# ---------------------------------------------------------------------------- halves of modules


def _half_modules(survey: Survey) -> Iterator[Finding]:
    groups: dict[str, list[tuple[Module, str]]] = {}
    lost = _modules_in_lost_files(survey)
    for module in survey.modules:
        kind = module.kind
        if kind.is_quantized and not kind.problem:
            continue
        problem = _problem(module)
        if problem and module.name not in lost:
            groups.setdefault(_numbers("#", problem), []).append((module, problem))
    for found in groups.values():
        first, problem = found[0]
        names = [module.name for module, _ in found]
        yield HALF_MODULE.finding(
            f"{plural(len(found), 'module')} without what quantized weights need, "
            f"{first_of(names, len(names))}: {problem}",
            names,
            modules=names,
            problem=problem,
            tensors=[t.name for t in first.tensors],
        )


def _problem(module: Module) -> str:
    """What is wrong with the module's tensors; a missing input scale is another rule's."""
    leaves = [leaf_of(module, t.name) for t in module.tensors]
    if any("scale" in leaf and leaf not in SIDE for leaf in leaves):
        return ""  # a layout with names of its own
    if module.kind.problem:
        parts = module.kind.problem.split("; ")
        return "; ".join(p for p in parts if not p.startswith("lacks input_"))
    if module.kind.is_quantized:
        return ""
    if any(leaf in SIDE for leaf in leaves) and not any(leaf in CODES for leaf in leaves):
        return f"{', '.join(leaf for leaf in leaves if leaf in SIDE)} without a weight"
    return ""


def _modules_in_lost_files(survey: Survey) -> set[str]:
    weight_map = survey.weight_map or {}
    return {t.rpartition(".")[0] for t, file in weight_map.items() if file not in survey.shards}


# -------------------------------------------------------------------------------------- the rules

_GITHUB = "https://github.com/"

MTP_QUANTIZED = Rule(
    "NB105",
    "mtp-quantized",
    Severity.WARNING,
    "The MTP head is quantized",
    "Few loaders expect it: one read the packed head as BF16 without an error, accepted 0 of 24 "
    "drafts and was 17 % slower than without; another dropped it silently. The head is small, and "
    "its errors cost accepted drafts at once.",
    "Copy the head from the source unquantized and exclude it.",
    _mtp_quantized,
    threads=(
        f"{_GITHUB}kekzl/imp/pull/1428",
        f"{_GITHUB}sgl-project/sglang/issues/35797",
        f"{_GITHUB}vllm-project/vllm/issues/55496",
    ),
)
MTP_NOT_EXCLUDED = Rule(
    "NB106",
    "mtp-not-excluded",
    Severity.ERROR,
    "The MTP head is plain, and the configuration declares parts of it as quantized",
    "Lists such as mtp.layers.0* leave out mtp.fc, and lists by module leave out the experts of "
    "the head. The engine then builds quantized layers and finds plain weights: an assertion, a "
    "KeyError, or a parameter that does not exist. Engines that know ModelOpt's lists leave fc "
    "alone.",
    "Exclude the head as a whole: mtp* for ModelOpt, re:^mtp.* for compressed-tensors.",
    _mtp_not_excluded,
    threads=(
        f"{_GITHUB}vllm-project/vllm/issues/38650",
        f"{_GITHUB}vllm-project/vllm/pull/41994",
        f"{_GITHUB}vllm-project/vllm/issues/53387",
    ),
    is_repairable=True,
)
VISION_QUANTIZED = Rule(
    "NB108",
    "vision-quantized",
    Severity.ERROR,
    "The vision tower is quantized",
    "Widths such as 4304 do not divide into blocks, engines build the tower unquantized, and "
    "images suffer first: a tower given the wrong format described red as grey. Patterns such as "
    "mlp* reach into the tower by accident.",
    "Copy the tower from the source unquantized and exclude it.",
    _vision_quantized,
    threads=(
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/1691",
        f"{_GITHUB}kekzl/imp/pull/1422",
        f"{_GITHUB}sgl-project/sglang/issues/24927",
    ),
)
ROUTER_QUANTIZED = Rule(
    "NB115",
    "router-quantized",
    Severity.ERROR,
    "A router or a shared expert's gate is quantized",
    "Engines keep routers unquantized whatever a checkpoint says, and stop at the shape of a "
    "packed one. Where they do not, rounding changes which experts a token visits.",
    "Copy it from the source unquantized and exclude it.",
    _routers,
    threads=(f"{_GITHUB}NVIDIA/Model-Optimizer/issues/1255",),
)
DELTA_GATE = Rule(
    "NB116",
    "linear-attention-gate-in-four-bits",
    Severity.WARNING,
    "The gates of linear attention are in four bits",
    "in_proj_a and in_proj_b have one row per head and decide how fast the state decays: the error "
    "of four bits there accumulates over the whole context, and the rows save nothing.",
    "Copy them from the source unquantized and exclude them.",
    _delta_gates,
    threads=(f"{_GITHUB}vllm-project/vllm/issues/40252",),
)
STATE_QUANTIZED = Rule(
    "NB117",
    "state-or-norm-quantized",
    Severity.WARNING,
    "A norm, a convolution of linear attention or the embedding is quantized",
    "Engines have no quantized path for them: they stop at the unexpected scales, or read codes as "
    "numbers.",
    "Copy it from the source unquantized and exclude it.",
    _norms_and_state,
    threads=(f"{_GITHUB}NVIDIA/Model-Optimizer/pull/2302",),
)
HALF_MODULE = Rule(
    "NB118",
    "half-module",
    Severity.ERROR,
    "A quantized module lacks part of its tensors, or has scales of no use",
    "Codes without scales, scales without codes, or scales that do not fit: a rename that caught "
    "only some names, or a file that was left out. Engines leave the missing parameter unset. "
    "Scales in a dtype that no scale is stored in (I8, BOOL, F8_E5M2) come of a cast or of a view "
    "under the wrong name: engines convert their numbers, and weights are off by any factor.",
    "Restore the module's tensors together, from the source if need be.",
    _half_modules,
    threads=(f"{_GITHUB}ollama/ollama/issues/15880",),
    is_repairable=True,
)

RULES: tuple[Rule, ...] = (
    *(MTP_QUANTIZED, MTP_NOT_EXCLUDED, VISION_QUANTIZED, ROUTER_QUANTIZED, DELTA_GATE),
    *(STATE_QUANTIZED, HALF_MODULE),
)
