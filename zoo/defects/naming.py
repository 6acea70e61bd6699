"""Defects of names, in the tensors and in the configuration's lists."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from defects.declared import both, exclude, flat, ignored, include
from folder import Defect, Folder

HUB = "model.language_model."
ENGINE = "language_model.model."
SGLANG = "thread: https://github.com/sgl-project/sglang/issues/"
FREETOKEN = "thread: https://github.com/FlashML-org/FreeToken/issues/263"


def in_memory_names(folder: Folder) -> None:
    """The lists in the names of an engine, the tensors in those of the hub."""

    def change(section: dict[str, Any]) -> None:
        rename = {
            name: name.replace(HUB, ENGINE)
            for name in (*section["quantized_layers"], *ignored(section))
        }
        layers = section["quantized_layers"]
        section["quantized_layers"] = {rename[name]: entry for name, entry in layers.items()}
        for group in section.get("config_groups", {}).values():
            group["targets"] = sorted(rename[t] for t in group["targets"])

    both(folder, change)


def anchored(section: dict[str, Any]) -> None:
    """Patterns that begin with the hub's prefix, or with the head's name."""
    start = r"re:^model\.language_model\.layers"
    section["ignore"] = [e.replace("re:.*layers", start) for e in section["ignore"]]


def fused_qkv(folder: Folder) -> None:
    """q, k and v of one layer, packed in one tensor."""
    at = "model.layers.0.self_attn."
    for leaf in ("weight", "weight_scale"):
        parts = [folder.tensors[f"{at}{p}_proj.{leaf}"] for p in "qkv"]
        raw = np.concatenate([part.view(np.uint8) for part in parts])
        folder.tensors[f"{at}qkv_proj.{leaf}"] = raw.view(parts[0].dtype)
    for leaf in ("weight_scale_2", "input_scale"):
        if f"{at}q_proj.{leaf}" in folder.tensors:
            folder.tensors[f"{at}qkv_proj.{leaf}"] = folder.tensors[f"{at}q_proj.{leaf}"]
    folder.drop(r"model\.layers\.0\.self_attn\.[qkv]_proj\.")


def inverse_name(folder: Folder) -> None:
    folder.rename(r"^(.*layers\.1\.mlp\.down_proj\.weight_scale)$", r"\1_inv")


def one_in_the_other_layout(folder: Folder) -> None:
    """The tensors of one module as compressed-tensors would store them."""
    module = f"{HUB}layers.1.mlp.shared_expert.down_proj"
    scale = folder.tensors.pop(f"{module}.weight_scale_2")
    divisor = np.array([1 / float(scale)], np.float32)
    folder.tensors[f"{module}.weight_global_scale"] = divisor
    folder.tensors[f"{module}.weight_packed"] = folder.tensors.pop(f"{module}.weight")


def quantizer_state(folder: Folder) -> None:
    for name in folder.matching(r"o_proj\.weight_scale_2$"):
        module = name.removesuffix(".weight_scale_2")
        folder.tensors[f"{module}.weight_quantizer._amax"] = np.array(1.5, np.float32)


def misspelled_scale(folder: Folder) -> None:
    for name in folder.matching(r"layers\.0\.mlp\.down_proj\.weight_packed$"):
        folder.tensors[name.replace("weight_packed", "weight_lora_scale")] = np.zeros(
            4, ml_dtypes.bfloat16
        )


DEFECTS = [
    Defect(
        "ignore-matches-nothing",
        "NB401",
        "llmcompressor-moe",
        "an entry of ignore names a layer that is not there",
        exclude(f"{HUB}layers.9.mlp.shared_expert_gate"),
        repaired=True,
    ),
    Defect(
        "ignore-matches-more",
        "NB402",
        "modelopt-dense",
        "mlp.gate, excluded as in a model with experts, is part of mlp.gate_proj",
        exclude("model.layers.0.mlp.gate"),
        source="source-dense",
        repaired=True,
        also=("NB401",),
    ),
    Defect(
        "prefix-order",
        "NB403",
        "nybble-modelopt",
        "tensors begin with language_model.model.",
        lambda folder: folder.rename(r"^model\.language_model\.", ENGINE),
        origin=FREETOKEN,
        repaired=True,
        also=("NB109", "NB110", "NB119", "NB304", "NB309", "NB405"),
    ),
    Defect(
        "prefix-twice",
        "NB403",
        "nybble-modelopt",
        "tensors begin with model.language_model.language_model.",
        lambda folder: folder.rename(
            r"^model\.language_model\.", "model.language_model.language_model."
        ),
        origin="thread: https://github.com/NVIDIA/Model-Optimizer/pull/2032",
        repaired=True,
        also=("NB109", "NB110", "NB119", "NB304", "NB309", "NB405"),
    ),
    Defect(
        "mixed-prefixes",
        "NB404",
        "nybble-modelopt",
        "the tensors of one layer begin otherwise",
        lambda folder: folder.rename(
            r"^model\.language_model\.layers\.1\.", "language_model.model.layers.1."
        ),
        repaired=True,
        also=("NB109", "NB110", "NB119", "NB304", "NB309", "NB403", "NB405"),
    ),
    Defect(
        "config-names-differ",
        "NB405",
        "nybble-modelopt",
        "the lists have an engine's names, the tensors the hub's",
        in_memory_names,
        origin="thread: https://github.com/NVIDIA/Model-Optimizer/pull/2032",
        repaired=True,
        also=("NB304", "NB309"),
    ),
    Defect(
        "fused-on-disk",
        "NB406",
        "modelopt-dense",
        "q, k and v of a layer are one packed tensor",
        fused_qkv,
        also=("NB110",),
    ),
    Defect(
        "pattern-anchored-at-the-hub",
        "NB407",
        "nybble-ct",
        "patterns of ignore begin with ^model.language_model",
        lambda folder: flat(folder, anchored),
        repaired=True,
    ),
    Defect(
        "pattern-does-not-compile",
        "NB407",
        "nybble-ct",
        "re:*visual* is no regular expression",
        exclude("re:*visual*"),
        also=("NB014",),
        repaired=True,
    ),
    Defect(
        "pattern-in-a-list-of-globs",
        "NB407",
        "modelopt-moe",
        "ModelOpt's exclusions hold a re: pattern instead of mtp*",
        lambda folder: (include("mtp")(folder), exclude("re:.*mtp.*")(folder), None)[-1],
        origin="thread: https://github.com/vllm-project/vllm/issues/48508",
        repaired=True,
        also=("NB106", "NB310"),
        severity="warning",
    ),
    Defect(
        "scale-spelled-inverse",
        "NB408",
        "llmcompressor-dense",
        "a weight_scale is called weight_scale_inv",
        inverse_name,
        also=("NB118",),
    ),
    Defect(
        "mixed-layouts",
        "NB409",
        "nybble-modelopt",
        "one module is stored as compressed-tensors does",
        one_in_the_other_layout,
    ),
    Defect(
        "quantizer-state",
        "NB410",
        "modelopt-dense",
        "the quantizers' _amax were saved along",
        quantizer_state,
    ),
    Defect(
        "unknown-leaf",
        "NB410",
        "llmcompressor-dense",
        "a packed module has a tensor that no format knows",
        misspelled_scale,
    ),
    Defect(
        "fused-name-ignored",
        "NB411",
        "llmcompressor-moe",
        "ignore names in_proj_qkvz, the file has in_proj_qkv and in_proj_z in BF16",
        lambda folder: (
            include("in_proj_qkv", "in_proj_z")(folder),
            exclude(f"{HUB}layers.0.linear_attn.in_proj_qkvz")(folder),
            None,
        )[-1],
        origin=f"{SGLANG}36596",
        also=("NB310",),
        repaired=True,
    ),
    Defect(
        "container-without-star",
        "NB412",
        "modelopt-moe",
        "model.visual is excluded, not model.visual*",
        lambda folder: (include("visual")(folder), exclude("model.visual")(folder), None)[-1],
        origin=f"{SGLANG}24927",
        repaired=True,
    ),
]
