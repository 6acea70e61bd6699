"""Capture what ModelOpt and compressed-tensors really write for a fixed set of small BF16 weights.

The files beside this script are its output; nothing in the test suite runs it. To make them again
(README.md says with which versions), run each step with the interpreter of the environment it
names, in this order:

    scripts/peers install modelopt compressed-tensors
    MO=$(scripts/peers python modelopt) CT=$(scripts/peers python compressed-tensors)
    $MO tests/golden/capture.py inputs /tmp/golden
    $MO tests/golden/capture.py modelopt /tmp/golden
    $MO tests/golden/capture.py modelopt-export /tmp/golden
    $CT tests/golden/capture.py compressed-tensors /tmp/golden
    $MO tests/golden/capture.py merge /tmp/golden tests/golden

Names inside a file are CASE.source and CASE.TOOL.LEAF. Members of a fused group share the part of
CASE before "__": their tools saw one tensor scale. This script knows no rounding of its own: every
quantised byte comes from a tool.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMATS = ("nvfp4_absmax", "mxfp4_absmax", "fp8_tensor", "fp8_channel", "fp8_block")
SEED = 20260821


def bf16(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(torch.bfloat16)


def gaussian(rng: np.random.Generator, *shape: int, std: float = 0.02) -> Tensor:
    return bf16(rng.standard_normal(shape) * std)


def on_ties(block: int, rows: int, blocks: int) -> Tensor:
    """Every block holds 6 and the seven E2M1 midpoints, times a power of two of its own.

    The last block is times 448: the tensor's amax is 2688 and its NVFP4 scale exactly 1.
    """
    unit = [6, 0.25, -0.25, 0.75, -0.75, 1.25, -1.25, 1.75, -1.75, 2.5, -2.5, 3.5, -3.5, 5, -5, 0]
    powers = np.exp2(np.arange(rows * blocks) % 12 - 6)
    powers[-1] = 448
    return bf16(np.outer(powers, unit * (block // 16)).reshape(rows, blocks * block))


def with_block_amax(rng: np.random.Generator, amax: np.ndarray, block: int) -> Tensor:
    """Block i is uniform noise below a peak of amax[i]; a row has 8 blocks."""
    noise = rng.uniform(-0.9, 0.9, (amax.size, block))
    noise[:, 3] = np.where(np.arange(amax.size) % 2, 1.0, -1.0)
    return bf16((noise * amax[:, None]).reshape(-1, 8 * block))


def sparse(rng: np.random.Generator, *shape: int) -> Tensor:
    return gaussian(rng, *shape) * bf16(rng.random(shape) < 0.08)


def zero_blocks(rng: np.random.Generator, rows: int, blocks: int, block: int) -> Tensor:
    weight = gaussian(rng, rows, blocks * block).view(rows, blocks, block)
    weight[::2, 1::2] = 0
    weight[3] = 0
    return weight.view(rows, -1)


def negative_zeros(rng: np.random.Generator, *shape: int) -> Tensor:
    weight = gaussian(rng, *shape)
    weight[:, ::3] = -0.0
    weight[0] = -0.0
    return weight


def outlier(rng: np.random.Generator, *shape: int) -> Tensor:
    weight = gaussian(rng, *shape)
    weight[5, 40] = -1e5
    return weight


def shared_inputs(rng: np.random.Generator, block: int) -> dict[str, Tensor]:
    """The cases every block format gets; N and K are unequal and K is a multiple of the block."""
    return {
        "gaussian": gaussian(rng, 24, 128),
        "student_t": bf16(rng.standard_t(3, (16, 256)) * 0.02),
        "sparse": sparse(rng, 24, 96),
        "zero_blocks": zero_blocks(rng, 16, 5, block),
        "ties": on_ties(block, 6, 4),
        "negative_zeros": negative_zeros(rng, 8, 64),
        "tiny": gaussian(rng, 16, 64, std=1e-30),
        "dead": bf16(np.zeros((8, 96))),
        "outlier": outlier(rng, 16, 128),
        "huge": bf16(rng.uniform(-3.3e38, 3.3e38, (8, 64))),
    }


def nvfp4_inputs(rng: np.random.Generator) -> dict[str, Tensor]:
    cases = shared_inputs(rng, 16)
    # Tensor amax 2688 makes the tensor scale exactly 1 and block amax / 6 the unrounded scale.
    below = 6 * np.exp2(np.linspace(-12, -5, 39))
    cases["subnormal_scales"] = with_block_amax(rng, np.append(below, 2688.0), 16)
    midpoints = 6 * np.array([(8.5 + i) / 8 * 2.0**e for e in range(-6, 4) for i in range(8)])
    cases["scale_ties"] = with_block_amax(rng, np.append(midpoints[:79], 2688.0), 16)
    cases["subnormal_tensor"] = gaussian(rng, 16, 64, std=1e-37)
    for name, rows, std in (("q", 48, 0.02), ("k", 16, 0.05), ("v", 16, 0.01)):
        cases[f"qkv__{name}"] = gaussian(rng, rows, 64, std=std)
    for name, std in (("gate", 0.03), ("up", 0.02)):
        cases[f"gateup__{name}"] = gaussian(rng, 40, 64, std=std)
    return cases


def mxfp4_inputs(rng: np.random.Generator) -> dict[str, Tensor]:
    cases = shared_inputs(rng, 32)
    # Every BF16 mantissa: shows at which block amax a tool moves to the next exponent.
    cases["every_mantissa"] = with_block_amax(rng, 1 + np.arange(128) / 128, 32)
    cases["near_underflow"] = with_block_amax(rng, np.exp2(np.linspace(-133.0, -120.0, 16)), 32)
    return cases


def fp8_inputs(rng: np.random.Generator) -> dict[str, Tensor]:
    cases = {
        "gaussian": gaussian(rng, 24, 80),
        "student_t": bf16(rng.standard_t(3, (16, 96)) * 0.02),
        "zero_row": gaussian(rng, 8, 48),
        "tiny": gaussian(rng, 8, 64, std=1e-30),
        "dead": bf16(np.zeros((4, 48))),
        "outlier": outlier(rng, 8, 64),
        "huge": bf16(rng.uniform(-3.3e38, 3.3e38, (4, 64))),
    }
    cases["zero_row"][3] = 0
    return cases


def fp8_block_inputs(rng: np.random.Generator) -> dict[str, Tensor]:
    zero_block = gaussian(rng, 4, 264)
    zero_block[:, :128] = 0
    return {
        "student_t": bf16(rng.standard_t(3, (8, 256)) * 0.02),
        "ragged": gaussian(rng, 130, 132),
        "zero_block": zero_block,
        "tiny": gaussian(rng, 8, 64, std=1e-30),
        "dead": bf16(np.zeros((4, 48))),
    }


def write_inputs(work: Path) -> None:
    makers: dict[str, Callable[[np.random.Generator], dict[str, Tensor]]] = {
        "nvfp4_absmax": nvfp4_inputs,
        "mxfp4_absmax": mxfp4_inputs,
        "fp8_tensor": fp8_inputs,
        "fp8_channel": fp8_inputs,
        "fp8_block": fp8_block_inputs,
    }
    work.mkdir(parents=True, exist_ok=True)
    for number, (fmt, maker) in enumerate(makers.items()):
        cases = maker(np.random.default_rng([SEED, number]))
        save_file(
            {f"{name}.source": w for name, w in cases.items()}, work / f"{fmt}.source.safetensors"
        )


def read_groups(work: Path, fmt: str) -> dict[str, dict[str, Tensor]]:
    """Sources by fused group: {group: {case: weight}}; a case alone is its own group."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, weight in load_file(work / f"{fmt}.source.safetensors").items():
        case = key.removesuffix(".source")
        groups.setdefault(case.split("__")[0], {})[case] = weight
    return groups


