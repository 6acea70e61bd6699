"""Every other `quant_method`: `fp8` as DeepSeek and Qwen write it, of the rest only the name."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.checkpoint.declaration import (
    FLAT,
    Declaration,
    Declared,
    Excluded,
    Object,
    Rule,
    number,
    words,
)


def _fp8(section: Object) -> Declared:
    """In blocks, or one scale per tensor."""
    activation = "FP8 static" if section.get("activation_scheme") == "static" else "FP8 dynamic"
    block = section.get("weight_block_size")
    if block == [128, 128]:
        return Declared("fp8 128x128", "fp8-block", "fp8_block", 0, activation, by_class=True)
    if block is not None:
        return Declared(f"fp8 {block}", "", "", 0, activation, by_class=True)
    scheme = "fp8-static" if activation == "FP8 static" else ""
    return Declared("fp8", scheme, "fp8", 0, activation, by_class=True)


def fp8_rule(section: Object) -> Rule:
    """`quant_method: fp8` for all modules but those it names."""
    skipped = words(section.get("modules_to_not_convert"), f"{FLAT}: modules_to_not_convert")
    return _unless_named(skipped, _fp8(section))


def read_other(section: Object, method: str) -> Declaration:
    """One declaration for all modules but those that the section names."""
    if method == "fp8":
        return Declaration(method, rule=fp8_rule(section))
    bits = number(section.get("bits"))
    weight = "mxfp4" if method == "mxfp4" else f"int{bits}" if bits else ""
    declared = Declared(method or "unknown", "", weight, 0, "", by_class=True)
    skipped = words(section.get("modules_to_not_convert"), f"{FLAT}: modules_to_not_convert")
    return Declaration(method or "unknown", rule=_unless_named(skipped, declared))


def _unless_named(names: Sequence[str], declared: Declared) -> Rule:
    """Entries may be the end of a path, too; transformers leaves the output head alone unasked."""
    excluded = Excluded((*names, "lm_head", "head"))
    ends = tuple(f".{name}" for name in (*names, "lm_head"))
    return lambda module: None if excluded.covers(module) or module.endswith(ends) else declared
