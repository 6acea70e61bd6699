"""`nybble quantize --calibrate` as people meet it: what it leaves, what it says, what it refuses.

How codes are chosen is tested in tests/unit/test_rounding.py, interruptions in
tests/property/test_calibrated_resume.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble
import tiny
from command_line import Ask, asking
from nybble.api.calibrated import calibration_folder, refuse_calibrated_on
from nybble.api.quantize import Result, quantize
from nybble.calibrate.report import read_report
from nybble.errors import EvaluationError, NybbleError, RecipeError
from nybble.evaluate.windows import load_suite

STORIES, CHAT = tiny.MODELS / "stories-hybrid-moe", tiny.MODELS / "hybrid-chat-mtp"
SMALL = ("--samples", 8, "--length", 128, "--jobs", 1)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return asking(monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of the library's with the least effort."""
    out = tmp_path_factory.mktemp("made") / "out"
    return quantize(
        STORIES,
        out,
        "nvfp4-all",
        calibrate="default",
        effort="fast",
        samples=16,
        length=128,
        jobs=1,
    )


# ------------------------------------------------------------------------------- what it leaves


def test_the_report_has_a_row_for_every_linear_and_says_what_was_won(made: Result) -> None:
    report = read_report(made.out)
    assert report is not None
    assert report == made.calibration
    planned = {job.name: [m.module for m in job.members] for job in made.plan.jobs}
    assert {r.job: list(r.modules) for r in report.rows} == planned
    document = json.loads((made.out / "report.json").read_text())
    assert document["totals"]["won_over_absmax"] > 0.2
    assert document["totals"]["won_over_mse"] >= 0
    for row in report.rows:  # the guard: never worse than what needs no data
        assert row.loss <= row.losses["mse"]
    assert document["samples"]["tokens"]["fit"] + document["samples"]["tokens"]["guard"] == 2048
    assert document["conditions"]["threads"] == 1
    text = (made.out / "report.txt").read_text()
    assert "model.layers.0.linear_attn" in text
    assert not calibration_folder(made.out).exists()


