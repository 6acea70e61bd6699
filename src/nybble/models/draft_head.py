"""An output head to guess with: a four-bit copy of one that is large and has more bits.

Every guess reads the whole head, and what it reads costs most of its time. A guess may be wrong,
since the model's own head judges it; so a head of more bits is copied in NVFP4 once, into memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.formats.block import NVFP4
from nybble.formats.search import Search, tensor_scale
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import block_quantize, dispatch
from nybble.kernels.block_decode import decode_bf16
from nybble.kernels.block_matmul import Weight, prepare
from nybble.models.linear import Linear

log = logging.getLogger("nybble")

#: Heads below are read in so little time that a copy saves none.
LEAST_BYTES = 32 << 20
#: The best search: a head of 151,936 x 2,048 takes it 0.24 s on two cores, the quickest 0.14 s.
SEARCH: Search = "mse"
#: Numbers of a packed head that are unpacked at a time, in so many rows that no block is cut.
_TILE, _ROWS = 1 << 22, 128


def draft_head(head: Linear, threads: int, least_bytes: int = LEAST_BYTES) -> Linear:
    """A copy of `head` in NVFP4, or the head itself: one that has four bits already, is smaller
    than `least_bytes`, has rows that are not whole blocks, or numbers that are not finite. Without
    compiled kernels too: reading it is not what takes the time there."""
    weights, biases = head.weight.weights, head.weight.biases
    is_compiled = dispatch.choose().backend == "cpu"
    if not is_compiled or not any(_is_worth(weight, least_bytes) for weight in weights):
        return head
    copies = [_copied(weight, threads) for weight in weights]
    if any(copy is None for copy in copies):
        return head
    found = Linear(
        head.modules,
        prepare([c for c in copies if c is not None], biases, name=head.weight.name),
        head.activation,
        head.input_scale,
    )
    log.info("drafting head: a four-bit copy, %d MiB", copied_bytes(found) >> 20)
    return found


def copied_bytes(head: Linear) -> int:
    """The memory of a copy."""
    return sum(
        weight.codes.nbytes + weight.scale.nbytes
        for weight in head.weight.weights
        if isinstance(weight, BlockScaledTensor)
    )


def _is_worth(weight: Weight, least_bytes: int) -> bool:
    if isinstance(weight, BlockScaledTensor):
        return not weight.format.is_packed and weight.codes.nbytes >= least_bytes
    return weight.nbytes >= least_bytes


def _copied(weight: Weight, threads: int) -> BlockScaledTensor | None:
    """A weight [N, K] in NVFP4; None where that cannot be."""
    n, k = weight.shape
    if k % NVFP4.block[1]:
        return None
    is_plain = isinstance(weight, np.ndarray)
    largest = _amax(weight, threads) if isinstance(weight, np.ndarray) else _most(weight)
    if not np.isfinite(largest):
        return None
    scale = tensor_scale(largest, NVFP4, SEARCH)
    codes, scales = np.empty((n, k // 2), np.uint8), np.empty(NVFP4.scale_shape((n, k)), np.uint8)
    for at, tile in _tiles(weight):
        if not is_plain and not np.isfinite(_amax(tile, threads)):
            return None
        rows = slice(at, at + len(tile))
        block_quantize.quantize(
            [tile], NVFP4, SEARCH, scale.reshape(1), [codes[rows]], [scales[rows]], threads
        )
    return BlockScaledTensor(NVFP4, (n, k), codes, scales, scale)


def _most(weight: BlockScaledTensor) -> np.float32:
    """What no number of an FP8 weight exceeds, if none is NaN."""
    return np.float32(weight.format.element.max * np.abs(weight.scales()).max())


def _amax(weight: NDArray[np.generic], threads: int) -> np.float32:
    return np.float32(block_quantize.amax([np.ascontiguousarray(weight)], threads)[0])


def _tiles(weight: Weight) -> Iterator[tuple[int, NDArray[np.generic]]]:
    """Rows of a weight as floats, and where they begin: a plain one whole, an FP8 one by parts."""
    if not isinstance(weight, BlockScaledTensor):
        yield 0, np.ascontiguousarray(weight)
        return
    n, k = weight.shape
    step = max(1, _TILE // k // _ROWS) * _ROWS
    for at in range(0, n, step):
        part = _rows(weight, at, min(at + step, n))
        out = np.empty(part.shape, np.uint16)
        decode_bf16(part, out)
        yield at, out.view(ml_dtypes.bfloat16)


def _rows(weight: BlockScaledTensor, at: int, end: int) -> BlockScaledTensor:
    """Rows of an FP8 weight; `at` is at the edge of a block."""
    n, k = weight.shape
    height = weight.format.block[0] or n
    scale = weight.scale[at // height : -(-end // height)]
    return BlockScaledTensor(weight.format, (end - at, k), weight.codes[at:end], scale, None)
