"""Decoding to BF16 in C gives the bits of the definition, for all codes, scales and shapes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.formats.block import FORMATS, FP8, FP8_BLOCK, MXFP4, NVFP4, BlockFormat
from nybble.formats.element import F32
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import dispatch
from nybble.kernels.block_decode import cpu, decode_bf16, reference

ISAS = dispatch.machine_isas()
SCALES = (1.0, 2.0**-9, 0.000377, -1.7, 0.0, 1e-42, 3e38, np.inf, np.nan)

needs_library = pytest.mark.skipif(not ISAS, reason="no compiled kernels")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))


def random_tensor(fmt: BlockFormat, n: int, k: int, scale: float, seed: int) -> BlockScaledTensor:
    """Random bytes; float scales are `scale` times a few factors."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, fmt.codes_shape((n, k)), dtype=np.uint8)
    at = fmt.scale_shape((n, k))
    with np.errstate(over="ignore"):
        factors = rng.choice(np.array([1, 0.75, 1.1, -3], np.float32), at) * np.float32(scale)
    own = factors if fmt.scale is F32 else rng.integers(0, 256, at, dtype=np.uint8)
    top = np.asarray(scale, dtype=np.float32) if fmt.has_tensor_scale else None
    return BlockScaledTensor(fmt, (n, k), codes, own, top)


def both(part: BlockScaledTensor) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    found, expected = (np.full(part.shape, 0xABCD, dtype=np.uint16) for _ in range(2))
    cpu.decode_bf16(part, found)
    reference.decode_bf16(part, expected)
    return found, expected


@needs_library
@each_isa
@each_format
@pytest.mark.parametrize("scale", SCALES)
def test_bits_are_those_of_the_definition(
    fmt: BlockFormat, isa: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_ISA", isa)
    for n, k in ((1, 32), (3, 96), (130, 288), (129, 544)):
        found, expected = both(random_tensor(fmt, n, k, scale, n))
        assert np.array_equal(found, expected)


@needs_library
@each_isa
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    fmt=st.sampled_from(sorted(FORMATS)),
    scale=st.floats(width=32),
    seed=st.integers(0, 9),
)
def test_any_shape_and_scale(isa: str, n: int, k: int, fmt: str, scale: float, seed: int) -> None:
    chosen = FORMATS[fmt]
    k = k * chosen.block[1] if chosen.is_packed else k
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NYBBLE_ISA", isa)
        found, expected = both(random_tensor(chosen, n, min(k, 1024), scale, seed))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8])
def test_all_codes_and_scales_mean_their_products(fmt: BlockFormat) -> None:
    """Every pair, against float64: the reference is no mirror of the kernel's own mistakes."""
    if fmt.is_packed:
        k = fmt.block[1]
        codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, k // 16)).repeat(1, 0)[
            :, : k // 2
        ]
        scale: NDArray[np.generic] = np.arange(256, dtype=np.uint8).reshape(256, 1)
        kind = ml_dtypes.float8_e4m3fn if fmt is NVFP4 else ml_dtypes.float8_e8m0fnu
        scales = scale.view(kind).astype(np.float64) * (0.25 if fmt is NVFP4 else 1.0)
        grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        grid = np.concatenate([grid, -grid])
        values = grid[np.stack([codes & 15, codes >> 4], -1).reshape(256, k)] * scales
    else:
        codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
        scale = np.array([[0.25]], dtype=np.float32)
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 0.25
    top = np.asarray(0.25, dtype=np.float32) if fmt.has_tensor_scale else None
    part = BlockScaledTensor(fmt, values.shape, codes, scale, top)  # type: ignore[arg-type]
    out = np.empty(values.shape, dtype=np.uint16)
    decode_bf16(part, out)
    back = (out.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32).astype(np.float64)  # 6 * 2^127 is beyond float32
    assert np.array_equal(back, expected, equal_nan=True)


def test_rounding_is_to_nearest_even() -> None:
    """Codes 1 under scales that lie between two BF16 numbers."""
    scales = np.array([[1 + 2**-8], [1 + 3 * 2**-8], [1 + 2**-8 + 2**-20]], dtype=np.float32)
    part = BlockScaledTensor(
        FORMATS["fp8_channel"], (3, 1), np.full((3, 1), 0x38, np.uint8), scales, None
    )
    out = np.empty((3, 1), dtype=np.uint16)
    decode_bf16(part, out)
    assert out.reshape(-1).tolist() == [0x3F80, 0x3F82, 0x3F81]


@needs_library
def test_codes_need_not_be_aligned() -> None:
    part = random_tensor(NVFP4, 5, 64, 0.5, 0)
    odd = np.empty(part.codes.size + 1, dtype=np.uint8)
    codes = odd[1:].reshape(part.codes.shape)
    codes[:] = part.codes
    found, _ = both(BlockScaledTensor(NVFP4, part.shape, codes, part.scale, part.tensor_scale))
    assert np.array_equal(found, both(part)[1])


def test_shapes_that_disagree_are_refused() -> None:
    part = random_tensor(FP8_BLOCK, 130, 130, 1.0, 0)
    with pytest.raises(FormatError, match="expected"):
        decode_bf16(part, np.empty((130, 129), dtype=np.uint16))
    with pytest.raises(FormatError, match="uint16"):
        decode_bf16(part, np.empty((130, 130), dtype=np.int16).view(np.int16))  # type: ignore[arg-type]
