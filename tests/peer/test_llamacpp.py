"""llama.cpp's converter on nybble's output: every tensor of the GGUF is the one we decode to.

The converter keeps NVFP4 codes and block scales and puts the tensor scale beside them. It also
renames, adds 1 to the norms of hybrids and reorders rows for its own kernels; the same is done here
to our weights, so that everything compares exactly, the MTP head included.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from peer_harness import Made, Make, Peer, need
from safetensors.numpy import load_file

pytestmark = pytest.mark.peer

CASES = [
    ("hybrid-chat-mtp", "nvfp4"),
    ("hybrid-chat-mtp", "nvfp4-all"),
    ("stories-hybrid-moe", "nvfp4-all"),
    ("qwen3_5", "nvfp4-all"),
    ("qwen3_moe", "nvfp4-all"),
    ("qwen2", "nvfp4"),
    ("llama", "nvfp4-all"),
]
# numpy and torch may round exp differently in the last place.
EXP_RTOL = 2.0**-22

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.conv1d": "ssm_conv1d",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mtp.fc": "nextn.eh_proj",
    "mtp.norm": "nextn.shared_head_norm",
    "mtp.pre_fc_norm_embedding": "nextn.enorm",
    "mtp.pre_fc_norm_hidden": "nextn.hnorm",
}

Floats = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def environment() -> str:
    """Skip before anything is made."""
    return need("llamacpp")


class Expected:
    """The GGUF tensors of a model, from what the checkpoint decodes to."""

    def __init__(self, made: Made) -> None:
        config: dict[str, Any] = dict(made.plan.checkpoint.config)
        self.config: dict[str, Any] = config.get("text_config", config)
        self.is_hybrid = "linear_num_key_heads" in self.config
        self.is_llama = self.config["model_type"] == "llama"
        self.tensors: dict[str, Floats] = {}
        stacks: dict[str, dict[int, Floats]] = {}
        for name, value in made.dense.items():
            if ".visual." in name:  # goes into a file of its own, the mmproj
                continue
            for part, number, matrix in experts(name, value.astype(np.float32)):
                if number < 0:
                    self.tensors[self.name(part)] = self.value(part, matrix)
                else:
                    stacks.setdefault(part, {})[number] = matrix
        for part, members in stacks.items():
            self.tensors[self.name(part)] = np.stack([members[e] for e in sorted(members)])

    def name(self, name: str) -> str:
        """The GGUF's name of a checkpoint's tensor, experts by their stack."""
        name = name.replace("language_model.", "")
        last = self.config["num_hidden_layers"]
        name = re.sub(r"^mtp\.layers\.(\d+)", lambda m: f"model.layers.{last + int(m[1])}", name)
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        block = f"blk.{layer[1]}." if layer else f"blk.{last}." if name.startswith("mtp.") else ""
        name = name[layer.end() :] if layer else name
        if name.startswith("linear_attn.A_log"):
            return f"{block}ssm_a"
        if name.startswith("linear_attn.dt_bias"):
            return f"{block}ssm_dt.bias"
        module, _, leaf = name.rpartition(".")
        if module == "post_attention_layernorm":
            return f"{block}{'post_attention_norm' if self.is_hybrid else 'ffn_norm'}.{leaf}"
        return f"{block}{NAMES[module]}.{leaf}"

    def value(self, name: str, value: Floats) -> Floats:
        """The GGUF's values: its norms multiply by what they hold, its heads stand otherwise."""
        if name.endswith("A_log"):
            value = -np.exp(value)
        if self.is_hybrid and name.endswith("norm.weight") and ".linear_attn." not in name:
            value = value + 1
        if self.is_hybrid and re.search(r"pre_fc_norm_\w+\.weight$", name):
            value = value + 1
        if self.is_llama and (heads := re.search(r"self_attn\.([qk])_proj", name)):
            key = "num_attention_heads" if heads[1] == "q" else "num_key_value_heads"
            halves = value.reshape(self.config[key], 2, -1, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        return self.tiled(name, value) if ".linear_attn." in name else value

    def tiled(self, name: str, value: Floats) -> Floats:
        """Value heads from grouped by key head to tiled, along the dimension that holds them."""
        leaf = name.split(".linear_attn.")[1].removesuffix(".weight")
        keys, values = self.config["linear_num_key_heads"], self.config["linear_num_value_heads"]
        if leaf in ("in_proj_qkv", "conv1d"):
            first = 2 * keys * self.config["linear_key_head_dim"]
            rest = reorder(value[first:], keys, values)
            return np.concatenate([value[:first], rest]).reshape(value.shape)
        if leaf in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
            return reorder(value, keys, values)
        if leaf == "out_proj":
            return reorder(value.T, keys, values).T
        assert leaf == "norm"
        return value


def reorder(value: Floats, keys: int, values: int) -> Floats:
    """Rows of [keys, values / keys, D] heads as [values / keys, keys, D]."""
    heads = value.reshape(keys, values // keys, -1, *value.shape[1:])
    return heads.swapaxes(0, 1).reshape(value.shape)


def experts(name: str, value: Floats) -> list[tuple[str, int, Floats]]:
    """(tensor name, expert or -1, matrix) of a tensor; experts' names are those of their stack."""
    container, found, below = name.partition(".experts.")
    base = f"{container}.experts"
    if not found:
        return [(name, -1, value)]
    if split := re.fullmatch(r"(\d+)\.(\w+)\.weight", below):
        return [(f"{base}.{split[2]}.weight", int(split[1]), value)]
    if below == "down_proj":
        return [(f"{base}.down_proj.weight", e, matrix) for e, matrix in enumerate(value)]
    parts = ("gate_proj", "up_proj")
    return [
        (f"{base}.{part}.weight", e, half)
        for e, matrix in enumerate(value)
        for part, half in zip(parts, np.split(matrix, 2), strict=True)
    ]


def convert(peer: Peer, made: Made, folder: Path) -> tuple[dict[str, Any], dict[str, Floats]]:
    """The runner's row, and every tensor of the GGUF with its `.scale` multiplied in."""
    dump = folder / "dump.safetensors"
    [row] = peer("llamacpp", "llamacpp_convert", made.path, folder / "x.gguf", "--dump", dump)
    assert row["ok"], row
    stored = load_file(dump)
    scales = {n: v for n, v in stored.items() if n.endswith(".scale")}
    for name, scale in scales.items():
        weight = stored[name.removesuffix("scale") + "weight"]
        stored[name.removesuffix("scale") + "weight"] = weight * scale.reshape(-1, 1, 1)
    return row, {n: v for n, v in stored.items() if n not in scales}


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_every_tensor_of_the_gguf_is_ours(
    peer: Peer, make: Make, tmp_path: Path, name: str, recipe: str
) -> None:
    made = make(name, recipe, "modelopt")
    row, theirs = convert(peer, made, tmp_path)
    expected = Expected(made)
    assert theirs.keys() == expected.tensors.keys()
    wrong = [
        n
        for n, ours in expected.tensors.items()
        if not np.allclose(
            theirs[n].ravel(), ours.ravel(), rtol=EXP_RTOL if n.endswith("ssm_a") else 0, atol=0
        )
    ]
    assert wrong == []
    # A stack of experts is one tensor, and every quantized one has its tensor scale beside it.
    no_values = np.empty(0, np.float32)
    quantized = {expected.name(experts(f"{m}.weight", no_values)[0][0]) for m in made.weights}
    assert row["types"]["NVFP4"] == row["scales"] == len(quantized)
    assert set(row["types"]) == {"NVFP4", "F32", "BF16"}


@pytest.mark.parametrize("name", ["hybrid-chat-mtp", "llama"])
def test_both_layouts_convert_to_the_same_bytes(
    peer: Peer, make: Make, tmp_path: Path, name: str
) -> None:
    digests = []
    for layout in ("modelopt", "compressed-tensors"):
        made = make(name, "nvfp4-all", layout)
        [row] = peer("llamacpp", "llamacpp_convert", made.path, tmp_path / f"{layout}.gguf")
        assert row["ok"], row
        digests.append(row["data_sha256"])
    assert digests[0] == digests[1]


def test_several_config_groups_are_refused(peer: Peer, make: Make, tmp_path: Path) -> None:
    """A limit of llama.cpp: of compressed-tensors it takes NVFP4 alone or one other group."""
    made = make("qwen3", "mixed", "compressed-tensors")
    [row] = peer("llamacpp", "llamacpp_convert", made.path, tmp_path / "x.gguf")
    assert not row["ok"]
    assert "multiple config groups" in row["error"]
