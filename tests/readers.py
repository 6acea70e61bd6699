"""What readers make of a configuration: their documented rules, written again without nybble.

Source: docs/layouts.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nybble.plan.plan import Plan


def linear_modules(found: Plan) -> dict[str, str]:
    """Every module that an engine could build as a linear -> its scheme by the plan."""
    modules: dict[str, str] = {}
    for copy in found.copies:
        name, tensor = copy.tensor.name, copy.tensor
        if ".mlp.experts." in name and len(tensor.shape) == 3:
            for e in range(tensor.shape[0]):
                parts = (
                    ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
                )
                for part in parts:
                    modules[f"{name.rpartition('.')[0]}.{e}.{part}"] = "bf16"
        elif name.endswith(".weight") and len(tensor.shape) == 2:
            modules[name.removesuffix(".weight")] = "bf16"
    for job in found.jobs:
        modules.update(dict.fromkeys((m.module for m in job.members), job.scheme.name))
    return modules


# ModelOpt: scheme -> quant_algo
ALGORITHM = {"nvfp4-w4a4": "NVFP4", "nvfp4-w4a16": "W4A16_NVFP4", "fp8-static": "FP8"}


def vllm_mixed(flat: Mapping[str, Any], module: str) -> str | None:
    """vLLM's look-up of one module in a MIXED_PRECISION map, by checkpoint names: algorithm or
    None."""
    layers: dict[str, dict[str, str]] = flat["quantized_layers"]
    for entry in flat["ignore"]:
        # exact, a plain substring, or a glob of which `x*` is also `x` and `x.*`
        if entry.removesuffix("*") in module:
            return None
    if module in layers:
        return layers[module]["quant_algo"]
    below = {e["quant_algo"] for name, e in layers.items() if name.startswith(module + ".")}
    if not below and module.endswith(".experts"):
        parent = module.rpartition(".")[0] + "."
        below = {e["quant_algo"] for name, e in layers.items() if name.startswith(parent)}
    assert len(below) <= 1, f"{module}: {below}"
    return below.pop() if below else None


# compressed-tensors: scheme -> format, weights, input_activations
FLOAT = {"type": "float", "symmetric": True}
FP4 = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, **FLOAT}
E4M3 = {"scale_dtype": "torch.float8_e4m3fn"}
PRESETS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "nvfp4-w4a4": (
        "nvfp4-pack-quantized",
        FP4 | E4M3 | {"dynamic": False},
        FP4 | E4M3 | {"dynamic": "local"},
    ),
    "nvfp4-w4a16": ("nvfp4-pack-quantized", FP4 | E4M3 | {"dynamic": False}, None),
    "mxfp4-w4a16": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": False}
        | {"scale_dtype": "torch.uint8", **FLOAT},
        None,
    ),
    "fp8-static": (
        "float-quantized",
        {"num_bits": 8, "strategy": "tensor", "dynamic": False, **FLOAT},
        {"num_bits": 8, "strategy": "tensor", "dynamic": False, **FLOAT},
    ),
    "fp8-dynamic": (
        "float-quantized",
        {"num_bits": 8, "strategy": "channel", "dynamic": False, **FLOAT},
        {"num_bits": 8, "strategy": "token", "dynamic": True, **FLOAT},
    ),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "strategy": "block", "block_structure": [128, 128], "dynamic": False}
        | FLOAT,
        {"num_bits": 8, "strategy": "group", "group_size": 128, "dynamic": True, **FLOAT},
    ),
}


def scheme_of_group(group: Mapping[str, Any]) -> str:
    """The row of the table of presets that a group is."""
    given = (group["format"], group["weights"], group["input_activations"])
    (name,) = [name for name, preset in PRESETS.items() if preset == given]
    return name


def names_in_vllm(module: str) -> str:
    """The path of a checkpoint's module inside vLLM (vision-language classes)."""
    for ours, theirs in (
        ("model.visual.", "visual."),
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
    ):
        if module.startswith(ours):
            return theirs + module.removeprefix(ours)
    return module


def ct_match(section: Mapping[str, Any], module: str, *, inside_vllm: bool) -> str:
    """The scheme that readers give a module: ignore wins, then the first group that matches."""
    path = names_in_vllm(module) if inside_vllm else module

    def hits(entries: list[str]) -> bool:
        for entry in entries:
            if entry.startswith("re:"):
                if re.match(entry[3:], path):
                    return True
            elif (names_in_vllm(entry) if inside_vllm else entry) == path:
                return True
        return False

    if hits(section["ignore"]):
        return "bf16"
    found = [g for g in section["config_groups"].values() if hits(g["targets"])]
    # No module is in two groups: the order of the groups carries nothing.
    assert len(found) <= 1, module
    return scheme_of_group(found[0]) if found else "bf16"
