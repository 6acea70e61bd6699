"""A calibrated run keeps the memory that it says, whatever takes it: wide linears or many rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

RUN = """
import json, sys, threading, time
from dataclasses import replace
from pathlib import Path
from calibrated_runs import EFFORTS, calibrate, plan_of, samples
from nybble.checkpoint.reader import Checkpoint
from nybble.stream import shards

shards.SHARD_TOKENS = 1  # two that fit and two that judge: three sets of matrices at a time

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, is_done = 0, False
def watch():
    global peak
    while not is_done:
        peak = max(peak, private())
        time.sleep(0.005)

folder = Path(sys.argv[1])
effort = replace(EFFORTS["default"], dampings=(0.03,))
with Checkpoint.open(folder / "m") as checkpoint:
    plan = plan_of(checkpoint, "nvfp4-all")
    before = private()
    watcher = threading.Thread(target=watch)
    watcher.start()
    given = samples(131, [256] * 32, frozenset(range(16, 32)))
    rounder = calibrate(plan, folder / "out", given, effort)
    is_done = True
    watcher.join()
print(json.dumps({"said": rounder.footprint.private_bytes, "took": peak - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"hidden_size": 512, "intermediate_size": 3072}),
        ("llama", {"hidden_size": 256, "intermediate_size": 12288}),
        ("llama", {"hidden_size": 512, "vocab_size": 24001}),
        ("qwen3_moe", {"hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 6}),
    ],
)
def test_what_is_said_is_kept(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    tiny.checkpoint(tmp_path / "m", family, num_hidden_layers=1, **sizes)
    paths = [str(Path(tiny.__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["took"] <= found["said"]
    # And it is no figure that fits everything: three times what was taken at most.
    assert found["said"] <= 3 * found["took"]
