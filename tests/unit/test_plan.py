"""What a plan says of published checkpoints, from headers alone, and what it refuses.

The numbers of the releases come from their configurations through tests/make_headers.py, which
shares no code with nybble.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from nybble.api.plan import LAYOUTS, as_json, data_free_form, plan, totals
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import FormatError, ModelError, NybbleError, RecipeError
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import parse_recipe

A35 = "nvidia--Qwen3.6-35B-A3B-NVFP4"  # the BF16 original is made from its configuration
B27 = "nvidia--Qwen3.6-27B-NVFP4"
OLD35 = "Qwen--Qwen3.5-35B-A3B"

LAYERS, ATTENTION, DELTA, EXPERTS = 40, 10, 30, 256  # of the 35B
MATRICES = 3 * EXPERTS * LAYERS  # of routed experts


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(name: str, data: str = "none", **options: Any) -> Path:
        key = f"{name}-{data}-{sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("headers")
            made[key] = tiny.published(folder, name, data=data, **options)
        return made[key]

    return make


def recipe_of(*rules: str) -> Any:
    return parse_recipe("mine", "".join(f"[[rule]]\n{rule}\n" for rule in rules))


def plan_of(path: Path, *rules: str, layout: str = "modelopt", generic: bool = False) -> Plan:
    return plan(path, recipe_of(*rules), layout=layout, generic=generic)


def refused(kind: type[NybbleError], path: Path, *rules: str, **options: Any) -> str:
    with pytest.raises(kind) as found:
        plan_of(path, *(rules or ('roles = ["mlp"]\nscheme = "nvfp4-w4a16"',)), **options)
    return str(found.value)


# ------------------------------------------------------------------------------ published models


@pytest.mark.parametrize("data", ["none", "sparse"])
def test_the_published_mix_of_the_35b_to_the_byte(headers: Callable[..., Path], data: str) -> None:
    """The release's 23,407,580,856 less one residual input_scale of 4 bytes for each of its 30,841
    W4A16 modules."""
    found = plan(headers(A35, data), "nvfp4")
    sums = totals(found)
    assert sums.source_tensors == 1045
    assert sums.source_bytes == 71_903_645_408
    assert sums.bytes == 23_407_457_492 == 23_407_580_856 - 4 * 30_841
    assert sums.tensors == 124_468 - 30_841
    assert sums.parameters == 35_951_822_704
    assert sums.active_parameters == 2_946_429_568
    assert sums.hub_parameters == 18_683_860_336
    assert found.notes == ()


def test_the_published_mix_of_the_27b_to_the_byte(headers: Callable[..., Path]) -> None:
    sums = totals(plan(headers(B27), "nvfp4"))
    assert sums.source_bytes == 55_562_855_904
    assert sums.bytes == 21_921_427_300 == 21_921_428_072 - 4 * 193
    assert sums.tensors == 2_194 - 193
    assert sums.parameters == 27_781_427_952
    assert sums.hub_parameters == 18_164_649_200


def test_active_parameters_of_the_35b_are_the_trunk_with_eight_of_its_experts(
    headers: Callable[..., Path],
) -> None:
    """No embedding (a look-up of one row), no MTP head, no tower; every norm and every router."""
    h, vocab = 2048, 248_320
    attention = h * (8192 + 512 + 512) + 4096 * h + 2 * 256
    delta = h * (8192 + 4096 + 32 + 32) + 4096 * h + 8192 * 4 + 32 + 32 + 128
    layer = (
        8 * 3 * 512 * h + 3 * 512 * h + h + EXPERTS * h + 2 * h
    )  # experts, shared, gate, router, norms
    expected = LAYERS * layer + ATTENTION * attention + DELTA * delta + h + vocab * h
    assert expected == 2_946_429_568
    assert totals(plan(headers(A35), "nvfp4")).active_parameters == expected


def test_the_data_free_form_keeps_the_static_fp8_roles_in_bf16(
    headers: Callable[..., Path],
) -> None:
    """One byte per weight becomes two, and the two scalars of each module go."""
    linears = DELTA * 2048 * (8192 + 4096 + 4096) + ATTENTION * 2048 * (8192 + 512 + 512 + 4096)
    modules = 3 * DELTA + 4 * ATTENTION
    found = plan(headers(A35), "nvfp4")
    free = data_free_form(found)
    assert free is not None
    assert free.payload_bytes == found.payload_bytes + linears - 8 * modules == 24_686_719_172
    assert free.payload_bytes == plan(headers(A35), "nvfp4", data_free=True).payload_bytes
    document = as_json(found, free)
    assert document["needs_data"] is True
    assert document["data_free"] == asdict(totals(free))
    kept = {r.role: r for r in free.rows if not r.scheme.weight}
    assert kept["attention"].bytes == kept["attention"].source_bytes
    assert data_free_form(plan(headers(A35), "nvfp4-w4a4")) is None
    alone = plan(headers(A35), "nvfp4-all")
    assert data_free_form(alone) is alone
    assert as_json(alone, alone)["data_free"] is None


def test_redhats_recipe_reaches_redhats_size(headers: Callable[..., Path]) -> None:
    for layout in LAYOUTS:
        assert plan(headers(A35), "nvfp4-redhat", layout=layout).payload_bytes == 25_025_991_648


def test_experts_with_dynamic_fp8_beside_them_explain_every_byte(
    headers: Callable[..., Path],
) -> None:
    """25,200,070,368 bytes are codes, block scales and copies; the rest are the scales per module
    and per row."""
    scalars = MATRICES * (4 + 4)  # weight_global_scale and input_global_scale, F32
    attention_rows = ATTENTION * (8192 + 512 + 512 + 2048) * 2  # one BF16 scale per output row
    shared_rows = LAYERS * (512 + 512 + 2048) * 2
    found = plan(headers(A35), "nvfp4-experts-fp8", layout="compressed-tensors")
    expected = 25_200_070_368 + scalars + attention_rows + shared_rows
    assert found.payload_bytes == expected == 25_200_787_168


def test_four_bits_cost_four_and_a_half(headers: Callable[..., Path]) -> None:
    row = next(r for r in plan(headers(A35), "nvfp4-all").rows if r.role == "routed_expert")
    matrix = 512 * 2048
    assert row.modules == MATRICES
    assert row.tensors == 2 * LAYERS
    assert row.bits_per_weight == pytest.approx(4.5 + 32 / matrix)
    assert row.parameters == MATRICES * matrix
    assert row.active == row.parameters * 8 // EXPERTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [A35, B27])
@pytest.mark.parametrize(
    "recipe",
    ["nvfp4", "nvfp4-all", "nvfp4-redhat", "nvfp4-w4a4", "nvfp4-experts-fp8", "fp8", "mxfp4"],
)
def test_every_tensor_is_taken_once_and_every_byte_is_in_a_row(
    headers: Callable[..., Path], name: str, recipe: str, layout: str
) -> None:
    try:
        found = plan(headers(name), recipe, layout=layout)
    except RecipeError:  # FP8 and MXFP4 in ModelOpt, experts in a dense model: tested below
        return
    taken = Counter(c.tensor.name for c in found.copies)
    rows: Counter[str] = Counter()
    for job in found.jobs:
        for m in job.members:
            rows[m.source] += m.shape[0] * m.shape[1]
    for source, n in rows.items():
        assert found.checkpoint.tensors[source].size == n, source
        taken[source] += 1
    assert taken == Counter(found.checkpoint.tensors.keys())
    outputs = found.outputs
    assert len({o.name for o in outputs}) == len(outputs)
    assert sum(o.nbytes for o in outputs) == sum(r.bytes for r in found.rows)
    assert sum(o.nbytes for o in outputs) == found.payload_bytes
    assert sum(r.tensors for r in found.rows) == len(found.checkpoint.tensors)
    assert sum(r.source_bytes for r in found.rows) == sum(
        t.nbytes for t in found.checkpoint.tensors.values()
    )
    modules = {m.module for job in found.jobs for m in job.members}
    assert len(modules) == sum(len(job.members) for job in found.jobs)
    assert not any(m.startswith(("mtp.", "model.visual.")) for m in modules)


def test_fused_groups_are_those_of_the_engines(headers: Callable[..., Path]) -> None:
    found = plan(headers(A35), "nvfp4-all")
    endings = Counter(tuple(m.module.rpartition(".")[2] for m in job.members) for job in found.jobs)
    assert endings == {
        ("gate_proj", "up_proj"): (EXPERTS + 1) * LAYERS,
        ("down_proj",): (EXPERTS + 1) * LAYERS,
        ("k_proj", "q_proj", "v_proj"): ATTENTION,  # in the order of the file
        ("o_proj",): ATTENTION,
        ("in_proj_qkv", "in_proj_z"): DELTA,
        ("out_proj",): DELTA,
        ("lm_head",): 1,
    }
    base = "model.language_model.layers.3.mlp.experts.7"
    pair = next(j for j in found.jobs if j.name == f"{base}:gate_up")
    assert [(m.module, m.source, m.expert, m.first_row, m.shape) for m in pair.members] == [
        (f"{base}.gate_proj", f"{base[:-2]}.gate_up_proj", 7, 0, (512, 2048)),
        (f"{base}.up_proj", f"{base[:-2]}.gate_up_proj", 7, 512, (512, 2048)),
    ]


def test_the_35_release_keeps_its_float32_states_and_split_mtp_experts(
    headers: Callable[..., Path],
) -> None:
    found = plan(headers(OLD35, fused_mtp=False, f32_gdn=True), "nvfp4")
    assert len(found.checkpoint.tensors) == 1811
    wide = {c.tensor.name for c in found.copies if c.tensor.dtype == "F32"}
    assert len(wide) == 2 * DELTA
    outputs = {o.name: o for o in found.outputs}
    assert all(outputs[name].dtype == "F32" for name in wide)
    assert {r.dtype for r in found.rows if r.role == "linear_attention_state"} == {"F32", "BF16"}
    mtp = [c.tensor.name for c in found.copies if c.role == "mtp"]
    assert "mtp.layers.0.mlp.experts.255.up_proj.weight" in mtp


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen--Qwen3.5-122B-A10B", {"fused_mtp": False, "f32_gdn": True}),
        ("Qwen--Qwen3.5-397B-A17B", {"fused_mtp": False, "f32_gdn": True}),
        ("Qwen--Qwen3.5-27B", {"f32_gdn": True}),
    ],
)
def test_the_other_releases_plan_without_a_change(
    headers: Callable[..., Path], name: str, options: dict[str, Any]
) -> None:
    found = plan(headers(name, **options), "nvfp4")
    assert found.notes == ()
    assert found.payload_bytes < 0.42 * sum(t.nbytes for t in found.checkpoint.tensors.values())


def test_a_recipe_of_four_bit_activations_fits_dense_models_and_mixtures(
    headers: Callable[..., Path],
) -> None:
    for name, role in ((A35, "routed_expert"), (B27, "mlp")):
        found = plan(headers(name), "nvfp4-w4a4")
        assert {job.role for job in found.jobs} == {role}
        assert any(o.name.endswith(".input_scale") for o in found.outputs)


def test_plans_of_equal_inputs_have_equal_digests_and_others_differ(
    headers: Callable[..., Path],
) -> None:
    path = headers(B27)
    digests = [
        plan(path, recipe, layout=layout).digest()
        for recipe, layout in (
            ("nvfp4", "modelopt"),
            ("nvfp4", "compressed-tensors"),
            ("nvfp4-all", "modelopt"),
            ("fp8", "compressed-tensors"),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert plan(path, "nvfp4").digest() == digests[0]


# ------------------------------------------------------------------------------------- refusals


def changed(
    tmp_path: Path,
    family: str,
    change: Callable[[dict[str, Any], tiny.Tensors], None],
    **options: Any,
) -> Path:
    """A tiny checkpoint after `change(config, tensors)`."""
    own = {k: options.pop(k) for k in ("stacked", "prefix") if k in options}
    cfg = tiny.config(family, **options)
    values = tiny.tensors(cfg, **own)
    change(cfg, values)
    return tiny.write(tmp_path / "model", cfg, values)


def test_a_tensor_that_nobody_claims_stops_with_its_name(tmp_path: Path) -> None:
    def add(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        values["model.layers.0.mlp.surprise"] = values["model.norm.weight"]

    said = refused(ModelError, changed(tmp_path, "qwen3", add))
    assert "'model.layers.0.mlp.surprise'" in said
    assert "qwen3" in said
    assert "--generic" in said


def test_a_shape_that_contradicts_the_configuration_is_named_with_both(tmp_path: Path) -> None:
    def cut(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        name = "model.layers.1.self_attn.k_proj.weight"
        values[name] = values[name][:-1]

    said = refused(ModelError, changed(tmp_path, "qwen3", cut))
    assert "layers.1.self_attn.k_proj.weight" in said
    assert "[32, 96]" in said
    assert "[31, 96]" in said
    assert "num_key_value_heads" in said


def test_a_missing_projection_stops_with_its_name(tmp_path: Path) -> None:
    def lose(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        del values["model.layers.1.self_attn.k_proj.weight"]

    said = refused(ModelError, changed(tmp_path, "qwen3", lose))
    assert "'model.layers.1.self_attn.k_proj.weight'" in said
    assert "config.json promises" in said


def test_one_missing_expert_stops_with_its_name(tmp_path: Path) -> None:
    def lose(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        del values["model.layers.1.mlp.experts.2.up_proj.weight"]

    path = changed(tmp_path, "qwen3_moe", lose)
    said = refused(ModelError, path, 'roles = ["routed_expert"]\nscheme = "nvfp4-w4a16"')
    assert "'model.layers.1.mlp.experts.2.up_proj.weight'" in said


@pytest.mark.parametrize(
    ("prefix", "word"), [("mtp.", "an MTP head"), ("model.visual.", "a vision tower")]
)
def test_a_side_model_that_is_promised_and_absent_is_a_note(
    tmp_path: Path, prefix: str, word: str
) -> None:
    def lose(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        for name in [n for n in values if n.startswith(prefix)]:
            del values[name]

    found = plan(changed(tmp_path, "qwen3_5", lose, vision=True), "nvfp4")
    (note,) = found.notes
    assert word in note
    assert f"({prefix}" in note
    assert "engines that use them will fail" in note


def test_a_contradiction_in_what_is_copied_anyway_is_a_note(tmp_path: Path) -> None:
    def cut(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        values["mtp.fc.weight"] = values["mtp.fc.weight"][:, :-2]

    (note,) = plan(changed(tmp_path, "qwen3_5", cut), "nvfp4").notes
    assert note.startswith("mtp.fc.weight: expected [96, 192]")
    assert note.endswith("copied as it is")


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_tied_head_stays_and_the_plan_says_so(tmp_path: Path, is_stored: bool) -> None:
    def store(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        if is_stored:
            values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()

    path = changed(tmp_path, "qwen3", store, tie_word_embeddings=True)
    found = plan(path, "nvfp4")
    assert not any(job.role == "lm_head" for job in found.jobs)
    assert ("lm_head.weight" in {c.tensor.name for c in found.copies}) == is_stored
    assert any("tied" in note for note in found.notes)
    assert plan(path, "nvfp4-w4a4").notes == ()  # asks nothing of the head
    embedding = next(r for r in found.rows if r.role == "embedding")
    assert embedding.active == embedding.parameters  # it is the head's matmul


@pytest.mark.parametrize("scheme", ["fp8-static", "bf16"])
@pytest.mark.parametrize("order", ["first", "last"])
def test_a_split_fused_group_names_the_group_and_both_members(
    tmp_path: Path, scheme: str, order: str
) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    rules = [
        f'roles = ["attention"]\nmodules = ["*.q_proj"]\nscheme = "{scheme}"',
        'roles = ["attention"]\nscheme = "nvfp4-w4a16"',
    ]
    if order == "last":
        rules = [
            'roles = ["attention"]\nmodules = ["*.[kvo]_proj"]\nscheme = "nvfp4-w4a16"',
            f'roles = ["attention"]\nscheme = "{scheme}"',
        ]
    said = refused(RecipeError, path, *rules)
    assert "recipe mine splits the fused group model.layers.0.self_attn:qkv" in said
    assert "model.layers.0.self_attn.q_proj" in said
    assert "model.layers.0.self_attn.k_proj" in said or "model.layers.0.self_attn.v_proj" in said
    assert scheme in said
    assert "nvfp4-w4a16" in said


def test_a_fused_group_of_which_one_member_is_named_alone_is_split(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5")
    said = refused(
        RecipeError,
        path,
        'roles = ["linear_attention"]\nmodules = ["*.in_proj_z"]\nscheme = "nvfp4-w4a16"',
    )
    assert "linear_attn:qkvz" in said
    assert "in_proj_qkv" in said


def test_a_stack_is_quantized_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe")
    said = refused(
        RecipeError,
        path,
        'roles = ["routed_expert"]\nmodules = ["*.experts.1.*"]\nscheme = "nvfp4-w4a16"',
    )
    assert "layers.0.mlp.experts.gate_up_proj" in said
    assert "holds 6 matrices" in said
    assert "experts.0.gate_proj stays" in said


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    "rules",
    [
        ('roles = ["routed_expert"]\nmodules = ["*.down_proj"]\nscheme = "nvfp4-w4a16"',),
        (
            'roles = ["routed_expert"]\nmodules = ["*.down_proj"]\nscheme = "mxfp4-w4a16"',
            'roles = ["routed_expert"]\nscheme = "nvfp4-w4a16"',
        ),
    ],
)
def test_experts_of_a_layer_are_quantized_alike(
    tmp_path: Path, stacked: bool, rules: tuple[str, ...]
) -> None:
    """Engines build them as one; the configuration files list their container."""
    path = tiny.checkpoint(tmp_path / "m", "qwen3_moe", stacked=stacked)
    said = refused(RecipeError, path, *rules, layout="compressed-tensors")
    assert "the experts of model.layers.0.mlp" in said
    assert "down_proj" in said
    assert "one scheme" in said


def test_one_expert_alone_is_refused_where_each_has_its_tensors(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_moe", stacked=False)
    said = refused(
        RecipeError,
        path,
        'roles = ["routed_expert"]\nmodules = ["*.experts.1.*"]\nscheme = "nvfp4-w4a16"',
    )
    assert "the experts of model.layers.0.mlp" in said


def test_layers_may_differ_in_their_experts(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe")
    found = plan_of(
        path,
        'roles = ["routed_expert"]\nmodules = ["*.layers.1.*"]\nscheme = "fp8-dynamic"',
        'roles = ["routed_expert"]\nmodules = ["*.layers.2.*"]\nscheme = "nvfp4-w4a16"',
        layout="compressed-tensors",
    )
    assert {(j.members[0].module.split(".")[3], str(j.scheme)) for j in found.jobs} == {
        ("1", "fp8-dynamic"),
        ("2", "nvfp4-w4a16"),
    }


@pytest.mark.parametrize(
    ("scheme", "multiple", "k"), [("nvfp4-w4a16", 16, 88), ("mxfp4-w4a16", 32, 80)]
)
def test_k_that_does_not_divide_into_blocks_says_what_to_do(
    tmp_path: Path, scheme: str, multiple: int, k: int
) -> None:
    path = tiny.checkpoint(tmp_path / "m", "llama", intermediate_size=k)
    said = refused(
        FormatError, path, f'roles = ["mlp"]\nscheme = "{scheme}"', layout="compressed-tensors"
    )
    assert "model.layers.0.mlp.down_proj.weight" in said
    assert f"multiple of {multiple}, found {k}" in said
    assert "leave this module in BF16 or use an FP8 scheme" in said
    fp8 = plan_of(path, 'roles = ["mlp"]\nscheme = "fp8-dynamic"', layout="compressed-tensors")
    assert len(fp8.jobs) == 4


def test_weights_that_are_no_floats_are_refused_with_their_dtype(tmp_path: Path) -> None:
    def cast(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        values[name] = values[name].astype(tiny.DTYPES["F8_E4M3"])

    said = refused(RecipeError, changed(tmp_path, "qwen3", cast))
    assert "model.layers.0.mlp.up_proj.weight is F8_E4M3; only BF16, F16, F32" in said


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("leaf", ["weight_scale", "weight_packed", "weight_scale_inv"])
def test_a_quantized_source_is_refused_with_the_tensor_that_shows_it(
    tmp_path: Path, leaf: str, says: bool
) -> None:
    def mark(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        values[f"model.layers.1.mlp.up_proj.{leaf}"] = np.ones((1, 1), dtype=np.float32)
        if says:
            cfg["quantization_config"] = {"quant_method": "awq"}

    said = refused(RecipeError, changed(tmp_path, "qwen3", mark))
    assert f"is quantized already (model.layers.1.mlp.up_proj.{leaf}" in said
    assert ("quant_method awq" if says else "nothing of it in config.json") in said
    assert "BF16 original" in said


def test_a_leftover_section_over_plain_weights_is_a_note(tmp_path: Path) -> None:
    def mark(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        cfg["quantization_config"] = {"quant_method": "awq"}

    (note,) = plan(changed(tmp_path, "qwen3", mark), "nvfp4-w4a4").notes
    assert "(awq)" in note
    assert "replaced" in note


@pytest.mark.parametrize(("recipe", "scheme"), [("fp8", "fp8-dynamic"), ("mxfp4", "mxfp4-w4a16")])
def test_modelopt_refuses_what_engines_would_read_as_bf16(
    tmp_path: Path, recipe: str, scheme: str
) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    with pytest.raises(RecipeError) as found:
        plan(path, recipe)
    said = str(found.value)
    assert f"recipe {recipe}: the modelopt layout cannot carry {scheme}" in said
    assert "--layout compressed-tensors" in said
    assert plan(path, recipe, layout="compressed-tensors").jobs


def test_an_unknown_layout_lists_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'gguf': choose one of modelopt, compressed-tensors"):
        plan(tiny.checkpoint(tmp_path / "m", "qwen3"), "nvfp4", layout="gguf")


def test_a_rule_without_effect_is_an_error_that_lists_the_roles(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    said = refused(
        RecipeError,
        path,
        'roles = ["mlp"]\nscheme = "nvfp4-w4a16"',
        'roles = ["routed_expert", "shared_expert"]\nscheme = "nvfp4-w4a16"',
    )
    assert "routed_expert, shared_expert -> nvfp4-w4a16 matches no linear" in said
    assert "attention, lm_head, mlp" in said
    said = refused(
        RecipeError, path, 'roles = ["mlp"]\nmodules = ["layers.*"]\nscheme = "nvfp4-w4a16"'
    )
    assert "mlp in layers.*" in said


def test_a_rule_behind_one_that_takes_all_of_it_is_an_error(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    refused(
        RecipeError,
        path,
        'roles = ["mlp"]\nscheme = "nvfp4-w4a16"',
        'roles = ["mlp"]\nmodules = ["*.layers.0.*"]\nscheme = "bf16"',
    )


def test_roles_that_are_no_linears_match_nothing(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe", vision=True)
    for role in ("router", "norm", "embedding", "vision", "linear_attention_state"):
        assert "matches no linear" in refused(
            RecipeError, path, f'roles = ["{role}"]\nscheme = "nvfp4-w4a16"'
        )


def test_the_first_rule_that_names_a_module_decides(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    found = plan_of(
        path,
        'roles = ["mlp"]\nmodules = ["*.layers.1.*"]\nscheme = "bf16"',
        'roles = ["mlp", "lm_head"]\nscheme = "nvfp4-w4a16"',
        'roles = ["attention"]\nscheme = "fp8-static"',
    )
    schemes = {m.module: str(j.scheme) for j in found.jobs for m in j.members}
    assert schemes["model.layers.0.mlp.down_proj"] == "nvfp4-w4a16"
    assert "model.layers.1.mlp.down_proj" not in schemes
    assert schemes["lm_head"] == "nvfp4-w4a16"
    assert schemes["model.layers.1.self_attn.q_proj"] == "fp8-static"
    assert {(r.role, str(r.scheme)) for r in found.rows if r.role == "mlp"} == {
        ("mlp", "bf16"),
        ("mlp", "nvfp4-w4a16"),
    }


# --------------------------------------------------------------------------- unknown model types


def unknown(tmp_path: Path) -> Path:
    def rename(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        cfg["model_type"] = "neverseen"

    return changed(tmp_path, "qwen3_moe", rename)


def test_an_unknown_model_type_is_refused_by_name(tmp_path: Path) -> None:
    said = refused(ModelError, unknown(tmp_path))
    assert "'neverseen'" in said
    assert "--generic" in said
    assert "qwen3_5_moe" in said


def test_generic_plans_it_by_names_and_shapes(tmp_path: Path) -> None:
    path = unknown(tmp_path)
    found = plan(path, "nvfp4-all", generic=True)
    assert {job.role for job in found.jobs} == {"linear"}
    modules = {m.module for j in found.jobs for m in j.members}
    assert "model.layers.1.mlp.experts.2.down_proj" in modules
    assert not modules & {"model.layers.0.mlp.gate", "lm_head", "model.embed_tokens"}
    groups = {tuple(m.module.rpartition(".")[2] for m in j.members) for j in found.jobs}
    assert groups == {
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("o_proj",),
        ("down_proj",),
    }
    with pytest.raises(RecipeError, match="measured input_scale"):
        plan(path, "nvfp4-w4a4", generic=True, data_free=True)


def test_a_generic_plan_covers_what_a_family_would(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen2")
    rule = 'roles = ["mlp", "attention", "linear"]\nscheme = "nvfp4-w4a16"'
    known, guessed = plan_of(path, rule), plan_of(path, rule, generic=True)
    assert known.outputs == guessed.outputs
    assert known.payload_bytes == guessed.payload_bytes


# --------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_family_and_dtype_plans(tmp_path: Path, family: str, dtype: str) -> None:
    path = tiny.checkpoint(tmp_path / "m", family, dtype=dtype)
    found = plan(path, "nvfp4")
    width = tiny.DTYPES[dtype].itemsize
    assert all(
        row.source_bytes == width * row.parameters for row in found.rows if row.scheme.weight
    )
    assert {row.dtype for row in found.rows if not row.scheme.weight} == {dtype}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_stacked_and_split_experts_plan_the_same_modules(tmp_path: Path, prefix: str) -> None:
    stacked = tiny.checkpoint(tmp_path / "a", "qwen3_5_moe", prefix=prefix)
    split = tiny.checkpoint(
        tmp_path / "b", "qwen3_5_moe", prefix=prefix, stacked=False, mtp_stacked=True
    )
    one, other = plan(stacked, "nvfp4"), plan(split, "nvfp4")
    assert {o.name: o for o in one.outputs} == {o.name: o for o in other.outputs}
    modules = [{j.name: {m.module for m in j.members} for j in p.jobs} for p in (one, other)]
    assert modules[0] == modules[1]
    assert one.payload_bytes == other.payload_bytes
    assert one.stored_parameters == other.stored_parameters


def test_make_plan_needs_no_data(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    file = path / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    expected = plan(path, "nvfp4").payload_bytes
    file.write_bytes(file.read_bytes()[: 8 + length])
    assert plan(path, "nvfp4").payload_bytes == expected


def test_the_json_document_says_what_the_plan_says(tmp_path: Path) -> None:
    found = plan(tiny.checkpoint(tmp_path / "m", "qwen3"), "nvfp4-all")
    document = json.loads(json.dumps(as_json(found, found)))
    assert list(document)[0] == "schema"
    assert document["schema"] == "nybble.plan/1"
    assert document["bytes"] == found.payload_bytes
    assert sum(row["bytes"] for row in document["rows"]) == found.payload_bytes
    assert document["tensors"] == len(found.outputs)
    quantized = [row for row in document["rows"] if row["scheme"] != "bf16"]
    assert {row["weight"] for row in quantized} == {"nvfp4"}
    assert {row["activations"] for row in quantized} == {"BF16"}


def test_empty_tensors_and_odd_dtypes_are_copied(tmp_path: Path) -> None:
    def add(cfg: dict[str, Any], values: tiny.Tensors) -> None:
        values["mtp.nothing"] = np.zeros((0, 4), dtype=np.float32)
        values["mtp.bytes"] = np.arange(3, dtype=np.uint8)

    found = plan(changed(tmp_path, "qwen3_5", add), "nvfp4")
    rows = {(r.role, r.dtype): r for r in found.rows}
    assert rows["mtp", "U8"].bytes == 3
    assert rows["mtp", "F32"].bits_per_weight == 0.0


def test_planning_twice_gives_equal_plans(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe", vision=True)
    with Checkpoint.open(path) as checkpoint:
        recipe = recipe_of('roles = ["routed_expert"]\nscheme = "nvfp4-w4a16"')
        one, other = (make_plan(checkpoint, recipe, LAYOUTS["modelopt"]) for _ in range(2))
    assert one.jobs == other.jobs
    assert one.copies == other.copies
    assert one.outputs == other.outputs
