"""The parts that language models are made of, as claims: one fact stands in one place.

A family file puts its list together from these functions; nothing here knows which family asks.
Names and shapes are those of the published BF16 checkpoints and of transformers.
"""

from __future__ import annotations

from dataclasses import replace

from nybble.families.family import Claim

LANGUAGE = ("model.language_model.", "model.")  # vision-language releases and text-only ones
TEXT = ("model.",)
_TOP = ("",)
_MTP = ("", "model.")
_VISUAL = ("model.", "")


def ends() -> tuple[Claim, ...]:
    """Embedding, final norm and head: what lies outside the layers."""
    return (
        Claim("embed_tokens.weight", "embedding", shape=("vocab", "hidden")),
        Claim("norm.weight", "norm", shape=("hidden",)),
        Claim(
            "lm_head.weight",
            "lm_head",
            is_linear=True,
            shape=("vocab", "hidden"),
            needed="untied",
            prefixes=_TOP,
        ),
    )


def layer_norms() -> tuple[Claim, ...]:
    """The norms before the mixer and before the MLP."""
    return tuple(
        Claim(f"layers.#.{name}.weight", "norm", shape=("hidden",))
        for name in ("input_layernorm", "post_attention_layernorm")
    )


def attention(layers: str = "all", query: str = "query") -> tuple[Claim, ...]:
    """q, k, v and o of softmax attention; engines run q, k and v as one matmul."""
    rows = {"q_proj": query, "k_proj": "key", "v_proj": "key"}
    return (
        *(
            Claim(
                f"layers.#.self_attn.{name}.weight",
                "attention",
                is_linear=True,
                group="qkv",
                shape=(n, "hidden"),
                layers=layers,
            )
            for name, n in rows.items()
        ),
        Claim(
            "layers.#.self_attn.o_proj.weight",
            "attention",
            is_linear=True,
            shape=("hidden", "query"),
            layers=layers,
        ),
    )


def attention_norms(layers: str = "all") -> tuple[Claim, ...]:
    """Norms of queries and keys, one weight per dimension of a head, shared by the heads."""
    return tuple(
        Claim(f"layers.#.self_attn.{name}.weight", "norm", shape=("head_dim",), layers=layers)
        for name in ("q_norm", "k_norm")
    )


def attention_biases(
    needed: str = "attention_bias", layers: str = "all", query: str = "query", output: bool = True
) -> tuple[Claim, ...]:
    """Biases of the attention projections; `output`: o_proj has one too."""
    rows = {"q_proj": query, "k_proj": "key", "v_proj": "key"} | (
        {"o_proj": "hidden"} if output else {}
    )
    return tuple(
        Claim(f"layers.#.self_attn.{name}.bias", "bias", shape=(n,), needed=needed, layers=layers)
        for name, n in rows.items()
    )


def _gated_mlp(
    module: str, role: str, width: str, layers: str = "all", layout: str = ""
) -> tuple[Claim, ...]:
    def linear(name: str, group: str, shape: tuple[str, ...]) -> Claim:
        pattern = f"layers.#.{module}.{name}.weight"
        return Claim(pattern, role, True, group, shape=shape, layers=layers, layout=layout)

    return (
        linear("gate_proj", "gate_up", (width, "hidden")),
        linear("up_proj", "gate_up", (width, "hidden")),
        linear("down_proj", "", ("hidden", width)),
    )


def mlp(layers: str = "all") -> tuple[Claim, ...]:
    """A dense gated MLP; engines run gate and up as one matmul."""
    return _gated_mlp("mlp", "mlp", "intermediate", layers)


def mlp_biases() -> tuple[Claim, ...]:
    """Biases of a dense MLP."""
    rows = {"gate_proj": "intermediate", "up_proj": "intermediate", "down_proj": "hidden"}
    return tuple(
        Claim(f"layers.#.mlp.{name}.bias", "bias", shape=(n,), needed="mlp_bias")
        for name, n in rows.items()
    )


def stacked_experts(layers: str = "all") -> tuple[Claim, ...]:
    """Experts as two 3-D tensors; of each matrix of `gate_up_proj`, gate is the first half."""

    def stack(name: str, projections: tuple[str, ...], shape: tuple[str, ...]) -> Claim:
        return Claim(
            f"layers.#.mlp.experts.{name}",
            "routed_expert",
            is_linear=True,
            stack=projections,
            shape=shape,
            layers=layers,
            layout="stacked",
        )

    return (
        stack("gate_up_proj", ("gate_proj", "up_proj"), ("experts", "expert_pair", "hidden")),
        stack("down_proj", ("down_proj",), ("experts", "hidden", "expert")),
    )


