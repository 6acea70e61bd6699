"""Load a checkpoint with transformers and say what it made of it.

    transformers_load.py CKPT... [--ids 1,2,3 | --ids FILE] [--dump OUT] [--as-stored]

Runs in the environment compressed-tensors. A compressed-tensors checkpoint is dequantised while
loading or, with --as-stored (transformers' default), in the first forward pass; then it needs ids.
transformers does not know ModelOpt's, so those fail here. Known defects of 5.23: routed experts in
NVFP4 lose their weight_global_scale, silently; and when dequantising while loading, all dense
layers of a mixed checkpoint are read with one config group, which stops it. Prints one JSON line
per checkpoint: missing and unexpected keys, and for the ids the mean negative log-likelihood, the
greedy next token and a digest of the float32 logits. `--dump` writes the effective weights under
the model's own names to OUT/NAME.safetensors, NAME as the folder CKPT.
"""

import argparse
import hashlib
import json
import os
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def read_ids(text: str) -> list[int]:
    if Path(text).is_file():
        text = Path(text).read_text()
    return [int(word) for word in text.replace(",", " ").split()]


def load(checkpoint: str, as_stored: bool) -> tuple[object, dict[str, object]]:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    wrapped = "vision_config" in config.to_dict()
    loader = (
        transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    )
    settings = {}
    stored = getattr(config, "quantization_config", None)
    if stored is not None and stored.get("quant_method") == "compressed-tensors":
        settings["quantization_config"] = transformers.CompressedTensorsConfig(
            dequantize=not as_stored
        )
    return loader.from_pretrained(
        checkpoint, dtype=torch.bfloat16, output_loading_info=True, **settings
    )


def score(model: object, ids: list[int]) -> dict[str, object]:
    import torch

    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits[0].float()
    digest = hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
    found = {
        "logits_sha256": digest,
        "logits_std": round(logits.std().item(), 6),
        "next_id": int(logits[-1].argmax()),
    }
    if len(ids) > 1:
        nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
        found |= {"nll": round(nll.item(), 6), "nll_tokens": len(ids) - 1}
    return found


def inspect(
    checkpoint: str, ids: list[int], dump: Path | None, as_stored: bool
) -> dict[str, object]:
    import transformers
    from safetensors.torch import save_file

    model, info = load(checkpoint, as_stored)
    model.eval()
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    row = {
        "ok": not (missing or mismatched),
        "transformers": transformers.__version__,
        "model": type(model).__name__,
        "missing": missing[:20],
        "unexpected": unexpected[:20],
        "mismatched": mismatched[:20],
        "missing_count": len(missing),
        "unexpected_count": len(unexpected),
    }
    if ids:
        row |= score(model, ids)
    weights = dict(model.named_parameters())  # after the forward pass, which may decompress them
    row["not_finite"] = sorted(
        n for n, w in weights.items() if w.is_floating_point() and not w.isfinite().all()
    )[:20]
    if dump is not None:
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, dump)
    return row


def run(checkpoint: str, options: argparse.Namespace) -> dict[str, object]:
    row: dict[str, object] = {"tool": "transformers", "checkpoint": checkpoint}
    dump = options.dump and options.dump / f"{Path(checkpoint).name}.safetensors"
    try:
        with redirect_stdout(sys.stderr):
            row |= inspect(checkpoint, options.ids, dump, options.as_stored)
    except Exception as error:
        traceback.print_exc()
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(row) + "\n")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--ids", type=read_ids, default=[])
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--as-stored", action="store_true")
    options = parser.parse_args()
    rows = [run(checkpoint, options) for checkpoint in options.checkpoints]
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
