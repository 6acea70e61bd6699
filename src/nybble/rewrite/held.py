"""The quantized modules of a checkpoint in the canonical form, whatever dialect they are in.

value = code * scale * tensor_scale: which tensor is which part, and what a stored scale multiplies
with. Refuses what the tensors of a module leave open; looks at no configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

from nybble.check.contents import (
    CODES,
    INPUT_SCALES,
    SCALES,
    SIDE,
    TENSOR_SCALES,
    Contents,
    Module,
    is_divisor,
)
from nybble.checkpoint.compressed_tensors import CompressedTensors
from nybble.checkpoint.layout import Leaf
from nybble.checkpoint.modelopt import ModelOpt
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.errors import CheckpointError, FormatError
from nybble.formats.block import FORMATS, FP8, BlockFormat, Shape
from nybble.formats.element import F32, F32Array
from nybble.formats.tensor import BlockScaledTensor

_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Weight:
    """One quantized matrix [N, K] and the tensors it is made of.

    `scale` holds the block scales, or the float scales of FP8; `tensor_scale` is NVFP4's.
    """

    module: Module
    format: BlockFormat
    shape: Shape
    codes: TensorInfo
    scale: TensorInfo
    tensor_scale: TensorInfo | None
    input_scale: TensorInfo | None

    @property
    def name(self) -> str:
        """The module's path."""
        return self.module.name

    @property
    def float_scale(self) -> TensorInfo | None:
        """The scale that is a number in the file, not a code: of the tensor, or of FP8."""
        return self.scale if self.format.scale is F32 else self.tensor_scale

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors of the matrix; a bias beside it is none of them."""
        parts = (self.codes, self.scale, self.tensor_scale, self.input_scale)
        return tuple(part for part in parts if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in self.tensors)

    def multiplier(self, checkpoint: Checkpoint) -> F32Array | None:
        """The float scales as what codes are multiplied with; of FP8 in `format.scale_shape`."""
        if self.float_scale is None:
            return None
        value = multiplier(checkpoint, self.float_scale)
        if self.format.scale is F32:
            return value.reshape(self.format.scale_shape(self.shape))
        return value.reshape(())

    def rows(
        self, checkpoint: Checkpoint, first: int, last: int, scales: F32Array | None
    ) -> BlockScaledTensor:
        """Rows first:last (`first` at a block's edge), with the `multiplier` as `scales`."""
        n, k = self.shape
        codes = checkpoint.raw(self.codes.name).reshape(n, -1)[first:last]
        height = self.format.block[0] or n
        blocks = slice(first // height, -(-last // height))
        if self.format.scale is F32:
            assert scales is not None
            return BlockScaledTensor(self.format, (last - first, k), codes, scales[blocks], None)
        raw = checkpoint.raw(self.scale.name).reshape(self.format.scale_shape(self.shape))
        return BlockScaledTensor(self.format, (last - first, k), codes, raw[blocks], scales)


def multiplier(checkpoint: Checkpoint, scale: TensorInfo) -> F32Array:
    """A stored scale as float32 that multiplies, in its shape.

    `..._global_scale` divides, in compressed-tensors; every other scale of every dialect multiplies
    as it is.
    """
    leaf = Leaf("", "tensor_scale", "F32", scale.shape)
    layout = CompressedTensors() if is_divisor(scale) else ModelOpt()
    return layout.load(leaf, checkpoint.array(scale.name))


def read_weights(contents: Contents) -> list[Weight]:
    """Every quantized module; CheckpointError names the first that is not whole or not known."""
    faults: list[tuple[str, str]] = []
    found = []
    for module in contents.modules:
        side = [t.name for t in module.tensors if t.name.rpartition(".")[2] in SIDE]
        if not module.kind.is_quantized:
            if side:
                faults.append((module.name, f"{side[0]} belongs to no quantized weight"))
            continue
        result = _read(module)
        if isinstance(result, str):
            faults.append((module.name, result))
        else:
            found.append(result)
    if faults:
        name, fault = faults[0]
        raise CheckpointError(
            f"{len(faults)} modules cannot be converted, the first {name}: {fault}; `nybble check` "
            "says more, `nybble repair` mends what can be mended"
        )
    return found


def _read(module: Module) -> Weight | str:
    """The module's matrix, or why there is none."""
    kind = module.kind
    if kind.problem:
        return kind.problem
    fmt = FORMATS.get(kind.held)
    if fmt is None:
        return f"it holds {kind.held}, which is not decoded; known are {', '.join(FORMATS)}"
    codes, scale = module.tensor(*CODES), module.tensor(*SCALES)
    if codes is None or scale is None:
        return "it lacks its codes or its scales"
    shape = codes.shape
    if fmt.is_packed:
        shape = (*shape[:-1], 2 * shape[-1])
    if len(shape) != 2:
        return f"its weight is a stack {list(shape)}; only matrices [N, K] are converted"
    top, measured = module.tensor(*TENSOR_SCALES), module.tensor(*INPUT_SCALES)
    if not fmt.has_tensor_scale and top is not None:
        return f"{top.name} beside {fmt}, which has no tensor scale"
    weight = Weight(module, fmt, shape, codes, scale, top, measured)
    known = {t.name for t in weight.tensors}
    leaves = {t.name: t.name.rpartition(".")[2] for t in module.tensors}
    other = [n for n, leaf in leaves.items() if n not in known and leaf in (*SIDE, *CODES)]
    if other:
        return f"{other[0]} has no place in {fmt} and would be lost"
    return _scale_fault(weight) or weight


def _scale_fault(weight: Weight) -> str:
    """Why the scales are not those of the format; "" if they are."""
    fmt, scale, top = weight.format, weight.scale, weight.tensor_scale
    try:
        fmt.check_shape(weight.shape, weight.name)
    except FormatError as error:
        return str(error)
    expected = fmt.scale_shape(weight.shape)
    is_one = fmt is FP8 and scale.size == 1
    if not is_one and [n for n in scale.shape if n != 1] != [n for n in expected if n != 1]:
        return f"{scale.name} is {list(scale.shape)}, expected {list(expected)}"
    for each in filter(None, (weight.float_scale, weight.input_scale)):
        if each.dtype not in _FLOATS:
            return f"{each.name} is {each.dtype}, expected one of {', '.join(_FLOATS)}"
    for each in filter(None, (top, weight.input_scale)):
        if each.size != 1:
            return f"{each.name} is {list(each.shape)}, expected one number"
    if prod(expected) != scale.size:
        return f"{scale.name} has {scale.size} scales, expected {prod(expected)}"
    return ""


def plain_tensors(
    checkpoint: Checkpoint, contents: Contents, weights: Sequence[Weight]
) -> list[TensorInfo]:
    """The tensors that are neither part of a quantized matrix nor a scale of the KV cache."""
    taken = {t.name for t in chain(contents.kv_scales, *(w.tensors for w in weights))}
    return [t for name, t in checkpoint.tensors.items() if name not in taken]
