"""A checkpoint folder as one GGUF file, as llama.cpp's own converter would write it, without loss.

NVFP4 and MXFP4 weights only have their nibbles rearranged; their tensor scale is a tensor beside
them. What is not quantized goes as BF16 or, by choice, Q8_0; FP8 weights are decoded, for GGUF has
no FP8. Where llama.cpp computes in float32 (norms, biases, router, convolution) the file has F32.
Whatever has no place in the file is named in the result, and a name nobody knows is an error.

Two things differ from llama.cpp's converter on purpose: a tensor scale is left out only where it is
exactly 1, not where it is near, and weight-only modules are tagged in every layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import Contents, Module, read_contents
from nybble.checkpoint.dialects import declaration_of, read_json
from nybble.checkpoint.gguf import Field
from nybble.checkpoint.gguf_blocks import BY_NAME, encode, mxfp4_blocks, nvfp4_blocks, to_bf16
from nybble.checkpoint.gguf_writer import GGUFSpec, GGUFWriter
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.errors import FormatError, ModelError, RecipeError
from nybble.families import find_family
from nybble.families.dimensions import Dimensions
from nybble.formats.element import F32Array, U8Array
from nybble.progress import Progress
from nybble.rewrite.gguf_metadata import model_fields, rope_factors
from nybble.rewrite.gguf_names import (
    ADD_ONE,
    FLOAT32,
    NEGATIVE_EXP,
    VALUE_COLUMNS,
    Architecture,
    Indices,
    Place,
    is_vision,
    of_model_type,
    order,
    order_length,
    place,
)
from nybble.rewrite.gguf_tokenizer import tokenizer_fields

#: What `--rest` may say.
RESTS = ("bf16", "q8_0")
#: llama.cpp's numbers of whole-file types.
_FILE_TYPES = {"bf16": 32, "q8_0": 7, "MXFP4": 38, "NVFP4": 39}
#: Weights decoded at a time, by a thread.
_CHUNK = 1 << 22

#: Dtypes whose numbers are the weights.
_PLAIN = ("BF16", "F16", "F32", "F64")
_CODES = ("weight_packed", "weight")
_SCALES = ("weight_scale", "weight_scale_inv")
_TENSOR_SCALES = ("weight_scale_2", "weight_global_scale")
_INPUT_SCALES = ("input_scale", "input_global_scale")


@dataclass(frozen=True, slots=True)
class GGUFResult:
    """What was written. `rounded` counts the values of a tensor that BF16 cannot hold, by GGUF
    name; `left_out` are sentences on what the file has no place for."""

    path: Path
    architecture: str
    nbytes: int
    types: Mapping[str, int]
    rounded: Mapping[str, int]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix or vector of the checkpoint, or rows of one, on its way into a GGUF tensor.

    `module` is set where it is quantized. `shape` is [N, K] of weights, or [N] of a vector; `first`
    its first row and `matrix` its place in a stack.
    """

    source: TensorInfo
    place: Place
    shape: tuple[int, ...]
    module: Module | None = None
    matrix: int | None = None
    first: int = 0

    @property
    def held(self) -> str:
        return self.module.kind.held if self.module else "plain"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One GGUF tensor of matrices: its parts are the matrices of a stack, or one."""

    spec: GGUFSpec
    parts: tuple[_Part, ...]


@dataclass
class _Plan:
    """All of a file before anything is written."""

    fields: dict[str, Field] = field(default_factory=dict)
    tensors: list[_Tensor] = field(default_factory=list)
    vectors: dict[str, F32Array] = field(default_factory=dict)  # scales and RoPE factors
    left_out: list[str] = field(default_factory=list)

    @property
    def specs(self) -> list[GGUFSpec]:
        made = [GGUFSpec(name, "F32", v.shape) for name, v in self.vectors.items()]
        return [*(t.spec for t in self.tensors), *made]


def write_gguf(
    checkpoint: Checkpoint,
    out: Path,
    *,
    rest: str = "bf16",
    threads: int = 1,
    progress: Progress | None = None,
) -> GGUFResult:
    """Write the checkpoint as the GGUF file `out`, which must not exist.

    `rest` is the type of matrices that are not four-bit: "bf16", or "q8_0", which rounds them.
    Raises ModelError for architectures and tensors without a place in GGUF, FormatError for values
    that cannot be held, TextError for the tokenizer, CheckpointError and DoesNotFit for files.
    """
    if rest not in RESTS:
        raise RecipeError(f"--rest {rest!r}: expected one of {', '.join(RESTS)}")
    progress = progress or Progress()
    family = find_family(checkpoint.config)
    arch = of_model_type(family.model_type)
    dims = family.dimensions(checkpoint.config)
    plan = _plan(checkpoint, arch, dims, rest)
    for line in plan.left_out:
        progress.say(f"left out: {line}")
    rounded: Counter[str] = Counter()
    with GGUFWriter(out, plan.fields, plan.specs) as writer:
        progress.stage("gguf", writer.size)
        for name, values in plan.vectors.items():
            writer.write(name, encode("F32", values))
        _write_tensors(_Job(checkpoint, dims, writer, rounded, progress), plan.tensors, threads)
        writer.finish()
    return GGUFResult(
        path=writer.out,
        architecture=arch.name,
        nbytes=writer.size,
        types=Counter(t.type for t in writer.tensors.values()),
        rounded=dict(rounded),
        left_out=tuple(plan.left_out),
    )


# --------------------------------------------------------------------------------- before the write


def _plan(checkpoint: Checkpoint, arch: Architecture, dims: Dimensions, rest: str) -> _Plan:
    contents = read_contents(checkpoint, declaration_of(checkpoint))
    plan = _Plan()
    parts = _parts(contents, arch, dims, plan)
    mtp_layers = _mtp_layers(parts, dims)
    plan.tensors = _tensors(parts, rest)
    _check_vocabulary(plan.specs, dims)
    plan.vectors = _scale_vectors(checkpoint, plan.tensors)
    factors = rope_factors(checkpoint.config, dims)
    if factors is not None:
        plan.vectors["rope_freqs.weight"] = factors
    plan.fields = {
        "general.architecture": Field("str", arch.name),
        "general.type": Field("str", "model"),
        **_general(checkpoint, plan, rest),
        **model_fields(arch, checkpoint.config, dims, mtp_layers),
        **tokenizer_fields(
            checkpoint.path, checkpoint.config, dims.vocab, is_llama=arch.name == "llama"
        ),
        "general.quantization_version": Field("u32", 2),
        **_precision_tags(plan.tensors),
    }
    return plan


def _check_vocabulary(specs: Sequence[GGUFSpec], dims: Dimensions) -> None:
    """Every row of the embedding gets a text: config.json alone must not say how many."""
    for spec in specs:
        if spec.name == "token_embd.weight" and spec.shape[0] != dims.vocab:
            raise ModelError(
                f"config.json: vocab_size is {dims.vocab}, but the embedding has "
                f"{spec.shape[0]} rows; take config.json and weights from the same model"
            )


def _parts(
    contents: Contents, arch: Architecture, dims: Dimensions, plan: _Plan
) -> dict[str, list[_Part]]:
    """Every part by its GGUF name; what has no place is told in the plan, or refused."""
    parts: dict[str, list[_Part]] = {}
    homeless: list[str] = []
    left: Counter[str] = Counter()
    for module in contents.modules:
        if is_vision(module.name):
            left["vision"] += len(module.tensors)
            continue
        _check(module)
        for tensor in module.tensors:
            if tensor.name.endswith(".inv_freq"):
                left["rotary"] += 1
            elif module.kind.is_quantized and _is_side(module, tensor):
                is_fp8 = module.kind.held.startswith("fp8")
                left["input"] += is_fp8 and tensor.name.endswith(_INPUT_SCALES)
            elif not _add(parts, arch, dims, module, tensor):
                homeless.append(tensor.name)
    if homeless:
        raise ModelError(
            f"{len(homeless)} tensors have no place in a GGUF file of architecture {arch.name}, "
            f"the first is {homeless[0]!r}; nothing is left out silently: remove them from the "
            "checkpoint if they are not needed"
        )
    left["kv"] = len(contents.kv_scales)
    plan.left_out = [text.format(left[key]) for key, text in _LEFT_OUT.items() if left[key]]
    return parts


_LEFT_OUT = {
    "vision": "{} tensors of the vision tower: they go into a file of their own (mmproj), which "
    "llama.cpp's convert_hf_to_gguf.py --mmproj makes from the original model",
    "rotary": "{} tables of rotary frequencies, which llama.cpp computes",
    "input": "{} input scales of FP8 modules: GGUF has no FP8, their weights are decoded",
    "kv": "{} scales of the KV cache: llama.cpp chooses its cache format at run time",
}


def _check(module: Module) -> None:
    held = module.kind.held
    if module.kind.problem:
        raise FormatError(f"{module.name}: {module.kind.problem}; repair the checkpoint first")
    if module.kind.is_quantized and held not in (
        "nvfp4",
        "mxfp4",
        "fp8",
        "fp8_channel",
        "fp8_block",
    ):
        raise FormatError(
            f"{module.name}: holds {held}; GGUF gets NVFP4, MXFP4, FP8 and plain weights"
        )


def _is_side(module: Module, tensor: TensorInfo) -> bool:
    leaf = tensor.name[len(module.name) + 1 :]
    return leaf in (*_SCALES, *_TENSOR_SCALES, *_INPUT_SCALES)


def _add(
    parts: dict[str, list[_Part]],
    arch: Architecture,
    dims: Dimensions,
    module: Module,
    tensor: TensorInfo,
) -> bool:
    """Whether the tensor has a place; then its parts are added."""
    leaf = tensor.name[len(module.name) + 1 :]
    is_codes = module.kind.is_quantized and leaf in _CODES
    if not is_codes and tensor.dtype not in _PLAIN:
        raise FormatError(
            f"{tensor.name}: holds {tensor.dtype} and no scales that say what it means; expected "
            f"{', '.join(_PLAIN)}"
        )
    stack = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf)
    if stack is not None and len(tensor.shape) == 3:
        return _add_stack(parts, arch, dims, tensor, stack)
    name = f"{module.name}.weight" if is_codes else tensor.name
    found = place(arch, name, dims.layers)
    if found is None:
        return False
    shape = _weights(tensor, module) if is_codes else _squeezed(found, tensor.shape)
    _check_heads(tensor, found, shape, dims)
    part = _Part(tensor, found, shape, module if is_codes else None)
    parts.setdefault(found.name, []).append(part)
    return True


def _check_heads(
    tensor: TensorInfo, found: Place, shape: tuple[int, ...], dims: Dimensions
) -> None:
    """Rows or columns that are reordered by heads are as many as config.json says."""
    expected = order_length(found.order, dims)
    along = -1 if found.order == VALUE_COLUMNS else 0
    if expected is not None and shape[along] != expected:
        what = "columns" if along else "rows"
        raise ModelError(
            f"{tensor.name}: expected {expected} {what} by the heads in config.json, "
            f"found {shape[along]}; the file belongs to another configuration"
        )


def _add_stack(
    parts: dict[str, list[_Part]],
    arch: Architecture,
    dims: Dimensions,
    tensor: TensorInfo,
    projections: tuple[str, ...],
) -> bool:
    container = tensor.name.rpartition(".")[0]
    experts, rows, k = tensor.shape
    each = rows // len(projections)
    for i, projection in enumerate(projections):
        for expert in range(experts):
            name = f"{container}.{expert}.{projection}.weight"
            found = place(arch, name, dims.layers)
            if found is None:
                return False
            part = _Part(tensor, found, (each, k), matrix=expert, first=i * each)
            parts.setdefault(found.name, []).append(part)
    return True


def _weights(codes: TensorInfo, module: Module) -> tuple[int, ...]:
    """[N, K] of a quantized weight."""
    is_packed = module.kind.held in ("nvfp4", "mxfp4")
    if len(codes.shape) != 2:
        raise FormatError(
            f"{codes.name}: shape {list(codes.shape)}; quantized stacks of experts are not written "
            "to GGUF: convert to the compressed-tensors or modelopt layout first"
        )
    return codes.shape[0], codes.shape[1] * (2 if is_packed else 1)


def _squeezed(found: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution [C, 1, W] is a matrix in GGUF; a 0-d tensor a vector."""
    if found.name.endswith("ssm_conv1d.weight"):
        return tuple(n for n in shape if n != 1)
    return shape or (1,)


