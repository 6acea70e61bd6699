"""The sizes of a model, as its config.json states them, and the symbolic shapes made of them.

Nothing is guessed: a key that a family reads and the config lacks is an error that names it. Where
the model code itself fixes what an absent key means, this file says so and follows it:

    tie_word_embeddings        not tied (the default of all six classes); either level may say so
    attention_bias, mlp_bias   no biases
    attn_output_gate           gated (transformers knows no other qwen3_5 attention)
    mtp_num_hidden_layers      no MTP head
    vision_config              no vision tower
    layer_types                from full_attention_interval (hybrids); else all full attention
    mlp_only_layers            none
    decoder_sparse_step        1
    head_dim                   hidden_size / num_attention_heads, in `CLASSIC_HEADS` families only
    num_key_value_heads        num_attention_heads, in `CLASSIC_HEADS` families only

Knows no tensor names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nybble.errors import ModelError, UnreadableValue
from nybble.formats.block import Shape

# What a family reads of its config.json beyond the keys that all have.
CLASSIC_HEADS = "classic_heads"  # head_dim and num_key_value_heads may be absent
HYBRID = "hybrid"  # gated DeltaNet layers between full attention ones, with gated queries
EXPERTS = "experts"  # routed experts
SHARED_EXPERT = "shared_expert"
SPARSE_STEP = "sparse_step"  # some layers may be dense although the model has experts
VISION = "vision"
MTP = "mtp"
GENERIC = "generic"  # nothing at all: the sizes are unknown

#: The key, at the top or in the text section, by which the head is the embedding.
TIED = "tie_word_embeddings"

# What a configuration may make nybble look for, name by name: layers, and experts of all layers
# together. Twice as many as any model that is known, at the least.
LAYER_LIMIT = 1024
EXPERT_LIMIT = 1 << 17

FULL, LINEAR, SLIDING = "full_attention", "linear_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of one model. A size that the model has no use for is 0.

    `layer_types` and `has_experts` have one entry per layer; `vision_layers` are the tower's.
    """

    layers: int = 0
    hidden: int = 0
    vocab: int = 0
    tied: bool = False
    layer_types: tuple[str, ...] = ()
    has_experts: tuple[bool, ...] = ()
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    attention_gate: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    intermediate: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    conv_kernel: int = 0
    mtp_layers: int = 0
    vision_layers: int = 0

    @property
    def has_vision(self) -> bool:
        """config.json describes a vision tower."""
        return self.vision_layers > 0


KEYS: dict[str, str] = {  # field of Dimensions -> key of config.json
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "attention_gate": "attn_output_gate",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "intermediate": "intermediate_size",
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "shared_width": "shared_expert_intermediate_size",
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_dim": "linear_key_head_dim",
    "linear_value_dim": "linear_value_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
    "mtp_layers": "mtp_num_hidden_layers",
}


@dataclass(frozen=True, slots=True)
class Size:
    """One symbolic size: the fields of Dimensions it comes from, and how."""

    fields: tuple[str, ...]
    value: Callable[[Dimensions], int]


SIZES: dict[str, Size] = {
    "one": Size((), lambda d: 1),
    "hidden": Size(("hidden",), lambda d: d.hidden),
    "hidden_pair": Size(("hidden",), lambda d: 2 * d.hidden),
    "vocab": Size(("vocab",), lambda d: d.vocab),
    "query": Size(("heads", "head_dim"), lambda d: d.heads * d.head_dim),
    "gated_query": Size(  # per head: query rows, then gate rows
        ("heads", "head_dim", "attention_gate"),
        lambda d: d.heads * d.head_dim * (2 if d.attention_gate else 1),
    ),
    "key": Size(("kv_heads", "head_dim"), lambda d: d.kv_heads * d.head_dim),
    "head_dim": Size(("head_dim",), lambda d: d.head_dim),
    "intermediate": Size(("intermediate",), lambda d: d.intermediate),
    "experts": Size(("experts",), lambda d: d.experts),
    "expert": Size(("expert_width",), lambda d: d.expert_width),
    "expert_pair": Size(("expert_width",), lambda d: 2 * d.expert_width),
    "shared": Size(("shared_width",), lambda d: d.shared_width),
    "linear_qkv": Size(
        ("linear_key_heads", "linear_key_dim", "linear_value_heads", "linear_value_dim"),
        lambda d: (
            2 * d.linear_key_heads * d.linear_key_dim + d.linear_value_heads * d.linear_value_dim
        ),
    ),
    "linear_value": Size(
        ("linear_value_heads", "linear_value_dim"),
        lambda d: d.linear_value_heads * d.linear_value_dim,
    ),
    "linear_value_heads": Size(("linear_value_heads",), lambda d: d.linear_value_heads),
    "linear_value_dim": Size(("linear_value_dim",), lambda d: d.linear_value_dim),
    "conv_kernel": Size(("conv_kernel",), lambda d: d.conv_kernel),
}


