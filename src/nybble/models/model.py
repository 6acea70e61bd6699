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
from nybble.kernels.elementwise import look_up, rms_norm
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

    def prepare(self) -> None:
        """Make every part now; otherwise each is made when it is first asked for."""
        for part in ("embedding", "layers", "final_norm", "head"):
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

    def normed(self, hidden: Tensor, mode: Mode) -> Tensor:
        """The final norm: what the head reads, float32 [T, H]."""
        offset = self.network.architecture.norm_offset
        return rms_norm(
            hidden, self.final_norm, self.network.eps, offset=offset, compute=mode.compute
        )

    def forward(self, batch: Batch, pages: PagePool, states: StatePool, mode: Mode) -> Tensor:
        """The final normed hidden states, float32 [T, H], of all tokens of the batch."""
        with torch_alone():
            hidden = self.embed(batch.tokens, mode)
            for i, layer in enumerate(self.layers):
                cache = states.layers[i] if self.network.is_linear(i) else pages.layers[i]
                try:
                    hidden = layer(hidden, batch, cache, mode)
                except EngineError as error:
                    raise self.explained(i, error) from error
            return self.normed(hidden, mode)

    def logits(self, normed: Tensor, mode: Mode) -> Tensor:
        """float32 [T, H] -> float32 [T, V]."""
        return self.head(normed, mode)

    def page_pool(
        self, pages: int, page_tokens: int, dtype: str = "bf16", *, has_mtp: bool = False
    ) -> PagePool:
        """Pages for all attention layers, and the MTP layer where asked for; FP8 ones with the
        scales that the checkpoint has."""
        layers = [i for i in range(self.network.dims.layers) if not self.network.is_linear(i)]
        layers += [MTP_LAYER] if has_mtp else []
        scales = {i: self.weights.kv_scales(i) for i in layers} if dtype == "fp8" else None
        return PagePool(self.network, layers, pages, page_tokens, dtype, scales)

    def state_pool(self, slots: int) -> StatePool:
        """Slots for all gated DeltaNet layers."""
        return StatePool(self.network, self._linear_layers(), slots)

    def _linear_layers(self) -> Iterable[int]:
        return [i for i in range(self.network.dims.layers) if self.network.is_linear(i)]
