"""Speed of `nybble convert` on a mixture of experts, warm, and its peak memory.

    python benchmarks/convert.py [--layers 3] [--runs 3] [--threads N] [--folder DIR] [--json]
                                 [--foreign-scales]

Layers in the shape of Qwen3-30B-A3B (128 experts of 768, hidden 2048, some 0.34 GB each as NVFP4)
with random codes and power-of-two tensor scales, or with scales of other tools, whose products are
rounded. GB/s of input read (10^9 bytes), medians: writing alone, with the proof, and a plain copy
of the source's files in between; `written_gb_s` counts the result's bytes, which are 3.5 times as
many in BF16. `cpu_s_per_gb` is what all threads took for a gigabyte read, the proof included: a
figure that other work on the machine moves less.
A folder in memory (/dev/shm) leaves the disk out; the first run, which has to get its memory from
the system, is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from nybble.api.convert import convert
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.modelopt import ModelOpt
from nybble.checkpoint.safetensors import TensorSpec
from nybble.checkpoint.writer import CheckpointWriter, layout_shards
from nybble.families import find_family
from nybble.formats.scheme import NVFP4_W4A16
from nybble.plan.listing import make_listing

HIDDEN, WIDTH, EXPERTS, VOCABULARY = 2048, 768, 128, 4096
TARGETS = ("compressed-tensors", "bf16")


def config(layers: int) -> dict[str, object]:
    """A Qwen3-30B-A3B with fewer layers and words."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    }


def make(folder: Path, layers: int, factor: float = 1.0) -> None:
    """A ModelOpt checkpoint of experts and an embedding: what takes the bytes.

    Tensor scales are powers of two times `factor`.
    """
    made = config(layers)
    layout, family = ModelOpt(), find_family(made)
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    modules = [
        (f"model.layers.{i}.mlp.experts.{e}.{part}", shape)
        for i in range(layers)
        for e in range(EXPERTS)
        for part, shape in shapes.items()
    ]
    plain = TensorSpec("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))
    leaves = [(name, layout.leaves(NVFP4_W4A16, shape)) for name, shape in modules]
    specs = [plain, *(leaf.spec(name) for name, found in leaves for leaf in found)]
    noise = np.random.default_rng(0).integers(0, 256, 1 << 24, dtype=np.uint8)
    listing = make_listing(
        ((name, "routed_expert", NVFP4_W4A16) for name, _ in modules),
        (),
        family,
        kv_cache="",
        version="benchmark",
    )
    with CheckpointWriter(folder, layout_shards(specs), disk=Disk()) as writer:
        writer.write(plain.name, noise[: plain.nbytes] & 0x3F)
        for i, (name, found) in enumerate(leaves):
            for leaf in found:
                if leaf.part == "tensor_scale":
                    data = np.full(1, factor * 2.0 ** -(8 + i % 5), np.float32).view(np.uint8)
                else:
                    data = noise[i : i + leaf.nbytes] % (127 if leaf.part == "scale" else 255)
                writer.write(f"{name}.{leaf.suffix}", data)
        writer.finish(layout.documents(made, listing), [], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--foreign-scales", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        make(folder / "source", asked.layers, 1.2345 if asked.foreign_scales else 1.0)
        for target in TARGETS:
            taken, copied, worked = [], [], []
            for _ in range(asked.runs + 1):
                before = time.process_time()
                done = convert(folder / "source", folder / "out", target, jobs=asked.threads)
                worked.append(time.process_time() - before)
                taken.append((done.seconds, done.proof_seconds))
                shutil.rmtree(folder / "out")
                start = time.perf_counter()
                shutil.copytree(folder / "source", folder / "out")
                copied.append(time.perf_counter() - start)
                shutil.rmtree(folder / "out")
            gigabytes = done.conversion.source_bytes / 1e9
            write = statistics.median(s for s, _ in taken[1:])
            both = statistics.median(s + p for s, p in taken[1:])
            row = {
                "to": target,
                "source_gb": round(gigabytes, 3),
                "result_gb": round(done.conversion.payload_bytes / 1e9, 3),
                "write_gb_s": round(gigabytes / write, 2),
                "with_proof_gb_s": round(gigabytes / both, 2),
                "copy_gb_s": round(gigabytes / statistics.median(copied[1:]), 2),
                "written_gb_s": round(done.conversion.payload_bytes / 1e9 / write, 2),
                "cpu_s_per_gb": round(statistics.median(worked[1:]) / gigabytes, 2),
                "verdict": done.verdict,
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
            print(json.dumps(row) if asked.json else "  ".join(f"{k} {v}" for k, v in row.items()))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
