"""What a calibrated run leaves behind: for each group of linears what was taken and what it won.

`report.json` holds everything; `report_tables.py` makes `report.txt` of it. Nothing in it depends
on the clock: an interrupted and resumed run writes the same bytes.

Losses are relative and held out: tr(D H D^T) / tr(W H W^T), D the error of the weights, H the
second moments of inputs that nothing was fitted to; a sum of them over groups counts each group
alike. Knows numbers and names, no tensors: it is read where there is no torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import CheckpointError

if TYPE_CHECKING:
    from nybble.calibrate.stage_record import StageRecord

SCHEMA = "nybble.calibration/1"
_NUMBER = re.compile(r"\d[\d,.]*\d|\d")
REPORT_JSON, REPORT_TEXT = "report.json", "report.txt"
#: The ladder, from what needs most tokens to what needs none.
RUNGS = ("gptq-x", "local", "mse")


@dataclass(frozen=True, slots=True)
class Row:
    """One job: its members, and the choice that was made for them (see rounding.Choice).

    `shape` is [rows of all members, inputs].
    """

    job: str
    role: str
    scheme: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    method: str
    damping: float | None
    losses: Mapping[str, float]
    tokens: int
    guard_tokens: int
    reason: str = ""

    def as_json(self) -> dict[str, object]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Raises KeyError or TypeError for what `as_json` did not write."""
        found = cls(**data)
        rows, inputs = found.shape
        return replace(found, modules=tuple(found.modules), shape=(rows, inputs))

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]

    @property
    def loss(self) -> float:
        """The held-out loss of what was taken; NaN where nothing judged it."""
        return self.losses.get(self.method, float("nan"))

    @property
    def place(self) -> str:
        """Where its members are: of experts the layer, of others the module in front of them."""
        first = self.modules[0]
        if ".experts." in first:
            return first.partition(".experts.")[0] + ".experts.*"
        return first.rpartition(".")[0] or first

    @property
    def leaves(self) -> str:
        """The last names of its members, joined: q_proj+k_proj+v_proj."""
        return "+".join(module.rpartition(".")[2] for module in self.modules)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a layer's router does on quantized inputs what it did on the original's: the share of
    chosen experts that both chose, and of tokens whose experts are all the same."""

    layer: str
    experts: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Sums:
    """Of some rows: how many took which method, and the sums of their losses, where all three are
    known: `judged` of them."""

    jobs: int
    judged: int
    methods: Mapping[str, int]
    loss: float
    absmax: float
    mse: float

    @property
    def won(self) -> float:
        """The share of round-to-nearest's loss that is gone."""
        return _won(self.loss, self.absmax)

    @property
    def won_over_mse(self) -> float:
        """The share of the data-free search's loss that is gone."""
        return _won(self.loss, self.mse)


def sums(rows: Iterable[Row]) -> Sums:
    """Add rows up."""
    rows = list(rows)
    judged = [r for r in rows if {"absmax", "mse", r.method} <= r.losses.keys()]
    return Sums(
        len(rows),
        len(judged),
        dict(Counter(r.method for r in rows)),
        sum(r.loss for r in judged),
        sum(r.losses["absmax"] for r in judged),
        sum(r.losses["mse"] for r in judged),
    )


@dataclass
class Report:
    """All of a run. `samples` is the record of the calibration data, `conditions` what the bits may
    depend on (instruction set, threads, versions), `peaks` per shared input the energy of its
    largest token over that of the median one."""

    effort: str
    samples: Mapping[str, object]
    conditions: Mapping[str, object] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    routing: list[Agreement] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_stages(
        cls,
        effort: str,
        samples: Mapping[str, object],
        conditions: Mapping[str, object],
        stages: Iterable[StageRecord],
    ) -> Report:
        """The report of a run whose stages are all done, in their order."""
        found = cls(effort, dict(samples), dict(conditions))
        for stage in stages:
            for job in stage.jobs:
                shape = (sum(s[0] for s in job.shapes), job.shapes[0][1])
                choice = job.choice
                row = Row(
                    job.name,
                    job.role,
                    job.scheme,
                    job.modules,
                    shape,
                    choice.method,
                    choice.damping,
                    dict(choice.losses),
                    choice.tokens,
                    choice.guard_tokens,
                    choice.reason,
                )
                found.rows.append(row)
            if stage.agreement is not None:
                agreed = stage.agreement
                found.routing.append(Agreement(stage.title, agreed.experts, agreed.tokens))
            found.peaks.update(stage.peaks)
        return found

    @property
    def tokens_said(self) -> str:
        """How much of what it was calibrated on, in words."""
        tokens = self.samples.get("tokens")
        fit, guard = (
            (tokens.get(k, 0) for k in ("fit", "guard")) if isinstance(tokens, dict) else (0, 0)
        )
        return f"{fit:,} + {guard:,} tokens of {self.samples.get('source', '?')}"

    @property
    def fallbacks(self) -> dict[str, int]:
        """How many groups did not get what was asked for, by reason; whatever its numbers."""
        reasons = (_NUMBER.sub("N", r.reason) for r in self.rows if r.reason)
        return dict(Counter(reasons).most_common())

    def by_role(self) -> dict[tuple[str, str], list[Row]]:
        """The rows by role and scheme."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.role, row.scheme), []).append(row)
        return found

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.calibration/1`."""
        total = sums(self.rows)
        return {
            "schema": SCHEMA,
            "effort": self.effort,
            "totals": {
                "groups": total.jobs,
                "linears": sum(len(r.modules) for r in self.rows),
                "weights": sum(r.weights for r in self.rows),
                "methods": total.methods,
                "loss": total.loss,
                "loss_absmax": total.absmax,
                "loss_mse": total.mse,
                "won_over_absmax": total.won,
                "won_over_mse": total.won_over_mse,
                "fallbacks": self.fallbacks,
            },
            "samples": dict(self.samples),
            "conditions": dict(self.conditions),
            "routing": [asdict(a) for a in self.routing],
            "energy_peaks": dict(self.peaks),
            "linears": [r.as_json() for r in self.rows],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Raises KeyError, TypeError or ValueError for what `as_json` did not write."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}, expected {SCHEMA!r}")
        return cls(
            str(data["effort"]),
            dict(data["samples"]),
            dict(data["conditions"]),
            [Row.from_json(row) for row in data["linears"]],
            [Agreement(**row) for row in data["routing"]],
            dict(data["energy_peaks"]),
        )

    def documents(self) -> dict[str, bytes]:
        """The side documents of the checkpoint, by name."""
        from nybble.calibrate.report_tables import text

        return {
            REPORT_JSON: (json.dumps(_finite(self.as_json()), indent=1) + "\n").encode(),
            REPORT_TEXT: text(self).encode(),
        }


def read_report(folder: Path) -> Report | None:
    """The report of a checkpoint, or None if it was not calibrated here.

    Another tool's report.json is none of ours. Raises CheckpointError for a damaged one.
    """
    path = folder / REPORT_JSON
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if not re.match(r"nybble\.calibration/", str(schema)):
        return None
    try:
        return Report.from_json(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is no report that this version of nybble can read: {error!r}"
        ) from None


def _won(loss: float, before: float) -> float:
    return 1 - loss / before if before > 0 else 0.0


def _finite(value: object) -> object:
    """JSON has no infinity: such values become null."""
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
