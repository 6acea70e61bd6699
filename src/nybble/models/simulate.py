"""Rounding activations as an engine's quantized matmul does, so that the served model is judged.

The plain definition, in torch: block scales of NVFP4 activations are made at run time from each
block's maximum under the stored tensor scale; static FP8 uses the stored scale and saturates;
dynamic FP8 makes one scale per token, or per 128 elements.

Source: docs/formats.md; vLLM `scaled_fp4_quant`, `scaled_fp8_quant`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.formats.element import E2M1
from nybble.formats.scheme import Activation

E4M3_MAX = 448.0
E2M1_MAX = 6.0
#: Half-way points between the magnitudes of E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6.
_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fake_quantize(
    x: Tensor, activation: Activation, scale: float | Tensor | None, module: str
) -> Tensor:
    """x float32 [M, K], rounded to `activation` and back.

    `scale` is the stored input_scale, one or one a row [M]. Raises ModelError where a scheme needs
    one and the checkpoint has none, or K does not divide into blocks.
    """
    if activation.has_input_scale and scale is None:
        raise ModelError(
            f"{module}: declared with quantized inputs that need an input_scale, and the "
            "checkpoint has none; without it the served model cannot be simulated"
        )
    if isinstance(scale, Tensor):
        scale = scale[:, None]
    if activation.element is E2M1:
        assert scale is not None
        return _nvfp4(x, scale, module)
    if activation.has_input_scale:
        assert scale is not None
        return _e4m3(x / scale) * scale
    size = x.shape[-1] if activation.granularity == "token" else int(activation.granularity)
    if x.shape[-1] % size:
        raise ModelError(f"{module}: K {x.shape[-1]} does not divide into blocks of {size}")
    blocks = x.reshape(len(x), -1, size)
    amax = blocks.abs().amax(-1, keepdim=True)
    scales = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    return (_e4m3(blocks / scales) * scales).reshape(x.shape)


def _nvfp4(x: Tensor, tensor_scale: float | Tensor, module: str) -> Tensor:
    if x.shape[-1] % 16:
        raise ModelError(f"{module}: K {x.shape[-1]} does not divide into blocks of 16")
    blocks = x.reshape(len(x), -1, 16)
    if isinstance(tensor_scale, Tensor):
        tensor_scale = tensor_scale[..., None]
    amax = blocks.abs().amax(-1, keepdim=True)
    scales = _e4m3(amax / E2M1_MAX / tensor_scale) * tensor_scale
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = _e2m1(blocks / divisors)
    return (torch.where(scales > 0, codes, torch.zeros_like(codes)) * scales).reshape(x.shape)


def _e4m3(x: Tensor) -> Tensor:
    """Round to E4M3, to nearest even, saturating; NaN stays."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def _e2m1(x: Tensor) -> Tensor:
    """Round to E2M1, ties to the even code, saturating; NaN stays."""
    magnitude = x.abs()
    code = torch.bucketize(magnitude, _MIDDLES)  # a tie goes down ...
    tie = (code < 7) & (magnitude == _MIDDLES[code.clamp(max=6)]) & (code % 2 == 1)
    code = (code + tie.to(code.dtype)).clamp(max=7)  # ... unless the code below is odd
    rounded = torch.copysign(_MAGNITUDES[code], x)
    return torch.where(torch.isnan(x), x, rounded)
