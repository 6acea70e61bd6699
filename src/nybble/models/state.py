"""The state of sequences: pools of pages and slots, and the one object a sequence holds of them.

A page holds the keys and values of `page_tokens` positions, a slot one recurrent state (gated
DeltaNet and convolution). Pools own tensors; a `SequenceState` holds numbers into them, and one
`commit` changes it. The simplest cache is one page per sequence; there is no other kind of cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nybble.errors import ContextTooLong, EngineError, OutOfPages
from nybble.kernels.paged_attention import Pages
from nybble.models.network import Network

PAGE_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True, slots=True)
class DeltaStates:
    """The recurrent states of one layer, float32: `conv` [slots, K - 1, C], `state`
    [slots, value heads, key dim, value dim]."""

    conv: Tensor
    state: Tensor


Cache = Pages | DeltaStates


class PagePool:
    """Pages of the attention layers of a model: `layers` by number, -1 for the MTP layer.

    One page number stands for the same positions in every layer.
    """

    def __init__(
        self,
        network: Network,
        layers: Iterable[int],
        pages: int,
        page_tokens: int,
        dtype: str = "bf16",
    ) -> None:
        dims = network.dims
        shape = (pages, dims.kv_heads, page_tokens, dims.head_dim)
        self.page_tokens = page_tokens
        self.layers: dict[int, Pages] = {
            layer: Pages(
                torch.empty(shape, dtype=PAGE_DTYPES[dtype]),
                torch.empty(shape, dtype=PAGE_DTYPES[dtype]),
            )
            for layer in layers
        }
        self.free = list(range(pages - 1, -1, -1))
        self.taken: set[int] = set()
        self.pages = pages

    def take(self, count: int) -> list[int]:
        """Page numbers for the caller alone. Raises OutOfPages."""
        if count > len(self.free):
            raise OutOfPages(
                f"{count} pages of {self.page_tokens} tokens were asked for, {len(self.free)} of "
                f"{self.pages} are free; shorten the prompts or make the pool larger"
            )
        found = [self.free.pop() for _ in range(count)]
        self.taken.update(found)
        return found

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages. Raises EngineError for one that is free already or none of the pool's."""
        for page in pages:
            if page not in self.taken:
                raise EngineError(f"page {page} is given back and was not taken")
            self.taken.remove(page)
            self.free.append(page)


class StatePool:
    """Slots of the gated DeltaNet layers of a model."""

    def __init__(self, network: Network, layers: Iterable[int], slots: int) -> None:
        d = network.dims
        channels = 2 * d.linear_key_heads * d.linear_key_dim
        channels += d.linear_value_heads * d.linear_value_dim
        heads = (d.linear_value_heads, d.linear_key_dim, d.linear_value_dim)
        self.layers: dict[int, DeltaStates] = {
            layer: DeltaStates(
                torch.zeros((slots, d.conv_kernel - 1, channels)), torch.zeros((slots, *heads))
            )
            for layer in layers
        }
        self.free = list(range(slots - 1, -1, -1))
        self.slots = slots

    def take(self) -> int:
        """A slot for the caller alone. Raises OutOfPages."""
        if not self.free:
            raise OutOfPages(f"all {self.slots} recurrent states are in use")
        return self.free.pop()

    def give_back(self, slot: int) -> None:
        """Free a slot. Raises EngineError for one that is free already or none of the pool's."""
        if slot in self.free or not 0 <= slot < self.slots:
            raise EngineError(f"slot {slot} is given back and was not taken")
        self.free.append(slot)


@dataclass(slots=True)
class SequenceState:
    """Everything a sequence is, beside its tokens. Changed by `commit` alone.

    `pages` and `mtp_pages` are page numbers, of the trunk and of the MTP head; `slots` the
    recurrent states, one and one for each draft, of which `slots[slot]` holds the state after
    `length` tokens; `last_hidden` the final normed hidden state at the last token, float32 [H];
    `draws` counts random draws; `offset` is what images add to positions.
    """

    pages: list[int]
    slots: list[int] = field(default_factory=lambda: [0])
    mtp_pages: list[int] = field(default_factory=list)
    length: int = 0
    mtp_length: int = 0
    slot: int = 0
    last_hidden: Tensor | None = None
    drafts: list[int] = field(default_factory=list)
    grammar: object | None = None
    draws: int = 0
    offset: int = 0

    def commit(self, tokens: int, last_hidden: Tensor | None = None, slot: int = 0) -> None:
        """Take `tokens` more tokens for computed: their pages are written, their state lies in
        `slots[slot]`."""
        self.length += tokens
        self.slot = slot
        self.last_hidden = last_hidden
        self.drafts = []


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: the tokens of some sequences, one sequence after another.

    tokens  int64 [T]; `starts` int32 [B + 1] where each sequence begins; `lengths` int32 [B] the
    tokens each had before; `table` int32 [B, P] page numbers, -1 beyond; `slots` int32 [B]; `cos`
    and `sin` float32 [T, R / 2]. `is_decode`: recurrent kernels, token by token, else chunks of 64.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    table: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    is_decode: bool


def make_batch(
    network: Network,
    tokens: Sequence[Sequence[int] | Tensor],
    states: Sequence[SequenceState],
    *,
    is_decode: bool = False,
    is_mtp: bool = False,
    positions: Tensor | None = None,
) -> Batch:
    """The next tokens of each sequence, at the positions that follow what its state holds.

    `positions` int64 [3, T] override them, for prompts with images. `is_mtp`: pages and lengths of
    the MTP head. Raises ContextTooLong, and EngineError for tokens outside the vocabulary.
    """
    lengths = [s.mtp_length if is_mtp else s.length for s in states]
    for new, length in zip(tokens, lengths, strict=True):
        if length + len(new) > network.context:
            raise ContextTooLong(
                f"{length + len(new):,} tokens, but the model's context (max_position_embeddings) "
                f"is {network.context:,}; shorten the prompt"
            )
    flat = torch.cat([torch.as_tensor(t, dtype=torch.int64).reshape(-1) for t in tokens])
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < network.dims.vocab:
        raise EngineError(
            f"token ids from {int(flat.min())} to {int(flat.max())}, but the vocabulary has "
            f"{network.dims.vocab:,}; the tokenizer belongs to another model"
        )
    counts = torch.tensor([len(t) for t in tokens], dtype=torch.int32)
    if positions is None:
        positions = torch.cat(
            [
                torch.arange(n, n + len(new), dtype=torch.int64) + s.offset
                for s, new, n in zip(states, tokens, lengths, strict=True)
            ]
        )
    pages = [s.mtp_pages if is_mtp else s.pages for s in states]
    table = torch.full((len(states), max(map(len, pages), default=0) or 1), -1, dtype=torch.int32)
    for row, numbers in zip(table, pages, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    cos, sin = network.rope.tables(positions)
    return Batch(
        flat,
        torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)]),
        torch.tensor(lengths, dtype=torch.int32),
        table,
        torch.tensor([s.slots[s.slot] for s in states], dtype=torch.int32),
        cos,
        sin,
        is_decode,
    )
