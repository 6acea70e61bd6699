"""The MTP head in plain PyTorch, written from the specification: dense matrices, whole sequences,
no cache. It shares no code with nybble's network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tiny


def reference_head(
    values: dict[str, Tensor], cfg: dict[str, Any], tokens: Tensor, hidden: Tensor
) -> Tensor:
    """norm(layer(fc [norm(embedding); norm(hidden)])) over a whole sequence, [T, H]: of tokens, and
    of the hidden states at the positions before them. Its positions begin anywhere."""
    eps, heads, kv_heads = (
        cfg["rms_norm_eps"],
        cfg["num_attention_heads"],
        cfg["num_key_value_heads"],
    )
    size = cfg["head_dim"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x * x).mean(-1, keepdim=True).add(eps).rsqrt() * (1 + values[name])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ values[name].T

    embedded = values["embed_tokens.weight"][tokens]
    x = torch.cat(
        [
            norm(embedded, "mtp.pre_fc_norm_embedding.weight"),
            norm(hidden, "mtp.pre_fc_norm_hidden.weight"),
        ],
        -1,
    )
    x = linear(x, "mtp.fc.weight")
    base, count = "mtp.layers.0.", len(x)
    y = norm(x, f"{base}input_layernorm.weight")
    query, gate = (
        linear(y, f"{base}self_attn.q_proj.weight").view(count, heads, 2 * size).chunk(2, -1)
    )
    key = linear(y, f"{base}self_attn.k_proj.weight").view(count, kv_heads, size)
    value = linear(y, f"{base}self_attn.v_proj.weight").view(count, kv_heads, size)
    query = norm(query, f"{base}self_attn.q_norm.weight")
    key = norm(key, f"{base}self_attn.k_norm.weight")
    query, key = (turn(t, cfg["rope_parameters"], size) for t in (query, key))
    key, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
    scores = torch.einsum("thd,shd->hts", query, key) * size**-0.5
    scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -torch.inf)
    mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), value) * torch.sigmoid(gate)
    x = x + linear(mixed.reshape(count, -1), f"{base}self_attn.o_proj.weight")
    y = norm(x, f"{base}post_attention_layernorm.weight")
    x = x + feed_forward(values, f"{base}mlp.", y, cfg)
    return norm(x, "mtp.norm.weight")


def turn(x: Tensor, rope: dict[str, Any], size: int) -> Tensor:
    dims = int(size * rope["partial_rotary_factor"])
    inverse = rope["rope_theta"] ** -(torch.arange(0, dims, 2) / dims)
    angle = (torch.arange(len(x))[:, None] * inverse)[:, None]
    a, b, rest = x.split([dims // 2, dims // 2, size - dims], -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def feed_forward(values: dict[str, Tensor], base: str, x: Tensor, cfg: dict[str, Any]) -> Tensor:
    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    if f"{base}gate_proj.weight" in values:
        return mlp(x, *(values[f"{base}{n}_proj.weight"] for n in ("gate", "up", "down")))
    weights, chosen = (
        (x @ values[f"{base}gate.weight"].T).softmax(-1).topk(cfg["num_experts_per_tok"], -1)
    )
    weights = weights / weights.sum(-1, keepdim=True)
    found = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(weights[t], chosen[t].tolist(), strict=True):
            gate, up = values[f"{base}experts.gate_up_proj"][e].chunk(2)
            down = values[f"{base}experts.down_proj"][e]
            found[t] += weight * mlp(x[t : t + 1], gate, up, down)[0]
    shared = [values[f"{base}shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down")]
    share = torch.sigmoid(x @ values[f"{base}shared_expert_gate.weight"].T)
    return found + share * mlp(x, *shared)


def dense(folder: Path) -> dict[str, Tensor]:
    """All tensors as float32, read without nybble, without the language model's prefix."""
    found = {}
    for name, entry in tiny.read(folder).items():
        array = tiny.array(entry).astype("float32")
        found[name.removeprefix("model.language_model.")] = torch.from_numpy(array)
    return found
