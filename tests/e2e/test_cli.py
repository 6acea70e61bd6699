"""The command line as people and scripts meet it: help, exit codes, JSON, words of errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble
import nybble.api.quantize as api
import tiny
from command_line import Answer, Ask, asking
from nybble.checkpoint.disk import Disk

SOURCE = str(Path(nybble.__file__).parents[1])
ENVIRONMENT = {**os.environ, "PYTHONPATH": SOURCE, "COLUMNS": "120"}
COMMANDS = ("plan", "quantize", "inspect", "diff", "doctor")


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return asking(monkeypatch, capsys)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3_5_moe", vision=True)


# --------------------------------------------------------------------------------- help, imports


def test_python_m_nybble_is_the_command_line() -> None:
    answer = process("-m", "nybble", "--version")
    assert (answer.returncode, answer.stdout) == (0, f"nybble {nybble.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(ask: Ask, command: str) -> None:
    answer = ask(command, "--help")
    assert answer.code == 0
    assert answer.out.startswith(f"Usage: nybble {command}")
    assert ask(command, "-h").out == answer.out


def test_help_lists_every_command(ask: Ask) -> None:
    answer = ask("--help")
    assert answer.code == 0
    assert all(f"  {command} " in answer.out for command in COMMANDS)


def imported_by(code: str, *argv: str) -> list[str]:
    """Foreign packages that a piece of code has in memory when it ends."""
    watched = (
        "('numpy', 'ml_dtypes', 'torch', 'transformers', 'safetensors', 'rich', 'huggingface_hub')"
    )
    script = (
        f"import sys, atexit\nsys.argv = ['nybble', *{list(argv)!r}]\n"
        f"atexit.register(lambda: sys.stderr.write('LOADED ' + ' '.join(m for m in {watched} if m "
        "in sys.modules)))\n"
        f"{code}\n"
    )
    answer = process("-c", script)
    assert "LOADED" in answer.stderr, answer.stderr
    return answer.stderr.rpartition("LOADED")[2].split()


def test_neither_import_nor_help_loads_numpy() -> None:
    assert imported_by("import nybble") == []
    assert "numpy" not in imported_by("from nybble.cli import main; main()", "--help")
    assert "numpy" not in imported_by("from nybble.cli import main; main()", "quantize", "--help")


def test_nothing_that_runs_no_model_loads_torch(model: Path, tmp_path: Path) -> None:
    run = "from nybble.cli import main; main()"
    for argv in (
        ("quantize", str(model), str(tmp_path / "out"), "--data-free", "--json"),
        ("inspect", str(tmp_path / "out")),
    ):
        found = imported_by(run, *argv)
        assert "numpy" in found
        assert not {"torch", "transformers", "huggingface_hub"} & set(found)


def test_public_names_load_on_first_use() -> None:
    assert set(nybble.__all__) <= set(dir(nybble))
    for name in nybble.__all__:
        assert getattr(nybble, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nybble.nothing


# --------------------------------------------------------------------------- quantize as a user


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_the_chat_model_from_a_shell(tmp_path: Path, layout: str) -> None:
    path = tiny.copy_model("hybrid-chat-mtp", tmp_path / "chat")
    before = tiny.tree(path)
    out = tmp_path / "chat-nvfp4"
    answer = process(
        *("-m", "nybble", "quantize", "chat", "chat-nvfp4", "--data-free"),
        *("--layout", layout, "--json"),
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert list(document)[0] == "schema"
    assert document["schema"] == "nybble.quantize/1"
    assert document["audit"]["bytes"] == document["bytes"]
    assert document["audit"]["copied_by_role"]["mtp"] == 19
    assert document["audit"]["copied_by_role"]["vision"] == 33
    assert "quantize:" in answer.stderr  # progress is not on stdout
    assert tiny.tree(path) == before
    source, written = tiny.read(path), tiny.read(out)
    assert sum(len(v[2]) for v in written.values()) == document["bytes"]
    assert len(written) == document["tensors"]
    aside = [n for n in source if n.startswith(("mtp.", "model.visual."))]
    assert all(written[n] == source[n] for n in aside)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == before[name]
    assert (out / "generation_config.json").read_bytes() == before["generation_config.json"]
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads(before["config.json"])


def test_text_output_tells_before_and_after(ask: Ask, tmp_path: Path, model: Path) -> None:
    answer = ask("quantize", model, tmp_path / "out", "--recipe", "nvfp4-all")
    assert answer.code == 0
    words = ("written and opened again", "verified", "identical", "SQNR dB", "routed_expert")
    assert all(word in answer.out for word in words)
    assert "mtp 19" in answer.out
    assert "why not 4x" in answer.out


def test_text_of_a_plan_has_every_role_and_the_hub_figure(ask: Ask, model: Path) -> None:
    answer = ask("plan", model)
    assert answer.code == 0
    assert "hub sidebar" in answer.out
    assert "active" in answer.out
    assert "in BF16" in answer.out  # the data-free form
    document = json.loads(ask("plan", model, "--json").out)
    for row in document["rows"]:
        assert row["role"] in answer.out
    assert f"{document['bytes']:,} bytes" in answer.out


def test_a_recipe_without_a_data_free_form_is_said_to_be_one(ask: Ask, model: Path) -> None:
    answer = ask("plan", model, "--recipe", "nvfp4-w4a4")
    assert answer.code == 0
    assert "no such form: nvfp4-w4a4 quantizes activations with measured scales" in answer.out
    assert json.loads(ask("plan", model, "-r", "nvfp4-w4a4", "--json").out)["data_free"] is None


def test_a_dry_run_writes_nothing(ask: Ask, tmp_path: Path, model: Path) -> None:
    answer = ask("quantize", model, tmp_path / "out", "--dry-run")
    assert answer.code == 0
    assert "nothing written" in answer.out
    document = json.loads(ask("quantize", model, tmp_path / "out", "--dry-run", "--json").out)
    assert document["dry_run"] is True
    assert document["audit"] is None
    assert list(tmp_path.iterdir()) == []


def test_planned_bytes_of_a_dry_run_are_those_of_the_run(
    ask: Ask, tmp_path: Path, model: Path
) -> None:
    planned = json.loads(ask("plan", model, "--data-free", "--json").out)
    run = ("quantize", model, tmp_path / "o", "--data-free", "--json")
    dry = json.loads(ask(*run, "--dry-run").out)
    real = json.loads(ask(*run).out)
    assert planned["bytes"] == dry["bytes"] == real["bytes"] == real["audit"]["bytes"]


@pytest.mark.parametrize("spelling", [["--json"], ["--output-format", "json"]])
@pytest.mark.parametrize("command", ["plan", "inspect", "doctor"])
def test_json_documents_begin_with_their_schema(
    ask: Ask, model: Path, command: str, spelling: list[str]
) -> None:
    answer = ask(command, *([] if command == "doctor" else [model]), *spelling)
    assert answer.code == 0
    document = json.loads(answer.out)
    assert list(document)[0] == "schema"
    assert document["schema"] == f"nybble.{command}/1"


def test_json_has_no_infinity(ask: Ask, tmp_path: Path) -> None:
    cfg = tiny.config("qwen3")
    values = tiny.tensors(cfg)
    for value in values.values():
        value[:] = 0
    path = tiny.write(tmp_path / "m", cfg, values)
    answer = ask("quantize", path, tmp_path / "out", "--data-free", "--json")
    assert answer.code == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(answer.out, parse_constant=refuse)
    assert document["audit"]["sqnr_db"] is None


def test_a_relative_output_beside_the_source(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.checkpoint(tmp_path / "m", "qwen3")
    monkeypatch.chdir(tmp_path)
    assert ask("quantize", "m", "m-nvfp4", "--data-free").code == 0
    assert (tmp_path / "m-nvfp4" / "config.json").exists()


# ------------------------------------------------------------------------------------ exit codes


def test_usage_errors_are_2_and_name_the_choices(ask: Ask, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    for arguments, words in (
        (["quantize", model, out, "--search", "best"], ("absmax", "four-six", "mse", "'best'")),
        (["quantize", model, out, "--output-format", "yaml"], ("text", "json", "'yaml'")),
        (["plan", model, "--output-format", "yaml"], ("text", "json")),
        (["quantize", model, out, "--shard-size", "much"], ("500MB", "'much'")),
        (["quantize", model, out, "--shard-size", "0"], ("at least one byte",)),
        (["quantize", model, out, "--shard-size", "5GiB"], ("500MB",)),
        (["quantize", model, out, "--jobs", "0"], ("--jobs",)),
        (["quantize", model], ("OUT",)),
        (["quantise", model, out], ("quantise",)),
        (["quantize", model, out, "--reciepe", "x"], ("--reciepe",)),
    ):
        answer = ask(*arguments)
        assert answer.code == 2, arguments
        assert answer.out == ""
        assert all(word in answer.err for word in words), answer.err
        assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == []


def test_errors_are_1_and_one_line(
    ask: Ask, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> None:
    out = tmp_path / "out"
    filled = tmp_path_factory.mktemp("filled")
    (filled / "kept").touch()
    for arguments, words in (
        (["plan", tmp_path / "nowhere"], ("nowhere: no such folder", "download")),
        (["quantize", model, out, "-r", "fp8"], ("fp8-dynamic", "--layout compressed-tensors")),
        (
            ["quantize", model, out, "--data-free", "-r", "nvfp4-w4a4"],
            ("input_scale", "nvfp4-all"),
        ),
        (["quantize", model, model, "--data-free"], ("the source folder itself",)),
        (["quantize", model, model / "out", "--data-free"], ("inside the source folder",)),
        (["quantize", model, filled, "--data-free"], ("exists and is not empty",)),
        (["plan", model, "--data-free", "-r", "nvfp4-redhat"], ("nvfp4-redhat", "measure")),
    ):
        answer = ask(*arguments)
        assert answer.code == 1, arguments
        assert answer.err.startswith("error: ")
        assert answer.err.count("\n") == 1
        assert all(word in answer.err for word in words), answer.err
    assert list(tmp_path.iterdir()) == []


def test_misspelt_recipes_and_layouts_are_usage_errors(ask: Ask, model: Path) -> None:
    for arguments, words in (
        (["plan", model, "--recipe", "nvfp5"], ("nvfp5", "nvfp4-redhat", ".toml")),
        (["plan", model, "--layout", "gguf"], ("gguf", "modelopt", "compressed-tensors")),
    ):
        answer = ask(*arguments)
        assert answer.code == 2
        assert all(word in answer.err for word in words), answer.err


def test_a_bad_format_is_found_out_before_the_work(
    ask: Ask, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after an hour of it."""
    monkeypatch.setattr(api, "execute", None)
    answer = ask("quantize", model, tmp_path / "out", "--output-format", "xml")
    assert answer.code == 2