def _mtp_layers(parts: Mapping[str, Sequence[_Part]], dims: Dimensions) -> int:
    """MTP layers that the files hold; config.json may promise more."""
    blocks = {int(name.split(".")[1]) for name in parts if name.startswith("blk.")}
    return max(0, *(b + 1 - dims.layers for b in blocks)) if blocks else 0


def _tensors(parts: Mapping[str, list[_Part]], rest: str) -> list[_Tensor]:
    tensors = []
    for name, found in parts.items():
        found = sorted(found, key=lambda p: -1 if p.place.expert is None else p.place.expert)
        first = found[0]
        _check_stack(name, found)
        kind = _type_of(name, first, rest)
        if first.shape[-1] % BY_NAME[kind].block:
            kind = _fallback(name, first, kind)
        is_stack = first.place.expert is not None
        shape = (len(found), *first.shape) if is_stack else first.shape
        tensors.append(_Tensor(GGUFSpec(name, kind, shape), tuple(found)))
    return tensors


def _check_stack(name: str, parts: Sequence[_Part]) -> None:
    """All matrices of a stack have one form, and none is missing or there twice."""
    first = parts[0]
    numbers = [p.place.expert for p in parts]
    if numbers not in ([None], list(range(len(parts)))):
        raise ModelError(
            f"{name}: expected experts 0 to {len(parts) - 1}, once each, found {numbers[:20]}"
        )
    for part in parts:
        if (part.held, part.shape) != (first.held, first.shape):
            raise ModelError(
                f"{name}: a GGUF stack has one form, but {first.source.name} is {first.held} "
                f"{list(first.shape)} and {part.source.name} {part.held} {list(part.shape)}; "
                "convert to bf16 first"
            )


