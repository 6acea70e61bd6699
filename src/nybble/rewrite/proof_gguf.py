"""The proof of a conversion to or from GGUF: every value of one side against the other's.

The folder is decoded by the definition (`formats/tensor.py`), the file by the block codecs of
`checkpoint/gguf_blocks.py`, read back by name. llama.cpp multiplies code and block scale first, the
tensor scale last; the folder's values are taken in that order here, so that equal codes and scales
are equal values. Numbers that GGUF has otherwise (norms plus one, -exp(A_log)) are compared as the
file has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import Contents
from nybble.checkpoint.gguf_blocks import decode
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.errors import CheckpointError
from nybble.formats.block import NVFP4
from nybble.formats.element import F32Array
from nybble.progress import Progress
from nybble.rewrite.from_gguf import GGUFModel, GGUFPart
from nybble.rewrite.gguf_names import NEGATIVE_EXP, is_vision
from nybble.rewrite.held import Weight, multiplier, plain_tensors, read_weights
from nybble.rewrite.proof import Difference, Proof, differ
from nybble.rewrite.proof_reading import nearest_bf16

_ELEMENTS = 1 << 21
#: Largest error of Q8_0 in units of a block's step: half of one, and that of its scale in F16.
_Q8_STEPS = 0.6
#: And where that scale is a subnormal of F16, 127 times its rounding.
_Q8_LEAST = 127 * 2.0**-25
_SCALES = (".scale", ".input_scale")


def prove_gguf(
    source: Checkpoint,
    contents: Contents,
    path: Path,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Proof:
    """Hold a GGUF file against the checkpoint folder that it was made of.

    A value may differ where the file has BF16 or Q8_0 and the folder more; the nearest is expected
    then. Vision towers, tables of rotary frequencies and KV scales are no part of such a file.
    """
    progress = progress or Progress()
    with closing(GGUFModel.open(path)) as model:
        weights = read_weights(contents)
        work: list[Callable[[], Proof]] = []
        for weight in weights:
            work.append(partial(_prove_weight, model, source, weight))
        for tensor in plain_tensors(source, contents, weights):
            if not is_vision(tensor.name) and not tensor.name.endswith(".inv_freq"):
                work.append(partial(_prove_plain, model, source, tensor))
        progress.stage("prove", sum(t.size for t in model.file.tensors.values()), "values")
        found = _run(work, threads, progress)
        found.problems += _strangers(model, source, weights, found)
    return found


def _run(work: Iterable[Callable[[], Proof]], threads: int, progress: Progress) -> Proof:
    found = Proof()
    with ThreadPoolExecutor(threads, thread_name_prefix="nybble-proof") as pool:
        for part in pool.map(lambda task: task(), work):
            found.take(part)
            progress.advance(part.values)
    return found


def _strangers(
    model: GGUFModel, source: Checkpoint, weights: Iterable[Weight], found: Proof
) -> Iterator[str]:
    """More values in the file than were compared: tensors without an origin."""
    held = sum(
        t.size
        for name, t in model.file.tensors.items()
        if not name.endswith(_SCALES) and name != "rope_freqs.weight"
    )
    compared = found.values
    if held != compared:
        yield f"{model.file.path} holds {held} values, {compared} have an origin in {source.path}"


def _prove_weight(model: GGUFModel, source: Checkpoint, weight: Weight) -> Proof:
    n, k = weight.shape
    found = Proof(tensors=sum(1 for t in weight.tensors if t is not weight.input_scale))
    part = _part(model, f"{weight.name}.weight", (n, k), found)
    if part is None:
        return found
    scales = weight.multiplier(source)

    def rows(first: int, last: int) -> F32Array:
        if weight.format is not NVFP4 or scales is None:
            return weight.rows(source, first, last, scales).dequantize()
        one = np.ones((), dtype=np.float32)
        return weight.rows(source, first, last, one).dequantize() * scales

    _compare(part, rows, weight.name, found)
    if weight.input_scale is not None:
        _prove_input_scale(source, weight.input_scale, part, found)
    for tensor in weight.tensors:
        source.drop_pages(tensor.name)
    return found


def _prove_input_scale(
    source: Checkpoint, measured: TensorInfo, part: GGUFPart, found: Proof
) -> None:
    """The file may lack it: that of FP8 has no place there."""
    name = part.matrix.tensor.name.removesuffix("weight") + "input_scale"
    info = part.file.tensors.get(name)
    if info is None:
        return
    found.tensors += 1
    stored = decode(info.type, part.file.raw(name))
    at = (part.matrix.place.expert or 0) if len(stored) > 1 else 0
    if np.float32(stored[at]) != multiplier(source, measured).reshape(-1)[0]:
        found.problems.append(f"{name}: is not the input scale {measured.name}")


def _prove_plain(model: GGUFModel, source: Checkpoint, tensor: TensorInfo) -> Proof:
    found = Proof(tensors=1)
    values = source.array(tensor.name)
    if len(tensor.shape) == 3 and tensor.name.rpartition(".")[2] in ("gate_up_proj", "down_proj"):
        parts = model.parts(tensor.name)
        experts = tensor.shape[0]
        for i, part in enumerate(parts):
            projection, expert = divmod(i, experts)
            n = part.shape[0]
            matrix = values[expert, projection * n : (projection + 1) * n]
            _compare(part, partial(_float_rows, matrix), tensor.name, found)
        return found
    shape = tuple(extent for extent in tensor.shape if extent != 1) or (1,)
    only = _part(model, tensor.name, shape, found)
    if only is not None:
        flat = values.reshape(only.shape)
        _compare(only, partial(_float_rows, flat), tensor.name, found)
    source.drop_pages(tensor.name)
    return found


def _float_rows(values: NDArray[np.generic], first: int, last: int) -> F32Array:
    return values[first:last].astype(np.float32)


def _part(model: GGUFModel, name: str, shape: tuple[int, ...], found: Proof) -> GGUFPart | None:
    try:
        (part,) = model.parts(name)
    except CheckpointError as error:
        found.problems.append(str(error))
        return None
    if tuple(n for n in part.shape if n != 1) != tuple(n for n in shape if n != 1):
        found.problems.append(f"{name}: is {list(part.shape)} in the file, expected {list(shape)}")
        return None
    return part


def _compare(part: GGUFPart, rows: Callable[[int, int], F32Array], name: str, found: Proof) -> None:
    """All values of a matrix or vector, some rows at a time."""
    n, k = part.shape[0], int(np.prod(part.shape[1:]))
    count, largest = 0, 0.0
    step = max(128, _ELEMENTS // k // 128 * 128)
    for first in range(0, n, step):
        last = min(first + step, n)
        # Adding zero takes a zero's sign: four-bit codes have one zero in GGUF.
        exact = np.ascontiguousarray(part.redo(rows(first, last))) + np.float32(0)
        stored = np.ascontiguousarray(part.stored(first, last)) + np.float32(0)
        here, worst, fault = _hold(part, exact, stored)
        count, largest = count + here, max(largest, worst)
        if fault:
            found.problems.append(f"{name}: {fault}")
    found.values += n * k
    if count:
        found.differing.append(Difference(name, "weight", count, n * k, largest))


def _hold(part: GGUFPart, exact: F32Array, stored: F32Array) -> tuple[int, float, str]:
    """Values that differ, by how much, and what is wrong with that."""
    count, largest = differ(exact, stored)
    kind = part.matrix.tensor.type
    if not count:
        return 0, 0.0, ""
    if part.matrix.place.change == NEGATIVE_EXP:  # every library rounds exp in its own way
        far = np.abs(exact - stored) > np.spacing(np.abs(stored))
        return int(far.sum()), largest if far.any() else 0.0, "exp is not that" * bool(far.any())
    if kind == "BF16":
        is_nearest = (stored.view(np.uint32) >> 16).astype(np.uint16) == nearest_bf16(exact)
        return count, largest, "" if is_nearest.all() else "values are not the nearest in BF16"
    if kind == "Q8_0":
        step = np.abs(exact).max(axis=-1, keepdims=True) / np.float32(127)
        is_near = np.abs(exact - stored) <= np.float32(_Q8_STEPS) * step + np.float32(_Q8_LEAST)
        return count, largest, "" if is_near.all() else "values are farther off than Q8_0 rounds"
    return count, largest, f"{count} values differ, and {kind} rounds none"


def prove_from_gguf(
    path: Path, written: Checkpoint, *, threads: int = 1, progress: Progress | None = None
) -> Proof:
    """Hold a BF16 folder against the GGUF file that it was made of; values may be rounded to the
    nearest."""
    progress = progress or Progress()
    with closing(GGUFModel.open(path)) as model:
        progress.stage("prove", sum(t.size for t in written.tensors.values()), "values")
        tasks = [partial(_prove_bf16, model, written, name) for name in model.tensors]
        found = _run(tasks, threads, progress)
        extra = [n for n in written.tensors if n not in model.tensors]
        if extra:
            found.problems.append(f"{len(extra)} tensors have no origin, {extra[0]} for one")
    return found


def _prove_bf16(model: GGUFModel, written: Checkpoint, name: str) -> Proof:
    found = Proof(tensors=1)
    info = written.tensors.get(name)
    if info is None or info.dtype != "BF16" or info.shape != model.tensors[name]:
        found.problems.append(f"{name} is absent from the result, or of another shape")
        return found
    parts = model.parts(name)
    experts = info.shape[0] if len(parts) > 1 else 1
    bits = written.raw(name).view("<u2")
    at = 0
    count, largest = 0, 0.0
    for i in range(len(parts)):
        # The file has all experts of a projection together, the folder both projections of one.
        expert, projection = divmod(i, max(len(parts) // experts, 1))
        part = parts[projection * experts + expert]
        n, k = part.shape[0], int(np.prod(part.shape[1:]))
        own = bits[at : at + n * k].reshape(part.shape)
        at += n * k
        exact = part.undo(part.stored())
        if not np.array_equal(nearest_bf16(np.ascontiguousarray(exact)), own):
            found.problems.append(f"{name}: values are not the nearest in BF16")
        back = (own.astype(np.uint32) << 16).view(np.float32)
        here, worst = _lost(part, back)
        count, largest = count + here, max(largest, worst)
    found.values = info.size
    if count:
        found.differing.append(Difference(name, "weight", count, info.size, largest))
    written.drop_pages(name)
    return found


def _lost(part: GGUFPart, values: F32Array) -> tuple[int, float]:
    """Values of the file that BF16 does not bring back."""
    stored = np.ascontiguousarray(part.stored())
    again = np.ascontiguousarray(part.redo(values))
    count, largest = differ(stored, again)
    if count and part.matrix.place.change == NEGATIVE_EXP:
        count = int(np.count_nonzero(np.abs(again - stored) > np.spacing(np.abs(stored))))
    return (count, largest) if count else (0, 0.0)
