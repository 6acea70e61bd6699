"""The executor: embed all windows, then layer after layer, each loaded, run and dropped.

A model larger than memory goes through as fast as its file can be read. Who measures is an argument
(`Mode.observer`). Progress counts tokens times layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

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
from nybble.stream.spill import HiddenStates, InMemory, OnDisk, offsets


class Stream:
    """The final hidden states of windows of tokens, computed layer by layer.

    `windows` are int64 [length] each. Everything is decided and its memory known (`plan`) before
    `run` reads a weight.
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
    ) -> None:
        """Raises TextError for no windows or an empty one, DoesNotFit by the plan."""
        if not windows or any(len(w) == 0 for w in windows):
            raise TextError("there is no text to run the model on: a window without tokens")
        self.model, self.mode = model, mode
        self.windows = list(windows)
        self.lengths = [len(w) for w in windows]
        self.starts = offsets(self.lengths)
        self.page_dtype = page_dtype
        self.progress = progress or Progress()
        self.spill, self.title = spill, title
        self.plan: StreamPlan = plan_stream(
            model.network, self.lengths, spills=spill is not None, limit_bytes=limit_bytes
        )
        self.hidden: HiddenStates | None = None

    def run(self) -> None:
        """Compute. Where `spill` holds an interrupted run of the same, it is continued."""
        width = self.model.network.dims.hidden
        hidden: HiddenStates = (
            OnDisk(self.spill, self.plan.tokens, width, self._identity())
            if self.spill is not None
            else InMemory(self.plan.tokens, width)
        )
        self.hidden = hidden
        if hidden.done < 0:
            for i, window in enumerate(self.windows):
                hidden.write(self.starts[i], self.model.embed(window, self.mode))
            hidden.complete(0)
        layers = self.model.network.dims.layers
        self.progress.stage(self.title, self.plan.tokens * layers, unit="token layers")
        self.progress.advance(self.plan.tokens * hidden.done)
        with torch_alone():
            for number in range(hidden.done, layers):
                self._layer(number, hidden)
                hidden.complete(number + 1)

    def normed(self) -> Iterator[tuple[int, Tensor]]:
        """Window number and what the head reads of it, float32 [length, H], window by window."""
        assert self.hidden is not None
        for i in range(len(self.windows)):
            rows = self.hidden.read(self.starts[i], self.starts[i + 1])
            yield i, self.model.normed(rows, self.mode)

    def close(self) -> None:
        """Give the hidden states up, those on disk too."""
        if isinstance(self.hidden, OnDisk):
            self.hidden.remove()
        self.hidden = None

    def _layer(self, number: int, hidden: HiddenStates) -> None:
        model = self.model
        layer = model.weights.layer(number)
        cache = self._cache(number)
        for windows, batch in zip(self.plan.batches, self._batches, strict=True):
            start, stop = self.starts[windows[0]], self.starts[windows[-1] + 1]
            try:
                found = layer(hidden.read(start, stop), batch, cache, self.mode)
            except EngineError as error:
                raise model.explained(number, error) from error
            hidden.write(start, found)
            self.progress.advance(stop - start, layer.name)
        model.weights.drop_layer(number)

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
