"""Families: every tensor claimed, for what it is, at the shape that config.json promises."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nybble.errors import ModelError
from nybble.families import ALIASES, FAMILIES, ROLES, Family, find_family, generic_family
from nybble.families.dimensions import SIZES
from nybble.families.family import HOLDS, NEEDED

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS / "fixtures" / "configs"
MODELS = TESTS.parent / "models"

MOE, DENSE = "nvidia--Qwen3.6-35B-A3B-NVFP4", "nvidia--Qwen3.6-27B-NVFP4"
STACKED = {"fused": True, "fused_mtp": True}
SPLIT = {"fused": False, "fused_mtp": False}
AS_3_5 = {"fused": True, "fused_mtp": False, "f32_gdn": True}

Shapes = dict[str, tuple[int, ...]]


def _make_headers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_headers", TESTS / "make_headers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_headers = _make_headers()


def load(folder: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / folder / "config.json").read_text())
    return config


def bf16_shapes(config: dict[str, Any], **layout: bool) -> Shapes:
    return {name: tuple(shape) for name, _, shape in make_headers.checkpoint(config, **layout)}


def parameters_by_role(family: Family, shapes: Shapes) -> Counter[str]:
    sums: Counter[str] = Counter()
    for name, shape in shapes.items():
        claimed = family.claim(name)
        assert claimed is not None, name
        sums[claimed.claim.role] += math.prod(shape)
    return sums


# --- the published checkpoints


@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        (MOE, STACKED),
        (MOE, SPLIT),
        (DENSE, STACKED),
        ("Qwen--Qwen3.5-35B-A3B", AS_3_5),
        ("Qwen--Qwen3.5-27B", AS_3_5),
        ("Qwen--Qwen3.5-122B-A10B", AS_3_5),
        ("Qwen--Qwen3.5-397B-A17B", AS_3_5),
    ],
)
def test_every_published_tensor_is_claimed_promised_and_shaped(
    folder: str, layout: dict[str, bool]
) -> None:
    config = load(folder)
    family, shapes = find_family(config), bf16_shapes(config, **layout)
    dims = family.dimensions(config)
    assert [n for n in shapes if family.claim(n) is None] == []
    assert family.missing(shapes, dims) == []
    assert family.contradictions(shapes, dims) == []


# Parameters by component as published (Qwen3.6 cards and indexes; the totals are exact).
MOE_PARAMETERS = {
    "routed_expert": 32_212_254_720,
    "shared_expert": 125_829_120,
    "router": 20_971_520,
    "shared_expert_gate": 81_920,
    "attention": 272_629_760,
    "linear_attention": 1_006_632_960,
    "linear_attention_gate": 3_932_160,
    "linear_attention_state": 983_040 + 30 * (32 + 32),
    "norm": 5_120 + 165_888 + 30 * 128,
    "embedding": 508_559_360,
    "lm_head": 508_559_360,
    "mtp": 844_640_768,
    "vision": 446_571_248,
}
DENSE_PARAMETERS = {
    "mlp": 17_112_760_320,
    "attention": 1_677_721_600,
    "linear_attention": 5_536_481_280,
    "linear_attention_gate": 23_592_960,
    "linear_attention_state": 1_966_080 + 48 * (48 + 48),
    "norm": 8_192 + 660_480 + 48 * 128,
    "embedding": 1_271_398_400,
    "lm_head": 1_271_398_400,
    "mtp": 424_699_392,
    "vision": 460_730_096,
}


@pytest.mark.parametrize(
    ("folder", "layout", "expected", "total"),
    [
        (MOE, STACKED, MOE_PARAMETERS, 35_951_822_704),
        (MOE, SPLIT, MOE_PARAMETERS, 35_951_822_704),
        (DENSE, STACKED, DENSE_PARAMETERS, 27_781_427_952),
    ],
)
def test_parameters_by_role_are_the_published_ones(
    folder: str, layout: dict[str, bool], expected: dict[str, int], total: int
) -> None:
    config = load(folder)
    found = parameters_by_role(find_family(config), bf16_shapes(config, **layout))
    assert found == expected
    assert found.total() == total


def test_qwen3_8_27b_is_the_same_network() -> None:
    """Qwen3.8-27B has the classes and sizes of 3.6 and 3.5; only keys that nobody reads differ."""
    config = load(DENSE)
    family = find_family(config)
    older = family.dimensions(load("Qwen--Qwen3.5-27B"))
    assert family.dimensions(config) == older
    config["transformers_version"] = "5.20.0"
    config["text_config"] |= {"reasoning_effort": "medium", "use_cache": False}
    assert find_family(config) is family
    assert family.dimensions(config) == older


@pytest.mark.parametrize("folder", [MOE, DENSE])
def test_every_module_of_a_published_quantized_map_is_claimed(folder: str) -> None:
    config = load(folder)
    family = find_family(config)
    roles: Counter[str] = Counter()
    for module in config["quantization_config"]["quantized_layers"]:
        claimed = family.claim_module(module)
        assert claimed is not None, module
        assert claimed.claim.is_linear, module
        assert claimed.module == module
        roles[claimed.claim.role] += 1
    assert roles == (
        {
            "routed_expert": 40,
            "shared_expert": 120,
            "attention": 40,
            "linear_attention": 90,
            "lm_head": 1,
        }
        if folder == MOE
        else {"mlp": 192, "attention": 64, "linear_attention": 144, "lm_head": 1}
    )


def test_side_tensors_of_quantized_checkpoints_are_not_claimed() -> None:
    config = load(MOE)
    family = find_family(config)
    tensors = make_headers.checkpoint(
        config, layout="modelopt", quant=config["quantization_config"]
    )
    sides = ("weight_scale", "weight_scale_2", "input_scale")
    for name, _, _ in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in sides:
            assert family.claim(name) is None
            assert family.claim_module(module) is not None
        else:
            assert family.claim(name) is not None


# --- one tensor


def claimed(family: str, name: str) -> Any:
    found = FAMILIES[family].claim(name)
    assert found is not None, name
    return found


def test_a_claim_says_where_the_tensor_belongs() -> None:
    q = claimed("qwen3_5_moe", "model.language_model.layers.3.self_attn.q_proj.weight")
    assert q.prefix == "model.language_model."
    assert q.module == "model.language_model.layers.3.self_attn.q_proj"
    assert q.group_key == "model.language_model.layers.3.self_attn:qkv"
    assert (q.layer, q.expert) == (3, None)

    up = claimed("qwen3_moe", "model.layers.12.mlp.experts.7.up_proj.weight")
    assert up.prefix == "model."
    assert up.module == "model.layers.12.mlp.experts.7.up_proj"
    assert up.group_key == "model.layers.12.mlp.experts.7:gate_up"
    assert (up.layer, up.expert) == (12, 7)


def test_a_stack_divides_into_gate_and_up() -> None:
    stack = claimed("qwen3_5_moe", "model.language_model.layers.9.mlp.experts.gate_up_proj")
    assert stack.module == "model.language_model.layers.9.mlp.experts"
    assert stack.claim.stack == ("gate_proj", "up_proj")
    assert (stack.layer, stack.expert, stack.group_key) == (9, None, "")
    down = claimed("qwen3_5_moe", "model.layers.9.mlp.experts.down_proj")
    assert down.claim.stack == ("down_proj",)


@pytest.mark.parametrize(
    ("family", "group", "members"),
    [
        ("qwen3_5", "self_attn:qkv", ("q_proj", "k_proj", "v_proj")),
        ("qwen3_5", "linear_attn:qkvz", ("in_proj_qkv", "in_proj_z")),
        ("qwen3_5", "linear_attn:ba", ("in_proj_b", "in_proj_a")),
        ("qwen3_5", "mlp:gate_up", ("gate_proj", "up_proj")),
        ("qwen3_5_moe", "mlp.shared_expert:gate_up", ("gate_proj", "up_proj")),
        ("llama", "self_attn:qkv", ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_fused_members_share_one_key(family: str, group: str, members: tuple[str, ...]) -> None:
    module = group.partition(":")[0]
    keys = {claimed(family, f"model.layers.5.{module}.{m}.weight").group_key for m in members}
    assert keys == {f"model.layers.5.{group}"}


@pytest.mark.parametrize("leaf", ["self_attn.o_proj", "mlp.down_proj", "linear_attn.out_proj"])
def test_outputs_stand_alone(leaf: str) -> None:
    assert claimed("qwen3_5", f"model.layers.0.{leaf}.weight").group_key == ""


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp."])
def test_mtp_is_claimed_whole_and_its_linears_are_known(prefix: str) -> None:
    rests = {
        "fc.weight": True,
        "layers.0.mlp.experts.3.up_proj.weight": True,
        "layers.0.self_attn.q_proj.weight": True,
        "layers.0.mlp.gate.weight": False,
        "layers.0.mlp.shared_expert_gate.weight": False,
        "norm.weight": False,
        "something.new": False,
        "embed": False,
    }
    for rest, is_linear in rests.items():
        found = claimed("qwen3_5_moe", prefix + rest)
        assert (found.claim.role, found.claim.is_linear) == ("mtp", is_linear), rest
        assert (found.layer, found.expert) == (None, None)
    found = claimed("qwen3_5_moe", prefix + "layers.0.self_attn.k_proj.weight")
    assert found.group_key == prefix + "layers.0.self_attn:qkv"


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_vision_is_claimed_whole_and_never_quantized(prefix: str) -> None:
    for rest in ("blocks.0.attn.qkv.weight", "deepstack_merger_list.0.norm.weight"):
        found = claimed("qwen3_5", prefix + rest)
        assert (found.claim.role, found.claim.is_linear) == ("vision", False)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "model.lm_head.weight",
        "score.weight",
        "",
    ],
)
def test_a_strange_name_is_claimed_by_nobody(name: str) -> None:
    for family in FAMILIES.values():
        assert family.claim(name) is None


def test_what_engines_never_quantize_is_no_linear() -> None:
    kept = {"router", "shared_expert_gate", "norm", "embedding", "vision", "bias", "rotary"}
    for family in FAMILIES.values():
        for claim in family.claims:
            assert not (claim.is_linear and claim.role in kept), claim


def test_claims_use_known_words_and_name_a_tensor_once() -> None:
    for family in FAMILIES.values():
        for claim in family.claims:
            assert claim.role in ROLES
            assert claim.needed in NEEDED
            assert claim.layers in HOLDS
            assert set(claim.shape) <= set(SIZES)
        patterns = [c.pattern for c in family.claims]
        assert len(patterns) == len(set(patterns))


# --- config.json against the tensors


def test_a_wrong_shape_is_named_with_its_keys() -> None:
    config = load(MOE)
    family, shapes = find_family(config), bf16_shapes(config)
    name = "model.language_model.layers.3.self_attn.k_proj.weight"
    shapes[name] = (256, 2048)
    (message,) = family.contradictions(shapes, family.dimensions(config))
    assert message == (
        f"{name}: expected [512, 2048] from config.json "
        "(num_key_value_heads 2, head_dim 256, hidden_size 2048), found [256, 2048]"
    )


def test_a_wrong_config_names_every_tensor_it_contradicts() -> None:
    config = load(MOE)
    shapes = bf16_shapes(config)
    family = find_family(config)
    config["text_config"]["shared_expert_intermediate_size"] = 256
    messages = family.contradictions(shapes, family.dimensions(config))
    assert len(messages) == 3 * 41  # three projections in 40 layers and in the MTP layer
    assert all("shared_expert_intermediate_size 256" in m for m in messages)
    config["text_config"] |= {"shared_expert_intermediate_size": 512, "attn_output_gate": False}
    messages = family.contradictions(shapes, family.dimensions(config))
    assert len(messages) == 11
    assert all("q_proj" in m and "attn_output_gate false" in m for m in messages)


def test_tensors_beyond_the_config_are_named() -> None:
    config = load(MOE)
    family, shapes = find_family(config), bf16_shapes(config, **SPLIT)
    text = config["text_config"]
    text |= {"num_hidden_layers": 39, "layer_types": text["layer_types"][:39], "num_experts": 255}
    messages = family.contradictions(shapes, family.dimensions(config))
    assert any("layers.39." in m and "num_hidden_layers 39" in m for m in messages)
    assert any("experts.255." in m and "num_experts 255" in m for m in messages)


def test_attention_in_a_linear_layer_is_named() -> None:
    config = load(DENSE)
    family, shapes = find_family(config), bf16_shapes(config)
    shapes["model.language_model.layers.0.self_attn.q_norm.weight"] = (256,)
    (message,) = family.contradictions(shapes, family.dimensions(config))
    assert "layers.0.self_attn.q_norm" in message
    assert "full attention layer" in message
    assert "layer_types" in message


def test_a_missing_tensor_is_named_as_the_file_spells_it() -> None:
    config = load(MOE)
    family, shapes = find_family(config), bf16_shapes(config)
    dims = family.dimensions(config)
    k_proj = "model.language_model.layers.3.self_attn.k_proj.weight"
    del shapes[k_proj]
    assert family.missing(shapes, dims) == [k_proj]
    flat = {n.replace("model.language_model.", "model."): s for n, s in shapes.items()}
    assert family.missing(flat, dims) == ["model.layers.3.self_attn.k_proj.weight"]


def test_a_promised_mtp_head_that_is_absent_is_named() -> None:
    config = load(MOE)
    family, shapes = find_family(config), bf16_shapes(config)
    kept = {n: s for n, s in shapes.items() if not n.startswith("mtp.")}
    missing = family.missing(kept, family.dimensions(config))
    assert sorted(missing) == sorted(shapes.keys() - kept.keys())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    assert family.missing(kept, family.dimensions(config)) == []
    assert family.missing(shapes, family.dimensions(config)) == []


def test_a_promised_vision_tower_that_is_absent_is_named() -> None:
    config = load(DENSE)
    family, shapes = find_family(config), bf16_shapes(config)
    kept = {n: s for n, s in shapes.items() if ".visual." not in n}
    missing = family.missing(kept, family.dimensions(config))
    assert len(missing) == 333
    assert set(missing) == shapes.keys() - kept.keys()


@pytest.mark.parametrize("layout", [STACKED, SPLIT])
@pytest.mark.parametrize("layer", [0, 39])
def test_a_missing_layer_is_named_in_the_layout_of_the_others(
    layout: dict[str, bool], layer: int
) -> None:
    config = load(MOE)
    family, shapes = find_family(config), bf16_shapes(config, **layout)
    kept = {n: s for n, s in shapes.items() if f".language_model.layers.{layer}." not in n}
    missing = family.missing(kept, family.dimensions(config))
    assert set(missing) == shapes.keys() - kept.keys()


def test_one_missing_expert_is_named() -> None:
    config = load(MOE)
    family, shapes = find_family(config), bf16_shapes(config, **SPLIT)
    name = "model.language_model.layers.17.mlp.experts.201.down_proj.weight"
    del shapes[name]
    assert family.missing(shapes, family.dimensions(config)) == [name]


# --- the small hybrids of this repository


def read_header(folder: Path) -> Shapes:
    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


@pytest.mark.parametrize(
    ("model", "has_mtp", "is_tied", "is_stacked"),
    [("hybrid-chat-mtp", True, False, True), ("stories-hybrid-moe", False, True, False)],
)
def test_our_own_models_are_claimed(
    model: str, has_mtp: bool, is_tied: bool, is_stacked: bool
) -> None:
    if not (MODELS / model / "config.json").exists():
        pytest.skip(f"models/{model} is not in this checkout")
    config = json.loads((MODELS / model / "config.json").read_text())
    family, shapes = find_family(config), read_header(MODELS / model)
    dims = family.dimensions(config)
    assert family.model_type == "qwen3_5_moe"
    assert (dims.mtp_layers > 0, dims.tied) == (has_mtp, is_tied)
    roles = parameters_by_role(family, shapes)
    assert ("mtp" in roles, "lm_head" in roles) == (has_mtp, not is_tied)
    assert ("vision" in roles) == dims.has_vision
    assert any(n.endswith(".experts.gate_up_proj") for n in shapes) == is_stacked
    assert family.missing(shapes, dims) == []
    assert family.contradictions(shapes, dims) == []


# --- Llama and the older Qwen, from small configs written by hand

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
}


def plain_shapes(
    qk_norm: int = 0,
    head_dim: int = 16,
    qkv_bias: bool = False,
    experts: int = 0,
    tied: bool = False,
) -> Shapes:
    """The tensors of a Llama-like model with the sizes of SMALL, written out once more."""
    shapes: Shapes = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
    if not tied:
        shapes["lm_head.weight"] = (320, 64)
    for i in range(2):
        p = f"model.layers.{i}."
        rows = {"q_proj": 4 * head_dim, "k_proj": 2 * head_dim, "v_proj": 2 * head_dim}
        for name, n in rows.items():
            shapes[f"{p}self_attn.{name}.weight"] = (n, 64)
            if qkv_bias:
                shapes[f"{p}self_attn.{name}.bias"] = (n,)
        shapes[p + "self_attn.o_proj.weight"] = (64, 4 * head_dim)
        if qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = (qk_norm,)
            shapes[p + "self_attn.k_norm.weight"] = (qk_norm,)
        for q, f in (
            [(f"{p}mlp.experts.{e}.", 32) for e in range(experts)]
            if experts
            else [(p + "mlp.", 96)]
        ):
            shapes[q + "gate_proj.weight"] = shapes[q + "up_proj.weight"] = (f, 64)
            shapes[q + "down_proj.weight"] = (64, f)
        if experts:
            shapes[p + "mlp.gate.weight"] = (experts, 64)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{p}{norm}.weight"] = (64,)
    return shapes


EXPERT_KEYS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PLAIN = [
    ("llama", {}, plain_shapes()),
    ("llama", {"tie_word_embeddings": True, "head_dim": 8}, plain_shapes(head_dim=8, tied=True)),
    ("qwen2", {}, plain_shapes(qkv_bias=True)),
    ("qwen3", {"head_dim": 24}, plain_shapes(qk_norm=24, head_dim=24)),
    ("qwen3_moe", {"head_dim": 24, **EXPERT_KEYS}, plain_shapes(24, 24, experts=6)),
]


@pytest.mark.parametrize(("model_type", "extra", "shapes"), PLAIN)
def test_plain_models_are_claimed_promised_and_shaped(
    model_type: str, extra: dict[str, Any], shapes: Shapes
) -> None:
    config = {"model_type": model_type, **SMALL, **extra}
    family = find_family(config)
    dims = family.dimensions(config)
    assert family.model_type == model_type
    assert [n for n in shapes if family.claim(n) is None] == []
    assert family.missing(shapes, dims) == []
    assert family.contradictions(shapes, dims) == []
    for name in shapes:
        rest = shapes.keys() - {name}
        assert family.missing(rest, dims) == [name]
        wrong = {**shapes, name: (*shapes[name], 1)}
        (message,) = family.contradictions(wrong, dims)
        assert message.startswith(name)


def test_biases_follow_the_config() -> None:
    config = {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True}
    family = find_family(config)
    missing = family.missing(plain_shapes(), family.dimensions(config))
    assert len(missing) == 2 * (4 + 3)
    assert all(n.endswith(".bias") for n in missing)
    bias = family.claim("model.layers.0.self_attn.q_proj.bias")
    assert bias is not None
    assert (bias.claim.role, bias.group_key) == ("bias", "")


def test_rotary_leftovers_are_claimed_and_never_missing() -> None:
    found = claimed("llama", "model.layers.1.self_attn.rotary_emb.inv_freq")
    assert (found.claim.role, found.claim.is_linear) == ("rotary", False)


def test_qwen3_moe_layers_may_be_dense() -> None:
    config = {
        "model_type": "qwen3_moe",
        **SMALL,
        **EXPERT_KEYS,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
    }
    family = find_family(config)
    dims = family.dimensions(config)
    assert dims.has_experts == (False, False, False, True)
    missing = family.missing((), dims)
    assert "model.layers.1.mlp.down_proj.weight" in missing
    assert "model.layers.3.mlp.experts.5.down_proj.weight" in missing
    (message,) = family.contradictions({"model.layers.0.mlp.gate.weight": (6, 64)}, dims)
    assert "decoder_sparse_step" in message


@pytest.mark.parametrize(
    ("folder", "count", "parameters"),
    [
        ("Qwen--Qwen3-30B-A3B", 18_867, 30_532_122_624),
        ("nvidia--Qwen3-235B-A22B-NVFP4", 36_945, 235_093_634_560),
        ("Qwen--Qwen3-32B-FP8", 707, 32_762_123_264),
    ],
)
def test_promised_qwen3_tensors_add_up_to_the_published_totals(
    folder: str, count: int, parameters: int
) -> None:
    config = load(folder)
    family = find_family(config)
    dims = family.dimensions(config)
    names = family.missing((), dims)
    assert len(names) == count
    assert sum(math.prod(family.expected_shape(n, dims) or ()) for n in names) == parameters


# --- config.json itself


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "head_dim",
        "num_key_value_heads",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    config = load(MOE)
    config["text_config"] = without(config["text_config"], key)
    with pytest.raises(ModelError, match=f"text_config.{key} is missing"):
        find_family(config).dimensions(config)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("hidden_size", "2048", "an integer"),
        ("hidden_size", True, "an integer"),
        ("num_key_value_heads", 0, "1 or more"),
        ("num_experts", None, "found None"),
        ("attn_output_gate", 1, "true or false"),
        ("tie_word_embeddings", "no", "true or false"),
        ("mtp_num_hidden_layers", -1, "0 or more"),
        ("layer_types", ["full_attention"], "1 entries.*num_hidden_layers is 40"),
        ("layer_types", ["sliding_attention"] * 40, "sliding_attention"),
        ("layer_types", "full", "a list"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: object, complaint: str) -> None:
    config = load(MOE)
    config["text_config"] |= {key: value}
    with pytest.raises(ModelError, match=f"text_config.{key}.*{complaint}"):
        find_family(config).dimensions(config)


def test_layer_types_may_come_from_the_interval() -> None:
    config = load(MOE)
    family = find_family(config)
    expected = family.dimensions(config)
    config["text_config"] = without(config["text_config"], "layer_types")
    assert family.dimensions(config) == expected
    config["text_config"] = without(config["text_config"], "full_attention_interval")
    with pytest.raises(ModelError, match="layer_types is missing"):
        family.dimensions(config)


def test_a_flat_config_says_the_same_as_a_nested_one() -> None:
    nested = load(MOE)
    family = find_family(nested)
    flat = {**nested["text_config"], "vision_config": nested["vision_config"]}
    assert find_family(flat) is family
    assert family.dimensions(flat) == family.dimensions(nested)
    with pytest.raises(ModelError, match="json: hidden_size is missing"):
        family.dimensions(without(flat, "hidden_size"))


@pytest.mark.parametrize("level", ["top", "text"])
def test_either_level_may_tie_the_head(level: str) -> None:
    config = load("Qwen--Qwen3.5-35B-A3B")
    family, shapes = find_family(config), bf16_shapes(config, **AS_3_5)
    del shapes["lm_head.weight"]
    assert family.missing(shapes, family.dimensions(config)) == ["lm_head.weight"]
    (config if level == "top" else config["text_config"])["tie_word_embeddings"] = True
    dims = family.dimensions(config)
    assert dims.tied
    assert family.missing(shapes, dims) == []


def test_old_llama_configs_leave_heads_out() -> None:
    config = without({"model_type": "llama", **SMALL}, "num_key_value_heads")
    family = find_family(config)
    dims = family.dimensions(config)
    assert (dims.kv_heads, dims.head_dim) == (4, 16)
    with pytest.raises(ModelError, match="head_dim is missing"):
        family.dimensions({**config, "num_attention_heads": 5})


# --- finding a family


def test_text_types_are_aliases() -> None:
    for alias, model_type in ALIASES.items():
        assert find_family({"model_type": alias}) is FAMILIES[model_type]
        assert find_family({"text_config": {"model_type": alias}}) is FAMILIES[model_type]


def test_an_unknown_type_is_refused_by_name_with_a_way_out() -> None:
    with pytest.raises(ModelError) as refusal:
        find_family({"model_type": "gemma4"})
    for word in ("'gemma4'", "qwen3_5_moe", "llama", "--generic", "inspect", "diff"):
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", "interleaved"),
        ("qwen4_exp", "hyper-connections"),
        ("qwen4_exp_text", "hyper-connections"),
    ],
)
def test_a_look_alike_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"{model_type}.*refused.*{reason}"):
        find_family({"model_type": model_type})


def test_model_types_must_agree() -> None:
    with pytest.raises(ModelError, match="qwen3_5_text"):
        find_family({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_text"}})


@pytest.mark.parametrize(
    "config", [{}, {"model_type": 3}, {"model_type": "llama", "text_config": []}]
)
def test_a_config_without_a_type_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json: (model_type|text_config) must be"):
        find_family(config)


# --- the generic family


def generic_tensors() -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    yield "transformer.wte.weight", ("BF16", (320, 64))
    yield "transformer.ln_f.weight", ("BF16", (64,))
    yield "output.weight", ("BF16", (320, 64))
    yield "vision_tower.layers.0.fc.weight", ("BF16", (64, 64))
    yield "mtp.layers.0.fc.weight", ("BF16", (64, 128))
    for i in range(2):
        p = f"model.layers.{i}."
        yield p + "self_attn.q_proj.weight", ("BF16", (64, 64))
        yield p + "self_attn.q_proj.bias", ("BF16", (64,))
        yield p + "self_attn.q_proj.lora_A.weight", ("BF16", (8, 64))
        yield p + "self_attn.k_proj.weight", ("BF16", (32, 64))
        yield p + "self_attn.rotary_emb.inv_freq", ("F32", (8,))
        yield p + "self_attn.sinks", ("F32", (4,))
        yield p + "mlp.router.weight", ("BF16", (4, 64))
        yield p + "mlp.shared_expert_gate.weight", ("BF16", (1, 64))
        yield p + "mlp.stack", ("BF16", (4, 64, 64))
        yield p + "mlp.packed.weight", ("U8", (64, 32))
        yield p + "conv.weight", ("BF16", (64, 1, 4))
        yield p + "sometimes.weight", ("BF16", (64, 64) if i else (64,))
        for e in range(2):
            for name in ("w1", "w2", "w3"):
                yield f"{p}moe.experts.{e}.{name}.weight", ("F16", (64, 64))


def test_generic_quantizes_matrices_and_copies_the_rest() -> None:
    family = generic_family(dict(generic_tensors()))
    found: dict[str, set[str]] = {}
    for name, _ in generic_tensors():
        tensor = family.claim(name)
        assert tensor is not None
        assert tensor.claim.is_linear == (tensor.claim.role == "linear")
        found.setdefault(tensor.claim.role, set()).add(".".join(name.split(".")[-2:]))
    assert found == {
        "embedding": {"wte.weight"},
        "norm": {"ln_f.weight"},
        "lm_head": {"output.weight"},
        "vision": {"fc.weight"},
        "mtp": {"fc.weight"},
        "bias": {"q_proj.bias"},
        "rotary": {"rotary_emb.inv_freq"},
        "router": {"router.weight", "shared_expert_gate.weight"},
        "linear": {"q_proj.weight", "k_proj.weight", "w1.weight", "w2.weight", "w3.weight"},
        "other": {
            "lora_A.weight",
            "self_attn.sinks",
            "mlp.stack",
            "packed.weight",
            "conv.weight",
            "sometimes.weight",
        },
    }


def test_generic_fuses_siblings_and_counts_layers_and_experts() -> None:
    family = generic_family(dict(generic_tensors()))
    q = family.claim("model.layers.1.self_attn.q_proj.weight")
    w3 = family.claim("model.layers.1.moe.experts.0.w3.weight")
    w2 = family.claim("model.layers.1.moe.experts.0.w2.weight")
    assert q is not None
    assert w3 is not None
    assert w2 is not None
    assert q.group_key == "model.layers.1.self_attn:qkv"
    assert w3.group_key == "model.layers.1.moe.experts.0:gate_up"
    assert w2.group_key == ""
    assert (w3.layer, w3.expert) == (1, 0)


def test_generic_promises_nothing() -> None:
    tensors = dict(generic_tensors())
    family = generic_family(tensors)
    dims = family.dimensions({"anything": "at all"})
    assert family.missing((), dims) == []
    assert family.contradictions({n: s for n, (_, s) in tensors.items()}, dims) == []


def test_generic_refuses_a_transposed_weight() -> None:
    with pytest.raises(ModelError, match=r"h\.0\.attn\.c_attn\.weight.*transposed"):
        generic_family(
            {
                "h.0.attn.c_attn.weight": ("F32", (64, 192)),
                "h.0.attn.c_attn.bias": ("F32", (192,)),
            }
        )


def test_generic_finds_the_linears_that_the_family_knows() -> None:
    """On a known model, the rules by name agree with the facts, stacks and the head aside."""
    config = load(MOE)
    family, shapes = find_family(config), bf16_shapes(config, **SPLIT)
    generic = generic_family({n: ("BF16", s) for n, s in shapes.items()})
    for name in shapes:
        known, guess = family.claim(name), generic.claim(name)
        assert known is not None
        assert guess is not None
        is_body = known.claim.is_linear and known.claim.role not in (
            "lm_head",
            "linear_attention_gate",
            "mtp",
        )
        assert guess.claim.is_linear == is_body, name
        if known.claim.group not in ("", "ba") and known.claim.role != "mtp":
            assert guess.group_key == known.group_key


def test_families_need_no_torch() -> None:
    code = "import sys, nybble.families; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
