"""Reading what a checkpoint's configuration files say of quantization: a file per dialect.

This file tells the dialects apart. Writing is done by the layouts, `checkpoint/modelopt.py` and
`checkpoint/compressed_tensors.py`, in one spelling each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nybble.checkpoint.declaration import FLAT, Declaration, Object, as_object
from nybble.checkpoint.dialects.compressed_tensors import read_compressed_tensors
from nybble.checkpoint.dialects.modelopt import Statement, read_modelopt, read_statements
from nybble.checkpoint.dialects.others import read_other
from nybble.checkpoint.files import read_small
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import parse_json

COMPRESSED_TENSORS = "compressed-tensors"
MODELOPT = "modelopt"


@dataclass(frozen=True)
class Sections:
    """What the two files have on quantization, before it is understood.

    `dialect` is `Declaration.layout`: COMPRESSED_TENSORS, MODELOPT, another `quant_method`, or "".
    `method` is the `quant_method`, in small letters. `flat` is the section of config.json, {} if
    there is none, and `where` its place: "quantization_config", or behind "text_config.". `nested`
    is that of hf_quant_config.json, with its `producer`.
    """

    dialect: str = ""
    method: str = ""
    where: str = ""
    flat: Object = field(default_factory=dict)
    nested: Object | None = None

    @cached_property
    def statements(self) -> tuple[Statement | None, Statement | None]:
        """What either file says in ModelOpt's words. Raises CheckpointError."""
        return read_statements(self.flat, self.nested)


def read_declaration(config: Object, hf_quant_config: Object | None) -> Declaration:
    """What config.json and, where there is one, hf_quant_config.json say.

    Raises CheckpointError for an entry of the wrong type.
    """
    said = read_sections(config, hf_quant_config)
    if said.dialect == COMPRESSED_TENSORS:
        return read_compressed_tensors(said.flat)
    if said.dialect == MODELOPT:
        return read_modelopt(said.flat, said.method, said.nested)
    return read_other(said.flat, said.method) if said.flat else Declaration()


def read_sections(config: Object, hf_quant_config: Object | None) -> Sections:
    """The sections on quantization of the two files, as they stand.

    Raises CheckpointError for one that is no object.
    """
    where, section = _section(config)
    nested = _nested(hf_quant_config)
    method = str(section.get("quant_method") or "").lower()
    if method in ("compressed-tensors", "compressed_tensors"):
        return Sections(COMPRESSED_TENSORS, method, where, section, nested)
    if nested is not None or "quant_algo" in section or method.startswith("modelopt"):
        return Sections(MODELOPT, method, where, section, nested)
    return Sections(method or ("unknown" if section else ""), method, where, section, nested)


def declaration_of(checkpoint: Checkpoint) -> Declaration:
    """What the configuration files of a folder say."""
    return read_declaration(checkpoint.config, read_json(checkpoint, CONFIG_FILE))


def read_json(checkpoint: Checkpoint, name: str) -> dict[str, object] | None:
    """A JSON object beside the weights, strictly parsed; None if there is no such file."""
    path = checkpoint.path / name
    if not os.path.lexists(path):
        return None
    return parse_json(read_small(checkpoint.path, name), str(path))


def _section(config: Object) -> tuple[str, Object]:
    """`quantization_config`, of the file or of a wrapped model's `text_config`; else {}."""
    for path, holder in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key) is not None:
                    return path + key, as_object(holder[key], f"{FLAT}: {key}")
    return "", {}


def _nested(document: Object | None) -> Object | None:
    if document is None or document.get("quantization") is None:
        return None
    return as_object(document["quantization"], f"{CONFIG_FILE}: quantization") | {
        "producer": document.get("producer")
    }
