"""What transformers and the compressed-tensors package make of a checkpoint.

Read of transformers 5.23.0 (`quantizers/auto.py`: `get_hf_quantizer`, `supports_quant_method`;
`quantizers/base.py`: `update_weight_conversions`; `quantizers/quantizer_compressed_tensors.py`;
`integrations/compressed_tensors.py`: `CompressedTensorsDequantize`, `get_experts_scheme`) and
compressed-tensors 0.20.0 (`utils/match.py`: `match_named_modules`, `match_targets`;
`quantization/lifecycle/apply.py`). As loaded without options: dense modules stay compressed until
the first forward pass, which rounds activations where the scheme says so, in BF16 arithmetic.

Only config.json is read. A key without a place, and a parameter without a key, are warnings: what
does not fit is filled at random, so nearly every fault here is silent. MTP is never built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from nybble.check.contents import Module
from nybble.check.engines.compressed import FIELDS, Arguments, read_arguments
from nybble.check.engines.matching import (
    UNQUANTIZED,
    Object,
    Scheme,
    Unit,
    find_units,
    leaves_of,
    objects,
    section_of,
    sizes_unknown,
    strings,
    unreadable_config,
)
from nybble.check.engines.replayed import Built, Change, Replay, Unfit
from nybble.check.survey import Survey
from nybble.checkpoint.patterns import compile_pattern

#: Families whose class has the names of the checkpoint, and its experts as stacks.
KNOWN = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe")
#: Methods that load what they store, but are not replayed module by module.
_OTHERS = (
    *("awq", "bitsandbytes", "gptq", "aqlm", "quanto", "quark", "fouroversix", "fp_quant", "eetq"),
    *("higgs", "hqq", "fbgemm_fp8", "torchao", "bitnet", "vptq", "spqr", "fp8", "gguf", "mxfp8"),
    *("auto-round", "mxfp4", "metal", "sinq", "gemma"),
)
_METHOD = "compressed-tensors"
_REGEX = "re:"


@dataclass(frozen=True, slots=True)
class Group:
    """One of the `config_groups`, as `QuantizationScheme` reads it."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments
    inputs: Arguments | None
    format: str


def read_groups(section: Object) -> tuple[Group, ...]:
    """The groups of a section, in order; a group without a format has the section's."""
    usual = str(section.get("format") or "")
    return tuple(
        Group(
            name,
            tuple(strings(said.get("targets"))),
            read_arguments(section_of(said, "weights") or {}),
            read_arguments(inputs) if (inputs := section_of(said, "input_activations")) else None,
            str(said.get("format") or usual),
        )
        for name, said in objects(section.get("config_groups")).items()
    )


# ----------------------------------------------------------------------------------------- matching


class Matching:
    """Which group a module gets: `match_named_modules`, then `match_targets`.

    An entry is `re:` and a regular expression for the start of the path, the whole path, or the
    name of a class. A module that any target matches and no entry of `ignore` does gets the group
    of the first target among plain paths, then regular expressions, then classes, each by alphabet.
    The order of the groups decides nothing, but that the last of two equal targets counts.
    """

    def __init__(self, groups: Iterable[Group], ignore: Iterable[str]) -> None:
        by_target: dict[str, Group] = {}
        for group in groups:
            by_target |= dict.fromkeys(group.targets, group)
        ordered = sorted(by_target, key=lambda target: (_REGEX in target, target))
        self._by_target = by_target
        self._plain = {target for target in ordered if not target.startswith(_REGEX)}
        self._patterns = [(t, _compile(t)) for t in ordered if t.startswith(_REGEX)]
        ignored = list(ignore)
        self._ignored = {entry for entry in ignored if not entry.startswith(_REGEX)}
        self._ignored_patterns = [_compile(e) for e in ignored if e.startswith(_REGEX)]

    def find(self, path: str, classes: tuple[str, ...]) -> Group | None:
        """The group of a module of these classes (its own first); None if it stays as it is."""
        if path in self._ignored or any(name in self._ignored for name in classes):
            return None
        if any(match(path) for match in self._ignored_patterns):
            return None
        if path in self._plain:
            return self._by_target[path]
        for target, match in self._patterns:
            if match(path):
                return self._by_target[target]
        named = sorted(name for name in classes if name in self._plain)
        return self._by_target[named[0]] if named else None


def _compile(entry: str) -> Callable[[str], object]:
    """An expression that does not compile names nothing; it is a finding of its own."""
    try:
        return compile_pattern(entry.removeprefix(_REGEX)).match
    except re.error:
        return lambda _: None


def experts_group(groups: tuple[Group, ...]) -> Group:
    """`get_experts_scheme`: a regular expression that mentions experts, else a plain target, else
    the first. `ignore` is not asked."""
    for group in groups:
        if any(t.startswith(_REGEX) and "experts" in t for t in group.targets):
            return group
    plain = (g for g in groups if any(not t.startswith(_REGEX) for t in g.targets))
    return next(plain, groups[0])


# ------------------------------------------------------------------------------------------ schemes


