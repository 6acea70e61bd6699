"""vLLM on a CPU, on nybble's output: its configuration parsing, scheme choice and weight loaders.

Only NVFP4 arithmetic, which vLLM lacks on CPUs, is supplied (peers/vllm_cpu_nvfp4.py). Each layer
must get the method we declare, no parameter may stay unfilled, and the mean negative log-likelihood
of over 500 tokens must be that of the same weights unquantized: one wrong scale moves it far more.
"""

from __future__ import annotations

import collections
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peer_harness import Made, Make, Peer, need

pytestmark = pytest.mark.peer

Row = dict[str, Any]

# Same engine, same weights, BF16: dense models agree to the last digit printed. Experts are summed
# in another order by vLLM's own BF16 kernel, and a router tie may fall otherwise (0.03 % seen).
SAME_DENSE = 1e-5
SAME_EXPERTS = 1e-3
# What rounding weights (and the FP8 cache) costs this trained model on this text: 0.2 % and 0.4 %.
QUANTIZED = 0.01
# FP8 weights and activations on SmolLM2, whose weights came from Q4_1: 1.2 % seen.
QUANTIZED_FP8 = 0.02
MIN_TOKENS = 500

METHODS = {
    ("modelopt", "nvfp4-w4a16"): ("ModelOptLinearMethod/W4A16", "ModelOptNvFp4FusedMoE/W4A16"),
    ("compressed-tensors", "nvfp4-w4a16"): (
        "CompressedTensorsLinearMethod/CompressedTensorsW4A4Fp4/W4A16",
        "CompressedTensorsW4A4Nvfp4MoEMethod/W4A16",
    ),
    ("compressed-tensors", "fp8-dynamic"): (
        "CompressedTensorsLinearMethod/CompressedTensorsW8A8Fp8",
        "",
    ),
}
QUANTIZATION = {"modelopt": "modelopt_mixed", "compressed-tensors": "compressed-tensors"}
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
}


@pytest.fixture(scope="module", autouse=True)
def environment() -> str:
    """Skip before anything is made."""
    return need("vllm")


@pytest.fixture(scope="module")
def score(peer: Peer, ids: Callable[[str], Path]) -> Callable[[str, Path], Row]:
    """Load a folder and score the story in the vocabulary of the model named."""

    def run(name: str, folder: Path) -> Row:
        [row] = peer("vllm", "vllm_load", folder, "--ids", ids(name), "--weight-only")
        assert not row["ok"] or row["nll_tokens"] >= MIN_TOKENS
        return row

    return run


@pytest.fixture(scope="module")
def original(
    score: Callable[[str, Path], Row], model: Callable[[str], Path]
) -> Callable[[str], float]:
    """The score of a model as it was before quantizing."""

    @cache
    def get(name: str) -> float:
        return float(score(name, model(name))["nll"])

    return get


@pytest.fixture(scope="module")
def unquantized(
    score: Callable[[str, Path], Row], make: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], float]:
    """The score of the unquantized folder that holds what a recipe's weights decode to."""

    @cache
    def get(name: str, recipe: str) -> float:
        folder = tmp_path_factory.mktemp("dense") / name
        return float(score(name, make(name, recipe, "modelopt").write_dense(folder))["nll"])

    return get


def declared(made: Made) -> dict[str, dict[str, int]]:
    """Quantized vLLM layers by method, with numbers as N, that follow from the plan."""
    wrapped = "vision_config" in made.plan.checkpoint.config
    layers: dict[str, str] = {}
    for job in made.plan.jobs:
        linear, experts = METHODS[made.plan.layout.name, job.scheme.name]
        for member in job.members:
            path, is_expert, _ = member.module.partition(".experts.")
            base, _, leaf = path.rpartition(".")
            name = f"{base}.{FUSED.get(leaf, leaf)}".lstrip(".")
            if is_expert:
                name = f"{path}.experts.routed_experts"
            name = name.replace("model.language_model.", "language_model.model.")
            name = f"language_model.{name}" if wrapped and name == "lm_head" else name
            layers[name] = experts if is_expert else linear
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, method in layers.items():
        table[method][re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)] += 1
    return {method: dict(patterns) for method, patterns in table.items()}


def check_methods(row: Row, made: Made) -> None:
    """Every layer has the method that the plan says, and every other layer none."""
    assert row["ok"], row
    assert row["quantization"] == QUANTIZATION[made.plan.layout.name]
    chosen = row["methods"]
    quantized = {m for m in chosen if not m.startswith("Unquantized") and "KVCache" not in m}
    assert {m: chosen[m] for m in quantized} == declared(made)


