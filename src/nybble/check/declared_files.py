"""Rules about the two configuration files against each other, and each against itself.

config.json speaks flat, hf_quant_config.json nested, and within each a map of layers, groups of
targets and a list of exclusions say the same thing three times. No rule here needs a tensor, some
say more with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nybble.check.contents import Module
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import CONFIG, Survey
from nybble.checkpoint.declaration import Excluded
from nybble.checkpoint.dialects import MODELOPT
from nybble.checkpoint.dialects.modelopt import MIXED, SPELLINGS, Group, Statement
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.errors import CheckpointError

VLLM = "https://github.com/vllm-project/vllm/issues/"
SGLANG = "https://github.com/sgl-project/sglang/issues/"
MODEL_OPTIMIZER = "https://github.com/NVIDIA/Model-Optimizer/issues/"
TENSORRT_LLM = "https://github.com/NVIDIA/TensorRT-LLM/issues/"
AICONFIGURATOR = "https://github.com/ai-dynamo/aiconfigurator/issues/"

#: Roles whose modules engines build as linears, so that a declaration by class means them.
LINEAR_ROLES = frozenset(
    (
        *("routed_expert", "shared_expert", "mlp", "attention", "linear_attention"),
        *("linear_attention_gate", "lm_head", "mtp", "vision", "linear"),
    )
)


def count(names: Iterable[str], what: str) -> str:
    """ "3 modules, the first 'x'", "module 'x'" for one."""
    found = list(names)
    if len(found) == 1:
        return f"{what} {found[0]!r}"
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{len(found):,} {plural}, the first {found[0]!r}"


def statements(survey: Survey) -> tuple[Statement | None, Statement | None]:
    """What config.json and hf_quant_config.json say in ModelOpt's words; None for what does not
    speak them, and for both where one cannot be read (a fault already)."""
    if survey.sections.dialect != MODELOPT:
        return None, None
    try:
        return survey.sections.statements
    except CheckpointError:
        return None, None


def said_of(survey: Survey) -> list[Statement]:
    """What the one or two files say that speak ModelOpt's words."""
    return [s for s in statements(survey) if s is not None]


def layer_map(survey: Survey) -> tuple[str, dict[str, tuple[str, int]]]:
    """The file whose `quantized_layers` count, and that map; "" and {} without one."""
    found = next((s for s in said_of(survey) if s.layers), None)
    return ("", {}) if found is None else (found.file, found.layers)


# ------------------------------------------------------------------------------------------- NB301


def _twins(survey: Survey) -> Iterator[Finding]:
    flat, nested = statements(survey)
    if flat is None or nested is None:
        return
    yield from _words_differ(flat, nested)
    yield from _maps_differ(flat, nested)
    yield from _excludes_differ(survey, flat, nested)


def _words_differ(flat: Statement, nested: Statement) -> Iterator[Finding]:
    for what, here, there, severity, does in (
        (
            "producer",
            flat.producer,
            nested.producer,
            Severity.NOTE,
            "one of them was not rewritten",
        ),
        (
            *("quant_algo", flat.algorithm, nested.algorithm, Severity.ERROR),
            "vLLM and SGLang read config.json, TensorRT-LLM hf_quant_config.json",
        ),
        (
            *("the KV cache", flat.kv_cache, nested.kv_cache, Severity.WARNING),
            "engines that read one file alone cache in another format",
        ),
    ):
        if here != there:
            yield CONFIG_TWINS_DIFFER.finding(
                f"{what}: {CONFIG} says {here or 'nothing'}, {CONFIG_FILE} says "
                f"{there or 'nothing'}: {does}",
                file=CONFIG,
                severity=severity,
                what=what,
                flat=here,
                nested=there,
            )
    if flat.group_size and nested.group_size and flat.group_size != nested.group_size:
        yield CONFIG_TWINS_DIFFER.finding(
            f"group size: {CONFIG} says {flat.group_size}, {CONFIG_FILE} says {nested.group_size}: "
            "one of them does not fit the block scales",
            file=CONFIG,
            what="group size",
        )


