"""The measured input scales that a run writes: what they must be, and how its journal keeps them.

Made by `calibrate/scales.py` from a measurement, or read back from the journal of an interrupted
run: measured anew they could differ in the last bit, and the result with them. Knows nothing of how
inputs are measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.writer import JOURNAL, partial_folder
from nybble.errors import CheckpointError, RecipeError
from nybble.plan.jobs import Job
from nybble.plan.plan import Plan
from nybble.quantize.journal import read_header

#: The journal's word for them.
KEY = "input_scales"


@dataclass(frozen=True, slots=True)
class InputScales:
    """A multiplying scale for the input of each module that stores one, and where they come from.

    `values` are float32 numbers by module path. `fallbacks` are modules of experts whose own figure
    was not used, in the plan's order. `tokens` is what was measured on; `calibration` what was
    asked of the measurement, in words that are equal for equal requests.
    """

    values: Mapping[str, float]
    fallbacks: tuple[str, ...]
    headroom: float
    tokens: int
    calibration: str = ""

    @property
    def sha256(self) -> str:
        """Of the values as canonical JSON: sorted keys, shortest digits, no spaces."""
        text = json.dumps(dict(self.values), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def fallbacks_by_layer(self) -> dict[str, int]:
        """How many modules fell back, by the container of their experts."""
        found: dict[str, int] = {}
        for module in self.fallbacks:
            container = module.rpartition(".experts.")[0] + ".experts"
            found[container] = found.get(container, 0) + 1
        return found

    def record(self) -> dict[str, object]:
        """As the journal's header holds it: JSON values, the many last."""
        return {
            "calibration": self.calibration,
            "headroom": self.headroom,
            "sha256": self.sha256,
            "tokens": self.tokens,
            "fallbacks": list(self.fallbacks),
            "values": dict(self.values),
        }


def check_input_scales(plan: Plan, given: InputScales | None) -> Mapping[str, float]:
    """The scales by module, if they are those that the plan's result needs.

    Raises RecipeError, naming the module, for one that is missing, not wanted, not a float32 that
    is finite and positive as its reciprocal is too, or not that of its fused group.
    """
    values = given.values if given is not None else {}
    wanted = 0
    for job in plan.jobs:
        if job.scheme.needs_input_scale:
            _check_job(job, values, is_given=given is not None)
            wanted += len(job.members)
    if wanted != len(values):
        names = {m.module for j in plan.jobs if j.scheme.needs_input_scale for m in j.members}
        extra = next(module for module in values if module not in names)
        raise RecipeError(
            f"{extra}: an input_scale is given, and the plan stores none there; scales belong to "
            "the recipe and the checkpoint that they were measured for"
        )
    return values


def _check_job(job: Job, values: Mapping[str, float], *, is_given: bool) -> None:
    first = job.members[0].module
    for m in job.members:
        if m.module not in values:
            lacking = "it is not among those given" if is_given else "this run measures none"
            raise RecipeError(
                f"{m.module}: {job.scheme} needs a measured input_scale, and {lacking}; a made-up "
                "scale would silently ruin answers"
            )
        value = values[m.module]
        if not is_scale(value):
            raise RecipeError(
                f"{m.module}: an input_scale of {value} cannot be stored; expected a float32 that "
                "is finite and positive, and so is 1 / it"
            )
        if value != values[first]:
            raise RecipeError(
                f"{job.name}: its members have different input scales, {values[first]} ({first}) "
                f"and {value} ({m.module}); engines run them as one matmul with one scale"
            )


def is_scale(value: float) -> bool:
    """Whether a value is a normal float32 above zero whose reciprocal is one too: layouts store one
    or the other."""
    tiny = float(np.finfo(np.float32).tiny)
    return tiny <= value <= 1 / tiny and float(np.float32(value)) == value


def stored_input_scales(out: Path, *, disk: Disk | None = None) -> InputScales | None:
    """The scales of the interrupted run in OUT.partial; None if there is no run, or it has none.

    Raises CheckpointError if its journal is damaged.
    """
    disk = disk or Disk()
    path = partial_folder(out) / JOURNAL
    if disk.size(path) is None:
        return None
    record = read_header(path, disk=disk).get(KEY)
    return None if record is None else _from_record(record, path)


def _from_record(record: object, path: Path) -> InputScales:
    """Its line's checksum was right, so only another version's form can be wrong here."""
    try:
        if isinstance(record, dict):
            return InputScales(
                {str(module): float(value) for module, value in record["values"].items()},
                tuple(str(module) for module in record["fallbacks"]),
                float(record["headroom"]),
                int(record["tokens"]),
                str(record["calibration"]),
            )
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(
        f"{path}: the input scales of the interrupted run cannot be read; remove {path.parent} and "
        "start again"
    )