def _type_of(name: str, part: _Part, rest: str) -> str:
    if part.held in ("nvfp4", "mxfp4"):
        return part.held.upper()
    short = name.rpartition(".")[0].rpartition(".")[2]
    is_plain = len(part.shape) < 2 or short in FLOAT32 or not name.endswith(".weight")
    return "F32" if is_plain else rest.upper()


def _fallback(name: str, part: _Part, kind: str) -> str:
    k, block = part.shape[-1], BY_NAME[kind].block
    if kind == "Q8_0":
        return "BF16"
    raise FormatError(
        f"{part.source.name}: K is {k}, but GGUF's {kind} blocks have {block} weights: {name} can "
        "not be written without requantizing: convert to bf16 first"
    )


def _precision_tags(tensors: Sequence[_Tensor]) -> dict[str, Field]:
    """Tell llama.cpp which NVFP4 weights are not meant for four-bit activations."""
    names = sorted(t.spec.name for t in tensors if t.spec.type == "NVFP4" and _is_weight_only(t))
    if not names:
        return {}
    return {
        "general.tensor_extra.name": Field("[str]", names),
        "general.tensor_extra.prec_a4": Field("[bool]", np.zeros(len(names), dtype=np.bool_)),
    }


def _is_weight_only(tensor: _Tensor) -> bool:
    module = tensor.parts[0].module
    return module is not None and module.declared is not None and not _runs_a4(module)


