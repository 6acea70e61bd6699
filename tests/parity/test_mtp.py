"""The MTP head: against a plain reference written from the specification, and against the
acceptance figures of the carried model.

The reference shares no code with nybble's network: dense matrices, whole sequences, no cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny
from nybble.checkpoint.reader import Checkpoint
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import MTP_LAYER, Model
from nybble.models.mtp import MtpHead
from nybble.models.sequence import SequenceState
from nybble.models.state import PagePool, make_batch

F32 = Mode(Compute("f32", 2))
TOLERANCE = 1e-4  # float32 sums in two orders
PROMPTS = Path(__file__).parents[1] / "fixtures" / "prompts" / "hybrid-chat-mtp.json"
NEW_TOKENS = 64
STOPS = (4087, 4089)


# --------------------------------------------------------------------------------- the reference


def reference_head(
    values: dict[str, Tensor], cfg: dict[str, Any], tokens: Tensor, hidden: Tensor
) -> Tensor:
    """norm(layer(fc [norm(embedding); norm(hidden)])) over a whole sequence, [T, H]."""
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


ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("family", tiny.HYBRIDS)
def test_the_head_agrees_with_the_reference(family: str, tmp_path: Path) -> None:
    cfg = tiny.config(family, dtype="F32", rope_parameters=ROPE)
    folder = tiny.checkpoint(tmp_path, family, dtype="F32", rope_parameters=ROPE)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn((70, cfg["text_config"]["hidden_size"]), generator=generator)
    tokens = torch.randint(0, 131, (70,), generator=generator)
    expected = reference_head(dense(folder), cfg["text_config"], tokens, hidden)
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        head = model.mtp
        assert head is not None
        pool = PagePool(model.network, [MTP_LAYER], 1, 80, "f32")
        state = SequenceState([], mtp_pages=pool.numbers.take())
        parts = []
        for part in (slice(0, 66), slice(66, 67), slice(67, 70)):
            batch = make_batch(model.network, [tokens[part]], [state], is_mtp=True)
            parts.append(
                head(
                    model.embed(tokens[part], F32), hidden[part], batch, pool.layers[MTP_LAYER], F32
                )
            )
            state.mtp_length += part.stop - part.start
    difference = float((torch.cat(parts) - expected).abs().max())
    assert difference <= TOLERANCE * float(expected.abs().max())


# ------------------------------------------------------------------------------------ acceptance


class Generated:
    """Greedy continuations of prompts, all sequences of a step in one batch, and their states."""

    def __init__(self, model: Model, prompts: list[list[int]]) -> None:
        self.model = model
        longest = max(map(len, prompts)) + NEW_TOKENS
        pages, slots = model.page_pool(len(prompts), longest, "f32"), model.state_pool(len(prompts))
        states = [SequenceState(pages.numbers.take(), slots=slots.numbers.take()) for _ in prompts]
        self.tokens = [list(p) for p in prompts]
        hidden: list[list[Tensor]] = [[] for _ in prompts]
        live, new = list(range(len(prompts))), [list(p) for p in prompts]
        is_decode = False
        while live:
            batch = make_batch(
                model.network,
                [new[i] for i in live],
                [states[i] for i in live],
                is_decode=is_decode,
            )
            found = model.forward(batch, pages, slots, F32)
            rows = found.split([len(new[i]) for i in live])
            chosen = model.logits(torch.stack([r[-1] for r in rows]), F32).argmax(-1).tolist()
            for i, row, token in zip(live, rows, chosen, strict=True):
                hidden[i].append(row)
                states[i].commit(len(new[i]))
                self.tokens[i].append(token)
                new[i] = [token]
            live = [
                i
                for i in live
                if self.tokens[i][-1] not in STOPS
                and len(self.tokens[i]) - len(prompts[i]) < NEW_TOKENS
            ]
            is_decode = True
        self.hidden = [torch.cat(h) for h in hidden]


def draft(model: Model, head: MtpHead, tokens: list[int], hidden: Tensor, k: int) -> Tensor:
    """What the head drafts after each position p of a sequence: [T, k] tokens for p + 2 and on.

    True keys first, then backwards from the end: the chain from p overwrites only keys after p,
    which no earlier chain reads.
    """
    count = len(hidden)
    pool = PagePool(model.network, [MTP_LAYER], 1, count + k, "f32")
    cache = pool.layers[MTP_LAYER]
    state = SequenceState([], mtp_pages=pool.numbers.take())
    following = torch.tensor(tokens[1 : count + 1])
    batch = make_batch(model.network, [following], [state], is_mtp=True)
    first = head(model.embed(following, F32), hidden, batch, cache, F32)
    found = torch.zeros((count, k), dtype=torch.int64)
    for p in range(count - 1, -1, -1):
        row = first[p : p + 1]
        for j in range(k):
            found[p, j] = model.logits(row, F32).argmax()
            if j + 1 < k:
                state.mtp_length = p + 1 + j
                batch = make_batch(model.network, [found[p, j : j + 1]], [state], is_mtp=True)
                row = head(model.embed(found[p, j : j + 1], F32), row, batch, cache, F32)
    return found


def accepted(generated: Generated, prompts: list[list[int]], k: int) -> tuple[int, list[int]]:
    """Verification steps, and how often the first 1, 2 ... k drafts were right."""
    model = generated.model
    assert model.mtp is not None
    steps, right = 0, [0] * k
    for prompt, tokens, hidden in zip(prompts, generated.tokens, generated.hidden, strict=True):
        drafts = draft(model, model.mtp, tokens, hidden, k).tolist()
        p = len(prompt) - 1
        while p + 1 + k < len(tokens):
            steps += 1
            ok = 0
            while ok < k and drafts[p][ok] == tokens[p + 2 + ok]:
                right[ok] += 1
                ok += 1
            p += ok + 1
    return steps, right


#: The model card's figures: kind, k, steps, share of steps with that draft and all before right.
CARD = [
    ("stories", 1, 1206, (0.685,)),
    ("dialogues", 2, 268, (0.720, 0.534)),
]
#: Two float32 implementations part at a near-tie now and then, and a sequence takes another way.
STEPS_TOLERANCE, SHARE_TOLERANCE = 0.03, 0.02


@pytest.mark.parametrize(("kind", "k", "steps", "shares"), CARD)
def test_acceptance_is_what_the_model_card_says(
    kind: str, k: int, steps: int, shares: tuple[float, ...]
) -> None:
    prompts = json.loads(PROMPTS.read_text("utf-8"))[kind]
    with Checkpoint.open(tiny.MODELS / "hybrid-chat-mtp") as checkpoint:
        found, right = accepted(Generated(Model(checkpoint), prompts), prompts, k)
    assert abs(found - steps) <= STEPS_TOLERANCE * steps
    for share, count in zip(shares, right, strict=True):
        assert abs(count / found - share) <= SHARE_TOLERANCE
