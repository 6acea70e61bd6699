"""Speed of `nybble check`: the 35B's shapes from headers, and every byte of a folder.

    python benchmarks/check.py [--runs 7] [--deep FOLDER]

Whole processes, from start to exit, medians. The 35B is the release's own tensor list in sparse
files (tests/make_headers.py): its scales are all zero, and must be found. `--deep` reads a real
folder, warm, once without and once with --deep; GB/s (10^9 bytes) by the difference and by the
whole process, beside `cat` of the same files.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests/fixtures/configs/nvidia--Qwen3.6-35B-A3B-NVFP4"
NYBBLE = [sys.executable, "-m", "nybble"]


def timed(command: list[str], runs: int) -> tuple[float, float, str]:
    """Median wall and CPU seconds of a process, and what it printed last."""
    walls, cpus, said = [], [], ""
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        walls.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        said = done.stdout
        assert done.returncode in (0, 3), done.stderr
    return statistics.median(walls), statistics.median(cpus), said


def headers(runs: int) -> None:
    """The 35B's shapes, beside `plan` of its original and a bare interpreter with numpy."""
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, str(ROOT / "tests/make_headers.py"), str(CONFIGS / "config.json")]
        release, original = f"{folder}/nvfp4", f"{folder}/bf16"
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([*make, "--nvfp4-layout", "modelopt", "--out", release], **quiet)
        subprocess.run([*make, "--out", original], **quiet)
        print("| command | wall s | CPU s |\n|---|--:|--:|")
        for name, command in {
            "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
            "nybble plan, 35B (1,045 tensors)": [*NYBBLE, "plan", original],
            "nybble check, 35B NVFP4 (124,468 tensors)": [*NYBBLE, "check", release],
            "the same, --engine vllm": [*NYBBLE, "check", release, "--engine", "vllm"],
            "the same, --source": [*NYBBLE, "check", release, "--source", original],
        }.items():
            wall, cpu, said = timed(command, runs)
            assert "check" not in name or "NB201" in said, "zero scales were not found"
            print(f"| {name} | {wall:.2f} | {cpu:.2f} |")


def deep(folder: Path, runs: int) -> None:
    """Every byte of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files)
    cat, _, _ = timed(["sh", "-c", f"cat {folder}/*.safetensors | tail -c 1 | wc -c"], runs)
    light, _, _ = timed([*NYBBLE, "check", str(folder)], runs)
    heavy, cpu, _ = timed([*NYBBLE, "check", str(folder), "--deep"], runs)
    print(
        f"\n{size / 1e9:.2f} GB, warm: check {light:.2f} s, --deep {heavy:.2f} s ({cpu:.2f} CPU s)"
    )
    print(
        f"GB/s: {size / 1e9 / heavy:.2f} whole process, {size / 1e9 / (heavy - light):.2f} reading,"
    )
    print(f"      {size / 1e9 / cat:.2f} for `cat | tail`")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Speed of nybble check.")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--deep", type=Path)
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, median of {asked.runs}\n")
    headers(asked.runs)
    if asked.deep:
        deep(asked.deep, asked.runs)


if __name__ == "__main__":
    main()