def _runs_a4(module: Module) -> bool:
    return module.declared is not None and module.declared.activation == "FP4"


# ------------------------------------------------------------------------------ scales, small facts


def _scale_vectors(checkpoint: Checkpoint, tensors: Sequence[_Tensor]) -> dict[str, F32Array]:
    """`.scale` and `.input_scale` of the NVFP4 tensors, [1] or one per expert."""
    vectors: dict[str, F32Array] = {}
    for tensor in tensors:
        if tensor.spec.type != "NVFP4":
            continue
        base = tensor.spec.name.removesuffix("weight")
        for suffix, leaves in (("scale", _TENSOR_SCALES), ("input_scale", _INPUT_SCALES)):
            found = [_multiplier(checkpoint, part.module, leaves) for part in tensor.parts]
            values = np.array(found, dtype=np.float32)
            if (values != 1).any():
                vectors[base + suffix] = values
    return vectors


def _multiplier(
    checkpoint: Checkpoint, module: Module | None, leaves: tuple[str, ...]
) -> np.float32:
    """A stored scalar as a multiplier; 1 where there is none."""
    info = module.tensor(*leaves) if module else None
    if info is None:
        return np.float32(1)
    stored = checkpoint.array(info.name).astype(np.float32).reshape(-1)
    value = np.float32(stored[0]) if stored.size else np.float32("nan")
    if stored.size != 1 or not np.isfinite(value) or value <= 0:
        raise FormatError(
            f"{info.name}: expected one positive number, found {stored[:4].tolist()}; "
            "repair the checkpoint first"
        )
    return np.float32(1) / value if info.name.endswith("_global_scale") else value


