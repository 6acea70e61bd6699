"""Conversions between containers: every dialect read, every value kept, every refusal said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import dialects
import nybble.rewrite.convert as convert_module
import tiny
from nybble.api.convert import convert, from_gguf, to_gguf
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckFailed, CheckpointError, FormatError, ModelError, RecipeError
from nybble.rewrite.conversion import Conversion

LAYOUTS = ("modelopt", "compressed-tensors")
#: dialect -> the other layout, where that can carry it.
CARRIED = {
    "modelopt-nvfp4": "compressed-tensors",
    "modelopt-mixed": "compressed-tensors",
    "modelopt-fp8": "compressed-tensors",
    "modelopt-pb-wo": "compressed-tensors",
    "modelopt-channel": "compressed-tensors",
    "ct-nvfp4": "modelopt",
    "ct-tensor": "modelopt",
    "qwen-fp8": "compressed-tensors",
}
#: And those that ModelOpt files have no word for.
REFUSED = {
    "ct-channel": "fp8-dynamic",
    "ct-block": "fp8-block",
    "ct-mxfp4": "mxfp4-w4a16",
    "ct-mixed": "fp8-dynamic",
    "qwen-fp8": "fp8-block",
}


@pytest.fixture(params=dialects.KINDS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", CARRIED)
def test_every_value_survives_a_change_of_container(name: str, tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", name)
    done = convert(source, tmp_path / "out", CARRIED[name])
    before, after = dialects.weights(source), dialects.weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert len(before) == 14
    assert all(np.array_equal(before[m], after[m]) for m in before)
    assert done.verdict == f"{len(tiny.read(source)):,} tensors, 0 differing values"
    assert not done.conversion.roundings


def test_every_value_survives_as_bf16(dialect: str, tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", dialect)
    done = convert(source, tmp_path / "out", "bf16")
    files = tiny.read(tmp_path / "out")
    for module, matrix in dialects.weights(source).items():
        dtype, shape, data = files[f"{module}.weight"]
        assert (dtype, shape) == ("BF16", matrix.shape)
        assert np.array_equal(np.frombuffer(data, np.uint16).reshape(shape), dialects.bf16(matrix))
    assert done.verdict.endswith(" tensors, 0 differing values")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_plain_tensors_and_side_files_go_over_byte_for_byte(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    for target in ("compressed-tensors", "bf16"):
        convert(source, tmp_path / target, target)
        before, after = tiny.read(source), tiny.read(tmp_path / target)
        plain = [n for n in before if "norm" in n or "embed" in n or "lm_head" in n]
        assert len(plain) > 5
        assert {n: before[n] for n in plain} == {n: after[n] for n in plain}
        for name, text in tiny.SIDE_FILES.items():
            assert (tmp_path / target / name).read_bytes() == text.encode()


@pytest.mark.parametrize("name", REFUSED)
def test_what_modelopt_cannot_say_is_refused_by_name(name: str, tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", name)
    with pytest.raises(RecipeError, match=f"cannot carry .*{REFUSED[name]}.*--to bf16"):
        convert(source, tmp_path / "out", "modelopt")
    assert not list(tmp_path.glob("out*"))


def test_the_new_configuration_says_the_same_of_every_module(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-mixed")
    convert(source, tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "modelopt")
    opened = [Checkpoint.open(tmp_path / name) for name in ("source", "ct", "back")]
    said = [declaration_of(each) for each in opened]
    names = [n.rpartition(".")[0] for n in opened[0].tensors]
    for name in names:
        schemes = {each.of(name).scheme if each.of(name) else "" for each in said}  # type: ignore[union-attr]
        assert len(schemes) == 1, (name, schemes)
    layers = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert layers["quantized_layers"]["model.layers.0.self_attn.q_proj"] == {"quant_algo": "FP8"}


# ----------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_reciprocals_that_round_are_listed_exactly(name: str, tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", name, search="absmax")
    done = convert(source, tmp_path / "out", CARRIED[name])
    before, after = dialects.weights(source), dialects.weights(tmp_path / "out")
    expected = {
        m: int((before[m] != after[m]).sum()) for m in before if (before[m] != after[m]).any()
    }
    assert done.proof is not None
    assert {d.name: d.values for d in done.proof.differing} == expected
    # One rounding of the scale, one of the products on each side.
    assert all(d.largest < 2.0**-21 for d in done.proof.differing)
    listed = {r.name.rpartition(".")[0] for r in done.conversion.roundings}
    assert set(expected) <= listed


def test_scales_that_bf16_rounds_are_listed(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-fp8", search="absmax")
    done = convert(source, tmp_path / "out", "compressed-tensors")
    assert done.proof is not None
    assert {r.part for r in done.conversion.roundings} == {"tensor_scale"}
    before, after = dialects.weights(source), dialects.weights(tmp_path / "out")
    expected = {m: count for m in before if (count := int((before[m] != after[m]).sum()))}
    assert len(expected) > 5
    assert {r.name.removesuffix(".weight_scale") for r in done.conversion.roundings} == set(
        expected
    )
    assert {d.name: d.values for d in done.proof.differing} == expected
    assert "cannot hold exactly" in done.verdict
    r = done.conversion.roundings[0]
    assert r.after == float(np.float32(r.before).astype(ml_dtypes.bfloat16))


def test_values_that_bf16_rounds_are_counted(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "ct-nvfp4", search="absmax")
    done = convert(source, tmp_path / "out", "bf16")
    assert done.proof is not None
    files = tiny.read(tmp_path / "out")
    expected = {
        m: count
        for m, x in dialects.weights(source).items()
        if (count := int((x != tiny.array(files[f"{m}.weight"]).astype(np.float32)).sum()))
    }
    assert len(expected) > 5
    assert {d.name: d.values for d in done.proof.differing} == expected
    assert "all rounded to BF16" in done.verdict


@pytest.mark.parametrize("target", ["compressed-tensors", "bf16"])
def test_exact_refuses_before_writing(target: str, tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4", search="absmax")
    with pytest.raises(RecipeError, match="--exact: .* the first model.layers"):
        convert(source, tmp_path / "out", target, exact=True)
    assert not list(tmp_path.glob("out*"))
    exact = dialects.checkpoint(tmp_path / "exact", "modelopt-nvfp4")
    assert convert(exact, tmp_path / "out", target, exact=True).proof is not None


def test_a_scale_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    for value, words in ((0.0, "a scale is 0.0"), (1e-45, "no finite, positive counterpart")):
        change(source, "model.layers.1.mlp.up_proj.weight_scale_2", np.float32(value))
        with pytest.raises(CheckpointError, match=words):
            convert(source, tmp_path / "out", "compressed-tensors")


# ------------------------------------------------------------------------ input and KV cache scales


def test_residual_input_scales_are_dropped_with_a_note_or_kept(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-mixed", residual=True)
    done = convert(source, tmp_path / "out", "compressed-tensors")
    names = set(tiny.read(tmp_path / "out"))
    assert len(done.conversion.dropped) == 6  # the MLPs of two layers
    assert any(
        "6 input scales of weight-only modules are left out" in n for n in done.conversion.notes
    )
    assert not any(".mlp." in n and "input" in n for n in names)
    assert "model.layers.0.self_attn.q_proj.input_scale" in names
    kept = convert(source, tmp_path / "kept", "compressed-tensors", keep_input_scales=True)
    files = tiny.read(tmp_path / "kept")
    assert not kept.conversion.dropped
    assert tiny.array(files["model.layers.0.mlp.up_proj.input_global_scale"]) == 32
    back = convert(tmp_path / "kept", tmp_path / "back", "modelopt", keep_input_scales=True)
    assert back.proof is not None
    assert not back.proof.differing
    name = "model.layers.0.mlp.up_proj.input_scale"
    assert tiny.read(tmp_path / "back")[name] == tiny.read(source)[name]


def test_kv_scales_are_renamed_and_declared(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4", kv_scales=0.0625)
    convert(source, tmp_path / "ct", "compressed-tensors")
    files = tiny.read(tmp_path / "ct")
    assert files["model.layers.0.self_attn.k_scale"][:2] == ("BF16", (1,))
    assert tiny.array(files["model.layers.1.self_attn.v_scale"]) == 0.0625
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert section["kv_cache_scheme"]["num_bits"] == 8
    convert(tmp_path / "ct", tmp_path / "back", "modelopt")
    assert tiny.read(tmp_path / "back") == tiny.read(source)


def test_kv_scales_that_bf16_rounds_are_listed(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4", kv_scales=0.1)
    done = convert(source, tmp_path / "out", "compressed-tensors")
    assert done.proof is not None
    assert {(d.part, d.values) for d in done.proof.differing} == {("kv_scale", 1)}
    assert len(done.proof.differing) == 4
    with pytest.raises(RecipeError, match="--exact: 4 scales"):
        convert(source, tmp_path / "exact", "compressed-tensors", exact=True)


# ------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe"])
def test_experts_are_stacked_where_the_family_publishes_them_so(
    family: str, tmp_path: Path
) -> None:
    source = dialects.checkpoint(tmp_path / "source", "ct-nvfp4", family=family, seed=3)
    convert(source, tmp_path / "own", "bf16")
    convert(source, tmp_path / "other", "bf16", stack_experts=family == "qwen3_moe")
    stacked, apart = ("own", "other") if family == "qwen3_5_moe" else ("other", "own")
    together, single = tiny.read(tmp_path / stacked), tiny.read(tmp_path / apart)
    stacks = [n for n in together if n.endswith(("gate_up_proj", "experts.down_proj"))]
    layers = 3 if family == "qwen3_5_moe" else 2
    assert len([n for n in stacks if not n.startswith("mtp.")]) == 2 * layers
    split: dict[str, Any] = {}
    for name in together:
        value = tiny.array(together[name])
        is_stack = name in stacks and not name.startswith("mtp.")
        split |= tiny.split(name, value) if is_stack else {name: value}
    assert split.keys() == single.keys()
    assert all(v.tobytes() == single[n][2] for n, v in split.items())


def test_a_stack_needs_every_expert(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "ct-nvfp4", family="qwen3_5_moe")
    drop(source, ".experts.2.up_proj.")
    with pytest.raises(CheckpointError, match="up_proj is there for 2 experts.*--no-stack-experts"):
        convert(source, tmp_path / "out", "bf16")
    assert convert(source, tmp_path / "out", "bf16", stack_experts=False).proof is not None


# ---------------------------------------------------------------------------------- what is refused


def test_a_source_without_quantized_weights_is_refused(tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "source", "qwen3")
    for target in (*LAYOUTS, "bf16"):
        with pytest.raises(RecipeError, match="holds no quantized weight"):
            convert(source, tmp_path / "out", target)


def test_the_same_layout_is_refused(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "ct-nvfp4")
    with pytest.raises(RecipeError, match="is in the compressed-tensors layout already"):
        convert(source, tmp_path / "out", "compressed-tensors")


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    change(source, "model.layers.0.mlp.up_proj.pre_quant_scale", np.ones(96, np.float32))
    for target in ("compressed-tensors", "bf16"):
        with pytest.raises(CheckpointError, match=r"up_proj: .*pre_quant_scale has no place"):
            convert(source, tmp_path / "out", target)


def test_a_lost_scale_is_named(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    drop(source, "layers.1.mlp.down_proj.weight_scale_2")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj: lacks weight_scale_2"):
        convert(source, tmp_path / "out", "bf16")


def test_a_contradicting_declaration_is_refused_but_decoded(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    file = source / "hf_quant_config.json"
    document = json.loads(file.read_text())
    document["quantization"]["exclude_modules"].append("model.layers.1.mlp.up_proj")
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="is declared plain, but holds nvfp4"):
        convert(source, tmp_path / "out", "compressed-tensors")
    assert convert(source, tmp_path / "out", "bf16").proof is not None


def test_an_unknown_model_needs_generic(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ModelError, match="unheard_of"):
        convert(source, tmp_path / "out", "compressed-tensors")
    done = convert(source, tmp_path / "out", "compressed-tensors", generic=True)
    assert done.verdict.endswith("0 differing values")


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("mine")
        with pytest.raises(CheckpointError, match="another output|remove it"):
            convert(source, tmp_path / "out", "bf16")
        assert (tmp_path / name / "kept").read_text() == "mine"
        (tmp_path / name / "kept").unlink()
        (tmp_path / name).rmdir()
    with pytest.raises(CheckpointError, match="lies inside the source folder"):
        convert(source, source / "out", "bf16")


# ---------------------------------------------------------------------------------------- the proof


@pytest.mark.parametrize("target", ["compressed-tensors", "bf16"])
def test_a_flipped_bit_fails_the_proof_and_leaves_nothing(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    honest = convert_module._write_all
    for place in np.linspace(0.55, 0.999, 7):

        def spoil(conversion: Conversion, writer: Any, *rest: Any, place: float = place) -> None:
            honest(conversion, writer, *rest)
            (file,) = writer.folder.glob("*.safetensors")
            data = bytearray(file.read_bytes())
            data[int(len(data) * place)] ^= 0x10
            file.write_bytes(data)

        monkeypatch.setattr(convert_module, "_write_all", spoil)
        with pytest.raises(CheckFailed, match="nothing is left of the result"):
            convert(source, tmp_path / "out", target)
        assert not list(tmp_path.glob("out*"))
    assert size > 1000


def test_a_lost_tensor_scale_bit_is_not_taken_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scales do round, a scale that is off by more than that is still a fault."""
    source = dialects.checkpoint(tmp_path / "source", "modelopt-fp8", search="absmax")
    made = convert_module.make_conversion

    def off(*arguments: Any, **options: Any) -> Conversion:
        conversion = made(*arguments, **options)
        scale = next(
            r for r in conversion.restated if r.source.name.endswith("q_proj.weight_scale")
        )
        assert scale.value is not None
        scale.value.view(np.uint16)[...] += 3
        return conversion

    monkeypatch.setattr("nybble.api.convert.make_conversion", off)
    with pytest.raises(CheckFailed, match="its rounded scale explains"):
        convert(source, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.glob("out*"))


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "prove", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "bf16")
    assert not list(tmp_path.glob("out*"))


