"""A model's config.json as GGUF metadata: the keys that llama.cpp builds its graph from.

Source: llama.cpp, conversion/base.py `TextModel.set_gguf_parameters` and the classes below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.gguf import Field
from nybble.errors import ModelError
from nybble.families.dimensions import LINEAR, Dimensions, text_section
from nybble.rewrite.gguf_names import Architecture

Fields = dict[str, Field]
Config = Mapping[str, object]
T = TypeVar("T")

#: Defaults of transformers' classes for keys that a config.json may leave out.
RMS_EPSILON = 1e-6
ROTARY_SHARE = 0.25  # of the hybrids' heads
MROPE_SECTION = (11, 11, 10, 0)
_ROPE_NONE = ("default", "llama3")  # llama3's factors are a tensor, not metadata


def model_fields(arch: Architecture, config: Config, dims: Dimensions, mtp_layers: int) -> Fields:
    """All keys under the architecture's name. Raises ModelError for what llama.cpp cannot run."""
    text = text_section(config)
    rope = rope_parameters(config)
    fields: Fields = {
        "block_count": Field("u32", dims.layers + mtp_layers),
        "context_length": Field("u32", _required(text, "max_position_embeddings", int)),
        "embedding_length": Field("u32", dims.hidden),
        "attention.head_count": Field("u32", dims.heads),
        "attention.head_count_kv": Field("u32", dims.kv_heads),
        "attention.layer_norm_rms_epsilon": Field(
            "f32", _number(text, "rms_norm_eps", RMS_EPSILON)
        ),
        "rope.freq_base": Field("f32", _number(rope, "rope_theta", 10000.0)),
    }
    if isinstance(text.get("intermediate_size"), int):
        fields["feed_forward_length"] = Field("u32", _required(text, "intermediate_size", int))
    if arch.name == "llama" or "head_dim" in text or arch.name != "qwen2":
        fields["attention.key_length"] = Field("u32", dims.head_dim)
        fields["attention.value_length"] = Field("u32", dims.head_dim)
    if arch.name == "llama":
        fields["vocab_size"] = Field("u32", dims.vocab)
        fields["rope.dimension_count"] = Field("u32", dims.head_dim)
    fields |= _rope_fields(rope) | _expert_fields(dims)
    if arch.is_hybrid:
        fields |= _hybrid_fields(text, rope, dims, mtp_layers)
    return {f"{arch.name}.{key}": field for key, field in fields.items()}


def rope_parameters(config: Config) -> dict[str, object]:
    """`rope_parameters`, or what older files say in `rope_scaling` and beside it."""
    text = text_section(config)
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"config.json: rope_parameters must be an object, found {found!r}")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ModelError(
            "config.json: rope_parameters differ by layer type, which these architectures do not "
            "have in llama.cpp"
        )
    rope = {str(key): value for key, value in found.items()}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if rope.get(key) is None and text.get(key) is not None:
            rope[key] = text[key]
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def _rope_fields(rope: Mapping[str, object]) -> Fields:
    kind = rope["rope_type"]
    if kind in _ROPE_NONE or (kind == "linear" and rope.get("factor") is None):
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"config.json: rope_type {kind!r}; expected default, linear, yarn or llama3 for GGUF"
        )
    fields: Fields = {
        "rope.scaling.type": Field("str", str(kind)),
        "rope.scaling.factor": Field("f32", _number(rope, "factor", None)),
    }
    if kind == "yarn":
        length = _required(rope, "original_max_position_embeddings", int)
        fields["rope.scaling.original_context_length"] = Field("u32", length)
        for name, keys in (
            ("yarn_ext_factor", ("extrapolation_factor",)),
            ("yarn_attn_factor", ("attention_factor", "attn_factor")),
            ("yarn_beta_fast", ("beta_fast",)),
            ("yarn_beta_slow", ("beta_slow",)),
        ):
            key = next((k for k in keys if rope.get(k) is not None), None)
            if key is not None:
                fields[f"rope.scaling.{name}"] = Field("f32", _number(rope, key, None))
    return fields


def _expert_fields(dims: Dimensions) -> Fields:
    if not dims.experts:
        return {}
    fields: Fields = {
        "expert_count": Field("u32", dims.experts),
        "expert_used_count": Field("u32", dims.experts_per_token),
        "expert_feed_forward_length": Field("u32", dims.expert_width),
    }
    if dims.shared_width:
        fields["expert_shared_feed_forward_length"] = Field("u32", dims.shared_width)
    return fields


def _hybrid_fields(
    text: Config, rope: Mapping[str, object], dims: Dimensions, mtp_layers: int
) -> Fields:
    share = _number(rope, "partial_rotary_factor", ROTARY_SHARE)
    sections = rope.get("mrope_section") or MROPE_SECTION
    if not isinstance(sections, (list, tuple)) or not all(isinstance(n, int) for n in sections):
        raise ModelError(f"config.json: mrope_section must be a list of integers: {sections!r}")
    recurrent = [kind == LINEAR for kind in dims.layer_types] + [False] * mtp_layers
    every = text.get("full_attention_interval")
    fields: Fields = {
        "ssm.conv_kernel": Field("u32", dims.conv_kernel),
        "ssm.state_size": Field("u32", dims.linear_key_dim),
        "ssm.group_count": Field("u32", dims.linear_key_heads),
        "ssm.time_step_rank": Field("u32", dims.linear_value_heads),
        "ssm.inner_size": Field("u32", dims.linear_value_heads * dims.linear_value_dim),
        "attention.recurrent_layers": Field("[bool]", np.array(recurrent)),
        "full_attention_interval": Field("u32", every if isinstance(every, int) else 4),
        "rope.dimension_count": Field("u32", int(dims.head_dim * share)),
        "rope.dimension_sections": Field(
            "[i32]", np.array((*sections, 0, 0, 0, 0)[:4], dtype=np.int32)
        ),
    }
    if mtp_layers:
        fields["nextn_predict_layers"] = Field("u32", mtp_layers)
    return fields


def rope_factors(config: Config, dims: Dimensions) -> NDArray[np.float32] | None:
    """The divisors of llama3's RoPE frequencies, [D / 2], which GGUF has as a tensor; or None.

    Source: the Llama 3.1 model code; the arithmetic is float32.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    base, factor = _number(rope, "rope_theta", 10000.0), np.float32(_number(rope, "factor", 8.0))
    low = np.float32(_number(rope, "low_freq_factor", 1.0))
    high = np.float32(_number(rope, "high_freq_factor", 4.0))
    length = np.float32(_number(rope, "original_max_position_embeddings", 8192))
    dim = dims.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    waves = np.float32(2 * np.pi) * np.float32(base) ** exponents
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    ends = np.where(waves < length / high, np.float32(1), factor)
    is_between = (waves >= length / high) & (waves <= length / low)
    return np.where(is_between, between, ends).astype(np.float32)


def _number(section: Mapping[str, object], key: str, default: float | None) -> float:
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"config.json: {key} must be a number, found {value!r}")
    return float(value)


def _required(section: Mapping[str, object], key: str, kind: type[T]) -> T:
    value = section.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be {kind.__name__}, found {value!r}")
    return value
