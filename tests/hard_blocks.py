"""Blocks that scale searches get wrong: ties, outliers, underflow, overflow, octaves of range.

Shared by the tests of the definition and of the kernels, so that both see the same values.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
SOURCES = (BF16, F16, F32)


def hard_blocks(blocks: int, width: int, seed: int = 0) -> dict[str, F32Array]:
    """Name -> float32 [blocks, width]; each name is meant to be one tensor."""
    rng = np.random.default_rng(seed)
    shape = (blocks, width)
    normal = rng.standard_normal(shape)
    sign = rng.choice([-1.0, 1.0], shape)
    outlier = normal * 0.02
    outlier[np.arange(blocks), rng.integers(0, width, blocks)] = 12.8 * sign[:, 0]
    step = rng.integers(2, 10, (blocks, 1))
    zeros = normal.copy()
    zeros[::3] = 0.0
    zeros[1::3, ::2] = -0.0
    tiny_beside_huge = normal * 1e-38
    tiny_beside_huge[:, 5] = 3e38 * sign[:, 5]
    tiny_beside_huge[::4] = normal[::4] * 1e-30  # below every scale this tensor can have
    found = {
        "gaussian": normal * 0.02,
        "student_t": rng.standard_t(3, shape) * 0.02,
        "sparse": normal * (rng.random(shape) < 0.1),
        "integer_grid": rng.integers(-12, 13, shape),
        "quarter_grid": rng.integers(-24, 25, shape) / 4 * step,
        "outlier": outlier,
        "constant": np.ones(shape) * np.exp2(rng.uniform(-4, 4, (blocks, 1))) * sign,
        "two_level": np.where(rng.random(shape) < 0.5, 1.0, 0.7) * np.exp2(normal[:, :1]) * sign,
        "zeros": zeros,
        "dead": np.zeros(shape),
        "subnormal_scales": normal * np.exp2(-rng.uniform(0, 24, (blocks, 1))),
        "huge_range": sign * np.exp2(rng.uniform(-60, 4, shape)),
        "subnormal": normal * 1e-39,
        "tiny": normal * 1e-38,
        "huge": rng.uniform(-3.3e38, 3.3e38, shape),
        "tiny_beside_huge": tiny_beside_huge,
    }
    return {name: x.astype(np.float32) for name, x in found.items()}


def random_finite(dtype: np.dtype[np.generic], shape: tuple[int, ...], seed: int) -> NDArray:
    """Values from raw bits: every finite one is as likely as any other."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
    return np.where(np.isfinite(bits.astype(np.float32)), bits, np.zeros((), dtype))


def as_source(x: F32Array, dtype: np.dtype[np.generic]) -> NDArray:
    """x rounded to a source dtype, saturating where it has too little range."""
    most = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -most, most).astype(dtype)


def tensors(dtype: np.dtype[np.generic], blocks: int, width: int) -> Iterator[tuple[str, NDArray]]:
    """Every hard tensor in a source dtype, and two made of raw bits: any, and one octave apart."""
    for name, x in hard_blocks(blocks, width).items():
        yield name, as_source(x, dtype)
    yield "raw_bits", random_finite(dtype, (blocks, width), seed=1)
    near = random_finite(dtype, (blocks, width), seed=2).astype(np.float32)
    mantissa, _ = np.frexp(near)
    yield "raw_mantissas", as_source(mantissa.astype(np.float32), dtype)