def _maps_differ(flat: Statement, nested: Statement) -> Iterator[Finding]:
    if bool(flat.layers) != bool(nested.layers) and MIXED in (flat.algorithm, nested.algorithm):
        has, lacks = (flat, nested) if flat.layers else (nested, flat)
        yield CONFIG_TWINS_DIFFER.finding(
            f"quantized_layers: {has.file} lists {len(has.layers):,} modules, {lacks.file} has no "
            "map: engines that read it alone do not know which module is what",
            file=lacks.file,
            severity=Severity.WARNING,
            what="quantized_layers",
        )
    elif flat.layers != nested.layers:
        both = flat.layers | nested.layers
        names = [n for n in both if flat.layers.get(n) != nested.layers.get(n)]
        yield CONFIG_TWINS_DIFFER.finding(
            f"quantized_layers: {count(names, 'entry')}, {_differ(names)}: {CONFIG} says "
            f"{_spell(flat.layers.get(names[0]))}, {CONFIG_FILE} says "
            f"{_spell(nested.layers.get(names[0]))}",
            names,
            file=CONFIG,
            what="quantized_layers",
        )


def _differ(names: list[str]) -> str:
    return "differs" if len(names) == 1 else "differ"


def _spell(entry: tuple[str, int] | None) -> str:
    if entry is None:
        return "nothing"
    return f"{entry[0]} with group size {entry[1]}" if entry[1] else entry[0]


def _excludes_differ(survey: Survey, flat: Statement, nested: Statement) -> Iterator[Finding]:
    odd = sorted(set(flat.excluded) ^ set(nested.excluded))
    if not odd:
        return
    mine, theirs = Excluded(flat.excluded), Excluded(nested.excluded)
    hit = [
        m.name
        for m in survey.modules
        if _matters(m, flat.algorithm) and mine.covers(m.name) != theirs.covers(m.name)
    ]
    severity = Severity.ERROR if hit else Severity.NOTE if survey.tensors else Severity.WARNING
    said = (
        f"they differ for {count(hit, 'module')}" if hit else "no module of the files is affected"
    )
    yield CONFIG_TWINS_DIFFER.finding(
        f"excluded modules: {len(odd)} entries are in one of {CONFIG} and {CONFIG_FILE} alone, the "
        f"first {odd[0]!r}" + (f"; {said}" if survey.tensors else ""),
        hit,
        file=CONFIG,
        severity=severity,
        what="excluded",
        entries=odd,
    )


def _matters(module: Module, algorithm: str) -> bool:
    if module.kind.is_quantized or algorithm == MIXED:
        return module.kind.is_quantized
    return module.role in LINEAR_ROLES