def _general(checkpoint: Checkpoint, plan: _Plan, rest: str) -> dict[str, Field]:
    types = {t.spec.type for t in plan.tensors}
    kind = next((t for t in ("NVFP4", "MXFP4") if t in types and rest == "bf16"), rest)
    fields = {
        "general.name": Field("str", _title(checkpoint.path)),
        "general.size_label": Field("str", _size_label(plan)),
        "general.file_type": Field("u32", _FILE_TYPES[kind]),
    }
    sampling = read_json(checkpoint, "generation_config.json") or {}
    for key, name, form in (
        ("top_k", "top_k", "i32"),
        ("top_p", "top_p", "f32"),
        ("min_p", "min_p", "f32"),
        ("temperature", "temp", "f32"),
        ("repetition_penalty", "penalty_repeat", "f32"),
    ):
        value = sampling.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            fields[f"general.sampling.{name}"] = Field(
                form, int(value) if form == "i32" else float(value)
            )
    return fields


def _title(path: Path) -> str:
    """The folder's name as words."""
    words = path.resolve().name.replace("-", " ").split()
    return (
        " ".join(w.title() if w.islower() and not w[0].isdigit() else w for w in words) or "model"
    )


def _size_label(plan: _Plan) -> str:
    """Parameters as model pages write them, "8x4.2M" for experts: shared and one expert's each."""
    shared = expert = experts = 0
    for spec in plan.specs:
        if "_exps." in spec.name and len(spec.shape) == 3:
            expert += prod(spec.shape[1:])
            experts = spec.shape[0]
        else:
            shared += prod(spec.shape)
    count = shared + expert
    unit, name = next(
        ((u, n) for u, n in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if count > u), (1e3, "K")
    )
    digits = max(2 - len(str(round(count / unit)).lstrip("0")), 0)
    label = f"{count / unit:.{digits}f}{name}"
    return f"{experts}x{label}" if experts else label


# ---------------------------------------------------------------------------------------- the write


@dataclass
class _Job:
    """What every write needs."""

    checkpoint: Checkpoint
    dims: Dimensions
    writer: GGUFWriter
    rounded: Counter[str]
    progress: Progress
    lock: Lock = field(default_factory=Lock)

    def put(self, name: str, data: U8Array, at: int, lost: int = 0) -> None:
        self.writer.write(name, data, at)
        with self.lock:
            self.progress.advance(data.nbytes, name)
            if lost:
                self.rounded[name] += lost


