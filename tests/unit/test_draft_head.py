"""The head that guesses is a four-bit copy where that saves reading, and close to the head."""

from __future__ import annotations

import logging
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.formats.search import quantize
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import dispatch
from nybble.kernels.block_matmul import Weight, prepare
from nybble.kernels.compute import Compute
from nybble.models import draft_head as module
from nybble.models.draft_head import SEARCH, copied_bytes, draft_head
from nybble.models.linear import Linear, Mode

needs_kernels = pytest.mark.skipif(
    dispatch.choose().backend != "cpu", reason="there are copies for compiled kernels alone"
)
V, H = 391, 96  # rows that are no whole tile


def values() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((V, H), np.float32)


def linear(weight: Weight, bias: NDArray[np.float32] | None = None) -> Linear:
    return Linear(("lm_head",), prepare([weight], [bias], name="lm_head"))


@needs_kernels
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_a_plain_head_is_copied_as_the_definition_has_it(dtype: Any) -> None:
    weight = values().astype(dtype)
    bias = np.arange(V, dtype=np.float32)
    found = draft_head(linear(weight, bias), 2, weight.nbytes)
    (copy,) = found.weight.weights
    expected = quantize(weight, NVFP4, SEARCH)
    assert isinstance(copy, BlockScaledTensor)
    assert copy.format is NVFP4
    assert np.array_equal(copy.codes, expected.codes)
    assert np.array_equal(copy.scale, expected.scale)
    assert copy.tensor_scale == expected.tensor_scale
    assert copied_bytes(found) == V * H // 2 + V * H // 16
    x, mode = torch.ones((1, H)), Mode(Compute("f32", 1))
    wanted = expected.dequantize().sum(axis=1) + bias
    np.testing.assert_allclose(found(x, mode)[0].numpy(), wanted, rtol=1e-4, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("fmt", [FP8, FP8_CHANNEL, FP8_BLOCK], ids=str)
def test_an_fp8_head_is_copied_by_tiles(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row from where it belongs, with its own scale; seven per cent is what four bits cost of
    normal numbers, and FP8 scales may stand below the best."""
    monkeypatch.setattr(module, "_TILE", 128 * H)
    rows = np.exp2(np.arange(V) // 128).astype(np.float32)[:, None]  # blocks of other sizes
    weight = quantize(values() * rows, fmt, "mse")
    (copy,) = draft_head(linear(weight), 2, 0).weight.weights
    assert isinstance(copy, BlockScaledTensor)
    exact = weight.dequantize()
    errors = np.square(copy.dequantize() - exact).sum(axis=1) / np.square(exact).sum(axis=1)
    assert errors.max() < 0.03
    assert errors.mean() < 0.015


@needs_kernels
def test_what_is_small_packed_ragged_or_damaged_is_not_copied() -> None:
    plain = values().astype(ml_dtypes.bfloat16)
    damaged = plain.copy()
    damaged[V - 1, 5] = np.nan
    endless = plain.copy()
    endless[0, 0] = np.inf
    fp8 = quantize(values(), FP8_CHANNEL, "mse")
    assert isinstance(fp8.scale, np.ndarray)
    broken = BlockScaledTensor(FP8_CHANNEL, fp8.shape, fp8.codes, fp8.scale.copy(), None)
    broken.scale[7] = np.nan
    bad_code = BlockScaledTensor(FP8_CHANNEL, fp8.shape, fp8.codes.copy(), fp8.scale, None)
    bad_code.codes[V - 1, 2] = 0x7F  # NaN
    ragged = np.ascontiguousarray(plain[:, : H - 8])
    kept: list[tuple[Weight, int]] = [
        (plain, plain.nbytes + 1),
        (fp8, fp8.codes.nbytes + 1),
        (quantize(values(), NVFP4, "absmax"), 0),
        (quantize(values(), MXFP4, "absmax"), 0),
        *((weight, 0) for weight in (ragged, damaged, endless, broken, bad_code)),
    ]
    for weight, least in kept:
        head = linear(weight)
        assert draft_head(head, 1, least) is head
        assert copied_bytes(draft_head(linear(plain), 1, 0)) > 0


def test_without_compiled_kernels_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    head = linear(values())
    assert draft_head(head, 1, 0) is head


@needs_kernels
def test_a_copy_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nybble"):
        draft_head(linear(np.zeros((8192, 2048), ml_dtypes.bfloat16)), 2)
    assert "drafting head: a four-bit copy, 9 MiB" in caplog.messages
