"""A GGUF file as a Hugging Face model: names, shapes, orders and values as transformers has them.

`GGUFModel` reads single tensors; `write_bf16_from_gguf` makes a folder of all of them in BF16, with
config.json and tokenizer from the metadata. Tensor scales are multiplied in. A value that BF16
cannot hold is rounded and counted, tensor by tensor; a tensor without a name in the architecture
is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.gguf import GGUFFile, GGUFTensor
from nybble.checkpoint.gguf_blocks import READABLE, decode, nvfp4_bf16, to_bf16
from nybble.checkpoint.safetensors import TensorSpec
from nybble.checkpoint.writer import CheckpointWriter, layout_shards
from nybble.errors import CheckpointError, FormatError, ModelError
from nybble.families import find_family
from nybble.families.dimensions import Dimensions
from nybble.formats.element import F32Array, U8Array
from nybble.progress import Progress
from nybble.rewrite.gguf_config import generation_config, model_config
from nybble.rewrite.gguf_names import (
    ADD_ONE,
    NEGATIVE_EXP,
    VALUE_COLUMNS,
    Architecture,
    Indices,
    Place,
    hugging_face_names,
    of_name,
    order_length,
    place,
    reversed_order,
)
from nybble.rewrite.gguf_tokenizer import tokenizer_files

#: Weights decoded at a time, by a thread.
_CHUNK = 1 << 21
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SIDE = (".scale", ".input_scale")


@dataclass(frozen=True, slots=True)
class BF16Result:
    """What was written. `rounded` counts values that BF16 cannot hold, by Hugging Face name, out of
    `values`; `left_out` are sentences on what the folder has no place for."""

    path: Path
    architecture: str
    tensors: int
    values: int
    rounded: Mapping[str, int]
    types: Mapping[str, int]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix or vector of the file: a tensor, or one expert of a stack; `shape` as in HF."""

    tensor: GGUFTensor
    place: Place
    shape: tuple[int, ...]


