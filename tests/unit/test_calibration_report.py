"""The report of a calibrated run: sums that can be checked by hand, and a file that reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.calibrate import agreement, report_tables
from nybble.calibrate.report import Report, read_report, sums
from nybble.calibrate.rounding import Choice
from nybble.calibrate.stage_record import JobRecord, StageRecord
from nybble.errors import CheckpointError
from nybble.formats.scheme import NVFP4_W4A16
from nybble.plan.jobs import Job, Member


def job(*modules: str, role: str = "attention", rows: int = 48, inputs: int = 32) -> Job:
    members = tuple(Member(m, m + ".weight", None, 0, (rows, inputs)) for m in modules)
    return Job(modules[0], role, NVFP4_W4A16, members)


def choice(method: str, losses: dict[str, float], tokens: int = 900, reason: str = "") -> Choice:
    return Choice(method, 0.03 if method == "gptq-x" else None, losses, tokens, 100, reason)


def report_of(*jobs: tuple[Job, Choice]) -> Report:
    records = tuple(JobRecord.of(*one) for one in jobs)
    return Report.of_stages("fast", {}, {}, [StageRecord(0, "layer 0", records)])


def example() -> Report:
    attention = job("model.layers.0.attn.q_proj", "model.layers.0.attn.k_proj")
    won = choice("gptq-x", {"absmax": 0.008, "mse": 0.006, "local": 0.004, "gptq-x": 0.002})
    experts = []
    for e, (method, tokens) in enumerate([("gptq-x", 400), ("local", 30), ("mse", 0)]):
        losses = {"absmax": 0.01, "mse": 0.005} | ({} if method == "mse" else {method: 0.004})
        reason = "" if method == "gptq-x" else f"{method}: few tokens"
        name = f"model.layers.1.mlp.experts.{e}.down_proj"
        found = choice(method, losses, tokens, reason)
        experts.append(JobRecord.of(job(name, role="routed_expert"), found))
    stages = [
        StageRecord(0, "layer 0", (JobRecord.of(attention, won),), None, {"q_proj": 1234.5}),
        StageRecord(1, "layer 1", tuple(experts), agreement.Agreement(0.95, 0.8)),
    ]
    return Report.of_stages("default", {"source": "default"}, {"isa": "avx512"}, stages)


def test_sums_are_over_groups_and_of_what_was_taken() -> None:
    total = sums(example().rows)
    assert total.jobs == 4
    assert total.methods == {"gptq-x": 2, "local": 1, "mse": 1}
    assert total.loss == pytest.approx(0.002 + 0.004 + 0.004 + 0.005)
    assert total.won == pytest.approx(1 - 0.015 / 0.038)
    assert total.won_over_mse == pytest.approx(1 - 0.015 / 0.021)
    # What nothing judged has no loss, and changes no sum.
    blind = report_of((job("x.y"), choice("mse", {}, 0, "never routed to"))).rows[0]
    assert sums([*example().rows, blind]).loss == total.loss
    assert sums([blind]).won == 0


def test_a_row_says_what_its_members_are_together() -> None:
    row = example().rows[0]
    assert row.shape == (96, 32)
    assert row.weights == 96 * 32
    assert (row.place, row.leaves) == ("model.layers.0.attn", "q_proj+k_proj")
    assert example().rows[1].place == "model.layers.1.mlp.experts.*"
    head = report_of((job("lm_head", role="lm_head"), choice("mse", {}))).rows[0]
    assert (head.place, head.leaves) == ("lm_head", "lm_head")


def test_the_document_reads_back_and_holds_every_expert() -> None:
    report = example()
    document = json.loads(report.documents()["report.json"])
    assert next(iter(document)) == "schema"
    assert document["schema"] == "nybble.calibration/1"
    assert len(document["linears"]) == 4
    assert document["totals"]["linears"] == 5
    assert document["totals"]["weights"] == 5 * 48 * 32
    assert document["totals"]["fallbacks"] == {"local: few tokens": 1, "mse: few tokens": 1}
    assert document["routing"] == [{"layer": "layer 1", "experts": 0.95, "tokens": 0.8}]
    assert document["energy_peaks"] == {"q_proj": 1234.5}
    assert Report.from_json(document) == report
    assert Report.from_json(document).documents() == report.documents()


def test_the_tables_summarise_the_experts_of_a_layer() -> None:
    report = example()
    _, linears = report_tables.linears_table(report)
    assert [row[:4] for row in linears] == [
        ["model.layers.0.attn", "q_proj+k_proj", "gptq-x", "0.03"]
    ]
    assert linears[0][4:] == ["0.00200", "0.00800", "0.00600", "75.0 %", "900"]
    _, experts = report_tables.experts_table(report)
    assert experts == [
        ["model.layers.1.mlp.experts.*", "down_proj", "3", "1", "1", "1", "56.7 %"]
        + ["0", "30", "400"]
    ]
    text = report_tables.text(report)
    assert "1 x mse: few tokens" in text
    assert "95.0 %" in text
    assert "60.5 % of the held-out loss of round-to-nearest gone" in text
    assert max(map(len, text.splitlines()[1:])) < 140


def test_losses_without_a_number_are_null_in_json() -> None:
    report = example()
    report.peaks["dead"] = float("inf")
    assert json.loads(report.documents()["report.json"])["energy_peaks"]["dead"] is None


def test_only_our_reports_are_read(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    path = tmp_path / "report.json"
    path.write_text('{"schema": "other"}')
    assert read_report(tmp_path) is None
    path.write_text("[]")
    assert read_report(tmp_path) is None
    path.write_bytes(example().documents()["report.json"])
    assert read_report(tmp_path) == example()
    for damaged in (
        "{",
        '{"schema": "nybble.calibration/1"}',
        '{"schema": "nybble.calibration/9"}',
    ):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"report\.json"):
            read_report(tmp_path)
