"""A conversion and its proof hold some pieces of rows in memory, not the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.modelopt import ModelOpt
from nybble.checkpoint.safetensors import TensorSpec
from nybble.checkpoint.writer import CheckpointWriter, layout_shards
from nybble.families import find_family
from nybble.formats.scheme import NVFP4_W4A16
from nybble.plan.listing import make_listing

EXPERTS, WIDTH, HIDDEN = 32, 768, 2048  # of Qwen3-30B-A3B and 35B: every matrix in its shape
MIB = 1 << 20

RUN = """
import json, sys, threading, time
peak, running = {"RssAnon": 0, "VmRSS": 0}, True
def status():
    with open("/proc/self/status") as file:
        rows = [line.split() for line in file]
    return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[0][:-1] in peak}
def sample():
    while running:
        for key, value in status().items():
            peak[key] = max(peak[key], value)
        time.sleep(0.001)
from nybble.api.convert import convert
before = status()
thread = threading.Thread(target=sample, daemon=True)
thread.start()
done = convert(*sys.argv[1:], jobs=2)
running = False
thread.join()
taken = {key: peak[key] - before[key] for key in peak}
bytes = done.conversion.source_bytes + done.conversion.payload_bytes
print(json.dumps({"bytes": bytes, "verdict": done.verdict, **taken}))
"""


def make_source(folder: Path, factor: float) -> None:
    """One layer of experts in ModelOpt's layout, with random codes."""
    config: dict[str, object] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "tie_word_embeddings": True,
    }
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    modules = {
        f"model.layers.0.mlp.experts.{e}.{part}_proj": shape
        for e in range(EXPERTS)
        for part, shape in shapes.items()
    }
    layout = ModelOpt()
    leaves = [
        (name, leaf)
        for name, shape in modules.items()
        for leaf in layout.leaves(NVFP4_W4A16, shape)
    ]
    specs = [leaf.spec(name) for name, leaf in leaves]
    specs.append(TensorSpec("model.embed_tokens.weight", "BF16", (64, HIDDEN)))
    listing = make_listing(
        ((name, "routed_expert", NVFP4_W4A16) for name in modules),
        (),
        find_family(config),
        kv_cache="",
        version="test",
    )
    noise = np.random.default_rng(0).integers(0, 127, 1 << 20, dtype=np.uint8)
    with CheckpointWriter(folder, layout_shards(specs), disk=Disk()) as writer:
        writer.write("model.embed_tokens.weight", noise[: specs[-1].nbytes])
        for name, leaf in leaves:
            is_top = leaf.part == "tensor_scale"
            top = np.full(1, factor * 2.0**-9, dtype=np.float32).view(np.uint8)
            writer.write(f"{name}.{leaf.suffix}", top if is_top else noise[: leaf.nbytes])
        writer.finish(layout.documents(config, listing), [], 0)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that goes at once: these are hundreds of megabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("target", "factor"), [("compressed-tensors", 1.0), ("bf16", 1.2345)])
def test_memory_follows_the_piece_and_not_the_model(room: Path, target: str, factor: float) -> None:
    make_source(room / "source", factor)
    answer = subprocess.run(
        [sys.executable, "-c", RUN, str(room / "source"), str(room / "out"), target],
        env={**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout)
    assert found["verdict"].startswith(f"{EXPERTS * 9 + 1} tensors, ")
    assert found["RssAnon"] < 64 * MIB, found
    # Files on both sides are mapped; what is done with is given back.
    assert found["VmRSS"] < min(100 * MIB, found["bytes"]), found
