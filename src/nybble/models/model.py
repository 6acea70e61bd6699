"""A language model of a checkpoint: embedding, layers, norm, head, and the forward through them.

Nothing is copied but vectors: opening a model costs the time to read headers. Layers are made when
asked for; an engine keeps them, a stream lets each go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EngineError
from nybble.kernels.dispatch import default_threads
from nybble.kernels.elementwise import look_up, rms_norm
from nybble.models.draft_head import copied_bytes, draft_head
from nybble.models.layer import Layer
from nybble.models.linear import Linear, Mode
from nybble.models.loader import Weights
from nybble.models.mtp import MtpHead
from nybble.models.network import Network
from nybble.models.state import Batch, PagePool, StatePool
from nybble.models.threads import torch_alone

#: The number that the MTP layer has among the layers of a page pool.
MTP_LAYER = -1


class Model:
    """The network of a checkpoint, ready to compute."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises ModelError for a model that nybble does not know or cannot compute."""
        self.weights = Weights(checkpoint)
        self.network: Network = self.weights.network

    def prepare(self, *, has_mtp: bool = False) -> None:
        """Make every part now, those that draft if asked for; else each is made at its first
        use."""
        drafting = ("mtp", "draft_head") if has_mtp else ()
        for part in ("embedding", "layers", "final_norm", "head", *drafting):
            getattr(self, part)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """All layers of the trunk."""
        return tuple(self.weights.layer(i) for i in range(self.network.dims.layers))

    @cached_property
    def mtp(self) -> MtpHead | None:
        """The MTP head, if the model has one."""
        return self.weights.mtp()

    @cached_property
    def head(self) -> Linear:
        """The output head."""
        return self.weights.head()

    @cached_property
    def draft_head(self) -> Linear:
        """The output head to guess with: a four-bit copy of a large one, see `draft_head.py`."""
        return draft_head(self.head, default_threads())

    @property
    def draft_head_bytes(self) -> int:
        """The memory of the copy, 0 while there is none."""
        made: Linear | None = self.__dict__.get("draft_head")
        return 0 if made is None or made is self.head else copied_bytes(made)

    @cached_property
    def final_norm(self) -> Tensor:
        """The norm after the last layer."""
        return self.weights.final_norm()

    @cached_property
    def embedding(self) -> NDArray[np.generic]:
        """The token embedding [V, H], a view of the file."""
        return self.weights.embedding()

    def embed(self, tokens: Tensor, mode: Mode) -> Tensor:
        """int64 [T] -> float32 [T, H]. Raises EngineError, naming the token, for NaN."""
        rows = look_up(self.embedding, tokens, mode.compute)
        if mode.compute.program is None and not math.isfinite(float(rows.sum())):
            bad = rows.isfinite().logical_not().any(-1).nonzero().reshape(-1)
            if len(bad):
                raise EngineError(
                    f"{self.weights.prefix}embed_tokens.weight: the row of token "
                    f"{int(tokens[bad[0]])} is NaN or infinite; the checkpoint is damaged"
                )
        return rows

    def explained(self, number: int, error: EngineError) -> EngineError:
        """The error of a layer, with the tensor that is to blame where one holds NaN itself."""
        name = self.weights.damaged(number)
        return EngineError(f"{error}. {name} holds NaN or infinity" if name else str(error))

    def normed(self, hidden: Tensor, mode: Mode, out: Tensor | None = None) -> Tensor:
        """The final norm: what the head reads, float32 [T, H]; written to `out` if it is given."""
        offset, eps = self.network.architecture.norm_offset, self.network.eps
        return rms_norm(hidden, self.final_norm, eps, offset=offset, out=out, compute=mode.compute)

    def forward(
        self,
        batch: Batch,
        pages: PagePool,
        states: StatePool,
        mode: Mode,
        out: Tensor | None = None,
    ) -> Tensor:
        """The final normed hidden states, float32 [T, H], of all tokens of the batch, written to
        `out` if that is given."""
        with torch_alone():
            hidden = self.embed(batch.tokens, mode)
            for i, layer in enumerate(self.layers):
                cache = states.layers[i] if self.network.is_linear(i) else pages.layers[i]
                try:
                    hidden = layer(hidden, batch, cache, mode)
                except EngineError as error:
                    raise self.explained(i, error) from error
            return self.normed(hidden, mode, out)

    def mtp_forward(
        self,
        batch: Batch,
        hidden: Tensor,
        pages: PagePool,
        mode: Mode,
    ) -> Tensor:
        """The normed hidden states, float32 [T, H], that the MTP head makes of the batch's tokens
        and the trunk's, or its own, normed hidden states at the positions before them. Its keys and
        values go to the pages beside the trunk's. Raises EngineError for a model without a head.
        """
        head = self._mtp_head()
        with torch_alone():
            embedded = self.embed(batch.tokens, mode)
            return head(embedded, hidden, batch, pages.layers[MTP_LAYER], mode)

    def mtp_enter(
        self, batch: Batch, hidden: Tensor, pages: PagePool, mode: Mode
    ) -> tuple[Tensor, Tensor]:
        """Only the keys and values of `mtp_forward`, the same bits: what later tokens need. What
        it returns, [T, H] and [T, W], `mtp_leave` makes the rest of."""
        head = self._mtp_head()
        with torch_alone():
            embedded = self.embed(batch.tokens, mode)
            return head.enter(embedded, hidden, batch, pages.layers[MTP_LAYER], mode)

    def mtp_leave(
        self, joined: Tensor, mixed: Tensor, batch: Batch, pages: PagePool, mode: Mode
    ) -> Tensor:
        """What `mtp_forward` returns, for some tokens that have entered: their rows of what
        `mtp_enter` returned, and a batch of theirs alone."""
        with torch_alone():
            cache = pages.layers[MTP_LAYER]
            return self._mtp_head().leave(joined, mixed, batch, cache, mode)

    def _mtp_head(self) -> MtpHead:
        if self.mtp is None:
            raise EngineError("the checkpoint has no MTP head to draft with; draft without one")
        return self.mtp

    def logits(self, normed: Tensor, mode: Mode) -> Tensor:
        """float32 [T, H] -> float32 [T, V]."""
        return self.head(normed, mode)

    def draft_logits(self, normed: Tensor, mode: Mode) -> Tensor:
        """The same of normed hidden states of the MTP head, by the head that guesses."""
        return self.draft_head(normed, mode)

    def page_pool(
        self, pages: int, page_tokens: int, dtype: str = "bf16", *, has_mtp: bool = False
    ) -> PagePool:
        """Pages for all attention layers, and the MTP layer where asked for; FP8 ones with the
        scales that the checkpoint has."""
        layers = [i for i in range(self.network.dims.layers) if not self.network.is_linear(i)]
        layers += [MTP_LAYER] if has_mtp else []
        scales = {i: self.weights.kv_scales(i) for i in layers} if dtype == "fp8" else None
        return PagePool(self.network, layers, pages, page_tokens, dtype, scales)

    def state_pool(self, slots: int, *, has_mtp: bool = False) -> StatePool:
        """Slots for all gated DeltaNet layers, and what the MTP head carries where asked for."""
        return StatePool(self.network, self._linear_layers(), slots, has_mtp=has_mtp)

    def _linear_layers(self) -> Iterable[int]:
        return [i for i in range(self.network.dims.layers) if self.network.is_linear(i)]