def scheme_of(group: Group | None) -> Scheme:
    """What a group makes of a linear."""
    if group is None:
        return UNQUANTIZED
    weights, inputs = group.weights, group.inputs
    says = f"{group.format or 'no format'} ({group.name})"
    activations = inputs.bits if inputs else 16
    if weights.bits == 4 and weights.is_float:
        builds = "nvfp4" if weights.is_nvfp4 else "mxfp4"
        needs = ["weight_scale"]
        if builds == "nvfp4":
            needs += ["weight_global_scale"] + (["input_global_scale"] if inputs else [])
        return Scheme(says, builds, f"W4A{activations}", "weight_packed", tuple(needs))
    if weights.bits == 8 and weights.is_float and group.format != "mxfp8-quantized":
        builds = {"channel": "fp8_channel", "block": "fp8_block"}.get(weights.strategy, "fp8")
        static = bool(inputs and not inputs.dynamic)
        needs = ["weight_scale"] + (["input_scale"] if static else [])
        return Scheme(says, builds, f"W8A{activations}", "weight", tuple(needs))
    codes = "weight_packed" if group.format.startswith("pack") else "weight"
    kind = f"{'fp' if weights.is_float else 'int'}{weights.bits}"
    return Scheme(says, kind, f"W{weights.bits}A{activations}", codes, is_known=False)


_CLASSES = {"embedding": ("Embedding", "Module")}
_LINEAR = ("Linear", "Module")


def _fault(member: Module, scheme: Scheme) -> str:
    """What is filled at random, or read without its scale; all of it only warns."""
    if not scheme.is_known:
        return ""
    leaves = leaves_of(member)
    if scheme.builds == "bf16":
        if not member.kind.is_quantized:
            return ""
        if "weight" in leaves:
            return f"{member.kind.held} codes are read as numbers, without their scales"
        return "its weight is filled at random: the file has " + ", ".join(sorted(leaves))
    if scheme.codes not in leaves:
        return f"{scheme.codes} is filled at random: the file has {', '.join(sorted(leaves))}"
    missing = [leaf for leaf in scheme.needs if leaf not in leaves]
    return f"{', '.join(missing)} missing, and filled at random" if missing else ""


def _packed_as_plain(member: Module) -> bool:
    """Four-bit codes under the name of a plain weight: half as wide as the parameter."""
    codes = member.tensor("weight")
    return codes is not None and codes.dtype == "U8" and member.kind.is_quantized


def _linear(unit: Unit, member: Module, scheme: Scheme) -> Built:
    fault = _fault(member, scheme)
    is_silent = bool(fault) and not _packed_as_plain(member)
    if fault and not is_silent:
        fault = f"holds {member.kind.held} codes, built as BF16: the shapes of weight differ"
    return Built(
        member.name,
        (member.name,),
        1,
        scheme.says,
        member.kind.held,
        scheme.builds,
        scheme.runs_as if not fault or is_silent else "",
        fault,
        is_silent,
    )


def _experts(unit: Unit, group: Group | None) -> Built:
    """Routed experts become stacks, and are dequantized while they are read."""
    scheme = scheme_of(group)
    faults = [_experts_fault(unit, member, scheme) for member in unit.members]
    problem, is_silent = next((f for f in faults if f[0]), ("", False))
    says = scheme.says if unit.is_quantized else UNQUANTIZED.says
    runs = "BF16" if not problem or is_silent else ""
    return Built(
        unit.path, (unit.path,), unit.count, says, unit.holds, "bf16", runs, problem, is_silent
    )


LOST_SCALE = (
    "weight_global_scale is not used: the experts are decoded as code x block scale, off by the "
    "tensor scale"
)


def _experts_fault(unit: Unit, member: Module, scheme: Scheme) -> tuple[str, bool]:
    held = member.kind.held
    is_stack = member.name == unit.path
    if not member.kind.is_quantized and scheme.codes == "weight_packed" and not is_stack:
        # Stacking decodes every expert with that group, `ignore` or not; tried with 5.23.0.
        return "plain experts, one by one, beside a group of packed weights: stacking raises", False
    if not member.kind.is_quantized or not scheme.is_known:
        return "", False
    if scheme.builds == "nvfp4" and held == "nvfp4" and "weight_packed" in leaves_of(member):
        return LOST_SCALE, True
    if scheme.builds.startswith("fp8") == held.startswith("fp8") and scheme.builds != "bf16":
        return "", False
    return f"{held} experts are read with {scheme.says}: the shapes of the stack differ", False


# ------------------------------------------------------------------------------------------- engine


def _section(survey: Survey) -> dict[str, object] | None:
    return section_of(survey.config) or section_of(survey.text_config)


def _refusals(section: Object, units: Iterable[Unit]) -> Iterator[str]:
    method = str(section.get("quant_method") or "")
    if not method:
        yield "config.json: quantization_config has no quant_method: ValueError"
    elif method == "nvfp4":
        yield "quant_method 'nvfp4' quantizes BF16 while loading; it reads no quantized checkpoint"
    elif method == _METHOD:
        yield from _field_refusals(section)
    elif method not in _OTHERS and any(_packed_as_plain(m) for u in units for m in u.members):
        yield (
            f"Unknown quantization type, got {method}: it warns, takes the packed weights for BF16 "
            "ones, and stops at their shapes"
        )


