"""How much memory the sequences of an engine take, and what fits a budget: pages and slots.

Arithmetic on the sizes of a model alone; the pools of `models/state.py` hold exactly these bytes.
A page holds the keys and values of `page_tokens` positions for all attention layers, a slot one
recurrent state, float32, of all gated DeltaNet layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import DoesNotFit, EngineError
from nybble.families.dimensions import LINEAR, Dimensions

#: Bytes of a number in a page.
KV_BYTES = {"f32": 4, "bf16": 2, "fp8": 1}
#: The part of the free memory that is taken unasked, in per cent.
_DEFAULT_SHARE = 60
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What an engine allocates: `total_bytes` for `pages` and `slots`; `tokens` positions fit."""

    pages: int
    slots: int
    page_bytes: int
    slot_bytes: int
    total_bytes: int
    tokens: int


def attention_layers(dims: Dimensions, *, has_mtp: bool = False) -> int:
    """How many layers have keys and values; those of the MTP head too where it runs."""
    layers = sum(kind != LINEAR for kind in dims.layer_types)
    return layers + (dims.mtp_layers if has_mtp else 0)


def page_bytes(dims: Dimensions, page_tokens: int, dtype: str, layers: int) -> int:
    """Bytes of a page of `layers` attention layers. Raises EngineError for an unknown dtype."""
    if dtype not in KV_BYTES:
        raise EngineError(f"KV cache of {dtype!r}; choose {', '.join(KV_BYTES)}")
    return 2 * layers * dims.kv_heads * page_tokens * dims.head_dim * KV_BYTES[dtype]


def slot_bytes(dims: Dimensions) -> int:
    """Bytes of a recurrent state, 0 for a model without gated DeltaNet layers: 65,863,680 for
    Qwen3.6-35B-A3B, of which the convolutions are 2,949,120."""
    values = dims.linear_value_heads * dims.linear_value_dim
    channels = 2 * dims.linear_key_heads * dims.linear_key_dim + values
    floats = max(dims.conv_kernel - 1, 0) * channels + values * dims.linear_key_dim
    return floats * _FLOAT_BYTES * dims.layer_types.count(LINEAR)


def plan_memory(
    dims: Dimensions,
    *,
    budget_bytes: int,
    max_sequences: int,
    context: int,
    page_tokens: int = 64,
    kv_dtype: str = "bf16",
    has_mtp: bool = False,
) -> EngineMemory:
    """What to allocate within a budget: at most what `max_sequences` full contexts need.

    Each sequence has a slot. Where not everything fits, and the slots of `max_sequences` are more
    than half of the budget, there are as many as half of it holds, one at least; so many sequences
    run at a time, and the rest of the budget is pages. Raises DoesNotFit where not even one
    sequence of one page fits.
    """
    for name, value in (
        ("max_sequences", max_sequences),
        ("context", context),
        ("page_tokens", page_tokens),
    ):
        if value < 1:
            raise EngineError(f"{name} must be 1 or more, found {value}")
    layers = attention_layers(dims, has_mtp=has_mtp)
    page, slot = page_bytes(dims, page_tokens, kv_dtype, layers), slot_bytes(dims)
    slots, each = max_sequences, -(-context // page_tokens)
    if slot * slots * 2 > budget_bytes and (slot + each * page) * slots > budget_bytes:
        slots = max(1, budget_bytes // (2 * slot))
    pages = slots * each
    if page * pages > budget_bytes - slot * slots:
        pages = max(0, budget_bytes - slot * slots) // page
    if not pages:
        # A page must fit beside states too, which may take half of the budget.
        enough = page + max(slot, page) if slot else page
        raise DoesNotFit(
            f"a memory budget of {budget_bytes / 2**30:.3g} GiB holds no sequence: a page of "
            f"{page_tokens} tokens takes {page:,} bytes and a recurrent state {slot:,}; raise "
            f"--memory to {(1000 * enough // 2**30 + 1) / 1000} (GiB) or more"
        )
    total = page * pages + slot * slots
    return EngineMemory(pages, slots, page, slot, total, pages * page_tokens)


def most_bytes(
    dims: Dimensions,
    *,
    max_sequences: int,
    context: int,
    page_tokens: int = 64,
    kv_dtype: str = "bf16",
    has_mtp: bool = False,
) -> int:
    """What `max_sequences` sequences of a full context take; more would never be used."""
    layers = attention_layers(dims, has_mtp=has_mtp)
    page = page_bytes(dims, page_tokens, kv_dtype, layers)
    return max_sequences * (-(-context // page_tokens) * page + slot_bytes(dims))


def default_budget(available_bytes: int, weight_bytes: int, most_bytes: int) -> int:
    """The budget where nobody said one: 60 % of what the weights leave, at most `most_bytes`.

    Weights are mapped files, whose pages count as available memory until they are read; so they are
    subtracted here. A model larger than memory still runs, slowly: then a tenth of what is
    available counts as left.
    """
    left = max(available_bytes - weight_bytes, available_bytes // 10)
    return min(most_bytes, left * _DEFAULT_SHARE // 100)
