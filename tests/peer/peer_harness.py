"""What the peer tests share: models, what nybble makes of them, and other projects as subprocesses.

Every peer has an environment of its own (`scripts/peers`), reached through the runners in `peers/`;
nothing of theirs is imported here. A test whose environment is absent is skipped and says how to
install it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.formats.tensor import BlockScaledTensor
from nybble.plan.plan import Job, Member, Plan
from nybble.plan.recipe import Recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402

GGUF = Path.home() / ".cache" / "nybble" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = ROOT / "models" / "hybrid-chat-mtp"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

MIXED = """
[[rule]]
roles = ["routed_expert", "shared_expert", "mlp"]
scheme = "nvfp4-w4a16"

[[rule]]
roles = ["attention", "linear_attention"]
scheme = "fp8-dynamic"
"""

# What engines accept: heads of 64 and every K a multiple of 64 (llama.cpp's NVFP4 superblock).
# No two dimensions are equal otherwise.
ENGINE_SIZED: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 320,
    "vocab_size": 4096,  # of the chat model's tokenizer, which all of them get
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": None,  # where vLLM finds the key it builds a shared expert
}
DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "full_attention_interval": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "partial_rotary_factor": 0.25,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "rope_type": "default",
    },
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen3_5": DELTA,
    "qwen2": {"tie_word_embeddings": True},
}


def script(folder: str, name: str) -> ModuleType:
    """A file outside the package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- peers


Peer = Callable[..., list[dict[str, Any]]]


@cache
def interpreter(name: str) -> str:
    """The Python of a peer's environment; "" if it is not installed."""
    asked = [str(ROOT / "scripts" / "peers"), "python", name]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def need(name: str) -> str:
    """The Python of a peer's environment, or skip."""
    python = interpreter(name)
    if not python:
        pytest.skip(f"no environment for this peer: scripts/peers install {name}")
    return python


def run_peer(name: str, runner: str, *arguments: object) -> list[dict[str, Any]]:
    """The JSON lines that peers/RUNNER.py prints; "stderr" in each is the end of the log."""
    command = [need(name), str(ROOT / "peers" / f"{runner}.py"), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tool"')]
    assert rows, f"{runner} printed no result: {done.stderr[-3000:]}"
    return [row | {"stderr": done.stderr[-20000:]} for row in rows]


# --- models


def make_model(name: str, folder: Path) -> Path:
    """A model folder by name: one of the repository's, SmolLM2, or a random one of a family."""
    if (ROOT / "models" / name).is_dir():
        return ROOT / "models" / name
    if name == "smollm2":
        pytest.importorskip("gguf", reason="SmolLM2 comes as GGUF: pip install 'nybble[gguf]'")
        if not GGUF.exists():
            pytest.skip(f"{GGUF} is not there; scripts/demo downloads it")
        script("examples", "smollm2").convert(GGUF, folder)
        return folder
    config = tiny.config(name, **(ENGINE_SIZED | OWN.get(name, {})))
    values = tiny.tensors(config)
    if name == "qwen3_5":
        add_vision(config, values)
    tiny.write(folder, config, values)
    for file in TOKENIZER:
        shutil.copyfile(CHAT / file, folder / file)
    (folder / "generation_config.json").write_text("{}")  # tiny's own asks engines to sample
    return folder


def add_vision(config: dict[str, Any], values: dict[str, NDArray[Any]]) -> None:
    """Give a random hybrid the tower of models/make_vlm.py: engines expect one in this class."""
    make_vlm = script("models", "make_vlm")
    config["vision_config"] = make_vlm.vision_config(ENGINE_SIZED["hidden_size"])
    config["vision_config"]["model_type"] = config["model_type"]
    config.update(make_vlm.VISION_TOKENS)
    values.update(make_vlm.vision_tensors(config["vision_config"]))


# --- what nybble makes of them


@dataclass(frozen=True)
class Made:
    """A checkpoint that nybble wrote."""

    path: Path
    plan: Plan

    @cached_property
    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Every quantized weight by module, decoded from the file by nybble's definition."""
        with Checkpoint.open(self.path) as stored:
            return {
                member.module: self._decode(stored, job, member)
                for job in self.plan.jobs
                for member in job.members
            }

    def _decode(self, stored: Checkpoint, job: Job, member: Member) -> NDArray[np.float32]:
        fmt = job.scheme.weight
        assert fmt is not None
        raw, tensor_scale = {}, None
        for leaf in self.plan.leaves(job.scheme, member.shape):
            array = stored.array(f"{member.module}.{leaf.suffix}")
            if leaf.part == "tensor_scale":
                tensor_scale = self.plan.layout.load(leaf, array)
            else:
                raw[leaf.part] = np.array(array).view(np.uint8)
        if "scale" in raw:
            scale = raw["scale"]
        else:  # FP8: the float32 scales are the only ones
            assert tensor_scale is not None
            scale, tensor_scale = tensor_scale.reshape(fmt.scale_shape(member.shape)), None
        tensor = BlockScaledTensor(fmt, member.shape, raw["codes"], scale, tensor_scale)
        weight: NDArray[np.float32] = tensor.dequantize()
        return weight

    def stored(self, suffix: str) -> dict[str, NDArray[Any]]:
        """The tensors of the file whose names end in a suffix, by module."""
        with Checkpoint.open(self.path) as opened:
            names = [name for name in opened.tensors if name.endswith(f".{suffix}")]
            return {n.removesuffix(f".{suffix}"): np.array(opened.array(n)) for n in names}

    @cached_property
    def source(self) -> dict[str, NDArray[Any]]:
        """Every tensor of the model this was made from."""
        checkpoint = self.plan.checkpoint
        with Checkpoint.open(checkpoint.path) as opened:
            return {name: np.array(opened.array(name)) for name in opened.tensors}

    @cached_property
    def dense(self) -> Mapping[str, NDArray[Any]]:
        """The source's tensors with every quantized weight replaced by what it decodes to, in BF16.

        NVFP4 with a power-of-two tensor scale and MXFP4 are exact in BF16; FP8 is rounded once.
        """
        values = {name: array.copy() for name, array in self.source.items()}
        for name, members in self.plan.by_source.items():
            for _, member in members:
                rows = values[name] if member.expert is None else values[name][member.expert]
                first = member.first_row
                rows[first : first + member.shape[0]] = rounded(self.weights[member.module])
        return values

    def write_dense(self, folder: Path) -> Path:
        """A folder of the unquantized kind with `dense` in it: a reference without rounding."""
        left = shutil.ignore_patterns("*.safetensors", "*.index.json")
        shutil.copytree(self.plan.checkpoint.path, folder, ignore=left)
        tiny.write_safetensors(folder / "model.safetensors", self.dense)
        return folder


def rounded(weight: NDArray[np.float32]) -> NDArray[Any]:
    """The weight in BF16."""
    return weight.astype(ml_dtypes.bfloat16)


def recipe_of(name: str) -> Recipe:
    """A recipe of the package, or the mixed one above."""
    return parse_recipe("mixed", MIXED) if name == "mixed" else load_recipe(name)


Make = Callable[[str, str, str], Made]