def _field_refusals(section: Object) -> Iterator[str]:
    for name, said in objects(section.get("config_groups")).items():
        for part in ("weights", "input_activations", "output_activations"):
            arguments = section_of(said, part) or {}
            unknown = sorted(set(arguments) - FIELDS)
            if unknown:
                yield f"config_groups.{name}.{part}: extra field {unknown[0]!r} is not permitted"
            if arguments.get("actorder") in ("group", True):
                yield f"config_groups.{name}.{part}: actorder by group is no longer supported"
    if not objects(section.get("config_groups")):
        yield "compressed-tensors without config_groups: nothing says how to decode"


class Transformers:
    """transformers with the compressed-tensors package."""

    name = "transformers"
    oldest = "5.20"
    newest = "5.23.0"
    changes = (
        Change(
            "",
            "routed experts in packed NVFP4 lose their weight_global_scale while they are stacked; "
            "seen in 5.20.0 and 5.23.0",
            "https://github.com/huggingface/transformers/issues/48371",
        ),
        Change(
            "",
            "quant_method modelopt is not known; its weights are taken for BF16",
            "https://github.com/huggingface/transformers/issues/46772",
        ),
    )

    def replay(self, survey: Survey, version: str = "", hardware: str = "") -> Replay:
        """What `from_pretrained` makes of a checkpoint; see `Engine`. Any hardware is alike."""
        section = _section(survey)
        units = [u for u in find_units(survey) if u.part != "mtp"]
        method = str((section or {}).get("quant_method") or "")
        refusals = tuple(dict.fromkeys(_refusals(section, units))) if section else ()
        built: tuple[Built, ...] = ()
        if method == _METHOD:
            built = tuple(_compressed(section or {}, [*units, *_embeddings(survey, units)]))
        elif method not in _OTHERS:
            built = tuple(_plain(units))
        notes = (*_notes(survey, method), *sizes_unknown(survey))
        refusals = (*unreadable_config(survey), *refusals)
        return Replay(self.name, version or self.newest, refusals, built, notes)

    def unfit(self, survey: Survey, tensor_parallel: int) -> tuple[Unfit, ...]:
        """Nothing is divided that was not decoded before: nothing is unfit."""
        return ()


def _embeddings(survey: Survey, units: Iterable[Unit]) -> Iterator[Unit]:
    """Plain embeddings, which targets of other classes than Linear may reach."""
    known = {unit.path for unit in units}
    for module in survey.modules:
        if module.name.endswith(("embed_tokens", "pos_embed")) and module.name not in known:
            yield Unit(module.name, "embedding", "trunk", (module,), (1,))


def _compressed(section: Object, units: Iterable[Unit]) -> Iterator[Built]:
    groups = read_groups(section)
    matching = Matching(groups, strings(section.get("ignore")))
    schemes: Mapping[str, Scheme] = {g.name: scheme_of(g) for g in groups}
    for unit in units:
        if unit.sort == "experts":
            yield _experts(unit, experts_group(groups) if groups else None)
            continue
        for member in unit.members:
            group = None
            if unit.sort != "router":  # a bare parameter, no linear
                group = matching.find(member.name, _CLASSES.get(unit.sort, _LINEAR))
            yield _linear(unit, member, schemes[group.name] if group else UNQUANTIZED)


def _plain(units: Iterable[Unit]) -> Iterator[Built]:
    """Without a method that it knows, everything is BF16."""
    for unit in units:
        if unit.sort == "experts":
            yield _plain_experts(unit)
        else:
            yield from (_linear(unit, member, UNQUANTIZED) for member in unit.members)


def _plain_experts(unit: Unit) -> Built:
    problem, is_silent = "", False
    worst = next((m for m in unit.members if m.kind.is_quantized), None)
    if worst is not None:
        is_silent = not _packed_as_plain(worst)
        problem = f"holds {worst.kind.held} codes: the shapes of the stack differ"
        if "weight" not in leaves_of(worst):
            problem = "the stacks are filled at random: the file has no plain weights for them"
        elif is_silent:
            problem = f"{worst.kind.held} codes are read as numbers, without their scales"
    runs = "BF16" if not problem or is_silent else ""
    return Built(
        unit.path,
        (unit.path,),
        unit.count,
        UNQUANTIZED.says,
        unit.holds,
        "bf16",
        runs,
        problem,
        is_silent,
    )


def _notes(survey: Survey, method: str) -> Iterator[str]:
    model_type = str(survey.config.get("model_type") or "").removesuffix("_text")
    if model_type not in KNOWN:
        yield f"model_type {model_type!r} is not known here: its names are taken for its class's"
    if method in _OTHERS:
        yield f"quant_method {method!r} loads by its own rules, which are not replayed"
    if any(m.name.startswith("mtp.") for m in survey.modules):
        yield "mtp.* is skipped: loading and saving again loses it"
    if method == _METHOD:
        yield "dense modules are decoded in the first forward pass; the arithmetic is BF16"


ENGINE = Transformers()
