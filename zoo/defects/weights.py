"""Weights and settings that are not those of the source, behind sound scales."""

from __future__ import annotations

import numpy as np

from folder import Defect, Folder

EXPERT = "model.language_model.layers.1.mlp.experts"


def _swap_nibbles(folder: Folder) -> None:
    for name in folder.matching(r"experts\.\d+\.\w+\.weight$"):
        codes = folder.tensors[name]
        if codes.dtype == np.uint8:
            folder.tensors[name] = (codes << 4) | (codes >> 4)


def _exchange_experts(folder: Folder) -> None:
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for leaf in ("weight", "weight_scale", "weight_scale_2"):
            a, b = (f"{EXPERT}.{e}.{projection}.{leaf}" for e in (0, 1))
            folder.tensors[a], folder.tensors[b] = folder.tensors[b], folder.tensors[a]


def _scale(pattern: str, factor: float):  # type: ignore[no-untyped-def]
    def plant(folder: Folder) -> None:
        for name in folder.matching(pattern):
            folder.tensors[name] = folder.tensors[name] * np.float32(factor)

    return plant


def _rotary_base(folder: Folder) -> None:
    config = folder.document("config.json")
    config["text_config"]["rope_parameters"]["rope_theta"] = 100.0
    config["text_config"]["rms_norm_eps"] = 1e-2
    folder.put("config.json", config)


DEFECTS = [
    Defect(
        "config-rotary-base-edited",
        "NB121",
        "nybble-modelopt",
        "rope_theta and rms_norm_eps are not the source's.",
        _rotary_base,
        source="source",
        repaired=True,
    ),
    Defect(
        "tensor-scale-of-one-partner",
        "NB118",
        "nybble-modelopt",
        "One member of a fused pair has lost its tensor scale.",
        lambda folder: folder.drop(rf"{EXPERT}\.0\.up_proj\.weight_scale_2$"),
        source="source",
        also=("NB213", "NB101", "NB608", "NB602"),
        repaired=True,
    ),
    Defect(
        "weights-nibbles-exchanged",
        "NB120",
        "nybble-modelopt",
        "The two codes of every byte of the experts are in the other order.",
        _swap_nibbles,
        source="source",
    ),
    Defect(
        "weights-experts-exchanged",
        "NB120",
        "nybble-modelopt",
        "Experts 0 and 1 of a layer have each other's weights.",
        _exchange_experts,
        source="source",
    ),
    Defect(
        "weights-up-scale-tripled",
        "NB120",
        "nybble-modelopt",
        "One member of each fused pair has three times its tensor scale.",
        _scale(rf"{EXPERT}\.\d+\.up_proj\.weight_scale_2$", 3.0),
        source="source",
        also=("NB210",),
        repaired=True,
    ),
    Defect(
        "weights-down-scale-quadrupled",
        "NB120",
        "nybble-ct",
        "The divisors of a layer's down projections are four times too small.",
        _scale(rf"{EXPERT}\.\d+\.down_proj\.weight_global_scale$", 0.25),
        source="source",
        repaired=True,
    ),
    Defect(
        "weights-without-tensor-scale",
        "NB120",
        "nybble-modelopt",
        "Tensor scales of 1, as a converter leaves them that knows one level of scales.",
        _scale(rf"{EXPERT}\.\d+\.down_proj\.weight_scale_2$", 512.0),
        origin="thread: https://github.com/ollama/ollama/issues/15880",
        source="source",
        also=("NB212",),
        repaired=True,
    ),
]
