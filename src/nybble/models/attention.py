"""Softmax attention over pages: grouped queries, partial rotary, head norms and output gate where
a model has them.

Source: spec of each model in transformers 5.23; gated attention: Qwen3-Next.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.kernels import paged_attention
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import rms_norm, rotary, sigmoid_mul
from nybble.kernels.paged_attention import Pages
from nybble.models.linear import Linear, Mode
from nybble.models.network import Network
from nybble.models.state import Batch


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention mixer. `qkv` puts query (per head: query rows, then gate rows), key and value
    side by side; norms are float32 [head dim] or None. Positions before `first` are seen by none
    but themselves."""

    network: Network
    qkv: Linear
    output: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    window: int
    first: int = 0

    def __call__(self, x: Tensor, batch: Batch, cache: Pages, mode: Mode) -> Tensor:
        """x float32 [T, H] -> float32 [T, H]; appends keys and values to the pages."""
        return self.attend(self.enter(x, batch, cache, mode), batch, cache, mode)

    def enter(self, x: Tensor, batch: Batch, cache: Pages, mode: Mode) -> Tensor:
        """Append keys and values of x float32 [T, H]; what `attend` makes queries of, [T, W]."""
        mixed = self.qkv(x, mode)
        _, _, key, value = self._split(mixed)
        key = self._turned(key, self.key_norm, batch, mode.compute)
        place = (batch.table, batch.starts, batch.lengths)
        paged_attention.write(key, value, cache, *place, mode.compute)
        return mixed

    def attend(self, mixed: Tensor, batch: Batch, cache: Pages, mode: Mode) -> Tensor:
        """What tokens that have entered make of the pages: some rows of what `enter` returned, and
        a batch of theirs alone -> float32 [T, H]."""
        dims, compute = self.network.dims, mode.compute
        query, gate, _, _ = self._split(mixed)
        found = paged_attention.attention(
            self._turned(query, self.query_norm, batch, compute),
            cache,
            *(batch.table, batch.starts, batch.lengths),
            scale=dims.head_dim**-0.5,
            window=self.window,
            first=self.first,
            compute=compute,
        )
        if gate is not None:
            found = sigmoid_mul(found, gate, compute)
        return self.output(found.view(len(mixed), -1), mode)

    def _turned(self, x: Tensor, norm: Tensor | None, batch: Batch, compute: Compute) -> Tensor:
        """Heads normed, where the model does that, and rotated to their positions."""
        if norm is not None:
            offset, eps = self.network.architecture.norm_offset, self.network.eps
            x = rms_norm(x, norm, eps, offset=offset, compute=compute)
        rotary(x, batch.cos, batch.sin, compute)
        return x

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
