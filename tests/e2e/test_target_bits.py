"""Allocations end to end: what is written keeps the target, is what was measured, and goes on after
an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import tiny
from nybble.api.allocate import Allocation, Row, Target, allocate_command, held_out
from nybble.api.check import Severity, check
from nybble.api.quantize import quantize
from nybble.calibrate.samples import Samples, open_samples
from nybble.cli import main
from nybble.cli.allocate_flags import render, target
from nybble.errors import CheckpointError, RecipeError, TextError
from nybble.plan.recipe import load_recipe

MODEL = tiny.MODELS / "stories-hybrid-moe"
TEXT = {"samples": 40, "length": 128}
BITS = 4.9


def run(out: Path, target: Target | None = None, **options: Any) -> Allocation:
    options = {"layout": "compressed-tensors", "jobs": 2, **TEXT, **options}
    return allocate_command(MODEL, out, "nvfp4-all", target or Target(bits=BITS), **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Allocation:
    return run(tmp_path_factory.mktemp("allocated") / "out")


def payload(folder: Path) -> int:
    return sum(len(data) for _, _, data in tiny.read(folder).values())


def the_chosen(found: Allocation) -> Row:
    return next(row for row in found.rows if row.candidate.name == found.chosen)


def test_the_best_measured_candidate_is_written_within_the_target(made: Allocation) -> None:
    best = the_chosen(made)
    assert best.kl.value == min(row.kl.value for row in made.rows)
    assert all(row.bits <= BITS for row in made.rows)
    assert payload(made.result.out) == best.payload_bytes
    names = [row.candidate.name for row in made.rows]
    assert names[0] == "uniform"
    assert len(names) >= 3
    assert best.kl.value < made.rows[0].kl.value
    assert not made.result.out.with_name("out.allocation").exists()


def test_the_written_checkpoint_diverges_as_was_measured(made: Allocation, tmp_path: Path) -> None:
    from nybble.calibrate.allocate import find_ground
    from nybble.calibrate.damage import Bench, Branch, Source
    from nybble.checkpoint.reader import Checkpoint
    from nybble.formats.scheme import BF16
    from nybble.kernels.compute import Compute
    from nybble.models.linear import Mode
    from nybble.models.model import Model
    from nybble.progress import Progress

    best = the_chosen(made)
    _, judges = held_out(open_samples(MODEL, **TEXT))  # type: ignore[arg-type]
    with Checkpoint.open(MODEL) as original, Checkpoint.open(made.result.out) as written:
        sources = {BF16.name: Source(Model(original))}
        sources |= {
            s.name: Source(Model(written), is_weight_only=s.input is None)
            for s in best.candidate.choice.values()
            if s is not BF16
        }
        groups = find_ground(made.result.plan).groups
        mode = Mode(Compute("bf16", 2), simulate=True)
        bench = Bench(sources, groups, judges, mode, Progress())
        kl = bench.run([Branch(best.candidate.choice)], "").kl[0]
    assert float(kl.mean()) == pytest.approx(best.kl.value, rel=1e-12)


def test_four_bit_tensors_are_the_uniform_checkpoints(made: Allocation, tmp_path: Path) -> None:
    quantize(MODEL, tmp_path / "u", "nvfp4-all", layout="compressed-tensors", jobs=2)
    uniform, found = tiny.read(tmp_path / "u"), tiny.read(made.result.out)
    packed = [name for name in found if name.endswith("weight_packed")]
    assert packed
    assert len(packed) < sum(name.endswith("weight_packed") for name in uniform)
    for name in packed:
        for leaf in ("weight_packed", "weight_scale", "weight_global_scale"):
            at = name.replace("weight_packed", leaf)
            assert found[at] == uniform[at]


def test_the_result_says_how_it_was_made_and_can_be_repeated(
    made: Allocation, tmp_path: Path
) -> None:
    out = made.result.out
    document = json.loads((out / "allocation.json").read_text("utf-8"))
    assert document == json.loads(json.dumps(made.as_json()))
    assert document["chosen"] == made.chosen
    assert {c["name"] for c in document["candidates"]} == {r.candidate.name for r in made.rows}
    again = load_recipe(str(out / "allocation.toml"))
    quantize(MODEL, tmp_path / "again", again, layout="compressed-tensors", jobs=2)
    assert tiny.read(tmp_path / "again") == tiny.read(out)  # made without data both times
    assert not [f for f in check(out).findings if f.severity == Severity.ERROR]


def test_the_table_names_the_chosen_and_its_rivals(made: Allocation) -> None:
    text = render(made.rows, made.chosen)
    assert f"{made.chosen} *" in text
    for row in made.rows:
        assert f"{row.kl.value:.5f}" in text


def test_an_interrupted_allocation_goes_on_and_ends_with_the_same_bytes(
    made: Allocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, on_rows=stop)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="--resume"):
        run(out)
    measured = stat(tmp_path / "out.allocation")
    monkeypatch.setattr("nybble.calibrate.damage.measure_damages", stop)  # they are on the disk
    run(out, resume=True, on_rows=lambda *_: measured.update(same=True))
    assert measured["same"]
    assert tiny.read(out) == tiny.read(made.result.out)
    assert (out / "allocation.json").read_bytes() == (
        made.result.out / "allocation.json"
    ).read_bytes()


def stat(folder: Path) -> dict[str, bool]:
    return {p.name: p.is_file() for p in folder.rglob("*")}


def test_a_size_is_of_the_whole_checkpoint(made: Allocation, tmp_path: Path) -> None:
    room = made.rows[0].payload_bytes + 20_000
    found = run(tmp_path / "out", Target(payload_bytes=room))
    assert found.rows[0].payload_bytes < payload(tmp_path / "out") <= room


def test_without_data_modelopt_chooses_between_nvfp4_and_bf16(tmp_path: Path) -> None:
    found = run(tmp_path / "out", layout="modelopt", data_free=True)
    schemes = {s.name for row in found.rows for s in row.candidate.choice.values()}
    assert schemes == {"nvfp4-w4a16", "bf16"}


@pytest.mark.slow
def test_static_fp8_has_measured_scales_that_all_checkpoints_share(tmp_path: Path) -> None:
    found = run(tmp_path / "out", Target(more_bits=1.5), layout="modelopt", headroom=4.0)
    written = tiny.read(tmp_path / "out")
    scales = {n: tiny.array(v) for n, v in written.items() if n.endswith("input_scale")}
    assert found.result.input_scales is not None
    assert found.result.input_scales.headroom == 4.0
    samples = open_samples(MODEL, **TEXT)  # type: ignore[arg-type]
    assert f"{samples.fit_tokens:,} tokens" in found.result.input_scales.calibration
    assert scales
    assert all(np.isfinite(v).all() and (v > 0).all() for v in scales.values())


@pytest.mark.slow
def test_rounded_inputs_are_given_up_where_they_hurt_most(tmp_path: Path) -> None:
    recipe = tmp_path / "w4a4.toml"
    recipe.write_text(
        '[[rule]]\nroles = ["routed_expert", "attention", "linear_attention"]\n'
        'scheme = "nvfp4-w4a4"\n',
        "utf-8",
    )
    found = allocate_command(
        MODEL, tmp_path / "out", str(recipe), Target(more_bits=0.2), jobs=2, **TEXT
    )
    schemes = {s.name for s in the_chosen(found).candidate.choice.values()}
    assert {"nvfp4-w4a4", "nvfp4-w4a16"} <= schemes


@pytest.mark.slow
def test_calibrated_tensors_are_kept(tmp_path: Path) -> None:
    options = {"calibrate": "default", "effort": "fast"}
    found = run(tmp_path / "out", **options)
    quantize(
        MODEL, tmp_path / "u", "nvfp4-all", layout="compressed-tensors", jobs=2, **options, **TEXT
    )
    uniform, written = tiny.read(tmp_path / "u"), tiny.read(tmp_path / "out")
    packed = [name for name in written if name.endswith("weight_packed")]
    assert packed
    assert all(written[name] == uniform[name] for name in packed)
    report = found.result.calibration
    assert report is not None
    choice = the_chosen(found).candidate.choice
    schemes = {r.job: r.scheme for r in report.rows if ".experts." not in r.modules[0]}
    assert schemes == {n: s.name for n, s in choice.items() if n in schemes}
    assert "bf16" not in schemes.values()
    others = [r for r in report.rows if not r.scheme.startswith("nvfp4")]
    assert others
    assert all(r.method == "data-free" and not r.losses for r in others)


def test_the_command_line_allocates(
    made: Allocation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["quantize", str(MODEL), str(tmp_path / "out"), "-r", "nvfp4-all", "-j", "2", "--json"]
    words += ["--layout", "compressed-tensors", "--target-bits", str(BITS)]
    monkeypatch.setattr(sys, "argv", ["nybble", *words, "--samples", "40", "--length", "128"])
    code: object = 0
    try:
        main()
    except SystemExit as done:
        code = done.code or 0
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["allocation"] == json.loads(json.dumps(made.as_json()))
    assert tiny.read(tmp_path / "out") == tiny.read(made.result.out)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [({"effort": "best"}, RecipeError, "belong to --calibrate"),
     ({"headroom": 3.0}, RecipeError, "no option stores an input scale"),
     ({"target": Target(bits=4.0)}, RecipeError, "options lie between"),
     ({"formats": ("nvfp4", "int8")}, RecipeError, "unknown format 'int8'")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        run(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_refused(made: Allocation) -> None:
    with pytest.raises(CheckpointError, match="not an empty folder"):
        run(made.result.out)
    with pytest.raises(CheckpointError, match="is complete"):
        run(made.result.out, resume=True)


def test_a_guard_without_two_windows_is_refused() -> None:
    import torch

    for windows in ((), (torch.zeros(3, dtype=torch.int64),)):
        guard = frozenset(range(len(windows)))
        with pytest.raises(TextError, match="nothing was fitted to"):
            held_out(Samples(tuple(windows), guard, {}))


@pytest.mark.parametrize(
    ("bits", "size", "expected"),
    [("4.75", None, Target(bits=4.75)),
     ("+0.25", None, Target(more_bits=0.25)),
     (None, "1.5", Target(payload_bytes=3 * 2**29)),
     (None, "23GB", Target(payload_bytes=23 * 10**9)),
     (None, None, None)],
)  # fmt: skip
def test_targets_are_read_as_they_are_written(
    bits: str | None, size: str | None, expected: Target | None
) -> None:
    assert target(bits, size, None) == expected


@pytest.mark.parametrize(
    ("bits", "size", "formats"),
    [("4.75", "20", None), ("much", None, None), ("-1", None, None), (None, "0", None),
     (None, None, "fp8")],
)  # fmt: skip
def test_targets_that_cannot_be_meant_are_usage_errors(
    bits: str | None, size: str | None, formats: str | None
) -> None:
    with pytest.raises(typer.BadParameter):
        target(bits, size, formats)
