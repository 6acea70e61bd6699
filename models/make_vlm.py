"""Give a text-only Qwen3.5 MoE folder the layout of the published multimodal releases.

    python models/make_vlm.py FLAT_FOLDER OUT

The text configuration moves under `text_config`, a small vision tower of random weights is added
as one more shard, and everything else is copied byte for byte. Two runs write equal files. It
knows nothing of quantization and never looks at a trained weight.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SEED = 20261121
WEIGHT_RANGE = 0.02 * math.sqrt(
    3
)  # uniform with the standard deviation transformers initialises to

# The tokenizer's 4,096 ids are all taken and none is a vision token: these lie above it.
VISION_TOKENS = {
    "image_token_id": 4096,
    "video_token_id": 4097,
    "vision_start_token_id": 4098,
    "vision_end_token_id": 4099,
}
COPIED = (
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def vision_config(out_hidden_size: int) -> dict[str, Any]:
    """The tower's configuration: the published fields, small numbers.

    112 is like the published 4304 a multiple of 16 and not of 32.
    """
    return {
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "model_type": "qwen3_5_moe",
        "num_heads": 4,
        "num_position_embeddings": 64,
        "out_hidden_size": out_hidden_size,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def nested_config(flat: dict[str, Any]) -> dict[str, Any]:
    """The published nesting of a flat qwen3_5_moe_text configuration."""
    if flat.get("model_type") != "qwen3_5_moe_text":
        raise SystemExit(f"expected model_type qwen3_5_moe_text, found {flat.get('model_type')!r}")
    text = {k: v for k, v in flat.items() if k not in ("architectures", "transformers_version")}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "language_model_only": False,
        "text_config": dict(sorted(text.items())),
        "vision_config": vision_config(flat["hidden_size"]),
        **VISION_TOKENS,
        "tie_word_embeddings": flat["tie_word_embeddings"],
        "transformers_version": flat["transformers_version"],
    }


def vision_shapes(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor under `model.visual.`, in the model's own order."""
    width, inner, out = (
        vision["hidden_size"],
        vision["intermediate_size"],
        vision["out_hidden_size"],
    )
    patch = (vision["in_channels"], vision["temporal_patch_size"], *[vision["patch_size"]] * 2)
    merged = width * vision["spatial_merge_size"] ** 2
    linears: dict[str, tuple[int, ...]] = {"patch_embed.proj": (width, *patch)}
    norms = []
    for index in range(vision["depth"]):
        block = f"blocks.{index}."
        norms += [block + "norm1", block + "norm2"]
        linears[block + "attn.qkv"] = (3 * width, width)
        linears[block + "attn.proj"] = (width, width)
        linears[block + "mlp.linear_fc1"] = (inner, width)
        linears[block + "mlp.linear_fc2"] = (width, inner)
    norms.append("merger.norm")
    linears["merger.linear_fc1"] = (merged, merged)
    linears["merger.linear_fc2"] = (out, merged)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.weight": (vision["num_position_embeddings"], width)
    }
    for name, shape in linears.items():
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]
    for name in norms:
        shapes[name + ".weight"] = shapes[name + ".bias"] = (width,)
    return {"model.visual." + name: shape for name, shape in sorted(shapes.items())}


def vision_tensors(vision: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random BF16 weights of the tower; norms are centred on 1.

    Drawn from the bit generator itself: numpy keeps that stream the same in every version, which
    it does not promise of the distributions.
    """
    bits = np.random.PCG64(SEED)
    tensors = {}
    for name, shape in vision_shapes(vision).items():
        raw = bits.random_raw(math.prod(shape)) >> np.uint64(40)  # 24 bits, exact in float32
        drawn = (raw.astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)
        centre = np.float32("norm" in name and name.endswith(".weight"))
        value = centre + drawn * np.float32(WEIGHT_RANGE)
        tensors[name] = value.astype(ml_dtypes.bfloat16)
    return tensors


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write content the way transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(source: Path, out: Path, vision: dict[str, Any]) -> int:
    """Copy the shards under their new names, add the tower's, write the index; bytes of payload."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    olds = sorted(set(index["weight_map"].values()))
    count = len(olds) + 1
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    renamed = dict(zip(olds, names, strict=False))
    for old, new in renamed.items():
        shutil.copyfile(source / old, out / new)
    tensors = vision_tensors(vision)
    save_file(tensors, out / names[-1], metadata={"format": "pt"})
    weight_map = {name: renamed[file] for name, file in index["weight_map"].items()}
    weight_map |= dict.fromkeys(tensors, names[-1])
    added = sum(tensor.size for tensor in tensors.values())
    metadata = {
        "total_parameters": index["metadata"]["total_parameters"] + added,
        "total_size": index["metadata"]["total_size"] + 2 * added,  # BF16
    }
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", content)
    return int(metadata["total_size"])


def make(source: Path, out: Path) -> int:
    """Write the multimodal folder of `source` to `out`; bytes of payload."""
    out.mkdir(parents=True, exist_ok=True)
    config = nested_config(json.loads((source / "config.json").read_text()))
    vision = config["vision_config"]
    write_json(out / "config.json", config)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},  # pixels: one merged patch
    }
    write_json(out / "preprocessor_config.json", preprocessor)
    for name in COPIED:
        shutil.copyfile(source / name, out / name)
    return write_weights(source, out, vision)


def main() -> None:
    """Run from the command line."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: make_vlm.py FLAT_FOLDER OUT")
    size_bytes = make(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write(f"{sys.argv[2]}: {size_bytes:,} bytes of weights\n")


if __name__ == "__main__":
    main()
