"""How much memory the sequences of an engine take, and what fits a budget: pages and slots.

Arithmetic on the sizes of a model alone; the pools of `models/state.py` hold exactly these bytes.
A page holds the keys and values of `page_tokens` positions for all attention layers, a slot one
recurrent state, float32, of all gated DeltaNet layers. Snapshots are slots too.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import DoesNotFit, EngineError
from nybble.families.dimensions import LINEAR, Dimensions

#: Bytes of a number in a page.
KV_BYTES = {"f32": 4, "bf16": 2, "fp8": 1}
#: The part of the free memory that is taken unasked, in per cent.
_DEFAULT_SHARE = 60
#: The part of a budget that snapshots get unasked, and the most that then make sense.
_CHOSEN_PART, _MOST_CHOSEN = 4, 64
#: So many sequences come before drafts.
_FEWEST_DRAFTING = 4
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What an engine allocates: `total_bytes` for `pages`, `slots` and `snapshots`.

    `tokens` positions fit; `sequences` run at once, each with `drafts` guessed tokens, for which it
    has slots of its own where `has_states`: a slot holds recurrent states, or hidden states.
    `snapshots` are more slots, of the prefix cache, `snapshot_bytes` together; `slot_bytes` are
    those of one. `has_mtp`: hidden states are kept, and keys and values of the MTP head.
    """

    pages: int
    slots: int
    page_bytes: int
    slot_bytes: int
    total_bytes: int
    tokens: int
    sequences: int
    drafts: int
    snapshots: int
    snapshot_bytes: int
    has_states: bool
    has_mtp: bool


def attention_layers(dims: Dimensions, *, has_mtp: bool = False) -> int:
    """How many layers have keys and values; those of the MTP head too where it runs."""
    layers = sum(kind != LINEAR for kind in dims.layer_types)
    return layers + (dims.mtp_layers if has_mtp else 0)


def page_bytes(dims: Dimensions, page_tokens: int, dtype: str, layers: int) -> int:
    """Bytes of a page of `layers` attention layers. Raises EngineError for an unknown dtype."""
    if dtype not in KV_BYTES:
        raise EngineError(f"KV cache of {dtype!r}; choose {', '.join(KV_BYTES)}")
    return 2 * layers * dims.kv_heads * page_tokens * dims.head_dim * KV_BYTES[dtype]


def slot_bytes(dims: Dimensions, *, has_mtp: bool = False) -> int:
    """Bytes of a recurrent state, 0 for a model without gated DeltaNet layers: 65,863,680 for
    Qwen3.6-35B-A3B, of which the convolutions are 2,949,120. With the MTP head, the last hidden
    state lies beside it: 8,192 more."""
    values = dims.linear_value_heads * dims.linear_value_dim
    channels = 2 * dims.linear_key_heads * dims.linear_key_dim + values
    floats = max(dims.conv_kernel - 1, 0) * channels + values * dims.linear_key_dim
    hidden = dims.hidden if has_mtp else 0
    return _FLOAT_BYTES * (floats * dims.layer_types.count(LINEAR) + hidden)


def plan_memory(
    dims: Dimensions,
    *,
    budget_bytes: int,
    max_sequences: int,
    context: int,
    page_tokens: int = 64,
    kv_dtype: str = "bf16",
    has_mtp: bool = False,
    drafts: int = 0,
    snapshot_bytes: int | None = 0,
    cache: bool = False,
) -> EngineMemory:
    """What to allocate within a budget: at most what `max_sequences` full contexts need, and as
    many pages again with a prefix `cache`.

    Each sequence has a slot, and where there are recurrent states one more for each of `drafts`.
    Where not everything fits, and the slots of `max_sequences` are more than half of the budget,
    there are as many sequences as half of it holds; so many run at a time, and the rest of the
    budget is pages. There are fewer drafts only where fewer than four sequences would be left, and
    nothing is planned for an MTP head whose drafts were all given up.

    `snapshot_bytes` are taken out of the budget first, in whole slots. None chooses: a quarter of
    the budget, or what nothing else needs, but 64 snapshots at most. Without recurrent states there
    are none: pages alone are the cache.

    Raises DoesNotFit where not even one sequence of one page fits, or the snapshots do not.
    """
    _refuse_below_one(max_sequences=max_sequences, context=context, page_tokens=page_tokens)
    sizes = _sizes(dims, max_sequences, context, page_tokens, kv_dtype, has_mtp, cache)
    found = _fill(sizes, budget_bytes, drafts, snapshot_bytes)
    if drafts and has_mtp and not found.drafts:
        sizes = _sizes(dims, max_sequences, context, page_tokens, kv_dtype, False, cache)
        found = _fill(sizes, budget_bytes, 0, snapshot_bytes)
    if not found.pages:
        raise _too_small(sizes, budget_bytes, found.snapshots)
    return found


