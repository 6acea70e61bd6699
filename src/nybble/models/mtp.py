"""The multi-token-prediction head: a full-attention layer that guesses the token after the next.

Inputs at position p: the embedding of token p + 1 and the trunk's hidden state at p after its final
norm. Its own normed output takes the place of that hidden state for further drafts.

Source: vLLM `qwen3_5_mtp.py`, llama.cpp `qwen35moe.cpp`; DeepSeek-V3 (arXiv 2412.19437), 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        self, embedded: Tensor, hidden: Tensor, batch: Batch, cache: Pages, mode: Mode
    ) -> Tensor:
        """Both float32 [T, H] -> the normed hidden state [T, H] that the trunk's head reads."""
        joined = torch.cat(
            [
                self._norm(embedded, self.embedding_norm, mode),
                self._norm(hidden, self.hidden_norm, mode),
            ],
            dim=-1,
        )
        found = self.layer(self.fc(joined, mode), batch, cache, mode)
        return self._norm(found, self.final_norm, mode)

    def _norm(self, x: Tensor, weight: Tensor, mode: Mode) -> Tensor:
        offset = self.network.architecture.norm_offset
        return rms_norm(x, weight, self.network.eps, offset=offset, compute=mode.compute)
