"""compressed-tensors as engines read it: groups, targets, `ignore`, and the scheme of a group.

vLLM and SGLang descend from the same code and differ in details, which are arguments here. Rules:
vLLM 0.32.0 `compressed_tensors.py` (`get_scheme_dict`, `_get_scheme_from_parts`), `utils.py`
(`find_matched_target`, `should_ignore_layer`), `compressed_tensors_moe.py` (`get_moe_method`) and
SGLang 0.5.23's files of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nybble.check.engines.matching import (
    UNQUANTIZED,
    Object,
    Scheme,
    failing,
    objects,
    strings,
)
from nybble.checkpoint.patterns import compile_pattern

#: What `QuantizationArgs` knows; anything else in a group is refused when it is read.
FIELDS = frozenset(
    (
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
        *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    )
)
_ACTIVATION_FORMATS = (
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
)
_EXPERT = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Arguments:
    """One `QuantizationArgs`, with its defaults filled in."""

    bits: int
    is_float: bool
    strategy: str
    group_size: int
    symmetric: bool
    dynamic: bool

    @property
    def is_nvfp4(self) -> bool:
        return (
            self.bits == 4
            and self.is_float
            and self.symmetric
            and (self.strategy, self.group_size) == ("tensor_group", 16)
        )

    @property
    def is_mx(self) -> bool:
        return (
            self.is_float and self.symmetric and (self.strategy, self.group_size) == ("group", 32)
        )


def read_arguments(said: Object) -> Arguments:
    """`weights` or `input_activations` of a group."""
    size = said.get("group_size")
    group_size = size if isinstance(size, int) else 0
    inferred = "group" if group_size > 0 else "channel" if group_size < 0 else "tensor"
    bits = said.get("num_bits", 8)
    return Arguments(
        bits=bits if isinstance(bits, int) else 0,
        is_float=str(said.get("type") or "int").lower() == "float",
        strategy=str(said.get("strategy") or inferred).lower(),
        group_size=group_size,
        symmetric=said.get("symmetric", True) is not False,
        dynamic=bool(said.get("dynamic", False)),
    )


@dataclass(frozen=True, slots=True)
class Group:
    """One of the `config_groups`."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments
    inputs: Arguments | None
    format: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where engines differ.

    `activation_formats`: formats that read `input_activations`; `inputs_always`: they are read in
    any format. `class_first`: a class name is tried before the members of a fused module;
    `suffixes`: a plain entry of `ignore` also matches the end of a path; `refuses_unmatched`: a
    linear that no target matches raises; `head_by_name`: class names never mean lm_head, suffixes
    do. `experts_class` is the engine's name for the routed experts.
    """

    activation_formats: tuple[str, ...]
    inputs_always: bool
    class_first: bool
    suffixes: bool
    refuses_unmatched: bool
    head_by_name: bool
    experts_class: str
    block_without_inputs: bool


VLLM = Dialect(_ACTIVATION_FORMATS, True, False, False, False, False, "RoutedExperts", True)
SGLANG = Dialect(
    (*_ACTIVATION_FORMATS, "pack-quantized"), False, True, True, True, True, "FusedMoE", False
)


def read_groups(section: Object, dialect: Dialect) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """The groups, and why the configuration is refused ("" for not at all)."""
    groups, refusals = [], []
    usual = str(section.get("format") or "")
    for name, said in objects(section.get("config_groups")).items():
        targets = tuple(strings(said.get("targets")))
        if dialect is VLLM and len(targets) == 1 and targets[0].endswith("Attention"):
            continue  # quantization of attention comes with the KV cache
        refusals += _refusals(name, said)
        own = str(said["format"]) if said.get("format") is not None else ""
        inputs = said.get("input_activations")
        reads = dialect.inputs_always or (own or usual) in dialect.activation_formats
        groups.append(
            Group(
                name,
                targets,
                read_arguments(objects(said).get("weights", {})),
                read_arguments(inputs)
                if isinstance(inputs, Mapping) and inputs and reads
                else None,
                own or usual,
            )
        )
    sparsity = objects({"s": section.get("sparsity_config")}).get("s", {})
    if strings(sparsity.get("targets")):
        refusals.append("sparsity_config names targets, which are no longer supported")
    return tuple(groups), tuple(refusals)


def _refusals(name: str, said: Object) -> list[str]:
    found = []
    for part in ("weights", "input_activations", "output_activations"):
        arguments = objects(said).get(part, {})
        unknown = sorted(set(arguments) - FIELDS)
        if unknown:
            found.append(f"config_groups.{name}.{part}: unknown field {unknown[0]!r}")
    if objects(said).get("weights", {}).get("actorder") in ("group", "dynamic", True):
        found.append(f"config_groups.{name}: actorder by group is no longer supported")
    if not isinstance(said.get("weights"), Mapping):
        found.append(f"config_groups.{name}: has no weights")
    return found


# ------------------------------------------------------------------------------------------ names


class Entries:
    """Entries of `targets` or `ignore`, indexed: the first that matches a path counts."""

    def __init__(self, entries: Iterable[str], suffixes: bool = False) -> None:
        self.entries = tuple(dict.fromkeys(entries))
        self.exact: dict[str, int] = {}
        self.patterns: list[tuple[int, Callable[[str], object]]] = []
        self.classes: list[tuple[int, str]] = []
        self.suffixes = suffixes
        for i, entry in enumerate(self.entries):
            if entry.startswith("re:"):
                self.patterns.append((i, compile_pattern(entry[3:]).match))
            else:
                self.exact[entry] = i
                self.classes.append((i, entry.lower()))

    def find(self, path: str) -> int | None:
        """The first entry that is this path, or a regular expression that matches its start."""
        found = self.exact.get(path)
        if self.suffixes:
            at = path.find(".")
            while at >= 0:
                end = self.exact.get(path[at + 1 :])
                found = end if found is None or (end is not None and end < found) else found
                at = path.find(".", at + 1)
        for i, match in self.patterns:
            if found is not None and i > found:
                break
            if match(path):
                return i
        return found

    def find_class(self, name: str) -> int | None:
        """The first entry that a class name contains, capitals or not."""
        lower = name.lower()
        found = next((i for i, entry in self.classes if entry in lower), None)
        patterns = (i for i, match in self.patterns if match(name))
        return min((i for i in (found, next(patterns, None)) if i is not None), default=None)


Packed = Mapping[str, tuple[str, ...]]


class Matcher:
    """Which group a module of the engine gets."""

    def __init__(
        self,
        groups: tuple[Group, ...],
        ignore: Iterable[str],
        dialect: Dialect,
        rename: Callable[[str], str],
    ) -> None:
        def mapped(entry: str) -> str:
            return rename(entry) if "." in entry and not entry.startswith("re:") else entry

        self.dialect = dialect
        self.ignored = Entries(map(mapped, ignore), dialect.suffixes)
        by_target: dict[str, Group] = {}
        for group in groups:  # a target that two groups name keeps its place, and gets the last
            by_target |= dict.fromkeys(map(mapped, group.targets), group)
        if "Linear" in by_target:
            by_target.setdefault(dialect.experts_class, by_target["Linear"])
        self.groups = tuple(by_target.values())
        self.targets = Entries(by_target)
        self.by_suffix = Entries(by_target, suffixes=True)

    def find(self, path: str, class_name: str, packed: Packed) -> Group | None:
        """The group of a module; None for one that is ignored or that nothing names.

        Raises ValueError, as engines do, where the members of a fused module differ.
        """
        if self.is_ignored(path, packed):
            return None
        if self.dialect.head_by_name and class_name == "ParallelLMHead":
            at = self.by_suffix.find(path)
            return None if at is None else self.groups[at]
        at = self._first(path, class_name, packed)
        if at is None and self.dialect.refuses_unmatched and self.groups:
            raise ValueError(f"Unable to find matching target for {path}")
        return None if at is None else self.groups[at]

    def _first(self, path: str, class_name: str, packed: Packed) -> int | None:
        at = self.targets.find(path)
        if at is None and not self.dialect.class_first:
            at = self._fused(path, packed)
        if at is None:
            at = self.targets.find_class(class_name)
        return self._fused(path, packed) if at is None else at

    def _fused(self, path: str, packed: Packed) -> int | None:
        """The first member's entry, if every member of a fused module has one."""
        fused = next((key for key in packed if path.endswith(key)), None)
        if fused is None:
            return None
        found = [self.targets.find(path.replace(fused, member)) for member in packed[fused]]
        return found[0] if None not in found else None

    def is_ignored(self, path: str, packed: Packed) -> bool:
        if self.ignored.find(path) is not None:
            return True
        last = path.rpartition(".")[2]
        if last not in packed:
            return False
        found = [
            self.ignored.find(path.replace(last, member)) is not None for member in packed[last]
        ]
        if any(found) and not all(found):
            raise ValueError(
                f"Found different quantization schemes for the shards of {path}: some are in ignore"
            )
        return all(found)

    def experts(self, container: str, packed: Packed) -> Group | None:
        """The group of the routed experts of a layer: engines look at expert 0 alone."""
        found = [
            self.find(f"{container}.0.{name}", self.dialect.experts_class, packed)
            for name in _EXPERT
        ]
        if any(_content(group) != _content(found[0]) for group in found):
            raise ValueError(
                f"All MoE projections need to have same quantization scheme but found multiple: "
                f"{container}.0"
            )
        return found[0]