@pytest.mark.parametrize(
    ("name", "layout", "tolerance"),
    [
        ("hybrid-chat-mtp", "modelopt", SAME_EXPERTS),
        ("hybrid-chat-mtp", "compressed-tensors", SAME_EXPERTS),
        ("qwen3_moe", "modelopt", SAME_EXPERTS),
        ("qwen3_5", "modelopt", SAME_DENSE),
        ("llama", "compressed-tensors", SAME_DENSE),
    ],
)
def test_nvfp4_everywhere_scores_as_the_weights_it_decodes_to(
    score: Callable[[str, Path], Row],
    unquantized: Callable[[str, str], float],
    make: Make,
    name: str,
    layout: str,
    tolerance: float,
) -> None:
    made = make(name, "nvfp4-all", layout)
    row = score(name, made.path)
    check_methods(row, made)
    assert row["nll"] == pytest.approx(unquantized(name, "nvfp4-all"), rel=tolerance)


def test_the_published_mix_loads_and_costs_less_than_a_percent(
    score: Callable[[str, Path], Row], original: Callable[[str], float], make: Make
) -> None:
    made = make("hybrid-chat-mtp", "nvfp4", "modelopt")
    row = score("hybrid-chat-mtp", made.path)
    check_methods(row, made)
    # Declared FP8 without scale tensors: the cache is cast, its scale is 1.
    assert row["methods"]["ModelOptKVCacheMethod"] == {
        "language_model.model.layers.N.self_attn.attn": 2
    }
    assert "Using KV cache scaling factor 1.0 for fp8_e4m3" in row["stderr"]
    assert row["nll"] == pytest.approx(original("hybrid-chat-mtp"), rel=QUANTIZED)


def test_every_linear_in_nvfp4_costs_less_than_a_percent(
    unquantized: Callable[[str, str], float], original: Callable[[str], float]
) -> None:
    after = unquantized("hybrid-chat-mtp", "nvfp4-all")
    assert after == pytest.approx(original("hybrid-chat-mtp"), rel=QUANTIZED)


def test_a_mixed_checkpoint_gets_both_schemes(
    score: Callable[[str, Path], Row], original: Callable[[str], float], make: Make
) -> None:
    made = make("hybrid-chat-mtp", "mixed", "compressed-tensors")
    row = score("hybrid-chat-mtp", made.path)
    check_methods(row, made)
    assert row["nll"] == pytest.approx(original("hybrid-chat-mtp"), rel=QUANTIZED)


def test_dynamic_fp8_runs_stock_on_a_dense_model(
    score: Callable[[str, Path], Row], original: Callable[[str], float], make: Make
) -> None:
    made = make("smollm2", "fp8", "compressed-tensors")
    row = score("smollm2", made.path)
    check_methods(row, made)
    assert row["nll"] == pytest.approx(original("smollm2"), rel=QUANTIZED_FP8)


@pytest.mark.parametrize(
    ("name", "recipe", "reason"),
    [
        ("hybrid-chat-mtp", "fp8", "Unsupported FP8 MoE backend"),
        ("qwen3", "mxfp4", "Failed to find a kernel that can implement the MXFP4 linear layer"),
    ],
)
def test_what_vllm_cannot_compute_on_a_cpu_it_refuses(
    score: Callable[[str, Path], Row], make: Make, name: str, recipe: str, reason: str
) -> None:
    """Limits of vLLM on CPUs, met only after it has read the configuration."""
    row = score(name, make(name, recipe, "compressed-tensors").path)
    assert not row["ok"]
    assert reason in row["error"]


def test_mixed_precision_needs_the_section_in_config_json(
    score: Callable[[str, Path], Row], make: Make, tmp_path: Path
) -> None:
    """A limit of vLLM 0.32: its reader of hf_quant_config.json alone knows no MIXED_PRECISION."""
    folder = tmp_path / "nested-only"
    shutil.copytree(make("hybrid-chat-mtp", "nvfp4", "modelopt").path, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    nested = json.loads((folder / "hf_quant_config.json").read_text("utf-8"))
    nested["producer"]["name"] = "modelopt"  # with another, vLLM takes it for unquantized
    (folder / "hf_quant_config.json").write_text(json.dumps(nested), "utf-8")
    row = score("hybrid-chat-mtp", folder)
    assert not row["ok"]
    assert "Unknown ModelOpt quant algo: MIXED_PRECISION" in row["error"]
