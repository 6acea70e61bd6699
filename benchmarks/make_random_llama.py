"""Write a random Llama of 1.16 billion parameters, so that no cache holds what decoding reads.

    python benchmarks/make_random_llama.py OUT TOKENIZER [--layers 22]

Weights are N(0, 0.02) in BF16, norms are ones, the head is tied to the embedding; TOKENIZER is a
folder whose tokenizer has 49,152 entries (SmolLM2's), which llama.cpp's converter wants. For speed
alone: what it says is noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.safetensors import TensorSpec
from nybble.checkpoint.writer import CheckpointWriter, layout_shards

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402

SHARD_BYTES = 2 * 10**9
#: Values drawn; a tensor begins somewhere in them and goes round.
POOL = 1 << 24
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def fill(writer: CheckpointWriter, spec: TensorSpec, noise: NDArray, at: int, norm: float) -> None:
    """Write a tensor: noise that begins at `at` and goes round; norms are `norm`, biases zero."""
    if len(spec.shape) == 1:
        value = norm if spec.name.endswith("norm.weight") else 0.0
        writer.write(spec.name, np.full(spec.size, value, dtype=noise.dtype))
        return
    for first in range(0, spec.size, POOL):
        part = noise[at : at + min(POOL, spec.size - first)]
        writer.write(spec.name, part, first * noise.itemsize)


def write(out: Path, config: Mapping[str, object], tokenizer: Path, norm: float = 1.0) -> int:
    """Write a folder with all tensors that config.json asks for; how many parameters it has."""
    if out.exists():
        shutil.rmtree(out)
    random = np.random.default_rng(0)
    drawn = random.standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    noise = np.tile(drawn.astype(ml_dtypes.bfloat16), 2)
    tensors = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in tiny.listing(config)]
    with CheckpointWriter(out, layout_shards(tensors, SHARD_BYTES), disk=Disk()) as writer:
        for spec in tensors:
            fill(writer, spec, noise, int(random.integers(POOL)), norm)
        beside = [(tokenizer / n, n) for n in TOKENIZER_FILES if (tokenizer / n).exists()]
        total = sum(t.size for t in tensors)
        writer.finish({"config.json": json.dumps(config, indent=2).encode()}, beside, total)
    return total


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--layers", type=int, default=22, help="fewer for a quick look")
    a = parser.parse_args()
    total = write(a.out, {**LLAMA, "num_hidden_layers": a.layers}, a.tokenizer)
    print(f"{a.out}: {total / 1e9:.3f}B parameters")


if __name__ == "__main__":
    main()