def _content(group: Group | None) -> object:
    return group and (group.weights, group.inputs, group.format)


# ---------------------------------------------------------------------------------------- schemes


def scheme_of(group: Group | None, dialect: Dialect, capability: int, is_experts: bool) -> Scheme:
    """What a group makes an engine build; `capability` 0 is any hardware that has it all."""
    if group is None:
        return UNQUANTIZED
    weights, inputs = group.weights, group.inputs
    if weights.is_nvfp4:
        return _nvfp4(group, dialect, capability, is_experts)
    if weights.bits == 4 and weights.is_mx:
        is_native = capability >= 100 or (not capability and inputs is not None)
        return _packed("MXFP4", "mxfp4", "W4A4" if is_native else "W4A16")
    if weights.bits == 8 and weights.is_mx:
        return Scheme("MXFP8", "mxfp8", "W8A8", needs=("weight_scale",))
    if not weights.is_float:
        word = f"INT{weights.bits}"
        runs = f"W{weights.bits}A{inputs.bits if inputs else 16}"
        return Scheme(word, word.lower(), runs, is_known=False)
    if group.format in dialect.activation_formats and weights.bits == 8 and weights.symmetric:
        return _fp8(group, dialect, capability)
    return failing(
        f"{group.format} {weights.strategy}",
        f"No compressed-tensors compatible scheme was found: {group.name} has format "
        f"{group.format!r}, {weights.bits}-bit weights by {weights.strategy}",
    )


