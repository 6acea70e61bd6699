"""What a checkpoint's configuration files say of quantization, and where they disagree.

Reads ModelOpt (flat in config.json, nested in hf_quant_config.json), compressed-tensors and
`quant_method: fp8`; of any other method only its name. Looks at no tensor, and knows no engine:
what a file says is not what an engine does.

Precedence, where files disagree: `quantized_layers`, in either file; hf_quant_config.json for the
KV cache and the producer; config.json for the rest; `config_groups` last. Source: docs/layouts.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate

from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.reader import Checkpoint, _read_small, parse_json
from nybble.errors import CheckpointError
from nybble.formats.scheme import SCHEMES

_FLAT = "config.json"
_Object = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Declared:
    """How the files say that a module is stored.

    `spelling` is theirs. `scheme` is a row of `SCHEMES`, "" where nybble has none; `weight` the
    weight's format in nybble's words (`FORMATS`, or "mxfp8", "int4" ...), "" where it has none.
    `activation` is in the words of `Scheme.activation`. With `by_class` the files name no module
    but every `Linear`: whether this one is, is for the caller to say.
    """

    spelling: str
    scheme: str
    weight: str
    group_size: int
    activation: str
    by_class: bool = False

    def __str__(self) -> str:
        return self.spelling

    @property
    def needs_input_scale(self) -> bool:
        """A measured scale of the input belongs in the file."""
        return self.activation in ("FP4", "FP8 static")


_Rule = Callable[[str], Declared | None]


@dataclass(frozen=True, slots=True)
class Declaration:
    """What the files say; `layout` and `kv_cache` are "" where they say nothing of that."""

    layout: str = ""
    producer: str = ""
    kv_cache: str = ""
    disagreements: tuple[str, ...] = ()
    rule: _Rule = field(default=lambda module: None, repr=False, compare=False)

    def of(self, module: str) -> Declared | None:
        """How this module is declared; None for one that is to stay unquantized."""
        return self.rule(module)


def read_declaration(config: _Object, hf_quant_config: _Object | None) -> Declaration:
    """What config.json and, where there is one, hf_quant_config.json say.

    Raises CheckpointError for an entry of the wrong type.
    """
    section = _section(config)
    nested = _nested(hf_quant_config)
    method = str(section.get("quant_method") or "").lower()
    if method in ("compressed-tensors", "compressed_tensors"):
        return _compressed_tensors(section)
    if nested is not None or "quant_algo" in section or method.startswith("modelopt"):
        return _modelopt(section, method, nested)
    return _other(section, method) if section else Declaration()


def declaration_of(checkpoint: Checkpoint) -> Declaration:
    """What the configuration files of a folder say."""
    return read_declaration(checkpoint.config, read_json(checkpoint, CONFIG_FILE))


def read_json(checkpoint: Checkpoint, name: str) -> dict[str, object] | None:
    """A JSON object beside the weights, strictly parsed; None if there is no such file."""
    path = checkpoint.path / name
    if not os.path.lexists(path):
        return None
    return parse_json(_read_small(checkpoint.path, name), str(path))


def _section(config: _Object) -> _Object:
    """`quantization_config`, of the file or of a wrapped model's `text_config`; else {}."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key) is not None:
                    return _object(holder[key], f"{_FLAT}: {key}")
    return {}


def _nested(document: _Object | None) -> _Object | None:
    if document is None or document.get("quantization") is None:
        return None
    return _object(document["quantization"], f"{CONFIG_FILE}: quantization") | {
        "producer": document.get("producer")
    }


# ------------------------------------------------------------------------------------- wrong types


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} must be an object, found {type(value).__name__}")
    return {str(key): entry for key, entry in value.items()}


def _optional(value: object, where: str) -> dict[str, object]:
    return {} if value is None else _object(value, where)


