"""What the source of a conversion holds, read a second time, for the proof of it.

Which tensors are a quantized matrix, in which format, what may be left out: from names, dtypes and
shapes, and shared with nothing that converts. `rewrite/held.py` decides the same for the converter
and tells the proof what it decided; `source_fault` says where the two disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.rewrite.held import Weight
from nybble.rewrite.proof_reading import Written, number

_INPUTS = ("input_scale", "input_global_scale")
_KV = ("k_scale", "v_scale", "q_scale")
#: Names that say that a tensor is a part of a quantized matrix; its codes may be named `weight`.
_PARTS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_global_scale", *_INPUTS),
)


def may_be_left_out(name: str, target: str, measured: Iterable[str]) -> bool:
    """Whether a target has no place for a tensor: plain weights for scales of inputs and of the KV
    cache, a layout for input scales that are not among `measured`, those the source declares."""
    leaf = name.rpartition(".")[2]
    if target == "bf16":
        return leaf in _INPUTS or leaf in _KV
    return leaf in _INPUTS and name not in measured


def forgotten(source: Checkpoint, taken: Iterable[str]) -> Iterator[str]:
    """A fault for each part of a quantized matrix that nothing was compared with."""
    for name in source.tensors.keys() - set(taken):
        if name.rpartition(".")[2] in _PARTS:
            yield f"{name} is a part of a quantized weight that was not compared"


def source_fault(source: Checkpoint, weight: Weight) -> str:
    """How what was converted differs from what is read here; "" if it does not."""
    own = {leaf: source.tensors.get(f"{weight.name}.{leaf}") for leaf in ("weight", *_PARTS)}
    codes = own["weight_packed"] or own["weight"]
    scale = own["weight_scale_inv"] or own["weight_scale"]
    top = own["weight_global_scale" if own["weight_packed"] else "weight_scale_2"]
    measured = next((own[leaf] for leaf in _INPUTS if own[leaf]), None)
    if codes is None or scale is None:
        return f"{weight.name}: no codes and scales by names that are known"
    if (codes, scale, top, measured) != (
        *(weight.codes, weight.scale, weight.tensor_scale),
        weight.input_scale,
    ):
        return f"{weight.name}: was converted from other tensors than its names tell"
    width = 2 if codes.dtype == "U8" else 1
    shape = (codes.shape[0], width * codes.shape[-1])
    if weight.shape != shape or weight.format not in _formats(codes, scale, top):
        return f"{weight.name}: was converted as {weight.format} {list(weight.shape)}, not so held"
    return ""


def _formats(codes: TensorInfo, scale: TensorInfo, top: TensorInfo | None) -> list[BlockFormat]:
    """What the tensors can be. Several fit only where all mean the same, as one block of FP8."""
    n, k = codes.shape[0], codes.shape[-1]
    if codes.dtype == "U8":
        is_nvfp4 = top is not None and scale.dtype == "F8_E4M3" and scale.shape == (n, k // 8)
        is_mxfp4 = top is None and scale.dtype in ("U8", "F8_E8M0") and scale.shape == (n, k // 16)
        return [NVFP4] * is_nvfp4 + [MXFP4] * is_mxfp4
    if codes.dtype != "F8_E4M3" or top is not None:
        return []
    rows, columns = -(-n // 128), -(-k // 128)
    found = [FP8] if scale.size == 1 else []
    if scale.shape in ((rows, columns), (rows, 1, columns, 1)):
        found.append(FP8_BLOCK)
    if scale.shape in ((n,), (n, 1)):
        found.append(FP8_CHANNEL)
    return found


def read_source(source: Checkpoint, weight: Weight) -> Written:
    """The source's tensors, to be decoded by the specification and not by the definition."""
    codes = source.raw(weight.codes.name).reshape(weight.shape[0], -1)
    top = np.float32(1)
    if weight.float_scale is not None:
        stored = number(source, weight.float_scale.name)
        if weight.float_scale.name.endswith("_global_scale"):
            with np.errstate(divide="ignore"):
                stored = np.float32(1) / stored
        if weight.format in (NVFP4, MXFP4):
            top = stored[0]
        else:
            shape = {FP8: (1, 1), FP8_CHANNEL: (weight.shape[0], 1)}.get(
                weight.format, tuple(-(-extent // 128) for extent in weight.shape)
            )
            return Written(weight.format, codes, stored.reshape(shape), top)
    raw = source.raw(weight.scale.name).reshape(weight.shape[0], -1)
    return Written(weight.format, codes, raw, top)