def test_two_runs_write_the_same_bytes(made: Result, tmp_path: Path) -> None:
    again = quantize(
        STORIES,
        tmp_path / "out",
        "nvfp4-all",
        calibrate="default",
        effort="fast",
        samples=16,
        length=128,
        jobs=1,
    )
    assert tiny.tree(again.out) == tiny.tree(made.out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_codes_differ_from_the_data_free_form(made: Result, tmp_path: Path) -> None:
    plain = quantize(STORIES, tmp_path / "plain", "nvfp4-all", data_free=True, jobs=1)
    ours, theirs = tiny.read(made.out), tiny.read(plain.out)
    assert {n: v[:2] for n, v in ours.items()} == {n: v[:2] for n, v in theirs.items()}
    changed = {n for n in ours if ours[n] != theirs[n]}
    assert changed
    assert all(n.endswith((".weight", ".weight_scale")) for n in changed)
    assert plain.calibration is None


def test_the_command_line_tells_and_writes(ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = ask("quantize", STORIES, out, "-r", "nvfp4-all", "--calibrate", *SMALL)
    assert answer.code == 0, answer.err
    assert "calibrating on" in answer.err
    assert "of memory at most" in answer.err
    assert answer.err.index("of memory at most") < answer.err.index("calibrate:")
    for words in ("calibrated ", "gptq-x", "routers choose", "report.txt", "were planned"):
        assert words in answer.out
    report = read_report(out)
    assert report is not None
    assert report.effort == "default"
    assert [a.layer for a in report.routing] == [f"layer {n} of 4" for n in (1, 2, 3, 4)]
    assert all(0.5 < a.experts <= 1 for a in report.routing)


def test_json_has_the_report_without_its_rows(ask: Ask, tmp_path: Path) -> None:
    arguments = ("-r", "nvfp4-all", "--json", "--effort", "fast", "--calibrate", *SMALL)
    answer = ask("quantize", STORIES, tmp_path / "out", *arguments)
    found = json.loads(answer.out)["calibration"]
    assert found["schema"] == "nybble.calibration/1"
    assert found["effort"] == "fast"
    assert found["planned_bytes"] > 0
    assert found["peak_bytes"] > found["planned_bytes"]
    assert "linears" not in found


@pytest.mark.parametrize("model", [STORIES, CHAT], ids=lambda folder: folder.name)
def test_input_scales_are_measured_on_the_same_windows(tmp_path: Path, model: Path) -> None:
    result = quantize(
        model,
        tmp_path / "out",
        "nvfp4-w4a4",
        calibrate="default",
        effort="fast",
        samples=16,
        length=128,
        jobs=1,
    )
    assert result.input_scales is not None
    assert result.calibration is not None
    tokens: Any = result.calibration.samples["tokens"]
    assert result.input_scales.tokens == tokens["fit"]
    assert str(result.calibration.samples["sha256"])[:16] in result.input_scales.calibration
    assert {r.scheme for r in result.calibration.rows} == {"nvfp4-w4a4"}


def test_the_scales_of_the_cache_are_written_beside_calibrated_weights(
    ask: Ask, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("-r", "nvfp4", "--kv-scales", "--effort", "fast", "--calibrate", *SMALL)
    answer = ask("quantize", STORIES, out, *arguments)
    assert answer.code == 0, answer.err
    found = {
        n: tiny.array(v) for n, v in tiny.read(out).items() if n.endswith(("k_scale", "v_scale"))
    }
    assert sorted(name.rpartition(".")[2] for name in found) == ["k_scale", "v_scale"]
    assert all(2.0**-64 <= float(value) <= 2.0**64 for value in found.values())
    assert "KV scales    1 layers, two each; all 1" in answer.out
    report = read_report(out)
    assert report is not None
    # Only NVFP4 has codes to choose; what else the recipe makes is listed without losses.
    assert {r.scheme for r in report.rows if r.losses} == {"nvfp4-w4a16"}


def test_what_was_measured_of_the_cache_is_reported_layer_by_layer(tmp_path: Path) -> None:
    result = quantize(
        CHAT, tmp_path / "out", "nvfp4", kv_scales=True, calibration_tokens=512, jobs=1
    )
    rows: Any = result.as_json()["kv_scales"]
    assert [row["layer"] for row in rows] == [-1, 3, 7]  # the MTP head's is measured, not written
    for row in rows:
        assert row["k_scale"] == row["v_scale"] == 1
        assert 0 < row["k_median"] < row["k_amax"] < 400
    written = sorted(n for n in tiny.read(result.out) if n.endswith(("k_scale", "v_scale")))
    assert [name.split(".layers.")[1][0] for name in written] == ["3", "3", "7", "7"]


def test_promoted_recipes_are_calibrated_too(ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("-r", "nvfp4-w4a4", "--promote", 0.3, "--json", "--effort", "fast", "--calibrate")
    answer = ask("quantize", STORIES, out, *arguments, *SMALL)
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["promotion"]["recipe"] == str(tmp_path / "out.recipe.toml")
    report = read_report(out)
    assert report is not None
    assert {r.scheme for r in report.rows} == {"nvfp4-w4a4", "nvfp4-w4a16"}


# ------------------------------------------------------------------------------- how it is called


def test_the_value_of_calibrate_is_optional(ask: Ask, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("One story that goes on and on, and never ends. " * 900)
    for arguments in (["--calibrate"], ["--calibrate", "--effort", "best"], ["--calibrate", text]):
        answer = ask(
            "quantize", STORIES, tmp_path / "out", "-r", "nvfp4-all", "--dry-run", *arguments
        )
        assert answer.code == 0, answer.err
    # In front of MODEL too: no folder is a text.
    answer = ask("quantize", "--calibrate", STORIES, tmp_path / "out", "--dry-run")
    assert answer.code == 0, answer.err
    answer = ask("quantize", "--calibrate", text, tmp_path / "out")
    assert answer.code == 2
    assert "OUT" in answer.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--effort", "best"], 1, "--effort belongs to --calibrate"),
        (["--samples", 3], 1, "--samples belongs to --calibrate"),
        (["--length", 32], 1, "--length belongs to --calibrate"),
        (["--allow-mixed"], 1, "--allow-mixed belongs to --calibrate"),
        (["--calibrate", "--effort", "most"], 2, "fast, default, best"),
        (["--calibrate", "--data-free"], 1, "leave one out"),
        (["--calibrate", "--calibration-text", "x"], 1, "give that text to --calibrate"),
        (["--calibrate", "--calibration-tokens", 9], 1, "--samples and --length"),
        (["--calibrate", "--search", "absmax"], 1, "leave it out"),
        (["--calibrate", "--allow-mixed"], 1, "needs --resume"),
        (["--kv-scales", "--data-free"], 1, "--kv-scales measures keys and values"),
        (["--promote", 0.1, "--data-free"], 1, "leave --data-free and --dry-run out"),
        (["--target-bits", "+0.25", "--promote", 0.1], 1, "--promote and a target of bits"),
        (["--target-bits", "4.7", "--target-size", "1"], 2, "the same thing twice"),
        (["--calibrate", "nowhere.txt"], 1, "no such file, and no preset"),
        (["--calibrate", "nvidia"], 1, "nvidia:FOLDER"),
        (["--calibrate", "--samples", 0], 2, "--samples"),
        (["--calibrate", "--length", 4096], 1, "the model's context of 1,024"),
        (["--calibrate", "--samples", 1, "--length", 64], 1, "at least 1,024 are needed"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    ask: Ask, tmp_path: Path, arguments: list[object], code: int, words: str
) -> None:
    if "--calibration-text" in arguments:
        text = tmp_path / "x"
        text.write_text("words")
        arguments = [text if a == "x" else a for a in arguments]
    answer = ask("quantize", STORIES, tmp_path / "out", "-r", "nvfp4-all", *arguments)
    assert answer.code == code, answer.err
    assert words in " ".join(answer.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
    assert not any(p.name.startswith("out") for p in tmp_path.iterdir())


def test_a_recipe_without_nvfp4_has_nothing_to_calibrate(tmp_path: Path) -> None:
    with pytest.raises(NybbleError, match="recipe fp8 has no linear in NVFP4"):
        quantize(STORIES, tmp_path / "out", "fp8", layout="compressed-tensors", calibrate="default")


def test_without_calibrate_torch_stays_out(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nybble.api.quantize import quantize; "
        f"quantize({str(STORIES)!r}, {str(tmp_path / 'out')!r}, 'nvfp4-all', data_free=True); "
        "sys.exit('torch' in sys.modules)"
    )
    path = str(Path(nybble.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False)
    assert done.returncode == 0


def test_only_one_chooses_the_codes(tmp_path: Path) -> None:
    rounder: Any = object()
    with pytest.raises(RecipeError, match="calibrate and rounder both choose the codes"):
        quantize(STORIES, tmp_path / "out", "nvfp4-all", calibrate="default", rounder=rounder)
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- killed

KILLED_RUN = """
import os, signal
from nybble.quantize.run import Run
give, calls = Run._give, []
def last(self, jobs, given):
    calls.append(jobs[0].members[0].module)
    if sum(".layers.1." in name for name in calls) == 3:  # nothing of this layer is in the journal
        os.kill(os.getpid(), signal.SIGKILL)
    return give(self, jobs, given)
Run._give = last
from nybble.cli import main
main()
"""


def test_a_killed_run_goes_on_to_the_same_bytes(ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["-r", "nvfp4-all", "--calibrate", *map(str, SMALL)]
    environment = {**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, "quantize", str(STORIES), str(out), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert calibration_folder(out).exists()
    told = ask("quantize", STORIES, out, *arguments)
    assert told.code == 1
    assert "continue it with --resume" in told.err
    other = ask("quantize", STORIES, out, *arguments, "--resume", "--effort", "fast")
    assert other.code == 1
    assert "effort" in other.err
    assert ask("quantize", STORIES, out, *arguments, "--resume").code == 0
    assert ask("quantize", STORIES, tmp_path / "clean", *arguments).code == 0
    assert tiny.tree(out) == tiny.tree(tmp_path / "clean")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]


# ------------------------------------------------------------------------------------- judging


def test_the_text_that_judges_is_not_calibrated_on(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(load_suite("wikitext2").content[50_000:90_000], "utf-8")
    out = tmp_path / "out"
    answer = ask("quantize", STORIES, out, "-r", "nvfp4-all", "--calibrate", path)
    assert answer.code == 1
    assert "wikitext2 shares about" in answer.err
    assert not out.exists()


def test_a_checkpoint_is_not_judged_on_what_it_was_calibrated_on(made: Result) -> None:
    from nybble.calibrate import corpus

    seen = "\n\n".join(d.text or "" for d in list(corpus.mixture())[:12])
    with pytest.raises(EvaluationError, match=r"my\.txt shares about .* what out was calibrated"):
        refuse_calibrated_on(made.out, seen, "my.txt")
    refuse_calibrated_on(made.out, load_suite("wikitext2").content, "wikitext2")
    refuse_calibrated_on(STORIES, seen, "my.txt")  # never calibrated


@pytest.mark.parametrize("command", ["eval", "perplexity"])
def test_the_commands_that_judge_refuse_it(
    ask: Ask, made: Result, tmp_path: Path, command: str
) -> None:
    from nybble.calibrate import corpus

    seen = tmp_path / "seen.txt"
    seen.write_text("\n\n".join(d.text or "" for d in list(corpus.mixture())[:12]), "utf-8")
    reference = ("--reference", STORIES) if command == "eval" else ()
    answer = ask(command, made.out, *reference, "--text", seen, "--length", 128)
    assert answer.code == 1
    assert "seen.txt shares about" in answer.err
    assert "what out was calibrated on" in " ".join(answer.err.split())
    assert answer.out == ""


def test_a_dry_run_reads_the_text_and_says_what_it_would_take(ask: Ask, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = (STORIES, out, "-r", "nvfp4-all", "--dry-run", "--calibrate")
    done = ask("quantize", *common, "default", "--samples", 8, "--length", 256)
    assert done.code == 0, done.err
    assert "of memory at most" in done.err
    assert "of disk for hidden states" in done.err
    refused = ask("quantize", *common, tmp_path / "nowhere.txt")
    assert refused.code == 1
    assert "nowhere.txt" in refused.err
    assert list(tmp_path.iterdir()) == []
