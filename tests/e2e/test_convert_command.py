"""`nybble convert` as people and scripts meet it: its last line, exit codes, JSON, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1]))
import dialects
import nybble
import tiny
from nybble.cli.convert import command
from nybble.errors import CheckpointError, RecipeError

app = typer.Typer()
app.command()(command)


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_the_last_line_is_the_proof(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    done = ask(source, tmp_path / "out", "--to", "compressed-tensors")
    assert done.exit_code == 0
    count = len(tiny.read(source))
    assert done.stdout.splitlines()[-1] == f"{count} tensors, 0 differing values"
    assert "14 x ...weight -> weight_packed" in done.stdout


def test_forced_roundings_are_listed_and_no_failure(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-fp8", search="absmax")
    done = ask(source, tmp_path / "out", "--to", "compressed-tensors")
    assert done.exit_code == 0
    assert "rounded      model.layers.0.self_attn.q_proj.weight_scale: tensor_scale" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("cannot hold exactly (listed above)")
    exact = ask(source, tmp_path / "exact", "--to", "compressed-tensors", "--exact")
    assert isinstance(exact.exception, RecipeError)
    assert exact.exception.exit_code == 1
    assert not (tmp_path / "exact").exists()


def test_a_dry_run_shows_what_would_change(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-mixed", residual=True)
    done = ask(source, tmp_path / "out", "--to", "compressed-tensors", "--dry-run")
    assert done.exit_code == 0
    assert "left out     6 x ...input_scale: input scale of a weight-only module" in done.stdout
    assert "retyped      8 x ...input_scale: F32 [] -> BF16 [1]" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("tensors to write; nothing was written")
    assert not list(tmp_path.glob("out*"))


def test_json_is_one_document(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "qwen-fp8")
    done = ask(source, tmp_path / "out", "--to", "bf16", "--json")
    document = json.loads(done.stdout)
    assert document["schema"] == "nybble.convert/1"
    assert document["proof"]["differing_values"] == 0
    assert document["decoded"] == 14


@pytest.mark.parametrize(
    "options",
    [
        ("--to", "gguf", "--dry-run"),
        ("--to", "bf16", "--rest", "q8_0"),
        ("--to", "modelopt", "--stack-experts"),
        ("--to", "bf16", "--keep-input-scales"),
        ("--to", "somewhere"),
    ],
)
def test_options_without_effect_are_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    done = ask(tmp_path, tmp_path / "out", *options)
    assert done.exit_code == 2


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    done = ask(source, tmp_path / "out", "--to", "bf16")
    assert isinstance(done.exception, CheckpointError)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


STOPPED = """
import os, sys
from pathlib import Path
import nybble.rewrite.convert as c
from nybble.api.convert import convert
honest = c.CheckpointWriter.write
def write(self, name, *rest):
    honest(self, name, *rest)
    if name.endswith(".weight_packed"):
        print("stopped", flush=True)
        sys.stdin.read()
c.CheckpointWriter.write = write
convert(sys.argv[1], sys.argv[2], "compressed-tensors")
"""


def test_a_killed_run_leaves_nothing_that_loads(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    environment = {**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1])}
    command = [sys.executable, "-c", STOPPED, str(source), str(tmp_path / "out")]
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "stopped\n"
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    left = [p.name for p in (tmp_path / "out.partial").iterdir()]
    assert left == ["model-00001-of-00001.safetensors.part"]
    again = ask(source, tmp_path / "out", "--to", "compressed-tensors")
    assert isinstance(again.exception, CheckpointError)
    assert "is left from a conversion that was stopped; remove it" in str(again.exception)
