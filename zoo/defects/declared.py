"""Defects of what the configuration files declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from folder import Defect, Folder

CONFIG, NESTED = "config.json", "hf_quant_config.json"
LANGUAGE = "model.language_model.layers"
W4A16 = {"quant_algo": "W4A16_NVFP4", "group_size": 16}


def both(folder: Folder, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the section of each file that has one."""
    config = folder.document(CONFIG)
    if "quantization_config" in config:
        change(config["quantization_config"])
        folder.put(CONFIG, config)
    if NESTED in folder.files:
        nested = folder.document(NESTED)
        change(nested["quantization"])
        folder.put(NESTED, nested)


def flat(folder: Folder, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the section of config.json alone."""
    config = folder.document(CONFIG)
    change(config["quantization_config"])
    folder.put(CONFIG, config)


def nested(folder: Folder, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the section of hf_quant_config.json alone."""
    document = folder.document(NESTED)
    change(document["quantization"])
    folder.put(NESTED, document)


def ignored(section: dict[str, Any]) -> list[str]:
    """The list of exclusions, under either name."""
    entries: list[str] = section["ignore" if "ignore" in section else "exclude_modules"]
    return entries


def exclude(*entries: str) -> Callable[[Folder], None]:
    """Add exclusions to both files."""
    return lambda folder: both(folder, lambda section: ignored(section).extend(entries))


def include(*entries: str) -> Callable[[Folder], None]:
    """Take exclusions out of both files; all those that contain one of the words."""

    def change(section: dict[str, Any]) -> None:
        entries_of = ignored(section)
        kept = [e for e in entries_of if not any(word in e for word in entries)]
        if len(kept) == len(entries_of):
            raise ValueError(f"no exclusion contains {entries}")
        entries_of[:] = kept

    return lambda folder: both(folder, change)


def list_as(algorithm: dict[str, Any], *modules: str) -> Callable[[Folder], None]:
    """List modules in the map of both files, and among the targets of a group that fits."""

    def change(section: dict[str, Any]) -> None:
        section["quantized_layers"] |= {name: dict(algorithm) for name in modules}
        groups = section.get("config_groups", {})
        for group in groups.values():
            group["targets"] = [t for t in group["targets"] if t not in modules]
        bits = 8 if "FP8" in algorithm["quant_algo"] else 4
        fits = [g for g in groups.values() if g["weights"]["num_bits"] == bits]
        if fits:
            fits[0]["targets"] = sorted((*fits[0]["targets"], *modules))
        elif groups:
            numbers = {"dynamic": False, "num_bits": bits, "type": "float"}
            groups[f"group_{len(groups)}"] = {
                "input_activations": numbers,
                "weights": numbers,
                "targets": sorted(modules),
            }

    return lambda folder: both(folder, change)


def unlist(*modules: str) -> Callable[[Folder], None]:
    """Take modules out of the map and the targets of both files."""

    def change(section: dict[str, Any]) -> None:
        for name in modules:
            del section["quantized_layers"][name]
        for group in section.get("config_groups", {}).values():
            group["targets"] = [t for t in group["targets"] if t not in modules]

    return lambda folder: both(folder, change)


def four_bit_inputs(section: dict[str, Any]) -> None:
    for group in section["config_groups"].values():
        if group["weights"]["num_bits"] == 4:
            group["input_activations"] = dict(group["weights"])


def no_inputs(section: dict[str, Any]) -> None:
    for group in section["config_groups"].values():
        group.pop("input_activations")


def no_section(folder: Folder) -> None:
    config = folder.document(CONFIG)
    del config["quantization_config"]
    folder.put(CONFIG, config)
    folder.files.pop(NESTED, None)


def nested_only(folder: Folder) -> None:
    config = folder.document(CONFIG)
    del config["quantization_config"]
    folder.put(CONFIG, config)


def nested_only_without_keys(folder: Folder) -> None:
    nested_only(folder)
    nested(folder, lambda section: section.pop("kv_cache_quant_algo", None))
    nested(folder, lambda section: section.pop("group_size"))


def residual_input_scales(folder: Folder) -> None:
    for name in folder.matching(r"\.weight_scale_2$"):
        module = name.removesuffix(".weight_scale_2")
        folder.tensors[f"{module}.input_scale"] = np.array(0.0078125, np.float32)


def block_fp8_in_the_map(folder: Folder) -> None:
    module = f"{LANGUAGE}.1.self_attn.o_proj"
    weight = folder.tensors[f"{module}.weight"]
    folder.tensors[f"{module}.weight"] = weight.astype(ml_dtypes.float8_e4m3fn)
    shape = (-(-weight.shape[0] // 128), 1, -(-weight.shape[1] // 128), 1)
    folder.tensors[f"{module}.weight_scale"] = np.ones(shape, np.float32)
    list_as({"quant_algo": "FP8_PB_WO"}, module)(folder)


def group_without_format(section: dict[str, Any]) -> None:
    section["format"] = "mixed-precision"
    for group in section["config_groups"].values():
        group["format"] = None


def weights_of(section: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = next(iter(section["config_groups"].values()))["weights"]
    return first


def one_kv_scale(folder: Folder) -> None:
    name = f"{LANGUAGE}.1.self_attn.v_proj.v_scale"
    folder.tensors[name] = np.array(0.03125, np.float32)


def undeclared_kv_scales(folder: Folder) -> None:
    for part in "kv":
        name = f"model.layers.1.self_attn.{part}_proj.{part}_scale"
        folder.tensors[name] = np.array(0.03125, np.float32)


FP8_CACHE = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}


def smoothed(folder: Folder) -> None:
    for name in folder.matching(r"o_proj\.weight_scale_2$"):
        module = name.removesuffix(".weight_scale_2")
        k = 2 * folder.tensors[f"{module}.weight"].shape[1]
        folder.tensors[f"{module}.pre_quant_scale"] = np.full(k, 0.5, ml_dtypes.bfloat16)


def into_text_config(folder: Folder) -> None:
    config = folder.document(CONFIG)
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    folder.put(CONFIG, config)


def half_the_group(section: dict[str, Any]) -> None:
    if "group_size" in section:
        section["group_size"] = 32
    for group in section.get("config_groups", {}).values():
        for part in ("weights", "input_activations"):
            if part in group:
                group[part]["group_size"] = 32


VLLM = "thread: https://github.com/vllm-project/vllm/issues/"
SGLANG = "thread: https://github.com/sgl-project/sglang/issues/"

DEFECTS = [
    Defect(
        "kv-cache-in-one-twin",
        "NB301",
        "nybble-modelopt",
        "the KV cache is declared FP8 in hf_quant_config.json only",
        lambda folder: flat(folder, lambda section: section.pop("kv_cache_scheme")),
        origin=f"{SGLANG}27906",
        repaired=True,
        severity="warning",
    ),
    Defect(
        "exclusions-differ",
        "NB301",
        "modelopt-moe",
        "the vision tower is excluded in one of the two files only",
        lambda folder: nested(folder, lambda section: ignored(section).remove("model.visual*")),
        repaired=True,
    ),
    Defect(
        "algorithms-differ",
        "NB301",
        "modelopt-dense",
        "config.json says W4A16_NVFP4, hf_quant_config.json says FP8",
        lambda folder: nested(folder, lambda section: section.update(quant_algo="FP8")),
        source="source-dense",
        repaired=True,
    ),
    Defect(
        "maps-differ",
        "NB301",
        "nybble-modelopt",
        "lm_head is in the map of config.json only",
        lambda folder: nested(folder, lambda section: section["quantized_layers"].pop("lm_head")),
        repaired=True,
    ),
    Defect(
        "groups-declare-activations",
        "NB302",
        "nybble-modelopt",
        "the map says W4A16_NVFP4, config_groups give the same modules 4-bit input activations",
        lambda folder: flat(folder, four_bit_inputs),
        origin="thread: https://github.com/ai-dynamo/aiconfigurator/issues/1513",
        repaired=True,
    ),
    Defect(
        "groups-lack-activations",
        "NB302",
        "modelopt-moe",
        "NVFP4 with input scales, whose group has no input_activations",
        lambda folder: flat(folder, no_inputs),
        repaired=True,
    ),
    Defect(
        "lm-head-listed-and-excluded",
        "NB303",
        "nybble-modelopt",
        "lm_head is quantized, listed, and excluded all the same",
        exclude("lm_head"),
        origin=f"{VLLM}45132",
        repaired=True,
    ),
    Defect(
        "listed-module-absent",
        "NB304",
        "nybble-modelopt",
        "the map lists a projection that no tensor belongs to",
        list_as(W4A16, f"{LANGUAGE}.0.mlp.down_proj"),
        repaired=True,
    ),
    Defect(
        "mixed-without-map",
        "NB305",
        "nybble-modelopt",
        "MIXED_PRECISION without quantized_layers in either file",
        lambda folder: both(folder, lambda section: section.pop("quantized_layers")),
        origin=f"{SGLANG}28099",
        repaired=True,
    ),
    Defect(
        "algorithm-misspelled",
        "NB306",
        "nybble-modelopt",
        "one layer's algorithm is spelled NVFP4_W4A16",
        list_as({"quant_algo": "NVFP4_W4A16", "group_size": 16}, "lm_head"),
        repaired=True,
    ),
    Defect(
        "algorithm-renamed",
        "NB306",
        "modelopt-moe",
        "the whole file is declared NVFP4_AWQ, which vLLM refuses",
        lambda folder: both(folder, lambda section: section.update(quant_algo="NVFP4_AWQ")),
        repaired=True,
        severity="warning",
    ),
    Defect(
        "declared-fp8-holds-nvfp4",
        "NB307",
        "nybble-modelopt",
        "lm_head is declared FP8 and holds NVFP4",
        list_as({"quant_algo": "FP8"}, "lm_head"),
        repaired=True,
    ),
    Defect(
        "declared-but-plain",
        "NB308",
        "nybble-modelopt",
        "o_proj is listed as W4A16_NVFP4 and stored in BF16",
        list_as(W4A16, f"{LANGUAGE}.1.self_attn.o_proj"),
        repaired=True,
    ),
    Defect(
        "packed-not-listed",
        "NB309",
        "nybble-modelopt",
        "lm_head is packed and not in the map",
        unlist("lm_head"),
        repaired=True,
    ),
    Defect(
        "packed-but-excluded",
        "NB309",
        "modelopt-dense",
        "a packed projection is excluded",
        exclude("model.layers.1.self_attn.o_proj"),
        origin=f"{VLLM}44081",
        source="source-dense",
        repaired=True,
    ),
    Defect(
        "linear-attention-not-ignored",
        "NB310",
        "llmcompressor-moe",
        "linear_attn is stored in BF16 and missing from ignore",
        include("linear_attn"),
        origin=f"{VLLM}40252",
        repaired=True,
    ),
    Defect(
        "mtp-not-ignored",
        "NB310",
        "llmcompressor-moe",
        "the MTP head is stored in BF16 and missing from ignore",
        include("mtp"),
        origin=f"{VLLM}53387",
        repaired=True,
        also=("NB106",),
    ),
    Defect(
        "mtp-fc-not-excluded",
        "NB310",
        "modelopt-moe",
        "mtp.layers.0* is excluded, mtp.fc is not",
        lambda folder: (include("mtp")(folder), exclude("mtp.layers.0*")(folder), None)[-1],
        origin=f"{VLLM}38650",
        repaired=True,
        also=("NB106",),
        severity="warning",
    ),
    Defect(
        "vision-not-excluded",
        "NB310",
        "modelopt-moe",
        "the vision tower is stored in BF16 and missing from the exclusions",
        include("visual"),
        repaired=True,
    ),
    Defect(
        "no-section",
        "NB311",
        "nybble-modelopt",
        "quantized tensors, and neither file says so",
        no_section,
        repaired=True,
    ),
    Defect(
        "nested-only",
        "NB312",
        "modelopt-moe",
        "quantization is declared in hf_quant_config.json only",
        nested_only,
        repaired=True,
    ),
    Defect(
        "nested-only-weight-only",
        "NB312",
        "modelopt-dense",
        "W4A16_NVFP4 is declared in hf_quant_config.json only, where vLLM does not know it",
        nested_only,
        source="source-dense",
        repaired=True,
        severity="warning",
    ),
    Defect(
        "required-keys-missing",
        "NB313",
        "modelopt-moe",
        "hf_quant_config.json, the only declaration, lacks group_size",
        nested_only_without_keys,
        repaired=True,
    ),
    Defect(
        "no-quant-method",
        "NB313",
        "modelopt-dense",
        "quantization_config has no quant_method",
        lambda folder: flat(folder, lambda section: section.pop("quant_method")),
        source="source-dense",
        repaired=True,
        severity="warning",
    ),
    Defect(
        "weight-only-with-input-scale",
        "NB314",
        "nybble-modelopt",
        "W4A16_NVFP4 modules carry input scales",
        residual_input_scales,
        origin="thread: https://github.com/NVIDIA/TensorRT-LLM/issues/15680",
        repaired=True,
    ),
    Defect(
        "activations-without-input-scale",
        "NB315",
        "nybble-w4a4",
        "W4A4 is declared and no input scale is stored",
        lambda folder: folder.drop(r"\.input_scale$") and None,
        repaired=True,
    ),
    Defect(
        "block-fp8-per-layer",
        "NB316",
        "nybble-modelopt",
        "a layer of MIXED_PRECISION is block FP8",
        block_fp8_in_the_map,
        origin=f"{VLLM}54367",
        severity="warning",
    ),
    Defect(
        "group-without-format",
        "NB317",
        "nybble-ct",
        "format is mixed-precision and the groups have none",
        lambda folder: flat(folder, group_without_format),
        repaired=True,
    ),
    Defect(
        "unknown-field",
        "NB318",
        "nybble-ct",
        "a group's weights have a field that compressed-tensors does not know",
        lambda folder: flat(
            folder, lambda section: weights_of(section).update(scale_format="e4m3")
        ),
        repaired=True,
    ),
    Defect(
        "actorder-group",
        "NB318",
        "llmcompressor-dense",
        "actorder is group",
        lambda folder: flat(folder, lambda section: weights_of(section).update(actorder="group")),
        repaired=True,
    ),
    Defect(
        "values-scale-alone",
        "NB319",
        "nybble-modelopt",
        "an attention layer has a v_scale and no k_scale",
        one_kv_scale,
        origin="thread: https://github.com/vllm-project/vllm/issues/46264",
        clean="nybble-w4a4",
        severity="error",
    ),
    Defect(
        "kv-cache-without-scales",
        "NB319",
        "llmcompressor-dense",
        "an FP8 KV cache is declared and no scale is stored",
        lambda folder: flat(folder, lambda section: section.update(kv_cache_scheme=FP8_CACHE)),
        origin="thread: https://github.com/sgl-project/sgl-cookbook/issues/237",
        repaired=True,
        severity="warning",
    ),
    Defect(
        "kv-scales-undeclared",
        "NB319",
        "modelopt-dense",
        "KV scales are stored and no KV cache format is declared",
        undeclared_kv_scales,
        severity="warning",
    ),
    Defect(
        "pre-quant-scale",
        "NB320",
        "modelopt-dense",
        "o_proj has a pre_quant_scale, declared is plain W4A16_NVFP4",
        smoothed,
    ),
    Defect(
        "section-in-text-config",
        "NB321",
        "nybble-ct",
        "quantization_config lies inside text_config",
        into_text_config,
    ),
    Defect(
        "foreign-quant-method",
        "NB322",
        "modelopt-dense",
        "quant_method is fp8, quant_algo W4A16_NVFP4",
        lambda folder: flat(folder, lambda section: section.update(quant_method="fp8")),
    ),
    Defect(
        "group-size-differs",
        "NB323",
        "modelopt-dense",
        "group size 32 is declared, the block scales are one per 16 weights",
        lambda folder: both(folder, half_the_group),
        source="source-dense",
        repaired=True,
    ),
]
