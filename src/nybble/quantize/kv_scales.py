"""The measured scales of an FP8 KV cache that a run writes: what they must be, their bytes, and how
its journal keeps them.

Made by `calibrate/kv_scales.py`, or read back from the journal of an interrupted run. Knows nothing
of how keys and values are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.writer import JOURNAL, partial_folder
from nybble.errors import CheckpointError, RecipeError
from nybble.plan.plan import Plan
from nybble.quantize.journal import read_header

#: The journal's word for them.
KEY = "kv_scales"
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}


def kv_scale_tensors(
    plan: Plan, given: Mapping[int, tuple[float, float]] | None
) -> dict[str, NDArray[np.generic]]:
    """The tensors of the plan's KV scales by name, from the scales of keys and values by layer.

    Raises RecipeError for a layer without scales, scales of a layer that the plan has none of, and
    a scale that is no power of two: every layout holds those exactly.
    """
    scales = given or {}
    wanted = {s.layer for s in plan.kv_scales}
    if wanted != set(scales):
        odd = min(wanted ^ set(scales))
        expected, found = ("one", "none") if odd in wanted else ("none", "one")
        raise RecipeError(
            f"layer {odd}: expected {expected} pair of scales for its keys and values, found "
            f"{found}; scales belong to the recipe and the checkpoint that they were measured for"
        )
    tensors: dict[str, NDArray[np.generic]] = {}
    for s in plan.kv_scales:
        value = scales[s.layer][0 if s.is_key else 1]
        if not 2.0**-64 <= value <= 2.0**64 or frexp(value)[0] != 0.5:
            raise RecipeError(
                f"{s.spec.name}: a scale of {value}; expected a power of two between 2^-64 and 2^64"
            )
        tensors[s.spec.name] = np.full(s.spec.shape, value, dtype=_DTYPES[s.spec.dtype])
    return tensors


def kv_record(given: Mapping[int, tuple[float, float]]) -> dict[str, object]:
    """As the journal's header holds them: JSON values."""
    return {str(layer): list(pair) for layer, pair in sorted(given.items())}


def stored_kv_scales(out: Path, *, disk: Disk | None = None) -> dict[int, tuple[float, float]]:
    """The scales of the interrupted run in OUT.partial; empty if there is no run, or it has none.

    Raises CheckpointError if its journal is damaged.
    """
    disk = disk or Disk()
    path = partial_folder(out) / JOURNAL
    if disk.size(path) is None:
        return {}
    record = read_header(path, disk=disk).get(KEY, {})
    try:
        if isinstance(record, dict):
            return {int(n): (float(key), float(value)) for n, (key, value) in record.items()}
    except (TypeError, ValueError):
        pass
    raise CheckpointError(
        f"{path}: the KV scales of the interrupted run cannot be read; remove {path.parent} and "
        "start again"
    )
