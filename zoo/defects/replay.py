"""What one engine or another refuses, or builds as something else than the file holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from folder import Defect, Folder

MODELOPT, GROUPS, W4A4, DENSE = "nybble-modelopt", "nybble-ct", "nybble-w4a4", "nybble-dense"
CONFIG, NESTED = "config.json", "hf_quant_config.json"
LAYER = "model.language_model.layers.1"
VLLM = "thread: https://github.com/vllm-project/vllm/issues/"
Section = dict[str, Any]
Plant = Callable[[Folder], None]


def sections(folder: Folder, change: Callable[[Section], object]) -> None:
    """Change what both files say of quantization."""
    config = folder.document(CONFIG)
    change(config["quantization_config"])
    folder.put(CONFIG, config)
    if NESTED in folder.files:
        nested = folder.document(NESTED)
        change(nested["quantization"])
        folder.put(NESTED, nested)


def excluded(section: Section) -> list[str]:
    """The list of exclusions, under either name."""
    return section["ignore"] if "ignore" in section else section["exclude_modules"]


def unlist(section: Section, module: str) -> None:
    """Take a module out of the map of layers, and of the groups made from it."""
    del section["quantized_layers"][module]
    for group in section.get("config_groups", {}).values():
        group["targets"] = [t for t in group["targets"] if t != module]


# ---------------------------------------------------------------------------------------- refusals


def unknown_field(folder: Folder) -> None:
    def change(section: Section) -> None:
        for group in section["config_groups"].values():
            group["weights"]["block_size"] = 16

    sections(folder, change)


def unknown_entry(folder: Folder) -> None:
    entry = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    name = "model.language_model.layers.9.mlp.shared_expert.down_proj"
    sections(folder, lambda s: s["quantized_layers"].update({name: entry}))


def mixed_container(folder: Folder) -> None:
    """A uniform file as a map of layers: what older engines do not read."""
    names = [n.removesuffix(".weight_scale_2") for n in folder.matching(r"\.weight_scale_2$")]
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in names}

    def change(section: Section) -> None:
        section["quant_algo"] = "MIXED_PRECISION"
        section["quantized_layers"] = layers
        for group in section.get("config_groups", {}).values():
            group["targets"] = sorted(layers)
        section.pop("group_size", None)
        excluded(section)[:] = [e for e in excluded(section) if e.startswith("mtp")]

    sections(folder, change)


def mixed_groups(folder: Folder) -> None:
    """NVFP4 experts beside FP8 attention, as published compressed-tensors files have them."""
    for name in folder.matching(r"self_attn\.o_proj\.weight$"):
        if not name.startswith("mtp."):
            to_fp8(folder, name, lambda n, k: (n, 1), ml_dtypes.bfloat16)

    def change(section: Section) -> None:
        [(name, group)] = section["config_groups"].items()
        eight = {"num_bits": 8, "type": "float", "symmetric": True}
        fp8 = {
            "targets": ["re:.*self_attn\\.o_proj$"],
            "weights": eight | {"strategy": "channel", "dynamic": False},
            "input_activations": eight | {"strategy": "token", "dynamic": True},
            "format": "float-quantized",
        }
        packed = group | {"format": "nvfp4-pack-quantized"}
        section["config_groups"] = {"group_0": fp8, "group_1": packed}
        section["format"] = "mixed-precision"
        section["ignore"] = [entry for entry in section["ignore"] if "o_proj" not in entry]

    sections(folder, change)


def to_fp8(
    folder: Folder, name: str, shape: Callable[[int, int], tuple[int, ...]], dtype: Any
) -> None:
    """One weight in FP8, with a scale of 1 of that shape; its values stay in FP8's range."""
    values = folder.tensors[name]
    folder.tensors[name] = values.astype(ml_dtypes.float8_e4m3fn)
    folder.tensors[f"{name}_scale"] = np.ones(shape(*values.shape), dtype)
    folder.shard_of[f"{name}_scale"] = folder.shard_of[name]


# ----------------------------------------------------------------------------------------- modules


def packed_head_unlisted(folder: Folder) -> None:
    sections(folder, lambda s: unlist(s, "lm_head"))


