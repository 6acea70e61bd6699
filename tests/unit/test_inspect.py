"""What a checkpoint holds against what it declares: published totals, every format, every fault."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nybble.api.inspect import Inspection, Row, inspect
from nybble.check.contents import Kind
from nybble.checkpoint.reader import INDEX, Checkpoint
from nybble.checkpoint.safetensors import WIDTHS
from nybble.cli import inspect as cli

TESTS = Path(__file__).resolve().parents[1]
CONFIGS = TESTS / "fixtures" / "configs"
sys.path.insert(0, str(TESTS))

make_headers: Any = importlib.import_module("make_headers")

MOE, DENSE = "nvidia--Qwen3.6-35B-A3B-NVFP4", "nvidia--Qwen3.6-27B-NVFP4"
LAYER = "model.language_model.layers"

Leaves = Mapping[str, tuple[str, tuple[int, ...]]]


def headers(folder: Path, tensors: Leaves, files: Mapping[str, object] | None = None) -> Path:
    """A checkpoint of one file without data."""
    entries: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + make_headers.numel(shape) * WIDTHS[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for name, document in (files or {}).items():
        (folder / name).write_text(json.dumps(document))
    return folder


def published(
    folder: Path,
    name: str,
    layout: str = "modelopt",
    *,
    data: str = "none",
    layers: int = 0,
    quant: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """The headers that a published configuration describes, of its first layers only if asked."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    if layers:
        config["text_config"]["num_hidden_layers"] = layers
        del config["text_config"]["layer_types"][layers:]
    if quant is not None:
        config["quantization_config"] = quant
    folder.mkdir(parents=True)
    beside = CONFIGS / name / "hf_quant_config.json"
    tensors = make_headers.checkpoint(config, layout, config["quantization_config"], **options)
    parts = make_headers.files(tensors, 10e9, layout)
    source = folder.parent / f"{folder.name}.json"
    source.write_text(json.dumps(config))
    make_headers.write(folder, parts, source, [beside] if layout == "modelopt" else [], data)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("moe") / "35b", MOE)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 35B with one of its forty layers."""
    return published(tmp_path_factory.mktemp("moe") / "one", MOE, layers=1)


def row(found: Inspection, role: str) -> Row:
    (one,) = (r for r in found.rows if r.role == role)
    return one


def kind(
    folder: Path,
    leaves: Leaves,
    algorithm: str = "",
    section: Mapping[str, object] | None = None,
) -> Kind:
    """The kind of one module `m`, declared by name if `algorithm` is given."""
    if algorithm:
        layers = {"m": {"quant_algo": algorithm}}
        section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    config = {"quantization_config": section} if section else {}
    tensors = {f"m.{leaf}": spec for leaf, spec in leaves.items()}
    (module,) = inspect(headers(folder, tensors, {"config.json": config})).contents.modules
    return module.kind


# ------------------------------------------------------------------------------ published releases


def test_the_published_totals_of_the_35b(moe: Path) -> None:
    found = inspect(moe)
    assert (found.tensors, found.payload_bytes) == (124_468, 23_407_580_856)
    assert found.file_bytes == 23_424_338_320  # of the three downloaded files
    assert (found.residual_scales, found.residual_bytes) == (30_841, 123_364)
    assert found.bytes_without_residual == 23_407_457_492
    assert found.stored_parameters == found.index_parameters == 18_683_860_336
    assert found.parameters == 35_951_822_704
    assert sum(r.nbytes for r in found.rows) == found.payload_bytes
    assert found.mismatches == ()
    assert len(found.declaration.disagreements) == 3
    assert (found.declaration.kv_cache, found.contents.kv_scales) == ("fp8", ())
    assert not found.has_data
    assert found.mtp is not None
    assert (found.mtp.tensors, found.mtp.dtypes) == (19, ("BF16",))
    assert found.vision is not None
    assert found.vision.tensors == 333
    experts = row(found, "routed_expert")
    assert (experts.modules, experts.held) == (30_720, "nvfp4 + residual input scale")
    assert experts.bits_per_weight == pytest.approx(4.5, abs=1e-3)


def test_the_published_totals_of_the_27b(tmp_path: Path) -> None:
    found = inspect(published(tmp_path / "27b", DENSE, data="sparse"))
    assert (found.tensors, found.payload_bytes) == (2_194, 21_921_428_072)
    assert (found.residual_scales, found.residual_bytes) == (193, 772)
    assert found.bytes_without_residual == 21_921_427_300
    assert found.stored_parameters == 18_164_649_200
    assert found.parameters == 27_781_427_952
    assert (found.mismatches, found.declaration.disagreements) == ((), ())
    assert found.has_data


#: Opening and grouping 124,468 tensors takes 1 s; anything quadratic would take minutes.
_SECONDS = 60.0


def test_124_468_tensors_in_seconds(moe: Path) -> None:
    start = time.process_time()
    inspect(moe)
    assert time.process_time() - start < _SECONDS


def test_without_residual_scales_there_is_nothing_to_explain(tmp_path: Path) -> None:
    folder = published(tmp_path / "x", MOE, layers=4, residual_input_scale=False)
    found = inspect(folder)
    assert found.residual_scales == 0
    assert found.bytes_without_residual == found.payload_bytes
    assert "\ninput scale" not in cli.render(found)


def test_uniform_files_agree_where_nothing_but_linears_is_declared(tmp_path: Path) -> None:
    folder = published(tmp_path / "x", "nvidia--Qwen3.5-122B-A10B-NVFP4", layers=2, fused_mtp=False)
    found = inspect(folder)
    assert found.mismatches == ()
    experts = row(found, "routed_expert")
    assert (str(experts.declared), experts.held) == ("NVFP4", "nvfp4 + input scale")
    assert found.residual_scales == 0
    assert row(found, "router").declared is None  # not in the file's list, and not a Linear


def test_an_mtp_head_that_is_not_wholly_excluded_is_found(tmp_path: Path) -> None:
    folder = published(tmp_path / "x", "nvidia--Qwen3.5-397B-A17B-NVFP4", layers=1, fused_mtp=False)
    assert [m.name for m in inspect(folder).mismatches] == ["mtp.fc"]


def test_a_compressed_tensors_release_agrees_module_by_module(tmp_path: Path) -> None:
    name = "Qwen3.8-27B-compressed-tensors-mixed.json"
    quant = json.loads((CONFIGS / "transcribed" / name).read_text())["quantization_config"]
    folder = published(tmp_path / "x", DENSE, "compressed-tensors", quant=quant, kv_scales=True)
    found = inspect(folder)
    assert found.tensors == 1_968
    assert found.mismatches == ()
    assert sum(r.modules for r in found.rows if r.held == "nvfp4 + input scale") == 168
    assert sum(r.modules for r in found.rows if r.held == "fp8_channel") == 233
    assert len(found.contents.kv_scales) == 32
    assert sum(r.nbytes for r in found.rows) == found.payload_bytes
    assert row(found, "kv_cache").agrees


# ----------------------------------------------------------------------------------------- formats

NVFP4 = {
    "weight": ("U8", (64, 48)),
    "weight_scale": ("F8_E4M3", (64, 6)),
    "weight_scale_2": ("F32", ()),
}
FP8 = {"weight": ("F8_E4M3", (256, 384))}
SCALE = {"input_scale": ("F32", ())}


def test_a_residual_input_scale_is_a_note_and_makes_no_module_w4a4(tmp_path: Path) -> None:
    weight_only = kind(tmp_path / "a", NVFP4 | SCALE, "W4A16_NVFP4")
    assert (weight_only.held, weight_only.agrees, weight_only.has_residual) == ("nvfp4", True, True)
    both = kind(tmp_path / "b", NVFP4 | SCALE, "NVFP4")
    assert (both.held, both.agrees, both.has_residual) == ("nvfp4", True, False)
    undeclared = kind(tmp_path / "c", NVFP4 | SCALE)
    assert (undeclared.agrees, undeclared.has_residual) == (False, False)


@pytest.mark.parametrize(
    ("leaves", "algorithm", "problem"),
    [
        (NVFP4, "NVFP4", "lacks input_scale"),
        (FP8 | {"weight_scale": ("F32", ())}, "FP8", "lacks input_scale"),
        (
            {"weight": NVFP4["weight"]},
            "W4A16_NVFP4",
            "lacks weight_scale, weight_scale_2",
        ),
        (
            {k: v for k, v in NVFP4.items() if k != "weight_scale_2"},
            "W4A16_NVFP4",
            "lacks weight_scale_2",
        ),
        (
            NVFP4 | {"weight_scale": ("F8_E4M3", (64, 5))},
            "W4A16_NVFP4",
            "weight_scale [64, 5] does not fit weight [64, 48]",
        ),
        (
            NVFP4 | {"weight": ("BF16", (64, 96))},
            "W4A16_NVFP4",
            "weight_scale beside a weight in BF16",
        ),
        (FP8, "FP8_PB_WO", "lacks weight_scale"),
        (
            FP8 | {"weight_scale": ("F32", (7,))},
            "FP8_PB_WO",
            "weight_scale [7] does not fit weight [256, 384]",
        ),
    ],
)
def test_an_incomplete_module_disagrees_and_says_what_it_lacks(
    tmp_path: Path, leaves: Leaves, algorithm: str, problem: str
) -> None:
    found = kind(tmp_path, leaves, algorithm)
    assert (found.problem, found.agrees) == (problem, False)


def test_a_compressed_w4a4_module_lacks_its_own_name_of_the_scale(tmp_path: Path) -> None:
    group = {
        "targets": ["m"],
        "format": "nvfp4-pack-quantized",
        "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        "input_activations": {"num_bits": 4, "type": "float", "dynamic": "local"},
    }
    leaves = {
        "weight_packed": NVFP4["weight"],
        "weight_scale": NVFP4["weight_scale"],
        "weight_global_scale": ("F32", (1,)),
    }
    section = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    assert kind(tmp_path / "a", leaves, section=section).problem == "lacks input_global_scale"
    whole = kind(tmp_path / "b", leaves | {"input_global_scale": ("F32", (1,))}, section=section)
    assert (whole.held, whole.agrees) == ("nvfp4", True)


@pytest.mark.parametrize(
    ("scale", "shape", "algorithm", "held"),
    [
        ("weight_scale", (), "", "fp8"),
        ("weight_scale", (1,), "", "fp8"),
        ("weight_scale", (256,), "", "fp8_channel"),
        ("weight_scale", (256, 1), "", "fp8_channel"),
        ("weight_scale", (2, 3), "", "fp8_block"),
        ("weight_scale", (2, 1, 3, 1), "", "fp8_block"),  # ModelOpt's four dimensions
        ("weight_scale_inv", (2, 3), "", "fp8_block"),
        ("weight_scale", (256,), "FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel"),
        ("weight_scale", (2, 3), "FP8_PB_WO", "fp8_block"),
    ],
)
def test_fp8_by_the_shape_of_its_scales(
    tmp_path: Path, scale: str, shape: tuple[int, ...], algorithm: str, held: str
) -> None:
    found = kind(tmp_path, FP8 | {scale: ("F32", shape)}, algorithm)
    assert (found.held, found.problem) == (held, "")
    assert found.agrees is bool(algorithm)


@pytest.mark.parametrize(
    ("algorithm", "held"), [("", "fp8_block"), ("FP8", "fp8"), ("FP8_PB_WO", "fp8_block")]
)
def test_where_a_shape_fits_several_formats_the_declared_one_is_taken(
    tmp_path: Path, algorithm: str, held: str
) -> None:
    leaves = {"weight": ("F8_E4M3", (64, 96)), "weight_scale": ("F32", (1, 1)), **SCALE}
    assert kind(tmp_path, leaves, algorithm).held == held


@pytest.mark.parametrize(
    ("leaves", "held", "parameters"),
    [
        (NVFP4, "nvfp4", 64 * 96),
        (NVFP4 | {"weight_scale": ("F8_E4M3", (64, 3))}, "nvfp4/32", 64 * 96),
        ({"weight": ("U8", (64, 48)), "weight_scale": ("U8", (64, 3))}, "mxfp4", 64 * 96),
        ({"weight": ("U8", (32, 96)), "weight_scale": ("F32", (64, 1))}, "int4", 64 * 96),
        (
            {"weight": ("F8_E4M3", (64, 96)), "weight_scale": ("U8", (64, 3))},
            "mxfp8",
            64 * 96,
        ),
        (
            {
                "weight_packed": ("I32", (64, 12)),
                "weight_scale": ("BF16", (64, 3)),
                "weight_shape": ("I64", (2,)),
            },
            "int",
            64 * 96,
        ),
        ({"weight": ("I8", (64, 96)), "weight_scale": ("F32", (64, 1))}, "int", 64 * 96),
        ({"weight": ("BF16", (64, 96)), "bias": ("F32", (64,))}, "bf16", 64 * 97),
        ({"weight": ("U8", (64, 96))}, "u8", 64 * 96),
    ],
)
def test_what_is_held_and_how_many_parameters_that_is(
    tmp_path: Path, leaves: Leaves, held: str, parameters: int
) -> None:
    found = kind(tmp_path, leaves)
    assert (found.held, found.problem) == (held, "")
    assert found.parameters == parameters
    assert found.agrees is (not found.is_quantized)


@pytest.mark.parametrize(("bits", "columns"), [(4, 12), (8, 24)])
def test_packed_integers_unpack_by_the_declared_bits(
    tmp_path: Path, bits: int, columns: int
) -> None:
    group = {"targets": ["re:.*m$"], "weights": {"num_bits": bits, "type": "int"}}
    leaves = {"weight_packed": ("I32", (64, columns)), "weight_scale": ("BF16", (64, 3))}
    section = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    found = kind(tmp_path, leaves, section=section)
    assert (found.held, found.parameters, found.agrees) == (f"int{bits}", 64 * 96, True)


def test_a_declaration_that_nybble_cannot_read_is_not_judged(tmp_path: Path) -> None:
    assert kind(tmp_path, NVFP4, "SOMETHING_NEW").agrees is None


def test_stored_elements_count_packed_bytes_once_and_leave_out_scales_and_mtp(
    tmp_path: Path,
) -> None:
    tensors = {f"m.{leaf}": spec for leaf, spec in (NVFP4 | SCALE).items()}
    tensors |= {"mtp.fc.weight": ("BF16", (8, 16)), "m.k_scale": ("F32", ())}
    found = inspect(headers(tmp_path, tensors))
    assert found.stored_parameters == 64 * 48
    assert found.parameters == 64 * 96 + 8 * 16


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"quant_algo": "FP8", "kv_cache_scheme": "FP8"}, "engines take 1.0"),
        (
            {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}},
            "readers of this layout expect them",
        ),
    ],
)
def test_a_kv_cache_declared_without_scales_is_a_note(
    tmp_path: Path, section: dict[str, object], expected: str
) -> None:
    config = {"quantization_config": section}
    folder = headers(tmp_path / "a", {"x.bias": ("BF16", (4,))}, {"config.json": config})
    assert any(expected in note for note in inspect(folder).notes)
    scaled = {"x.k_scale": ("F32", ())}
    folder = headers(tmp_path / "b", scaled, {"config.json": config})
    found = inspect(folder)
    assert not any("KV" in note for note in found.notes)
    assert (row(found, "kv_cache").held, found.parameters) == ("scales in f32", 0)


# ---------------------------------------------------------------------------------- any checkpoint


def test_an_unknown_model_type_leaves_the_roles_blank(tmp_path: Path) -> None:
    tensors = {"a.norm.weight": ("F32", (8,)), "a.up.weight": ("BF16", (8, 16))}
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "strange", "quantization_config": section}
    found = inspect(headers(tmp_path, tensors, {"config.json": config}))
    assert {r.role for r in found.rows} == {""}
    assert any("'strange' is not known" in note for note in found.notes)
    assert [m.name for m in found.mismatches] == ["a.up"]  # a norm is no Linear


def test_without_a_config_all_is_told_that_the_tensors_tell(tmp_path: Path) -> None:
    found = inspect(headers(tmp_path, {"w": ("F16", (3, 5))}))
    assert (found.model_type, found.declaration.layout, found.parameters) == ("", "", 15)
    assert any("no config.json" in note for note in found.notes)
    assert "not quantized" in cli.render(found)


def test_a_bf16_model_of_a_known_family(tmp_path: Path) -> None:
    found = inspect(TESTS.parent / "models" / "stories-hybrid-moe")
    assert found.contents.model_type == "qwen3_5_moe"
    assert all(r.agrees and r.held == "bf16" for r in found.rows)
    assert row(found, "routed_expert").modules == 96
    assert found.index_parameters is None


def test_what_config_and_index_promise_and_the_tensors_do_not_keep(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_5",
        "vision_config": {"depth": 2},
        "text_config": {"mtp_num_hidden_layers": 1},
    }
    index = {
        "metadata": {"total_size": 7, "total_parameters": 9},
        "weight_map": {"w": "model.safetensors"},
    }
    folder = headers(tmp_path, {"w": ("BF16", (4,))}, {"config.json": config, INDEX: index})
    headers(tmp_path / "other", {"x": ("BF16", (4,))})
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "stray.safetensors")
    notes = "\n".join(inspect(folder).notes)
    assert "mtp_num_hidden_layers 1, but there is no MTP tensor" in notes
    assert "vision_config, but there is no vision tensor" in notes
    assert "total_size 7, the tensors take 8 bytes" in notes
    assert "does not use stray.safetensors" in notes
    assert "the index says 9" in cli.render(inspect(folder))


def test_a_container_of_bare_tensors_is_one_module(tmp_path: Path) -> None:
    base = f"{LAYER}.0"
    tensors = {
        f"{base}.mlp.experts.gate_up_proj": ("BF16", (4, 16, 8)),
        f"{base}.mlp.experts.down_proj": ("BF16", (4, 8, 8)),
        f"{base}.linear_attn.A_log": ("F32", (4,)),
        f"{base}.linear_attn.dt_bias": ("BF16", (4,)),
    }
    found = inspect(headers(tmp_path, tensors, {"config.json": {"model_type": "qwen3_5_moe"}}))
    assert [(r.role, r.modules) for r in found.rows] == [
        ("routed_expert", 1),
        ("linear_attention_state", 1),
    ]


# ------------------------------------------------------------------------------------- the command


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(cli.command)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_text_explains_the_published_size(moe: Path) -> None:
    text = run(str(moe))
    assert "124,468 tensors, 23,407,580,856 bytes" in text
    assert "30,841 residual scalars (123,364 bytes)" in text
    assert "would write 23,407,457,492 bytes" in text
    assert "18,683,860,336 stored elements" in text
    assert "the index says the same" in text
    assert "fp8 declared, no scale tensors" in text
    assert text.count("configs      ") == 3
    assert "NO" not in [line.rpartition(" ")[2] for line in text.splitlines()]


@pytest.mark.parametrize("flags", [["--json"], ["--output-format", "json"]])
def test_json_begins_with_its_schema(moe: Path, flags: list[str]) -> None:
    document = json.loads(run(str(moe), *flags))
    assert next(iter(document.items())) == ("schema", "nybble.inspect/1")
    assert document["bytes"] == 23_407_580_856
    assert document["residual_input_scales"]["tensors"] == 30_841
    assert sum(r["bytes"] for r in document["rows"]) == document["bytes"]
    assert "modules" not in document


def test_modules_are_listed_by_glob(layer: Path) -> None:
    glob = "*.layers.0.mlp.experts.25[45].down_proj"
    text = run(str(layer), "--modules", glob)
    assert text.count("config says W4A16_NVFP4, file holds nvfp4 + residual input scale") == 2
    assert "weight_scale  F8_E4M3 [2048, 32]  65,536 bytes in model" in text
    document = json.loads(run(str(layer), "--modules", glob, "--json"))
    assert [len(m["tensors"]) for m in document["modules"]] == [4, 4]
    assert document["modules"][0]["declared"]["scheme"] == "nvfp4-w4a16"
    assert "none of 971 modules matches" in run(str(layer), "--modules", "nothing")


def test_mismatches_are_named_and_what_a_checkpoint_says_is_escaped(tmp_path: Path) -> None:
    layers = {f"m.{i}": {"quant_algo": "FP8"} for i in range(12)}
    section = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
        "producer": {"name": "\x1b[2Jevil"},
    }
    tensors = {f"m.{i}.weight": ("BF16", (8, 8)) for i in range(12)}
    folder = headers(tmp_path, tensors, {"config.json": {"quantization_config": section}})
    text = run(str(folder))
    assert "m.0: config says FP8, file holds bf16" in text
    assert "and 2 modules more" in text
    assert "\x1b" not in text
    assert "\\x1b[2Jevil" in text
    assert "DISAGREE" in run(str(folder), "--modules", "m.0")


def test_headers_alone_will_do_and_are_told(layer: Path) -> None:
    with Checkpoint.open(layer, headers_only=True) as checkpoint:
        assert not any(shard.has_data for shard in checkpoint.shards)
    assert "hold their headers only" in run(str(layer))
