"""The block codecs of GGUF: what the bytes of a tensor type decode to, and how some are made.

A type packs `block` weights that lie side by side along K into `nbytes` bytes. Decoding gives the
float32 values that ggml computes with, bit for bit. An NVFP4 or MXFP4 weight moves between the
checkpoints' packing and these blocks without being decoded: only nibbles change places.

Knows no file and no name. Source: ggml, `ggml-common.h` (layouts) and `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.formats.element import F32Array, U8Array

U64Array = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class GGUFType:
    """One tensor type: its number in files, weights per block, bytes per block."""

    name: str
    number: int
    block: int
    nbytes: int

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights; k is a multiple of `block`."""
        return k // self.block * self.nbytes


_TABLE = (
    *(("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20)),
    *(("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 36)),
    *(("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144)),
    *(("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292)),
    *(("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98)),
    *(("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110)),
    *(("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2)),
    *(("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56)),
    *(("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66)),
    *(("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36)),
)
#: Every type of fixed size by its number; those that cannot be decoded here can still be listed.
TYPES: dict[int, GGUFType] = {row[1]: GGUFType(*row) for row in _TABLE}
BY_NAME: dict[str, GGUFType] = {t.name: t for t in TYPES.values()}

#: E2M1 values doubled, as ggml has them: its block scales are halved instead.
_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12], dtype=np.float32)
_DOUBLED = np.concatenate([_DOUBLED, -_DOUBLED + 0])  # + 0: ggml's table of integers has no -0
_NIBBLES = np.array([0, 4], dtype=np.uint8).reshape(2, 1)
_CRUMBS = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
_BITS = np.arange(8, dtype=np.uint8).reshape(8, 1)


def decode(kind: str, raw: U8Array) -> F32Array:
    """The float32 values of whole blocks of a type; raw is one-dimensional, as the result.

    Raises FormatError for a type without a codec here, by name.
    """
    codec = _DECODERS.get(kind)
    if codec is None:
        raise FormatError(
            f"GGUF type {kind}: nybble decodes {', '.join(_DECODERS)}; requantize the file to one "
            "of them with llama-quantize, or convert from the original model"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and inf of a file show as such
        return codec(raw.reshape(-1, BY_NAME[kind].nbytes)).reshape(-1)


def encode(kind: str, values: F32Array) -> U8Array:
    """The bytes of float32 values; the last dimension is K and a multiple of the type's block."""
    codec = _ENCODERS.get(kind)
    if codec is None:
        raise FormatError(
            f"GGUF type {kind}: nybble writes {', '.join(_ENCODERS)}, NVFP4 and MXFP4"
        )
    return codec(np.ascontiguousarray(values, dtype=np.float32))


# ---------------------------------------------------------------------------------- plain numbers


def _half(raw: U8Array) -> F32Array:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _decode_bf16(raw: U8Array) -> F32Array:
    return (raw.reshape(-1).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _decode_f32(raw: U8Array) -> F32Array:
    return raw.reshape(-1).view(np.float32)


def _encode_f32(values: F32Array) -> U8Array:
    return values.reshape(-1).view(np.uint8)


def _encode_f16(values: F32Array) -> U8Array:
    with np.errstate(over="ignore"):
        return values.reshape(-1).astype(np.float16).view(np.uint8)


def _encode_bf16(values: F32Array) -> U8Array:
    return to_bf16(values)[0].view(np.uint8)


# ------------------------------------------------------------------------------- 32 weights a block


def _decode_q8_0(raw: U8Array) -> F32Array:
    return raw[:, 2:].view(np.int8).astype(np.float32) * _half(raw[:, :2])


def _encode_q8_0(values: F32Array) -> U8Array:
    """Symmetric, a half-precision scale; halves round away from zero, as in ggml."""
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    size = np.abs(scaled)
    whole = np.floor(size)
    codes = np.sign(scaled) * (whole + np.floor(2 * (size - whole)))
    out = np.empty((len(blocks), 34), dtype=np.uint8)
    out[:, :2] = scale.astype(np.float16).view(np.uint8)
    out[:, 2:] = codes.astype(np.int8).view(np.uint8)
    return out.reshape(-1)


def _nibbles(raw: U8Array) -> U8Array:
    """[n, 16] bytes -> [n, 32] codes: the low nibbles of all, then the high ones."""
    return ((raw[:, None, :] >> _NIBBLES) & np.uint8(15)).reshape(len(raw), -1)


def _fifth_bits(raw: U8Array) -> U8Array:
    """[n, 4] bytes -> [n, 32]: 16 where the bit is set."""
    return np.unpackbits(raw, axis=1, bitorder="little") << np.uint8(4)


def _decode_q4_0(raw: U8Array) -> F32Array:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:]).astype(np.float32) - 8)


def _decode_q4_1(raw: U8Array) -> F32Array:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:]).astype(np.float32) + _half(raw[:, 2:4])


def _decode_q5_0(raw: U8Array) -> F32Array:
    codes = (_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])).astype(np.float32)
    return _half(raw[:, :2]) * (codes - 16)


def _decode_q5_1(raw: U8Array) -> F32Array:
    codes = (_nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])).astype(np.float32)
    return _half(raw[:, :2]) * codes + _half(raw[:, 2:4])


# ------------------------------------------------------------------------------ 256 weights a block


def _decode_q2_k(raw: U8Array) -> F32Array:
    scales, codes = raw[:, :16], raw[:, 16:80].reshape(-1, 2, 1, 32)
    step = (_half(raw[:, 80:82]) * (scales & 15).astype(np.float32))[:, :, None]
    low = (_half(raw[:, 82:84]) * (scales >> 4).astype(np.float32))[:, :, None]
    q = ((codes >> _CRUMBS) & np.uint8(3)).reshape(-1, 16, 16).astype(np.float32)
    return step * q - low


def _decode_q3_k(raw: U8Array) -> F32Array:
    high, codes, packed = raw[:, :32], raw[:, 32:96], raw[:, 96:108]
    low4 = ((packed[:, None, :8] >> _NIBBLES) & np.uint8(15)).reshape(-1, 16)
    high2 = ((packed[:, None, 8:] >> _CRUMBS) & np.uint8(3)).reshape(-1, 16)
    scales = (low4 | high2 << np.uint8(4)).astype(np.float32) - 32
    step = (_half(raw[:, 108:110]) * scales)[:, :, None]
    q = ((codes.reshape(-1, 2, 1, 32) >> _CRUMBS) & np.uint8(3)).reshape(-1, 16, 16)
    # A set bit means that nothing is subtracted.
    is_set = ((high[:, None, :] >> _BITS) & np.uint8(1)).reshape(-1, 16, 16)
    return step * (q.astype(np.float32) - 4 * (1 - is_set.astype(np.float32)))


def _six_bits(packed: U8Array) -> tuple[F32Array, F32Array]:
    """The 8 scales and 8 minimums that 12 bytes hold."""
    d, m, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([d & 63, (both & 15) | ((d >> 2) & 48)], axis=1)
    lows = np.concatenate([m & 63, (both >> 4) | ((m >> 2) & 48)], axis=1)
    return scales.astype(np.float32), lows.astype(np.float32)


def _decode_q4_k(raw: U8Array) -> F32Array:
    scales, lows = _six_bits(raw[:, 4:16])
    step, low = _half(raw[:, :2]) * scales, _half(raw[:, 2:4]) * lows
    q = ((raw[:, 16:].reshape(-1, 4, 1, 32) >> _NIBBLES) & np.uint8(15)).reshape(-1, 8, 32)
    return step[:, :, None] * q.astype(np.float32) - low[:, :, None]


def _decode_q5_k(raw: U8Array) -> F32Array:
    scales, lows = _six_bits(raw[:, 4:16])
    step, low = _half(raw[:, :2]) * scales, _half(raw[:, 2:4]) * lows
    q = ((raw[:, 48:].reshape(-1, 4, 1, 32) >> _NIBBLES) & np.uint8(15)).reshape(-1, 8, 32)
    q |= ((raw[:, None, 16:48] >> _BITS) & np.uint8(1)) << np.uint8(4)
    return step[:, :, None] * q.astype(np.float32) - low[:, :, None]


def _decode_q6_k(raw: U8Array) -> F32Array:
    low = ((raw[:, :128].reshape(-1, 2, 1, 64) >> _NIBBLES) & np.uint8(15)).reshape(-1, 8, 32)
    high = ((raw[:, 128:192].reshape(-1, 2, 1, 32) >> _CRUMBS) & np.uint8(3)).reshape(-1, 8, 32)
    q = ((low | high << np.uint8(4)).astype(np.float32) - 32).reshape(-1, 16, 16)
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return (_half(raw[:, 208:210]) * scales)[:, :, None] * q


# -------------------------------------------------------------------------------- FP4 of two kinds


def _ue4m3_halved() -> F32Array:
    """Half of the value of each scale byte, as ggml reads it: 0x7F is 0, the sign is ignored, and
    0xFF, which no writer makes, is 480."""
    codes = np.arange(256, dtype=np.uint8)
    values: F32Array = (codes & 0x7F).view(ml_dtypes.float8_e4m3fn).astype(np.float32) / 2
    values[[0x7F, 0xFF]] = 0, 240
    return values


def _e8m0_halved() -> F32Array:
    """Half of the value of each scale byte: 2^(e - 128), for 255 too."""
    codes = np.arange(256, dtype=np.uint32)
    bits = np.where(codes < 2, 0x00200000 << codes, (codes - 1) << 23).astype(np.uint32)
    return bits.view(np.float32)


_UE4M3 = _ue4m3_halved()
_E8M0 = _e8m0_halved()


def _pairs() -> U64Array:
    """The two weights of every byte, as the bits of two float32."""
    codes = np.arange(256)
    both = np.stack([_DOUBLED[codes & 15], _DOUBLED[codes >> 4]], axis=-1)
    return np.ascontiguousarray(both).view(np.uint64).reshape(-1)


_PAIRS = _pairs()


def _decode_nvfp4(raw: U8Array) -> F32Array:
    codes, scales = nvfp4_parts(raw)
    values: F32Array = _PAIRS.take(codes).view(np.float32).reshape(-1, 16)
    values *= _UE4M3.take(scales)[:, None]
    return values


def nvfp4_bf16(raw: U8Array, tensor_scale: float) -> NDArray[np.uint16] | None:
    """BF16 bits of NVFP4 blocks times their tensor scale, one-dimensional; None where BF16 does not
    hold every product exactly, as with tensor scales that are no power of two.

    By a table of scale byte and code byte: two weights at a time, and no float32 in between.
    """
    table = _bf16_table(tensor_scale)
    if table is None:
        return None
    codes, scales = nvfp4_parts(raw)
    at = (scales.astype(np.uint16) << np.uint16(8))[:, None] + codes.reshape(-1, 8)
    return table.take(at.reshape(-1)).view(np.uint16)


@lru_cache(maxsize=64)
def _bf16_table(tensor_scale: float) -> NDArray[np.uint32] | None:
    """[256 scale bytes * 256 code bytes] of two BF16 each."""
    pairs = _PAIRS.view(np.float32).reshape(1, 256, 2)
    with np.errstate(over="ignore"):
        values = pairs * _UE4M3[:, None, None] * np.float32(tensor_scale)
    bits, lost = to_bf16(np.ascontiguousarray(values))
    return None if lost else bits.view(np.uint32)


def _decode_mxfp4(raw: U8Array) -> F32Array:
    return _DOUBLED[_nibbles(raw[:, 1:])] * _E8M0[raw[:, :1]]


def to_bf16(values: F32Array) -> tuple[NDArray[np.uint16], int]:
    """BF16 bits of float32 values, rounded to nearest, and how many values that changes.

    Values that BF16 holds, the usual case, are only cut in half.
    """
    halves = values.reshape(-1).view(np.uint16)  # little endian: the low half comes first
    lost = int(np.count_nonzero(halves[0::2]))
    if not lost:
        return halves[1::2].copy(), 0
    return values.reshape(-1).astype(ml_dtypes.bfloat16).view(np.uint16), lost


def _swap(x: U64Array, mask: int, shift: int, scratch: U64Array) -> None:
    """Exchange the bits of x under the mask with those `shift` above them, in place."""
    np.right_shift(x, np.uint64(shift), out=scratch)
    np.bitwise_xor(scratch, x, out=scratch)
    np.bitwise_and(scratch, np.uint64(mask), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    np.left_shift(scratch, np.uint64(shift), out=scratch)
    np.bitwise_xor(x, scratch, out=x)


#: Exchanges of quarters that turn nibbles 0..15 of a word into 0 8 1 9 2 10 ...: ggml's order.
_SHUFFLE = ((0x00000000FFFF0000, 16), (0x0000FF000000FF00, 8), (0x00F000F000F000F0, 4))
#: Blocks of 16 weights at a time: the words and their scratch stay in the second-level cache.
_CHUNK = 1 << 14


def nvfp4_blocks(codes: U8Array, scales: U8Array) -> U8Array:
    """GGUF's NVFP4 bytes of a weight: only bits move.

    codes [..., K / 2] with neighbours in a byte, scales [..., K / 16] as E4M3 bytes, K a multiple
    of 64. Raises FormatError for negative and NaN scales, which ggml would read as something else.
    """
    words = np.ascontiguousarray(codes).reshape(-1).view(np.uint64)
    groups = np.ascontiguousarray(scales).reshape(-1)
    if groups.max(initial=0) >= 0x7F:
        groups = _unsigned(groups)
    if len(words) % 4 or len(groups) != len(words):
        raise FormatError(f"NVFP4 needs K in multiples of 64 for GGUF, found codes {codes.shape}")
    out = np.empty((len(words) // 4, 9), dtype=np.uint32)  # a block is 36 bytes
    out[:, 0] = groups.view(np.uint32)
    scratch = np.empty(min(_CHUNK, len(words)), dtype=np.uint64)
    for at in range(0, len(words), _CHUNK):
        chunk = words[at : at + _CHUNK].copy()
        for mask, shift in _SHUFFLE:
            _swap(chunk, mask, shift, scratch[: len(chunk)])
        out[at // 4 : (at + len(chunk)) // 4, 1:] = chunk.view(np.uint32).reshape(-1, 8)
    return out.reshape(-1).view(np.uint8)


def _unsigned(scales: U8Array) -> U8Array:
    """Negative zeros become zeros; anything else that ggml cannot hold is refused."""
    bad = scales[(scales >= 0x7F) & (scales != 0x80)]
    if len(bad):
        raise FormatError(
            f"{len(bad)} NVFP4 block scales are negative or NaN, the first is 0x{bad[0]:02X}: GGUF "
            "stores them without a sign and llama.cpp reads NaN as 0; find them with `nybble check`"
        )
    return scales & np.uint8(0x7F)


def nvfp4_parts(raw: U8Array) -> tuple[U8Array, U8Array]:
    """Codes (two neighbours in a byte) and E4M3 scales of NVFP4 blocks: undoes `nvfp4_blocks`."""
    blocks = np.ascontiguousarray(raw).reshape(-1).view(np.uint32).reshape(-1, 9)
    # A copy in any case: the words are shuffled in place, and one block alone is contiguous.
    words = blocks[:, 1:].copy().view(np.uint64).reshape(-1)
    scratch = np.empty_like(words)
    for mask, shift in reversed(_SHUFFLE):
        _swap(words, mask, shift, scratch)
    return words.view(np.uint8), np.ascontiguousarray(blocks[:, 0]).view(np.uint8)


def mxfp4_blocks(codes: U8Array, scales: U8Array) -> U8Array:
    """GGUF's MXFP4 bytes: codes [..., K / 2] with neighbours in a byte, E8M0 scales [..., K / 32].

    Raises FormatError for the NaN scale 0xFF, which ggml reads as 2^128.
    """
    if scales.max(initial=0) == 0xFF:
        raise FormatError("an MXFP4 block scale is NaN (0xFF); find it with `nybble check`")
    packed = np.ascontiguousarray(codes).reshape(-1, 16)
    each = np.empty((len(packed), 32), dtype=np.uint8)
    each[:, 0::2], each[:, 1::2] = packed & 15, packed >> 4
    out = np.empty((len(packed), 17), dtype=np.uint8)
    out[:, 0] = scales.reshape(-1)
    out[:, 1:] = each[:, :16] | each[:, 16:] << np.uint8(4)
    return out.reshape(-1)


_DECODERS: dict[str, Callable[[U8Array], F32Array]] = {
    "F32": _decode_f32,
    "F16": _half,
    "BF16": _decode_bf16,
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    "MXFP4": _decode_mxfp4,
    "NVFP4": _decode_nvfp4,
}
_ENCODERS: dict[str, Callable[[F32Array], U8Array]] = {
    "F32": _encode_f32,
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q8_0": _encode_q8_0,
}
#: Types whose values can be read.
READABLE = tuple(_DECODERS)