def gates_not_excluded(folder: Folder) -> None:
    def change(section: Section) -> None:
        entries = excluded(section)
        entries[:] = [e for e in entries if not e.endswith(("in_proj_a", "in_proj_b"))]

    sections(folder, change)


def bare_word_excluded(folder: Folder) -> None:
    sections(folder, lambda s: excluded(s).append("mlp.experts"))


def narrow(folder: Folder) -> None:
    """K of the dense down projections becomes 48: whole blocks, no superblock; config.json too."""
    for name in folder.matching(r"mlp\.down_proj\.(weight|weight_scale)$"):
        width = 3 if name.endswith("_scale") else 24
        folder.tensors[name] = np.ascontiguousarray(folder.tensors[name][:, :width])
    for name in folder.matching(r"mlp\.(gate|up)_proj\.(weight|weight_scale)$"):
        folder.tensors[name] = np.ascontiguousarray(folder.tensors[name][:48])
    config = folder.document(CONFIG)
    config["intermediate_size"] = 48
    folder.put(CONFIG, config)


def block_fp8_per_layer(folder: Folder) -> None:
    name = f"{LAYER}.self_attn.o_proj"
    to_fp8(folder, f"{name}.weight", lambda n, k: (1, 1, 1, 1), np.float32)

    def change(section: Section) -> None:
        section["quantized_layers"][name] = {"quant_algo": "FP8_PB_WO"}
        if "config_groups" in section:
            weights = {"dynamic": False, "num_bits": 8, "type": "float"}
            group = {"targets": [name], "weights": weights, "input_activations": weights}
            section["config_groups"]["group_9"] = group

    sections(folder, change)


def up_in_bf16(folder: Folder) -> None:
    name = f"{LAYER}.mlp.shared_expert.up_proj"
    n, k = folder.tensors[f"{name}.weight"].shape
    shard = folder.shard_of[f"{name}.weight"]
    folder.drop(rf"^{name}\.")
    folder.tensors[f"{name}.weight"] = np.full((n, 2 * k), 0.01, ml_dtypes.bfloat16)
    folder.shard_of[f"{name}.weight"] = shard
    sections(folder, lambda s: unlist(s, name))


def one_input_scale_missing(folder: Folder) -> None:
    folder.drop(r"layers\.1\.mlp\.experts\.1\.\w+\.input_scale$")


def residual_input_scales(folder: Folder) -> None:
    for name in folder.matching(r"mlp\.experts\.\d+\.\w+\.weight_scale_2$"):
        scale = name.replace("weight_scale_2", "input_scale")
        folder.tensors[scale] = np.array(0.0078125, np.float32)
        folder.shard_of[scale] = folder.shard_of[name]


def declared_weight_only(folder: Folder) -> None:
    def change(section: Section) -> None:
        for entry in section["quantized_layers"].values():
            if entry["quant_algo"] == "NVFP4":
                entry["quant_algo"] = "W4A16_NVFP4"
        for group in section.get("config_groups", {}).values():
            if group["weights"]["num_bits"] == 4:
                group.pop("input_activations", None)

    sections(folder, change)


def draft_experts_not_ignored(folder: Folder) -> None:
    def change(section: Section) -> None:
        rest = [entry for entry in section["ignore"] if "mtp" not in entry]
        names = [n.removesuffix(".weight") for n in folder.matching(r"^mtp\..*(fc|proj)\.weight$")]
        section["ignore"] = rest + [n for n in names if ".experts." not in n]

    sections(folder, change)


def draft_fc_not_excluded(folder: Folder) -> None:
    def change(section: Section) -> None:
        entries = excluded(section)
        entries[:] = [e for e in entries if not e.startswith("mtp")] + ["mtp.layers.0*"]

    sections(folder, change)


