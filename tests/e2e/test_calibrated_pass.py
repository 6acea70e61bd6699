"""Whole calibrated runs of tiny models: what the student went through is what was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nybble.calibrate.stage_rounding as stage_rounding
import tiny
from calibrated_runs import LENGTHS, ROPE, calibrate, plan_of, samples
from nybble.calibrate.rounding import EFFORTS
from nybble.calibrate.sequential import Calibration
from nybble.calibrate.statistics import Statistics
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, DoesNotFit, EngineError
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.quantize.input_scales import InputScales
from nybble.stream.executor import Stream

VOCABULARY = 131
QUICK = replace(EFFORTS["default"], dampings=(0.03,))


class Told(Progress):
    """Everything that was said, and how far it came."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.totals: list[tuple[str, int]] = []
        self.counts: list[int] = []

    def stage(self, title: str, total: int, unit: str = "bytes") -> None:
        self.totals.append((title, total))
        self.counts.append(0)

    def advance(self, count: int, note: str = "") -> None:
        self.counts[-1] += count
        self.notes.append(note)

    def say(self, line: str) -> None:
        self.lines.append(line)


class Watched(Calibration):
    """Keeps the student's final hidden states, which a run gives up."""

    def close(self) -> None:
        self.final = [rows.clone() for _, rows in self.passes.main.normed()]
        super().close()


@contextmanager
def planned(folder: Path, family: str, recipe: str, **options: Any) -> Iterator[Plan]:
    if family in tiny.HYBRIDS:
        options["rope_parameters"] = ROPE
    if not folder.exists():
        tiny.checkpoint(folder, family, **options)
    with Checkpoint.open(folder) as checkpoint:
        layout = "compressed-tensors" if "fp8" in recipe else "modelopt"
        yield plan_of(checkpoint, recipe, layout)


def scales_for(plan: Plan) -> InputScales | None:
    names = [m.module for j in plan.jobs if j.scheme.needs_input_scale for m in j.members]
    return InputScales(dict.fromkeys(names, float(np.float32(0.01))), (), 2.0, 1) if names else None


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen3_5_moe", "nvfp4-all"),
        ("qwen3_5_moe", "nvfp4-w4a4"),
        ("qwen3_moe", "nvfp4-experts-fp8"),
        ("llama", "nvfp4-all"),
    ],
)
def test_the_student_is_the_written_model_bitwise(tmp_path: Path, family: str, recipe: str) -> None:
    """Codes, input scales, mixtures, other formats: all of a layer was held as it is written."""
    with planned(tmp_path / "m", family, recipe) as plan:
        given, scales = samples(VOCABULARY), scales_for(plan)
        rounder = calibrate(plan, tmp_path / "out", given, QUICK, scales=scales, kind=Watched)
        assert isinstance(rounder, Watched)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        windows = [*given.fit_windows, *given.guard_windows]
        stream = Stream(Model(checkpoint), windows, Mode(Compute("bf16", 1), simulate=True))
        stream.run()
        for found, (_, expected) in zip(rounder.final, stream.normed(), strict=True):
            assert torch.equal(found, expected)
    assert not (tmp_path / "out.calibration").exists()


def test_every_job_is_reported_with_its_choice(tmp_path: Path) -> None:
    told = Told()
    with planned(tmp_path / "m", "qwen3_5_moe", "nvfp4-all") as plan:
        calibrate(plan, tmp_path / "out", samples(VOCABULARY), QUICK, progress=told)
        jobs = {job.name: job for job in plan.jobs}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["linears"]
    assert sorted(row["job"] for row in rows) == sorted(jobs)
    for row in rows:
        assert row["method"] in row["losses"]
        assert row["losses"]["absmax"] > 0
        assert row["losses"][row["method"]] <= row["losses"]["mse"]
    assert [a["layer"] for a in report["routing"]] == [f"layer {i} of 3" for i in (1, 2, 3)]
    assert all(0 < a["tokens"] <= a["experts"] <= 1 for a in report["routing"])
    assert all(peak >= 1 for peak in report["energy_peaks"].values())
    # Fit and guard tokens of a linear are all there are.
    dense = [r for r in rows if r["role"] == "attention"]
    fit = sum(n for i, n in enumerate(LENGTHS) if i not in (1, 4))
    assert {(r["tokens"], r["guard_tokens"]) for r in dense} == {(fit, sum(LENGTHS) - fit)}
    # What was announced is what was counted, and the display says what was won.
    assert told.counts[-1] == told.totals[-1][1]
    assert "GiB of memory at most" in told.lines[0]
    assert any(
        "layer 2 of 3, rounding" in note and "% of the loss won" in note for note in told.notes
    )


def test_the_fast_effort_needs_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    true_complete = Stream.complete

    def complete(self: Stream, number: int) -> None:
        steps.append(number)
        true_complete(self, number)

    monkeypatch.setattr(Stream, "complete", complete)
    with planned(tmp_path / "m", "qwen3_5_moe", "nvfp4-all") as plan:
        calibrate(plan, tmp_path / "out", samples(VOCABULARY), "fast")
    assert steps == [0, 1, 2]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    methods = {row["method"] for row in report["linears"]}
    assert "local" in methods
    assert methods <= {"local", "mse"}


