"""The executor: embed all windows, then layer after layer, each loaded, run and dropped.

A model larger than memory goes through as fast as its file can be read. Who measures is an argument
(`Mode.observer`). `run` goes through the whole model; `begin` and `step` let somebody else decide
which layer the windows go through next, and whether what comes out is kept. Progress counts tokens
times layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nybble.errors import TextError
from nybble.kernels.dispatch import choose
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.stream.memory import StreamPlan, plan_stream
from nybble.stream.shards import AnyLayer, Shard, ShardForward, shards_of
from nybble.stream.spill import HiddenStates, InMemory, OnDisk, offsets, remove_spill


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
        self.shards: tuple[Shard, ...] = shards_of(
            self.windows, self.plan.batches, breaks, page_dtype
        )
        self._forwards = [ShardForward(model, shard) for shard in self.shards]
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
        self, number: int, layer: AnyLayer, mode: Mode | None = None, *, keeps: bool = True
    ) -> None:
        """Send all windows through layer `number`, which is the next one.

        `layer` may be another one than the file's: made while other weights are held. `mode` is
        this step's, else the stream's. Without `keeps` only an observer learns of what comes out,
        and the step may be repeated.
        Raises EngineError, naming layer and tensor, for NaN.
        """
        for shard in range(len(self.shards)):
            for start, rows in self.through(shard, number, layer, mode):
                if keeps:
                    self.write(start, rows)
        if keeps:
            self.complete(number)

    def through(
        self,
        shard: int,
        number: int,
        layer: AnyLayer,
        mode: Mode | None = None,
        before: Callable[[Tensor], None] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """One shard of a step, that of this number in `shards`: see ShardForward.through. Whoever
        goes through all of them, here or elsewhere, says `write` and `complete`."""
        hidden = self._before(number)
        forward = self._forwards[shard]
        for start, rows in forward.through(number, layer, mode or self.mode, hidden.read, before):
            yield start, rows
            self.progress.advance(len(rows), layer.name)

    def write(self, start: int, rows: Tensor) -> None:
        """Keep rows of hidden states, from row `start` on, behind the next layer."""
        assert self.hidden is not None
        self.hidden.write(start, rows)

    def complete(self, number: int) -> None:
        """All rows behind layer `number` are written: it is done."""
        self._before(number).complete(number + 1)

    @property
    def file(self) -> Path:
        """Where the rows that go into the next layer are, for others to read. Only of a spill."""
        assert isinstance(self.hidden, OnDisk), "hidden states are in memory"
        return self.hidden.file

    def _before(self, number: int) -> HiddenStates:
        """The hidden states, which are those that go into layer `number`."""
        hidden = self.hidden
        assert hidden is not None, "begin comes first"
        assert hidden.done == number, "layers come in their order"
        return hidden

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

    def _identity(self) -> str:
        """What must be equal for hidden states on disk to be gone on with."""
        digest = hashlib.sha256(self.model.weights.checkpoint.fingerprint().encode())
        digest.update(torch.cat(self.windows).numpy().tobytes())
        digest.update(repr((self.lengths, self.mode.compute.precision)).encode())
        digest.update(repr((self.mode.simulate, self.page_dtype, str(choose()))).encode())
        return digest.hexdigest()[:16]
