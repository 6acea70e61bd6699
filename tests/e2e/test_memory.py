"""Private memory is bounded by the tile, not by the model.

The limit is RLIMIT_DATA: the kernel refuses private writable memory above it; mapped input pages
are not counted. The peak of RssAnon is sampled beside it and printed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble
import nybble.quantize.run as run_module
import nybble.quantize.tiles as tiles_module
import tiny
from nybble.api.quantize import quantize
from nybble.formats.element import U8Array

LIMIT = 10**9

LIMITED_RUN = """
import json, resource, sys, threading, time
limit, model, out, recipe, layout = int(sys.argv[1]), *sys.argv[2:]
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
peak, running = 0, True
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
def sample():
    global peak
    while running:
        peak = max(peak, status("RssAnon"))
        time.sleep(0.002)
thread = threading.Thread(target=sample, daemon=True)
thread.start()
from nybble.api.quantize import quantize
from nybble.plan.recipe import parse_recipe
before = status("RssAnon")
if recipe.startswith("[["):
    recipe = parse_recipe("mine", recipe)
try:
    result = quantize(model, out, recipe, layout=layout)
finally:
    running = False
    thread.join()
print(json.dumps({"peak": peak, "before": before, "bytes": result.plan.payload_bytes, "seconds":
result.seconds}))
"""


def limited(model: Path, out: Path, recipe: str, layout: str = "modelopt") -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1])}
    answer = subprocess.run(
        [sys.executable, "-c", LIMITED_RUN, str(LIMIT), str(model), str(out), recipe, layout],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def write_patterned(folder: Path, cfg: dict[str, Any]) -> int:
    """A checkpoint whose weights repeat a few MB of noise: gigabytes as fast as the disk takes
    them; its bytes."""
    noise = np.random.default_rng(0).standard_normal(4_000_003, dtype=np.float32) * np.float32(0.02)
    pattern = noise.astype(ml_dtypes.bfloat16).view(np.uint8)
    folder.mkdir()
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in tiny.listing(cfg):
        assert dtype == "BF16"
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = at
        while left:
            left -= file.write(pattern[:left].data)
    (folder / "config.json").write_text(json.dumps(cfg))
    return at


def big(**changed: Any) -> dict[str, Any]:
    """One layer of the 397B's width in experts: 512 of them in one stack."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
        "num_experts": 512,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "mtp_num_hidden_layers": 0,
        "vocab_size": 20_000,
    }
    return tiny.config("qwen3_5_moe", **(sizes | changed))


BLOCK_RULE = (
    '[[rule]]\nroles = ["routed_expert"]\nscheme = "fp8-block"\n'
    '[[rule]]\nroles = ["lm_head"]\nscheme = "fp8-dynamic"'
)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that goes at once: pytest keeps its own for three runs, and these are gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        pytest.param("nvfp4-all", "modelopt", id="nvfp4-all"),
        pytest.param("fp8", "compressed-tensors", id="fp8", marks=pytest.mark.slow),
        pytest.param("mxfp4", "compressed-tensors", id="mxfp4", marks=pytest.mark.slow),
        pytest.param(BLOCK_RULE, "compressed-tensors", id="fp8-block", marks=pytest.mark.slow),
    ],
)
def test_a_stack_of_512_experts_needs_less_than_a_gigabyte(
    room: Path, recipe: str, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source_bytes = write_patterned(room / "m", big())
    assert source_bytes > 1.7 * LIMIT
    found = limited(room / "m", room / "out", recipe, layout)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{recipe[:20]!r}: {source_bytes / 1e9:.2f} GB of weights, peak private memory "
            f"{found['peak'] / 1e6:.0f} MB ({found['before'] / 1e6:.0f} MB before), "
            f"{found['seconds']:.1f} s\n"
        )
    assert found["peak"] < LIMIT / 4


@pytest.mark.slow
def test_one_matrix_of_a_gigabyte_needs_no_more(room: Path) -> None:
    """A head of 250,000 rows: tiles are rows of it."""
    write_patterned(room / "m", big(num_experts=2, vocab_size=250_000))
    found = limited(room / "m", room / "out", "nvfp4-all")
    assert found["peak"] < LIMIT / 4


def test_the_limit_is_a_limit(tmp_path: Path) -> None:
    """The test could pass by limiting nothing."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)\n"
        "import numpy as np\n"
        "try: np.ones(2 * 10**8)\n"
        "except MemoryError: sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(LIMIT)]).returncode == 7


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("nvfp4-all", "modelopt"),
        ("fp8", "compressed-tensors"),
        ("mxfp4", "compressed-tensors"),
        (BLOCK_RULE, "compressed-tensors"),
    ],
    ids=["nvfp4-all", "fp8", "mxfp4", "fp8-block"],
)
def test_buffers_follow_the_tile_and_not_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, layout: str
) -> None:
    from nybble.plan.recipe import parse_recipe

    chosen: Any = parse_recipe("mine", recipe) if recipe.startswith("[[") else recipe
    path = tiny.checkpoint(
        tmp_path / "m",
        "qwen3_5_moe",
        num_experts=9,
        moe_intermediate_size=320,
        vocab_size=1001,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    quantize(path, tmp_path / "whole", chosen, layout=layout, search="absmax")
    tile = 16_384
    for module in (run_module, tiles_module):
        monkeypatch.setattr(module, "TILE_BYTES", tile)
    taken: list[int] = []
    made: set[int] = set()
    true_take = tiles_module.Buffers.take

    def take(self: tiles_module.Buffers, size: int) -> U8Array:
        buffer = true_take(self, size)
        taken.append(buffer.size)
        made.add(buffer.ctypes.data)
        return buffer

    monkeypatch.setattr(tiles_module.Buffers, "take", take)
    quantize(path, tmp_path / "tiled", chosen, layout=layout, search="absmax")
    largest = 128 * 320  # no piece has less than 128 rows, the height of an FP8 block
    assert len(taken) > 20
    assert max(taken) <= max(tile, largest)
    if max(taken) == tile:
        assert len(made) <= tiles_module.BUFFERS
    assert tiny.tree(tmp_path / "tiled") == tiny.tree(tmp_path / "whole")
