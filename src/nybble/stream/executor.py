"""The executor: embed all windows, then layer after layer, each loaded, run and dropped.

A model larger than memory goes through as fast as its file can be read. Who measures is an argument
(`Mode.observer`). `run` goes through the whole model; `begin` and `step` let somebody else decide
which layer the windows go through next, and whether what comes out is kept. Progress counts tokens
times layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nybble.errors import EngineError, TextError
from nybble.kernels.dispatch import choose
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import (
    Batch,
    Cache,
    PagePool,
    StatePool,
    make_batch,
)
from nybble.models.threads import torch_alone
from nybble.progress import Progress
from nybble.stream.memory import StreamPlan, plan_stream
from nybble.stream.spill import HiddenStates, InMemory, OnDisk, offsets, remove_spill


class AnyLayer(Protocol):
    """What a step sends windows through: a layer, or one that stands in for it."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def __call__(self, x: Tensor, batch: Batch, cache: Cache, mode: Mode) -> Tensor:
        """As models.layer.Layer."""
        ...


class Stream:
    """The final hidden states of windows of tokens, computed layer by layer.

    `windows` are int64 [length] each; those whose numbers are in `breaks` begin a batch, so that a
    batch never holds windows from both sides. Everything is decided and its memory known (`plan`)
    before `run` or `begin` reads a weight.
    """

    def __init__(
        self,
        model: Model,
        windows: Sequence[Tensor],
        mode: Mode,
        *,
        spill: Path | None = None,
        limit_bytes: int | None = None,
        progress: Progress | None = None,
        page_dtype: str = "bf16",
        title: str = "forward",
        breaks: Collection[int] = (),
        identity: str = "",
    ) -> None:
        """`identity` replaces what this class compares before it goes on with a spill, where its
        owner knows better what must be equal.

        Raises TextError for no windows or an empty one, DoesNotFit by the plan.
        """
        if not windows or any(len(w) == 0 for w in windows):
            raise TextError("there is no text to run the model on: a window without tokens")
        self.model, self.mode = model, mode
        self.windows = list(windows)
        self.lengths = [len(w) for w in windows]
        self.starts = offsets(self.lengths)
        self.page_dtype, self.identity = page_dtype, identity
        self.progress = progress or Progress()
        self.spill, self.title = spill, title
        self.plan: StreamPlan = plan_stream(
            model.network,
            self.lengths,
            spills=spill is not None,
            limit_bytes=limit_bytes,
            breaks=breaks,
        )
        self.hidden: HiddenStates | None = None

    def run(self) -> None:
        """Compute. Where `spill` holds an interrupted run of the same, it is continued."""
        layers = self.model.network.dims.layers
        done = self.begin()
        self.progress.stage(self.title, self.plan.tokens * layers, unit="token layers")
        self.progress.advance(self.plan.tokens * done)
        for number in range(done, layers):
            self.step(number, self.model.weights.layer(number))
            self.model.weights.drop_layer(number)

    def begin(self) -> int:
        """Embed all windows, or find what an interrupted run of the same left in `spill`; returns
        the layers that are complete. Raises CheckpointError for a spill of another run."""
        hidden = self._opened()
        if hidden.done < 0:
            for i, window in enumerate(self.windows):
                hidden.write(self.starts[i], self.model.embed(window, self.mode))
            hidden.complete(0)
        return hidden.done

    def step(
        self,
        number: int,
        layer: AnyLayer,
        mode: Mode | None = None,
        *,
        keeps: bool = True,
        before: Callable[[Sequence[int], Tensor], None] | None = None,
    ) -> None:
        """Send all windows through layer `number`, which is the next one.

        `layer` may be another one than the file's: made while other weights are held. `mode` is
        this step's, else the stream's. Without `keeps` only an observer learns of what comes out,
        and the step may be repeated. `before` is told the windows of each batch
        and their hidden states ahead of it.
        Raises EngineError, naming layer and tensor, for NaN.
        """
        hidden = self.hidden
        assert hidden is not None, "begin comes first"
        assert hidden.done == number, "layers come in their order"
        mode = mode or self.mode
        cache = self._cache(number)
        with torch_alone():
            for windows, batch in zip(self.plan.batches, self._batches, strict=True):
                start, stop = self.starts[windows[0]], self.starts[windows[-1] + 1]
                rows = hidden.read(start, stop)
                if before is not None:
                    before(windows, rows)
                try:
                    found = layer(rows, batch, cache, mode)
                except EngineError as error:
                    raise self.model.explained(number, error) from error
                if keeps:
                    hidden.write(start, found)
                self.progress.advance(stop - start, layer.name)
        if keeps:
            hidden.complete(number + 1)

    def rewind(self, layer: int) -> bool:
        """Go back to the inputs of `layer` where they are still there (0: they always are, made
        anew); False, and nothing changed, where they are not."""
        hidden = self.hidden
        assert hidden is not None
        if hidden.rewind(layer):
            return True
        if layer != 0:
            return False
        hidden.rewind(-1)
        self.begin()
        return True

    def normed(self) -> Iterator[tuple[int, Tensor]]:
        """Window number and what the head reads of it, float32 [length, H], window by window."""
        assert self.hidden is not None
        for i in range(len(self.windows)):
            rows = self.hidden.read(self.starts[i], self.starts[i + 1])
            yield i, self.model.normed(rows, self.mode)

    def discard(self) -> None:
        """Give up what an interrupted run may have left in the spill, whatever it is from."""
        self.close()
        if self.spill is not None:
            remove_spill(self.spill)

    def close(self) -> None:
        """Give the hidden states up, those on disk too."""
        if isinstance(self.hidden, OnDisk):
            self.hidden.remove()
        self.hidden = None

    def _opened(self) -> HiddenStates:
        if self.hidden is None:
            width = self.model.network.dims.hidden
            self.hidden = (
                OnDisk(self.spill, self.plan.tokens, width, self.identity or self._identity())
                if self.spill is not None
                else InMemory(self.plan.tokens, width)
            )
        return self.hidden

    @cached_property
    def _batches(self) -> list[Batch]:
        """The same for every layer: windows begin afresh, each with its own page and slot."""
        found = []
        for windows in self.plan.batches:
            states = [SequenceState(pages=[i], slots=[i]) for i in range(len(windows))]
            tokens = [self.windows[i] for i in windows]
            found.append(make_batch(self.model.network, tokens, states))
        return found

    def _cache(self, number: int) -> Cache:
        """One page or slot a window of a batch; sequences start afresh, so nothing is cleared."""
        network = self.model.network
        widest = max(len(b) for b in self.plan.batches)
        if network.is_linear(number):
            return StatePool(network, [number], widest).layers[number]
        pages = PagePool(network, [number], widest, max(self.lengths), self.page_dtype)
        return pages.layers[number]

    def _identity(self) -> str:
        """What must be equal for hidden states on disk to be gone on with."""
        digest = hashlib.sha256(self.model.weights.checkpoint.fingerprint().encode())
        digest.update(torch.cat(self.windows).numpy().tobytes())
        digest.update(repr((self.lengths, self.mode.compute.precision)).encode())
        digest.update(repr((self.mode.simulate, self.page_dtype, str(choose()))).encode())
        return digest.hexdigest()[:16]