def most_bytes(
    dims: Dimensions,
    *,
    max_sequences: int,
    context: int,
    page_tokens: int = 64,
    kv_dtype: str = "bf16",
    has_mtp: bool = False,
    drafts: int = 0,
    snapshot_bytes: int | None = 0,
    cache: bool = False,
) -> int:
    """What `plan_memory` takes of a budget without end; more would never be used."""
    sizes = _sizes(dims, max_sequences, context, page_tokens, kv_dtype, has_mtp, cache)
    if snapshot_bytes is None or not sizes.has_states:
        snapshots = _MOST_CHOSEN if sizes.has_states else 0
    else:
        snapshots = snapshot_bytes // sizes.slot
    return sizes.full(drafts) + snapshots * sizes.slot


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of a `page` and of a `slot`, and what is in them; how many pages a sequence of a full
    context `needs`, and `most_pages` that the cache can use for each."""

    page: int
    slot: int
    has_states: bool
    has_mtp: bool
    max_sequences: int
    page_tokens: int
    needs: int
    most_pages: int

    def slots(self, drafts: int) -> int:
        """How many slots a sequence has."""
        return 1 + drafts if self.has_states else 1

    def full(self, drafts: int) -> int:
        """What all sequences and pages take."""
        slots = self.max_sequences * self.slots(drafts)
        return slots * self.slot + self.max_sequences * self.most_pages * self.page


def _sizes(
    dims: Dimensions,
    max_sequences: int,
    context: int,
    page_tokens: int,
    kv_dtype: str,
    has_mtp: bool,
    cache: bool,
) -> _Sizes:
    needs = -(-context // page_tokens)
    return _Sizes(
        page_bytes(dims, page_tokens, kv_dtype, attention_layers(dims, has_mtp=has_mtp)),
        slot_bytes(dims, has_mtp=has_mtp),
        slot_bytes(dims, has_mtp=has_mtp) > 0,
        has_mtp,
        max_sequences,
        page_tokens,
        needs,
        needs * (2 if cache else 1),
    )


def _refuse_below_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise EngineError(f"{name} must be 1 or more, found {value}")


def _fill(
    sizes: _Sizes, budget_bytes: int, drafts: int, snapshot_bytes: int | None
) -> EngineMemory:
    """What a budget holds, with as many of `drafts` as there are sequences enough for; perhaps no
    page."""
    snapshots = _snapshots(sizes, budget_bytes, drafts, snapshot_bytes)
    left = budget_bytes - snapshots * sizes.slot
    # Without states a draft needs no memory of its own.
    for fewer in range(drafts, -1, -1) if sizes.has_states else (drafts,):
        sequences, pages = _fit(sizes, left, fewer)
        if pages >= sequences >= min(_FEWEST_DRAFTING, sizes.max_sequences):
            break
    slots = sequences * sizes.slots(fewer)
    return EngineMemory(
        pages=pages,
        slots=slots,
        page_bytes=sizes.page,
        slot_bytes=sizes.slot,
        total_bytes=sizes.page * pages + sizes.slot * (slots + snapshots),
        tokens=pages * sizes.page_tokens,
        sequences=sequences,
        drafts=fewer,
        snapshots=snapshots,
        snapshot_bytes=snapshots * sizes.slot,
        has_states=sizes.has_states,
        has_mtp=sizes.has_mtp,
    )


def _snapshots(sizes: _Sizes, budget_bytes: int, drafts: int, asked: int | None) -> int:
    """How many snapshots to have. Raises DoesNotFit for a sum that holds none."""
    slot = sizes.slot
    if not sizes.has_states:
        return 0
    if asked is None:
        spare = max(budget_bytes // _CHOSEN_PART, budget_bytes - sizes.full(drafts))
        most = budget_bytes - sizes.page - max(slot, sizes.page)
        return max(0, min(_MOST_CHOSEN, min(spare, most) // slot))
    if 0 < asked < slot:
        raise DoesNotFit(
            f"{asked:,} bytes hold no snapshot, a recurrent state takes {slot:,}; give "
            "--snapshot-memory as much or more, or 0"
        )
    return asked // slot


def _fit(sizes: _Sizes, budget_bytes: int, drafts: int) -> tuple[int, int]:
    """How many sequences and pages a budget holds; at least one sequence if none has drafts."""
    each = sizes.slots(drafts) * sizes.slot
    sequences = sizes.max_sequences
    is_short = (each + sizes.needs * sizes.page) * sequences > budget_bytes
    if each * sequences * 2 > budget_bytes and is_short:
        sequences = max(int(not drafts), budget_bytes // (2 * each))
    pages = max(0, budget_bytes - each * sequences) // sizes.page
    return sequences, min(pages, sequences * sizes.most_pages)


def _too_small(sizes: _Sizes, budget_bytes: int, snapshots: int) -> DoesNotFit:
    page, slot = sizes.page, sizes.slot
    # A page must fit beside states too, which may take half of the budget.
    enough = page + (max(slot, page) if slot else page) + snapshots * slot
    beside = f" beside {snapshots:,} snapshots" if snapshots else ""
    return DoesNotFit(
        f"a memory budget of {budget_bytes / 2**30:.3g} GiB holds no sequence{beside}: a page of "
        f"{sizes.page_tokens} tokens takes {page:,} bytes and a recurrent state {slot:,}; raise "
        f"--memory to {(1000 * enough // 2**30 + 1) / 1000} (GiB) or more"
        + (", or lower --snapshot-memory" if snapshots else "")
    )


def default_budget(available_bytes: int, weight_bytes: int, most_bytes: int) -> int:
    """The budget where nobody said one: 60 % of what the weights leave, at most `most_bytes`.

    Weights are mapped files, whose pages count as available memory until they are read; so they are
    subtracted here. A model larger than memory still runs, slowly: then a tenth of what is
    available counts as left.
    """
    left = max(available_bytes - weight_bytes, available_bytes // 10)
    return min(most_bytes, left * _DEFAULT_SHARE // 100)
