"""The multi-token-prediction head: a full-attention layer that guesses the token after the next.

Its entry at position q is made of the embedding of token q and the trunk's hidden state at q - 1
after its final norm, and guesses token q + 1. Its own normed output takes the place of that hidden
state for further drafts. Entry 0 has no hidden state before it: it is made of zeros, so that pages
are whole, and nobody looks at it (`Attention.first`).

Source: vLLM `qwen3_5_mtp.py`, llama.cpp `qwen35moe.cpp`; DeepSeek-V3 (arXiv 2412.19437), 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.kernels.calls import empty
from nybble.kernels.elementwise import rms_norm
from nybble.kernels.paged_attention import Pages
from nybble.models.layer import Layer
from nybble.models.linear import Linear, Mode
from nybble.models.network import Network
from nybble.models.state import Batch


@dataclass(frozen=True, slots=True)
class MtpHead:
    """norm(layer(fc [norm(embedding); norm(hidden)])), the embedding first."""

    network: Network
    fc: Linear
    embedding_norm: Tensor
    hidden_norm: Tensor
    layer: Layer
    final_norm: Tensor

    def __call__(
        self,
        embedded: Tensor,
        hidden: Tensor,
        batch: Batch,
        cache: Pages,
        mode: Mode,
    ) -> Tensor:
        """Both float32 [T, H], of a token and of the position before it -> the normed hidden state
        [T, H] that the trunk's head reads."""
        found = self.layer(self._joined(embedded, hidden, mode), batch, cache, mode)
        return self._norm(found, self.final_norm, None, mode)

    def enter(
        self, embedded: Tensor, hidden: Tensor, batch: Batch, cache: Pages, mode: Mode
    ) -> tuple[Tensor, Tensor]:
        """Only write the keys and values: the same bits as the whole does. What `leave` reads."""
        joined = self._joined(embedded, hidden, mode)
        return joined, self.layer.enter(joined, batch, cache, mode)

    def leave(
        self, joined: Tensor, mixed: Tensor, batch: Batch, cache: Pages, mode: Mode
    ) -> Tensor:
        """What the whole returns, for some tokens that have entered: their rows of what `enter`
        returned, and a batch of theirs alone."""
        found = self.layer.leave(joined, mixed, batch, cache, mode)
        return self._norm(found, self.final_norm, None, mode)

    def _joined(self, embedded: Tensor, hidden: Tensor, mode: Mode) -> Tensor:
        """What the layer reads. The norms write the halves of one row."""
        tokens, width = embedded.shape
        joined = empty(mode.compute, (tokens, 2 * width))
        self._norm(embedded, self.embedding_norm, joined[:, :width], mode)
        self._norm(hidden, self.hidden_norm, joined[:, width:], mode)
        return self.fc(joined, mode)

    def _norm(self, x: Tensor, weight: Tensor, out: Tensor | None, mode: Mode) -> Tensor:
        offset, eps = self.network.architecture.norm_offset, self.network.eps
        return rms_norm(x, weight, eps, offset=offset, out=out, compute=mode.compute)
