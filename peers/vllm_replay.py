"""Ask vLLM's own functions what each module of a header-only folder would be built as.

    vllm_replay.py CKPT UNITS

Runs in the environment vllm, reads no tensor and builds no model. UNITS is a JSON file: a list of
[module path in vLLM, sort, part], as nybble's replay has them. `create_model_config` chooses and
verifies the method, `_get_quantization_config` parses the configuration, `configure_quant_config`
or the model class's own mixin maps its names, and `get_quant_method` answers for an empty layer of
the class that the model would use. Kernel choice is cut off: no CPU has NVFP4 kernels. Prints one
JSON line: the method, a refusal, and [builds, runs as] or an error for every path.
"""

import importlib
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

QUANTIZATION = "vllm.model_executor.layers.quantization"
CT = f"{QUANTIZATION}.compressed_tensors"


def cut_kernels() -> None:
    """Replace what would look for a kernel, and constructors that need a whole layer."""
    import torch

    for name in ("w4a4_nvfp4", "w8a8_fp8", "w8a16_fp8", "w4a4_mxfp4"):
        module = importlib.import_module(f"{CT}.schemes.compressed_tensors_{name}")
        for attribute in dir(module):
            if attribute.startswith("init_") and attribute.endswith("_kernel"):
                setattr(module, attribute, lambda *a, **k: None)

    def record(self: object, *args: object, **kwargs: object) -> None:
        self.args, self.kwargs = args, kwargs

    modelopt = importlib.import_module(f"{QUANTIZATION}.modelopt")
    fp8 = importlib.import_module(f"{QUANTIZATION}.fp8")
    unquantized = importlib.import_module("vllm.model_executor.layers.fused_moe")
    for owner, name in (
        (modelopt, "ModelOptNvFp4FusedMoE"),
        (modelopt, "ModelOptFp8MoEMethod"),
        (modelopt, "ModelOptMxFp8FusedMoE"),
        (fp8, "Fp8MoEMethod"),
        (fp8, "Fp8LinearMethod"),
        (unquantized, "UnquantizedFusedMoEMethod"),
    ):
        getattr(owner, name).__init__ = record
    for name in ("w4a4_nvfp4", "w8a8_fp8", "w4a4_mxfp4"):
        module = importlib.import_module(
            f"{CT}.compressed_tensors_moe.compressed_tensors_moe_{name}"
        )
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                value.__init__ = record
    torch.set_default_dtype(torch.bfloat16)


def layer_of(path: str, sort: str) -> object:
    """An empty layer of the class that vLLM's models use at this place."""
    import torch
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    last = path.rpartition(".")[2]
    if sort == "experts":
        cls = RoutedExperts
    elif sort == "head":
        cls = ParallelLMHead
    elif last == "qkv_proj":
        cls = linear.QKVParallelLinear
    elif last in ("gate_up_proj", "in_proj_qkvz", "in_proj_ba"):
        cls = linear.MergedColumnParallelLinear
    elif last in ("o_proj", "down_proj", "out_proj", "linear_fc2", "proj"):
        cls = linear.RowParallelLinear
    else:
        cls = linear.ReplicatedLinear if sort == "router" else linear.ColumnParallelLinear
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    if sort == "experts":
        layer.moe_config = None
        layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name = "gate_proj", "up_proj"
        layer.ckpt_down_proj_name = "down_proj"
    return layer


def words_of(method: object, layer: object) -> list[str]:
    """[builds, runs as] of a quantization method, in nybble's words."""
    scheme = getattr(layer, "scheme", None)
    name = type(scheme or method).__name__
    if method is None or name.startswith("Unquantized"):
        return ["bf16", "BF16"]
    if name == "ModelOptLinearMethod":
        return words_of_spec(method.spec)
    if name == "ModelOptNvFp4FusedMoE":
        config = method.kwargs["quant_config"]
        return ["nvfp4", "W4A16" if config.quant_method == "W4A16_NVFP4" else "W4A4"]
    if name == "CompressedTensorsW4A4Fp4":
        return ["nvfp4", "W4A16" if scheme.use_a16 else "W4A4"]
    if name == "CompressedTensorsW4A4Nvfp4MoEMethod":
        return ["nvfp4", "W4A16" if method.kwargs["use_a16"] else "W4A4"]
    if name in ("CompressedTensorsW8A8Fp8", "CompressedTensorsW8A16Fp8"):
        kinds = {"tensor": "fp8", "channel": "fp8_channel", "block": "fp8_block"}
        runs = "W8A8" if name == "CompressedTensorsW8A8Fp8" else "W8A16"
        return [kinds[str(getattr(scheme.strategy, "value", scheme.strategy))], runs]
    if name == "ModelOptFp8MoEMethod":
        return ["fp8", "W8A8"]
    if name in ("Fp8MoEMethod", "Fp8LinearMethod"):
        config = method.args[0]
        return ["fp8_block" if config.weight_block_size else "fp8", "W8A8"]
    return [name, ""]


def words_of_spec(spec: object) -> list[str]:
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    builds = {
        keys.kNvfp4Static: "nvfp4",
        keys.kFp8StaticTensorSym: "fp8",
        keys.kFp8StaticTokenSym: "fp8_channel",
        keys.kFp8Static128BlockSym: "fp8_block",
        keys.kMxfp8Static: "mxfp8",
    }[spec.weight]
    if builds == "nvfp4":
        return [builds, "W4A16" if spec.activation is None else "W4A4"]
    return [builds, "W8A8"]


def configure(config: object, model_class: type) -> None:
    """Give a configuration the names of a model class, as building the model does."""
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.models.interfaces import SupportsQuant

    if issubclass(model_class, SupportsQuant):
        model_class.__new__(model_class, config)
    configure_quant_config(config, model_class)


def ask(config: object, path: str, sort: str) -> list[str]:
    layer = layer_of(path, sort)
    if path == "mtp.fc" and config.get_name() == "modelopt_fp4":
        return ["bf16", "BF16"]  # Qwen3_5MultiTokenPredictor passes no configuration
    return words_of(config.get_quant_method(layer, path), layer)


def main(folder: str, units: str) -> dict[str, object]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import get_model_architecture

    row: dict[str, object] = {"tool": "vllm", "modules": {}}
    try:
        model = EngineArgs(model=folder, skip_tokenizer_init=True).create_model_config()
        row["quantization"] = model.quantization
        config = VllmConfig._get_quantization_config(model, LoadConfig())
    except Exception as error:
        return row | {"refused": f"{type(error).__name__}: {error}"}
    if config is None:
        return row
    cut_kernels()
    model_class, _ = get_model_architecture(model)
    asked = json.loads(Path(units).read_text())
    current = VllmConfig()
    current.model_config = model  # schemes ask it for the dtype
    with set_current_vllm_config(current):
        for part in ("trunk", "mtp"):
            if part == "mtp":
                from vllm.model_executor.models.qwen3_5_mtp import Qwen3_5MTP

                model_class = Qwen3_5MTP
            configure(config, model_class)
            for path, sort, of in asked:
                if (of == "mtp") == (part == "mtp"):
                    try:
                        row["modules"][path] = ask(config, path, sort)
                    except Exception as error:
                        row["modules"][path] = [f"{type(error).__name__}", str(error)]
    return row


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        answer = main(*sys.argv[1:])
    print(json.dumps(answer))