def evaluate(symbols: tuple[str, ...], dims: Dimensions) -> Shape:
    """The shape that a tuple of names of `SIZES` stands for."""
    return tuple(SIZES[s].value(dims) for s in symbols)


def explain(symbols: tuple[str, ...], dims: Dimensions) -> str:
    """The config keys behind a symbolic shape: "num_key_value_heads 2, head_dim 256"."""
    fields = dict.fromkeys(f for s in symbols for f in SIZES[s].fields)
    return ", ".join(f"{KEYS[f]} {_spell(getattr(dims, f))}" for f in fields)


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class _Section:
    """A part of config.json, and its name for messages ("" or "text_config.")."""

    values: Mapping[str, object]
    path: str

    def complain(self, key: str, expected: str) -> ModelError:
        if key not in self.values:
            return ModelError(f"config.json: {self.path}{key} is missing, expected {expected}")
        # null is how writers say that a key is absent.
        kind = ModelError if self.values[key] is None else UnreadableValue
        return kind(
            f"config.json: {self.path}{key} must be {expected}, found {_short(self.values[key])}"
        )

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def number(self, key: str, least: int = 1) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.complain(key, f"an integer of {least} or more")
        return value

    def layers(self, key: str, least: int = 1) -> int:
        """A number of layers, each of which is a dozen names to look for."""
        value = self.number(key, least)
        if value > LAYER_LIMIT:
            raise self.complain(key, f"at most {LAYER_LIMIT:,}")
        return value

    def flag(self, key: str, absent: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return absent
        if not isinstance(value, bool):
            raise self.complain(key, "true or false")
        return value

    def words(self, key: str, length: int, allowed: tuple[str, ...]) -> tuple[str, ...]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.complain(key, f"a list of {length} layer types")
        for i, word in enumerate(value):
            if word not in allowed:
                raise ModelError(
                    f"config.json: {self.path}{key}[{i}] is {_short(word)}, "
                    f"expected one of {', '.join(allowed)}"
                )
        if len(value) != length:
            raise ModelError(
                f"config.json: {self.path}{key} has {len(value)} entries, "
                f"but {self.path}num_hidden_layers is {length}"
            )
        return tuple(value)

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(v) is int for v in value):
            raise self.complain(key, "a list of layer numbers")
        return tuple(value)


def _short(value: object) -> str:
    """Untrusted JSON for a message."""
    if isinstance(value, (list, dict)) and len(value) > 20:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 160 else text[:150] + "..."


def text_section(config: Mapping[str, object]) -> Mapping[str, object]:
    """What config.json says of the language model: `text_config`, or all of a flat file."""
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, Mapping):
        raise UnreadableValue(f"config.json: text_config must be an object, found {_short(text)}")
    return text


