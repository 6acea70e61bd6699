"""What differs between two checkpoints: tensors, values, configuration, tokenizer, chat template.

Tensors are compared by name, whatever shard they lie in. Quantized modules of one format are
compared part by part, also across layouts: `weight` with `weight_packed`, a scale with a divisor.
Says what differs, not which of the two is right.

Without `deep`, a tensor above 1 MiB, and whatever comes after the first GiB, is compared by
samples: the first page, one in the middle, the last.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import CODES, Contents, Module, read_contents
from nybble.checkpoint.declaration import declaration_of, read_json
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.reader import HEADER_LIMIT, WIDTHS, Checkpoint, TensorInfo, U8Array
from nybble.errors import CheckpointError
from nybble.progress import Progress

WHOLE_BYTES = 1 << 20  # a tensor up to this size is compared whole ...
BUDGET_BYTES = 1 << 30  # ... until this much was read
_SAMPLE = 4096
_CHUNK = 16 << 20
_EXCERPT_LINES = 40
_SETTINGS = 100
_FLOATS = ("F32", "BF16", "F16")
_TEMPLATE = "chat_template"
_TEMPLATE_FILES = (f"{_TEMPLATE}.jinja", f"{_TEMPLATE}.json")


@dataclass(frozen=True, slots=True)
class Count:
    """How many elements differ, of those compared, of those there are."""

    different: int
    compared: int
    size: int


@dataclass(frozen=True, slots=True)
class Retyped:
    """A tensor that has another dtype or shape in B."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor of equal dtype and shape whose values differ."""

    name: str
    elements: Count


@dataclass(frozen=True, slots=True)
class ModuleValues:
    """A quantized module of one format and shape whose parts differ.

    A ratio is B's scale over A's, as multipliers whatever the layout stores, of a stack the one
    farthest from 1; None where there is no such scale, not finite where A's is 0.
    """

    name: str
    role: str
    held: str
    codes: Count
    scales: Count | None
    tensor_scale_ratio: float | None
    input_scale_ratio: float | None


@dataclass(frozen=True, slots=True)
class Setting:
    """A place in a JSON file whose value differs; "" where it is absent, else JSON, shortened."""

    file: str
    path: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Template:
    """The chat template's places (the one that counts first), and what differs in its text."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    excerpt: tuple[str, ...]
    lines: int


@dataclass(frozen=True)
class Difference:
    """What differs. `is_rearranged`, `respelled` and `renamed` are told and count as equal.

    `renamed` are tensors of quantized modules that another layout calls otherwise; `respelled` JSON
    files of equal content; `hidden_settings` counts settings beyond the first hundred of a file.
    """

    a: Path
    b: Path
    deep: bool
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    retyped: tuple[Retyped, ...]
    values: tuple[Values, ...]
    modules: tuple[ModuleValues, ...]
    settings: tuple[Setting, ...]
    hidden_settings: int
    files_only_in_a: tuple[str, ...]
    files_only_in_b: tuple[str, ...]
    files: tuple[str, ...]
    template: Template | None
    is_rearranged: bool
    respelled: tuple[str, ...]
    tensors_a: int
    tensors_b: int
    compared_whole: int
    compared_bytes: int
    sampled: int

    @property
    def is_equal(self) -> bool:
        """Nothing differs in what was compared."""
        return not (
            self.only_in_a
            or self.only_in_b
            or self.retyped
            or self.values
            or self.modules
            or self.settings
            or self.files_only_in_a
            or self.files_only_in_b
            or self.files
            or self.template
        )

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.diff/1`."""
        names = [f.name for f in fields(self)]
        return {
            "schema": "nybble.diff/1",
            "equal": self.is_equal,
            **{name: _plain(getattr(self, name)) for name in names},
        }


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, (Count, Retyped, Values, ModuleValues, Setting, Template)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def compare(
    a: Checkpoint, b: Checkpoint, *, deep: bool = False, progress: Progress | None = None
) -> Difference:
    """What differs between two open checkpoints; with `deep` every byte is compared."""
    values = _Comparison(a, b, deep, progress or Progress())
    values.run()
    texts = _Texts(a, b)
    texts.run()
    both = a.tensors.keys() & b.tensors.keys()
    return Difference(
        a=a.path,
        b=b.path,
        deep=deep,
        only_in_a=tuple(n for n in a.tensors if n not in values.paired_a and n not in both),
        only_in_b=tuple(n for n in b.tensors if n not in values.paired_b and n not in both),
        renamed=tuple(values.renamed),
        retyped=tuple(values.retyped),
        values=tuple(values.values),
        modules=tuple(values.modules),
        settings=tuple(texts.settings),
        hidden_settings=texts.hidden,
        files_only_in_a=tuple(texts.only_in_a),
        files_only_in_b=tuple(texts.only_in_b),
        files=tuple(texts.files),
        template=_compare_templates(a, b),
        is_rearranged=[(t.name, t.file) for t in a.tensors.values()]
        != [(t.name, t.file) for t in b.tensors.values()]
        and a.tensors.keys() == b.tensors.keys(),
        respelled=tuple(texts.respelled),
        tensors_a=len(a.tensors),
        tensors_b=len(b.tensors),
        compared_whole=values.whole,
        compared_bytes=values.read_bytes,
        sampled=values.sampled,
    )


