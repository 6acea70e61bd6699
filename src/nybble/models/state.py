"""The memory of sequences: pools of pages and slots, and the batch that a forward is given.

A page holds the keys and values of `page_tokens` positions, a slot one recurrent state (gated
DeltaNet and convolution). Pools own tensors; a `SequenceState` holds numbers into them, and one
`commit` changes it. The simplest cache is one page per sequence; there is no other kind of cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.errors import ContextTooLong, EngineError
from nybble.kernels.paged_attention import Pages
from nybble.models.network import Network
from nybble.models.numbers import Numbers
from nybble.models.sequence import SequenceState

PAGE_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": torch.float8_e4m3fn}


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
        scales: Mapping[int, tuple[float, float]] | None = None,
    ) -> None:
        """`dtype` is "bf16", "f32" or "fp8"; `scales` are those of the keys and values of layers,
        for FP8 pages, 1.0 where there are none. Raises EngineError for another dtype."""
        if dtype not in PAGE_DTYPES:
            raise EngineError(f"pages of {dtype!r}; choose {', '.join(PAGE_DTYPES)}")
        dims, held = network.dims, PAGE_DTYPES[dtype]
        shape = (pages, dims.kv_heads, page_tokens, dims.head_dim)
        clipped = torch.zeros(1, dtype=torch.int64) if dtype == "fp8" else None
        given = scales if scales is not None and dtype == "fp8" else {}
        self.page_tokens = page_tokens
        self.layers: dict[int, Pages] = {
            layer: Pages(
                torch.empty(shape, dtype=held),
                torch.empty(shape, dtype=held),
                *given.get(layer, (1.0, 1.0)),
                clipped=clipped,
            )
            for layer in layers
        }
        self.numbers = Numbers(pages, f"pages of {page_tokens} tokens")
        self._clipped = clipped

    @property
    def nbytes(self) -> int:
        """The memory of all pages."""
        return sum(p.keys.nbytes + p.values.nbytes for p in self.layers.values())

    @property
    def clipped(self) -> int:
        """How many numbers were beyond the range of FP8 since the pool was made."""
        return 0 if self._clipped is None else int(self._clipped)


class StatePool:
    """Slots of the gated DeltaNet layers of a model; with an MTP head also, in `hidden` float32
    [slots, H], the final normed hidden state of the last token of each, which the head reads next.
    """

    def __init__(
        self, network: Network, layers: Iterable[int], slots: int, *, has_mtp: bool = False
    ) -> None:
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
        self.hidden = torch.zeros((slots, d.hidden)) if has_mtp else None
        self.count = slots
        self.numbers = Numbers(slots, "recurrent states")

    @property
    def nbytes(self) -> int:
        """The memory of all slots."""
        recurrent = sum(s.conv.nbytes + s.state.nbytes for s in self.layers.values())
        return recurrent + (0 if self.hidden is None else self.hidden.nbytes)


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: the tokens of some sequences, one sequence after another.

    tokens  int64 [T]; `starts` int32 [B + 1] where each sequence begins; `lengths` int32 [B] the
    tokens each had before; `table` int32 [B, P] page numbers, -1 beyond; `slots` int32 [B] where
    the recurrent state of each is read, `writes` int32 [T] where that after a token goes, -1 for
    nowhere; `cos` and `sin` float32 [T, R / 2]. `recurrent` int32 [B]: 1 where a sequence's tokens
    go through the recurrent kernels, one by one, 0 where they go in chunks of 64.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    table: Tensor
    slots: Tensor
    writes: Tensor
    cos: Tensor
    sin: Tensor
    recurrent: Tensor


def make_batch(
    network: Network,
    tokens: Sequence[Sequence[int] | Tensor],
    states: Sequence[SequenceState],
    *,
    is_decode: bool = False,
    positions: Tensor | None = None,
) -> Batch:
    """The next tokens of each sequence, at the positions that follow what its state holds.

    The state after the last token of each goes where it was read. `positions` int64 [3, T] override
    them, for prompts with images. Raises ContextTooLong, and EngineError for tokens outside the
    vocabulary.
    """
    lengths = [s.length for s in states]
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
    pages = [s.pages for s in states]
    table = torch.full((len(states), max(map(len, pages), default=0) or 1), -1, dtype=torch.int32)
    for row, numbers in zip(table, pages, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    cos, sin = network.rope.tables(positions)
    ends = counts.cumsum(0, dtype=torch.int32)
    slots = torch.tensor([s.slots[s.slot] for s in states], dtype=torch.int32)
    writes = torch.full((len(flat),), -1, dtype=torch.int32)
    writes[ends[counts > 0] - 1] = slots[counts > 0]
    return Batch(
        flat,
        torch.cat([torch.zeros(1, dtype=torch.int32), ends]),
        torch.tensor(lengths, dtype=torch.int32),
        table,
        slots,
        writes,
        cos,
        sin,
        torch.full((len(states),), int(is_decode), dtype=torch.int32),
    )
