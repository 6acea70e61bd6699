"""`nybble doctor` and `nybble kernels build`: what they say, and what they leave alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import nybble
from nybble.api.doctor import OPTIONAL, REQUIRED, Environment, advise, doctor
from nybble.cli import main
from nybble.cli.doctor import render
from nybble.kernels import build
from nybble.machine import available_bytes, cgroup_limits


@pytest.fixture(scope="module")
def machine() -> Environment:
    return doctor()


@pytest.fixture
def sound(machine: Environment) -> Environment:
    """This machine without anything to complain about."""
    return replace(
        machine,
        instruction_sets=("avx2", "portable"),
        kernels="cpu avx2",
        settings={},
        cores=2,
        cpu_quota=None,
        memory_available_bytes=1 << 34,
        memory_limit_bytes=None,
        working_folder_free_bytes=1 << 40,
        cache_is_writable=True,
        packages=dict.fromkeys((*REQUIRED, *OPTIONAL), "1.0"),
    )


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nybble", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_json_has_every_field(machine: Environment) -> None:
    document = json.loads(json.dumps(machine.as_json()))
    assert list(document) == ["schema", *(field.name for field in fields(Environment))]
    assert document["schema"] == "nybble.doctor/1"
    assert document["nybble"] == nybble.__version__
    assert document["cores"] >= 1
    assert document["working_folder_free_bytes"] > 0
    for package in REQUIRED:
        assert document["packages"][package]
    assert machine.instruction_sets == () or machine.instruction_sets[-1] == "portable"


def test_optional_packages_are_found_and_not_imported(tmp_path: Path) -> None:
    """Stand-ins that cannot be imported, with metadata that can be read."""
    for name in ("torch", "transformers", "vllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('imported')\n")
        (tmp_path / f"{name}-9.9.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n"
        (tmp_path / f"{name}-9.9.dist-info" / "METADATA").write_text(metadata)
    code = (
        "import json, sys\nfrom nybble.api.doctor import OPTIONAL, doctor\nfound = doctor()\n"
        "print(json.dumps([found.packages, [n for n in OPTIONAL if n in sys.modules]]))"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    packages, imported = json.loads(told.stdout)
    assert {packages[name] for name in ("torch", "transformers", "vllm")} == {"9.9"}
    assert imported == []


def test_command_prints_the_same_in_json_and_text() -> None:
    document = json.loads(command("doctor", "--json").stdout)
    text = command("doctor").stdout
    assert document["schema"] == "nybble.doctor/1"
    for name in ("system", "processor", "kernels"):
        assert document[name] in text
    assert document["packages"]["numpy"] in text


def test_text_does_not_name_the_home_folder(machine: Environment) -> None:
    found = replace(machine, cache_folder=str(Path.home() / ".cache" / "nybble"))
    assert str(Path.home()) not in render(found)
    assert "~/.cache/nybble, " in render(found)


def test_a_sound_machine_gets_no_advice(sound: Environment) -> None:
    if sys.platform == "linux":
        assert advise(sound) == ()
        assert "note" not in render(replace(sound, advice=advise(sound)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernels": "reference", "kernels_origin": "no C compiler"}, "nybble kernels build"),
        ({"kernels": "cpu portable", "settings": {"NYBBLE_ISA": "portable"}}, "offers avx2"),
        ({"cpu_quota": 1.0}, "pass --jobs 1"),
        ({"cache_is_writable": False}, "set NYBBLE_CACHE"),
        ({"memory_limit_bytes": 1 << 28}, "only 0.25 GiB of memory"),
        ({"working_folder_free_bytes": 1 << 28}, "only 0.25 GiB free"),
        ({"packages": dict.fromkeys((*REQUIRED, *OPTIONAL))}, "`pip install numpy`"),
    ],
)
def test_each_thing_missing_is_one_line(
    sound: Environment, change: dict[str, object], words: str
) -> None:
    lines = advise(replace(sound, **change))  # type: ignore[arg-type]
    [line] = [line for line in lines if words in line]
    assert "\n" not in line


def test_absent_optional_packages_are_named_as_not_needed(sound: Environment) -> None:
    found = replace(sound, packages={**sound.packages, "torch": None, "vllm": None})
    assert "not installed, and nybble needs none of them: torch, vllm" in render(found)
    assert not any("torch" in line for line in advise(found))


def test_a_forced_back_end_that_does_not_exist_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_KERNELS", "abacus")
    found = doctor()
    assert found.kernels == "none"
    assert any("unset NYBBLE_KERNELS=abacus" in line for line in found.advice)


def test_cgroup_version_2_limits_are_the_tightest_of_all_parents(tmp_path: Path) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (mount / "a" / "b").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    (mount / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (mount / "a" / "b" / "memory.max").write_text("8589934592\n")
    (mount / "a" / "cpu.max").write_text("150000 100000\n")
    (mount / "a" / "memory.max").write_text("4294967296\n")
    assert cgroup_limits(proc, mount) == (1.5, 1 << 32)


def test_cgroup_version_1_limits(tmp_path: Path) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    for folder in (proc / "self", mount / "cpu" / "x", mount / "memory" / "x"):
        folder.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:cpu,cpuacct:/x\n9:memory:/x\n1:name=systemd:/x\n")
    (mount / "cpu" / "x" / "cpu.cfs_quota_us").write_text("200000\n")
    (mount / "cpu" / "x" / "cpu.cfs_period_us").write_text("100000\n")
    (mount / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (mount / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (mount / "memory" / "x" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_limits(proc, mount) == (2.0, None)


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path) == (None, None)


def compiler(path: Path, *lines: str) -> str:
    """A program that stands where a C compiler is expected."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_build_says_where_the_library_is(tmp_path: Path, machine: Environment) -> None:
    library, _ = build.build()
    if library is None:
        pytest.skip("no compiled kernels on this machine")
    copies = f'while [ "$1" != -o ]; do shift; done; cp "{library}" "$2"'
    environment = {"CC": compiler(tmp_path / "copier", copies), "NYBBLE_CACHE": str(tmp_path)}
    told = command("kernels", "build", "--force", "--json", **environment)
    document = json.loads(told.stdout)
    assert document["schema"] == "nybble.kernels/1"
    assert document["path"] == str(tmp_path / library.name)
    assert Path(document["path"]).read_bytes() == library.read_bytes()
    assert document["instruction_sets"] == list(machine.instruction_sets)
    assert str(tmp_path / library.name) in command("kernels", "build", **environment).stdout