# --- ModelOpt ---

MODELOPT_CONFIG = {
    "nvfp4_absmax": "W4A16_NVFP4_CFG",
    "mxfp4_absmax": "MXFP4_DEFAULT_CFG",
    "fp8_tensor": "FP8_DEFAULT_CFG",
    "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
}


def as_linear(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    return linear


def modelopt_group(fmt: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise a fused group as mtq.quantize and the unified export do, and dequantise it again."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight

    model = torch.nn.ModuleDict({case: as_linear(w) for case, w in weights.items()})
    model = mtq.quantize(model, getattr(mtq, MODELOPT_CONFIG[fmt]), forward_loop=lambda m: None)
    if len(weights) > 1:
        preprocess_linear_fusion(list(model.values()))
    found = {}
    for case, linear in model.items():
        linear.input_quantizer.disable()
        if hasattr(linear.input_quantizer, "_amax"):
            del linear.input_quantizer._amax
        _export_quantized_weight(linear, torch.bfloat16)
        leaves = {"weight": linear.weight.data}
        for leaf in ("weight_scale", "weight_scale_2"):
            if getattr(linear, leaf, None) is not None:
                leaves[leaf] = getattr(linear, leaf).data
        leaves["dequantized"] = modelopt_dequantize(fmt, leaves, weights[case])
        found.update({f"{case}.modelopt.{leaf}": value for leaf, value in leaves.items()})
    return found


def modelopt_dequantize(fmt: str, leaves: dict[str, Tensor], source: Tensor) -> Tensor:
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, NVFP4QTensor

    data, scale = leaves["weight"], leaves["weight_scale"]
    if fmt == "nvfp4_absmax":
        tensor = NVFP4QTensor(source.shape, source.dtype, data)
        return tensor.dequantize(
            torch.float32, scale=scale, double_scale=leaves["weight_scale_2"], block_sizes={-1: 16}
        )
    if fmt == "mxfp4_absmax":
        tensor = MXFP4QTensor(source.shape, source.dtype, data)
        return tensor.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    tensor = FP8QTensor(source.shape, source.dtype, data)
    if fmt == "fp8_block":
        grid = scale.reshape(-(-source.shape[0] // 128), -(-source.shape[1] // 128))
        return tensor.dequantize(torch.float32, scale=grid, block_sizes={-1: 128, -2: 128})
    return tensor.dequantize(torch.float32, scale=scale[:, None] if scale.dim() else scale)


# --- compressed-tensors ---

CT_PRESET = {
    "nvfp4_absmax": ("NVFP4A16", "nvfp4-pack-quantized"),
    "mxfp4_absmax": ("MXFP4A16", "mxfp4-pack-quantized"),
    "fp8_tensor": ("FP8", "float-quantized"),
    "fp8_channel": ("FP8_DYNAMIC", "float-quantized"),
    "fp8_block": ("FP8_BLOCK", "float-quantized"),
}


def observed_range(weight: Tensor, args: object) -> tuple[Tensor, Tensor]:
    """Minimum and maximum per scale in the weight's dtype, as llm-compressor observes them."""
    from compressed_tensors.quantization.utils import maybe_pad_tensor_for_block_quant

    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        flat = weight.reshape(1, -1)
    elif strategy == "channel":
        flat = weight.unsqueeze(-2)
    elif strategy == "block":
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        flat = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
        flat = flat.transpose(1, 2).flatten(-2, -1)
    else:
        flat = weight.unflatten(-1, (-1, args.group_size))
    return flat.amin(-1), flat.amax(-1)


def compressed_tensors_group(fmt: str, weights: dict[str, Tensor], tool: str) -> dict[str, Tensor]:
    """Quantise a fused group in the weights' own dtype, and decompress it again."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import (
        initialize_module_for_quantization,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    preset, name = CT_PRESET[fmt]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(name)
    ranges = {case: observed_range(w, scheme.weights) for case, w in weights.items()}
    global_scale = None
    if fmt == "nvfp4_absmax":
        absmax = torch.stack(
            [torch.stack([-low.min(), high.max()]).max() for low, high in ranges.values()]
        ).max()
        global_scale = generate_gparam(-absmax.reshape(1), absmax.reshape(1))
    found = {}
    for case, weight in weights.items():
        linear = as_linear(weight)
        initialize_module_for_quantization(linear, scheme, force_zero_point=False)
        scale, _ = calculate_qparams(*ranges[case], scheme.weights, global_scale=global_scale)
        linear.weight_scale.data.copy_(scale)
        if global_scale is not None:
            linear.weight_global_scale.data.copy_(global_scale)
        kept = ("weight", "weight_scale", "weight_global_scale")
        state = {key: value.data for key, value in linear.named_parameters() if key in kept}
        packed = compressor.compress(state, scheme)
        leaves = {key: packed[key].data for key in ("weight_packed", *kept) if key in packed}
        leaves["dequantized"] = compressor.decompress(dict(packed), scheme)["weight"].data
        found.update({f"{case}.{tool}.{leaf}": value for leaf, value in leaves.items()})
    return found


def run_tool(work: Path, tool: str) -> None:
    """Quantise every group with one tool; one it refuses becomes a line of TOOL.errors.json."""
    errors = {}
    for fmt in FORMATS:
        found: dict[str, Tensor] = {}
        for group, weights in read_groups(work, fmt).items():
            try:
                if tool == "modelopt":
                    found |= modelopt_group(fmt, weights)
                else:
                    found |= compressed_tensors_group(fmt, weights, "compressed_tensors")
                    wide = {case: w.float() for case, w in weights.items()}
                    as_f32 = compressed_tensors_group(fmt, wide, "compressed_tensors_f32")
                    found |= {
                        key: value
                        for key, value in as_f32.items()
                        if not key.endswith(".dequantized")
                    }
            except Exception as error:  # a refusal is part of the record
                errors[f"{fmt}/{group}"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        save_file({k: v.contiguous() for k, v in found.items()}, work / f"{fmt}.{tool}.safetensors")
    (work / f"{tool}.errors.json").write_text(json.dumps(errors, indent=1) + "\n")


def export_tiny_llama(work: Path) -> None:
    """Export a 2-layer Llama with NVFP4_DEFAULT_CFG; keep layer 0, sources and what was written."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    names = {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
    }
    for number, module in enumerate(names.values()):
        module.weight.data.normal_(0, 0.02 * (1 + number % 4))
    source = {
        f"{n}.weight.source": m.weight.data.clone() for n, m in names.items() if ".layers.0." in n
    }
    ids = torch.randint(0, 128, (2, 32))
    with torch.no_grad():
        model = mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward_loop=lambda m: m(input_ids=ids))
    target = work / "export"
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=target)
    written = load_file(target / "model.safetensors")
    layer = {key: value for key, value in written.items() if ".layers.0." in key and "_proj" in key}
    save_file(source | layer, work / "modelopt_export.safetensors")


def save_golden(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    path.chmod(0o644)  # save_file makes it readable by its owner only


def merge(work: Path, out: Path) -> None:
    """Join source and tools per format, one golden file each."""
    for fmt in FORMATS:
        tensors: dict[str, Tensor] = {}
        for part in ("source", "modelopt", "compressed-tensors"):
            tensors |= load_file(work / f"{fmt}.{part}.safetensors")
        save_golden(tensors, out / f"{fmt}.safetensors")
    save_golden(
        load_file(work / "modelopt_export.safetensors"), out / "modelopt_export.safetensors"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "step", choices=["inputs", "modelopt", "modelopt-export", "compressed-tensors", "merge"]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    options = parser.parse_args()
    if options.step == "inputs":
        write_inputs(options.work)
    elif options.step == "modelopt-export":
        export_tiny_llama(options.work)
    elif options.step == "merge":
        merge(options.work, options.out or Path(__file__).parent)
    else:
        run_tool(options.work, options.step)


if __name__ == "__main__":
    main()
