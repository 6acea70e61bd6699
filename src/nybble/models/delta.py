"""Gated DeltaNet: a linear-attention mixer with a convolution and a recurrent state.

Source: Gated Delta Networks (arXiv 2412.06464); Qwen3.5 in transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.kernels.elementwise import gated_rms_norm
from nybble.kernels.gated_delta import causal_conv, decay, gated_delta
from nybble.models.linear import Linear, Mode
from nybble.models.network import Network
from nybble.models.state import Batch, DeltaStates


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """One gated DeltaNet mixer. `qkvz` puts query, key, value and output gate side by side, `ba`
    the inputs of beta and of the decay; vectors are float32: `conv` [C, K], `a_log` and `dt_bias`
    [value heads], `norm` [value dim]."""

    network: Network
    qkvz: Linear
    ba: Linear
    output: Linear
    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor

    def __call__(self, x: Tensor, batch: Batch, cache: DeltaStates, mode: Mode) -> Tensor:
        """x float32 [T, H] -> float32 [T, H]; moves the states of the batch's slots on."""
        dims, compute = self.network.dims, mode.compute
        heads, channels = dims.linear_value_heads, len(self.conv)
        qkvz, ba = self.qkvz(x, mode), self.ba(x, mode, is_exact=True)
        g, beta = decay(ba[:, heads:], ba[:, :heads], self.a_log, self.dt_bias, compute)
        place = (batch.starts, batch.lengths, batch.slots, batch.writes)
        mixed = causal_conv(qkvz[:, :channels], self.conv, cache.conv, *place, compute)
        found = gated_delta(
            mixed,
            g,
            beta,
            cache.state,
            *place,
            key_heads=dims.linear_key_heads,
            value_heads=heads,
            key_dim=dims.linear_key_dim,
            value_dim=dims.linear_value_dim,
            recurrent=batch.recurrent,
            compute=compute,
        )
        found = gated_rms_norm(
            found,
            qkvz[:, channels:],
            self.norm,
            self.network.eps,
            activation=self.network.gate_activation,  # type: ignore[arg-type]
            compute=compute,
        )
        return self.output(found.view(len(x), -1), mode)
