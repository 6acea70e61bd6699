"""`nybble check` and `nybble repair` as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from folder import Folder
from range_server import serve

CLEAN = Path(__file__).parents[2] / "zoo" / "clean"
UP = "model.language_model.layers.1.mlp.experts.0.up_proj"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nybble", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    folder = Folder.read(CLEAN / "nybble-w4a4")
    folder.tensors[f"{UP}.weight_scale_2"] *= np.float32(3)
    folder.drop(r"^mtp\.")
    folder.write(tmp_path / "broken")
    return tmp_path / "broken"


def test_a_clean_checkpoint_exits_with_0() -> None:
    done = run("check", CLEAN / "nybble-w4a4", "--source", CLEAN / "source", "--engine", "vllm")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 errors, 0 warnings" in done.stdout


def test_a_broken_one_exits_with_3_and_names_rule_module_and_fix(broken: Path) -> None:
    done = run("check", broken)
    assert done.returncode == 3
    assert "NB103 warning" in done.stdout
    assert "NB210 error" in done.stdout
    assert "layers.1.mlp.experts.0" in done.stdout
    assert "fix: " in done.stdout


def test_json_says_the_same(broken: Path) -> None:
    document = json.loads(run("check", broken, "--json").stdout)
    assert document["schema"] == "nybble.check/1"
    assert document["errors"] == sum(f["severity"] == "error" for f in document["findings"])
    assert {"NB103", "NB210"} <= {f["rule"] for f in document["findings"]}
    assert {e["engine"] for e in document["engines"]} == {
        "vllm",
        "sglang",
        "trtllm",
        "llamacpp",
        "transformers",
    }


def test_sarif_has_what_code_scanning_needs(broken: Path) -> None:
    log = json.loads(run("check", broken, "--output-format", "sarif").stdout)
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    rules = [r["id"] for r in only["tool"]["driver"]["rules"]]
    assert only["results"]
    for result in only["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"]
        assert result["partialFingerprints"]["nybble/1"]


def test_github_annotations_are_one_line_each(broken: Path) -> None:
    done = run("check", broken, "--output-format", "github")
    pattern = re.compile(r"::(error|warning|notice) (file=[^:,]+,)?title=NB\d{3} [^:]*::.+")
    lines = done.stdout.splitlines()
    assert lines
    assert all(pattern.fullmatch(line) for line in lines)


def test_markdown_is_a_table(broken: Path) -> None:
    done = run("check", broken, "--output-format", "markdown")
    rows = [line for line in done.stdout.splitlines() if line.startswith("| NB")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_select_and_ignore(broken: Path) -> None:
    only = json.loads(run("check", broken, "--json", "--select", "NB210,NB211").stdout)
    assert {f["rule"] for f in only["findings"]} == {"NB210"}
    rest = json.loads(run("check", broken, "--json", "--ignore", "NB2", "--ignore", "NB103").stdout)
    assert not {f["rule"] for f in rest["findings"]} & {"NB210", "NB103"}
    wrong = run("check", broken, "--select", "NB999")
    assert wrong.returncode == 1
    assert "'NB999' is no rule" in wrong.stderr


def test_a_baseline_sets_aside_what_is_known(broken: Path, tmp_path: Path) -> None:
    assert run("check", broken, "--write-baseline", tmp_path / "b.json").returncode == 3
    again = run("check", broken, "--baseline", tmp_path / "b.json")
    assert again.returncode == 0
    assert "more in the baseline" in " ".join(again.stdout.split())
    folder = Folder.read(broken)
    folder.tensors[f"{UP.replace('.0.up', '.1.up')}.weight_scale_2"] *= np.float32(3)
    folder.write(tmp_path / "worse")
    assert run("check", tmp_path / "worse", "--baseline", tmp_path / "b.json").returncode == 3


def test_a_lock_notices_a_changed_byte(tmp_path: Path) -> None:
    Folder.read(CLEAN / "nybble-dense").write(tmp_path / "model")
    lock = tmp_path / "lock.json"
    assert run("check", tmp_path / "model", "--write-lock", lock).returncode == 0
    assert run("check", tmp_path / "model", "--lock", lock).returncode == 0
    shard = next((tmp_path / "model").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    done = run("check", tmp_path / "model", "--lock", lock, "--select", "NB090")
    assert done.returncode == 3
    assert shard.name in done.stdout


def test_explain_prints_a_rule() -> None:
    done = run("check", "--explain", "NB210")
    assert done.returncode == 0
    assert "NB210" in done.stdout
    assert "Fix: " in done.stdout
    assert "https://github.com/" in done.stdout


def test_a_checkpoint_behind_http_gives_the_same_findings(broken: Path) -> None:
    near = json.loads(run("check", broken, "--json").stdout)
    with serve(broken) as served:
        far = json.loads(run("check", served.address, "--json").stdout)
    assert [f["message"] for f in far["findings"] if f["severity"] != "note"] == [
        f["message"] for f in near["findings"] if f["severity"] != "note"
    ]


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    empty = run("check", tmp_path)
    assert empty.returncode == 1
    assert "nothing to check" in empty.stderr
    assert "no such folder" in run("check", tmp_path / "absent").stderr


def test_repair_shows_writes_checks_and_undoes(broken: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", CLEAN / "source"
    shown = run("repair", broken, out, "--source", source, "--dry-run")
    assert not out.exists()
    assert "NB120  tensor changed" in shown.stdout  # the source says which of the two is wrong
    assert "tensor added: mtp.fc.weight" in shown.stdout
    assert "nothing is written" in shown.stdout
    done = run("repair", broken, out, "--source", source)
    assert done.returncode == 0
    assert "0 errors" in done.stdout
    assert run("check", out, "--source", source).returncode == 0
    assert run("repair", out, tmp_path / "back", "--undo").returncode == 0
    before, back = Folder.read(broken), Folder.read(tmp_path / "back")
    assert before.files == back.files
    assert {n: v.tobytes() for n, v in before.tensors.items()} == {
        n: v.tobytes() for n, v in back.tensors.items()
    }


def test_repair_of_a_sound_checkpoint_writes_nothing(tmp_path: Path) -> None:
    done = run("repair", CLEAN / "nybble-w4a4", tmp_path / "out")
    assert done.returncode == 0
    assert "nothing is written" in done.stdout
    assert not (tmp_path / "out").exists()


def test_repair_refuses_to_write_into_its_input(broken: Path) -> None:
    done = run("repair", broken, broken / "out")
    assert done.returncode == 1
    assert "lies inside" in done.stderr