def _nvfp4(group: Group, dialect: Dialect, capability: int, is_experts: bool) -> Scheme:
    if group.inputs is None:
        # vLLM gives weight-only experts a place for the activation scale, linears none.
        accepts = ("input_global_scale",) if is_experts and dialect is VLLM else ()
        return _packed("NVFP4A16", "nvfp4", "W4A16", ("weight_global_scale",), accepts)
    if not group.inputs.is_nvfp4:
        return failing("NVFP4", "For NVFP4 weights, input quantization must also be NVFP4")
    runs = "W4A16" if 0 < capability < 100 else "W4A4"
    return _packed("NVFP4", "nvfp4", runs, ("weight_global_scale", "input_global_scale"))


def _packed(
    says: str, builds: str, runs: str, more: tuple[str, ...] = (), accepts: tuple[str, ...] = ()
) -> Scheme:
    return Scheme(says, builds, runs, "weight_packed", ("weight_scale", *more), accepts=accepts)


def _fp8(group: Group, dialect: Dialect, capability: int) -> Scheme:
    builds = {"tensor": "fp8", "channel": "fp8_channel", "block": "fp8_block"}
    weights, inputs = group.weights, group.inputs
    word = builds.get(weights.strategy, "")
    is_supported = inputs is None or inputs.dynamic or inputs.strategy == "tensor"
    if not word or not is_supported:
        return failing("FP8", f"No compressed-tensors compatible scheme was found: {group.name}")
    if inputs is None and word == "fp8_block" and not dialect.block_without_inputs:
        return failing("FP8", f"No compressed-tensors compatible scheme was found: {group.name}")
    is_static = inputs is not None and not inputs.dynamic
    runs = "W8A16" if inputs is None or 0 < capability < 89 else "W8A8"
    says = f"FP8 {weights.strategy}, " + (
        "no activations" if inputs is None else "static" if is_static else "dynamic"
    )
    if is_static and word == "fp8_block":
        return failing(says, f"{group.name}: FP8 blocks have no static activation scale")
    needs = ("weight_scale", "input_scale") if is_static else ("weight_scale",)
    return Scheme(says, word, runs, needs=needs)