class GGUFModel:
    """An open GGUF file by Hugging Face names.

    `tensors` maps the names of a BF16 release to shapes: experts stacked where transformers has
    them so (Qwen3.5), else one by one. `matrix` and `read` know the names of single experts too.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        metadata = file.metadata
        _refuse_split(file)
        self.architecture: Architecture = of_name(metadata.get("general.architecture"))
        self.config = model_config(file, self.architecture)
        self.dims: Dimensions = find_family(self.config).dimensions(self.config)
        self._orders: dict[str, Indices | None] = {}
        self.tensors: Mapping[str, tuple[int, ...]] = self._list()

    @classmethod
    def open(cls, path: Path) -> GGUFModel:
        """Raises CheckpointError for a broken file, ModelError for one of an unknown model."""
        return cls(GGUFFile.open(path))

    @property
    def mtp_layers(self) -> int:
        """Layers of the MTP head."""
        return self.dims.mtp_layers

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""
        value = self.config["max_position_embeddings"]
        assert isinstance(value, int)
        return value

    def read(self, name: str) -> F32Array:
        """The float32 values of a tensor by its Hugging Face name, in its shape.

        What the file's blocks and tensor scale decode to, with orders and changes undone in
        float32. Raises CheckpointError for a name that the file does not have.
        """
        parts = [part.read() for part in self.parts(name)]
        container, _, leaf = name.rpartition(".")
        if leaf not in _STACKS or not container.endswith(".experts"):
            return parts[0]
        projections = len(_STACKS[leaf])
        each = len(parts) // projections
        halves = [np.stack(parts[i * each : (i + 1) * each]) for i in range(projections)]
        return np.concatenate(halves, axis=1)

    def parts(self, name: str) -> list[GGUFPart]:
        """The matrices that a tensor of this name is made of: one, or those of a stack, all experts
        of the first projection, then those of the next."""
        container, _, leaf = name.rpartition(".")
        if leaf not in _STACKS or not container.endswith(".experts"):
            return [self._part(name)]
        return [
            self._part(f"{container}.{expert}.{projection}.weight")
            for projection in _STACKS[leaf]
            for expert in range(self.dims.experts)
        ]

    def close(self) -> None:
        """Give up the file."""
        self.file.close()

    def _part(self, name: str) -> GGUFPart:
        found = place(self.architecture, name, self.dims.layers)
        tensor = self.file.tensors.get(found.name) if found else None
        if found is None or tensor is None:
            raise CheckpointError(f"{self.file.path}: holds no tensor for {name!r}")
        if tensor.type not in READABLE:
            decode(tensor.type, np.empty(0, np.uint8))  # refuses by name
        shape = tensor.shape
        if found.expert is not None:
            if len(shape) != 3 or not found.expert < shape[0]:
                raise CheckpointError(
                    f"{self.file.path}: {tensor.name} has shape {list(shape)}, expected a stack "
                    f"with expert {found.expert}"
                )
            shape = shape[1:]
        return GGUFPart(
            self.file, _Matrix(tensor, found, shape), self._moved(tensor, found.order, shape)
        )

    def _moved(self, tensor: GGUFTensor, kind: str, shape: tuple[int, ...]) -> Indices | None:
        """The order that undoes llama.cpp's, if it fits the tensor."""
        expected = order_length(kind, self.dims)
        if expected is None:
            return None
        along = 0 if not shape else shape[-1] if kind == VALUE_COLUMNS else shape[0]
        if expected != along:
            raise CheckpointError(
                f"{self.file.path}: {tensor.name} has shape {list(shape)}, but the metadata say "
                f"{expected} rows or columns of heads"
            )
        if kind not in self._orders:
            self._orders[kind] = reversed_order(kind, self.dims)
        return self._orders[kind]

    def _list(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and shapes of all tensors; ModelError for one without a name."""
        names = hugging_face_names(self.architecture, self.dims, self.dims.mtp_layers)
        found: dict[str, tuple[int, ...]] = {}
        homeless = []
        for gguf, tensor in self.file.tensors.items():
            if gguf == "rope_freqs.weight":  # told by config.json
                continue
            if gguf.endswith(_SIDE):
                if f"{gguf.rpartition('.')[0]}.weight" not in self.file.tensors:
                    homeless.append(gguf)
            elif gguf not in names:
                homeless.append(gguf)
            else:
                self._check_rank(tensor)
                found |= self._expanded(names[gguf], tensor.shape)
        if homeless:
            raise ModelError(
                f"{self.file.path}: {len(homeless)} tensors have no name in a model of the "
                f"architecture {self.architecture.name}, the first is {homeless[0]!r}"
            )
        problems = find_family(self.config).contradictions(found, self.dims)
        if problems:
            raise ModelError(
                f"{self.file.path}: {len(problems)} tensors contradict the metadata, here in "
                f"the words of config.json; the first is {problems[0]}"
            )
        return found

    def _check_rank(self, tensor: GGUFTensor) -> None:
        """A stack of experts has three dimensions, anything else one or two, and none is 0."""
        is_stack = "_exps." in tensor.name
        is_sound = len(tensor.shape) == 3 if is_stack else len(tensor.shape) in (1, 2)
        if not is_sound or not tensor.size:
            raise CheckpointError(
                f"{self.file.path}: {tensor.name} has shape {list(tensor.shape)}, expected "
                f"{'three dimensions' if is_stack else 'one or two dimensions'} and no 0"
            )

    def _expanded(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        container, is_expert, projection = name.removesuffix(".weight").partition(".mlp.experts.")
        if is_expert:
            base = f"{container}.mlp.experts"
            if not self.architecture.is_hybrid:
                return {f"{base}.{e}.{projection}.weight": shape[1:] for e in range(shape[0])}
            if projection == "down_proj":
                return {f"{base}.down_proj": shape}
            return {f"{base}.gate_up_proj": (shape[0], 2 * shape[1], shape[2])}
        if name.endswith("conv1d.weight"):
            return {name: (shape[0], 1, *shape[1:])}
        return {name: shape}


@dataclass(frozen=True, slots=True)
class GGUFPart:
    """One matrix of an open file, in Hugging Face's order. [N, K], or [N] for vectors."""

    file: GGUFFile
    matrix: _Matrix
    moved: Indices | None

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face has it, but for the convolution's dimension of 1."""
        return self.matrix.shape

    def read(self, start: int = 0, stop: int | None = None) -> F32Array:
        """Rows start:stop, float32. A vector is read whole, and its dimension of 1 comes back for
        the convolution."""
        values = self.undo(self.stored(start, stop))
        if self.matrix.place.name.endswith("ssm_conv1d.weight"):
            return values[:, None, :]
        return values

    def stored(self, start: int = 0, stop: int | None = None) -> F32Array:
        """The same rows in the same order, with llama.cpp's changes of the numbers still in."""
        shape = self.shape
        if len(shape) < 2:
            values = decode(self.matrix.tensor.type, self.file.raw(self.matrix.tensor.name))
            return (values if self.moved is None else values[self.moved])[start:stop]
        begin, end, _ = slice(start, stop).indices(shape[0])
        raw, columns = self._raw(begin, end)
        values = decode(self.matrix.tensor.type, raw).reshape(end - begin, shape[1])
        if columns is not None:
            values = values[:, columns]
        scale = self._scale()
        return values if scale is None else values * scale

    def undo(self, values: F32Array) -> F32Array:
        """Hugging Face's numbers of llama.cpp's."""
        change = self.matrix.place.change
        if change == ADD_ONE:
            return values - np.float32(1)
        if change == NEGATIVE_EXP:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(-values.astype(np.float64)).astype(np.float32)
        return values

    def redo(self, values: F32Array) -> F32Array:
        """llama.cpp's numbers of Hugging Face's."""
        change = self.matrix.place.change
        if change == ADD_ONE:
            return values + np.float32(1)
        if change == NEGATIVE_EXP:
            return (-np.exp(values.astype(np.float64))).astype(np.float32)
        return values

    def bf16(self, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.uint16], int]:
        """BF16 bits of the same rows, one-dimensional, and how many values that rounds."""
        if self.matrix.tensor.type == "NVFP4" and not self.matrix.place.change:
            begin, end, _ = slice(start, stop).indices(self.shape[0])
            raw, columns = self._raw(begin, end)
            scale = self._scale()
            bits = nvfp4_bf16(raw, 1.0 if scale is None else float(scale))
            if bits is not None:
                if columns is not None:
                    bits = bits.reshape(end - begin, -1)[:, columns].reshape(-1)
                return bits, 0
        stored = self.stored(start, stop)
        bits, lost = to_bf16(np.ascontiguousarray(self.undo(stored)))
        return bits, _count_lost(self, stored, bits) if self.matrix.place.change else lost

    def _raw(self, begin: int, end: int) -> tuple[U8Array, Indices | None]:
        """The bytes of rows in Hugging Face's order, and that of the columns if it is another."""
        tensor, total = self.matrix.tensor, self.shape[0]
        is_columns = self.matrix.place.order == VALUE_COLUMNS
        rows: slice | Indices = slice(begin, end)
        if self.moved is not None and not is_columns:
            rows = self.moved[begin:end]
        expert = self.matrix.place.expert or 0
        each = tensor.nbytes // (tensor.size // prod(self.shape))
        raw = self.file.raw(tensor.name)[expert * each : (expert + 1) * each].reshape(total, -1)
        picked = np.ascontiguousarray(raw[rows]).reshape(-1)
        return picked, self.moved if is_columns else None

    def _scale(self) -> np.float32 | None:
        """The tensor scale beside the weight, of this expert."""
        name = self.matrix.tensor.name.removesuffix("weight") + "scale"
        info = self.file.tensors.get(name)
        if info is None or not self.matrix.tensor.name.endswith(".weight"):
            return None
        scales = decode(info.type, self.file.raw(name))
        at = (self.matrix.place.expert or 0) if len(scales) > 1 else 0
        if at >= len(scales):
            raise FormatError(f"{self.file.path}: {name} has {len(scales)} scales, expected more")
        return np.float32(scales[at])


