"""ModelOpt's dialect: flat in config.json, nested in hf_quant_config.json, often in both.

Precedence, where files disagree: `quantized_layers`, in either file; hf_quant_config.json for the
KV cache and the producer; config.json for the rest; `config_groups` last. Source: docs/layouts.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from nybble.checkpoint.declaration import (
    FLAT,
    Declaration,
    Declared,
    Excluded,
    Object,
    Rule,
    above,
    as_object,
    kv_cache_word,
    number,
    optional,
    words,
)
from nybble.checkpoint.dialects.others import fp8_rule
from nybble.checkpoint.modelopt import CONFIG_FILE

#: quant_algo -> scheme, weight, group size, activation.
SPELLINGS: dict[str, tuple[str, str, int, str]] = {
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
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, slots=True)
class Group:
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
class Statement:
    """What one of the two files says. `layers`: module -> (quant_algo, group size).

    `keys` are those that stand in it, whatever they hold.
    """

    file: str
    keys: frozenset[str]
    algorithm: str
    group_size: int
    layers: dict[str, tuple[str, int]]
    groups: tuple[Group, ...]
    excluded: tuple[str, ...]
    kv_cache: str
    producer: str


def read_modelopt(section: Object, method: str, nested: Object | None) -> Declaration:
    """What either file says, {} or None where it does not speak, and every disagreement."""
    flat, other = read_statements(section, nested)
    said = [s for s in (flat, other) if s is not None]
    algorithm = next((s.algorithm for s in said if s.algorithm), "")
    excludes = next((s for s in said if s.excluded), said[0])
    disagreements = _between(flat, other) if flat and other else []
    disagreements += [line for s in said for line in _against_groups(s)]
    excluded = Excluded(excludes.excluded)
    if algorithm == MIXED:
        layers = next((s.layers for s in said if s.layers), None) or _layers_of_groups(said[0])
        disagreements += _listed_and_excluded(layers, excludes, excluded)
        # DeepSeek: what is not listed is in the block FP8 of the original, `ignore` or not.
        rule = _per_layer(layers, excluded, fp8_rule(section) if method == "fp8" else None)
    else:
        size = next((s.group_size for s in said if s.group_size), 0)
        rule = _per_class(_algorithm(algorithm, size), excluded)
    last = said[-1]
    return Declaration("modelopt", last.producer, last.kv_cache, tuple(disagreements), rule)


def read_statements(
    section: Object, nested: Object | None
) -> tuple[Statement | None, Statement | None]:
    """What each of the two files says, None for one that does not speak. Raises CheckpointError."""
    flat = _statement(FLAT, section) if section else None
    return flat, _statement(CONFIG_FILE, nested) if nested is not None else None


def _layers_of_groups(said: Statement) -> dict[str, tuple[str, int]]:
    return {t: (group.algorithm, group.group_size) for group in said.groups for t in group.targets}


def _statement(file: str, said: Object) -> Statement:
    layers: dict[str, tuple[str, int]] = {}
    for name, entry in optional(said.get("quantized_layers"), f"{file}: quantized_layers").items():
        listed = as_object(entry, f"{file}: quantized_layers: {name!r}")
        layers[name] = (str(listed.get("quant_algo") or ""), number(listed.get("group_size")))
    groups = _groups(file, said)
    return Statement(
        file,
        frozenset(said),
        str(said.get("quant_algo") or ""),
        number(said.get("group_size")) or max((g.group_size for g in groups), default=0),
        layers,
        groups,
        words(said.get("ignore"), f"{file}: ignore")
        or words(said.get("exclude_modules"), f"{file}: exclude_modules"),
        kv_cache_word(said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo")),
        _producer(said.get("producer")),
    )


def _groups(file: str, said: Object) -> tuple[Group, ...]:
    out = []
    for name, entry in optional(said.get("config_groups"), f"{file}: config_groups").items():
        where = f"{file}: config_groups.{name}"
        group = as_object(entry, where)
        weights = optional(group.get("weights"), f"{where}.weights")
        inputs = optional(group.get("input_activations"), f"{where}.input_activations")
        targets = words(group.get("targets"), f"{where}.targets")
        bits = (number(weights.get("num_bits")), number(inputs.get("num_bits")))
        out.append(Group(name, targets, *bits, number(weights.get("group_size"))))
    return tuple(out)


def _producer(value: object) -> str:
    if not isinstance(value, Mapping):
        return ""
    return " ".join(str(value[key]) for key in ("name", "version") if value.get(key))


def _algorithm(spelling: str, group_size: int) -> Declared | None:
    if not spelling or spelling.upper() == "NONE":
        return None
    scheme, weight, usual, activation = SPELLINGS.get(spelling.upper(), ("", "", 0, ""))
    return Declared(spelling, scheme, weight, group_size or usual, activation)


def _per_layer(
    layers: Mapping[str, tuple[str, int]], excluded: Excluded, base: Rule | None
) -> Rule:
    """A listed container covers what is below it, but for what an exclusion names there."""
    known = {entry: _algorithm(*entry) for entry in set(layers.values())}
    of_name = {name: known[entry] for name, entry in layers.items()}

    def rule(module: str) -> Declared | None:
        listed = above(module, of_name)
        if listed is None:
            return base(module) if base else None
        if listed != module and excluded.covers(module) and not excluded.covers(listed):
            return None
        return of_name[listed]

    return rule


def _per_class(declared: Declared | None, excluded: Excluded) -> Rule:
    by_class = declared and replace(declared, by_class=True)
    return lambda module: None if excluded.covers(module) else by_class


# --------------------------------------------------------------------------- where they disagree


def _between(flat: Statement, nested: Statement) -> list[str]:
    """A sentence for everything that the two files say differently."""
    found = []
    for what, here, there, counts in (
        ("producer", flat.producer, nested.producer, ""),
        ("quant_algo", flat.algorithm, nested.algorithm, FLAT if flat.algorithm else CONFIG_FILE),
        ("KV cache", flat.kv_cache, nested.kv_cache, CONFIG_FILE),
    ):
        if here != there:
            line = f"{what}: {FLAT} says {here or 'nothing'}, {CONFIG_FILE} says "
            found.append(f"{line}{there or 'nothing'}" + (f"; {counts} counts" if counts else ""))
    if flat.layers and nested.layers and flat.layers != nested.layers:
        both = flat.layers | nested.layers
        names = [n for n in both if flat.layers.get(n) != nested.layers.get(n)]
        says = [_spell(s.layers.get(names[0])) for s in (flat, nested)]
        found.append(
            f"quantized_layers: {len(names)} entries differ, {names[0]!r} for one: {FLAT} says "
            f"{says[0]}, {CONFIG_FILE} says {says[1]}; {FLAT} counts"
        )
    mine, theirs = set(flat.excluded), set(nested.excluded)
    if mine != theirs:
        found.append(
            f"excluded modules: {len(mine - theirs)} entries only in {FLAT}, "
            f"{len(theirs - mine)} only in {CONFIG_FILE}, {min(mine ^ theirs)!r} for one; "
            f"{FLAT if mine else CONFIG_FILE} counts"
        )
    return found


def _spell(entry: tuple[str, int] | None) -> str:
    if entry is None:
        return "nothing"
    return f"{entry[0]} group {entry[1]}" if entry[1] else entry[0]


def _against_groups(said: Statement) -> list[str]:
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


def _group_fault(group: Group, spelling: str) -> str:
    known = SPELLINGS.get(spelling.upper())
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


def _count(group: Group) -> str:
    return f"its {len(group.targets)} targets" if "Linear" not in group.targets else "all targets"


def _listed_and_excluded(layers: Iterable[str], said: Statement, excluded: Excluded) -> list[str]:
    both = [name for name in layers if excluded.covers(name)]
    if not both:
        return []
    entry = next(e for e in said.excluded if Excluded([e]).covers(both[0]))
    return [
        f"{said.file}: {len(both)} modules are listed in quantized_layers and excluded too, "
        f"{both[0]!r} by {entry!r} for one; quantized_layers counts"
    ]
