"""Where a tensor of a Hugging Face checkpoint goes in a GGUF file, and what happens to it there.

llama.cpp's graphs want some weights otherwise than Hugging Face's: norms of the hybrids with their
1 added, `A_log` as -exp, rows of llama's q and k interleaved for its RoPE, value heads of gated
DeltaNet tiled instead of grouped by key head. All of that is moving rows, columns of blocks, or
one exact function of a float32 vector, and is stated here once, for both directions.

Source: llama.cpp, conversion/{base,qwen,llama}.py and gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.errors import ModelError
from nybble.families.dimensions import Dimensions

Indices = NDArray[np.intp]

#: How rows (or columns) move; `order` makes the indices.
ROPE_QUERY, ROPE_KEY = "rope_query", "rope_key"
VALUE_TAIL, VALUE_ROWS, VALUE_HEADS = "value_tail", "value_rows", "value_heads"
VALUE_COLUMNS = "value_columns"
#: What happens to the numbers.
ADD_ONE, NEGATIVE_EXP = "add_one", "negative_exp"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp calls a model, and its class in transformers.

    `post_norm` is the part that post_attention_layernorm becomes. `permutes`: q and k are stored
    for a RoPE of neighbours. `is_hybrid`: gated DeltaNet layers, norms that add 1, an MTP head.
    """

    name: str
    model_type: str
    transformers: str
    post_norm: str = "ffn_norm"
    permutes: bool = False
    is_hybrid: bool = False
    has_experts: bool = False


