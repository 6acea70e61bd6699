"""A model far larger than its memory is scored: 40 layers in the published shapes, under a limit.

The checkpoint has the true tensor list of the published Qwen3.6-35B-A3B-NVFP4. Its files are sparse
(weights are zeros that take no disk), but for routers and some embedding rows, which are random, so
that all experts of all layers are read. RLIMIT_DATA makes the kernel refuse private memory above
the plan's own figure and a gigabyte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tiny
from nybble.checkpoint.reader import Checkpoint

TOKENS = 600
ALLOWANCE = 10**9

RUN = """
import json, resource, sys, threading, time
folder, allowance = sys.argv[1], int(sys.argv[2])
import torch
from nybble.checkpoint.reader import Checkpoint
from nybble.evaluate.score import score
from nybble.evaluate.windows import Window
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.stream.executor import Stream
model = Model(Checkpoint.open(folder))
windows = [torch.randint(0, 512, (n,)) for n in (512, 88)]
stream = Stream(model, windows, Mode())
limit = stream.plan.private_bytes + allowance
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
peak, running, before = 0, True, status("RssAnon")
def sample():
    global peak
    while running:
        peak = max(peak, status("RssAnon"))
        time.sleep(0.005)
thread = threading.Thread(target=sample, daemon=True)
thread.start()
class Source:
    head, normed = model.head, stream.normed
try:
    stream.run()
    cut = [Window(w.numpy(), 1, 0) for w in windows]
    nll = score(Source, cut, Mode(), Progress()).nll
finally:
    running = False
    thread.join()
print(json.dumps({"peak": peak, "before": before, "plan": stream.plan.private_bytes,
                  "tokens": len(nll), "nll": float(nll.mean())}))
"""


def write_random(folder: Path) -> int:
    """Random routers and embedding rows into the sparse files; the payload in bytes."""
    rng = np.random.default_rng(0)
    with Checkpoint.open(folder) as checkpoint:
        infos = list(checkpoint.tensors.values())
    for info in infos:
        if not info.name.endswith(("embed_tokens.weight", ".mlp.gate.weight")):
            continue
        rows = min(512, info.shape[0])
        values = rng.standard_normal((rows, info.shape[1]), dtype=np.float32)
        with (folder / info.file).open("r+b") as file:
            file.seek(info.offset)
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    return sum(t.nbytes for t in infos)


@pytest.mark.slow
def test_forty_layers_of_the_real_shapes_are_scored_under_a_limit(tmp_path: Path) -> None:
    config = tiny.CONFIGS / "nvidia--Qwen3.6-35B-A3B-NVFP4" / "config.json"
    make = [sys.executable, str(tiny.TESTS / "make_headers.py"), str(config)]
    folder = tmp_path / "m"
    subprocess.run(
        [*make, "--nvfp4-layout", "modelopt", "--out", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    payload = write_random(folder)
    assert payload > 20e9
    answer = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(ALLOWANCE)],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout)
    assert found["tokens"] == TOKENS - 2
    sys.stderr.write(f"{payload:,} bytes of weights, {found}\n")
    # All weights but the routers are zeros: every token is as likely as any other.
    assert found["nll"] == pytest.approx(np.log(248_320), rel=1e-6)
    assert found["peak"] <= found["plan"] + ALLOWANCE