def read_dimensions(config: Mapping[str, object], reads: frozenset[str]) -> Dimensions:
    """The sizes that config.json states; `reads` names the groups of keys the family needs.

    Raises ModelError naming the key that is missing, of the wrong type, or at odds with another.
    """
    if GENERIC in reads:
        return Dimensions()
    text = _Section(
        text_section(config), "" if config.get("text_config") is None else "text_config."
    )
    top = _Section(config, "")
    layers, hidden = text.layers("num_hidden_layers"), text.number("hidden_size")
    has_experts = _expert_layers(text, layers, reads)
    is_hybrid, is_moe = HYBRID in reads, EXPERTS in reads
    heads, kv_heads, head_dim = _heads(text, hidden, reads)

    def wanted(is_wanted: bool, key: str) -> int:
        return text.number(key) if is_wanted else 0

    return Dimensions(
        layers=layers,
        hidden=hidden,
        vocab=text.number("vocab_size"),
        tied=text.flag(TIED, False) or top.flag(TIED, False),
        layer_types=_layer_types(text, layers, is_hybrid),
        has_experts=has_experts,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention_gate=is_hybrid and text.flag("attn_output_gate", True),
        attention_bias=text.flag("attention_bias", False),
        mlp_bias=text.flag("mlp_bias", False),
        intermediate=wanted(not all(has_experts), "intermediate_size"),
        experts=_experts(text, layers) if is_moe else 0,
        experts_per_token=wanted(is_moe, "num_experts_per_tok"),
        expert_width=wanted(is_moe, "moe_intermediate_size"),
        shared_width=wanted(SHARED_EXPERT in reads, "shared_expert_intermediate_size"),
        linear_key_heads=wanted(is_hybrid, "linear_num_key_heads"),
        linear_value_heads=wanted(is_hybrid, "linear_num_value_heads"),
        linear_key_dim=wanted(is_hybrid, "linear_key_head_dim"),
        linear_value_dim=wanted(is_hybrid, "linear_value_head_dim"),
        conv_kernel=wanted(is_hybrid, "linear_conv_kernel_dim"),
        mtp_layers=_mtp_layers(text, reads),
        vision_layers=_vision_layers(config) if VISION in reads else 0,
    )


def _heads(text: _Section, hidden: int, reads: frozenset[str]) -> tuple[int, int, int]:
    heads = text.number("num_attention_heads")
    is_classic = CLASSIC_HEADS in reads
    kv_heads = heads
    if not is_classic or text.has("num_key_value_heads"):
        kv_heads = text.number("num_key_value_heads")
    if not is_classic or text.has("head_dim"):
        return heads, kv_heads, text.number("head_dim")
    if hidden % heads:
        raise ModelError(
            f"config.json: {text.path}head_dim is missing and {text.path}hidden_size {hidden} "
            f"does not divide by {text.path}num_attention_heads {heads}"
        )
    return heads, kv_heads, hidden // heads


def _layer_types(text: _Section, layers: int, is_hybrid: bool) -> tuple[str, ...]:
    allowed = (FULL, LINEAR) if is_hybrid else (FULL, SLIDING)
    if text.has("layer_types"):
        return text.words("layer_types", layers, allowed)
    if not is_hybrid:
        return (FULL,) * layers
    if not text.has("full_attention_interval"):
        raise text.complain("layer_types", f"a list of {layers} layer types")
    every = text.number("full_attention_interval")
    return tuple(LINEAR if (i + 1) % every else FULL for i in range(layers))


def _expert_layers(text: _Section, layers: int, reads: frozenset[str]) -> tuple[bool, ...]:
    if EXPERTS not in reads:
        return (False,) * layers
    if SPARSE_STEP not in reads:
        return (True,) * layers
    step = text.number("decoder_sparse_step") if text.has("decoder_sparse_step") else 1
    dense = text.numbers("mlp_only_layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def _experts(text: _Section, layers: int) -> int:
    experts = text.number("num_experts")
    if experts * layers > EXPERT_LIMIT:
        raise text.complain("num_experts", f"at most {EXPERT_LIMIT:,} in {layers} layers together")
    return experts


def _mtp_layers(text: _Section, reads: frozenset[str]) -> int:
    if MTP not in reads or not text.has("mtp_num_hidden_layers"):
        return 0
    return text.layers("mtp_num_hidden_layers", least=0)


def _vision_layers(config: Mapping[str, object]) -> int:
    vision = config.get("vision_config")
    if vision is None:
        return 0
    if not isinstance(vision, Mapping):
        raise UnreadableValue(
            f"config.json: vision_config must be an object, found {_short(vision)}"
        )
    return _Section(vision, "vision_config.").layers("depth")
