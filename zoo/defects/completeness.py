"""Defects of completeness: what is missing, too much, or quantized that should not be (NB1xx)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from folder import Defect, Folder

GITHUB = "https://github.com/"
LAYER0, LAYER1 = "model.language_model.layers.0.", "model.language_model.layers.1."
MODELOPT = "tool: NVIDIA ModelOpt 0.47.0, NVFP4_DEFAULT_CFG"
COMPRESSOR = "tool: llm-compressor 0.14.0.1, oneshot NVFP4A16"
W4A16 = {"quant_algo": "W4A16_NVFP4", "group_size": 16}


def drop(pattern: str) -> Callable[[Folder], None]:
    """Without the tensors that match."""

    def plant(folder: Folder) -> None:
        folder.drop(pattern)

    return plant


def copy(folder: Folder, old: str, new: str) -> None:
    """The tensors of one module once more, under another module's name."""
    for name in folder.matching(rf"^{old}\."):
        twin = new + name.removeprefix(old)
        folder.tensors[twin] = folder.tensors[name].copy()
        folder.shard_of[twin] = folder.shard_of[name]


def add_layers(folder: Folder, *modules: str) -> None:
    """Declare modules as W4A16 NVFP4, in both files and in every list of ModelOpt's."""
    config = folder.document("config.json")
    twin = folder.document("hf_quant_config.json")
    section = config["quantization_config"]
    for module in modules:
        section["quantized_layers"][module] = W4A16
        twin["quantization"]["quantized_layers"][module] = W4A16
        section["config_groups"]["group_0"]["targets"].append(module)
    folder.put("config.json", config)
    folder.put("hf_quant_config.json", twin)


def exclude(folder: Folder, *entries: str) -> None:
    """Replace the list of exclusions, in both files."""
    config = folder.document("config.json")
    twin = folder.document("hf_quant_config.json")
    config["quantization_config"]["ignore"] = list(entries)
    twin["quantization"]["exclude_modules"] = list(entries)
    folder.put("config.json", config)
    folder.put("hf_quant_config.json", twin)


def in_text_config(**changed: object) -> Callable[[Folder], None]:
    def plant(folder: Folder) -> None:
        config = folder.document("config.json")
        config["text_config"] |= changed
        folder.put("config.json", config)

    return plant


# ---------------------------------------------------------------------------------------- missing


def nest_vision(folder: Folder) -> None:
    folder.rename(r"^model\.visual\.", "model.language_model.visual.")


def leftover(folder: Folder) -> None:
    """A factor that a smoothing method multiplied in and then saved."""
    name = f"{LAYER1}self_attn.q_proj.smooth_factor"
    folder.tensors[name] = np.ones(64, dtype=ml_dtypes.bfloat16)


