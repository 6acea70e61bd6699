"""Block formats: which elements share a scale, and what the scale is. One row of `FORMATS` each.

Source: NVFP4 as written by ModelOpt and compressed-tensors (docs/formats.md); MXFP4: OCP MX v1.0
section 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import FormatError
from nybble.formats.element import E2M1, E4M3, E8M0, F32, ElementFormat

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Elements, the block that shares one scale, the scale's format, and if a tensor scale follows.

    `block` is (rows, columns); 0 stands for the whole extent of that axis.
    """

    name: str
    element: ElementFormat
    block: tuple[int, int]
    scale: ElementFormat
    has_tensor_scale: bool

    def __reduce__(self) -> str:
        return self.name.upper()  # formats are compared by identity: another process takes its own

    def __str__(self) -> str:
        return self.name

    @property
    def is_packed(self) -> bool:
        """Two codes lie in one byte."""
        return self.element.bits == 4

    def check_shape(self, shape: Shape, what: str) -> None:
        """Raise FormatError, naming `what`, unless a weight [..., N, K] divides into blocks."""
        if len(shape) < 2 or 0 in shape:
            raise FormatError(
                f"{what}: {self} needs a matrix [..., N, K], found shape {list(shape)}"
            )
        if self.is_packed and shape[-1] % self.block[1]:
            raise FormatError(
                f"{what}: {self} needs K (the last dimension) to be a multiple of {self.block[1]}, "
                f"found {shape[-1]}; leave this module in BF16 or use an FP8 scheme for it"
            )

    def codes_shape(self, shape: Shape) -> Shape:
        """The shape of the code bytes of a weight [..., N, K]."""
        return (*shape[:-1], shape[-1] // 2) if self.is_packed else shape

    def scale_shape(self, shape: Shape) -> Shape:
        """The shape of the scales of a weight [..., N, K]: one per block, ragged edges too."""
        n, k = shape[-2:]
        rows, columns = self.block
        return (*shape[:-2], -(-n // (rows or n)), -(-k // (columns or k)))

    def bits_per_weight(self, shape: Shape) -> float:
        """Stored bits per weight, scales included, of a weight [..., N, K]."""
        n, k = shape[-2:]
        sn, sk = self.scale_shape(shape)[-2:]
        extra = 32 if self.has_tensor_scale else 0
        return self.element.bits + (sn * sk * self.scale.bits + extra) / (n * k)


NVFP4 = BlockFormat("nvfp4", E2M1, (1, 16), E4M3, has_tensor_scale=True)
MXFP4 = BlockFormat("mxfp4", E2M1, (1, 32), E8M0, has_tensor_scale=False)
FP8 = BlockFormat("fp8", E4M3, (0, 0), F32, has_tensor_scale=False)
FP8_CHANNEL = BlockFormat("fp8_channel", E4M3, (1, 0), F32, has_tensor_scale=False)
FP8_BLOCK = BlockFormat("fp8_block", E4M3, (128, 128), F32, has_tensor_scale=False)

FORMATS: dict[str, BlockFormat] = {f.name: f for f in (NVFP4, MXFP4, FP8, FP8_CHANNEL, FP8_BLOCK)}
