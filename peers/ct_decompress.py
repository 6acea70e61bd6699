"""Dequantise a compressed-tensors checkpoint with compressed-tensors itself.

    ct_decompress.py OUT CKPT...   (environment: compressed-tensors, llmcompressor or vllm)

The library parses the configuration, matches targets and ignores (every module counts as a Linear)
and decompresses; this file only reads and writes tensors. OUT/NAME.safetensors (NAME as the folder
CKPT) holds MODULE.weight for every quantised module, as float32 (FP4 formats come out of the
library BF16-rounded, FP8 in the dtype of its scale). A module with quantisation tensors that no
config group claims is a failure, and so is one that a group names or matches by regular expression
but that has none. Prints one JSON line per checkpoint.
"""

import argparse
import json
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme


def shards(checkpoint: Path) -> list[Path]:
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [checkpoint / name for name in names]
    return sorted(checkpoint.glob("*.safetensors"))


def group_of(module: str, config: "QuantizationConfig") -> "QuantizationScheme | None":
    """The first config group that claims the module, as the library matches names."""
    import torch
    from compressed_tensors.utils.match import is_match

    linear = torch.nn.Linear(1, 1, device="meta")
    groups = config.config_groups.values()
    return next(
        (g for g in groups if is_match(module, linear, g.targets, config.ignore or ())), None
    )


def decompress(checkpoint: Path, out: Path) -> dict[str, object]:
    import compressed_tensors
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    stored = json.loads((checkpoint / "config.json").read_text())
    stored = stored.get("quantization_config") or stored["text_config"]["quantization_config"]
    config = QuantizationConfig.model_validate(stored)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for shard in shards(checkpoint):
        for name, tensor in load_file(shard).items():
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, {})[leaf] = tensor
    found, unclaimed, bare, formats = {}, [], [], set()
    for module, state in sorted(modules.items()):
        scheme = group_of(module, config)
        if "weight_scale" not in state:
            named = scheme is not None and any(
                t.startswith("re:") or t == module for t in scheme.targets
            )
            bare += [module] if named and "weight" in state else []
            continue
        if scheme is None:
            unclaimed.append(module)
            continue
        stated = scheme.format or config.format
        formats.add((str(stated), infer_module_format(torch.nn.Linear, scheme).value))
        compressor = BaseCompressor.get_value_from_registry(stated)
        weight = compressor.decompress(state, scheme)["weight"]
        found[f"{module}.weight"] = weight.detach().float().contiguous()
    save_file(found, out)
    return {
        "ok": bool(found) and not unclaimed and not bare,
        "compressed_tensors": compressed_tensors.__version__,
        "modules": len(found),
        "formats_stated_and_inferred": sorted(formats),
        "unclaimed": unclaimed[:20],
        "claimed_but_dense": bare[:20],
        "not_finite": sorted(n for n, t in found.items() if not t.isfinite().all())[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    options = parser.parse_args()
    rows = [run(checkpoint, options.out) for checkpoint in options.checkpoints]
    return 0 if all(row["ok"] for row in rows) else 1


def run(checkpoint: Path, out: Path) -> dict[str, object]:
    row: dict[str, object] = {"tool": "compressed-tensors", "checkpoint": str(checkpoint)}
    try:
        with redirect_stdout(sys.stderr):
            row |= decompress(checkpoint, out / f"{checkpoint.name}.safetensors")
    except Exception as error:
        traceback.print_exc()
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    sys.exit(main())
