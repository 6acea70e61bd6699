"""Rounded activations, against the number formats' own definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.errors import ModelError
from nybble.formats.block import FP8_CHANNEL, NVFP4
from nybble.formats.element import E2M1, E4M3, decode, encode
from nybble.formats.scheme import FP8_BLOCK_DYNAMIC, FP8_DYNAMIC, FP8_STATIC, NVFP4_W4A4
from nybble.models.simulate import fake_quantize


def values(rows: int = 5, columns: int = 96) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns)) * 2.0 ** rng.uniform(-6, 6, (rows, 1))
    x[1, 16:32] = 0
    x[-1, :16] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2  # ties, at a scale of 1
    return x.astype(np.float32)


def nearest(x: np.ndarray, element: object) -> np.ndarray:
    return decode(encode(x.astype(np.float32), element), element)  # type: ignore[arg-type]


def test_static_fp8_saturates_at_its_scale() -> None:
    x, scale = values(), 0.003
    expected = nearest(np.clip(x / np.float32(scale), -448, 448), E4M3) * np.float32(scale)
    found = fake_quantize(torch.from_numpy(x), FP8_STATIC.input, scale, "m")  # type: ignore[arg-type]
    assert np.array_equal(found.numpy(), expected)
    assert np.abs(found.numpy()).max() == np.float32(448) * np.float32(scale)


def test_dynamic_fp8_has_a_scale_a_token() -> None:
    x = values()
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    found = fake_quantize(torch.from_numpy(x), FP8_DYNAMIC.input, None, "m")  # type: ignore[arg-type]
    assert np.array_equal(found.numpy(), nearest(x / scale, E4M3) * scale)


def test_block_fp8_has_a_scale_for_128_elements() -> None:
    x = np.concatenate([values(4, 128), 100 * values(4, 128)], -1)
    found = fake_quantize(torch.from_numpy(x), FP8_BLOCK_DYNAMIC.input, None, "m")  # type: ignore[arg-type]
    for part in (slice(0, 128), slice(128, 256)):
        scale = np.abs(x[:, part]).max(-1, keepdims=True) / np.float32(448)
        assert np.array_equal(found.numpy()[:, part], nearest(x[:, part] / scale, E4M3) * scale)


@pytest.mark.parametrize("scale", [2.0**-9, 0.0037])
def test_nvfp4_makes_block_scales_under_the_stored_one(scale: float) -> None:
    x = values()
    blocks = x.reshape(5, 6, 16)
    tensor_scale = np.float32(scale)
    raw = np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / tensor_scale
    block_scale = nearest(np.minimum(raw, 448), E4M3) * tensor_scale
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = nearest(np.nan_to_num(np.clip(blocks / block_scale, -6, 6)), E2M1)
    expected = np.where(block_scale > 0, codes * block_scale, 0).reshape(x.shape)
    found = fake_quantize(torch.from_numpy(x), NVFP4_W4A4.input, scale, "m")  # type: ignore[arg-type]
    assert np.array_equal(found.numpy(), expected.astype(np.float32))


def test_rows_may_have_scales_of_their_own() -> None:
    x = torch.from_numpy(values())
    scales = torch.tensor([0.001, 0.002, 0.004, 0.003, 0.01])
    for activation in (FP8_STATIC.input, NVFP4_W4A4.input):
        assert activation is not None
        together = fake_quantize(x, activation, scales, "m")
        for i in range(5):
            alone = fake_quantize(x[i : i + 1], activation, float(scales[i]), "m")
            assert torch.equal(together[i : i + 1], alone)


def test_nan_stays() -> None:
    x = torch.from_numpy(values())
    x[3, 40] = torch.nan
    for scheme in (FP8_STATIC, FP8_DYNAMIC, NVFP4_W4A4):
        assert scheme.input is not None
        assert fake_quantize(x, scheme.input, 0.01, "m")[3, 40].isnan()


def test_a_missing_scale_and_ragged_blocks_are_refused() -> None:
    x = torch.from_numpy(values(2, 40))
    with pytest.raises(ModelError, match=r"layers\.0\.q_proj.*input_scale"):
        fake_quantize(x, FP8_STATIC.input, None, "layers.0.q_proj")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="blocks of 16"):
        fake_quantize(x[:, :24], NVFP4_W4A4.input, 0.01, "m")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="blocks of 128"):
        fake_quantize(x, FP8_BLOCK_DYNAMIC.input, None, "m")  # type: ignore[arg-type]


def test_the_formats_named_here_are_those_of_the_table() -> None:
    assert NVFP4_W4A4.weight is NVFP4
    assert FP8_DYNAMIC.weight is FP8_CHANNEL
