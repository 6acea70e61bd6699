"""Small quantized checkpoints in every dialect that conversions read, written and decoded by hand.

Codes and scales come from the definition, `formats.search.quantize`; where they lie, what they are
called and what the configuration says is spelled out here, independent of nybble's layouts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4
from nybble.formats.search import Search, quantize

Matrix = NDArray[np.float32]
Folder = dict[str, tuple[str, tuple[int, ...], bytes]]
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)

_FP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}
_FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def _group(format: str, weights: dict[str, Any], inputs: Any, targets: list[str]) -> Any:
    return {
        "targets": targets,
        "format": format,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


_LINEAR = ["Linear"]
_ATTENTION, _MLP = ["re:.*self_attn\\..*_proj$"], ["re:.*mlp\\..*_proj$"]
_CT_NVFP4 = _group("nvfp4-pack-quantized", _FP4, {**_FP4, "dynamic": "local"}, _LINEAR)
_CT_TENSOR = _group(
    "float-quantized", {**_FP8, "strategy": "tensor"}, {**_FP8, "strategy": "tensor"}, _LINEAR
)
_CT_CHANNEL = _group(
    "float-quantized",
    {**_FP8, "strategy": "channel"},
    {**_FP8, "strategy": "token", "dynamic": True},
    _LINEAR,
)
_CT_BLOCK = _group(
    "float-quantized",
    {**_FP8, "strategy": "block", "block_structure": [128, 128]},
    {**_FP8, "strategy": "group", "group_size": 128, "dynamic": True},
    _LINEAR,
)
_CT_MXFP4 = _group(
    "mxfp4-pack-quantized",
    {**_FP4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    None,
    _LINEAR,
)

#: dialect -> what attention and MLP are stored as.
KINDS: dict[str, tuple[str, str]] = {
    "modelopt-nvfp4": ("nvfp4", "nvfp4"),
    "modelopt-mixed": ("fp8", "w4a16"),
    "modelopt-fp8": ("fp8", "fp8"),
    "modelopt-pb-wo": ("fp8_block_4d", "fp8_block_4d"),
    "modelopt-channel": ("fp8_channel", "fp8_channel"),
    "ct-nvfp4": ("ct_nvfp4", "ct_nvfp4"),
    "ct-tensor": ("ct_fp8", "ct_fp8"),
    "ct-channel": ("ct_channel", "ct_channel"),
    "ct-block": ("ct_block", "ct_block"),
    "ct-mxfp4": ("ct_mxfp4", "ct_mxfp4"),
    "ct-mixed": ("ct_channel", "ct_w4a16"),
    "qwen-fp8": ("fp8_inv", "fp8_inv"),
}


def checkpoint(
    folder: Path,
    dialect: str,
    *,
    family: str = "qwen3",
    search: Search = "four-six",
    residual: bool = False,
    kv_scales: float = 0.0,
    seed: int = 0,
) -> Path:
    """A folder in one dialect; `residual` puts input scales beside weight-only modules."""
    config = tiny.config(family)
    attention, mlp = KINDS[dialect]
    values: tiny.Tensors = {}
    listed: dict[str, str] = {}
    for name, value in tiny.tensors(config, seed=seed, stacked=False).items():
        module = name.removesuffix(".weight")
        is_attention = ".self_attn." in name
        is_linear = module.endswith("_proj") and (is_attention or ".mlp." in name)
        if not is_linear or name.startswith("mtp."):
            values[name] = value
            continue
        kind = attention if is_attention else mlp
        listed[module] = kind
        values |= store(module, value.astype(np.float32), kind, search, residual=residual)
        leaf = module.rpartition(".")[2]
        if kv_scales and leaf in ("k_proj", "v_proj"):
            values |= _kv_scale(module, dialect, np.float32(kv_scales))
    documents = _documents(config, dialect, listed, has_kv=bool(kv_scales))
    tiny.write(folder, documents.pop("config.json"), values, shards=2)
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    return folder


def store(
    module: str, x: Matrix, kind: str, search: Search = "four-six", *, residual: bool = False
) -> tiny.Tensors:
    """The tensors of one module."""
    formats = {
        **dict.fromkeys(("nvfp4", "w4a16", "ct_nvfp4", "ct_w4a16"), NVFP4),
        "fp8": FP8,
        "ct_fp8": FP8,
        "ct_channel": FP8_CHANNEL,
        "fp8_channel": FP8_CHANNEL,
        "ct_mxfp4": MXFP4,
        **dict.fromkeys(("fp8_block_4d", "ct_block", "fp8_inv"), FP8_BLOCK),
    }
    fmt = formats[kind]
    one = quantize(x, fmt, "absmax" if fmt is MXFP4 else search)
    scale, top = one.scale, one.tensor_scale
    codes = one.codes if fmt.is_packed else one.codes.view(E4M3)
    measured = np.float32(0.03125)
    leaves: dict[str, Any]
    if kind in ("nvfp4", "w4a16"):
        assert top is not None
        leaves = {"weight": codes, "weight_scale": scale.view(E4M3), "weight_scale_2": top}
    elif kind in ("ct_nvfp4", "ct_w4a16"):
        assert top is not None
        leaves = {"weight_packed": codes, "weight_scale": scale.view(E4M3)}
        leaves["weight_global_scale"] = (np.float32(1) / top).reshape(1)
    elif kind == "ct_mxfp4":
        leaves = {"weight_packed": codes, "weight_scale": scale}
    elif kind == "fp8":
        leaves = {"weight": codes, "weight_scale": scale.reshape(())}
    elif kind == "fp8_channel":
        leaves = {"weight": codes, "weight_scale": scale[:, 0]}
    elif kind == "fp8_block_4d":
        leaves = {"weight": codes, "weight_scale": scale[:, None, :, None]}
    elif kind == "fp8_inv":
        leaves = {"weight": codes, "weight_scale_inv": scale.astype(BF16)}
    else:
        shape = (1,) if fmt is FP8 else scale.shape
        leaves = {"weight": codes, "weight_scale": scale.astype(BF16).reshape(shape)}
    if kind in ("nvfp4", "fp8") or (kind == "w4a16" and residual):
        leaves["input_scale"] = np.asarray(measured)
    if kind == "ct_nvfp4":
        leaves["input_global_scale"] = (np.float32(1) / measured).reshape(1)
    if kind == "ct_fp8":
        leaves["input_scale"] = measured.astype(BF16).reshape(1)
    return {f"{module}.{leaf}": np.asarray(value) for leaf, value in leaves.items()}


def _kv_scale(module: str, dialect: str, value: np.float32) -> tiny.Tensors:
    leaf = module.rpartition(".")[2]
    if dialect.startswith("ct"):
        above = module.removesuffix(f".{leaf}")
        return {f"{above}.{leaf[0]}_scale": np.asarray(value).astype(BF16).reshape(1)}
    return {f"{module}.{leaf[0]}_scale": np.asarray(value)}


def _documents(
    config: dict[str, Any], dialect: str, listed: dict[str, str], *, has_kv: bool
) -> dict[str, dict[str, Any]]:
    if dialect == "qwen-fp8":
        fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        section = {**fp8, "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
        return {"config.json": {**config, "quantization_config": section}}
    if dialect.startswith("ct"):
        return {"config.json": {**config, "quantization_config": _ct_section(dialect, has_kv)}}
    nested: dict[str, Any] = {"kv_cache_quant_algo": "FP8" if has_kv else None}
    if dialect == "modelopt-mixed":
        spelling = {
            "fp8": {"quant_algo": "FP8"},
            "w4a16": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        }
        nested |= {"quant_algo": "MIXED_PRECISION", "exclude_modules": []}
        nested["quantized_layers"] = {name: spelling[kind] for name, kind in listed.items()}
    else:
        algorithm = {
            "modelopt-nvfp4": "NVFP4",
            "modelopt-fp8": "FP8",
            "modelopt-channel": "FP8_PER_CHANNEL_PER_TOKEN",
            "modelopt-pb-wo": "fp8_pb_wo",
        }[dialect]
        nested |= {"quant_algo": algorithm, "exclude_modules": ["lm_head", "model.embed_tokens"]}
        if algorithm == "NVFP4":
            nested["group_size"] = 16
    producer = {"name": "modelopt", "version": "0.47.0"}
    return {
        "config.json": config,
        "hf_quant_config.json": {"producer": producer, "quantization": nested},
    }


def _ct_section(dialect: str, has_kv: bool) -> dict[str, Any]:
    groups = {
        "ct-nvfp4": [_CT_NVFP4],
        "ct-tensor": [_CT_TENSOR],
        "ct-channel": [_CT_CHANNEL],
        "ct-block": [_CT_BLOCK],
        "ct-mxfp4": [_CT_MXFP4],
        "ct-mixed": [
            {**_CT_CHANNEL, "targets": _ATTENTION},
            {**_CT_NVFP4, "targets": _MLP, "input_activations": None},
        ],
    }[dialect]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {**_FP8, "strategy": "tensor"} if has_kv else None,
        "version": "0.17.0",
    }


# ----------------------------------------------------------------------------- reading, by hand


def weights(folder: Path) -> dict[str, Matrix]:
    """Every quantized weight of a folder by module, decoded with the tables written here."""
    files = tiny.read(folder)
    found = {}
    for name in files:
        module, _, leaf = name.rpartition(".")
        is_codes = leaf == "weight_packed" or (
            leaf == "weight" and files[name][0] in ("U8", "F8_E4M3")
        )
        if is_codes:
            found[module] = decode(files, module)
    return found


def decode(files: Folder, module: str) -> Matrix:
    """One weight, [N, K]."""
    own = {k.rpartition(".")[2]: tiny.array(v) for k, v in files.items() if is_of(k, module)}
    codes = own["weight_packed"] if "weight_packed" in own else own["weight"]
    scale = own["weight_scale"] if "weight_scale" in own else own["weight_scale_inv"]
    if codes.dtype == np.uint8:
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        values = np.concatenate([values, -values])
        x = np.stack([values[codes & 15], values[codes >> 4]], -1).reshape(len(codes), -1)
        if scale.dtype == np.uint8:
            each = np.exp2(scale.astype(np.float32) - 127)
        elif "weight_scale_2" in own:
            each = scale.astype(np.float32) * own["weight_scale_2"]
        else:
            each = scale.astype(np.float32) * (np.float32(1) / own["weight_global_scale"])
        return x * np.repeat(each, x.shape[1] // each.shape[1], axis=1)
    x, each = codes.astype(np.float32), scale.astype(np.float32)
    if each.ndim == 4:
        each = each[:, 0, :, 0]
    if each.size == 1 and "weight_scale_inv" not in own:
        return x * each.reshape(())
    if each.shape in ((len(x), 1), (len(x),)):
        return x * each.reshape(-1, 1)
    rows, columns = np.arange(len(x)) // 128, np.arange(x.shape[1]) // 128
    return x * each[np.ix_(rows, columns)]


def is_of(name: str, module: str) -> bool:
    """Whether a tensor is one of this very module."""
    return name.rpartition(".")[0] == module


def bf16(matrix: Matrix) -> NDArray[np.uint16]:
    """The nearest BF16 numbers as bits."""
    return matrix.astype(BF16).view(np.uint16)
