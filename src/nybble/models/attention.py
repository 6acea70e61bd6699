"""Softmax attention over pages: grouped queries, partial rotary, head norms and output gate where
a model has them.

Source: spec of each model in transformers 5.23; gated attention: Qwen3-Next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
        tokens = len(x)
        gated = 2 if dims.attention_gate else 1
        rows = [dims.heads * dims.head_dim * gated, *(2 * [dims.kv_heads * dims.head_dim])]
        query, key, value = torch.split(self.qkv(x, mode), rows, dim=-1)
        query = query.reshape(tokens, dims.heads, gated * dims.head_dim)
        gate = query[..., dims.head_dim :].contiguous() if gated == 2 else None
        query = query[..., : dims.head_dim].contiguous()
        key = key.reshape(tokens, dims.kv_heads, dims.head_dim).contiguous()
        value = value.reshape(tokens, dims.kv_heads, dims.head_dim).contiguous()
        if self.query_norm is not None and self.key_norm is not None:
            offset, eps = self.network.architecture.norm_offset, self.network.eps
            query = rms_norm(query, self.query_norm, eps, offset=offset, compute=compute)
            key = rms_norm(key, self.key_norm, eps, offset=offset, compute=compute)
        rotary(query, batch.cos, batch.sin, compute)
        rotary(key, batch.cos, batch.sin, compute)
        paged_attention.write(key, value, cache, batch.table, batch.starts, batch.lengths)
        mixed = paged_attention.attention(
            query,
            cache,
            batch.table,
            batch.starts,
            batch.lengths,
            scale=dims.head_dim**-0.5,
            window=self.window,
            compute=compute,
        )
        if gate is not None:
            mixed = sigmoid_mul(mixed, gate, compute)
        return self.output(mixed.reshape(tokens, -1), mode)
