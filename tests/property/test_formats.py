"""The algebra of formats: what scaling, negating, stacking and encoding again do to bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.formats.block import FORMATS, FP8, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.formats.element import (
    E2M1,
    E2M1_VALUES,
    E4M3,
    E8M0,
    decode,
    encode,
    pack_nibbles,
    unpack_nibbles,
)
from nybble.formats.search import (
    MAX_TENSOR_SCALE,
    MIN_TENSOR_SCALE,
    SEARCHES,
    Search,
    nvfp4_scale_codes,
    quantize,
    tensor_scale,
)
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import block_quantize

sys.path.insert(0, str(Path(__file__).parents[1]))
from hard_blocks import BF16, as_source, hard_blocks

FIXED = settings(derandomize=True, deadline=None, max_examples=60)
#: Of float32 error sums in the search, both sides: see tests/unit/test_search.py.
ROUNDING = 2 * 32 * 2.0**-24
UNDERFLOW = 16 * 2.0**-126

VALID = [
    *((NVFP4, s) for s in SEARCHES),
    *((MXFP4, s) for s in SEARCHES if s != "four-six"),
    *((f, s) for f in FORMATS.values() if not f.is_packed for s in ("absmax", "mse")),
]
SCALES = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

finite_bf16 = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)
#: Raw bits of blocks of 16, the same sign or exponent being no more likely than any other.
raw_blocks = st.lists(st.lists(finite_bf16, min_size=16, max_size=16), min_size=1, max_size=4)
#: Exponents close together: the searches have something to choose.
near_bf16 = st.builds(
    lambda sign, exponent, mantissa: sign << 15 | exponent << 7 | mantissa,
    st.integers(0, 1),
    st.integers(120, 127),
    st.integers(0, 127),
)
near_blocks = st.lists(st.lists(near_bf16, min_size=16, max_size=16), min_size=1, max_size=4)
blocks = st.one_of(raw_blocks, near_blocks).map(lambda b: np.array(b, np.uint16).view(BF16))


def gaussian(*shape: int, seed: int = 0) -> NDArray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(BF16)


def through_kernel(
    x: NDArray, fmt: BlockFormat, search: Search, top: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    codes = np.empty(x.size // 2, dtype=np.uint8)
    scales = np.empty(x.size // fmt.block[1], dtype=np.uint8)
    block_quantize.quantize([x.reshape(-1)], fmt, search, top.reshape(1), [codes], [scales])
    return codes, scales


# ----------------------------------------------------------------- any bits, all scales


@FIXED
@given(blocks)
def test_no_scale_beats_the_search_on_any_bits(x: NDArray) -> None:
    wide = x.astype(np.float32)
    top = tensor_scale(np.abs(wide).max(), NVFP4, "mse")
    codes, scales = through_kernel(x, NVFP4, "mse", top)
    found = quantize(x, NVFP4, "mse")
    np.testing.assert_array_equal(found.scale.reshape(-1), scales)
    np.testing.assert_array_equal(found.codes.reshape(-1), codes)
    units = np.abs(wide.astype(np.float64)) / float(top)
    grid = SCALES.astype(np.float64)[:, None] * np.array(E2M1_VALUES)
    errors = (np.abs(units[:, None, :, None] - grid[:, None]).min(axis=-1) ** 2).sum(axis=-1)
    chosen = errors[np.arange(len(x)), scales.astype(int) - 1]
    assert (chosen <= errors.min(axis=1) * (1 + ROUNDING) + UNDERFLOW).all()


@FIXED
@given(blocks, st.sampled_from(SEARCHES))
def test_block_scales_are_always_acceptable_to_engines(x: NDArray, search: Search) -> None:
    found = quantize(x, NVFP4, search)
    assert found.scale.min() >= 0x01
    assert found.scale.max() <= 0x7E  # 0x7F is NaN, 0x80 and above have a sign
    assert np.isfinite(found.dequantize()).all()


@FIXED
@given(blocks, st.sampled_from(SEARCHES))
def test_kernels_agree_on_any_bits(x: NDArray, search: Search) -> None:
    found = quantize(x, NVFP4, search)
    codes, scales = through_kernel(x, NVFP4, search, np.asarray(found.tensor_scale))
    np.testing.assert_array_equal(found.scale.reshape(-1), scales)
    np.testing.assert_array_equal(found.codes.reshape(-1), codes)


# ----------------------------------------------------------------------- exact products


def test_every_product_of_code_and_scale_is_exact_in_bf16() -> None:
    products = np.outer(np.array(E2M1_VALUES, dtype=np.float32), SCALES)
    for exponent in (-116, -60, -14, 0, 116):
        values = (products * np.float32(2.0**exponent)).astype(np.float64)
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values.astype(BF16).astype(np.float64), values)
        exact = np.outer(E2M1_VALUES, SCALES.astype(np.float64)) * 2.0**exponent
        np.testing.assert_array_equal(values, exact)
    assert (MIN_TENSOR_SCALE, MAX_TENSOR_SCALE) == (2.0**-116, 2.0**116)


def test_a_real_tensor_scale_has_inexact_products() -> None:
    products = np.outer(np.array(E2M1_VALUES[1:], dtype=np.float32), SCALES) * np.float32(0.3)
    assert (products.astype(BF16).astype(np.float32) != products).any()


@pytest.mark.parametrize("search", ["four-six", "mse"])
def test_what_nybble_writes_is_exact_in_bf16(search: Search) -> None:
    for name, x in hard_blocks(32, 16).items():
        values = quantize(as_source(x, BF16), NVFP4, search).dequantize()
        np.testing.assert_array_equal(values.astype(BF16).astype(np.float32), values, name)


# ------------------------------------------------------------------- encoding once more


def encode_at_own_scales(tensor: BlockScaledTensor) -> NDArray[np.uint8]:
    """Codes of the decoded values under the same scales."""
    values = tensor.dequantize()
    quotient = values / np.repeat(tensor.scales(), 16, axis=-1)
    return pack_nibbles(encode(quotient, E2M1))


@pytest.mark.parametrize("search", SEARCHES)
def test_encoding_at_its_own_scales_gives_the_same_bytes(search: Search) -> None:
    for name, x in hard_blocks(32, 16).items():
        if search == "absmax" and name in ("subnormal", "tiny"):
            continue  # real tensor scales below 2^-126 lose bits of their own
        first = quantize(as_source(x, BF16), NVFP4, search)
        np.testing.assert_array_equal(encode_at_own_scales(first), first.codes, name)


@pytest.mark.parametrize("search", SEARCHES)
def test_quantizing_twice_is_not_idempotent(search: Search) -> None:
    # A subnormal scale rounds so far that the largest code is not 6: the second amax is smaller.
    first = quantize(hard_blocks(64, 16)["subnormal_scales"], NVFP4, search)
    again = quantize(first.dequantize(), NVFP4, search)
    assert (again.scale != first.scale).any()


@pytest.mark.parametrize("search", ["four-six", "mse"])
def test_conversion_to_bf16_and_back_keeps_values_under_the_same_search(search: Search) -> None:
    # The scales may move; what is decoded may not get worse than exact: error 0 is attainable.
    first = quantize(gaussian(8, 64), NVFP4, search)
    values = first.dequantize().astype(BF16)
    again = quantize(values, NVFP4, "mse", scale=first.tensor_scale)
    np.testing.assert_array_equal(again.dequantize(), first.dequantize())


# ------------------------------------------------------------------------- invariances


@FIXED
@given(near_blocks, st.integers(-60, 60), st.sampled_from(SEARCHES))
def test_powers_of_two_move_only_the_tensor_scale(
    raw: list[list[int]], k: int, search: Search
) -> None:
    x = np.array(raw, np.uint16).view(BF16).astype(np.float32)
    one, other = quantize(x, NVFP4, search), quantize(x * np.float32(2.0**k), NVFP4, search)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scale, other.scale)
    assert other.tensor_scale == one.tensor_scale * np.float32(2.0**k)


@FIXED
@given(near_blocks, st.integers(-60, 60), st.sampled_from(["absmax", "mse"]))
def test_powers_of_two_move_only_mxfp4_exponents(
    raw: list[list[int]], k: int, search: Search
) -> None:
    x = np.array(raw, np.uint16).view(BF16).astype(np.float32)
    x = np.concatenate([x, x[:, ::-1]], axis=1)
    one, other = quantize(x, MXFP4, search), quantize(x * np.float32(2.0**k), MXFP4, search)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scale.astype(int) + k, other.scale)


@pytest.mark.parametrize(("fmt", "search"), VALID, ids=str)
def test_negation_flips_signs_and_nothing_else(fmt: BlockFormat, search: Search) -> None:
    for name, x in hard_blocks(16, 32).items():
        x = as_source(x, BF16)
        one, other = quantize(x, fmt, search), quantize(-x, fmt, search)
        np.testing.assert_array_equal(one.scale, other.scale, name)
        np.testing.assert_array_equal(one.dequantize(), -other.dequantize(), name)


@pytest.mark.parametrize(("fmt", "search"), VALID, ids=str)
def test_a_stack_is_its_matrices(fmt: BlockFormat, search: Search) -> None:
    x = gaussian(2, 3, 5, 64) * np.array([1, 2, 3, 4, 5, 6], BF16).reshape(2, 3, 1, 1)
    stack = quantize(x, fmt, search)
    assert stack.shape == x.shape
    assert stack.codes.shape == fmt.codes_shape(x.shape)
    assert stack.scale.shape == fmt.scale_shape(x.shape)
    for i in range(2):
        for j in range(3):
            alone = quantize(x[i, j], fmt, search)
            np.testing.assert_array_equal(stack.codes[i, j], alone.codes)
            np.testing.assert_array_equal(stack.scale[i, j], alone.scale)
            if fmt.has_tensor_scale:
                assert stack.tensor_scale is not None
                assert stack.tensor_scale[i, j] == alone.tensor_scale
            np.testing.assert_array_equal(stack.dequantize()[i, j], alone.dequantize())


@pytest.mark.parametrize("search", SEARCHES)
def test_blocks_do_not_see_each_other(search: Search) -> None:
    x = gaussian(40, 16)
    top = np.full(40, 2.0**-13, dtype=np.float32)
    order = np.random.default_rng(4).permutation(40)
    wide = x.astype(np.float32)
    np.testing.assert_array_equal(
        nvfp4_scale_codes(wide, top, search)[order], nvfp4_scale_codes(wide[order], top, search)
    )


@pytest.mark.parametrize(("fmt", "search"), VALID, ids=str)
@pytest.mark.parametrize("n", [1, 3, 129])
@pytest.mark.parametrize("k", [32, 96, 160])
def test_odd_shapes(fmt: BlockFormat, search: Search, n: int, k: int) -> None:
    x = gaussian(n, k, seed=n * k)
    found = quantize(x, fmt, search)
    wide = x.astype(np.float64)
    error = ((found.dequantize() - wide) ** 2).sum()
    assert error < 0.03 * (wide**2).sum()  # -15 dB: a misplaced scale or nibble costs far more


@pytest.mark.parametrize("fmt", [FP8, FP8_CHANNEL], ids=str)
@pytest.mark.parametrize("k", [1, 7, 33])
def test_fp8_takes_any_k(fmt: BlockFormat, k: int) -> None:
    x = gaussian(5, k)
    found = quantize(x, fmt, "absmax").dequantize()
    # Half a step of four significant bits, and what lies below the smallest subnormal step.
    np.testing.assert_allclose(found, x.astype(np.float32), rtol=2.0**-4, atol=1e-6)


# ------------------------------------------------------------------------------- zeros


@pytest.mark.parametrize("search", SEARCHES)
def test_negative_zero_is_code_zero_and_small_negatives_keep_their_sign(search: Search) -> None:
    x = np.zeros((1, 16), dtype=BF16)
    x[0, :4] = [1.0, -0.0, -1e-3, 1e-3]
    codes = unpack_nibbles(quantize(x, NVFP4, search).codes)[0]
    assert codes[1:4].tolist() == [0, 8, 0]


@pytest.mark.parametrize(("fmt", "search"), VALID, ids=str)
def test_zeros_stay_zeros(fmt: BlockFormat, search: Search) -> None:
    x = np.zeros((2, 32), dtype=BF16)
    found = quantize(x, fmt, search)
    assert (found.codes == 0).all()
    if fmt.scale is E4M3:
        assert (decode(found.scale, E4M3) == 1).all()
    elif fmt.scale is E8M0:
        assert (decode(found.scale, E8M0) == 1).all()
    else:
        assert (found.scale == 1).all()
