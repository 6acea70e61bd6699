"""What real tools made that rules of several subjects find: no defect here is planted."""

from __future__ import annotations

from folder import Defect

MODELOPT = "tool: NVIDIA ModelOpt 0.47.0, NVFP4_DEFAULT_CFG"
COMPRESSOR = "tool: llm-compressor 0.14.0.1"

DEFECTS = [
    Defect(
        "input-scales-never-measured",
        "NB315",
        "../tool-made/modelopt-uncalibrated",
        "W4A4 is declared, and no module has an input_scale",
        origin=f"{MODELOPT}, mtq.quantize without a forward loop",
        clean="modelopt-moe",
        repaired=True,
    ),
    Defect(
        "experts-scaled-apart",
        "NB210",
        "../tool-made/llmcompressor-model-free",
        "Gate and up of one expert have different tensor scales",
        origin=f"{COMPRESSOR}, model_free_ptq NVFP4A16 of stacked experts",
        repaired=True,
        clean="llmcompressor-moe",
    ),
    Defect(
        "delta-gates-scaled-apart",
        "NB210",
        "../tool-made/llmcompressor-ignores-head-only",
        "in_proj_a and in_proj_b of one layer have different tensor scales",
        origin=f'{COMPRESSOR}, oneshot NVFP4A16, ignore=["lm_head"]',
        also=("NB108", "NB115"),
        clean="llmcompressor-moe",
    ),
]