ARCHITECTURES = (
    Architecture("llama", "llama", "LlamaForCausalLM", permutes=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
    Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", has_experts=True),
    Architecture("qwen35", "qwen3_5", "Qwen3_5ForCausalLM", "post_attention_norm", is_hybrid=True),
    Architecture(
        "qwen35moe",
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        "post_attention_norm",
        is_hybrid=True,
        has_experts=True,
    ),
)


def of_model_type(model_type: str) -> Architecture:
    """The architecture of a family; ModelError for one that has no GGUF form here."""
    for architecture in ARCHITECTURES:
        if architecture.model_type == model_type:
            return architecture
    known = ", ".join(a.model_type for a in ARCHITECTURES)
    raise ModelError(
        f"model_type {model_type!r} cannot be written as GGUF, expected one of {known}; "
        "use llama.cpp's convert_hf_to_gguf.py for others"
    )


def of_name(name: object) -> Architecture:
    """The architecture that a GGUF file names in general.architecture."""
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(a.name for a in ARCHITECTURES)
    raise ModelError(f"general.architecture is {name!r}; nybble reads {known}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: the GGUF name, the expert it is in the stack (None: no stack), how rows
    move, and what is done to the numbers ("": nothing)."""

    name: str
    expert: int | None = None
    order: str = ""
    change: str = ""


_ENDS = {"embed_tokens": "token_embd", "norm": "output_norm"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
}
_MLP = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_SHARED = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_DELTA = {
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.conv1d": "ssm_conv1d",
}
#: Parameters that are no module's weight: whole names on both sides.
_BARE = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}
_NEXTN = {
    "fc": "nextn.eh_proj",
    "pre_fc_norm_embedding": "nextn.enorm",
    "pre_fc_norm_hidden": "nextn.hnorm",
    "norm": "nextn.shared_head_norm",
}
_ORDERS = {
    "linear_attn.in_proj_qkv": VALUE_TAIL,
    "linear_attn.conv1d": VALUE_TAIL,
    "linear_attn.in_proj_z": VALUE_ROWS,
    "linear_attn.in_proj_a": VALUE_HEADS,
    "linear_attn.in_proj_b": VALUE_HEADS,
    "linear_attn.A_log": VALUE_HEADS,
    "linear_attn.dt_bias": VALUE_HEADS,
    "linear_attn.out_proj": VALUE_COLUMNS,
}
#: Tensors that llama.cpp computes with in float32, whatever the rest is.
FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d")

_layer = re.compile(r"(model|mtp)\.layers\.(\d+)\.(.+)").fullmatch
_expert = re.compile(r"mlp\.experts\.(\d+)\.(\w+)").fullmatch


def layer_parts(arch: Architecture) -> dict[str, str]:
    """Module path inside a layer -> part of the GGUF name; experts stand as their stack."""
    parts = _ATTENTION | {"post_attention_layernorm": arch.post_norm}
    parts |= _EXPERTS if arch.has_experts else {}
    parts |= _SHARED if arch.has_experts and arch.is_hybrid else {}
    # Some layers of a model with experts may be dense.
    parts |= _MLP if not (arch.has_experts and arch.is_hybrid) else {}
    return parts | (_DELTA if arch.is_hybrid else {})


def plain_name(name: str) -> str:
    """The name without what vision-language releases put around the language model."""
    name = name.replace("language_model.", "")
    return name.removeprefix("model.") if name.startswith("model.mtp.") else name


def is_vision(name: str) -> bool:
    """Part of a vision tower, which has a GGUF file of its own (the mmproj)."""
    return "visual." in name


def place(arch: Architecture, name: str, layers: int) -> Place | None:
    """Where the tensor `name` of a model of `layers` layers goes; None if nowhere.

    Stacked experts are looked up by the names of their projections: the caller divides
    `gate_up_proj`.
    """
    name = plain_name(name)
    if name == "lm_head.weight":
        return Place("output.weight")
    found = _layer(name)
    if found is None:
        return _outside(arch, name, layers)
    if found[1] == "mtp" and not arch.is_hybrid:
        return None
    block = int(found[2]) + (layers if found[1] == "mtp" else 0)
    return _inside(arch, f"blk.{block}.", found[3])


def _outside(arch: Architecture, name: str, layers: int) -> Place | None:
    module, _, leaf = name.rpartition(".")
    change = ADD_ONE if arch.is_hybrid and module.endswith("norm") else ""
    if module.startswith("model.") and module[6:] in _ENDS and leaf == "weight":
        return Place(f"{_ENDS[module[6:]]}.weight", change=change)
    if arch.is_hybrid and module.startswith("mtp.") and module[4:] in _NEXTN and leaf == "weight":
        is_norm = "norm" in module
        return Place(f"blk.{layers}.{_NEXTN[module[4:]]}.weight", change=ADD_ONE if is_norm else "")
    return None


def _inside(arch: Architecture, block: str, path: str) -> Place | None:
    if arch.is_hybrid and path in _BARE:
        change = NEGATIVE_EXP if path.endswith("A_log") else ""
        return Place(block + _BARE[path], order=_ORDERS[path], change=change)
    module, _, leaf = path.rpartition(".")
    expert = _expert(module)
    if expert is not None:
        module = f"mlp.experts.{expert[2]}"
    part = layer_parts(arch).get(module)
    if part is None or leaf not in ("weight", "bias"):
        return None
    order = _ORDERS.get(module, "") if arch.is_hybrid else ""
    if arch.permutes and part in ("attn_q", "attn_k"):
        order = ROPE_QUERY if part == "attn_q" else ROPE_KEY
    adds = arch.is_hybrid and module.endswith("norm") and not module.startswith("linear_attn.")
    return Place(
        f"{block}{part}.{leaf}",
        int(expert[1]) if expert else None,
        order,
        ADD_ONE if adds else "",
    )


def order(kind: str, dims: Dimensions) -> Indices | None:
    """Indices that make GGUF's order of Hugging Face's: gguf = hf[order]; None where nothing moves.

    For VALUE_COLUMNS they are of columns, for all others of rows.
    """
    if kind in (ROPE_QUERY, ROPE_KEY):
        heads = dims.heads if kind == ROPE_QUERY else dims.kv_heads
        rows = np.arange(heads * dims.head_dim).reshape(heads, 2, -1)
        return rows.swapaxes(1, 2).reshape(-1)
    keys, values = dims.linear_key_heads, dims.linear_value_heads
    if not kind or keys == values:
        return None
    size = 1 if kind == VALUE_HEADS else dims.linear_value_dim
    heads_of = np.arange(values * size).reshape(keys, values // keys, size)
    moved = heads_of.swapaxes(0, 1).reshape(-1)
    if kind != VALUE_TAIL:
        return moved
    first = 2 * keys * dims.linear_key_dim
    return np.concatenate([np.arange(first), first + moved])


def order_length(kind: str, dims: Dimensions) -> int | None:
    """How many rows or columns `order` puts in place; None where nothing moves.

    Before it is called: sizes of an untrusted file may be absurd. Raises ModelError for heads that
    do not divide.
    """
    if kind in (ROPE_QUERY, ROPE_KEY):
        if dims.head_dim % 2:
            raise ModelError(f"head_dim is {dims.head_dim}; RoPE needs an even one")
        return (dims.heads if kind == ROPE_QUERY else dims.kv_heads) * dims.head_dim
    keys, values = dims.linear_key_heads, dims.linear_value_heads
    if not kind or keys == values:
        return None
    if values % keys:
        raise ModelError(
            f"linear_num_value_heads is {values}, expected a multiple of the {keys} key heads"
        )
    moved = values * (1 if kind == VALUE_HEADS else dims.linear_value_dim)
    return moved + (2 * keys * dims.linear_key_dim if kind == VALUE_TAIL else 0)


def reversed_order(kind: str, dims: Dimensions) -> Indices | None:
    """Indices that undo `order`: hf = gguf[reversed_order]."""
    moved = order(kind, dims)
    return None if moved is None else np.argsort(moved)


def hugging_face_names(arch: Architecture, dims: Dimensions, mtp_layers: int) -> Mapping[str, str]:
    """GGUF name -> Hugging Face name, of every tensor that a model of these sizes may have.

    Stacks of experts go to `...mlp.experts.PROJECTION.weight`, a name that no checkpoint has.
    """
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    names["output.weight"] = "lm_head.weight"
    for block in range(dims.layers + mtp_layers):
        mtp = block - dims.layers
        prefix = f"mtp.layers.{mtp}" if mtp >= 0 else f"model.layers.{block}"
        for module, part in layer_parts(arch).items():
            for leaf in ("weight", "bias"):
                names[f"blk.{block}.{part}.{leaf}"] = f"{prefix}.{module}.{leaf}"
        if arch.is_hybrid:
            names |= {f"blk.{block}.{part}": f"{prefix}.{bare}" for bare, part in _BARE.items()}
    if mtp_layers:
        names |= {f"blk.{dims.layers}.{p}.weight": f"mtp.{m}.weight" for m, p in _NEXTN.items()}
    return names
