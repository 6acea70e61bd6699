"""What a network's tensors are: one file per `model_type`, and the table that finds it.

A family is enough to plan, quantize and check a model; it needs no network code.
"""

from __future__ import annotations

from collections.abc import Mapping

from nybble.errors import ModelError, UnreadableValue
from nybble.families import llama, qwen2, qwen3, qwen3_5, qwen3_5_moe, qwen3_moe
from nybble.families.dimensions import Dimensions, text_section
from nybble.families.family import ROLES, Claim, Claimed, Family
from nybble.families.generic import generic_family

__all__ = [
    "ALIASES",
    "FAMILIES",
    "ROLES",
    "Claim",
    "Claimed",
    "Dimensions",
    "Family",
    "find_family",
    "generic_family",
]

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        qwen3_5_moe.FAMILY,
        qwen3_5.FAMILY,
        qwen3_moe.FAMILY,
        qwen3.FAMILY,
        qwen2.FAMILY,
        llama.FAMILY,
    )
}

ALIASES: dict[str, str] = {
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_5_text": "qwen3_5",
}

# Types that look like a known one and are not: its rules would quantize them wrongly, in silence.
_REFUSED: dict[str, str] = {
    "qwen3_next": (
        "it stores in_proj_qkvz and in_proj_ba fused and interleaved by key head, "
        "where qwen3_5 has separate projections"
    ),
    "qwen4_exp": (
        "its hyper-connections, n-gram embeddings and token indexer are no part of qwen3_5"
    ),
}


def find_family(config: Mapping[str, object]) -> Family:
    """The family of a config.json, by `model_type`, of the file or of its `text_config`.

    Raises ModelError for a type that is unknown or refused, and if the two disagree.
    """
    outer, inner = config.get("model_type"), text_section(config).get("model_type")
    found = _find(outer if outer is not None else inner)
    if inner is not None and _find(inner) is not found:
        raise ModelError(
            f"config.json: model_type is {outer!r}, but text_config.model_type is {inner!r}"
        )
    return found


def _find(model_type: object) -> Family:
    if not isinstance(model_type, str):
        kind = ModelError if model_type is None else UnreadableValue
        raise kind(
            f"config.json: model_type must be a string, found {model_type!r}. {_what_can_be_done()}"
        )
    if reason := _REFUSED.get(model_type.removesuffix("_text")):
        raise ModelError(f"model_type {model_type!r} is refused: {reason}. {_what_can_be_done()}")
    family = FAMILIES.get(ALIASES.get(model_type, model_type))
    if family is None:
        raise ModelError(f"model_type {model_type!r} is not known. {_what_can_be_done()}")
    return family


def _what_can_be_done() -> str:
    return (
        f"Known: {', '.join(sorted((*FAMILIES, *ALIASES)))}. `--generic` quantizes the weight "
        "matrices by names and shapes alone; `inspect` and `diff` work on anything"
    )
