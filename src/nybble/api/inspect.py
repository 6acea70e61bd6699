"""`nybble inspect`: what a checkpoint says, what it holds, and whether the two agree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from nybble.check.contents import INPUT_SCALES, Contents, Module, declared_json, read_contents
from nybble.checkpoint.declaration import Declaration, Declared
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import INDEX, Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.families import ROLES

_is_mtp = re.compile(r"(^|\.)(mtp|nextn)").search
_is_vision = re.compile(r"(^|\.)(visual|vision|image|audio)").search


@dataclass(frozen=True, slots=True)
class Row:
    """Modules of one role with the same declaration and the same format.

    `agrees` is None where nybble has no word for what is declared; `parameters` counts weights.
    """

    role: str
    declared: Declared | None
    held: str
    agrees: bool | None
    modules: int
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def as_json(self) -> dict[str, object]:
        """One entry of `rows`."""
        return {
            "role": self.role,
            "declared": declared_json(self.declared),
            "held": self.held,
            "agrees": self.agrees,
            "modules": self.modules,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclass(frozen=True, slots=True)
class Part:
    """The MTP head or the vision tower: how much of it there is."""

    tensors: int
    nbytes: int
    dtypes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """An object of the document."""
        return {"tensors": self.tensors, "bytes": self.nbytes, "dtypes": list(self.dtypes)}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    `stored_parameters` is what model hubs show: stored elements, without scales and MTP head.
    `index_parameters` is what the index says of that, None if nothing. `residual_scales` counts
    input scales of modules that are declared to read none.
    """

    path: Path
    model_type: str
    architectures: tuple[str, ...]
    declaration: Declaration
    contents: Contents = field(repr=False)
    rows: tuple[Row, ...]
    tensors: int
    payload_bytes: int
    file_bytes: int
    files: int
    has_data: bool
    parameters: int
    stored_parameters: int
    index_parameters: int | None
    residual_scales: int
    residual_bytes: int
    mtp: Part | None
    vision: Part | None
    notes: tuple[str, ...]

    @property
    def bits_per_parameter(self) -> float:
        """Of everything that the files hold."""
        return 8 * self.payload_bytes / self.parameters if self.parameters else 0.0

    @property
    def bytes_without_residual(self) -> int:
        """What nybble would write for the same checkpoint: it leaves such scalars out."""
        return self.payload_bytes - self.residual_bytes

    @property
    def mismatches(self) -> tuple[Module, ...]:
        """The modules that are not stored as they are declared."""
        return tuple(m for m in self.contents.modules if m.kind.agrees is False)

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.inspect/1`."""
        return {
            "schema": "nybble.inspect/1",
            "path": str(self.path),
            "model_type": self.model_type,
            "architectures": list(self.architectures),
            "family": self.contents.model_type,
            "layout": self.declaration.layout,
            "producer": self.declaration.producer,
            "tensors": self.tensors,
            "bytes": self.payload_bytes,
            "file_bytes": self.file_bytes,
            "files": self.files,
            "has_data": self.has_data,
            "parameters": self.parameters,
            "bits_per_parameter": self.bits_per_parameter,
            "hub_parameters": self.stored_parameters,
            "index_parameters": self.index_parameters,
            "kv_cache": {
                "declared": self.declaration.kv_cache,
                "scale_tensors": len(self.contents.kv_scales),
            },
            "residual_input_scales": {
                "tensors": self.residual_scales,
                "bytes": self.residual_bytes,
                "bytes_without": self.bytes_without_residual,
            },
            "mtp": self.mtp and self.mtp.as_json(),
            "vision": self.vision and self.vision.as_json(),
            "rows": [row.as_json() for row in self.rows],
            "disagreements": list(self.declaration.disagreements),
            "mismatches": [m.name for m in self.mismatches],
            "notes": list(self.notes),
        }


def inspect(path: str | PathLike[str]) -> Inspection:
    """Inspect a local checkpoint folder, quantized or not; headers without data will do.

    Raises CheckpointError for files that break a rule of their format.
    """
    with Checkpoint.open(Path(path), headers_only=True) as checkpoint:
        declaration = declaration_of(checkpoint)
        contents = read_contents(checkpoint, declaration)
        return _sum_up(checkpoint, declaration, contents)


def _sum_up(checkpoint: Checkpoint, declaration: Declaration, contents: Contents) -> Inspection:
    tensors = checkpoint.tensors.values()
    modules = contents.modules
    payload = sum(m.kind.nbytes for m in modules) + sum(t.nbytes for t in contents.kv_scales)
    residual = [
        t.nbytes
        for m in modules
        if m.kind.has_residual
        for t in (m.tensor(leaf) for leaf in INPUT_SCALES)
        if t is not None
    ]
    mtp = _part(t for t in tensors if _is_mtp(t.name))
    vision = _part(t for t in tensors if _is_vision(t.name))
    index = checkpoint.index_metadata.get("total_parameters")
    architectures = checkpoint.config.get("architectures")
    return Inspection(
        path=checkpoint.path,
        model_type=str(checkpoint.config.get("model_type") or ""),
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        declaration=declaration,
        contents=contents,
        rows=_rows(declaration, contents),
        tensors=len(tensors),
        payload_bytes=payload,
        file_bytes=payload + sum(shard.header_bytes for shard in checkpoint.shards),
        files=len(checkpoint.shards),
        has_data=all(shard.has_data for shard in checkpoint.shards),
        parameters=sum(m.kind.parameters for m in modules),
        stored_parameters=sum(m.kind.stored for m in modules if not _is_mtp(m.name)),
        index_parameters=index if isinstance(index, int) else None,
        residual_scales=len(residual),
        residual_bytes=sum(residual),
        mtp=mtp,
        vision=vision,
        notes=tuple(_notes(checkpoint, declaration, contents, payload, mtp, vision)),
    )


def _rows(declaration: Declaration, contents: Contents) -> tuple[Row, ...]:
    """By role in the order of `ROLES`, the most bytes first."""
    key = tuple[str, Declared | None, str, bool | None]
    sums: dict[key, list[int]] = {}
    for m in contents.modules:
        kind = m.kind
        counted = sums.setdefault((m.role, m.declared, held(m), kind.agrees), [0, 0, 0])
        counted[0] += 1
        counted[1] += kind.parameters
        counted[2] += kind.nbytes
    rows = [Row(*key, *counted) for key, counted in sums.items()]
    rows.sort(key=lambda r: (ROLES.index(r.role) if r.role in ROLES else len(ROLES), -r.nbytes))
    if scales := contents.kv_scales:
        word = f"scales in {', '.join(sorted({t.dtype for t in scales})).lower()}"
        size = sum(t.nbytes for t in scales)
        rows.append(Row("kv_cache", None, word, bool(declaration.kv_cache), len(scales), 0, size))
    return tuple(rows)


def held(module: Module) -> str:
    """What a module's tensors are, in a few words."""
    words = module.kind.held
    if module.kind.has_input_scale:
        words += " + residual input scale" if module.kind.has_residual else " + input scale"
    return f"{words}, {module.kind.problem}" if module.kind.problem else words


def _part(tensors: Iterable[TensorInfo]) -> Part | None:
    found = list(tensors)
    if not found:
        return None
    dtypes = [dtype for dtype, _ in Counter(t.dtype for t in found).most_common()]
    return Part(len(found), sum(t.nbytes for t in found), tuple(dtypes))


def _notes(
    checkpoint: Checkpoint,
    declaration: Declaration,
    contents: Contents,
    payload: int,
    mtp: Part | None,
    vision: Part | None,
) -> Iterable[str]:
    config, metadata = checkpoint.config, checkpoint.index_metadata
    if not config:
        yield "there is no config.json: nothing is known of the model but its tensors"
    elif contents.why_no_roles:
        yield f"roles are left blank: {contents.why_no_roles}"
    if not all(shard.has_data for shard in checkpoint.shards):
        yield "the files hold their headers only; sizes are those that the headers promise"
    if checkpoint.unindexed:
        names = ", ".join(checkpoint.unindexed)
        yield f"{INDEX} does not use {names}: no part of the model, and not counted"
    total = metadata.get("total_size")
    if total is not None and total != payload:
        yield f"{INDEX} says total_size {total}, the tensors take {payload} bytes"
    if declaration.kv_cache and not contents.kv_scales:
        if declaration.layout == "compressed-tensors":
            what = "readers of this layout expect them in the file"
        else:
            what = "engines take 1.0"
        yield f"the KV cache is declared {declaration.kv_cache} without scale tensors: {what}"
    text = config.get("text_config")
    layers = (text if isinstance(text, Mapping) else config).get("mtp_num_hidden_layers")
    if layers and mtp is None:
        yield f"config.json says mtp_num_hidden_layers {layers}, but there is no MTP tensor"
    if config.get("vision_config") and vision is None:
        yield "config.json has a vision_config, but there is no vision tensor"


__all__ = ["Inspection", "Part", "Row", "held", "inspect"]
