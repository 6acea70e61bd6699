"""Shards of a stream: consecutive batches that go through a layer apart from the rest.

A shard is data: whoever has the checkpoint, the layer and the hidden states that go into it can
compute it. Which batches make a shard follows from the plan alone, never from who computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from nybble.errors import EngineError
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import Batch, Cache, PagePool, StatePool, make_batch
from nybble.models.threads import torch_alone
from nybble.stream.spill import offsets

#: Tokens of a shard, at most, where a batch has fewer. Enough that a layer's forward takes longer
#: than sending what was measured in it: a Hessian of 17,408 channels has the bytes of 17,408 tokens
#: of its input.
SHARD_TOKENS = 8192

#: Hidden states of rows [start, stop), float32.
Read = Callable[[int, int], Tensor]


class AnyLayer(Protocol):
    """What windows are sent through: a layer, or one that stands in for it."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def __call__(self, x: Tensor, batch: Batch, cache: Cache, mode: Mode) -> Tensor:
        """As models.layer.Layer."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """`windows` int64 [length] each; `batches` of their numbers, 0 the first of these windows;
    `first` the first one's number in the stream, `start` the row of hidden states it begins at."""

    windows: tuple[Tensor, ...]
    batches: tuple[tuple[int, ...], ...]
    first: int
    start: int
    page_dtype: str

    @property
    def rows(self) -> int:
        """Tokens."""
        return sum(len(w) for w in self.windows)


def shards_of(
    windows: Sequence[Tensor],
    batches: Sequence[Sequence[int]],
    breaks: Collection[int],
    page_dtype: str,
) -> tuple[Shard, ...]:
    """All batches of `windows` in their order, cut where SHARD_TOKENS are full and where a window
    of `breaks` begins."""
    groups: list[list[Sequence[int]]] = []
    filled = 0
    for batch in batches:
        tokens = sum(len(windows[i]) for i in batch)
        if not groups or filled + tokens > SHARD_TOKENS or batch[0] in breaks:
            groups.append([])
            filled = 0
        groups[-1].append(batch)
        filled += tokens
    starts = offsets([len(w) for w in windows])
    found = []
    for group in groups:
        first, last = group[0][0], group[-1][-1]
        numbers = tuple(tuple(i - first for i in batch) for batch in group)
        own = tuple(windows[first : last + 1])
        found.append(Shard(own, numbers, first, starts[first], page_dtype))
    return tuple(found)


class ShardForward:
    """A shard's way through the layers of a model. What every layer needs alike is made once."""

    def __init__(self, model: Model, shard: Shard) -> None:
        self.model, self.shard = model, shard
        self.starts = [shard.start + at for at in offsets([len(w) for w in shard.windows])]

    def through(
        self,
        number: int,
        layer: AnyLayer,
        mode: Mode,
        read: Read,
        before: Callable[[Tensor], None] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Rows of hidden states behind layer `number`, batch by batch, and where they begin.

        `before` is told the hidden states of each batch ahead of it. Raises EngineError, naming
        layer and tensor, for NaN.
        """
        cache = self._cache(number)
        for windows, batch in zip(self.shard.batches, self._batches, strict=True):
            start, stop = self.starts[windows[0]], self.starts[windows[-1] + 1]
            with torch_alone():
                rows = read(start, stop)
                if before is not None:
                    before(rows)
                try:
                    found = layer(rows, batch, cache, mode)
                except EngineError as error:
                    raise self.model.explained(number, error) from error
            yield start, found

    @cached_property
    def _batches(self) -> list[Batch]:
        """The same for every layer: windows begin afresh, each with its own page and slot."""
        found = []
        for windows in self.shard.batches:
            states = [SequenceState(pages=[i], slots=[i]) for i in range(len(windows))]
            tokens = [self.shard.windows[i] for i in windows]
            found.append(make_batch(self.model.network, tokens, states))
        return found

    def _cache(self, number: int) -> Cache:
        """One page or slot a window of a batch; sequences start afresh, so nothing is cleared."""
        network = self.model.network
        widest = max(len(b) for b in self.shard.batches)
        if network.is_linear(number):
            return StatePool(network, [number], widest).layers[number]
        longest = max(len(w) for w in self.shard.windows)
        pages = PagePool(network, [number], widest, longest, self.shard.page_dtype)
        return pages.layers[number]