CONFIG_TWINS_DIFFER = Rule(
    "NB301",
    "config-twins-differ",
    Severity.ERROR,
    "config.json and hf_quant_config.json say different things",
    "A ModelOpt checkpoint states its quantization twice, and engines do not agree which file they "
    "read: vLLM, SGLang and llama.cpp take config.json and fall back to the other, TensorRT-LLM "
    "reads hf_quant_config.json. Where the two differ, two engines run two models from one file. "
    "A difference in algorithm, map or exclusions is an error; a KV cache format in one alone is a "
    "warning; another producer is a note, and often the sign of a hand-edited twin.",
    "Write both files from one source, so that they are equal.",
    _twins,
    threads=(f"{MODEL_OPTIMIZER}929", f"{SGLANG}27906"),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB302


def _groups(survey: Survey) -> Iterator[Finding]:
    for said in said_of(survey):
        yield from _targets_differ(said)
        for group in said.groups:
            yield from _group_differs(said, group)


def _targets_differ(said: Statement) -> Iterator[Finding]:
    targets = {t for group in said.groups for t in group.targets}
    odd = sorted(targets ^ set(said.layers))
    if not said.layers or not targets or not odd:
        return
    by_class = targets == {"Linear"}
    found = "every Linear" if by_class else f"{len(targets):,} modules"
    yield GROUPS_CONTRADICT_LAYERS.finding(
        f"{said.file}: the targets of config_groups are {found}, quantized_layers lists "
        f"{count(said.layers, 'module')}: vLLM, SGLang and llama.cpp follow quantized_layers, a "
        "reader of config_groups takes the others too"
        + ("" if by_class else f"; {odd[0]!r} is in one of them alone"),
        [] if by_class else odd,
        file=said.file,
        severity=Severity.NOTE if by_class else Severity.WARNING,
    )


def _group_differs(said: Statement, group: Group) -> Iterator[Finding]:
    listed: dict[str, list[str]] = {}
    for target in group.targets:
        if target in said.layers:
            listed.setdefault(said.layers[target][0], []).append(target)
    if not said.layers and said.algorithm != MIXED:
        listed = {said.algorithm: ["every Linear"]}
    for spelling, targets in sorted(listed.items()):
        fault, runs = _fault(group, spelling)
        if fault:
            source = "quantized_layers says" if said.layers else "quant_algo says"
            whose = count(targets, "target") if said.layers else "every Linear"
            yield GROUPS_CONTRADICT_LAYERS.finding(
                f"{said.file}: config_groups.{group.name} gives {whose}, {fault}; {source} "
                f"{spelling}: {runs}",
                targets if said.layers else (),
                file=said.file,
                group=group.name,
                spelling=spelling,
            )


def _fault(group: Group, spelling: str) -> tuple[str, str]:
    """What a group says against an algorithm, and who would run what; ("", "") if it agrees."""
    if spelling.upper() not in SPELLINGS:
        return "", ""
    _, weight, _, activation = SPELLINGS[spelling.upper()]
    bits = 8 if weight.startswith(("fp8", "mxfp8")) else 4
    if group.weight_bits not in (0, bits):
        return f"{group.weight_bits}-bit weights", "the tensors fit one of them only"
    if group.input_bits and activation == "BF16":
        runs = f"engines that read the groups run W{bits}A{group.input_bits}, those that follow "
        return f"{group.input_bits}-bit input activations", f"{runs}the name run W{bits}A16"
    if not group.input_bits and activation in ("FP4", "FP8 static"):
        runs = f"vLLM then runs it weight-only, as W{bits}A16, others as W{bits}A{bits}"
        return "no input activations", runs
    return "", ""


GROUPS_CONTRADICT_LAYERS = Rule(
    "NB302",
    "groups-contradict-layers",
    Severity.WARNING,
    "config_groups and quantized_layers (or quant_algo) disagree",
    "`config_groups` repeats in numbers what `quantized_layers` and `quant_algo` say in words. "
    "Where the groups give 4-bit input activations to modules that are listed as W4A16_NVFP4, one "
    "engine runs W4A16 and another W4A4 from the same file, at different speed and accuracy. A "
    "published 35B is such a file. The map counts, the tensors decide.",
    "Rewrite config_groups from quantized_layers.",
    _groups,
    threads=(f"{AICONFIGURATOR}1513", f"{TENSORRT_LLM}15680"),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB303


def _listed_and_excluded(survey: Survey) -> Iterator[Finding]:
    file, layers = layer_map(survey)
    for said in said_of(survey):
        excluded = Excluded(said.excluded)
        both = [name for name in layers if excluded.covers(name)]
        if both:
            entry = next(e for e in said.excluded if Excluded([e]).covers(both[0]))
            yield LISTED_AND_EXCLUDED.finding(
                f"{count(both, 'module')}, listed in quantized_layers of {file} and excluded in "
                f"{said.file} too, by {entry!r}: vLLM builds what is excluded in BF16 and does "
                "not look at the map",
                both,
                file=said.file,
                entry=entry,
            )
            return


LISTED_AND_EXCLUDED = Rule(
    "NB303",
    "listed-and-excluded",
    Severity.ERROR,
    "A module is listed as quantized and excluded from quantization",
    "Engines look at the exclusions first: a module that is in both lists is built in BF16, and "
    "its codes and scales find no parameter. vLLM stopped at `lm_head.input_scale` of a published "
    "checkpoint for that reason.",
    "Take the module out of the exclusions if its tensors are quantized, else out of the map.",
    _listed_and_excluded,
    threads=(f"{VLLM}45132", f"{VLLM}44081"),
    is_repairable=True,
)


RULES: tuple[Rule, ...] = (CONFIG_TWINS_DIFFER, GROUPS_CONTRADICT_LAYERS, LISTED_AND_EXCLUDED)
