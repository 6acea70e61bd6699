"""Write a random hybrid mixture of experts: four layers with the shapes of Qwen3.6-35B-A3B.

    python benchmarks/make_hybrid_moe.py OUT [--layers 4]

Three gated DeltaNet layers and one of full attention, 256 experts each: 3.4 billion parameters,
6.8 GB in BF16, of which a token uses some 200 million. The vocabulary is the
small one of models/hybrid-chat-mtp, so that the head, 248,320 rows in the release, hides nothing.
For speed alone: what it says is noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from make_random_llama import ROOT, write
from make_wide import CONFIG, TEXT


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4, help="a multiple of 4")
    a = parser.parse_args()
    text = {
        **TEXT,
        "num_hidden_layers": a.layers,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (a.layers // 4),
        "max_position_embeddings": 8192,
    }
    config = {**CONFIG, "text_config": text}
    total = write(a.out, config, ROOT / "models" / "hybrid-chat-mtp", norm=0.0)
    print(f"{a.out}: {total / 1e9:.3f}B parameters")


if __name__ == "__main__":
    main()
