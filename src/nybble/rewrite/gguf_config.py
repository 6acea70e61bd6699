"""GGUF metadata as config.json and generation_config.json: undoes `gguf_metadata`.

Nothing is guessed: a key that the architecture needs and the metadata lack is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nybble.checkpoint.gguf import GGUFFile, Value
from nybble.errors import ModelError
from nybble.families import find_family
from nybble.rewrite.gguf_metadata import rope_factors
from nybble.rewrite.gguf_names import Architecture

Metadata = Mapping[str, Value]

#: The two published parametrizations of llama3's RoPE; GGUF holds only the divisors they make.
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
#: No size of a model is larger; a file that says so would only exhaust memory.
_SIZE_LIMIT = 1 << 24
_FACTORS_RTOL = 1e-5  # powers of float32 differ in their last places between libraries


def model_config(file: GGUFFile, arch: Architecture) -> dict[str, object]:
    """The config.json of an open file's model. Raises ModelError naming a key that is missing."""
    keys = _Keys(file, arch)
    embedding = keys.shape("token_embd.weight")
    heads = max(keys.number("attention.head_count"), 1)  # 0 is refused with the dimensions
    if keys.number("block_count") > len(file.tensors):
        raise keys.complain(
            "block_count", f"at most {len(file.tensors)}, as many as tensors", "more"
        )
    head_dim = keys.number("attention.key_length", embedding[1] // heads)
    config: dict[str, object] = {
        "architectures": [arch.transformers],
        "model_type": f"{arch.model_type}_text" if arch.is_hybrid else arch.model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": keys.number("embedding_length"),
        "max_position_embeddings": keys.number("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": keys.number("block_count") - keys.number("nextn_predict_layers", 0),
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": embedding[0],
    }
    if arch.name != "qwen2":  # whose q, k and v always have one
        config["attention_bias"] = any(n.endswith("attn_q.bias") for n in file.tensors)
    if arch.name == "llama":
        config["mlp_bias"] = any(n.endswith("ffn_up.bias") for n in file.tensors)
    if keys.has("feed_forward_length"):
        config["intermediate_size"] = keys.number("feed_forward_length")
    config |= _experts(keys, arch) | _tokens(file.metadata)
    config["rope_parameters"] = _rope(keys)
    if arch.is_hybrid:
        config |= _hybrid(keys)
    if "rope_freqs.weight" in file.tensors:
        config["rope_parameters"] = _llama3(file, config)
    return config


def generation_config(metadata: Metadata) -> dict[str, object]:
    """The special tokens, and how the metadata say to sample."""
    found: dict[str, object] = {k: v for k, v in _tokens(metadata).items() if v is not None}
    for name, key in (
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("temp", "temperature"),
        ("penalty_repeat", "repetition_penalty"),
    ):
        value = metadata.get(f"general.sampling.{name}")
        if isinstance(value, (int, float)):
            found[key] = shortest(value) if isinstance(value, float) else value
    if "temperature" in found:
        found["do_sample"] = True
    return found


def shortest(value: float) -> float:
    """The shortest decimal with this float32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Keys:
    """The metadata below the architecture's name."""

    def __init__(self, file: GGUFFile, arch: Architecture) -> None:
        self.file = file
        self.prefix = arch.name
        self.metadata = file.metadata

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata

    def number(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, int) or not is_number or not 0 <= value <= _SIZE_LIMIT:
            raise self.complain(key, f"a whole number up to {_SIZE_LIMIT}", value)
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if not isinstance(value, float):
            raise self.complain(key, "a number", value)
        return shortest(value)

    def numbers(self, key: str) -> list[int]:
        value = self.metadata.get(f"{self.prefix}.{key}")
        if not isinstance(value, np.ndarray):
            raise self.complain(key, "a list of numbers", value)
        return [int(n) for n in value]

    def shape(self, tensor: str) -> tuple[int, ...]:
        info = self.file.tensors.get(tensor)
        if info is None or len(info.shape) != 2:
            raise ModelError(f"{self.file.path}: no matrix {tensor}; the file is not a whole model")
        return info.shape

    def complain(self, key: str, expected: str, found: object) -> ModelError:
        return ModelError(
            f"{self.file.path}: {self.prefix}.{key} must be {expected}, found {found!r}"
        )


def _tokens(metadata: Metadata) -> dict[str, object]:
    pairs = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    return {f"{s}_token_id": metadata.get(f"tokenizer.ggml.{g}_token_id") for s, g in pairs}


def _experts(keys: _Keys, arch: Architecture) -> dict[str, object]:
    if not arch.has_experts:
        return {}
    found: dict[str, object] = {
        "num_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        "norm_topk_prob": True,  # what llama.cpp's graphs of these architectures do
    }
    if arch.is_hybrid:
        found["shared_expert_intermediate_size"] = keys.number("expert_shared_feed_forward_length")
    else:
        dense = [
            int(name.split(".")[1])
            for name in keys.file.tensors
            if name.startswith("blk.") and name.endswith(".ffn_gate.weight")
        ]
        found |= {"decoder_sparse_step": 1, "mlp_only_layers": sorted(dense)}
    return found


def _rope(keys: _Keys) -> dict[str, object]:
    rope: dict[str, object] = {
        "rope_theta": keys.decimal("rope.freq_base", 10000.0),
        "rope_type": "default",
    }
    kind = keys.metadata.get(f"{keys.prefix}.rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise keys.complain("rope.scaling.type", "none, linear or yarn", kind)
    rope |= {"rope_type": kind, "factor": keys.decimal("rope.scaling.factor")}
    if kind == "yarn":
        length = keys.number("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = length
        for name, key in (
            ("yarn_ext_factor", "extrapolation_factor"),
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if keys.has(f"rope.scaling.{name}"):
                rope[key] = keys.decimal(f"rope.scaling.{name}")
    return rope


def _llama3(file: GGUFFile, config: Mapping[str, object]) -> dict[str, object]:
    """The parameters that make the divisors in the file."""
    given = config["rope_parameters"]
    assert isinstance(given, dict)
    stored = file.values("rope_freqs.weight").reshape(-1)
    dims = find_family(config).dimensions(config)
    for factor, low, high, length in _LLAMA3:
        rope = given | {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        made = rope_factors({**config, "rope_parameters": rope}, dims)
        if made is not None and made.shape == stored.shape:
            if np.allclose(made, stored, rtol=_FACTORS_RTOL, atol=0):
                return rope
    raise ModelError(
        f"{file.path}: rope_freqs.weight is not of a llama3 RoPE with factor 8 or 32; "
        "config.json cannot be written: take it from the original model"
    )


def _hybrid(keys: _Keys) -> dict[str, object]:
    layers = keys.number("block_count") - keys.number("nextn_predict_layers", 0)
    head_dim = max(keys.number("attention.key_length"), 1)
    values = keys.number("ssm.time_step_rank")
    interval = keys.number("full_attention_interval", 4)
    if keys.has("attention.recurrent_layers"):
        recurrent = [bool(n) for n in keys.numbers("attention.recurrent_layers")[:layers]]
    else:
        recurrent = [(i + 1) % max(interval, 1) != 0 for i in range(layers)]
    share = keys.number("rope.dimension_count") / head_dim
    rope = _rope(keys) | {
        "mrope_interleaved": True,
        "mrope_section": keys.numbers("rope.dimension_sections")[:3],
        "partial_rotary_factor": share,
    }
    return {
        "attn_output_gate": True,
        "full_attention_interval": interval,
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent],
        "linear_conv_kernel_dim": keys.number("ssm.conv_kernel"),
        "linear_key_head_dim": keys.number("ssm.state_size"),
        "linear_num_key_heads": keys.number("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": keys.number("ssm.inner_size") // max(values, 1),
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": keys.number("nextn_predict_layers", 0),
        "partial_rotary_factor": share,
        "rope_parameters": rope,
    }