DEFECTS = [
    Defect(
        "replay-unknown-field",
        "NB601",
        GROUPS,
        "A config group has a field that compressed-tensors does not know",
        unknown_field,
        engine="vllm",
        also=("NB318",),
    ),
    Defect(
        "replay-entry-without-module",
        "NB601",
        MODELOPT,
        "quantized_layers names a layer that does not exist: llama.cpp asserts",
        unknown_entry,
        engine="llamacpp",
    ),
    Defect(
        "replay-mixed-in-old-vllm",
        "NB601",
        "modelopt-moe",
        "MIXED_PRECISION, which vLLM 0.15 does not accept",
        mixed_container,
        origin=f"{VLLM}37854",
        engine="vllm@0.15.1",
    ),
    Defect(
        "replay-head-unlisted",
        "NB602",
        MODELOPT,
        "lm_head is packed, and not in quantized_layers",
        packed_head_unlisted,
        origin=f"{VLLM}45132",
        engine="vllm",
        also=("NB309",),
    ),
    Defect(
        "replay-gates-not-excluded",
        "NB602",
        "modelopt-moe",
        "in_proj_a and in_proj_b are BF16, and missing from ignore",
        gates_not_excluded,
        origin=f"{VLLM}40252",
        engine="vllm",
        also=("NB310",),
    ),
    Defect(
        "replay-substring",
        "NB602",
        "modelopt-moe",
        "A bare word in ignore, which vLLM finds inside the paths of all packed experts",
        bare_word_excluded,
        engine="vllm",
        also=("NB402",),
    ),
    Defect(
        "replay-weight-only-declared",
        "NB603",
        W4A4,
        "W4A4 experts declared W4A16: they run without FP4 tensor cores",
        declared_weight_only,
        origin=f"{VLLM}31085",
        engine="vllm",
    ),
    Defect(
        "replay-no-superblock",
        "NB604",
        DENSE,
        "K of the down projections is 48: fine for NVFP4, and no superblock of GGUF",
        narrow,
        engine="llamacpp",
    ),
    Defect(
        "replay-not-divisible",
        "NB605",
        DENSE,
        "K of the down projections is 48: over two ranks no whole blocks",
        narrow,
        engine="vllm",
        tensor_parallel=2,
    ),
    Defect(
        "replay-block-fp8-per-layer",
        "NB606",
        MODELOPT,
        "FP8_PB_WO in quantized_layers, which vLLM 0.25 builds unquantized",
        block_fp8_per_layer,
        origin=f"{VLLM}54367",
        engine="vllm@0.25.0",
    ),
    Defect(
        "replay-fused-schemes",
        "NB607",
        MODELOPT,
        "up_proj is BF16 beside an NVFP4 gate_proj, which run as one matmul",
        up_in_bf16,
        engine="vllm",
    ),
    Defect(
        "replay-input-scale-missing",
        "NB608",
        W4A4,
        "One expert lacks its input scales: vLLM computes with what the memory held",
        one_input_scale_missing,
        origin=f"{VLLM}45212",
        engine="vllm",
        also=("NB209",),
    ),
    Defect(
        "replay-residual-input-scales",
        "NB609",
        MODELOPT,
        "Weight-only experts with input scales: W4A16 in vLLM, W4A4 in TensorRT-LLM",
        residual_input_scales,
        origin="thread: https://github.com/NVIDIA/TensorRT-LLM/issues/15680",
    ),
    Defect(
        "replay-draft-experts",
        "NB610",
        GROUPS,
        "The draft model's experts are missing from ignore",
        draft_experts_not_ignored,
        origin=f"{VLLM}41994",
        engine="vllm",
        also=("NB106",),
    ),
    Defect(
        "replay-draft-fc",
        "NB610",
        "modelopt-moe",
        "mtp.layers.0* is excluded, mtp.fc is not: older vLLM builds it packed",
        draft_fc_not_excluded,
        origin=f"{VLLM}38650",
        engine="vllm@0.19.1",
    ),
    Defect(
        "replay-experts-without-scale",
        "NB611",
        GROUPS,
        "Packed NVFP4 experts, which transformers decodes without their tensor scale",
        origin="thread: https://github.com/huggingface/transformers/issues/48371",
        clean="llmcompressor-dense",
    ),
    Defect(
        "replay-gguf-mixed-groups",
        "NB612",
        GROUPS,
        "NVFP4 and FP8 groups, which llama.cpp's converter refuses",
        mixed_groups,
        origin="thread: https://github.com/ggml-org/llama.cpp/pull/28636",
        engine="llamacpp",
    ),
]
