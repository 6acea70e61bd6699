"""Shapes, bytes and refusals of block formats, and what a BlockScaledTensor decodes to."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.errors import FormatError
from nybble.formats.block import (
    FORMATS,
    FP8,
    FP8_BLOCK,
    FP8_CHANNEL,
    MXFP4,
    NVFP4,
    BlockFormat,
)
from nybble.formats.tensor import BlockScaledTensor, expand


@pytest.mark.parametrize(
    ("fmt", "shape", "codes", "scale", "bits"),
    [
        (NVFP4, (3, 32), (3, 16), (3, 2), 4.5 + 32 / 96),
        (NVFP4, (7, 5, 48), (7, 5, 24), (7, 5, 3), 4.5 + 32 / 240),
        (MXFP4, (3, 64), (3, 32), (3, 2), 4.25),
        (FP8, (3, 5), (3, 5), (1, 1), 8 + 32 / 15),
        (FP8, (2, 3, 5), (2, 3, 5), (2, 1, 1), 8 + 32 / 15),
        (FP8_CHANNEL, (3, 5), (3, 5), (3, 1), 8 + 32 / 5),
        (FP8_BLOCK, (130, 132), (130, 132), (2, 2), 8 + 4 * 32 / (130 * 132)),
        (FP8_BLOCK, (4, 256, 128), (4, 256, 128), (4, 2, 1), 8 + 2 * 32 / (256 * 128)),
    ],
    ids=str,
)
def test_shapes_and_sizes(
    fmt: BlockFormat,
    shape: tuple[int, ...],
    codes: tuple[int, ...],
    scale: tuple[int, ...],
    bits: float,
) -> None:
    fmt.check_shape(shape, "w")
    assert fmt.codes_shape(shape) == codes
    assert fmt.scale_shape(shape) == scale
    assert fmt.bits_per_weight(shape) == pytest.approx(bits, rel=1e-12)


def test_formats_are_found_by_name() -> None:
    assert {str(f): f for f in FORMATS.values()} == FORMATS
    assert sorted(FORMATS) == ["fp8", "fp8_block", "fp8_channel", "mxfp4", "nvfp4"]


@pytest.mark.parametrize(("fmt", "k", "multiple"), [(NVFP4, 24, 16), (MXFP4, 48, 32)], ids=str)
def test_ragged_k_is_refused_by_name_with_what_to_do(
    fmt: BlockFormat, k: int, multiple: int
) -> None:
    with pytest.raises(FormatError) as caught:
        fmt.check_shape((8, k), "model.layers.3.mlp.up_proj")
    said = str(caught.value)
    for part in ("model.layers.3.mlp.up_proj", str(multiple), str(k), "BF16", "FP8"):
        assert part in said


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (32,), (0, 32), (4, 0), (0, 4, 32)])
def test_what_is_no_matrix_is_refused(fmt: BlockFormat, shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"w: .* needs a matrix \[..., N, K\]"):
        fmt.check_shape(shape, "w")


def test_fp8_takes_any_k() -> None:
    for fmt in (FP8, FP8_CHANNEL, FP8_BLOCK):
        fmt.check_shape((3, 7), "w")


def test_scales_multiply() -> None:
    # Codes 2.0 and -0.5 (bytes 0x94), scale 1.5, tensor scale 2^-3: value = code * scale * top.
    codes = np.full((1, 8), 0x94, dtype=np.uint8)
    tensor = BlockScaledTensor(
        NVFP4, (1, 16), codes, np.array([[0x3C]], np.uint8), np.float32(0.125)
    )
    assert tensor.scales().tolist() == [[0.1875]]
    assert tensor.code_values()[0, :2].tolist() == [2.0, -0.5]
    assert tensor.dequantize()[0, :2].tolist() == [0.375, -0.09375]


def test_each_matrix_of_a_stack_has_its_tensor_scale() -> None:
    codes = np.full((3, 2, 8), 0x22, dtype=np.uint8)
    scale = np.full((3, 2, 1), 0x38, dtype=np.uint8)
    top = np.array([1.0, 2.0, 4.0], dtype=np.float32)
    values = BlockScaledTensor(NVFP4, (3, 2, 16), codes, scale, top).dequantize()
    np.testing.assert_array_equal(values, np.broadcast_to(top[:, None, None], (3, 2, 16)))


def test_mxfp4_scales_are_powers_of_two() -> None:
    scale = np.array([[0, 127, 254]], dtype=np.uint8)
    tensor = BlockScaledTensor(MXFP4, (1, 96), np.zeros((1, 48), np.uint8), scale, None)
    assert tensor.scales().tolist() == [[2.0**-127, 1.0, 2.0**127]]


def test_a_files_nan_and_overflow_show_without_a_warning() -> None:
    codes = np.full((1, 32), 0x77, dtype=np.uint8)
    scale = np.array([[255, 254]], dtype=np.uint8)
    values = BlockScaledTensor(MXFP4, (1, 64), codes, scale, None).dequantize()
    assert np.isnan(values[0, :32]).all()
    assert np.isposinf(values[0, 32:]).all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_expand_repeats_a_scale_over_its_block(fmt: BlockFormat, lead: tuple[int, ...]) -> None:
    shape = (*lead, 130, 160)
    scales = np.random.default_rng(1).random(fmt.scale_shape(shape), dtype=np.float32)
    found = expand(scales, fmt, shape)
    assert found.shape == shape
    rows, columns = (size or whole for size, whole in zip(fmt.block, shape[-2:], strict=True))
    for i, j in [(0, 0), (127, 15), (128, 16), (129, 159), (64, 128)]:
        np.testing.assert_array_equal(
            found[..., i, j], scales[..., i // rows, j // columns], err_msg=f"{i}, {j}"
        )