def split_experts(layers: str = "all") -> tuple[Claim, ...]:
    """Experts one by one, three matrices each."""
    return _gated_mlp("mlp.experts.#", "routed_expert", "expert", layers, "split")


def router(layers: str = "all") -> tuple[Claim, ...]:
    """The router. Engines keep it unquantized, whatever a checkpoint says."""
    return (
        Claim("layers.#.mlp.gate.weight", "router", shape=("experts", "hidden"), layers=layers),
    )


def shared_expert() -> tuple[Claim, ...]:
    """The expert that every token visits, and the gate that weighs it."""
    return (
        *_gated_mlp("mlp.shared_expert", "shared_expert", "shared"),
        Claim(
            "layers.#.mlp.shared_expert_gate.weight", "shared_expert_gate", shape=("one", "hidden")
        ),
    )


def gated_delta() -> tuple[Claim, ...]:
    """A gated DeltaNet mixer. Engines run qkv with z, and b with a, as one matmul each."""

    def claim(name: str, role: str, *shape: str, group: str = "", is_linear: bool = False) -> Claim:
        pattern = f"layers.#.linear_attn.{name}"
        return Claim(pattern, role, is_linear, group, shape=shape, layers="linear_attention")

    def linear(name: str, role: str, n: str, k: str, group: str = "") -> Claim:
        return claim(f"{name}.weight", role, n, k, group=group, is_linear=True)

    gate, state = "linear_attention_gate", "linear_attention_state"
    return (
        linear("in_proj_qkv", "linear_attention", "linear_qkv", "hidden", "qkvz"),
        linear("in_proj_z", "linear_attention", "linear_value", "hidden", "qkvz"),
        linear("in_proj_b", gate, "linear_value_heads", "hidden", "ba"),
        linear("in_proj_a", gate, "linear_value_heads", "hidden", "ba"),
        linear("out_proj", "linear_attention", "hidden", "linear_value"),
        claim("conv1d.weight", state, "linear_qkv", "one", "conv_kernel"),
        claim("A_log", state, "linear_value_heads"),
        claim("dt_bias", state, "linear_value_heads"),
        claim("norm.weight", "norm", "linear_value_dim"),
    )


def mtp(layer: tuple[Claim, ...]) -> tuple[Claim, ...]:
    """The MTP head, whose layers are made of `layer`: one role, claimed whole. Its linears may be
    quantized where a recipe names the role; none of the usual ones does."""

    def member(claim: Claim, needed: str = "mtp") -> Claim:
        pattern = f"mtp.{claim.pattern}"
        return replace(
            claim, pattern=pattern, role="mtp", layers="all", needed=needed, prefixes=_MTP
        )

    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return (
        member(Claim("fc.weight", "mtp", is_linear=True, shape=("hidden", "hidden_pair"))),
        *(member(Claim(f"{name}.weight", "mtp", shape=("hidden",))) for name in norms),
        *(member(c) for c in layer if c.needed == "always"),
        member(Claim("*", "mtp"), needed="never"),
    )


def vision() -> tuple[Claim, ...]:
    """The vision tower; never quantized, claimed whole, its shapes not checked."""
    modules = (
        "patch_embed.proj",
        *(f"merger.{name}" for name in ("norm", "linear_fc1", "linear_fc2")),
        *(f"blocks.#.{name}" for name in ("norm1", "norm2", "attn.qkv", "attn.proj")),
        *(f"blocks.#.mlp.{name}" for name in ("linear_fc1", "linear_fc2")),
    )
    names = ("pos_embed.weight", *(f"{m}.{leaf}" for m in modules for leaf in ("weight", "bias")))
    every = Claim("visual.*", "vision", needed="never", prefixes=_VISUAL)
    return (*(replace(every, pattern=f"visual.{n}", needed="vision") for n in names), every)


def rotary_tables() -> tuple[Claim, ...]:
    """`inv_freq` buffers, which old exports saved although every engine computes them."""
    patterns = ("layers.#.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    return tuple(Claim(p, "rotary", needed="never") for p in patterns)
