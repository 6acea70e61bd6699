"""Decode a ModelOpt checkpoint with ModelOpt itself.

    modelopt_decode.py OUT CKPT...   (environment: modelopt)

Every module with a four-bit `weight` goes through ModelOpt's NVFP4QTensor.dequantize, every FP8 one
through its FP8QTensor.dequantize; this file only reads and writes tensors. OUT/NAME.safetensors
(NAME as the folder CKPT) holds MODULE.weight as float32. Prints one JSON line per checkpoint.
"""

import json
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path


def decode(folder: Path, out: Path) -> dict:
    """The rows of one checkpoint."""
    import torch
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    found, algorithms = {}, {"nvfp4": 0, "fp8": 0}
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        weight, scale = tensors[f"{module}.weight"], tensors[name]
        if weight.dtype == torch.uint8:
            shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
            packed = NVFP4QTensor(shape, torch.float32, weight)
            value = packed.dequantize(
                torch.float32,
                scale=scale,
                double_scale=tensors[f"{module}.weight_scale_2"],
                block_sizes={-1: 16},
            )
            algorithms["nvfp4"] += 1
        else:
            value = FP8QTensor(weight.shape, torch.float32, weight).dequantize(
                torch.float32, scale=scale, block_sizes=None
            )
            algorithms["fp8"] += 1
        found[f"{module}.weight"] = value.float().contiguous()
    save_file(found, out / f"{folder.name}.safetensors")
    return {"modules": algorithms}


def main() -> None:
    out = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        row = {"tool": "modelopt", "checkpoint": argument, "ok": False}
        try:
            with redirect_stdout(sys.stderr):
                row |= decode(Path(argument), out)
            row["ok"] = True
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