def test_build_ends_with_the_compilers_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = compiler(
        tmp_path / "broken", "echo first >&2; echo 'cc1: out of patience' >&2; exit 1"
    )
    monkeypatch.setattr(build, "compilers", lambda: [[broken]])
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["nybble", "kernels", "build", "--force"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert "cc1: out of patience" in told
    assert "first" not in told


def test_mapped_files_count_as_free_memory(tmp_path: Path) -> None:
    """A group that has read a large file looks full, and is not."""
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    group = mount / "job"
    (proc / "self").mkdir(parents=True)
    group.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/job\n")
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 9000000 kB\n")
    assert available_bytes(proc, mount) == 9_000_000 * 1024
    (group / "memory.max").write_text("4000000000\n")
    (group / "memory.current").write_text("3900000000\n")
    (group / "memory.stat").write_text(
        "anon 400000000\nactive_file 1500000000\ninactive_file 2000000000\n"
    )
    assert available_bytes(proc, mount) == 4_000_000_000 - 400_000_000
    (mount / "memory.max").write_text("max\n")
    assert available_bytes(proc, mount) == 3_600_000_000
    assert available_bytes(tmp_path / "no", tmp_path / "no") is None


def test_known_failures_of_an_installed_engine_are_shown(tmp_path: Path) -> None:
    """By its version; without an engine there is no such line."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (tmp_path / "vllm-0.28.0.dist-info").mkdir()
    (tmp_path / "vllm-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.28.0\n"
    )
    with_vllm = command("doctor", PYTHONPATH=str(tmp_path)).stdout
    assert "known bad  vllm: " in with_vllm
    assert "vllm/issues/53912" in with_vllm or "vllm/issues/43559" in with_vllm
    assert "known bad" not in command("doctor").stdout
