"""Quantise a BF16 checkpoint with ModelOpt and export it, for comparison.

    run_modelopt.py MODEL OUT RECIPE [--calibrate TEXT_FILE | --ids IDS.json] [--mtp PREFIX]

Environment: modelopt.

RECIPE: w4a16_max (W4A16_NVFP4_CFG), w4a4_max (NVFP4_DEFAULT_CFG), fp8_block (128x128 weight-only
FP8), mxfp4, w4a16_mse, w4a16_local_hessian and w4a4_local_hessian (an FP8 sweep of static block
scales, by plain or weighted error; without a GPU ModelOpt's Triton kernel is replaced by the same
arithmetic in PyTorch). Which modules are left in BF16 is ModelOpt's own default. Data-free unless a
text is given, or windows of token ids ({"input_ids": [[...]]}). `--mtp` carries the MTP tensors
over as ModelOpt's example script does, and excludes what begins with PREFIX. Prints one JSON line:
CPU seconds by stage and in all, wall seconds, peak resident MiB.
"""

import argparse
import copy
import json
import os
import resource
import sys
import time
import traceback
from contextlib import redirect_stdout

RECIPES = {
    "w4a16_max": "W4A16_NVFP4_CFG",
    "w4a4_max": "NVFP4_DEFAULT_CFG",
    "w4a16_mse": "W4A16_NVFP4_CFG",
    "w4a16_local_hessian": "W4A16_NVFP4_CFG",
    "w4a4_local_hessian": "NVFP4_DEFAULT_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
}

#: Recipes that search stored block scales, and the error they search by.
SEARCHES = ("mse", "local_hessian")
#: Windows of ids that the model sees at once.
BATCH = 4


class Stages:
    """CPU and wall seconds since the last mark, by name."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}
        self.start = time.time()
        self._cpu = 0.0

    def mark(self, name: str) -> None:
        now = cpu_seconds()
        self.cpu_s[name] = round(now - self._cpu, 1)
        self._cpu = now


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in used)


def weights_as_static(config: object) -> None:
    """Store the block scales of weights, which is what a scale search needs."""
    for entry in config if isinstance(config, list) else [{k: v} for k, v in config.items()]:
        if "weight_quantizer" in json.dumps(entry, default=str):
            as_static(entry)


def as_static(config: object) -> None:
    """Turn dynamic block scales into stored ones."""
    if isinstance(config, dict):
        sizes = config.get("block_sizes")
        if isinstance(sizes, dict) and sizes.get("type") == "dynamic":
            sizes["type"] = "static"
        for value in config.values():
            as_static(value)
    elif isinstance(config, list | tuple):
        for value in config:
            as_static(value)


def replace_triton_kernel() -> None:
    """ModelOpt 0.47 has its static NVFP4 fake-quantisation in Triton only: the same in PyTorch."""
    import torch
    from modelopt.torch.quantization import tensor_quant

    def fake_quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        scale = torch.where(scale > 0, scale, torch.full_like(scale, 1e-30))[:, None]
        magnitude = (values / scale).abs()
        step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
        return torch.copysign(((magnitude / step).round() * step).clamp(max=6.0) * scale, values)

    compiled = torch.compile(fake_quantize, dynamic=True)

    def forward(
        ctx,
        x,
        amax,
        global_amax=None,
        quantize_block_scales=True,
        fp8_max=448.0,
        out_dtype=None,
        *rest,
    ):
        scale = amax.float().reshape(-1) / 6.0
        if quantize_block_scales:
            top = amax.float().max() if global_amax is None else global_amax.float()
            unit = 448.0 / (top * (448.0 / fp8_max) / 6.0)
            scale = (scale * unit).clamp(max=448.0).to(torch.float8_e4m3fn).float() / unit
        found = compiled(x.float().reshape(amax.numel(), -1), scale)
        return found.reshape(x.shape).to(out_dtype or x.dtype)

    tensor_quant.StaticBlockwiseFP4FakeQuantFunction.forward = staticmethod(forward)


def calibration(model: object, model_dir: str, text: str, ids: str) -> object:
    """The loop that shows the model a text, 512 tokens at a time, or windows of ids; None without
    either."""
    if ids:
        return ids_loop(ids)
    if not text:
        return None
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    with open(text, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])[None]

    def loop(model: object) -> None:
        with torch.no_grad():
            for at in range(0, ids.shape[1], 512):
                model(input_ids=ids[:, at : at + 512])

    return loop


def ids_loop(path: str) -> object:
    """The loop that shows the model windows of equal length."""
    import torch

    with open(path, encoding="utf-8") as file:
        rows = torch.tensor(json.load(file)["input_ids"])

    def loop(model: object) -> None:
        with torch.no_grad():
            for at in range(0, len(rows), BATCH):
                model(input_ids=rows[at : at + BATCH], logits_to_keep=1)

    return loop


def mtp_tensors(model_dir: str) -> dict[str, object]:
    """Every tensor of the checkpoint whose name says mtp, whatever transformers made of it."""
    from safetensors import safe_open

    found = {}
    for name in sorted(os.listdir(model_dir)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(model_dir, name), "pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys() if "mtp" in key}
    return found


def quantize(options: argparse.Namespace, stages: Stages) -> None:
    model_dir, out, recipe = options.model, options.out, options.recipe
    import modelopt.torch.quantization as mtq
    import torch
    import transformers
    from modelopt.torch.export import export_hf_checkpoint

    stages.mark("import")
    settings = copy.deepcopy(getattr(mtq, RECIPES[recipe]))
    search = recipe.split("_", 1)[1]
    if search in SEARCHES:
        settings["algorithm"] = {"method": search, "fp8_scale_sweep": True}
        weights_as_static(settings["quant_cfg"])
        replace_triton_kernel()
    config = transformers.AutoConfig.from_pretrained(model_dir)
    wrapped = "vision_config" in config.to_dict()
    loader = (
        transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    )
    dtype = getattr(torch, options.dtype)
    model = loader.from_pretrained(model_dir, dtype=dtype).eval()
    stages.mark("load")
    loop = calibration(model, model_dir, options.calibrate, options.ids)
    model = mtq.quantize(model, settings, forward_loop=loop)
    stages.mark("quantize")
    extra = mtp_tensors(model_dir) if options.mtp else None
    if options.mtp:
        model._mtp_layer_prefixes = [options.mtp]
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out, extra_state_dict=extra)
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(out)
    stages.mark("export")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--calibrate", metavar="TEXT_FILE", default="")
    parser.add_argument("--ids", metavar="IDS.json", default="")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--mtp", metavar="PREFIX", default="")
    options = parser.parse_args()
    row: dict[str, object] = {"tool": "modelopt", "recipe": options.recipe, "ok": True}
    stages = Stages()
    try:
        with redirect_stdout(sys.stderr):
            quantize(options, stages)
    except Exception as error:
        traceback.print_exc()
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    peak = max(
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    row |= {
        "cpu_s": round(cpu_seconds(), 1),
        "wall_s": round(time.time() - stages.start, 1),
        "peak_rss_mib": peak // 1024,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpu_stages_s": stages.cpu_s,
    }
    sys.stdout.write(json.dumps(row) + "\n")
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