# ----------------------------------------------------------------------------------------- tensors


@dataclass(slots=True)
class _Comparison:
    """One pass over the tensors that both have."""

    a: Checkpoint
    b: Checkpoint
    deep: bool
    progress: Progress
    paired_a: set[str] = field(default_factory=set)
    paired_b: set[str] = field(default_factory=set)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    retyped: list[Retyped] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    modules: list[ModuleValues] = field(default_factory=list)
    whole: int = 0
    sampled: int = 0
    read_bytes: int = 0
    same_files: set[tuple[str, str]] = field(default_factory=set)

    def run(self) -> None:
        files = {_identity(self.b, shard.name): shard.name for shard in self.b.shards}
        for shard in self.a.shards:
            if same := files.get(_identity(self.a, shard.name)):
                self.same_files.add((shard.name, same))
        self.progress.stage("compare", sum(t.nbytes for t in self.a.tensors.values()))
        held_a, held_b = (_contents(c) for c in (self.a, self.b))
        for module in held_a.modules:
            other = held_b.by_name.get(module.name)
            if other is not None and module.kind.is_quantized:
                self.compare_module(module, other)
        for name, tensor in self.a.tensors.items():
            twin = self.b.tensors.get(name)
            if twin is None or name in self.paired_a:
                continue
            if (tensor.dtype, tensor.shape) != (twin.dtype, twin.shape):
                self.retyped.append(Retyped(name, _spell(tensor), _spell(twin)))
                continue
            count = self.count(tensor, twin)
            if count.different:
                self.values.append(Values(name, count))

    def compare_module(self, mine: Module, other: Module) -> None:
        """Compare the parts of a module, if both hold it in one format and shape."""
        a, b = _parts(mine), _parts(other)
        codes = a.codes, b.codes
        if mine.kind.held != other.kind.held or codes[0] is None or codes[1] is None:
            return
        if (codes[0].dtype, codes[0].shape) != (codes[1].dtype, codes[1].shape):
            return
        is_packed = mine.kind.held.startswith(("nvfp4", "mxfp4", "int4"))
        count = self.count(codes[0], codes[1], is_packed)
        self.pair(codes[0], codes[1])
        scales, ratio = None, self.ratio(a.tensor_scale, b.tensor_scale)
        if a.scale is not None and a.scale.size == 1:
            ratio = self.ratio(a.scale, b.scale) if ratio is None else ratio
        else:
            scales = self.count_scales(a.scale, b.scale)
        input_ratio = self.ratio(a.input_scale, b.input_scale)
        if count.different or (scales and scales.different) or {ratio, input_ratio} - {None, 1.0}:
            self.modules.append(
                ModuleValues(
                    mine.name, mine.role, mine.kind.held, count, scales, ratio, input_ratio
                )
            )

    def count_scales(self, a: TensorInfo | None, b: TensorInfo | None) -> Count | None:
        """How many block or channel scales differ, by value where their dtypes differ."""
        if a is None or b is None or a.size != b.size:
            return None
        if a.dtype == b.dtype:
            self.pair(a, b)
            return self.count(a, b)
        if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
            return None
        self.pair(a, b)
        self.whole += 1
        self.progress.advance(a.nbytes, a.name)
        x, y = self.multipliers(a, self.a), self.multipliers(b, self.b)
        return Count(int(np.count_nonzero(x != y)), a.size, a.size)

    def ratio(self, a: TensorInfo | None, b: TensorInfo | None) -> float | None:
        """B's tensor scale over A's."""
        if a is None or b is None or a.size != b.size:
            return None
        self.pair(a, b)
        self.whole += 1
        self.progress.advance(a.nbytes, a.name)
        x, y = self.multipliers(a, self.a), self.multipliers(b, self.b)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 1.0, y / x)
            return float(ratios[np.argmax(np.abs(np.log(np.abs(ratios))))])

    def multipliers(self, scale: TensorInfo, checkpoint: Checkpoint) -> NDArray[np.float64]:
        """Scales as what codes are multiplied with, flat."""
        value = checkpoint.array(scale.name).reshape(-1).astype(np.float32)
        if _is_divisor(scale):
            with np.errstate(divide="ignore"):
                value = np.float32(1) / value
        return value.astype(np.float64)

    def pair(self, a: TensorInfo, b: TensorInfo) -> None:
        """Take a tensor of each side out of the comparison by name."""
        self.paired_a.add(a.name)
        self.paired_b.add(b.name)
        if a.name != b.name:
            self.renamed.append((a.name, b.name))
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            self.retyped.append(Retyped(a.name, _spell(a), _spell(b)))

    def count(self, a: TensorInfo, b: TensorInfo, is_packed: bool = False) -> Count:
        """Elements that differ; of packed codes, nibbles. Both have one dtype and shape."""
        per_byte = 2.0 if is_packed else 1 / WIDTHS[a.dtype]
        size = round(a.nbytes * per_byte)
        if (a.file, b.file) in self.same_files and a.offset == b.offset:
            self.whole += 1
            self.progress.advance(a.nbytes, a.name)
            return Count(0, size, size)
        ranges = self.ranges(a.nbytes)
        different, compared = 0, sum(stop - start for start, stop in ranges)
        if compared == a.nbytes:
            different = self.count_whole(a, b, is_packed)
        else:
            samples = (_read(c.path, t, ranges) for c, t in ((self.a, a), (self.b, b)))
            for x, y in zip(*samples, strict=True):
                different += _unequal(x, y, a.dtype, is_packed)
            self.progress.advance(a.nbytes, a.name)
        self.read_bytes += compared
        self.whole += compared == a.nbytes
        self.sampled += compared != a.nbytes
        return Count(different, round(compared * per_byte), size)

    def count_whole(self, a: TensorInfo, b: TensorInfo, is_packed: bool) -> int:
        x, y = self.a.raw(a.name), self.b.raw(b.name)
        different = 0
        for at in range(0, a.nbytes, _CHUNK):
            end = min(at + _CHUNK, a.nbytes)
            different += _unequal(x[at:end], y[at:end], a.dtype, is_packed)
            if end - at > WHOLE_BYTES:
                self.a.drop_pages(a.name, at, end)
                self.b.drop_pages(b.name, at, end)
            self.progress.advance(end - at, a.name)
        return different

    def ranges(self, nbytes: int) -> list[tuple[int, int]]:
        """The bytes of a tensor to compare."""
        is_affordable = nbytes <= WHOLE_BYTES and self.read_bytes + nbytes <= BUDGET_BYTES
        if self.deep or is_affordable or nbytes <= 3 * _SAMPLE:
            return [(0, nbytes)]
        middle = nbytes // 2 // _SAMPLE * _SAMPLE
        last = (nbytes - _SAMPLE) // _SAMPLE * _SAMPLE
        return [(0, _SAMPLE), (middle, middle + _SAMPLE), (last, nbytes)]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors of a quantized module by what they are."""

    codes: TensorInfo | None
    scale: TensorInfo | None
    tensor_scale: TensorInfo | None
    input_scale: TensorInfo | None


def _parts(module: Module) -> _Parts:
    return _Parts(
        module.tensor(*CODES),
        module.tensor("weight_scale", "weight_scale_inv", "scales"),
        module.tensor("weight_scale_2", "weight_global_scale"),
        module.tensor("input_scale", "input_global_scale"),
    )


def _contents(checkpoint: Checkpoint) -> Contents:
    return read_contents(checkpoint, declaration_of(checkpoint))


def _identity(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    status = (checkpoint.path / name).stat()
    return status.st_dev, status.st_ino


def _is_divisor(tensor: TensorInfo) -> bool:
    return tensor.name.endswith("_global_scale")


def _spell(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _read(path: Path, tensor: TensorInfo, ranges: list[tuple[int, int]]) -> list[U8Array]:
    """Samples, read and not mapped: a fault would read a hundred pages around each."""
    file = path / tensor.file
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = [os.pread(fd, stop - start, tensor.offset + start) for start, stop in ranges]
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if [len(part) for part in parts] != [stop - start for start, stop in ranges]:
        raise CheckpointError(f"{file}: changed since it was opened; start again")
    return [np.frombuffer(part, dtype=np.uint8) for part in parts]


def _unequal(x: U8Array, y: U8Array, dtype: str, is_packed: bool) -> int:
    if is_packed:
        changed = x ^ y
        return int(np.count_nonzero(changed & 15) + np.count_nonzero(changed & 240))
    word = np.dtype(f"u{WIDTHS[dtype]}")
    return int(np.count_nonzero(x.view(word) != y.view(word)))


# ------------------------------------------------------------------------ configuration and texts


@dataclass(slots=True)
class _Texts:
    """The files beside the weights, but for the chat template."""

    a: Checkpoint
    b: Checkpoint
    settings: list[Setting] = field(default_factory=list)
    hidden: int = 0
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    respelled: list[str] = field(default_factory=list)

    def run(self) -> None:
        a, b = (set(_side_files(c)) for c in (self.a, self.b))
        self.only_in_a, self.only_in_b = sorted(a - b), sorted(b - a)
        for name in sorted(a & b):
            self.compare_file(name)

    def compare_file(self, name: str) -> None:
        one, other = self.a.path / name, self.b.path / name
        if one.samefile(other) or _same_bytes(one, other):
            return
        found = None
        if name.endswith(".json"):
            first, second = (_load(c, name) for c in (self.a, self.b))
            if first is not None and second is not None:
                found = list(_differences(first, second, ""))
        if found is None:
            self.files.append(name)
        elif not found:
            self.respelled.append(name)
        else:
            self.settings += [Setting(name, *place) for place in found[:_SETTINGS]]
            self.hidden += max(0, len(found) - _SETTINGS)


def _side_files(checkpoint: Checkpoint) -> list[str]:
    names = [n for n in checkpoint.side_files() if n not in _TEMPLATE_FILES]
    rewritten = ("config.json", CONFIG_FILE)
    return [*names, *(n for n in rewritten if (checkpoint.path / n).exists())]


def _same_bytes(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as one, b.open("rb") as other:
        while (chunk := one.read(_CHUNK)) == other.read(_CHUNK):
            if not chunk:
                return True
    return False


def _load(checkpoint: Checkpoint, name: str) -> object:
    """A JSON file without a chat template, which is compared by itself; None if it is not JSON."""
    if name == CONFIG_FILE:
        return read_json(checkpoint, name)
    path = checkpoint.path / name
    if path.stat().st_size > HEADER_LIMIT:
        return None
    try:
        document: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(document, dict) and name == "tokenizer_config.json":
        document.pop(_TEMPLATE, None)
    return document


_ABSENT = object()


def _differences(a: object, b: object, path: str) -> Iterator[tuple[str, str, str]]:
    """Path and both values, shortened, of every place where two JSON documents differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            step = key if re.fullmatch(r"\w+", key) else f"[{json.dumps(key)}]"
            below = f"{path}.{step}" if path and step == key else path + step
            yield from _differences(a.get(key, _ABSENT), b.get(key, _ABSENT), below)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and _is_nested(a + b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{path}[{i}]")
    elif a is not b and (a != b or type(a) is not type(b)):
        yield path, _shorten(a, b), _shorten(b, a)


def _is_nested(values: list[object]) -> bool:
    return any(isinstance(value, (list, dict)) for value in values)


def _shorten(value: object, other: object) -> str:
    if value is _ABSENT:
        return ""
    if isinstance(value, list) and isinstance(other, list) and len(value) > 8:
        theirs = {json.dumps(entry, sort_keys=True) for entry in other}
        own = [text for v in value if (text := json.dumps(v, sort_keys=True)) not in theirs]
        example = f", {own[0]} for one" if own else ""
        return f"{len(value)} entries, {len(own)} only here{example}"[:200]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"


def _compare_templates(a: Checkpoint, b: Checkpoint) -> Template | None:
    one, other = _templates(a.path), _templates(b.path)
    text_a, text_b = next(iter(one.values()), ""), next(iter(other.values()), "")
    if one.keys() == other.keys() and text_a == text_b:
        return None
    lines = list(
        difflib.unified_diff(text_a.splitlines(), text_b.splitlines(), "A", "B", lineterm="", n=2)
    )
    return Template(tuple(one), tuple(other), tuple(lines[:_EXCERPT_LINES]), len(lines))


def _templates(path: Path) -> dict[str, str]:
    """Where the chat template stands, and its text there; the place that counts comes first."""
    found = {}
    jinja, *others = (path / name for name in (*_TEMPLATE_FILES, "tokenizer_config.json"))
    if jinja.is_file():
        found[jinja.name] = jinja.read_bytes().decode(errors="replace")
    for file in others:
        if not file.is_file():
            continue
        try:
            document = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            continue
        template = document.get(_TEMPLATE) if isinstance(document, dict) else None
        if isinstance(template, str):
            found[file.name] = template
        elif template:
            found[file.name] = json.dumps(template, indent=2).replace("\\n", "\n")
    return found