def quantize_mtp(folder: Folder) -> None:
    """The MTP head's shared expert packed, with layer 1's codes, and declared so."""
    modules = [f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")]
    for module in modules:
        folder.drop(rf"^mtp\.layers\.0\.{module}\.weight$")
        copy(folder, LAYER1 + module, f"mtp.layers.0.{module}")
    exclude(folder)
    add_layers(folder, *(f"mtp.layers.0.{module}" for module in modules))


def forget_mtp_experts(folder: Folder) -> None:
    """A list of targets that reaches the experts of the MTP head, and none that excludes it."""
    config = folder.document("config.json")
    section = config["quantization_config"]
    section["ignore"] = [e for e in section["ignore"] if "mtp" not in e]
    section["ignore"].append("re:^mtp\\.fc$")
    folder.put("config.json", config)


def text_model(folder: Folder) -> None:
    """The text half of a vision model, with the config.json of the whole."""
    folder.drop(r"^model\.visual\.")


# ------------------------------------------------------------------------------- wrong and double


def transpose(pattern: str) -> Callable[[Folder], None]:
    def plant(folder: Folder) -> None:
        for name in folder.matching(pattern):
            folder.tensors[name] = np.ascontiguousarray(folder.tensors[name].T)

    return plant


def stale_plain(folder: Folder) -> None:
    """Plain weights that an earlier run left in the same folder."""
    for module in folder.matching(rf"^{LAYER0}mlp\.shared_expert\..*\.weight_packed$"):
        name = module.removesuffix("_packed")
        folder.tensors[name] = np.full((64, 64), 0.01, dtype=ml_dtypes.bfloat16)


def stale_stack(folder: Folder) -> None:
    """The stacks that the experts were split from, still there."""
    stack = np.full((2, 128, 64), 0.01, dtype=ml_dtypes.bfloat16)
    folder.tensors[f"{LAYER0}mlp.experts.gate_up_proj"] = stack
    folder.tensors[f"{LAYER0}mlp.experts.down_proj"] = stack[:, :64].copy()


def add_one_to_norms(folder: Folder) -> None:
    """Norms saved as the factor that they stand for, 1 + weight."""
    for name in folder.matching(rf"^{LAYER1}self_attn\.[qk]_norm\.weight$"):
        values = folder.tensors[name].astype(np.float32) + 1
        folder.tensors[name] = values.astype(ml_dtypes.bfloat16)


def flip_one_byte(folder: Folder) -> None:
    """One bit in the middle of a tensor that sampling passes over."""
    values = folder.tensors["mtp.fc.weight"]
    values.view(np.uint8).reshape(-1)[5000] ^= 1


def lose_precision(folder: Folder) -> None:
    name = f"{LAYER0}linear_attn.A_log"
    folder.tensors[name] = folder.tensors[name].astype(ml_dtypes.bfloat16)


def declare_only(folder: Folder) -> None:
    """The configuration of an NVFP4 model over weights of which none was quantized."""
    section: dict[str, Any] = {
        "config_groups": {
            "group_0": {
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head", "model.visual*", "mtp*"],
        "quant_algo": "W4A16_NVFP4",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }
    folder.put("config.json", folder.document("config.json") | {"quantization_config": section})


# ------------------------------------------------------------------------------- quantized too much


def quantize_router(folder: Folder) -> None:
    """Two rows of a packed weight in the router's place."""
    source = f"{LAYER0}mlp.shared_expert.gate_proj"
    router = f"{LAYER0}mlp.gate"
    folder.drop(rf"^{router}\.weight$")
    copy(folder, source, router)
    for leaf in ("weight", "weight_scale"):
        folder.tensors[f"{router}.{leaf}"] = folder.tensors[f"{router}.{leaf}"][:2].copy()
    add_layers(folder, router)


def view_scales(folder: Folder) -> None:
    """Block scales whose bytes are right and whose dtype is not."""
    for name in folder.matching(r"\.weight_scale$"):
        folder.tensors[name] = folder.tensors[name].view(np.int8)


def quantize_convolution(folder: Folder) -> None:
    """conv1d in FP8 with one scale, as a newer recipe of ModelOpt has it."""
    name = f"{LAYER0}linear_attn.conv1d.weight"
    values = folder.tensors[name].astype(np.float32)
    scale = np.float32(np.abs(values).max() / 448)
    folder.tensors[name] = (values / scale).astype(ml_dtypes.float8_e4m3fn)
    folder.tensors[f"{name}_scale"] = np.array(scale)
    folder.shard_of[f"{name}_scale"] = folder.shard_of[name]


DEFECTS = [
    Defect(
        "source-tensor-dropped",
        "NB101",
        "nybble-modelopt",
        "dt_bias of a DeltaNet layer is lost",
        plant=drop(rf"^{LAYER0}linear_attn\.dt_bias$"),
        source="source",
        also=("NB110",),
        repaired=True,
    ),
    Defect(
        "vision-nested-in-language-model",
        "NB101",
        "modelopt-moe",
        "The tower's names begin with model.language_model.visual",
        plant=nest_vision,
        origin=f"thread: {GITHUB}NVIDIA/Model-Optimizer/pull/2032",
        source="source",
        also=("NB107", "NB405"),
        repaired=True,
    ),
    Defect(
        "leftover-smooth-factor",
        "NB102",
        "nybble-modelopt",
        "A smoothing factor was saved beside the weight",
        plant=leftover,
        source="source",
    ),
    Defect(
        "export-lost-mtp",
        "NB103",
        "../tool-made/modelopt-without-mtp",
        "export_hf_checkpoint called from a script of one's own loses the MTP head",
        origin=f"{MODELOPT}, export_hf_checkpoint without extra_state_dict",
        repaired=True,
        source="source",
        also=("NB101",),
        clean="modelopt-moe",
    ),
    Defect(
        "mtp-promised-and-absent",
        "NB103",
        "nybble-ct",
        "mtp_num_hidden_layers is 1, and there is no MTP tensor",
        plant=drop(r"^mtp\."),
        origin=f"thread: {GITHUB}z-lab/paroquant/issues/47",
        repaired=True,
    ),
    Defect(
        "mtp-without-fc",
        "NB104",
        "nybble-modelopt",
        "Layers of the MTP head are there, fc and the three norms are not",
        plant=drop(r"^mtp\.(fc|norm|pre_fc_norm_embedding|pre_fc_norm_hidden)\."),
        origin=f"thread: {GITHUB}intel/auto-round/issues/1731",
        repaired=True,
    ),
    Defect(
        "mtp-packed",
        "NB105",
        "nybble-modelopt",
        "The MTP head's shared expert is packed and declared",
        plant=quantize_mtp,
        origin=f"thread: {GITHUB}kekzl/imp/pull/1428",
    ),
    Defect(
        "mtp-layers-excluded-only",
        "NB106",
        "../tool-made/modelopt-mtp-layers-only",
        "mtp.layers.0* is excluded, mtp.fc is not",
        origin=f"{MODELOPT}, MTP prefixes as its example script found them by layer",
        repaired=True,
        clean="modelopt-moe",
        severity="warning",
    ),
    Defect(
        "mtp-experts-not-ignored",
        "NB106",
        "nybble-ct",
        "The ignore list names mtp.fc alone, the targets reach the experts of the MTP head",
        plant=forget_mtp_experts,
        origin=f"thread: {GITHUB}vllm-project/vllm/pull/41994",
        repaired=True,
        also=("NB308",),
    ),
    Defect(
        "vision-promised-and-absent",
        "NB107",
        "nybble-modelopt",
        "vision_config without a vision tower",
        plant=text_model,
        origin=f"thread: {GITHUB}ollama/ollama/issues/17501",
        repaired=True,
    ),
    Defect(
        "vision-without-merger",
        "NB107",
        "nybble-modelopt",
        "The vision tower lacks its merger",
        plant=drop(r"^model\.visual\.merger\."),
        repaired=True,
    ),
    Defect(
        "vision-quantized-by-short-ignore-list",
        "NB108",
        "../tool-made/llmcompressor-ignores-head-only",
        "With only lm_head ignored, the tower's linears are packed",
        origin=f'{COMPRESSOR}, ignore=["lm_head"]',
        also=("NB115", "NB210"),
        clean="llmcompressor-moe",
    ),
    Defect(
        "expert-missing",
        "NB109",
        "nybble-modelopt",
        "down_proj of one expert is not there",
        plant=drop(rf"^{LAYER0}mlp\.experts\.1\.down_proj\."),
    ),
    Defect(
        "experts-of-a-layer-missing",
        "NB109",
        "nybble-ct",
        "A layer has no experts",
        plant=drop(rf"^{LAYER1}mlp\.experts\."),
    ),
    Defect(
        "norm-missing",
        "NB110",
        "nybble-modelopt",
        "A layer lacks its input norm",
        plant=drop(rf"^{LAYER1}input_layernorm\.weight$"),
        repaired=True,
    ),
    Defect(
        "projection-transposed",
        "NB111",
        "nybble-modelopt",
        "k_proj is stored as [K, N]",
        plant=transpose(rf"^{LAYER1}self_attn\.k_proj\.weight$"),
    ),
    Defect(
        "config-of-a-smaller-model",
        "NB111",
        "nybble-w4a4",
        "config.json says moe_intermediate_size 32, the weights have 64",
        plant=in_text_config(moe_intermediate_size=32),
    ),
    Defect(
        "packed-and-plain",
        "NB112",
        "nybble-ct",
        "Plain weights of an earlier run lie beside the packed ones",
        plant=stale_plain,
        origin=f"thread: {GITHUB}intel/auto-round/issues/2350",
        repaired=True,
        also=("NB409",),
    ),
    Defect(
        "stack-beside-experts",
        "NB112",
        "nybble-modelopt",
        "The stacks that the experts were split from are still there",
        plant=stale_stack,
        repaired=True,
        also=("NB308",),
    ),
    Defect(
        "export-lost-float32",
        "NB113",
        "modelopt-moe",
        "A_log and a norm of DeltaNet are F32 in the source and BF16 in the export",
        origin=f"{MODELOPT}, export_hf_checkpoint of a model loaded in BF16",
        source="source",
        repaired=True,
        clean="nybble-w4a4",
        severity="warning",
    ),
    Defect(
        "norms-rounded-around-one",
        "NB113",
        "llmcompressor-moe",
        "Norms were moved to 1 + weight for calibration and back, each time rounded to BF16",
        origin=COMPRESSOR,
        source="source",
        clean="nybble-ct",
        severity="warning",
    ),
    Defect(
        "state-in-bf16",
        "NB113",
        "nybble-modelopt",
        "A_log is BF16 where the source has F32",
        plant=lose_precision,
        source="source",
        repaired=True,
        severity="warning",
    ),
    Defect(
        "norms-plus-one",
        "NB113",
        "nybble-modelopt",
        "Two norms are saved as 1 + weight",
        plant=add_one_to_norms,
        source="source",
        repaired=True,
    ),
    Defect(
        "copy-with-one-flipped-bit",
        "NB113",
        "nybble-modelopt",
        "One bit of mtp.fc differs from the source",
        plant=flip_one_byte,
        source="source",
        deep=True,
        repaired=True,
    ),
    Defect(
        "declared-and-nothing-packed",
        "NB114",
        "source",
        "The configuration says W4A16_NVFP4, every weight is BF16",
        plant=declare_only,
        origin=f"thread: {GITHUB}NVIDIA/Model-Optimizer/issues/1255",
        also=("NB310",),
    ),
    Defect(
        "router-packed",
        "NB115",
        "nybble-modelopt",
        "A router is packed and declared",
        plant=quantize_router,
    ),
    Defect(
        "shared-expert-gate-packed",
        "NB115",
        "../tool-made/llmcompressor-ignores-head-only",
        "With only lm_head ignored, the shared experts' gates are packed",
        origin=f'{COMPRESSOR}, ignore=["lm_head"]',
        also=("NB108", "NB210"),
        clean="llmcompressor-moe",
    ),
    Defect(
        "delta-gates-packed",
        "NB116",
        "../tool-made/llmcompressor-ignores-head-only",
        "With only lm_head ignored, in_proj_a and in_proj_b are packed",
        origin=f'{COMPRESSOR}, ignore=["lm_head"]',
        also=("NB108", "NB115", "NB210"),
        clean="llmcompressor-moe",
    ),
    Defect(
        "convolution-in-fp8",
        "NB117",
        "nybble-modelopt",
        "conv1d of a DeltaNet layer is FP8, which no engine reads",
        plant=quantize_convolution,
        origin=f"thread: {GITHUB}NVIDIA/Model-Optimizer/pull/2302",
        also=("NB309",),
    ),
    Defect(
        "codes-without-block-scales",
        "NB118",
        "nybble-modelopt",
        "A shared expert has codes and no block scales",
        plant=drop(rf"^{LAYER0}mlp\.shared_expert\.up_proj\.weight_scale$"),
    ),
    Defect(
        "no-tensor-scales",
        "NB118",
        "nybble-modelopt",
        "Block scales without any tensor scale above them",
        plant=drop(r"\.weight_scale_2$"),
        origin=f"thread: {GITHUB}ollama/ollama/issues/15880",
        also=("NB213",),
    ),
    Defect(
        "block-scales-under-a-wrong-dtype",
        "NB118",
        "nybble-modelopt",
        "The bytes of all block scales are there, and the header calls them I8",
        plant=view_scales,
    ),
    Defect(
        "scales-without-codes",
        "NB118",
        "nybble-ct",
        "An expert's scales are there and its codes are not",
        plant=drop(rf"^{LAYER0}mlp\.experts\.0\.up_proj\.weight_packed$"),
        also=("NB308",),
    ),
    Defect(
        "lm-head-dropped-as-tied",
        "NB119",
        "nybble-w4a4",
        "lm_head is not there, and config.json does not tie it",
        plant=drop(r"^lm_head\.weight$"),
        repaired=True,
    ),
]
