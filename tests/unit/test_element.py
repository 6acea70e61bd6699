"""Element codes against ml_dtypes, exhaustively, and the order of the two codes in a byte."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nybble.formats.element import (
    E2M1,
    E2M1_VALUES,
    E4M3,
    E5M2,
    E8M0,
    F32,
    ElementFormat,
    decode,
    encode,
    pack_nibbles,
    unpack_nibbles,
)

ML_DTYPE = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E8M0: ml_dtypes.float8_e8m0fnu,
}
SIGNED = [E2M1, E4M3, E5M2]
#: Sources of a weight have 16 bits: all finite BF16 and F16 values are every input there can be.
EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def every_source_value() -> np.ndarray:
    wide = [EVERY_16_BITS.view(t).astype(np.float32) for t in (ml_dtypes.bfloat16, np.float16)]
    both = np.concatenate(wide)
    return both[np.isfinite(both)]


def around(points: np.ndarray) -> np.ndarray:
    """Each point, and its neighbours among the float32 numbers, with both signs."""
    points = points.astype(np.float32)
    near = [np.nextafter(points, np.float32(to)) for to in (-np.inf, np.inf)]
    all_of_them = np.concatenate([points, *near])
    return np.concatenate([all_of_them, -all_of_them])


def finite_magnitudes(fmt: ElementFormat) -> np.ndarray:
    codes = np.arange(1 << (fmt.bits - 1), dtype=np.uint8)
    values = decode(codes, fmt)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("fmt", [E2M1, E4M3, E5M2, E8M0], ids=str)
def test_every_code_decodes_as_ml_dtypes(fmt: ElementFormat) -> None:
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    wanted = codes.view(ML_DTYPE[fmt]).astype(np.float32)
    found = decode(codes, fmt)
    assert found.dtype == np.float32
    is_nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan].view(np.uint32), wanted[~is_nan].view(np.uint32))


@pytest.mark.parametrize("fmt", SIGNED, ids=str)
def test_every_source_value_encodes_as_ml_dtypes(fmt: ElementFormat) -> None:
    x = every_source_value()
    saturated = np.clip(x, -fmt.max, fmt.max)
    wanted = saturated.astype(ML_DTYPE[fmt]).view(np.uint8)
    np.testing.assert_array_equal(encode(x, fmt), wanted)


@pytest.mark.parametrize("fmt", SIGNED, ids=str)
def test_ties_go_to_the_even_code(fmt: ElementFormat) -> None:
    values = finite_magnitudes(fmt)
    halfway = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    codes = encode(halfway, fmt)
    assert not (codes & 1).any()
    np.testing.assert_array_equal(encode(-halfway, fmt), codes | 1 << (fmt.bits - 1))
    x = around(halfway)
    np.testing.assert_array_equal(
        encode(x, fmt), np.clip(x, -fmt.max, fmt.max).astype(ML_DTYPE[fmt]).view(np.uint8)
    )


@pytest.mark.parametrize("fmt", SIGNED, ids=str)
def test_values_encode_to_themselves(fmt: ElementFormat) -> None:
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    values = decode(codes, fmt)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(encode(values[finite], fmt), codes[finite])


@pytest.mark.parametrize("fmt", SIGNED, ids=str)
def test_saturates_and_keeps_the_sign_of_zero(fmt: ElementFormat) -> None:
    most = np.array([fmt.max, np.nextafter(np.float32(fmt.max), np.float32(np.inf)), 3e38], "f4")
    np.testing.assert_array_equal(decode(encode(most, fmt), fmt), np.full(3, fmt.max))
    np.testing.assert_array_equal(decode(encode(-most, fmt), fmt), np.full(3, -fmt.max))
    sign = 1 << (fmt.bits - 1)
    assert encode(np.array([0.0, -0.0, 1e-45, -1e-45], "f4"), fmt).tolist() == [0, sign, 0, sign]


@pytest.mark.parametrize("fmt", [E2M1, E4M3, E5M2, E8M0], ids=str)
def test_range_is_as_stated(fmt: ElementFormat) -> None:
    magnitudes = np.abs(decode(np.arange(1 << fmt.bits, dtype=np.uint8), fmt))
    finite = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    assert (finite.min(), finite.max()) == (fmt.min, fmt.max)
    if fmt.dtype is not None:
        assert fmt.dtype.itemsize * 8 == fmt.bits


def test_e2m1_is_the_table_everybody_uses() -> None:
    assert E2M1_VALUES == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0], "f4")
    assert decode(encode(x, E2M1), E2M1).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


def test_high_nibbles_do_not_change_a_code() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(decode(codes, E2M1), decode(codes & 15, E2M1))


def test_e8m0_rounds_to_the_nearest_power_of_two() -> None:
    exponents = np.arange(-126, 127)
    powers = np.ldexp(np.float32(1), exponents).astype(np.float32)
    np.testing.assert_array_equal(encode(powers, E8M0), exponents + 127)
    x = np.concatenate([powers * np.float32(m) for m in (1.25, 1.4999999, 1.5, 1.5000001, 1.75)])
    inside = x[x < 2.0**127]
    wanted = inside.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(encode(inside, E8M0), wanted)


def test_e8m0_stays_in_range_where_ml_dtypes_does_not() -> None:
    # ml_dtypes 0.6 makes 1.9 * 2^127 NaN and rounds all of (2^-127, 2^-126) up.
    x = np.array([1.9 * 2.0**127, 1.2 * 2.0**-127, 2.0**-149], "f4")
    assert encode(x, E8M0).tolist() == [254, 0, 0]


@pytest.mark.parametrize("fmt", [F32], ids=str)
def test_formats_without_byte_codes_are_refused(fmt: ElementFormat) -> None:
    with pytest.raises(TypeError, match="f32 has no byte codes"):
        encode(np.ones(1, "f4"), fmt)
    with pytest.raises(TypeError, match="f32 has no byte codes"):
        decode(np.ones(1, np.uint8), fmt)


def test_even_elements_lie_in_the_low_nibble() -> None:
    assert pack_nibbles(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]
    assert unpack_nibbles(np.array([[0x21, 0x0F]], np.uint8)).tolist() == [[1, 2, 15, 0]]


def test_packing_is_undone_for_every_byte_and_leading_dimensions() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(2, 4, 32)
    codes = unpack_nibbles(packed)
    assert codes.shape == (2, 4, 64)
    assert codes.max() == 15
    np.testing.assert_array_equal(pack_nibbles(codes), packed)


def test_packed_order_is_that_of_ml_dtypes() -> None:
    values = np.array([0.5, -6, 1.5, 4], "f4").astype(ml_dtypes.float4_e2m1fn)
    low, high = values.view(np.uint8)[0::2], values.view(np.uint8)[1::2]
    codes = encode(values.astype(np.float32), E2M1)
    assert pack_nibbles(codes).tolist() == (low | high << 4).tolist()
