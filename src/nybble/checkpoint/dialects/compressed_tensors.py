"""compressed-tensors' dialect: groups of modules, each with a scheme spelled out in numbers.

Source: docs/layouts.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from nybble.checkpoint.declaration import (
    FLAT,
    Declaration,
    Declared,
    Object,
    as_object,
    kv_cache_word,
    number,
    optional,
    place,
    words,
)
from nybble.checkpoint.patterns import compile_pattern
from nybble.checkpoint.safetensors import show
from nybble.errors import CheckpointError
from nybble.formats.scheme import SCHEMES


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
                self.patterns.append(compile_pattern(entry[3:]).match)
            except re.error as error:
                fault = f"{show(entry)} is no usable regular expression: {place(str(error))}"
                raise CheckpointError(f"{place(where)}: {fault}") from error
        self.has_linear = "Linear" in self.names

    def names_module(self, module: str) -> bool:
        return module in self.names or any(match(module) for match in self.patterns)


def read_compressed_tensors(section: Object) -> Declaration:
    """What the groups say; the first that names a module counts."""
    ignored = _Targets(words(section.get("ignore"), f"{FLAT}: ignore"), f"{FLAT}: ignore")
    groups: list[tuple[_Targets, Declared, Declared]] = []
    usual = str(section.get("format") or "")
    for name, entry in optional(section.get("config_groups"), f"{FLAT}: config_groups").items():
        where = f"{FLAT}: config_groups.{name}"
        group = as_object(entry, where)
        targets = words(group.get("targets"), f"{where}.targets")
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
        kv_cache_word(section.get("kv_cache_scheme")),
        (),
        rule,
    )


def _scheme(group: Object, usual: str, where: str) -> Declared:
    """The scheme of a group. The spelling is its format, with what the format leaves open."""
    weights = optional(group.get("weights"), f"{where}.weights")
    inputs = optional(group.get("input_activations"), f"{where}.input_activations")
    strategy, size = str(weights.get("strategy") or ""), number(weights.get("group_size"))
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


def _weight(weights: Object, strategy: str, size: int) -> str:
    bits = number(weights.get("num_bits"))
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


def _activation(inputs: Object) -> str:
    bits = number(inputs.get("num_bits"))
    if not bits:
        return "BF16"
    if inputs.get("type", "float") == "int":
        return f"INT{bits} {'dynamic' if inputs.get('dynamic') else 'static'}"
    if bits == 4:
        return "FP4"
    return f"FP{bits} {'dynamic' if inputs.get('dynamic') else 'static'}"