def test_a_dry_run_writes_nothing_and_tells_all(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-mixed", residual=True)
    done = convert(source, tmp_path / "out", "compressed-tensors", dry_run=True)
    document = done.as_json()
    assert not list(tmp_path.glob("out*"))
    assert document["schema"] == "nybble.convert/1"
    assert document["dry_run"] is True
    assert document["proof"] is None
    names = [entry["from"] for entry in document["renamed"]]  # type: ignore[attr-defined]
    assert "model.layers.0.mlp.up_proj.weight_scale_2" in names
    assert len(document["dropped"]) == 6  # type: ignore[arg-type]
    json.dumps(document)


def test_fused_groups_with_unequal_scales_are_noted(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    done = convert(source, tmp_path / "out", "compressed-tensors")
    assert any("fused groups have members with different tensor scales" in n
               for n in done.conversion.notes)  # fmt: skip


# --------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-mixed"])
def test_gguf_and_back_keeps_every_value(name: str, tmp_path: Path) -> None:
    source = engine_sized(tmp_path / "source", name)
    there = to_gguf(source, tmp_path / "model.gguf")
    assert there.verdict.endswith("0 differing values")
    back = from_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert back.verdict.endswith("0 differing values")
    files = tiny.read(tmp_path / "back")
    for module, matrix in dialects.weights(source).items():
        assert np.array_equal(tiny.array(files[f"{module}.weight"]).astype(np.float32), matrix)


def engine_sized(folder: Path, name: str) -> Path:
    """GGUF needs K in superblocks of 64, and a tokenizer."""
    model = tiny.MODELS / "hybrid-chat-mtp"
    with pytest.MonkeyPatch.context() as patch:
        base = {**tiny._BASE, "hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
        base |= {"num_attention_heads": 2, "vocab_size": 4096, "max_position_embeddings": 64}
        patch.setattr(tiny, "_BASE", base)
        dialects.checkpoint(folder, name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((model / file).read_bytes())
    (folder / "generation_config.json").write_text("{}")
    return folder


def test_a_spoilt_gguf_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nybble.api.convert as api

    source = engine_sized(tmp_path / "source", "modelopt-nvfp4")
    honest = api.write_gguf

    def spoil(checkpoint: Any, out: Path, **options: Any) -> Any:
        made = honest(checkpoint, out, **options)
        data = bytearray(out.read_bytes())
        data[-5000] ^= 0x10
        out.write_bytes(data)
        return made

    monkeypatch.setattr(api, "write_gguf", spoil)
    with pytest.raises(CheckFailed, match="nothing is left"):
        to_gguf(source, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model*"))


# -------------------------------------------------------------------------- what has no plain value


@pytest.mark.parametrize(
    ("dialect", "leaf"),
    [
        ("modelopt-nvfp4", "weight_scale"),
        ("modelopt-nvfp4", "weight_scale_2"),
        ("ct-mxfp4", "weight_scale"),
        ("ct-channel", "weight_scale"),
        ("ct-channel", "weight"),
    ],
)
def test_nan_in_quantized_weights_is_refused_by_name(
    dialect: str, leaf: str, tmp_path: Path
) -> None:
    source = dialects.checkpoint(tmp_path / "source", dialect)
    files = tiny.read(source)
    module = next(n for n in files if n.endswith(".weight_scale")).rpartition(".")[0]
    name = f"{module}.{leaf}"
    values = tiny.array(files[name]).copy()
    if values.dtype == np.uint8:
        values.reshape(-1)[-1] = 0xFF
    else:
        values.reshape(-1)[-1:] = np.nan
    change(source, name, values)
    with pytest.raises(FormatError, match=f"{name}: .*nybble check") as caught:
        convert(source, tmp_path / "out", "bf16")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.glob("out*"))


def test_nan_in_plain_tensors_is_copied(tmp_path: Path) -> None:
    source = dialects.checkpoint(tmp_path / "source", "modelopt-nvfp4")
    name = next(n for n in tiny.read(source) if n.endswith("norm.weight"))
    values = tiny.array(tiny.read(source)[name]).copy()
    values[0] = np.nan
    change(source, name, values)
    convert(source, tmp_path / "out", "bf16")
    assert tiny.read(tmp_path / "out")[name] == tiny.read(source)[name]


def test_a_number_too_large_for_gguf_is_named(tmp_path: Path) -> None:
    source = engine_sized(tmp_path / "source", "modelopt-nvfp4")
    config = json.loads((source / "config.json").read_text())
    section = config.get("text_config", config)
    section["max_position_embeddings"] = 2**63
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"context_length.*u32 cannot hold 9223372036854775808"
    ):
        to_gguf(source, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model*"))


def test_a_vocabulary_is_as_large_as_its_embedding(tmp_path: Path) -> None:
    """A row of text for each of 2^62 tokens would fill the memory."""
    source = engine_sized(tmp_path / "source", "modelopt-nvfp4")
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["vocab_size"] = 2**62
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="vocab_size is 4611686018427387904, but the embedding"):
        to_gguf(source, tmp_path / "model.gguf")


# ------------------------------------------------------------------------------------------ changes


def change(folder: Path, name: str, value: Any) -> None:
    """Put a tensor into the last shard, in place of one of its name."""
    files = {n: tiny.array(entry) for n, entry in tiny.read(folder).items()}
    rewrite(folder, files | {name: np.asarray(value)})


def drop(folder: Path, part: str) -> None:
    """Take away the tensors with this in their names."""
    files = {n: tiny.array(e) for n, e in tiny.read(folder).items() if part not in n}
    rewrite(folder, files)


def rewrite(folder: Path, files: dict[str, Any]) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tiny.write_safetensors(folder / "model.safetensors", files)
