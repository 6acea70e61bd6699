"""The proof of a conversion between containers.

Codes and block scales must be equal byte for byte. A value is a function of its code, its block
scale and the tensor scale, so all 4,096 pairs are decoded on both sides instead of each element,
and rows at both ends of the matrix; where these differ, every element is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

import numpy as np

from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import Checkpoint
from nybble.formats.block import FP8_BLOCK, MXFP4, NVFP4, BlockFormat
from nybble.formats.tensor import BlockScaledTensor
from nybble.progress import Progress
from nybble.rewrite.held import Weight, multiplier
from nybble.rewrite.proof import (
    Accounts,
    Difference,
    F32Array,
    Proof,
    differ,
    drop,
    prove_all,
    same_bits,
    same_bytes,
)
from nybble.rewrite.proof_reading import Names, Written, names_in, number, read_module
from nybble.rewrite.proof_source import forgotten, may_be_left_out, read_source, source_fault

#: Elements that are decoded at a time: few enough for the cache.
_ELEMENTS = 1 << 18
_EDGE_ELEMENTS = 1 << 12


def prove_layout(
    source: Checkpoint,
    written: Checkpoint,
    target: str,
    weights: Sequence[Weight],
    dropped: Iterable[str],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Proof:
    """Hold a checkpoint in another container against its source."""
    accounts = Accounts(source, written, dropped)
    declaration = declaration_of(source)
    measured = {
        w.input_scale.name
        for w in weights
        if w.input_scale and (said := declaration.of(w.name)) and said.needs_input_scale
    }
    accounts.keep(lambda name: may_be_left_out(name, target, measured))
    work = []
    for weight in weights:
        names = names_in(target, weight.format)
        accounts.take([t.name for t in weight.tensors], _leaves(written, weight, names))
        if fault := source_fault(source, weight):
            accounts.problems.append(fault)
            continue
        work.append(partial(_prove_module, source, written, target, weight))
    accounts.problems += forgotten(source, accounts.taken)
    kv_scales = [n for n in source.tensors if n.endswith((".k_scale", ".v_scale", ".q_scale"))]
    for name in kv_scales:
        module, _, leaf = name.rpartition(".")
        at = re.sub(rf"\.{leaf[0]}_proj$", "", module)
        own = f"{at}.{leaf[0]}_proj.{leaf}" if target == "modelopt" else f"{at}.{leaf}"
        accounts.take([name], [own])
        work.append(partial(_prove_scale, source, written, name, own, "kv_scale", divides=False))
    return prove_all(accounts, work, threads, progress or Progress())


def _leaves(written: Checkpoint, weight: Weight, names: Names) -> list[str]:
    leaves = (names.codes, names.scale, names.tensor_scale, names.input_scale)
    return [n for leaf in leaves if leaf and (n := f"{weight.name}.{leaf}") in written.tensors]


def _prove_module(source: Checkpoint, written: Checkpoint, target: str, weight: Weight) -> Proof:
    found = Proof(tensors=sum(1 for t in weight.tensors if t is not weight.input_scale))
    module = read_module(written, weight, target)
    if isinstance(module, str):
        found.problems.append(module)
        return found
    n, k = weight.shape
    found.values += n * k
    scales = weight.multiplier(source)
    own = read_source(source, weight)
    other = own.top if weight.format in (NVFP4, MXFP4) else own.scale
    if scales is not None and not same_bits(scales.reshape(-1), np.float32(other).reshape(-1)):
        found.problems.append(f"{weight.name}: its scales can be read in two ways")
    if not _has_same_codes(source, weight, module):
        found.problems.append(f"{weight.name}: codes or block scales are not those of the source")
    elif not _is_same_function(source, weight, module, scales):
        _count_weight(source, weight, module, scales, found)
    names = names_in(target, weight.format)
    at = f"{weight.name}.{names.input_scale}"
    measured = weight.input_scale
    if measured is not None and at in written.tensors:
        divides = names.divides
        found.take(_prove_scale(source, written, measured.name, at, "input_scale", divides))
    drop(source, (t.name for t in weight.tensors))
    drop(written, _leaves(written, weight, names))
    return found


def _has_same_codes(source: Checkpoint, weight: Weight, module: Written) -> bool:
    """Whether codes and block scales are equal, byte for byte."""
    if not same_bytes(source.raw(weight.codes.name), module.codes.reshape(-1)):
        return False
    if weight.format not in (NVFP4, MXFP4):
        return True
    return same_bytes(source.raw(weight.scale.name), module.scale.reshape(-1).view(np.uint8))


def _is_same_function(
    source: Checkpoint, weight: Weight, module: Written, scales: F32Array | None
) -> bool:
    """Whether all pairs of code and scale mean the same on both sides; their bytes are equal.

    Rows at both ends are decoded whole on both sides too: that tells the order of codes and the
    place of scales.
    """
    if weight.format in (NVFP4, MXFP4):
        top = float(scales.reshape(())) if scales is not None else 1.0
        if not _pairs_agree(weight.format, top, float(module.top)):
            return False
    else:
        assert scales is not None
        if not same_bits(scales.reshape(-1), module.scale.astype(np.float32).reshape(-1)):
            return False
    n, k = weight.shape
    height = 128 if weight.format is FP8_BLOCK else max(1, _EDGE_ELEMENTS // k)
    last_edge = (n - 1) // height * height
    for first in {0, last_edge}:
        last = min(first + max(1, _EDGE_ELEMENTS // k), n)
        one = weight.rows(source, first, last, scales).dequantize()
        if not same_bits(one, module.rows(first, last)):
            return False
    return True


@lru_cache(maxsize=256)
def _pairs_agree(fmt: BlockFormat, one: float, other: float) -> bool:
    """All 256 block scales times all 16 codes, under each side's tensor scale."""
    k = 16 if fmt is NVFP4 else 32
    codes = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), k // 16)
    codes = np.ascontiguousarray(np.broadcast_to(codes, (256, k // 2)))
    scale = np.arange(256, dtype=np.uint8).reshape(256, 1)
    top = np.asarray(one, dtype=np.float32) if fmt is NVFP4 else None
    mine = BlockScaledTensor(fmt, (256, k), codes, scale, top).dequantize()
    return same_bits(mine, Written(fmt, codes, scale, np.float32(other)).rows(0, 256))


def _count_weight(
    source: Checkpoint, weight: Weight, module: Written, scales: F32Array | None, found: Proof
) -> None:
    """Decode every element on both sides."""
    n, k = weight.shape
    step = max(128, _ELEMENTS // k // 128 * 128)
    count, largest = 0, 0.0
    for first in range(0, n, step):
        last = min(first + step, n)
        one = weight.rows(source, first, last, scales).dequantize()
        here, worst = differ(one, module.rows(first, last))
        count, largest = count + here, max(largest, worst)
    if count:
        found.differing.append(Difference(weight.name, "weight", count, n * k, largest))


def _prove_scale(
    source: Checkpoint, written: Checkpoint, name: str, own: str, part: str, divides: bool
) -> Proof:
    found = Proof(tensors=1, values=1)
    if own not in written.tensors:
        found.problems.append(f"{own} is absent")
        return found
    other = number(written, own)
    with np.errstate(divide="ignore"):
        other = np.float32(1) / other if divides else other
    one = multiplier(source, source.tensors[name]).reshape(-1)
    if one.size != other.size:
        found.problems.append(f"{own} has {other.size} values, {name} {one.size}")
        return found
    count, largest = differ(np.ascontiguousarray(one), np.ascontiguousarray(other))
    if count:
        found.differing.append(Difference(name, part, count, one.size, largest))
    return found