def test_an_output_that_exists_is_an_error_that_says_what_to_do(
    ask: Ask, tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    answer = ask("quantize", model, out, "--data-free")
    assert answer.code == 1
    assert f"{out}: exists and is not empty; name another output, or remove it" in answer.err
    assert tiny.tree(tmp_path) == {"out/precious": b"x"}


def test_failed_verification_is_3(
    ask: Ask, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_execute = api.execute

    def spoil(plan: Any, out: Path, *arguments: Any, **options: Any) -> None:
        true_execute(plan, out, *arguments, **options)
        for file in out.glob("*.safetensors"):
            data = file.read_bytes()
            norm = tiny.read(model)["model.language_model.norm.weight"][2]
            file.write_bytes(data.replace(norm, bytes(len(norm))))

    monkeypatch.setattr(api, "execute", spoil)
    answer = ask("quantize", model, tmp_path / "out", "--data-free")
    assert answer.code == 3
    assert "model.language_model.norm.weight differs from its source" in answer.err
    assert "Do not use this folder" in answer.err


def test_what_does_not_fit_is_4(
    ask: Ask, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 4096)
    answer = ask("quantize", model, tmp_path / "out", "--data-free")
    assert answer.code == 4
    assert "free space or name another disk" in answer.err
    assert list(tmp_path.iterdir()) == []


SLOW_RUN = """
import signal, sys, time
import nybble.quantize.run as run
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without
run.COMMIT_BYTES = 1
true_copy, copies = run.Run._copy, []
def copy(self, item):
    copies.append(item)
    time.sleep(0.02 if len(copies) < 20 else 1)  # a busy machine must not finish before the signal
    true_copy(self, item)
run.Run._copy = copy
from nybble.cli import main
main()
"""


def wait_for_commits(journal: Path, lines: int, running: subprocess.Popen[str]) -> None:
    for _ in range(1000):
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            return
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("no journal")


@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)]
)
def test_a_run_that_is_stopped_goes_on_with_resume(
    tmp_path: Path, model: Path, sign: signal.Signals, code: int, ask: Ask
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(model), str(out), "--shard-size", "60KB", "--data-free"]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, *arguments],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "out.partial" / "journal.jsonl"
    wait_for_commits(journal, 12, running)
    running.send_signal(sign)
    stdout, stderr = running.communicate(timeout=180)
    assert running.returncode == code, stderr
    assert "accounted" in stdout  # the plan, before the work; nothing of the result
    assert "verified" not in stdout
    assert "Traceback" not in stderr
    if sign == signal.SIGINT:
        assert "--resume continues" in stderr
    assert not out.exists()
    assert journal.exists()
    again = ask(*arguments)
    assert again.code == 1
    assert "continue it with --resume" in again.err
    other = ask(*arguments, "--resume", "--search", "absmax")
    assert other.code == 1
    assert 'search: "mse" then, "absmax" now' in other.err
    assert ask(*arguments, "--resume").code == 0
    assert not (tmp_path / "out.partial").exists()
    clean = ("quantize", model, tmp_path / "clean", "--shard-size", "60KB", "--data-free")
    assert ask(*clean).code == 0
    assert tiny.tree(out) == tiny.tree(tmp_path / "clean")


def test_a_reader_that_leaves_early_is_no_traceback(model: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "nybble", "plan", str(model), "--json"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    assert "Traceback" not in running.stderr.read()
    running.wait()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500_000_000),
        ("5GB", 5 * 10**9),
        ("1000000", 10**6),
        (" 1.5 kb ", 1500),
        ("1tb", 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_decimal(text: str, size: int) -> None:
    from nybble.cli.output import parse_bytes

    assert parse_bytes(text) == size


def test_forced_kernels_that_cannot_run_are_an_error(
    ask: Ask, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_KERNELS", "cuda")
    answer = ask("quantize", model, tmp_path / "out", "--data-free")
    assert answer.code == 1
    assert "NYBBLE_KERNELS=cuda: unknown back end; choose cpu or reference" in answer.err


def lines_of(answer: Answer) -> Sequence[str]:
    return answer.out.splitlines()


def test_tables_are_never_cut(ask: Ask, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = ask("plan", model)
    monkeypatch.setenv("COLUMNS", "40")
    assert lines_of(ask("plan", model)) == lines_of(wide)