def _refuse_split(file: GGUFFile) -> None:
    count = file.metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"{file.path}: is one of {count} files; join them first: llama-gguf-split --merge"
        )


# ----------------------------------------------------------------------------------- a whole folder


def write_bf16_from_gguf(
    path: Path, out: Path, *, threads: int = 1, progress: Progress | None = None
) -> BF16Result:
    """Write the GGUF file as the Hugging Face folder `out`, which must not exist.

    Raises ModelError for an unknown architecture or tensor, FormatError for a tensor type that is
    not decoded, TextError for a tokenizer that cannot be rebuilt, CheckpointError and DoesNotFit
    for files.
    """
    progress = progress or Progress()
    model = GGUFModel.open(path)
    metadata = model.file.metadata
    documents: dict[str, Mapping[str, object]] = {"config.json": model.config}
    documents |= tokenizer_files(metadata, model.context)
    documents["generation_config.json"] = generation_config(metadata)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in model.tensors.items()]
    rounded: Counter[str] = Counter()
    left_out = _left_out(model)
    for line in left_out:
        progress.say(f"left out: {line}")
    with CheckpointWriter(out, layout_shards(specs), disk=Disk()) as writer:
        progress.stage("bf16", sum(spec.nbytes for spec in specs))
        _write(model, writer, specs, threads, rounded, progress)
        files = {name: _dump(document) for name, document in documents.items()}
        writer.finish(files, (), sum(spec.size for spec in specs))
    model.close()
    return BF16Result(
        path=Path(out),
        architecture=model.architecture.name,
        tensors=len(specs),
        values=sum(spec.size for spec in specs),
        rounded=dict(rounded),
        types=Counter(t.type for t in model.file.tensors.values()),
        left_out=left_out,
    )


