"""Write a random checkpoint with the layer shapes of Qwen3.6-35B-A3B: two layers, 256 experts, 3.4
GB.

    python benchmarks/make_wide.py OUT

One DeltaNet and one full-attention layer, stacked experts and a small vision tower, in the
published layout; no MTP head, a vocabulary of 4,096. Weights are heavy-tailed noise: for speed and
memory, never for fidelity. Loads in transformers, so that other tools can be measured on the same
file.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.safetensors import TensorSpec
from nybble.checkpoint.writer import CheckpointWriter, layout_shards

ROOT = Path(__file__).resolve().parents[1]
SHARD_BYTES = 2 * 10**9
CHUNK = 1 << 24

TEXT = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 4096,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "attn_output_gate": True,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "mtp_num_hidden_layers": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
VISION = {
    "model_type": "qwen3_5_moe_vision",
    "depth": 2,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 256,
    "in_channels": 3,
    "out_hidden_size": 2048,
    "num_position_embeddings": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [],
}
CONFIG = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "image_token_id": 1,
    "video_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "text_config": TEXT,
    "vision_config": VISION,
}


def specs() -> Iterator[TensorSpec]:
    """Every tensor, by the same rules as the published checkpoints (tests/make_headers.py)."""
    sys.path.insert(0, str(ROOT / "tests"))
    from make_headers import checkpoint

    for name, dtype, shape in checkpoint(CONFIG):
        yield TensorSpec(name, dtype, tuple(shape))


def noise(size: int, scale: float, random: np.random.Generator) -> np.ndarray:
    """Heavy-tailed BF16 noise: normal values whose scale changes every 32 elements."""
    gains = np.array([0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.8], dtype=np.float32)
    blocks = -(-size // 32)
    values = random.standard_normal((blocks, 32), dtype=np.float32)
    values *= gains[random.integers(0, 8, blocks)][:, None] * np.float32(scale)
    return values.reshape(-1)[:size].astype(ml_dtypes.bfloat16)


def main() -> None:
    """Write the folder."""
    out = Path(sys.argv[1])
    random = np.random.default_rng(0)
    tensors = list(specs())
    with CheckpointWriter(out, layout_shards(tensors, SHARD_BYTES), disk=Disk()) as writer:
        for spec in tensors:
            scale = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 0.05
            for at in range(0, spec.size, CHUNK):
                part = noise(min(CHUNK, spec.size - at), scale, random)
                writer.write(spec.name, part, 2 * at)
        files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        beside = [(ROOT / "models/hybrid-chat-mtp" / name, name) for name in files]
        config = json.dumps(CONFIG, indent=2).encode()
        writer.finish({"config.json": config}, beside, sum(t.size for t in tensors))
    print(f"{out}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e9:.2f} GB")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if Path(sys.argv[1]).exists():
        shutil.rmtree(sys.argv[1])
    main()
