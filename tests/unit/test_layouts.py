"""The two containers: what their tensors are called, and what their configuration files make
readers believe.

Readers are simulated from their documented rules (docs/layouts.md), and tests/make_headers.py
rebuilds the whole list of tensors from the configuration alone: it must be the list that the plan
writes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import make_headers
import tiny
from nybble.api.plan import LAYOUTS, plan
from nybble.checkpoint.compressed_tensors import CompressedTensors
from nybble.checkpoint.layout import Layout
from nybble.checkpoint.modelopt import ModelOpt
from nybble.errors import RecipeError
from nybble.formats.scheme import SCHEMES
from nybble.plan.plan import Plan
from nybble.plan.recipe import parse_recipe
from readers import (
    ALGORITHM,
    ct_match,
    linear_modules,
    scheme_of_group,
    vllm_mixed,
)

MODELOPT, COMPRESSED = ModelOpt(), CompressedTensors()
N, K = 130, 288  # ragged against 128; K divides by 16 and 32

# ---------------------------------------------------------------------------------------- leaves

LEAVES: dict[tuple[str, str], list[tuple[str, str, tuple[int, ...]]]] = {
    ("modelopt", "nvfp4-w4a16"): [
        ("weight", "U8", (N, K // 2)),
        ("weight_scale", "F8_E4M3", (N, K // 16)),
        ("weight_scale_2", "F32", ()),
    ],
    ("modelopt", "nvfp4-w4a4"): [
        ("weight", "U8", (N, K // 2)),
        ("weight_scale", "F8_E4M3", (N, K // 16)),
        ("weight_scale_2", "F32", ()),
        ("input_scale", "F32", ()),
    ],
    ("modelopt", "fp8-static"): [
        ("weight", "F8_E4M3", (N, K)),
        ("weight_scale", "F32", ()),
        ("input_scale", "F32", ()),
    ],
    ("compressed-tensors", "nvfp4-w4a16"): [
        ("weight_packed", "U8", (N, K // 2)),
        ("weight_scale", "F8_E4M3", (N, K // 16)),
        ("weight_global_scale", "F32", (1,)),
    ],
    ("compressed-tensors", "nvfp4-w4a4"): [
        ("weight_packed", "U8", (N, K // 2)),
        ("weight_scale", "F8_E4M3", (N, K // 16)),
        ("weight_global_scale", "F32", (1,)),
        ("input_global_scale", "F32", (1,)),
    ],
    ("compressed-tensors", "mxfp4-w4a16"): [
        ("weight_packed", "U8", (N, K // 2)),
        ("weight_scale", "U8", (N, K // 32)),
    ],
    ("compressed-tensors", "fp8-static"): [
        ("weight", "F8_E4M3", (N, K)),
        ("weight_scale", "BF16", (1,)),
        ("input_scale", "BF16", (1,)),
    ],
    ("compressed-tensors", "fp8-dynamic"): [
        ("weight", "F8_E4M3", (N, K)),
        ("weight_scale", "BF16", (N, 1)),
    ],
    ("compressed-tensors", "fp8-block"): [
        ("weight", "F8_E4M3", (N, K)),
        ("weight_scale", "BF16", (2, 3)),
    ],
}


@pytest.mark.parametrize(("layout", "scheme"), LEAVES)
def test_a_module_becomes_the_documented_tensors(layout: str, scheme: str) -> None:
    leaves = LAYOUTS[layout].leaves(SCHEMES[scheme], (N, K))
    assert [(x.suffix, x.dtype, x.shape) for x in leaves] == LEAVES[layout, scheme]
    spec = leaves[0].spec("a.b")
    assert (spec.name, spec.nbytes) == (f"a.b.{leaves[0].suffix}", leaves[0].nbytes)
    assert [x.part for x in leaves][0] == "codes"
    assert {x.part for x in leaves if x.suffix.startswith("input")} <= {"input_scale"}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_scheme_has_tensors_or_a_refusal(layout: Layout) -> None:
    for scheme in SCHEMES.values():
        if scheme.weight is None:
            assert layout.refusal([scheme]) == ""
            with pytest.raises(RecipeError, match="no tensors of its own"):
                layout.leaves(scheme, (N, K))
        elif refusal := layout.refusal([scheme]):
            assert (layout.name, scheme.name) not in LEAVES
            assert scheme.name in refusal
            with pytest.raises(RecipeError, match=scheme.name):
                layout.leaves(scheme, (N, K))
        else:
            assert (layout.name, scheme.name) in LEAVES


def test_a_refusal_names_all_schemes_and_the_way_out() -> None:
    refusal = MODELOPT.refusal(
        [SCHEMES[n] for n in ("mxfp4-w4a16", "bf16", "fp8-block", "nvfp4-w4a16")]
    )
    assert "fp8-block, mxfp4-w4a16" in refusal
    assert "--layout compressed-tensors" in refusal


# ---------------------------------------------------------------------------------------- scales


def leaf(layout: Layout, scheme: str, part: str, shape: tuple[int, int] = (N, K)) -> Any:
    return next(x for x in layout.leaves(SCHEMES[scheme], shape) if x.part == part)


def test_modelopt_stores_multipliers_without_dimensions() -> None:
    scale = leaf(MODELOPT, "nvfp4-w4a16", "tensor_scale")
    stored = MODELOPT.store(scale, np.float32(0.1).reshape(1))
    assert (stored.dtype, stored.shape, stored.item()) == (np.float32, (), np.float32(0.1))
    assert MODELOPT.load(scale, stored) == np.float32(0.1)
    assert MODELOPT.round_scales(np.array([0.1], np.float32)) == np.array([0.1], np.float32)


@pytest.mark.parametrize("exponent", [-116, -60, -12, -1, 0, 3, 100])
def test_powers_of_two_survive_the_divisor(exponent: int) -> None:
    scale = leaf(COMPRESSED, "nvfp4-w4a16", "tensor_scale")
    value = np.float32(2.0**exponent)
    stored = COMPRESSED.store(scale, value)
    assert (stored.shape, stored.item()) == ((1,), 2.0**-exponent)
    loaded = COMPRESSED.load(scale, stored)
    assert (loaded.shape, loaded.item()) == ((), value)


def test_other_scales_come_back_within_one_unit_in_the_last_place() -> None:
    scale = leaf(COMPRESSED, "nvfp4-w4a16", "tensor_scale")
    for value in np.random.default_rng(1).lognormal(-8, 2, 1000).astype(np.float32):
        loaded = COMPRESSED.load(scale, COMPRESSED.store(scale, value))
        assert abs(loaded - value) <= np.spacing(value)


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-block", "fp8-static"])
def test_fp8_scales_are_rounded_before_they_make_codes(scheme: str) -> None:
    """What is stored is what the codes were made with: rounding again changes nothing."""
    scale = leaf(COMPRESSED, scheme, "tensor_scale")
    values = np.random.default_rng(2).lognormal(-8, 2, scale.shape).astype(np.float32)
    rounded = COMPRESSED.round_scales(values)
    stored = COMPRESSED.store(scale, rounded)
    assert stored.dtype == ml_dtypes.bfloat16
    assert stored.shape == scale.shape
    assert np.array_equal(COMPRESSED.load(scale, stored).reshape(scale.shape), rounded)
    powers = np.array([2.0**-116, 2.0**-9, 1, 2.0**100], np.float32)
    assert np.array_equal(COMPRESSED.round_scales(powers), powers)
    # Less than BF16 can hold: those weights are zeros in FP8 at any scale, and a scale of 0 would
    # be refused.
    tiny_scales = np.array([1e-42, 2.0**-133], np.float32)
    assert np.array_equal(COMPRESSED.round_scales(tiny_scales), [1, 2.0**-133])


# ------------------------------------------------------------------------------------- documents


def sections(found: Plan) -> tuple[dict[str, Any], dict[str, bytes]]:
    documents = found.layout.documents(found.checkpoint.config, found.listing("9.9"))
    return json.loads(documents["config.json"])["quantization_config"], documents


MIXED = (
    'roles = ["mlp", "routed_expert"]\nmodules = ["*.layers.1.*"]\nscheme = "nvfp4-w4a4"',
    'roles = ["mlp", "routed_expert", "lm_head"]\nscheme = "nvfp4-w4a16"',
    'roles = ["attention", "linear_attention"]\nmodules = ["*.o_proj", "*.out_proj"]\n'
    'scheme = "fp8-static"',
)
PARTIAL = (  # some layers, some of their modules; experts stay beside a quantized shared expert
    'roles = ["shared_expert", "mlp"]\nmodules = ["*.layers.[12].*"]\nscheme = "nvfp4-w4a16"',
    'roles = ["attention"]\nmodules = ["*.layers.1.*"]\nscheme = "nvfp4-w4a16"',
)
DYNAMIC = (
    'roles = ["mlp", "routed_expert"]\nmodules = ["*.layers.1.*"]\nscheme = "fp8-block"',
    'roles = ["mlp", "routed_expert"]\nscheme = "nvfp4-w4a4"',
    'roles = ["attention", "linear_attention"]\nscheme = "fp8-dynamic"',
    'roles = ["lm_head"]\nscheme = "mxfp4-w4a16"',
)
SHIPPED = ("nvfp4", "nvfp4-w4a4", "nvfp4-redhat", "nvfp4-experts-fp8", "nvfp4-all", "fp8", "mxfp4")
OWN = {"mixed": MIXED, "partial": PARTIAL, "dynamic": DYNAMIC}

Case = tuple[str, str, str]


def cases() -> list[Case]:
    found = []
    for family in tiny.FAMILIES:
        for recipe in (*SHIPPED, *OWN):
            for layout in LAYOUTS:
                foreign = recipe in ("fp8", "mxfp4", "nvfp4-experts-fp8", "dynamic")
                if layout == "modelopt" and foreign:
                    continue
                if recipe == "nvfp4-experts-fp8" and family not in tiny.EXPERTS:
                    continue
                if (
                    recipe == "partial" and family == "qwen3_moe"
                ):  # has neither shared expert nor MLP
                    continue
                found.append((family, recipe, layout))
    return found


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "paths": {
            family: tiny.checkpoint(
                folder / family, family, **({"vision": True} if family in tiny.HYBRIDS else {})
            )
            for family in tiny.FAMILIES
        },
        "plans": {},
    }


def plan_of(plans: dict[str, Any], family: str, recipe: str, layout: str) -> Plan:
    key = (family, recipe, layout)
    if key not in plans["plans"]:
        chosen: Any = recipe
        if recipe in OWN:
            text = "".join(f"[[rule]]\n{rule}\n" for rule in OWN[recipe])
            chosen = parse_recipe(recipe, text)
        plans["plans"][key] = plan(plans["paths"][family], chosen, layout=layout)
    found = plans["plans"][key]
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_config_json_keeps_every_other_key_as_it_was(plans: dict[str, Any], case: Case) -> None:
    found = plan_of(plans, *case)
    _, documents = sections(found)
    source = json.loads((found.checkpoint.path / "config.json").read_text("utf-8"))
    written = json.loads(documents["config.json"])
    assert list(written) == [*source, "quantization_config"]
    del written["quantization_config"]
    assert written == source
    assert b"12345678901234567890" in documents["config.json"] or case[0] not in tiny.HYBRIDS
    assert "ünïcode".encode() in documents["config.json"] or case[0] not in tiny.HYBRIDS


def test_a_leftover_section_is_replaced(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"quantization_config": {"old": 1}, **config}))
    for layout in LAYOUTS:
        section, _ = sections(plan(path, "nvfp4-all", layout=layout))
        assert "old" not in section


@pytest.mark.parametrize("case", [c for c in cases() if c[0] in tiny.HYBRIDS], ids="-".join)
def test_a_reader_rebuilds_the_tensors_from_the_configuration_alone(
    plans: dict[str, Any], case: Case
) -> None:
    found = plan_of(plans, *case)
    section, documents = sections(found)
    schemes = {job.scheme.name for job in found.jobs}
    if "mxfp4-w4a16" in schemes:
        return  # unknown to make_headers.py
    config = json.loads(documents["config.json"])
    quants = [section]
    if case[2] == "modelopt":
        quants.append(json.loads(documents["hf_quant_config.json"]))
    for quant in quants:
        rebuilt = make_headers.checkpoint(config, case[2], quant, residual_input_scale=False)
        assert {(o.name, o.dtype, o.shape) for o in found.outputs} == set(rebuilt)


# -------------------------------------------------------------------------------------- ModelOpt


def modelopt_cases() -> list[Case]:
    return [c for c in cases() if c[2] == "modelopt"]


@pytest.mark.parametrize("case", modelopt_cases(), ids="-".join)
def test_both_modelopt_files_say_the_same(plans: dict[str, Any], case: Case) -> None:
    flat, documents = sections(plan_of(plans, *case))
    assert sorted(documents) == ["config.json", "hf_quant_config.json"]
    nested = json.loads(documents["hf_quant_config.json"])
    assert list(nested) == ["producer", "quantization"]
    inner = nested["quantization"]
    assert set(inner) == {
        "quant_algo",
        "kv_cache_quant_algo",
        "exclude_modules",
        "quantized_layers",
    }
    assert set(flat) - {"kv_cache_scheme"} == {
        "quant_method",
        "quant_algo",
        "producer",
        "ignore",
        "config_groups",
        "quantized_layers",
    }
    assert flat["quant_method"] == "modelopt"
    assert flat["quant_algo"] == inner["quant_algo"] == "MIXED_PRECISION"
    wrote = {"name": "modelopt", "version": "nybble-9.9"}
    assert flat["producer"] == nested["producer"] == wrote
    assert flat["ignore"] == inner["exclude_modules"]
    assert flat["quantized_layers"] == inner["quantized_layers"]
    assert list(flat["quantized_layers"]) == sorted(flat["quantized_layers"])


@pytest.mark.parametrize("case", modelopt_cases(), ids="-".join)
def test_the_kv_cache_is_declared_in_both_files_or_in_none(
    plans: dict[str, Any], case: Case
) -> None:
    flat, documents = sections(plan_of(plans, *case))
    inner = json.loads(documents["hf_quant_config.json"])["quantization"]
    if case[1] == "nvfp4":
        assert flat["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
        assert inner["kv_cache_quant_algo"] == "FP8"
    else:
        assert "kv_cache_scheme" not in flat
        assert inner["kv_cache_quant_algo"] is None  # vLLM wants the key
    outputs = plan_of(plans, *case).outputs
    assert not any(o.name.endswith((".k_scale", ".v_scale")) for o in outputs)


@pytest.mark.parametrize("case", modelopt_cases(), ids="-".join)
def test_layers_are_listed_by_module_and_experts_by_container(
    plans: dict[str, Any], case: Case
) -> None:
    found = plan_of(plans, *case)
    flat, _ = sections(found)
    expected: dict[str, dict[str, object]] = {}
    for module, scheme in linear_modules(found).items():
        if scheme != "bf16":
            name = re.sub(r"(\.mlp\.experts)\.\d+\.\w+$", r"\1", module)
            expected[name] = {"quant_algo": ALGORITHM[scheme]}
            if scheme.startswith("nvfp4"):
                expected[name]["group_size"] = 16
    assert flat["quantized_layers"] == expected
    assert not any(re.search(r"\.experts\.\d", name) for name in flat["quantized_layers"])


@pytest.mark.parametrize("case", modelopt_cases(), ids="-".join)
def test_groups_are_true_to_the_layers(plans: dict[str, Any], case: Case) -> None:
    flat, _ = sections(plan_of(plans, *case))
    layers = flat["quantized_layers"]
    by_target = {}
    for name, group in flat["config_groups"].items():
        assert re.fullmatch(r"group_\d", name)
        assert group["targets"] == sorted(group["targets"])
        by_target.update(dict.fromkeys(group["targets"], group))
    assert by_target.keys() == layers.keys()
    for module, entry in layers.items():
        group = by_target[module]
        algorithm = entry["quant_algo"]
        bits = 8 if algorithm == "FP8" else 4
        numbers = {"dynamic": False, "num_bits": bits, "type": "float"}
        if bits == 4:
            numbers["group_size"] = 16
        assert group["weights"] == numbers
        if algorithm == "W4A16_NVFP4":  # or engines would run it as W4A4
            assert "input_activations" not in group
        else:
            assert group["input_activations"] == numbers


@pytest.mark.parametrize("case", modelopt_cases(), ids="-".join)
def test_only_the_mtp_head_and_outshone_experts_are_ignored(
    plans: dict[str, Any], case: Case
) -> None:
    flat, _ = sections(plan_of(plans, *case))
    expected = ["mtp*", "mtp.layers.0*"] if case[0] in tiny.HYBRIDS else []
    if case[0] == "qwen3_5_moe" and case[1] == "partial":
        # vLLM takes `.experts` for quantized as soon as a sibling such as the shared expert is.
        expected += [f"model.language_model.layers.{i}.mlp.experts" for i in (1, 2)]
    assert flat["ignore"] == expected


@pytest.mark.parametrize("case", modelopt_cases(), ids="-".join)
def test_vllm_resolves_every_module_to_what_was_written(plans: dict[str, Any], case: Case) -> None:
    found = plan_of(plans, *case)
    flat, _ = sections(found)
    for module, scheme in linear_modules(found).items():
        asked = re.sub(r"(\.mlp\.experts)\.\d+\.\w+$", r"\1", module)
        assert vllm_mixed(flat, asked) == ALGORITHM.get(scheme), module


# ---------------------------------------------------------------------------- compressed-tensors

TOP_FIELDS = {
    "quant_method",
    "format",
    "quantization_status",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "global_compression_ratio",
    "version",
    "sparsity_config",
    "transform_config",
}
GROUP_FIELDS = {"targets", "weights", "input_activations", "output_activations", "format"}
ARGUMENT_FIELDS = {
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
}


def compressed_cases() -> list[Case]:
    return [c for c in cases() if c[2] == "compressed-tensors"]


@pytest.mark.parametrize("case", compressed_cases(), ids="-".join)
def test_no_field_is_unknown_to_the_readers_and_every_group_is_a_preset(
    plans: dict[str, Any], case: Case
) -> None:
    found = plan_of(plans, *case)
    section, documents = sections(found)
    assert list(documents) == ["config.json"]
    assert set(section) <= TOP_FIELDS
    assert section["quant_method"] == "compressed-tensors"
    assert section["quantization_status"] == "compressed"
    assert section["global_compression_ratio"] is None
    groups = section["config_groups"]
    assert list(groups) == [f"group_{i}" for i in range(len(groups))]
    for group in groups.values():
        assert set(group) <= GROUP_FIELDS
        for key in ("weights", "input_activations"):
            assert set(group[key] or {}) <= ARGUMENT_FIELDS
        assert group["output_activations"] is None
        assert group["targets"]
    schemes = sorted(scheme_of_group(g) for g in groups.values())
    assert schemes == sorted({job.scheme.name for job in found.jobs})
    formats = {g["format"] for g in groups.values()}
    assert section["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")


@pytest.mark.parametrize("case", compressed_cases(), ids="-".join)
def test_no_kv_cache_is_declared_without_scales_and_the_plan_says_so(
    plans: dict[str, Any], case: Case
) -> None:
    made = plan_of(plans, *case)
    section, _ = sections(made)
    assert section["kv_cache_scheme"] is None
    assert any("KV cache" in note for note in made.notes) == bool(made.recipe.kv_cache)


@pytest.mark.parametrize("inside_vllm", [False, True])
@pytest.mark.parametrize("case", compressed_cases(), ids="-".join)
def test_targets_cover_the_quantized_modules_and_nothing_else(
    plans: dict[str, Any], case: Case, inside_vllm: bool
) -> None:
    found = plan_of(plans, *case)
    section, _ = sections(found)
    modules = linear_modules(found)
    kinds = {m.rpartition(".")[2] for m in modules}
    if case[0] in tiny.HYBRIDS:
        assert {"fc", "qkv", "linear_fc1", "lm_head", "in_proj_a", "embed_tokens"} <= kinds
    for module, scheme in modules.items():
        if inside_vllm and case[0] not in tiny.HYBRIDS:
            continue
        assert ct_match(section, module, inside_vllm=inside_vllm) == scheme, module


@pytest.mark.parametrize("case", compressed_cases(), ids="-".join)
def test_expressions_match_under_any_prefix(plans: dict[str, Any], case: Case) -> None:
    section, _ = sections(plan_of(plans, *case))
    entries = list(section["ignore"])
    for group in section["config_groups"].values():
        entries += group["targets"]
    assert len(set(entries)) == len(entries)
    for entry in entries:
        if entry.startswith("re:"):
            assert entry.startswith(("re:.*", "re:^mtp")), entry
        else:
            assert not set(entry) & set("*^$\\[]"), entry


def test_the_lists_of_a_uniform_recipe_stay_short(plans: dict[str, Any]) -> None:
    section, _ = sections(plan_of(plans, "qwen3_5_moe", "nvfp4-all", "compressed-tensors"))
    (group,) = section["config_groups"].values()
    assert len(group["targets"]) == 14  # 3 + 3 of experts, 4 + 3 of mixers, lm_head
    assert len(section["ignore"]) == 6  # router, gate, in_proj_a, in_proj_b, vision, MTP


def test_a_tower_with_layers_of_its_own_is_not_taken_along(tmp_path: Path) -> None:
    """`--generic`: a vision tower's `layers.#.self_attn.q_proj` looks like the language model's."""
    cfg = tiny.config("qwen3")
    cfg["model_type"] = "neverseen"
    values = tiny.tensors(cfg)
    for head in ("vision_tower.encoder.", "model.mtp."):
        for name in [n for n in values if ".self_attn." in n and "layers." in n]:
            values[name.replace("model.", head, 1)] = values[name]
    path = tiny.write(tmp_path / "m", cfg, values)
    for layout in LAYOUTS:
        found = plan(path, "nvfp4-all", layout=layout, generic=True)
        section, _ = sections(found)
        modules = linear_modules(found)
        assert modules["vision_tower.encoder.layers.0.self_attn.q_proj"] == "bf16"
        assert modules["model.mtp.layers.0.self_attn.q_proj"] == "bf16"
        assert modules["model.layers.0.self_attn.q_proj"] == "nvfp4-w4a16"
        for module, scheme in modules.items():
            if layout == "compressed-tensors":
                assert ct_match(section, module, inside_vllm=False) == scheme, module
            else:
                assert vllm_mixed(section, module) == ALGORITHM.get(scheme), module


def test_an_mtp_head_below_model_is_ignored_whole(tmp_path: Path) -> None:
    cfg = tiny.config("qwen3_5_moe")
    values = tiny.tensors(cfg)
    moved = {
        n.replace("mtp.", "model.mtp.", 1) if n.startswith("mtp.") else n: v
        for n, v in values.items()
    }
    path = tiny.write(tmp_path / "m", cfg, moved)
    found = plan(path, "nvfp4-all", layout="compressed-tensors")
    section, _ = sections(found)
    for module, scheme in linear_modules(found).items():
        assert ct_match(section, module, inside_vllm=False) == scheme, module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_their_own_tensors_are_declared_like_stacks(tmp_path: Path, layout: str) -> None:
    made = []
    for stacked in (True, False):
        path = tiny.checkpoint(tmp_path / str(stacked), "qwen3_5_moe", stacked=stacked)
        section, _ = sections(plan(path, "nvfp4", layout=layout))
        made.append(section)
    assert json.dumps(made[0], sort_keys=True) == json.dumps(made[1], sort_keys=True)


def test_generic_experts_are_declared_one_by_one(tmp_path: Path) -> None:
    cfg = tiny.config("qwen3_moe")
    cfg["model_type"] = "neverseen"
    path = tiny.write(tmp_path / "m", cfg, tiny.tensors(cfg))
    text = '[[rule]]\nroles = ["linear"]\nmodules = ["*.layers.1.*"]\nscheme = "nvfp4-w4a16"'
    for layout in LAYOUTS:
        found = plan(path, parse_recipe("mine", text), layout=layout, generic=True)
        section, _ = sections(found)
        for module, scheme in linear_modules(found).items():
            if layout == "compressed-tensors":
                assert ct_match(section, module, inside_vllm=False) == scheme, module
            else:
                assert vllm_mixed(section, module) == ALGORITHM.get(scheme), module


def test_documents_are_written_as_hugging_face_does(plans: dict[str, Any]) -> None:
    _, documents = sections(plan_of(plans, "qwen3_5", "nvfp4", "modelopt"))
    for data in documents.values():
        assert data.endswith(b"}\n")
        assert data.startswith(b'{\n  "')
