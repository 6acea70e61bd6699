"""What a network computes, read from config.json: the facts beyond the sizes of its tensors.

`Architecture` is what a model's code fixes (one row per model_type, in its file); `Network` joins
it with the sizes and numbers of one config.json. Whatever the file says and nybble does not compute
is refused here, by name, before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nybble.errors import ModelError
from nybble.families import Dimensions, Family
from nybble.families.dimensions import LINEAR, SLIDING, text_section
from nybble.models.rope import Rope, read_rope


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the code of a model_type fixes.

    `norm_offset` is 1 where norm weights are stored zero-centred. `normalises_experts` None:
    config.json says (norm_topk_prob). `qkv_bias`: always, whatever attention_bias says.
    """

    model_type: str
    norm_offset: float = 0.0
    has_head_norms: bool = False
    has_gated_attention: bool = False
    qkv_bias: bool = False
    has_shared_expert: bool = False
    normalises_experts: bool | None = True


@dataclass(frozen=True, slots=True)
class Network:
    """One model: its architecture, its sizes, and the numbers of its computation.

    `window` is the sliding window of layers of that type, 0 where there is none. `context` is
    max_position_embeddings. `gate_activation` is that of the gated DeltaNet's output norm.
    """

    architecture: Architecture
    dims: Dimensions
    eps: float
    rope: Rope
    context: int
    window: int
    gate_activation: str
    normalises_experts: bool

    def is_linear(self, layer: int) -> bool:
        """The layer's mixer is a gated DeltaNet."""
        return self.dims.layer_types[layer] == LINEAR

    def layer_window(self, layer: int) -> int:
        """How far the layer's attention looks back; 0 for all the way."""
        return self.window if self.dims.layer_types[layer] == SLIDING else 0


def read_network(
    config: Mapping[str, object], family: Family, architecture: Architecture
) -> Network:
    """The network that config.json describes. Raises ModelError for what nybble cannot compute."""
    dims = family.dimensions(config)
    text = text_section(config)
    activation = text.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act is {activation!r}; only silu is implemented")
    gate = text.get("output_gate_type") or "silu"
    if gate not in ("silu", "swish", "sigmoid"):
        raise ModelError(
            f"config.json: output_gate_type is {gate!r}, expected silu, swish or sigmoid"
        )
    if not architecture.has_gated_attention and dims.attention_gate:
        raise ModelError(f"config.json: attn_output_gate in a {architecture.model_type}")
    for key, plain in (("pretraining_tp", 1), ("logit_scale", 1), ("final_logit_softcapping", 0)):
        if text.get(key) not in (None, plain):
            raise ModelError(f"config.json: {key} {text[key]!r} is not implemented")
    normalises = architecture.normalises_experts
    if normalises is None:
        normalises = bool(text.get("norm_topk_prob", False))
    return Network(
        architecture,
        dims,
        eps=_positive(text, "rms_norm_eps", 1e-6),
        rope=read_rope(text, dims.head_dim),
        context=int(_positive(text, "max_position_embeddings", 2048)),
        window=_window(text, dims),
        gate_activation="sigmoid" if gate == "sigmoid" else "silu",
        normalises_experts=normalises,
    )


def _positive(text: Mapping[str, object], key: str, absent: float) -> float:
    value = text.get(key, absent)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ModelError(f"config.json: {key} must be a positive number, found {value!r}")
    return value


def _window(text: Mapping[str, object], dims: Dimensions) -> int:
    if SLIDING not in dims.layer_types:
        if text.get("use_sliding_window") and text.get("layer_types") is None:
            raise ModelError(
                "config.json: use_sliding_window without layer_types: which layers slide is not "
                "said; write layer_types"
            )
        return 0
    return int(_positive(text, "sliding_window", 0))
