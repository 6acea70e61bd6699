"""Hours in minutes: an LLM with too little memory and callers of every kind leaks nothing.

`NYBBLE_SOAK_S` seconds (default 600), in a process of its own so that the tests before it count
for nothing. The short form runs in the fast suite: too short for a slope, but whatever is lost with
each request shows in the pools, the descriptors and the threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nybble
import tiny
from nybble.api.quantize import quantize

TESTS = Path(__file__).parents[1]
SOAK_S = float(os.environ.get("NYBBLE_SOAK_S", "600"))
SHORT_S = 12.0

#: The slope of resident memory is zero within three of its standard errors. What is touched for the
#: first time grows ever slower but never quite ends, and has no noise: that much is let pass. It is
#: a gigabyte in a month, or at the ten requests a second of a small machine 40 bytes of each, less
#: than the smallest object that a request could leave behind.
STANDARD_ERRORS = 3.0
NO_SLOPE = 400.0  # bytes a second
#: A bound of the second half whatever the errors are; 30 KiB were seen.
MOST_GROWTH = 4 << 20

needs_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def soak(folder: Path, seconds: float) -> dict[str, Any]:
    """Run `soak_callers.py`; what it counted and sampled."""
    paths = [str(Path(nybble.__file__).parents[1]), str(TESTS)]
    done = subprocess.run(
        [sys.executable, str(TESTS / "soak_callers.py"), str(folder), str(seconds)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60 + 2 * seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def checked(found: dict[str, Any]) -> None:
    """Everything happened that should, nothing failed, and all was given back."""
    assert found["errors"] == []
    assert min(found["asked"].values()) > 0, found["asked"]
    assert found["preemptions"] > 0
    assert found["cancelled"] > 0
    assert found["pages_used"] == found["slots_used"] == found["running"] == found["waiting"] == 0
    assert found["after"] == found["before"], "threads, descriptors or child processes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("soak") / "nvfp4"
    quantize(tiny.MODELS / "stories-hybrid-moe", out, "nvfp4-all", data_free=True)
    return out


@needs_linux
def test_a_short_soak_gives_everything_back(folder: Path) -> None:
    pytest.importorskip("llguidance")
    checked(soak(folder, SHORT_S))


@needs_linux
@pytest.mark.slow
def test_memory_does_not_grow_with_time(folder: Path) -> None:
    pytest.importorskip("llguidance")
    found = soak(folder, SOAK_S)
    checked(found)
    seconds, resident = np.array(found["samples"], dtype=float).T
    is_warm = seconds > seconds[-1] / 2
    slope, error = fitted(seconds[is_warm], resident[is_warm])
    growth = resident[is_warm][-20:].mean() - resident[is_warm][:20].mean()
    said = f"{slope:.0f} +- {error:.0f} bytes a second, {growth / 2**20:.2f} MiB in all"
    assert slope < max(STANDARD_ERRORS * error, NO_SLOPE), said
    assert growth < MOST_GROWTH, said


def fitted(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The least squares slope of y over x, and its standard error. Neighbours in time are alike:
    the error is that of means of blocks, a tenth of the samples each."""
    blocks = [
        (a.mean(), b.mean()) for a, b in zip(*(np.array_split(v, 10) for v in (x, y)), strict=True)
    ]
    u, v = np.array(blocks).T
    spread = ((u - u.mean()) ** 2).sum()
    slope = ((u - u.mean()) * (v - v.mean())).sum() / spread
    rest = v - v.mean() - slope * (u - u.mean())
    return float(slope), float(np.sqrt((rest**2).sum() / (len(u) - 2) / spread))


def test_a_leak_is_a_slope_and_noise_is_none() -> None:
    random = np.random.default_rng(0)
    x = np.linspace(0, 400, 800)
    noise = random.normal(0, 2e5, x.size)
    slope, error = fitted(x, 1e8 + noise)
    assert abs(slope) < STANDARD_ERRORS * error
    slope, error = fitted(x, 1e8 + noise + 3e3 * x)
    assert slope > STANDARD_ERRORS * error
    assert slope > NO_SLOPE
