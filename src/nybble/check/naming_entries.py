"""Rules about the names and patterns in the configuration's lists, against the tensors' names.

ModelOpt's lists hold globs, compressed-tensors' exact paths and `re:` patterns, and engines match
both in ways of their own: by substring, by component, on renamed paths.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import translate
from functools import cached_property

from nybble.check.contents import Module
from nybble.check.declared_files import LINEAR_ROLES, SGLANG, VLLM, count, layer_map, said_of
from nybble.check.declared_modules import exclusions, is_declared, matches
from nybble.check.engines.matching import FUSED, FUSED_OF
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.checkpoint.declaration import Excluded
from nybble.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT

MODEL_OPTIMIZER_PULL = "https://github.com/NVIDIA/Model-Optimizer/pull/"
FREETOKEN = "https://github.com/FlashML-org/FreeToken/issues/"

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
_GLOB = re.compile(r"[*?\[]")
_numbered_expert = re.compile(r"experts(\\?\.)\(?\d").search
#: What a list made from a recipe names whether a model has it or not.
_is_usual = re.compile(r"mtp|nextn|visual|vision|audio|image|embed|lm_head|projector|router").search


def representatives(survey: Survey) -> list[Module]:
    """All modules, but of the routed experts of a layer only one: patterns treat them alike."""
    found: dict[str, Module] = {}
    for module in survey.modules:
        head, is_expert, tail = module.name.partition(".experts.")
        key = f"{head}.experts.{tail.lstrip('0123456789')}" if is_expert else module.name
        found.setdefault(key, module)
    return list(found.values())


class _Names:
    """The module paths of the files, in the forms that lists are matched with."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.modules = survey.contents.by_name
        self.containers = survey.contents.containers

    @cached_property
    def few(self) -> list[str]:
        return [m.name for m in representatives(self.survey)]

    @cached_property
    def ordered(self) -> list[str]:
        return sorted(self.modules)

    def has_below(self, prefix: str) -> bool:
        at = bisect_left(self.ordered, prefix)
        return at < len(self.ordered) and self.ordered[at].startswith(prefix)

    def some(self, entry: str) -> Iterable[str]:
        return self.ordered if _numbered_expert(entry) else self.few

    def takes(self, entry: str, dialect: str) -> bool:
        """Whether an entry takes any module, or container, of the files."""
        if dialect == COMPRESSED_TENSORS:
            if entry.startswith("re:"):
                return any(matches(entry, name) for name in self.some(entry))
            return entry in self.containers or _is_class(entry)
        if not _GLOB.search(entry):
            ends = dialect != MODELOPT and any(n.endswith(f".{entry}") for n in self.few)
            return entry in self.containers or ends
        if not _GLOB.search(entry[:-1]) and entry.endswith("*"):
            return self.has_below(entry[:-1])
        match = re.compile(translate(entry)).match
        return any(match(name) for name in self.some(entry))


def _is_class(entry: str) -> bool:
    return entry[:1].isupper() and "." not in entry


# ------------------------------------------------------------------------------------------- NB401


def _matches_nothing(survey: Survey) -> Iterator[Finding]:
    entries = exclusions(survey)
    if not entries or not is_declared(survey):
        return
    names = _Names(survey)
    dialect = survey.declaration.layout
    is_tied = survey.config.get("tie_word_embeddings") is True
    found: dict[Severity, list[str]] = {}
    for entry in entries:
        if names.takes(entry, dialect) or _rewritten(entry, names) or _is_fused(entry, names):
            continue
        if is_tied and entry == "lm_head":
            continue
        is_broad = entry.startswith("re:") or _GLOB.search(entry) or dialect == "fp8"
        severity = Severity.NOTE if is_broad or _is_usual(entry) else Severity.WARNING
        found.setdefault(severity, []).append(entry)
    for severity, idle in sorted(found.items(), reverse=True):
        yield IGNORE_MATCHES_NOTHING.finding(
            f"{count(idle, 'exclusion')}: expected a module of the files, found none that "
            "it matches",
            idle,
            severity=severity,
        )
    if dialect == COMPRESSED_TENSORS:
        hollow = [e for e in entries if e in names.containers and e not in names.modules]
        if hollow:
            yield IGNORE_MATCHES_NOTHING.finding(
                f"{count(hollow, 'exclusion')}: a container; in compressed-tensors an entry is one "
                "exact module and nothing below it",
                hollow,
                severity=Severity.NOTE,
            )


