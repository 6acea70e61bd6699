"""The definition of `formats.search` applied to runs: what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nybble.formats import search as definition
from nybble.formats.block import BlockFormat
from nybble.formats.element import F32Array, U8Array, encode
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels.block_quantize import Buffers, Comparison, Runs

CHUNK = 1 << 20  # elements at a time: numpy's temporaries stay small


def amax(runs: Runs, dtype: np.dtype[np.generic], threads: int) -> F32Array:
    """See the package; numpy propagates NaN."""
    found = np.zeros(len(runs), dtype=np.float32)
    for i, run in enumerate(runs):
        flat = run.reshape(-1)
        for at in range(0, flat.size, CHUNK):
            part = np.abs(flat[at : at + CHUNK].astype(np.float32))
            found[i] = np.maximum(found[i], part.max())
    return found


def quantize(
    runs: Runs,
    dtype: np.dtype[np.generic],
    fmt: BlockFormat,
    search: definition.Search,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int,
    bf16_quotient: bool,
) -> None:
    """See the package."""
    for i, run in enumerate(runs):
        flat = run.reshape(1, -1)
        for at in range(0, flat.size, CHUNK):
            part = flat[:, at : at + CHUNK]
            scale = scales[i : i + 1]
            if not fmt.is_packed:
                quotient = part.astype(np.float32) / scale
                if bf16_quotient:
                    quotient = quotient.astype(dtype).astype(np.float32)
                codes[i].reshape(-1)[at : at + CHUNK] = encode(quotient[0], fmt.element)
                continue
            done = definition.quantize(
                part, fmt, search, scale=scale[0] if fmt.has_tensor_scale else None
            )
            b = fmt.block[1]
            codes[i].reshape(-1)[at // 2 : (at + CHUNK) // 2] = done.codes[0]
            block_scales[i].reshape(-1)[at // b : (at + CHUNK) // b] = done.scale[0]


def decode(
    fmt: BlockFormat,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int,
) -> list[F32Array]:
    """See the package."""
    values = []
    for i, run in enumerate(codes):
        n = run.size * (2 if fmt.is_packed else 1)
        scale = block_scales[i].reshape(1, -1) if fmt.is_packed else scales[i : i + 1, None]
        top = np.asarray(scales[i]) if fmt.has_tensor_scale else None
        tensor = BlockScaledTensor(fmt, (1, n), run.reshape(1, -1), scale, top)
        values.append(tensor.dequantize()[0])
    return values


def compare(
    runs: Runs,
    dtype: np.dtype[np.generic],
    fmt: BlockFormat,
    scales: F32Array,
    codes: Buffers,
    block_scales: Sequence[U8Array],
    threads: int,
) -> list[Comparison]:
    """See the package."""
    found = []
    for i, values in enumerate(decode(fmt, scales, codes, block_scales, threads)):
        x = runs[i].reshape(-1).astype(np.float32)
        d = (x - values).astype(np.float64)
        bad = 0
        if fmt.is_packed:
            s = block_scales[i]
            bad = int(((s == 0) | (s >= 0x7F)).sum() if fmt.has_tensor_scale else (s == 255).sum())
        found.append(Comparison(float(d @ d), float((x.astype(np.float64) ** 2).sum()), bad))
    if isinstance(runs, np.ndarray):
        error, energy = (sum(getattr(c, name) for c in found) for name in ("error", "energy"))
        return [Comparison(error, energy, sum(c.bad_scales for c in found))]
    return found
