"""What configuration files say of quantization: every published spelling, and disagreements."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nybble.checkpoint.compressed_tensors import CompressedTensors
from nybble.checkpoint.declaration import Declaration
from nybble.checkpoint.dialects import declaration_of, read_declaration
from nybble.checkpoint.layout import Layout, Listing
from nybble.checkpoint.modelopt import ModelOpt
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError
from nybble.formats.scheme import NVFP4_W4A4, NVFP4_W4A16, SCHEMES

CONFIGS = Path(__file__).resolve().parents[1] / "fixtures" / "configs"
LAYER = "model.language_model.layers.3"
EXPERT = f"{LAYER}.mlp.experts.7.gate_proj"


def published(folder: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    config, nested = (CONFIGS / folder / name for name in ("config.json", "hf_quant_config.json"))
    return json.loads(config.read_text()), (
        json.loads(nested.read_text()) if nested.exists() else None
    )


def read(folder: str) -> Declaration:
    return read_declaration(*published(folder))


def transcribed(name: str) -> Declaration:
    return read_declaration(json.loads((CONFIGS / "transcribed" / name).read_text()), None)


def says(declaration: Declaration, modules: Iterable[str]) -> list[str]:
    return [str(declaration.of(module)) for module in modules]


def modelopt(**flat: object) -> Declaration:
    section = {"quant_method": "modelopt", **flat}
    return read_declaration({"quantization_config": section}, None)


def compressed(groups: list[dict[str, Any]], **more: object) -> Declaration:
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        **more,
    }
    return read_declaration({"quantization_config": section}, None)


# ---------------------------------------------------------------------------------------- ModelOpt


def test_the_map_of_the_35b_counts_and_its_files_disagree_three_times() -> None:
    found = read("nvidia--Qwen3.6-35B-A3B-NVFP4")
    assert (found.layout, found.producer, found.kv_cache) == ("modelopt", "modelopt 0.44.0", "fp8")
    modules = (EXPERT, "lm_head", f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.gate", "mtp.fc")
    assert says(found, modules) == ["W4A16_NVFP4", "W4A16_NVFP4", "FP8", "None", "None"]
    expert = found.of(EXPERT)
    assert expert is not None
    assert (expert.scheme, expert.group_size, expert.activation) == ("nvfp4-w4a16", 16, "BF16")
    producer, kv_cache, group = found.disagreements
    assert "0.37.0" in producer
    assert "0.44.0" in producer
    assert "config.json says nothing, hf_quant_config.json says fp8" in kv_cache
    assert "group_1 gives its 161 targets 4-bit input activations" in group
    assert "quantized_layers says W4A16_NVFP4; quantized_layers counts" in group


def test_a_consistent_pair_has_no_disagreement() -> None:
    found = read("nvidia--Qwen3.6-27B-NVFP4")
    assert found.disagreements == ()
    assert says(found, ("lm_head", f"{LAYER}.mlp.up_proj")) == ["W4A16_NVFP4"] * 2


@pytest.mark.parametrize("file", [0, 1])
def test_the_map_counts_in_either_file(file: int) -> None:
    config, nested = published("nvidia--Qwen3.6-35B-A3B-NVFP4")
    assert nested is not None
    sections = config["quantization_config"], nested["quantization"]
    del sections[1 - file]["quantized_layers"]
    assert str(read_declaration(config, nested).of(EXPERT)) == "W4A16_NVFP4"


def test_without_any_map_the_targets_of_the_groups_count() -> None:
    config, _ = published("nvidia--Qwen3.6-27B-NVFP4")
    del config["quantization_config"]["quantized_layers"]
    found = read_declaration(config, None)
    modules = ("lm_head", f"{LAYER}.self_attn.k_proj", f"{LAYER}.input_layernorm")
    assert says(found, modules) == ["W4A16_NVFP4", "FP8", "None"]


@pytest.mark.parametrize(("folder", "mtp_fc"), [("122B-A10B", "None"), ("397B-A17B", "NVFP4")])
def test_uniform_files_declare_all_linears_but_those_their_globs_name(
    folder: str, mtp_fc: str
) -> None:
    found = read(f"nvidia--Qwen3.5-{folder}-NVFP4")
    assert found.disagreements == ()
    expert = found.of(EXPERT)
    assert expert is not None
    assert expert.by_class
    assert (expert.scheme, expert.activation) == ("nvfp4-w4a4", "FP4")
    plain = ("lm_head", f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.shared_expert.up_proj")
    assert says(found, (*plain, "model.visual.merger.linear_fc1", "mtp.fc")) == [
        *["None"] * 4,
        mtp_fc,  # the 397B excludes mtp.layers.0* only
    ]


def test_plain_exclusions_end_at_a_dot() -> None:
    found = read("nvidia--Qwen3-235B-A22B-NVFP4")  # quantization in hf_quant_config.json alone
    modules = ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "lm_head", "lm_head.x")
    assert says(found, modules) == ["None", "NVFP4", "None", "None"]


def test_the_flat_form_of_old_exports() -> None:
    found = read("Qwen--Qwen3-32B-FP8-Static-PerTensor")
    assert (found.layout, found.producer, found.kv_cache) == ("modelopt", "modelopt 0.31.0", "fp8")
    assert found.disagreements == ()
    declared = found.of("model.layers.0.mlp.up_proj")
    assert declared is not None
    assert (declared.scheme, declared.activation) == ("fp8-static", "FP8 static")
    assert found.of("lm_head") is None


def test_experts_may_be_listed_one_by_one_or_by_container() -> None:
    entry = {"quant_algo": "NVFP4", "group_size": 16}
    layers = {"layers.0.mixer.experts.0.up_proj": entry, "layers.1.mixer.experts": entry}
    found = modelopt(quant_algo="MIXED_PRECISION", quantized_layers=layers)
    modules = (
        "layers.0.mixer.experts.0.up_proj",
        "layers.0.mixer.experts.1.up_proj",
        "layers.1.mixer.experts.9.down_proj",
        "layers.1.mixer.experts_norm",
        "layers.11.mixer.experts.0.up_proj",
    )
    assert says(found, modules) == ["NVFP4", "None", "NVFP4", "None", "None"]


def test_an_exclusion_below_a_listed_container_counts_and_one_of_it_does_not() -> None:
    layers = {
        name: {"quant_algo": "NVFP4"} for name in ("layers.0.experts", "mtp.layers.0.experts")
    }
    ignore = ["layers.0.experts.5.*", "mtp*"]
    found = modelopt(quant_algo="MIXED_PRECISION", quantized_layers=layers, ignore=ignore)
    modules = ("layers.0.experts.4.up", "layers.0.experts.5.up", "mtp.layers.0.experts.0.up")
    assert says(found, modules) == ["NVFP4", "None", "NVFP4"]
    (line,) = found.disagreements
    assert "1 modules are listed" in line
    assert "'mtp.layers.0.experts' by 'mtp*'" in line


def test_deepseek_style_lays_the_map_over_block_fp8() -> None:
    found = modelopt(
        quant_method="fp8",
        quant_algo="MIXED_PRECISION",
        weight_block_size=[128, 128],
        activation_scheme="dynamic",
        moe_quant_algo="NVFP4",
        config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        quantized_layers={"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
        ignore=["*.attn.*", "head"],
    )
    assert found.layout == "modelopt"
    assert found.disagreements == ()
    modules = ("layers.0.ffn.experts.3.w1", "layers.0.attn.wq_a", "head")
    assert says(found, modules) == ["NVFP4", "fp8 128x128", "None"]


@pytest.mark.parametrize(
    ("algorithm", "scheme", "weight", "activation"),
    [
        ("NVFP4", "nvfp4-w4a4", "nvfp4", "FP4"),
        ("W4A16_NVFP4", "nvfp4-w4a16", "nvfp4", "BF16"),
        ("NVFP4_AWQ", "", "nvfp4", "FP4"),
        ("W4A8_NVFP4_FP8", "", "nvfp4/32", "FP8 static"),
        ("FP8", "fp8-static", "fp8", "FP8 static"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8-dynamic", "fp8_channel", "FP8 dynamic"),
        ("fp8_pb_wo", "fp8-block", "fp8_block", "FP8 dynamic"),  # lower case on disk
        ("mxfp4", "mxfp4-w4a16", "mxfp4", "BF16"),
        ("MXFP8", "", "mxfp8", "FP8 dynamic"),
        ("W4A16_AWQ", "", "int4", "BF16"),
        ("SOMETHING_NEW", "", "", ""),
    ],
)
def test_every_quant_algo(algorithm: str, scheme: str, weight: str, activation: str) -> None:
    declared = modelopt(quant_algo=algorithm).of("layers.0.up_proj")
    assert declared is not None
    found = (declared.spelling, declared.scheme, declared.weight, declared.activation)
    assert found == (algorithm, scheme, weight, activation)
    assert not scheme or str(getattr(SCHEMES[scheme].weight, "name", "")) == weight


def test_a_listed_module_may_be_none() -> None:
    layers = {"a": {"quant_algo": "NONE"}, "b": {"quant_algo": None}, "c": {"quant_algo": "FP8"}}
    found = modelopt(quant_algo="MIXED_PRECISION", quantized_layers=layers)
    assert says(found, "abc") == ["None", "None", "FP8"]


def test_files_that_disagree_say_so_once_each() -> None:
    config, nested = published("nvidia--Qwen3.6-27B-NVFP4")
    assert nested is not None
    said = nested["quantization"]
    del said["quantized_layers"]["lm_head"]
    said["quantized_layers"]["extra"] = {"quant_algo": "FP8"}
    said["exclude_modules"].append("more*")
    said["kv_cache_quant_algo"] = None
    found = read_declaration(config, nested)
    kv_cache, layers, excluded, *groups = found.disagreements
    assert "config.json says fp8, hf_quant_config.json says nothing" in kv_cache
    assert found.kv_cache == ""
    assert "2 entries differ, 'lm_head' for one: config.json says W4A16_NVFP4 group 16" in layers
    assert "hf_quant_config.json says nothing; config.json counts" in layers
    assert "0 entries only in config.json, 1 only in hf_quant_config.json, 'more*'" in excluded
    assert groups == []
    assert str(found.of("lm_head")) == "W4A16_NVFP4"


def test_groups_that_name_other_modules_or_other_bits_are_told() -> None:
    group = {"targets": ["a", "b"], "weights": {"num_bits": 8}}
    layers = {"a": {"quant_algo": "NVFP4"}}
    groups = {"group_0": group}
    found = modelopt(
        quant_algo="MIXED_PRECISION", quantized_layers=layers, config_groups=groups
    ).disagreements
    assert ["name different modules, 'b'" in line for line in found] == [True, False]
    assert "group_0 has 8-bit weights, quantized_layers says NVFP4" in found[1]
    uniform = modelopt(
        quant_algo="NVFP4",
        config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    )
    assert (
        "gives all targets no input activations, quant_algo says NVFP4"
        in (uniform.disagreements[0])
    )


# ------------------------------------------------------------------------------ compressed-tensors

FP8_GROUP = {
    "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}
NVFP4_GROUP = {
    "format": "nvfp4-pack-quantized",
    "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "input_activations": None,
}


def test_the_first_group_that_matches_wins_and_plain_entries_are_no_prefixes() -> None:
    found = transcribed("Qwen3.8-27B-compressed-tensors-mixed.json")
    assert (found.layout, found.kv_cache) == ("compressed-tensors", "fp8")
    base = "model.language_model.layers"
    fp8, nvfp4 = found.of(f"{base}.60.mlp.up_proj"), found.of(f"{base}.6.mlp.up_proj")
    assert fp8 is not None
    assert nvfp4 is not None
    assert (fp8.scheme, nvfp4.scheme) == ("fp8-dynamic", "nvfp4-w4a4")
    # `layers.0.linear_attn` is ignored, and what lies below it is not.
    modules = (
        f"{base}.0.linear_attn",
        f"{base}.0.linear_attn.in_proj_qkv",
        f"{base}.0.linear_attn.in_proj_a",
        "mtp.layers.0.mlp.up_proj",
    )
    assert says(found, modules) == ["None", "float-quantized channel", "None", "None"]


def test_a_class_target_is_marked_and_ignore_wins() -> None:
    found = transcribed("Qwen3.6-35B-A3B-compressed-tensors-w4a4.json")
    expert = found.of(EXPERT)
    assert expert is not None
    assert (expert.scheme, expert.by_class) == ("nvfp4-w4a4", True)
    assert says(found, ("lm_head", f"{LAYER}.mlp.gate")) == ["None", "None"]


def test_expressions_are_anchored_at_the_start_only() -> None:
    found = compressed([NVFP4_GROUP | {"targets": ["re:model.*up"]}], ignore=["re:^mtp.*"])
    modules = ("model.layers.0.up_proj", "x.model.layers.0.up_proj", "mtp.model.up")
    assert says(found, modules) == ["nvfp4-pack-quantized", "None", "None"]


@pytest.mark.parametrize(
    ("weights", "inputs", "scheme", "weight", "activation"),
    [
        (NVFP4_GROUP["weights"], None, "nvfp4-w4a16", "nvfp4", "BF16"),
        (
            NVFP4_GROUP["weights"],
            {"num_bits": 4, "type": "float", "dynamic": "local"},
            "nvfp4-w4a4",
            "nvfp4",
            "FP4",
        ),
        (
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
            None,
            "mxfp4-w4a16",
            "mxfp4",
            "BF16",
        ),
        (
            {"num_bits": 8, "type": "float", "strategy": "tensor"},
            {"num_bits": 8, "type": "float", "dynamic": False},
            "fp8-static",
            "fp8",
            "FP8 static",
        ),
        (
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            {"num_bits": 8, "type": "float", "dynamic": True},
            "fp8-block",
            "fp8_block",
            "FP8 dynamic",
        ),
        (
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
            {"num_bits": 8, "type": "float", "dynamic": True},
            "",
            "mxfp8",
            "FP8 dynamic",
        ),
        ({"num_bits": 4, "type": "int", "group_size": 128}, None, "", "int4", "BF16"),
        (
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "dynamic": True},
            "",
            "int8",
            "INT8 dynamic",
        ),
    ],
)
def test_every_preset_of_compressed_tensors(
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    scheme: str,
    weight: str,
    activation: str,
) -> None:
    group = {"targets": ["up"], "weights": weights, "input_activations": inputs}
    declared = compressed([group]).of("up")
    assert declared is not None
    assert (declared.scheme, declared.weight, declared.activation) == (scheme, weight, activation)


def test_a_wrapped_model_may_say_it_in_its_text_config() -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["re:.*self_attn.*"],
    }
    found = read_declaration({"text_config": {"quantization_config": section}}, None)
    modules = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj")
    assert says(found, modules) == ["pack-quantized int4", "None"]


# --------------------------------------------------------------------------- fp8, and other methods


def test_block_fp8_of_the_publisher() -> None:
    found = read("Qwen--Qwen3-30B-A3B-FP8")
    assert found.layout == "fp8"
    declared = found.of("model.layers.0.mlp.experts.3.up_proj")
    assert declared is not None
    assert (declared.spelling, declared.scheme) == ("fp8 128x128", "fp8-block")
    assert found.of("model.layers.0.mlp.gate") is None
    assert read("Qwen--Qwen3-32B-FP8").of("lm_head") is None  # lists nothing at all


def test_fp8_without_blocks_and_with_odd_ones() -> None:
    def declared(**section: object) -> tuple[str, str, str]:
        config = {"quantization_config": {"quant_method": "fp8", **section}}
        found = read_declaration(config, None).of("a.up")
        assert found is not None
        return found.scheme, found.weight, found.activation

    assert declared(activation_scheme="static") == ("fp8-static", "fp8", "FP8 static")
    assert declared(activation_scheme="dynamic") == ("", "fp8", "FP8 dynamic")
    assert declared(weight_block_size=[1, 64]) == ("", "", "FP8 dynamic")


@pytest.mark.parametrize(
    ("method", "weight"), [("mxfp4", "mxfp4"), ("gptq", "int4"), ("odd", "int4")]
)
def test_an_unknown_method_is_named_and_not_judged(method: str, weight: str) -> None:
    section = {"quant_method": method, "bits": 4, "modules_to_not_convert": ["router"]}
    found = read_declaration({"quantization_config": section}, None)
    declared = found.of("layers.0.up")
    assert declared is not None
    assert (found.layout, declared.spelling, declared.weight) == (method, method, weight)
    assert found.of("layers.0.router") is None


def test_a_plain_checkpoint_declares_nothing() -> None:
    assert read("Qwen--Qwen3.5-35B-A3B") == Declaration()
    assert read_declaration({}, None).of("lm_head") is None


# ---------------------------------------------------------------------------------- what we write


@pytest.mark.parametrize("layout", [ModelOpt(), CompressedTensors()])
def test_what_nybble_writes_reads_back_without_a_disagreement(layout: Layout) -> None:
    base = "model.language_model.layers"
    quantized = {f"{base}.{i}.mlp.experts": NVFP4_W4A16 for i in (0, 1)}
    listing = Listing(
        quantized={**quantized, f"{base}.0.self_attn.q_proj": NVFP4_W4A4},
        expert_modules=dict.fromkeys(quantized, ["0.up_proj"]),
        plain=["lm_head"],
        plain_experts=[],
        others=[],
        has_mtp=True,
        has_vision=True,
        kv_cache="fp8",
        version="0",
    )
    documents = {k: json.loads(v) for k, v in layout.documents({}, listing).items()}
    found = read_declaration(documents["config.json"], documents.get("hf_quant_config.json"))
    assert found.disagreements == ()
    assert found.layout == layout.name
    assert found.kv_cache in ("fp8", "")  # a layout may leave it unsaid
    schemes = {
        f"{base}.1.mlp.experts.0.up_proj": "nvfp4-w4a16",
        f"{base}.0.self_attn.q_proj": "nvfp4-w4a4",
    }
    for module, scheme in schemes.items():
        declared = found.of(module)
        assert declared is not None
        assert declared.scheme == scheme
    assert says(found, ("lm_head", "mtp.fc", "model.visual.merger.linear_fc1")) == ["None"] * 3


# ------------------------------------------------------------------------------------- wrong types


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (3, "quantization_config must be an object"),
        ({"quant_algo": "FP8", "ignore": "lm_head"}, "config.json: ignore must be a list"),
        ({"quant_algo": "FP8", "quantized_layers": {"a": "FP8"}}, "quantized_layers: 'a' must be"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["re:("], "weights": {}}},
            },
            "config_groups.g.targets: 're:('",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": []}, "config_groups must be"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_place(section: object, expected: str) -> None:
    with pytest.raises(CheckpointError, match="config.json") as caught:
        read_declaration({"quantization_config": section}, None)
    assert expected in str(caught.value)


def test_the_files_of_a_folder_are_read(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    said = {"quantization": {"quant_algo": "FP8", "exclude_modules": []}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    with Checkpoint.open(tmp_path, headers_only=True) as checkpoint:
        assert str(declaration_of(checkpoint).of("up")) == "FP8"


#: Half of what the design allows for a whole inspection, on a loaded machine.
_SECONDS = 30.0


@pytest.mark.parametrize(
    "found",
    [
        read("nvidia--Qwen3.6-35B-A3B-NVFP4"),
        read("nvidia--Qwen3.5-397B-A17B-NVFP4"),
        transcribed("Qwen3.6-35B-A3B-compressed-tensors-mixed.json"),
    ],
)
def test_31_000_modules_are_not_quadratic(found: Declaration) -> None:
    modules = [
        f"model.language_model.layers.{layer}.mlp.experts.{expert}.{name}"
        for layer in range(40)
        for expert in range(256)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    start = time.process_time()
    assert all(found.of(module) for module in modules)
    assert time.process_time() - start < _SECONDS