def _words(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        raise CheckpointError(f"{where} must be a list of strings")
    return tuple(value)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


# ------------------------------------------------------------------------------------ names, globs


class _Excluded:
    """Entries that exclude modules: a name covers itself and all below, a glob what it matches."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.names: set[str] = set()
        prefixes, globs = [], []
        for entry in entries:
            if not re.search(r"[*?\[]", entry):
                self.names.add(entry)
            elif not re.search(r"[*?\[]", entry[:-1]) and entry.endswith("*"):
                prefixes.append(entry[:-1])
            else:
                globs.append(f"(?:{translate(entry)})")
        self.prefixes = tuple(prefixes)
        self.glob = re.compile("|".join(globs)).match if globs else None

    def covers(self, module: str) -> bool:
        return (
            module.startswith(self.prefixes)
            or (bool(self.names) and _above(module, self.names) is not None)
            or (self.glob is not None and self.glob(module) is not None)
        )


def _above(module: str, names: Mapping[str, object] | set[str]) -> str | None:
    """The longest of `names` that is this module or a container of it."""
    while module not in names:
        at = module.rfind(".")
        if at < 0:
            return None
        module = module[:at]
    return module


# ---------------------------------------------------------------------------------------- ModelOpt

#: quant_algo -> scheme, weight, group size, activation.
_ALGORITHMS: dict[str, tuple[str, str, int, str]] = {
    "NVFP4": ("nvfp4-w4a4", "nvfp4", 16, "FP4"),
    "W4A16_NVFP4": ("nvfp4-w4a16", "nvfp4", 16, "BF16"),
    "NVFP4_AWQ": ("", "nvfp4", 16, "FP4"),  # has a pre_quant_scale
    "NVFP4_SVD": ("", "nvfp4", 16, "FP4"),
    "W4A8_NVFP4_FP8": ("", "nvfp4/32", 32, "FP8 static"),
    "FP8": ("fp8-static", "fp8", 0, "FP8 static"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8-dynamic", "fp8_channel", 0, "FP8 dynamic"),
    "FP8_PB_WO": ("fp8-block", "fp8_block", 0, "FP8 dynamic"),
    "FP8_BLOCK_SCALES": ("fp8-block", "fp8_block", 0, "FP8 dynamic"),
    "MXFP8": ("", "mxfp8", 32, "FP8 dynamic"),
    "MXFP4": ("mxfp4-w4a16", "mxfp4", 32, "BF16"),
    "W4A16_AWQ": ("", "int4", 128, "BF16"),
    "W4A8_AWQ": ("", "int4", 128, "FP8 static"),
}
_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, slots=True)
class _Group:
    """One of the `config_groups`: bits of the weights and of the inputs (0: not quantized)."""

    name: str
    targets: tuple[str, ...]
    weight_bits: int
    input_bits: int
    group_size: int

    @property
    def algorithm(self) -> str:
        """The quant_algo that it amounts to."""
        names = {(4, 4): "NVFP4", (4, 0): "W4A16_NVFP4", (8, 8): "FP8"}
        return names.get((self.weight_bits, self.input_bits), f"W{self.weight_bits}")


@dataclass(frozen=True, slots=True)
class _Statement:
    """What one of the two files says. `layers`: module -> (quant_algo, group size)."""

    file: str
    algorithm: str
    group_size: int
    layers: dict[str, tuple[str, int]]
    groups: tuple[_Group, ...]
    excluded: tuple[str, ...]
    kv_cache: str
    producer: str


def _modelopt(section: _Object, method: str, nested: _Object | None) -> Declaration:
    flat = _statement(_FLAT, section) if section else None
    other = _statement(CONFIG_FILE, nested) if nested is not None else None
    said = [s for s in (flat, other) if s is not None]
    algorithm = next((s.algorithm for s in said if s.algorithm), "")
    excludes = next((s for s in said if s.excluded), said[0])
    disagreements = _between(flat, other) if flat and other else []
    disagreements += [line for s in said for line in _against_groups(s)]
    excluded = _Excluded(excludes.excluded)
    if algorithm == _MIXED:
        layers = next((s.layers for s in said if s.layers), None) or _layers_of_groups(said[0])
        disagreements += _listed_and_excluded(layers, excludes, excluded)
        # DeepSeek: what is not listed is in the block FP8 of the original, `ignore` or not.
        rule = _per_layer(layers, excluded, _fp8_rule(section) if method == "fp8" else None)
    else:
        size = next((s.group_size for s in said if s.group_size), 0)
        rule = _per_class(_algorithm(algorithm, size), excluded)
    last = said[-1]
    return Declaration("modelopt", last.producer, last.kv_cache, tuple(disagreements), rule)


def _layers_of_groups(said: _Statement) -> dict[str, tuple[str, int]]:
    return {t: (group.algorithm, group.group_size) for group in said.groups for t in group.targets}


def _statement(file: str, said: _Object) -> _Statement:
    layers: dict[str, tuple[str, int]] = {}
    for name, entry in _optional(said.get("quantized_layers"), f"{file}: quantized_layers").items():
        listed = _object(entry, f"{file}: quantized_layers: {name!r}")
        layers[name] = (str(listed.get("quant_algo") or ""), _number(listed.get("group_size")))
    groups = _groups(file, said)
    return _Statement(
        file,
        str(said.get("quant_algo") or ""),
        _number(said.get("group_size")) or max((g.group_size for g in groups), default=0),
        layers,
        groups,
        _words(said.get("ignore"), f"{file}: ignore")
        or _words(said.get("exclude_modules"), f"{file}: exclude_modules"),
        _kv_cache(said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo")),
        _producer(said.get("producer")),
    )


def _groups(file: str, said: _Object) -> tuple[_Group, ...]:
    out = []
    for name, entry in _optional(said.get("config_groups"), f"{file}: config_groups").items():
        where = f"{file}: config_groups.{name}"
        group = _object(entry, where)
        weights = _optional(group.get("weights"), f"{where}.weights")
        inputs = _optional(group.get("input_activations"), f"{where}.input_activations")
        targets = _words(group.get("targets"), f"{where}.targets")
        bits = (_number(weights.get("num_bits")), _number(inputs.get("num_bits")))
        out.append(_Group(name, targets, *bits, _number(weights.get("group_size"))))
    return tuple(out)


def _producer(value: object) -> str:
    if not isinstance(value, Mapping):
        return ""
    return " ".join(str(value[key]) for key in ("name", "version") if value.get(key))


def _kv_cache(value: object) -> str:
    """One word for both spellings: "FP8" and {"num_bits": 8, "type": "float"} are "fp8"."""
    if isinstance(value, Mapping):
        kind = "fp" if value.get("type", "float") == "float" else "int"
        return f"{kind}{_number(value.get('num_bits')) or 8}"
    return str(value or "").lower()


def _algorithm(spelling: str, group_size: int) -> Declared | None:
    if not spelling or spelling.upper() == "NONE":
        return None
    scheme, weight, usual, activation = _ALGORITHMS.get(spelling.upper(), ("", "", 0, ""))
    return Declared(spelling, scheme, weight, group_size or usual, activation)


def _per_layer(
    layers: Mapping[str, tuple[str, int]], excluded: _Excluded, base: _Rule | None
) -> _Rule:
    """A listed container covers what is below it, but for what an exclusion names there."""
    known = {entry: _algorithm(*entry) for entry in set(layers.values())}
    of_name = {name: known[entry] for name, entry in layers.items()}

    def rule(module: str) -> Declared | None:
        listed = _above(module, of_name)
        if listed is None:
            return base(module) if base else None
        if listed != module and excluded.covers(module) and not excluded.covers(listed):
            return None
        return of_name[listed]

    return rule


def _per_class(declared: Declared | None, excluded: _Excluded) -> _Rule:
    by_class = declared and replace(declared, by_class=True)
    return lambda module: None if excluded.covers(module) else by_class


# --------------------------------------------------------------------------- where they disagree


def _between(flat: _Statement, nested: _Statement) -> list[str]:
    """A sentence for everything that the two files say differently."""
    found = []
    for what, here, there, counts in (
        ("producer", flat.producer, nested.producer, ""),
        ("quant_algo", flat.algorithm, nested.algorithm, _FLAT if flat.algorithm else CONFIG_FILE),
        ("KV cache", flat.kv_cache, nested.kv_cache, CONFIG_FILE),
    ):
        if here != there:
            line = f"{what}: {_FLAT} says {here or 'nothing'}, {CONFIG_FILE} says "
            found.append(f"{line}{there or 'nothing'}" + (f"; {counts} counts" if counts else ""))
    if flat.layers and nested.layers and flat.layers != nested.layers:
        both = flat.layers | nested.layers
        names = [n for n in both if flat.layers.get(n) != nested.layers.get(n)]
        says = [_spell(s.layers.get(names[0])) for s in (flat, nested)]
        found.append(
            f"quantized_layers: {len(names)} entries differ, {names[0]!r} for one: {_FLAT} says "
            f"{says[0]}, {CONFIG_FILE} says {says[1]}; {_FLAT} counts"
        )
    mine, theirs = set(flat.excluded), set(nested.excluded)
    if mine != theirs:
        found.append(
            f"excluded modules: {len(mine - theirs)} entries only in {_FLAT}, "
            f"{len(theirs - mine)} only in {CONFIG_FILE}, {min(mine ^ theirs)!r} for one; "
            f"{_FLAT if mine else CONFIG_FILE} counts"
        )
    return found


def _spell(entry: tuple[str, int] | None) -> str:
    if entry is None:
        return "nothing"
    return f"{entry[0]} group {entry[1]}" if entry[1] else entry[0]


def _against_groups(said: _Statement) -> list[str]:
    """Where `config_groups` say something else than the layer map, or than a uniform algorithm."""
    found = []
    counts = "quantized_layers" if said.layers else "quant_algo"
    targets = {t for group in said.groups for t in group.targets}
    if said.layers and said.groups and targets not in ({"Linear"}, set(said.layers)):
        found.append(
            f"{said.file}: quantized_layers and the targets of config_groups name different "
            f"modules, {min(targets ^ set(said.layers))!r} for one; quantized_layers counts"
        )
    for group in said.groups:
        listed = {said.layers[t][0] for t in group.targets if t in said.layers}
        for spelling in sorted(listed or {said.algorithm}):
            if fault := _group_fault(group, spelling):
                where = f"{said.file}: config_groups.{group.name}"
                found.append(f"{where} {fault}, {counts} says {spelling}; {counts} counts")
    return found


def _group_fault(group: _Group, spelling: str) -> str:
    known = _ALGORITHMS.get(spelling.upper())
    if known is None:
        return ""
    _, weight, _, activation = known
    bits = 8 if weight.startswith(("fp8", "mxfp8")) else 4
    if group.weight_bits and group.weight_bits != bits:
        return f"has {group.weight_bits}-bit weights"
    if group.input_bits and activation == "BF16":
        return f"gives {_count(group)} {group.input_bits}-bit input activations"
    if not group.input_bits and activation in ("FP4", "FP8 static"):
        return f"gives {_count(group)} no input activations"
    return ""


def _count(group: _Group) -> str:
    return f"its {len(group.targets)} targets" if "Linear" not in group.targets else "all targets"


def _listed_and_excluded(layers: Iterable[str], said: _Statement, excluded: _Excluded) -> list[str]:
    both = [name for name in layers if excluded.covers(name)]
    if not both:
        return []
    entry = next(e for e in said.excluded if _Excluded([e]).covers(both[0]))
    return [
        f"{said.file}: {len(both)} modules are listed in quantized_layers and excluded too, "
        f"{both[0]!r} by {entry!r} for one; quantized_layers counts"
    ]


# ------------------------------------------------------------------------------ compressed-tensors


class _Targets:
    """Entries of `targets` or `ignore`: exact paths, `re:` from the path's start, `Linear`."""

    def __init__(self, entries: Iterable[str], where: str) -> None:
        self.names: set[str] = set()
        self.patterns = []
        for entry in entries:
            if not entry.startswith("re:"):
                self.names.add(entry)
                continue
            try:
                self.patterns.append(re.compile(entry[3:]).match)
            except re.error as error:
                fault = f"{entry!r} is no regular expression: {error}"
                raise CheckpointError(f"{where}: {fault}") from error
        self.has_linear = "Linear" in self.names

    def names_module(self, module: str) -> bool:
        return module in self.names or any(match(module) for match in self.patterns)


def _compressed_tensors(section: _Object) -> Declaration:
    ignored = _Targets(_words(section.get("ignore"), f"{_FLAT}: ignore"), f"{_FLAT}: ignore")
    groups: list[tuple[_Targets, Declared, Declared]] = []
    usual = str(section.get("format") or "")
    for name, entry in _optional(section.get("config_groups"), f"{_FLAT}: config_groups").items():
        where = f"{_FLAT}: config_groups.{name}"
        group = _object(entry, where)
        targets = _words(group.get("targets"), f"{where}.targets")
        declared = _scheme(group, usual, where)
        by_class = replace(declared, by_class=True)
        groups.append((_Targets(targets, f"{where}.targets"), declared, by_class))

    def rule(module: str) -> Declared | None:
        if ignored.names_module(module):
            return None
        for targets, by_name, by_class in groups:
            if targets.names_module(module):
                return by_name
            if targets.has_linear:
                return by_class
        return None

    version = str(section.get("version") or "")
    return Declaration(
        "compressed-tensors",
        f"compressed-tensors {version}".strip(),
        _kv_cache(section.get("kv_cache_scheme")),
        (),
        rule,
    )


def _scheme(group: _Object, usual: str, where: str) -> Declared:
    """The scheme of a group. The spelling is its format, with what the format leaves open."""
    weights = _optional(group.get("weights"), f"{where}.weights")
    inputs = _optional(group.get("input_activations"), f"{where}.input_activations")
    strategy, size = str(weights.get("strategy") or ""), _number(weights.get("group_size"))
    weight = _weight(weights, strategy, size)
    activation = _activation(inputs)
    spelling = str(group.get("format") or usual) or "compressed-tensors"
    if spelling == "float-quantized":
        spelling += f" {strategy}"
    elif weight.startswith("int"):
        spelling += f" {weight}"
    scheme = next(
        (
            s.name
            for s in SCHEMES.values()
            if s.weight and s.weight.name == weight and s.activation == activation
        ),
        "",
    )
    return Declared(spelling, scheme, weight, size, activation)


def _weight(weights: _Object, strategy: str, size: int) -> str:
    bits = _number(weights.get("num_bits"))
    if weights.get("type", "int") == "int":
        return f"int{bits}" if bits else ""
    if bits == 4:
        if strategy == "tensor_group":
            return "nvfp4" if size in (0, 16) else f"nvfp4/{size}"
        return "mxfp4" if size == 32 else ""
    by_strategy = {"tensor": "fp8", "channel": "fp8_channel", "group": "mxfp8"}
    if strategy == "block":
        return "fp8_block" if weights.get("block_structure") in ([128, 128], None) else ""
    return by_strategy.get(strategy, "") if bits == 8 else ""


def _activation(inputs: _Object) -> str:
    bits = _number(inputs.get("num_bits"))
    if not bits:
        return "BF16"
    if inputs.get("type", "float") == "int":
        return f"INT{bits} {'dynamic' if inputs.get('dynamic') else 'static'}"
    if bits == 4:
        return "FP4"
    return f"FP{bits} {'dynamic' if inputs.get('dynamic') else 'static'}"


# --------------------------------------------------------------------------- fp8, and other methods


def _fp8(section: _Object) -> Declared:
    """`quant_method: fp8`, as DeepSeek and Qwen write it: in blocks, or one scale per tensor."""
    activation = "FP8 static" if section.get("activation_scheme") == "static" else "FP8 dynamic"
    block = section.get("weight_block_size")
    if block == [128, 128]:
        return Declared("fp8 128x128", "fp8-block", "fp8_block", 0, activation, by_class=True)
    if block is not None:
        return Declared(f"fp8 {block}", "", "", 0, activation, by_class=True)
    scheme = "fp8-static" if activation == "FP8 static" else ""
    return Declared("fp8", scheme, "fp8", 0, activation, by_class=True)


def _fp8_rule(section: _Object) -> _Rule:
    skipped = _words(section.get("modules_to_not_convert"), f"{_FLAT}: modules_to_not_convert")
    return _unless_named(skipped, _fp8(section))


def _other(section: _Object, method: str) -> Declaration:
    if method == "fp8":
        return Declaration(method, rule=_fp8_rule(section))
    bits = _number(section.get("bits"))
    weight = "mxfp4" if method == "mxfp4" else f"int{bits}" if bits else ""
    declared = Declared(method or "unknown", "", weight, 0, "", by_class=True)
    skipped = _words(section.get("modules_to_not_convert"), f"{_FLAT}: modules_to_not_convert")
    return Declaration(method or "unknown", rule=_unless_named(skipped, declared))


def _unless_named(names: Sequence[str], declared: Declared) -> _Rule:
    """Entries may be the end of a path, too; transformers leaves the output head alone unasked."""
    excluded = _Excluded((*names, "lm_head", "head"))
    ends = tuple(f".{name}" for name in (*names, "lm_head"))
    return lambda module: None if excluded.covers(module) or module.endswith(ends) else declared