def _write_tensors(job: _Job, tensors: Sequence[_Tensor], threads: int) -> None:
    """Every chunk of every tensor, by several threads; the first error ends it."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for tensor in tensors:
            work = [pool.submit(task) for task in _tasks(job, tensor)]
            try:
                for one in work:
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            for name in {p.source.name for p in tensor.parts}:
                job.checkpoint.drop_pages(name)


def _tasks(job: _Job, tensor: _Tensor) -> Iterator[Callable[[], None]]:
    spec = tensor.spec
    each = spec.nbytes // len(tensor.parts)
    for i, part in enumerate(tensor.parts):
        moved = order(part.place.order, job.dims)
        is_columns = part.place.order == VALUE_COLUMNS
        rows = part.shape[0]
        step = max(_CHUNK // prod(part.shape[1:]), 1) if len(part.shape) > 1 else rows
        for first in range(0, rows, step):
            stop = min(first + step, rows)
            picked = slice(first, stop) if is_columns or moved is None else moved[first:stop]
            columns = moved if is_columns else None
            at = i * each + first * (each // rows)
            yield _task(job, spec, part, picked, columns, at)


def _task(
    job: _Job,
    spec: GGUFSpec,
    part: _Part,
    rows: slice | Indices,
    columns: Indices | None,
    at: int,
) -> Callable[[], None]:
    def run() -> None:
        try:
            if spec.type in ("NVFP4", "MXFP4"):
                job.put(spec.name, _repacked(job.checkpoint, part, rows, columns, spec.type), at)
            else:
                job.put(spec.name, *_encoded(job.checkpoint, part, rows, columns, spec.type, at))
        except FormatError as error:
            raise FormatError(f"{part.source.name}: {error}") from error

    return run


def _repacked(
    checkpoint: Checkpoint,
    part: _Part,
    rows: slice | Indices,
    columns: Indices | None,
    kind: str,
) -> U8Array:
    """The blocks of four-bit rows: codes and block scales, rearranged."""
    assert part.module is not None
    scale = part.module.tensor(*_SCALES)
    assert scale is not None
    codes = checkpoint.array(part.source.name).view(np.uint8)[rows]
    scales = checkpoint.array(scale.name).view(np.uint8)[rows]
    if columns is not None:
        codes, scales = _block_columns(codes, scales, columns)
    return nvfp4_blocks(codes, scales) if kind == "NVFP4" else mxfp4_blocks(codes, scales)


def _block_columns(codes: U8Array, scales: U8Array, columns: Indices) -> tuple[U8Array, U8Array]:
    """Columns in another order, whole blocks at a time."""
    size = len(columns) // scales.shape[1]
    starts = columns.reshape(-1, size)
    if (starts[:, :1] % size).any() or (np.diff(starts, axis=1) != 1).any():
        raise FormatError(
            f"value heads are no multiple of the block of {size}: their order cannot be changed "
            "without requantizing; convert to bf16 first"
        )
    blocks = starts[:, 0] // size
    moved = codes.reshape(len(codes), -1, size // 2)[:, blocks]
    return moved.reshape(codes.shape), scales[:, blocks]


def _encoded(
    checkpoint: Checkpoint,
    part: _Part,
    rows: slice | Indices,
    columns: Indices | None,
    kind: str,
    at: int,
) -> tuple[U8Array, int, int]:
    """Bytes, their place, and how many values they round."""
    stored = _rows(checkpoint, part)[rows]
    if columns is not None:
        stored = stored[:, columns]
    if kind == "BF16" and part.source.dtype == "BF16" and not part.place.change:
        return np.ascontiguousarray(stored).reshape(-1).view(np.uint8), at, 0
    values = stored.astype(np.float32)
    if part.module is not None:
        values = _times_scale(checkpoint, part.module, values, rows, columns)
    if part.place.change == ADD_ONE:
        values = values + np.float32(1)
    elif part.place.change == NEGATIVE_EXP:
        # In float64, then rounded once: the nearest float32, which libraries miss by one at times.
        values = (-np.exp(values.astype(np.float64))).astype(np.float32)
    if kind == "BF16":
        bits, lost = to_bf16(np.ascontiguousarray(values))
        return bits.view(np.uint8), at, lost
    return encode(kind, values), at, 0


def _rows(checkpoint: Checkpoint, part: _Part) -> NDArray[np.generic]:
    """The part as [N, K] or [N], in the checkpoint's dtype."""
    array = checkpoint.array(part.source.name)
    if part.matrix is None:
        return array.reshape(part.shape)
    return array[part.matrix, part.first : part.first + part.shape[0]]


def _times_scale(
    checkpoint: Checkpoint,
    module: Module,
    values: F32Array,
    rows: slice | Indices,
    columns: Indices | None,
) -> F32Array:
    """FP8 codes times their scales: of the tensor, of each row, or of blocks of 128 x 128."""
    info = module.tensor(*_SCALES)
    assert info is not None
    scales = checkpoint.array(info.name).astype(np.float32)
    if scales.size == 1:
        return values * scales.reshape(())
    if module.kind.held == "fp8_channel":
        return values * scales.reshape(-1, 1)[rows]
    blocks = scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else scales.shape[-2])
    total = np.arange(len(blocks) * 128)[rows] // 128
    across = np.arange(values.shape[1]) if columns is None else columns
    return values * blocks[total][:, across // 128]
