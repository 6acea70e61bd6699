"""The proof of a conversion to BF16 counts what is wrong and what was rounded, exactly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.formats.block import FORMATS, FP8, FP8_BLOCK, BlockFormat
from nybble.formats.element import F32
from nybble.formats.tensor import BlockScaledTensor
from nybble.rewrite.proof_bf16 import compare_decoded
from nybble.rewrite.proof_reading import Written

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))


def random_module(
    fmt: BlockFormat, n: int, k: int, scale: float, seed: int
) -> tuple[Written, NDArray[np.float32]]:
    """A module of random codes, and its values by the definition."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, fmt.codes_shape((n, k)), dtype=np.uint8)
    at = fmt.scale_shape((n, k))
    top = np.float32(scale)
    own: NDArray[np.generic] = rng.integers(0, 256, at, dtype=np.uint8)
    if fmt.scale is F32:
        own = rng.choice(np.array([1, 1.3, -0.7], np.float32), at) * top
    values = BlockScaledTensor(
        fmt,
        (n, k),
        codes,
        own,  # type: ignore[arg-type]
        np.asarray(top) if fmt.has_tensor_scale else None,
    ).dequantize()
    return Written(fmt, codes, own, top), values


def nearest(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    with np.errstate(over="ignore", invalid="ignore"):
        bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), bits)


def roundings(values: NDArray[np.float32]) -> tuple[int, float]:
    """How many values are no BF16 numbers, and the largest share that one of them loses."""
    back = (nearest(values).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    exact = values.astype(np.float64)
    lost = (back != exact) & ~np.isnan(exact)
    with np.errstate(invalid="ignore"):
        shares = np.abs(back[lost] - exact[lost]) / np.abs(exact[lost])
    return int(lost.sum()), float(shares.max(initial=0.0))


@each_format
@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 0.000377, -0.3, 1e-39])
def test_roundings_are_counted(fmt: BlockFormat, scale: float) -> None:
    module, values = random_module(fmt, 256, 288, scale, 0)
    stored = nearest(values)
    for first, last in ((0, 256), (128, 256), (0, 128)):
        rows = slice(first, last)
        wrong, count, largest = compare_decoded(module, stored[rows], first, last)
        assert wrong == 0
        assert count == roundings(values[rows])[0]
        assert largest == pytest.approx(roundings(values[rows])[1], rel=1e-6)


@each_format
@pytest.mark.parametrize("scale", [1.0, 0.000377])
def test_one_bit_is_seen_anywhere(fmt: BlockFormat, scale: float) -> None:
    module, values = random_module(fmt, 130, 96, scale, 1)
    stored = nearest(values)
    for place in ((0, 0), (0, 1), (64, 50), (129, 94), (129, 95)):
        spoiled = stored.copy()
        spoiled[place] ^= 1
        assert compare_decoded(module, spoiled, 0, 130)[0] == 1


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 140),
    k=st.integers(1, 140),
    fmt=st.sampled_from([f for f in FORMATS.values() if not f.is_packed]),
    seed=st.integers(0, 5),
)
def test_ragged_and_odd_shapes(n: int, k: int, fmt: BlockFormat, seed: int) -> None:
    module, values = random_module(fmt, n, k, 0.37, seed)
    stored = nearest(values)
    wrong, count, _ = compare_decoded(module, stored, 0, n)
    assert (wrong, count) == (0, roundings(values)[0])
    stored[n - 1, k - 1] ^= 1
    assert compare_decoded(module, stored, 0, n)[0] == 1


def test_a_scale_belongs_to_its_block() -> None:
    """Two blocks whose scales are exchanged are wrong in both."""
    n, k = 256, 128
    codes = np.full((n, k), 0x38, dtype=np.uint8)
    scale = np.array([[1.0], [2.0]], dtype=np.float32)
    values = np.repeat(scale, 128, axis=0) * np.ones((1, k), dtype=np.float32)
    swapped = Written(FP8_BLOCK, codes, scale[::-1].copy(), np.float32(1))
    assert compare_decoded(swapped, nearest(values), 0, n)[0] == n * k
    assert compare_decoded(swapped, nearest(values)[128:], 128, n)[0] == 128 * k


def test_infinity_and_nan_are_values() -> None:
    """A product beyond float32 is infinite on both sides; a NaN code is NaN."""
    codes = np.array([[0x7E, 0x7F, 0x00, 0x38]], dtype=np.uint8)
    module = Written(FP8, codes, np.array([3e38], dtype=np.float32), np.float32(1))
    stored = np.array([[0x7F80, 0x7FC0, 0, 0x7F62]], dtype=np.uint16)
    wrong, count, largest = compare_decoded(module, stored, 0, 1)
    assert (wrong, count) == (0, 1)
    assert 0 < largest < 2.0**-8