def test_an_output_head_in_parts_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows know nothing of one another: parts give the codes of the whole, but for sums that a
    library takes in another order, and the losses, but for round-to-nearest's own scale."""
    for name, weights in (("whole", 1 << 25), ("parts", 50 * 96)):
        monkeypatch.setattr(stage_rounding, "PART_WEIGHTS", weights)
        with planned(tmp_path / "m", "llama", "nvfp4-all") as plan:
            calibrate(plan, tmp_path / name, samples(VOCABULARY), QUICK)
    whole, parts = (tiny.read(tmp_path / name) for name in ("whole", "parts"))
    same = tiny.array(whole["lm_head.weight"]) == tiny.array(parts["lm_head.weight"])
    assert same.mean() > 0.8  # bytes of rows in another place are equal by chance alone: 1 in 100
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "parts")
    ]
    one, other = (next(r for r in x["linears"] if r["role"] == "lm_head") for x in reports)
    assert one["losses"].keys() == other["losses"].keys()
    for method, loss in one["losses"].items():
        # Layers before it are cut too, so its inputs are others; one tensor scale for all parts.
        close = 0.02 if method == "absmax" else 0.1
        assert other["losses"][method] == pytest.approx(loss, rel=close)


def test_later_layers_are_fitted_to_what_earlier_ones_became(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer sees the same inputs in both efforts, the last one does not."""
    seen: list[dict[str, float]] = []
    true_begin = Statistics.linear

    def linear(self: Statistics, modules: tuple[str, ...], x: torch.Tensor) -> None:
        sums = seen[-1]
        sums[modules[0]] = sums.get(modules[0], 0.0) + float(x.double().square().sum())
        true_begin(self, modules, x)

    monkeypatch.setattr(Statistics, "linear", linear)
    for effort in ("fast", "sequential"):
        seen.append({})
        with planned(tmp_path / "m", "llama", "nvfp4-all") as plan:
            chosen = replace(EFFORTS["fast"], is_sequential=effort == "sequential")
            calibrate(plan, tmp_path / effort, samples(VOCABULARY), chosen)
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert seen[0][first] == seen[1][first]
    assert seen[0][last] != seen[1][last]


def test_nan_activations_name_the_layer_and_the_tensor(tmp_path: Path) -> None:
    cfg = tiny.config("llama")
    values = tiny.tensors(cfg)
    name = "model.layers.1.mlp.down_proj.weight"
    damaged = values["model.layers.1.input_layernorm.weight"].astype(np.float32)
    damaged[3] = np.nan
    values["model.layers.1.input_layernorm.weight"] = damaged.astype(values[name].dtype)
    tiny.write(tmp_path / "m", cfg, values)
    with (
        planned(tmp_path / "m", "llama", "nvfp4-all") as plan,
        pytest.raises(EngineError, match=r"layers\.1\..*NaN"),
    ):
        calibrate(plan, tmp_path / "out", samples(VOCABULARY), QUICK)
    assert not (tmp_path / "out").exists()


def test_memory_is_said_and_refused_before_anything_is_read(tmp_path: Path) -> None:
    told = Told()
    with planned(tmp_path / "m", "llama", "nvfp4-all") as plan:
        needed = calibrate(plan, tmp_path / "out", samples(VOCABULARY), QUICK).footprint
        limit = needed.private_bytes - 1
        with pytest.raises(DoesNotFit, match="calibrating needs .* are available; use fewer"):
            calibrate(
                plan,
                tmp_path / "again",
                samples(VOCABULARY),
                QUICK,
                progress=told,
                limit_bytes=limit,
            )
    assert told.lines
    assert not told.totals
    assert not (tmp_path / "again.partial").exists()
    assert not (tmp_path / "again.calibration").exists()


def test_a_report_of_the_source_is_not_replaced(tmp_path: Path) -> None:
    with planned(tmp_path / "m", "llama", "nvfp4-all"):
        pass
    (tmp_path / "m" / "report.json").write_text("{}")
    with (
        planned(tmp_path / "m", "llama", "nvfp4-all") as plan,
        pytest.raises(CheckpointError, match=r"report\.json"),
    ):
        calibrate(plan, tmp_path / "out", samples(VOCABULARY), QUICK)


def test_the_mtp_head_is_measured_behind_the_trunk(tmp_path: Path) -> None:
    with planned(tmp_path / "m", "qwen3_5_moe", "nvfp4-mtp") as plan:
        calibrate(plan, tmp_path / "out", samples(VOCABULARY), QUICK, scales=scales_for(plan))
        names = {j.name for j in plan.jobs if j.role == "mtp"}
    assert names
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["job"]: row for row in report["linears"] if row["role"] == "mtp"}
    assert set(rows) == names
    assert any(row["method"] == "gptq-x" for row in rows.values())
