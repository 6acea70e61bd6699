"""How long one waits: `import nybble`, `nybble --help`, planning the 35B from headers, inspecting
its NVFP4 release.

    python benchmarks/startup.py [--runs 9]

Whole processes, from start to exit, medians; the header folders are made first by
tests/make_headers.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests/fixtures/configs/nvidia--Qwen3.6-35B-A3B-NVFP4/config.json"


def seconds(command: list[str], runs: int) -> list[float]:
    """Wall seconds of each run."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - started)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Start-up times of whole processes.")
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    python = sys.executable
    nybble = [python, "-m", "nybble"]
    with tempfile.TemporaryDirectory() as folder:
        make = [python, str(ROOT / "tests/make_headers.py"), str(CONFIG)]
        source, release = f"{folder}/bf16", f"{folder}/nvfp4"
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([*make, "--out", source, "--data", "none"], **quiet)
        subprocess.run(
            [*make, "--nvfp4-layout", "modelopt", "--out", release, "--data", "none"], **quiet
        )
        commands = {
            "python -c pass": [python, "-c", "pass"],
            "import nybble": [python, "-c", "import nybble"],
            "nybble --help": [*nybble, "--help"],
            "nybble plan, 35B (1,045 tensors)": [*nybble, "plan", source],
            "nybble inspect, 35B NVFP4 (124,468 tensors)": [*nybble, "inspect", release],
        }
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, median of {runs}\n")
        print("| command | s | min | max |")
        print("|---|--:|--:|--:|")
        for name, command in commands.items():
            found = seconds(command, runs)
            print(
                f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} | {max(found):.3f} |"
            )


if __name__ == "__main__":
    main()
