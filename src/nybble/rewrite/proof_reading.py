"""Reading a module of a conversion's result by the specification alone, for the proof of it.

Which tensors a module has, which scales divide, what a code is worth: written here a second time,
and used by nothing that writes. Neither the layouts nor the element formats are used for it; a
mistake that both sides share would have to be made twice.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3; docs/layouts.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.rewrite.held import Weight

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]
Bits = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Names:
    """Where a container keeps the parts of a module; `divides`: its float32 scalars do."""

    codes: str
    scale: str
    tensor_scale: str
    input_scale: str
    divides: bool


_MODELOPT = Names("weight", "weight_scale", "weight_scale_2", "input_scale", divides=False)
_PACKED = Names(
    "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divides=True
)
_FLOAT = Names("weight", "weight_scale", "", "input_scale", divides=False)


def names_in(target: str, fmt: BlockFormat) -> Names:
    if target == "modelopt":
        return _MODELOPT
    return _PACKED if fmt in (NVFP4, MXFP4) else _FLOAT


@lru_cache(maxsize=1)
def e4m3() -> F32Array:
    """The value of each E4M3 code: sign, four bits of exponent with bias 7, three of mantissa."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(
        exponent == 0,
        mantissa * 2.0**-9,
        (8 + mantissa) * np.exp2(exponent.astype(np.float64) - 10),
    )
    value[(code & 127) == 127] = np.nan
    return np.where(code >= 128, -value, value).astype(np.float32)


@lru_cache(maxsize=1)
def e2m1() -> F32Array:
    """The value of each E2M1 code: sign, two bits of exponent with bias 1, one of mantissa."""
    code = np.arange(16)
    exponent, mantissa = (code >> 1) & 3, code & 1
    value = np.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * 2.0 ** (exponent - 1))
    return np.where(code >= 8, -value, value).astype(np.float32)


@lru_cache(maxsize=1)
def _e8m0() -> F32Array:
    """The value of each E8M0 code: a power of two; 255 is NaN."""
    value = np.exp2(np.arange(256, dtype=np.float64) - 127)
    value[255] = np.nan
    return value.astype(np.float32)


def number(checkpoint: Checkpoint, name: str) -> F32Array:
    """Stored float numbers by their bits: F32 as it is, BF16 the upper half of one, F16."""
    info = checkpoint.tensors[name]
    raw = checkpoint.raw(name)
    if info.dtype == "F32":
        return np.frombuffer(raw.tobytes(), dtype="<f4")
    if info.dtype == "F16":
        return np.frombuffer(raw.tobytes(), dtype="<f2").astype(np.float32)
    assert info.dtype == "BF16", f"{name}: {info.dtype}"
    return (np.frombuffer(raw.tobytes(), dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def nearest_bf16(values: F32Array) -> Bits:
    """The nearest BF16 bits, ties to even, every NaN as 0x7FC0."""
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _four_bit_rows(codes: U8Array, scales: F32Array, block: int) -> F32Array:
    """Values of rows: two codes in a byte, the low four bits first; one scale per `block`."""
    table = e2m1()
    values = np.stack([table[codes & 15], table[codes >> 4]], axis=-1).reshape(len(codes), -1)
    return (values.reshape(len(codes), -1, block) * scales[:, :, None]).reshape(len(codes), -1)


@dataclass(frozen=True, slots=True)
class Written:
    """A module of the result: raw codes [N, bytes], raw or float block scales, the multiplier."""

    format: BlockFormat
    codes: U8Array
    scale: NDArray[np.generic]
    top: np.float32

    def rows(self, first: int, last: int) -> F32Array:
        """Decoded rows first:last, [rows, K]; `first` at the edge of a block."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._rows(first, last)

    def _rows(self, first: int, last: int) -> F32Array:
        codes = self.codes[first:last]
        if self.format in (NVFP4, MXFP4):
            scales = self.scales(self.scale[first:last])
            return _four_bit_rows(codes, scales, 16 if self.format is NVFP4 else 32)
        values = e4m3()[codes]
        scale = self.scale.astype(np.float32)
        if self.format is FP8:
            return values * scale.reshape(())
        if self.format is FP8_CHANNEL:
            return values * scale[first:last].reshape(-1, 1)
        assert self.format is FP8_BLOCK
        row, column = np.arange(first, last) // 128, np.arange(codes.shape[1]) // 128
        return values * scale[np.ix_(row, column)]

    def scales(self, codes: NDArray[np.generic]) -> F32Array:
        """Block scales times the tensor scale."""
        values: F32Array = (_e8m0() if self.format is MXFP4 else e4m3())[codes.view(np.uint8)]
        return values if self.format is MXFP4 else values * self.top


def read_module(written: Checkpoint, weight: Weight, target: str) -> Written | str:
    """A module of the result, or what is wrong with it."""
    fmt, names = weight.format, names_in(target, weight.format)
    n, k = weight.shape

    def take(leaf: str, shape: tuple[int, ...], dtype: tuple[str, ...]) -> str:
        info = written.tensors.get(f"{weight.name}.{leaf}")
        if info is None:
            return f"{weight.name}.{leaf} is absent"
        if info.dtype not in dtype or info.shape != shape:
            return f"{info.name} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
        return ""

    scalar = () if target == "modelopt" else (1,)
    if fmt in (NVFP4, MXFP4):
        block, kind = (16, ("F8_E4M3",)) if fmt is NVFP4 else (32, ("U8",))
        faults = [take(names.codes, (n, k // 2), ("U8",)), take(names.scale, (n, k // block), kind)]
        if fmt is NVFP4:
            faults.append(take(names.tensor_scale, scalar, ("F32",)))
    else:
        blocks = (-(-n // 128), -(-k // 128))
        shape = scalar if fmt is FP8 else (n, 1) if fmt is FP8_CHANNEL else blocks
        kind = ("F32",) if target == "modelopt" else ("BF16",)
        faults = [take(names.codes, (n, k), ("F8_E4M3",)), take(names.scale, shape, kind)]
    if found := [fault for fault in faults if fault]:
        return found[0]
    codes = written.raw(f"{weight.name}.{names.codes}").reshape(n, -1)
    if fmt not in (NVFP4, MXFP4):
        scale = number(written, f"{weight.name}.{names.scale}").reshape(shape)
        return Written(fmt, codes, scale, np.float32(1))
    top = np.float32(1)
    if fmt is NVFP4:
        stored = number(written, f"{weight.name}.{names.tensor_scale}")[0]
        top = np.float32(1) / stored if names.divides else stored
    return Written(fmt, codes, written.raw(f"{weight.name}.{names.scale}").reshape(n, -1), top)