def _dump(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _left_out(model: GGUFModel) -> tuple[str, ...]:
    found = []
    inputs = sum(name.endswith(".input_scale") for name in model.file.tensors)
    if inputs:
        found.append(f"{inputs} input scales: BF16 has no quantized activations")
    if model.architecture.is_hybrid:
        found.append("a vision tower, if the model has one: GGUF keeps it in another file (mmproj)")
    return tuple(found)


def _write(
    model: GGUFModel,
    writer: CheckpointWriter,
    specs: list[TensorSpec],
    threads: int,
    rounded: Counter[str],
    progress: Progress,
) -> None:
    lock = Lock()

    def task(name: str, part: GGUFPart, start: int, stop: int, at: int) -> Callable[[], None]:
        def run() -> None:
            bits, lost = part.bf16(start, stop)
            data = bits.view(np.uint8)
            writer.write(name, data, at)
            with lock:
                progress.advance(data.nbytes, name)
                if lost:
                    rounded[name] += lost

        return run

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for spec in specs:
            work = [pool.submit(task(spec.name, *job)) for job in _jobs(model, spec)]
            try:
                for one in work:
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _count_lost(part: GGUFPart, stored: F32Array, bits: NDArray[np.uint16]) -> int:
    """How many of the file's values the rounded ones do not bring back.

    exp is rounded by every library in its own way, so `A_log` may miss by one float32.
    """
    rounded = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(stored.shape)
    back = part.redo(rounded)
    if part.matrix.place.change == NEGATIVE_EXP:
        return int(np.count_nonzero(~(np.abs(back - stored) <= np.abs(np.spacing(stored)))))
    return int(np.count_nonzero(back != stored))


def _jobs(model: GGUFModel, spec: TensorSpec) -> Iterator[tuple[GGUFPart, int, int, int]]:
    """Part, rows, and the byte in the tensor where they go."""
    parts = model.parts(spec.name)
    projections = len(parts) // model.dims.experts if len(parts) > 1 else 1
    for i, part in enumerate(parts):
        n = part.shape[0]
        row = 2 * prod(part.shape[1:])
        # gate and up of one expert lie one after the other.
        projection, expert = divmod(i, len(parts) // projections)
        base = (expert * projections + projection) * n * row
        step = max(_CHUNK // (row // 2), 1) if len(part.shape) > 1 else n
        for start in range(0, n, step):
            yield part, start, min(start + step, n), base + start * row