IGNORE_MATCHES_NOTHING = Rule(
    "NB401",
    "ignore-matches-nothing",
    Severity.WARNING,
    "An exclusion matches no module",
    "An entry that matches nothing is left over, or was meant for a module of another name that is "
    "now built as quantized. A path that is not there is a warning; patterns of recipes (mtp*, "
    "model.visual*) on a model without these parts are a note, as are container paths in "
    "compressed-tensors, where an entry is one exact module.",
    "Take the entry out, or spell it as the tensors are named.",
    _matches_nothing,
    threads=(f"{SGLANG}36596",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB402


def _matches_more(survey: Survey) -> Iterator[Finding]:
    if survey.declaration.layout != MODELOPT or not is_declared(survey):
        return
    literals = {e: lit for e in exclusions(survey) if (lit := _literal(e))}
    if not literals:
        return
    paths = _engine_paths(survey)
    found: dict[str, list[str]] = {}
    for entry, literal in literals.items():
        hit = [path for path in paths if literal in path]
        if hit:
            covers = Excluded([entry]).covers
            taken = [name for path in hit for name in paths[path] if not covers(name)]
            if taken:
                found[entry] = taken
    if found:
        taken = list(dict.fromkeys(name for names in found.values() for name in names))
        entry = next(iter(found))
        yield IGNORE_MATCHES_MORE.finding(
            f"{count(found, 'exclusion')}: vLLM looks for it anywhere in a path and so takes "
            f"{count(taken, 'quantized module')}, along; expected to match {entry!r} itself and "
            "what is below",
            taken,
            engine="vllm",
            entries=sorted(found),
        )


def _literal(entry: str) -> str:
    """What vLLM looks for as a substring: it splits `x*` into `x` and `x.*` beforehand."""
    if entry.endswith("*") and not entry.endswith(".*"):
        entry = entry[:-1]
    return "" if _GLOB.search(entry) or entry.startswith("re:") else entry


def _engine_paths(survey: Survey) -> dict[str, list[str]]:
    """The paths that vLLM asks the list about, with the declared and quantized modules behind
    each: fused names, and of experts the container."""
    paths: dict[str, list[str]] = {}
    for module in survey.modules:
        if not module.kind.is_quantized or module.declared is None:
            continue
        head, is_expert, _ = module.name.partition(".experts.")
        if is_expert:
            paths.setdefault(f"{head}.experts", []).append(module.name)
            continue
        parent, _, leaf = module.name.rpartition(".")
        for name in {leaf, FUSED_OF.get(leaf, leaf)}:
            paths.setdefault(f"{parent}.{name}" if parent else name, []).append(module.name)
    return paths


IGNORE_MATCHES_MORE = Rule(
    "NB402",
    "ignore-matches-more",
    Severity.ERROR,
    "An exclusion takes more modules along than it names",
    "vLLM takes every entry of a ModelOpt list as a plain substring of a module's path too: "
    "`mlp.gate` hits `mlp.gate_proj` and `mlp.gate_up_proj`, `model.layers.1*` becomes "
    "`model.layers.1` and hits layers 10 to 19. Quantized modules that are hit are built in BF16, "
    "and their codes do not load, or are taken for weights.",
    "Spell entries so that they end at a whole component and occur in no other path, as in "
    "model.layers.1.*.",
    _matches_more,
    threads=(f"{VLLM}48508", f"{VLLM}40252"),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB405


def _rewritten(entry: str, names: _Names) -> str:
    """An absent name as the files spell it, with another beginning; "" if that is not it."""
    head = entry[: found.start()] if (found := _GLOB.search(entry)) else entry
    tail = entry[len(head) :]
    if entry.startswith("re:") or not head or _is_there(head, tail, names):
        return ""
    for mine in _PREFIXES:
        if head.startswith(mine) and len(head) > len(mine):
            rest = head[len(mine) :]
            for theirs in _PREFIXES:
                if theirs != mine and _is_there(theirs + rest, tail, names):
                    return theirs + rest + tail
    return ""


def _is_there(head: str, tail: str, names: _Names) -> bool:
    return names.has_below(head) if tail else head in names.containers


def _names_differ(survey: Survey) -> Iterator[Finding]:
    if not is_declared(survey):
        return
    listed = list(layer_map(survey)[1])
    for said in said_of(survey):
        listed += [t for g in said.groups for t in g.targets if not _is_class(t)]
    listed += [*exclusions(survey), *(t for t in ct_targets(survey) if not _is_class(t))]
    names = _Names(survey)
    found = {e: new for e in dict.fromkeys(listed) if (new := _rewritten(e, names))}
    if found:
        first = next(iter(found))
        yield CONFIG_NAMES_DIFFER.finding(
            f"{count(found, 'entry')} of the configuration begins otherwise than the tensors: "
            f"expected {found[first]!r}, found {first!r}"
            if len(found) == 1
            else f"{count(found, 'entry')}, begin otherwise than the tensors: expected "
            f"{found[first]!r}",
            found,
            names=found,
        )


def ct_targets(survey: Survey) -> Iterator[str]:
    """The targets of compressed-tensors' groups."""
    groups = survey.sections.flat.get("config_groups")
    if survey.sections.dialect == COMPRESSED_TENSORS and isinstance(groups, Mapping):
        for group in groups.values():
            targets = group.get("targets") if isinstance(group, Mapping) else None
            if isinstance(targets, list):
                yield from (t for t in targets if isinstance(t, str))


CONFIG_NAMES_DIFFER = Rule(
    "NB405",
    "config-names-differ",
    Severity.ERROR,
    "The configuration names modules by another prefix than the tensors",
    "A library that renames modules in memory writes tensors in the names of the hub and lists in "
    "its own. The lists then match nothing: BF16 layers are built as quantized, and quantized ones "
    "in BF16. Some engines try both spellings, most do not.",
    "Rewrite the lists to the names of the tensors.",
    _names_differ,
    threads=(f"{MODEL_OPTIMIZER_PULL}2032", f"{FREETOKEN}263"),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB411


def _is_fused(entry: str, names: _Names) -> list[str]:
    """The parts of which the files have the fused linear that an entry names; [] if it is none."""
    parent, _, leaf = entry.rstrip("*").rpartition(".")
    if leaf not in FUSED or entry.rstrip("*") in names.containers:
        return []
    return [f"{parent}.{p}" for p in FUSED[leaf] if f"{parent}.{p}" in names.containers]


def _fused_entries(survey: Survey) -> Iterator[Finding]:
    if not is_declared(survey):
        return
    ignored = exclusions(survey)
    listed = [*ignored, *layer_map(survey)[1], *ct_targets(survey)]
    if not any(e.rstrip("*").rpartition(".")[2] in FUSED for e in listed):
        return
    names = _Names(survey)
    found = {e: parts for e in dict.fromkeys(listed) if (parts := _is_fused(e, names))}
    packed = {e for e in found if e in ignored and _all_packed(found[e], names)}
    for severity, entries, does in (
        (Severity.ERROR, packed, "engines that expand it build packed modules in BF16"),
        (Severity.WARNING, found.keys() - packed, "engines that do not expand it ignore the entry"),
    ):
        if entries:
            first = next(e for e in found if e in entries)
            yield FUSED_ENTRY.finding(
                f"{count([e for e in found if e in entries], 'entry')}: a fused linear of some "
                f"engine, expected modules of the files, {', '.join(map(repr, found[first]))}; "
                f"{does}",
                [e for e in found if e in entries],
                severity=severity,
            )


def _all_packed(parts: list[str], names: _Names) -> bool:
    modules = [names.modules[part] for part in parts if part in names.modules]
    return bool(modules) and all(m.kind.is_quantized for m in modules)


FUSED_ENTRY = Rule(
    "NB411",
    "fused-name-in-lists",
    Severity.WARNING,
    "A list names a fused linear that the files hold in parts",
    "qkv_proj, gate_up_proj and in_proj_qkvz are made by engines from the modules of a file. Lists "
    "are in the names of files; an engine that does not expand the fused name ignores the entry, "
    "and one that uses other fused names never meets it.",
    "List the parts.",
    _fused_entries,
    threads=(f"{SGLANG}36596",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB412


def _bare_containers(survey: Survey) -> Iterator[Finding]:
    if survey.declaration.layout != MODELOPT or not is_declared(survey) or layer_map(survey)[1]:
        return
    entries = exclusions(survey)
    bare = {e for e in entries if not _GLOB.search(e)}
    bare &= survey.contents.containers - set(survey.contents.by_name)
    if not bare:
        return
    others = Excluded(e for e in entries if e not in bare)
    hit = [
        m.name
        for m in representatives(survey)
        if m.role in LINEAR_ROLES
        and not m.kind.is_quantized
        and _above(m.name, bare)
        and not others.covers(m.name)
    ]
    if hit:
        yield BARE_CONTAINER.finding(
            f"{count(sorted(bare), 'exclusion')}: a container without a star; engines that compare "
            f"whole paths build {count(hit, 'plain module')}, below it as quantized",
            sorted(bare),
        )


def _above(name: str, bare: set[str]) -> bool:
    while name:
        name = name.rpartition(".")[0]
        if name in bare:
            return True
    return False


BARE_CONTAINER = Rule(
    "NB412",
    "container-without-star",
    Severity.WARNING,
    "A ModelOpt exclusion names a container without a star",
    "ModelOpt's entries are globs on whole paths: `...mlp.shared_expert` is that path alone. vLLM "
    "happens to find it as a substring of what lies below, unless it renames the tree, as it does "
    "with `model.visual`; SGLang does not, and builds the children as quantized. A vision tower "
    "whose linears end in `.linear` was built as FP4 so.",
    "End the entry in a star, as ModelOpt does.",
    _bare_containers,
    threads=(f"{SGLANG}24927", f"{SGLANG}24929"),
    is_repairable=True,
)


RULES: tuple[Rule, ...] = (
    IGNORE_MATCHES_NOTHING,
    IGNORE_MATCHES_MORE,
    CONFIG_NAMES_DIFFER,
    FUSED_ENTRY,
    BARE_CONTAINER,
)
