"""The demo's offline part, run as its reader runs it: the statements on the screen hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"
WIDTH = 100


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def screen(folder: Path) -> str:
    told = run("--offline", "--out", folder)
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_every_source_tensor_is_accounted_for(screen: str) -> None:
    text = " ".join(screen.split())
    assert "193 of 193 source tensors have a place" in text
    assert "mtp 19 of 19 byte-identical" in text
    assert "vision 33 of 33 byte-identical" in text


def test_the_other_decoder_finds_nothing_wrong(screen: str) -> None:
    assert "243 modules, 6,684,672 weights decoded; 0 wrong" in screen
    assert "and nvfp4: 243 modules, 6,684,672 weights decoded; 0 wrong" in screen


def test_searches_gain_at_equal_bytes(screen: str) -> None:
    pattern = r"^(absmax|four-six|mse) +([\d.]+) +([\d.]+) +[\d.]+ +([\d,]+) "
    rows = re.findall(pattern, screen, re.MULTILINE)
    assert [row[0] for row in rows] == ["absmax", "four-six", "mse"]
    errors_db = [float(row[1]) for row in rows]
    assert errors_db == [float(row[2]) for row in rows]  # nybble's and the other decoder's
    assert 20 < errors_db[0] < errors_db[1] - 0.5
    assert errors_db[1] < errors_db[2] - 0.4
    assert {row[3] for row in rows} == {"8,226,924"}


def test_better_scales_lose_less_of_the_model(screen: str) -> None:
    pattern = (
        r"^(nvfp4\S*(?: \S+)?) +(0\.\d+)  +(0\.\d+) to (0\.\d+) +([\d.]+)% .* (none|FP8 static)$"
    )
    rows = re.findall(pattern, screen, re.MULTILINE)
    assert [row[0] for row in rows] == [
        *("nvfp4-all, absmax", "nvfp4-all, four-six", "nvfp4-all, mse", "nvfp4-all, calibrated"),
        "nvfp4",
    ]
    kl = [float(row[1]) for row in rows]
    assert all(float(row[2]) < value < float(row[3]) for row, value in zip(rows, kl, strict=True))
    assert kl[2] < 0.9 * kl[0]
    assert kl[3] < 0.7 * kl[0]
    assert kl[4] < kl[2]
    assert [row[5] for row in rows] == ["none", "none", "none", "none", "FP8 static"]
    assert re.search(r"mse +2\d% less KL than absmax .* paired", screen)
    assert re.search(r"calibrated +[3-9]\d% less KL than absmax .* paired", screen)


def test_the_packed_file_speaks(screen: str) -> None:
    assert "  > Once upon a time, there was a little girl named Lily." in screen
    assert "tokens/s at batch 1" in screen


def test_it_ends_with_two_lines_to_serve_what_was_made(screen: str, folder: Path) -> None:
    end = screen[screen.index("-- your own model") :]
    assert f"nybble serve {folder / 'hybrid-chat-mtp' / 'nvfp4-all'}\ncurl " in end
    assert "http://127.0.0.1:8000/v1/chat/completions" in end


def test_what_is_not_real_is_said(screen: str) -> None:
    text = " ".join(screen.split())
    assert "vision tower (0.3 million) is random and untrained" in text
    assert "SmolLM2-135M-Instruct, left out (--offline)" in text
    assert "no benchmark" in text


def test_the_screen_is_100_columns_wide(screen: str) -> None:
    long = [line for line in screen.splitlines() if len(line) > WIDTH]
    assert [line for line in long if str(Path.cwd()) not in line and "/" not in line] == []


def test_a_second_run_replaces_the_first(screen: str, folder: Path) -> None:
    (folder / "stale").touch()
    assert run("--offline", "--out", folder).returncode == 0
    assert not (folder / "stale").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    told = run("--offline", "--out", tmp_path)
    assert told.returncode == 1
    assert "is not the work of this demo" in told.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
