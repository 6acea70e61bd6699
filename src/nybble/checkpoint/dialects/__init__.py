"""Reading what a checkpoint's configuration files say of quantization: a file per dialect.

This file tells the dialects apart. Writing is done by the layouts, `checkpoint/modelopt.py` and
`checkpoint/compressed_tensors.py`, in one spelling each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from nybble.checkpoint.declaration import FLAT, Declaration, Object, as_object
from nybble.checkpoint.dialects.compressed_tensors import read_compressed_tensors
from nybble.checkpoint.dialects.modelopt import read_modelopt
from nybble.checkpoint.dialects.others import read_other
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.reader import Checkpoint, read_small
from nybble.checkpoint.safetensors import parse_json


def read_declaration(config: Object, hf_quant_config: Object | None) -> Declaration:
    """What config.json and, where there is one, hf_quant_config.json say.

    Raises CheckpointError for an entry of the wrong type.
    """
    section = _section(config)
    nested = _nested(hf_quant_config)
    method = str(section.get("quant_method") or "").lower()
    if method in ("compressed-tensors", "compressed_tensors"):
        return read_compressed_tensors(section)
    if nested is not None or "quant_algo" in section or method.startswith("modelopt"):
        return read_modelopt(section, method, nested)
    return read_other(section, method) if section else Declaration()


def declaration_of(checkpoint: Checkpoint) -> Declaration:
    """What the configuration files of a folder say."""
    return read_declaration(checkpoint.config, read_json(checkpoint, CONFIG_FILE))


def read_json(checkpoint: Checkpoint, name: str) -> dict[str, object] | None:
    """A JSON object beside the weights, strictly parsed; None if there is no such file."""
    path = checkpoint.path / name
    if not os.path.lexists(path):
        return None
    return parse_json(read_small(checkpoint.path, name), str(path))


def _section(config: Object) -> Object:
    """`quantization_config`, of the file or of a wrapped model's `text_config`; else {}."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key) is not None:
                    return as_object(holder[key], f"{FLAT}: {key}")
    return {}


def _nested(document: Object | None) -> Object | None:
    if document is None or document.get("quantization") is None:
        return None
    return as_object(document["quantization"], f"{CONFIG_FILE}: quantization") | {
        "producer": document.get("producer")
    }
