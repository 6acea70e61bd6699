"""Softmax attention over pages: grouped queries, partial rotary, head norms and output gate where
a model has them.

Source: spec of each model in transformers 5.23; gated attention: Qwen3-Next.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.kernels import paged_attention
from nybble.kernels.elementwise import rms_norm, rotary, sigmoid_mul
from nybble.kernels.paged_attention import Pages
from nybble.models.linear import Linear, Mode
from nybble.models.network import Network
from nybble.models.state import Batch


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention mixer. `qkv` puts query (per head: query rows, then gate rows), key and value
    side by side; norms are float32 [head dim] or None."""

    network: Network
    qkv: Linear
    output: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    window: int

    def __call__(self, x: Tensor, batch: Batch, cache: Pages, mode: Mode) -> Tensor:
        """x float32 [T, H] -> float32 [T, H]; appends keys and values to the pages."""
        dims, compute = self.network.dims, mode.compute
        query, gate, key, value = self._split(self.qkv(x, mode))
        if self.query_norm is not None and self.key_norm is not None:
            offset, eps = self.network.architecture.norm_offset, self.network.eps
            query = rms_norm(query, self.query_norm, eps, offset=offset, compute=compute)
            key = rms_norm(key, self.key_norm, eps, offset=offset, compute=compute)
        rotary(query, batch.cos, batch.sin, compute)
        rotary(key, batch.cos, batch.sin, compute)
        place = (batch.table, batch.starts, batch.lengths)
        paged_attention.write(key, value, cache, *place, compute)
        mixed = paged_attention.attention(
            query, cache, *place, scale=dims.head_dim**-0.5, window=self.window, compute=compute
        )
        if gate is not None:
            mixed = sigmoid_mul(mixed, gate, compute)
        return self.output(mixed.view(len(x), -1), mode)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Query, gate, key and value, [T, heads, D] each: views of the matmul's output."""
        dims, tokens = self.network.dims, len(mixed)
        width, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
        if dims.attention_gate:
            width *= 2
        query = mixed[:, :width].view(tokens, dims.heads, -1)
        gate = query[..., dims.head_dim :] if dims.attention_gate else None
        key = mixed[:, width : width + keys].view(tokens, dims.kv_heads, -1)
        value = mixed[:, width + keys :].view(tokens, dims.kv_heads, -1)
        return query[..., : dims.head_dim], gate, key, value
