"""GGUF: the container, the block codecs, and conversions there and back on the small checkpoints of
the zoo."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from nybble.check.contents import Module, read_contents
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.gguf import Field, GGUFFile, parse
from nybble.checkpoint.gguf_blocks import (
    BY_NAME,
    READABLE,
    decode,
    encode,
    mxfp4_blocks,
    nvfp4_blocks,
    nvfp4_parts,
    to_bf16,
)
from nybble.checkpoint.gguf_writer import GGUFSpec, GGUFWriter, lay_out
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, FormatError, ModelError, NybbleError, TextError
from nybble.formats.block import NVFP4
from nybble.formats.tensor import BlockScaledTensor
from nybble.rewrite.from_gguf import GGUFModel, write_bf16_from_gguf
from nybble.rewrite.gguf_metadata import rope_factors
from nybble.rewrite.gguf_tokenizer import pre_tokenizer, splitting_rule
from nybble.rewrite.to_gguf import GGUFResult, write_gguf

ROOT = Path(__file__).parents[2]
CLEAN = ROOT / "zoo" / "clean"
CHAT = ROOT / "models" / "hybrid-chat-mtp"
BASES = ("source", "source-dense", "nybble-modelopt", "nybble-w4a4", "nybble-ct", "nybble-dense")

Floats = NDArray[np.float32]


def convert(folder: Path, out: Path, **options: Any) -> GGUFResult:
    with Checkpoint.open(folder) as checkpoint:
        return write_gguf(checkpoint, out, threads=2, **options)


# ------------------------------------------------------------------------------------ the container

FIELDS = {
    "general.architecture": Field("str", "llama"),
    "a.u8": Field("u8", 255),
    "a.i64": Field("i64", -(2**63)),
    "a.f32": Field("f32", 0.5),
    "a.bool": Field("bool", True),
    "a.words": Field("[str]", ["", "ü", "x" * 100]),
    "a.numbers": Field("[i32]", np.array([-1, 2], dtype=np.int32)),
    "a.flags": Field("[bool]", np.array([True, False])),
}
SPECS = [
    GGUFSpec("one", "F32", (3,)),
    GGUFSpec("two", "NVFP4", (2, 3, 128)),
    GGUFSpec("three", "Q8_0", (5, 32)),
]


def written(path: Path) -> Path:
    rng = np.random.default_rng(0)
    with GGUFWriter(path, FIELDS, SPECS) as writer:
        for spec in reversed(SPECS):
            data = rng.integers(0, 256, spec.nbytes, dtype=np.uint8)
            writer.write(spec.name, data[4:], 4)
            writer.write(spec.name, data[:4])
        writer.finish()
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with GGUFFile.open(written(tmp_path / "x.gguf")) as file:
        assert file.fields.keys() == FIELDS.keys()
        for key, field in FIELDS.items():
            assert file.fields[key].kind == field.kind
            assert np.array_equal(file.fields[key].value, field.value)  # type: ignore[arg-type]
        assert [(t.name, t.type, t.shape) for t in file.tensors.values()] == [
            (s.name, s.type, s.shape) for s in SPECS
        ]
        assert all(t.offset % 32 == 0 for t in file.tensors.values())
        assert file.values("two", 4).shape == (2, 128)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gguf"]


def test_gguf_reads_what_was_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install 'nybble[gguf]'")
    reader = gguf.GGUFReader(written(tmp_path / "x.gguf"))
    assert [(t.name, t.tensor_type.name) for t in reader.tensors] == [
        (s.name, s.type) for s in SPECS
    ]
    with GGUFFile.open(tmp_path / "x.gguf") as ours:
        for theirs in reader.tensors:
            assert theirs.data.tobytes() == ours.raw(theirs.name).tobytes()
    assert reader.get_field("a.words").contents() == FIELDS["a.words"].value


def test_an_existing_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        GGUFWriter(path, FIELDS, SPECS)
    assert path.read_text() == "mine"


def test_a_leftover_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf.partial").write_text("")
    with pytest.raises(CheckpointError, match="interrupted"):
        GGUFWriter(tmp_path / "x.gguf", FIELDS, SPECS)


def test_an_unfinished_file_goes_away(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="3 tensors are not wholly written"):
        with GGUFWriter(tmp_path / "x.gguf", FIELDS, SPECS) as writer:
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def header(**changed: Any) -> bytearray:
    """A file with one F32 tensor [4] and one key, to be damaged."""
    spec = changed.get("spec", [GGUFSpec("w", "F32", (4,))])
    data, _, size = lay_out(changed.get("fields", {"k": Field("u32", 7)}), spec)
    return bytearray(data + bytes(size - len(data)))


def damaged(at: int, data: bytes) -> bytearray:
    found = header()
    found[at : at + len(data)] = data
    return found


BIG = struct.pack("<Q", 2**62)
# magic 0, version 4, tensors 8, keys 16, key's length 24, key 32, its type 33, value 37, name's
# length 41, name 49, rank 50, dimension 54, type 62, offset 66
BROKEN: dict[str, tuple[Callable[[], bytes | bytearray], str]] = {
    "magic": (lambda: damaged(0, b"GGML"), "not a GGUF file"),
    "version": (lambda: damaged(4, struct.pack("<I", 1)), "version 1"),
    "big-endian": (lambda: damaged(4, struct.pack(">I", 3)), "big-endian"),
    "tensors": (lambda: damaged(8, BIG), "at most"),
    "many tensors": (lambda: damaged(8, struct.pack("<Q", 9)), "do not fit"),
    "keys": (lambda: damaged(16, BIG), "at most"),
    "key length": (lambda: damaged(24, BIG), "a key of"),
    "key text": (lambda: damaged(32, b"\xff"), "not UTF-8"),
    "value type": (lambda: damaged(33, struct.pack("<I", 13)), "value type 13"),
    "name length": (lambda: damaged(41, struct.pack("<Q", 64)), "at most 63"),
    "name": (lambda: damaged(49, b"\n"), "cannot be the name"),
    "rank": (lambda: damaged(50, struct.pack("<I", 5)), "5 dimensions"),
    "dimension": (lambda: damaged(54, struct.pack("<Q", 2**64 - 1)), "overflows"),
    "beyond the end": (lambda: damaged(54, struct.pack("<Q", 400)), "ends at byte"),
    "tensor type": (lambda: damaged(62, struct.pack("<I", 4)), "type 4"),
    "block": (lambda: damaged(62, struct.pack("<I", 8)), "no multiple"),
    "offset": (lambda: damaged(66, struct.pack("<Q", 32)), "expected 0"),
    "cut off": (lambda: header()[:70], "inside its header"),
    "trailing": (lambda: header() + bytes(64), "follow the last"),
    "alignment": (
        lambda: header(fields={"general.alignment": Field("u32", 24)}),
        "power of two",
    ),
    "array of arrays": (
        lambda: damaged(33, struct.pack("<IIQ", 9, 9, 1)),
        "array of arrays",
    ),
    "array length": (lambda: damaged(33, struct.pack("<IIQ", 9, 8, 2**40)), "at most"),
    "boolean": (
        lambda: damaged(33, struct.pack("<IB", 7, 2)),
        "0 or 1",
    ),
    "key twice": (
        lambda: _twice(header(fields={"k": Field("u8", 1), "l": Field("u8", 1)}), b"l", b"k"),
        "twice",
    ),
    "tensor twice": (
        lambda: _twice(header(spec=[GGUFSpec(n, "F32", (8,)) for n in "wv"]), b"v", b"w"),
        "twice",
    ),
}


def _twice(data: bytearray, old: bytes, new: bytes) -> bytes:
    return bytes(data).replace(struct.pack("<Q", 1) + old, struct.pack("<Q", 1) + new)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_its_fault(name: str) -> None:
    make, message = BROKEN[name]
    with pytest.raises(CheckpointError, match=message):
        parse(memoryview(bytes(make())), "x.gguf")


def test_the_file_to_be_damaged_is_sound() -> None:
    _, fields, tensors = parse(memoryview(bytes(header())), "x.gguf")
    assert fields == {"k": Field("u32", 7)}
    assert tensors["w"].shape == (4,)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        GGUFFile.open(tmp_path / "x.gguf")


# --------------------------------------------------------------------------------------- the blocks


@pytest.mark.parametrize("kind", READABLE)
def test_values_are_those_of_gguf(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install 'nybble[gguf]'")
    number = getattr(gguf.GGMLQuantizationType, kind, None)
    if number is None:
        pytest.skip(f"this gguf does not know {kind}")
    assert gguf.GGML_QUANT_SIZES[number] == (BY_NAME[kind].block, BY_NAME[kind].nbytes)
    raw = np.random.default_rng(1).integers(0, 256, (64, BY_NAME[kind].nbytes * 4), np.uint8)
    typed = raw.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    with np.errstate(all="ignore"):
        theirs = np.asarray(gguf.quants.dequantize(typed, number), np.float32).reshape(-1)
    ours = decode(kind, raw.reshape(-1))
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_bytes_are_those_of_gguf(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install 'nybble[gguf]'")
    values = np.random.default_rng(2).normal(size=(32, 128)).astype(np.float32)
    values[0] = 0
    theirs = gguf.quants.quantize(values, getattr(gguf.GGMLQuantizationType, kind))
    assert encode(kind, values).tobytes() == theirs.tobytes()


def test_nvfp4_blocks_hold_weight_j_beside_weight_j_plus_8() -> None:
    codes = np.arange(16, dtype=np.uint8)  # weight i has code i
    packed = np.tile(codes[0::2] | codes[1::2] << 4, 4)
    block = nvfp4_blocks(packed, np.array([1, 2, 3, 4], np.uint8))
    assert block.tolist() == [1, 2, 3, 4] + [j | (j + 8) << 4 for j in range(8)] * 4


@pytest.mark.parametrize("scale", [0x7F, 0x81, 0xFF])
def test_a_scale_that_gguf_cannot_hold_is_refused(scale: int) -> None:
    scales = np.array([1, scale, 1, 1], np.uint8)
    with pytest.raises(FormatError, match=f"0x{scale:02X}"):
        nvfp4_blocks(np.zeros(32, np.uint8), scales)


def test_a_negative_zero_scale_is_zero() -> None:
    block = nvfp4_blocks(np.zeros(32, np.uint8), np.array([0x80, 1, 1, 1], np.uint8))
    assert block[:4].tolist() == [0, 1, 1, 1]


def test_k_must_divide_into_super_blocks() -> None:
    with pytest.raises(FormatError, match="multiples of 64"):
        nvfp4_blocks(np.zeros(8, np.uint8), np.zeros(1, np.uint8))


def test_a_nan_scale_of_mxfp4_is_refused() -> None:
    with pytest.raises(FormatError, match="0xFF"):
        mxfp4_blocks(np.zeros(16, np.uint8), np.array([0xFF], np.uint8))


@pytest.mark.parametrize("kind", ["IQ4_XS", "TQ1_0"])
def test_other_types_are_refused_by_name(kind: str) -> None:
    with pytest.raises(FormatError, match=kind):
        decode(kind, np.zeros(0, np.uint8))
    with pytest.raises(FormatError, match=kind):
        encode(kind, np.zeros(256, np.float32))


def test_rounding_to_bf16_is_counted() -> None:
    values = np.array([1.0, 1.0 + 2**-9, -3.5, 1e-30], np.float32)
    bits, lost = to_bf16(values)
    back = (bits.astype(np.uint32) << 16).view(np.float32)
    assert lost == 2
    assert back[[0, 2]].tolist() == [1.0, -3.5]


# ------------------------------------------------------------------------------ there: every value


def module_values(checkpoint: Checkpoint, module: Module) -> Floats:
    """An NVFP4 module decoded by the definition."""
    codes, scale = module.tensor("weight_packed", "weight"), module.tensor("weight_scale")
    tensor_scale = module.tensor("weight_scale_2", "weight_global_scale")
    assert codes is not None
    assert scale is not None
    assert tensor_scale is not None
    stored = checkpoint.array(tensor_scale.name).astype(np.float32).reshape(())
    raw = checkpoint.array(codes.name).view(np.uint8)
    return BlockScaledTensor(
        NVFP4,
        (raw.shape[0], 2 * raw.shape[1]),
        raw,
        checkpoint.array(scale.name).view(np.uint8),
        1 / stored if "global" in tensor_scale.name else stored,
    ).dequantize()


@pytest.mark.parametrize("base", BASES)
def test_every_value_of_the_checkpoint_is_in_the_file(tmp_path: Path, base: str) -> None:
    convert(CLEAN / base, tmp_path / "x.gguf")
    model = GGUFModel.open(tmp_path / "x.gguf")
    seen = 0
    with Checkpoint.open(CLEAN / base) as checkpoint:
        for module in read_contents(checkpoint, declaration_of(checkpoint)).modules:
            if "visual" in module.name:
                continue
            if module.kind.held == "nvfp4":
                values = module_values(checkpoint, module)
                assert np.array_equal(model.read(f"{module.name}.weight"), values), module.name
                seen += 1
                continue
            for tensor in module.tensors:
                stored = checkpoint.array(tensor.name).astype(np.float32)
                found = model.read(tensor.name)
                assert found.shape == stored.shape, tensor.name
                # 1 is added to norms and A_log becomes -exp in float32, which loses what BF16
                # does not see.
                assert np.allclose(found, stored, rtol=2**-9, atol=2**-23), tensor.name
                is_changed = (
                    tensor.name.endswith(("norm.weight", "A_log")) or "norm_" in tensor.name
                )
                assert is_changed or np.array_equal(found, stored), tensor.name
                seen += 1
    assert seen > 10


def test_both_layouts_become_one_file(tmp_path: Path) -> None:
    for base in ("nybble-modelopt", "nybble-ct"):
        folder = tmp_path / base / "model"  # the folder's name is the model's
        shutil.copytree(CLEAN / base, folder)
        convert(folder, tmp_path / f"{base}.gguf")
    one, other = (tmp_path / f"{b}.gguf" for b in ("nybble-modelopt", "nybble-ct"))
    with GGUFFile.open(one) as a, GGUFFile.open(other) as b:
        assert a.tensors.keys() == b.tensors.keys()
        assert all(np.array_equal(a.raw(n), b.raw(n)) for n in a.tensors)
        assert a.fields.keys() == b.fields.keys()


def test_w4a16_is_tagged_and_w4a4_is_not(tmp_path: Path) -> None:
    convert(CLEAN / "nybble-modelopt", tmp_path / "a.gguf")
    convert(CLEAN / "nybble-w4a4", tmp_path / "b.gguf")
    with GGUFFile.open(tmp_path / "a.gguf") as a, GGUFFile.open(tmp_path / "b.gguf") as b:
        four_bit = sorted(n for n, t in a.tensors.items() if t.type == "NVFP4")
        assert a.metadata["general.tensor_extra.name"] == four_bit
        assert "general.tensor_extra.name" not in b.metadata
        assert not any(n.endswith(".input_scale") for n in a.tensors)
        weights = [n for n, t in b.tensors.items() if t.type == "NVFP4"]
        assert all(n.removesuffix("weight") + "input_scale" in b.tensors for n in weights)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    result = convert(CLEAN / "source", tmp_path / "x.gguf")
    assert len(result.left_out) == 1
    assert "tensors of the vision tower" in result.left_out[0]
    assert "mmproj" in result.left_out[0]


def test_the_rest_goes_as_q8_0_if_asked(tmp_path: Path) -> None:
    result = convert(CLEAN / "nybble-dense", tmp_path / "x.gguf", rest="q8_0")
    assert result.types.keys() == {"NVFP4", "F32", "Q8_0"}
    model = GGUFModel.open(tmp_path / "x.gguf")
    with Checkpoint.open(CLEAN / "nybble-dense") as checkpoint:
        stored = checkpoint.array("model.embed_tokens.weight").astype(np.float32)
    found = model.read("model.embed_tokens.weight")
    # Half a step of 1 / 127 of the block's largest value.
    assert np.abs(found - stored).max() <= np.abs(stored).max() / 127 / 2 * 1.01


def test_the_threads_do_not_matter(tmp_path: Path) -> None:
    for threads in (1, 4):
        with Checkpoint.open(CLEAN / "nybble-modelopt") as checkpoint:
            write_gguf(checkpoint, tmp_path / f"{threads}.gguf", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "4.gguf").read_bytes()


# ----------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("base", ["source", "source-dense"])
def test_a_bf16_model_comes_back(tmp_path: Path, base: str) -> None:
    convert(CLEAN / base, tmp_path / "x.gguf")
    result = write_bf16_from_gguf(tmp_path / "x.gguf", tmp_path / "back", threads=2)
    assert sum(result.rounded.values()) == 0
    with Checkpoint.open(tmp_path / "back") as back, Checkpoint.open(CLEAN / base) as source:
        plain = {n.replace("language_model.", ""): n for n in source.tensors if "visual" not in n}
        assert back.tensors.keys() == plain.keys()
        for name, original in plain.items():
            ours, theirs = (c.array(n) for c, n in ((back, name), (source, original)))
            # The file's norms are 1 + w in float32: bits of w below 2^-24 are gone there.
            assert np.allclose(
                ours.astype(np.float32), theirs.astype(np.float32), rtol=2**-8, atol=2**-24
            ), name


@pytest.mark.parametrize("base", ["nybble-modelopt", "nybble-dense", "source"])
def test_a_file_made_of_its_bf16_folder_has_the_same_values(tmp_path: Path, base: str) -> None:
    convert(CLEAN / base, tmp_path / "a.gguf")
    write_bf16_from_gguf(tmp_path / "a.gguf", tmp_path / "back", threads=2)
    convert(tmp_path / "back", tmp_path / "b.gguf")
    one, other = GGUFModel.open(tmp_path / "a.gguf"), GGUFModel.open(tmp_path / "b.gguf")
    assert one.tensors == other.tensors
    assert all(np.array_equal(one.read(n), other.read(n)) for n in one.tensors)
    skipped = ("general.", "tokenizer.ggml.add_")
    kept = [k for k in one.file.metadata if not k.startswith(skipped)]
    for key in kept:
        assert np.array_equal(one.file.metadata[key], other.file.metadata[key]), key


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copytree(CLEAN / "source", tmp_path / "model")
    set_vocabulary(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "x.gguf")
    write_bf16_from_gguf(tmp_path / "x.gguf", tmp_path / "back")
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    text = (ROOT / "tests" / "peer" / "story.txt").read_text(
        "utf-8"
    ) + "<|im_start|>a\u0301 123\r\n"
    assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.get_vocab() == theirs.get_vocab()


def set_vocabulary(folder: Path) -> None:
    """Give a folder the chat model's tokenizer, cut so that it fits the embedding."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            shutil.copyfile(CHAT / name, folder / name)


# ----------------------------------------------------------------------------------------- refusals


def dense(folder: Path, **changed: Any) -> Path:
    """A random qwen3 of the tests, with the chat model's tokenizer."""
    config = tiny.config("qwen3", vocab_size=4096, max_position_embeddings=128, **changed)
    tiny.write(folder, config, tiny.tensors(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHAT / name, folder / name)
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def refused(folder: Path, error: type[NybbleError], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(folder, folder.parent / "x.gguf")
    assert not (folder.parent / "x.gguf").exists()
    assert not (folder.parent / "x.gguf.partial").exists()


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    config = tiny.config("qwen3", vocab_size=4096, max_position_embeddings=128)
    values = tiny.tensors(config) | {"model.layers.0.self_attn.sinks": np.zeros(4, np.float32)}
    tiny.write(tmp_path / "m", config, values)
    refused(tmp_path / "m", ModelError, "sinks")


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    config = tiny.config("llama", vocab_size=4096, max_position_embeddings=128)
    tiny.write(tmp_path / "m", config, tiny.tensors(config))
    rewrite(tmp_path / "m" / "config.json", lambda c: c.update(num_attention_heads=4))
    refused(tmp_path / "m", ModelError, "expected 128 rows")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    folder = dense(tmp_path / "m")
    rewrite(folder / "config.json", lambda c: c.update(model_type="gpt_neox"))
    refused(folder, ModelError, "gpt_neox")


def test_an_unknown_rope_is_refused(tmp_path: Path) -> None:
    folder = dense(tmp_path / "m", rope_scaling={"rope_type": "longrope", "factor": 2.0})
    refused(folder, ModelError, "longrope")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    folder = dense(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    refused(folder, TextError, "no tokenizer.json")


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = dense(tmp_path / "m")
    rewrite(folder / "tokenizer.json", lambda t: t["added_tokens"][0].update(id=4096))
    refused(folder, TextError, "4096 rows")


def test_an_unknown_splitting_rule_is_refused(tmp_path: Path) -> None:
    folder = dense(tmp_path / "m")

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"

    rewrite(folder / "tokenizer.json", change)
    refused(folder, TextError, "splitting rules by name")


@pytest.mark.parametrize("name", ["qwen2", "qwen35", "llama-bpe", "smollm", "gpt-2"])
def test_a_rule_is_found_by_what_it_is(name: str) -> None:
    document = {"model": {"type": "BPE"}, "normalizer": None, "pre_tokenizer": pre_tokenizer(name)}
    assert splitting_rule(document, "x") == name
    with pytest.raises(TextError, match="Lowercase"):
        splitting_rule({**document, "normalizer": {"type": "Lowercase"}}, "x")


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """K of 96 is whole blocks of 16, but no whole block of GGUF."""
    folder = dense(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    values = tiny.tensors(config)
    name = "model.layers.0.mlp.up_proj"
    n, k = values.pop(f"{name}.weight").shape
    assert k % 64
    values[f"{name}.weight"] = np.zeros((n, k // 2), np.uint8)
    values[f"{name}.weight_scale"] = np.ones((n, k // 16), tiny.DTYPES["F8_E4M3"])
    values[f"{name}.weight_scale_2"] = np.array(1, np.float32)
    layers = {name: {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
    }
    tiny.write(folder, config, values)
    refused(folder, FormatError, "K is 96")


def test_bytes_without_scales_are_refused(tmp_path: Path) -> None:
    config = tiny.config("qwen3", vocab_size=4096, max_position_embeddings=128)
    values = tiny.tensors(config)
    name = "model.layers.0.mlp.up_proj.weight"
    values[name] = np.zeros(values[name].shape, np.uint8)
    tiny.write(tmp_path / "m", config, values)
    refused(tmp_path / "m", FormatError, "up_proj.weight: holds U8")


def test_float32_weights_are_rounded_and_counted(tmp_path: Path) -> None:
    config = tiny.config("qwen3", vocab_size=4096, max_position_embeddings=128)
    values = {n: v.astype(np.float32) for n, v in tiny.tensors(config).items()}
    values["model.layers.0.mlp.up_proj.weight"][0, :3] += np.float32(2.0**-14)
    tiny.write(tmp_path / "m", config, values)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHAT / name, tmp_path / "m" / name)
    result = convert(tmp_path / "m", tmp_path / "x.gguf")
    assert result.rounded.keys() <= {"blk.0.ffn_up.weight"}
    assert 0 < sum(result.rounded.values()) <= 3


def test_one_file_of_several_is_refused(tmp_path: Path) -> None:
    fields = {
        "general.architecture": Field("str", "llama"),
        "split.count": Field("u16", 2),
    }
    with GGUFWriter(tmp_path / "x.gguf", fields, [GGUFSpec("w", "F32", (1,))]) as writer:
        writer.write("w", bytes(4))
        writer.finish()
    with pytest.raises(CheckpointError, match="one of 2 files"):
        GGUFModel.open(tmp_path / "x.gguf")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    fields = {"general.architecture": Field("str", "gemma")}
    with GGUFWriter(tmp_path / "x.gguf", fields, [GGUFSpec("w", "F32", (1,))]) as writer:
        writer.write("w", bytes(4))
        writer.finish()
    with pytest.raises(ModelError, match="gemma"):
        GGUFModel.open(tmp_path / "x.gguf")


# ------------------------------------------------------------------------------------------ llama 3


def test_the_rope_of_llama3_goes_as_factors_and_comes_back(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny.config(
        "llama", vocab_size=4096, max_position_embeddings=131072, rope_parameters=rope
    )
    tiny.write(tmp_path / "m", config, tiny.tensors(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHAT / name, tmp_path / "m" / name)
    convert(tmp_path / "m", tmp_path / "x.gguf")
    model = GGUFModel.open(tmp_path / "x.gguf")
    factors = model.file.values("rope_freqs.weight").reshape(-1)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert (np.diff(factors) >= 0).all()
    assert model.config["rope_parameters"] == rope
    assert rope_factors({**config, "rope_parameters": {"rope_theta": 1e4}}, model.dims) is None


def test_parts_of_a_nvfp4_tensor_come_back() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, (8, 64), np.uint8)
    scales = rng.integers(0, 0x7F, (8, 8), np.uint8)
    back = nvfp4_parts(nvfp4_blocks(codes, scales))
    assert np.array_equal(back[0], codes.reshape(-1))
    assert np.array_equal(back[1], scales.reshape(-1))


# ------------------------------------------------------------------- files that say absurd things

HOSTILE: dict[str, tuple[str, Field | None, str]] = {
    "no heads": ("attention.head_count", Field("u32", 0), "num_attention_heads"),
    "absurd heads": ("attention.head_count", Field("u32", 2**32 - 1), "whole number"),
    "many heads": ("attention.head_count", Field("u32", 2**24), "contradict"),
    "many blocks": ("block_count", Field("u32", 2**24), "as many as tensors"),
    "no width": ("embedding_length", None, "embedding_length"),
    "another width": ("embedding_length", Field("u32", 1000), "contradict"),
    "text for a number": ("context_length", Field("str", "long"), "context_length"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_at_odds_with_the_tensors_are_refused(tmp_path: Path, name: str) -> None:
    key, field, message = HOSTILE[name]
    convert(CLEAN / "source-dense", tmp_path / "x.gguf")
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        fields = dict(file.fields)
        fields.pop(f"qwen3.{key}")
        if field is not None:
            fields[f"qwen3.{key}"] = field
        specs = [GGUFSpec(t.name, t.type, t.shape) for t in file.tensors.values()]
        with GGUFWriter(tmp_path / "y.gguf", fields, specs) as writer:
            for spec in specs:
                writer.write(spec.name, file.raw(spec.name))
            writer.finish()
    with pytest.raises(ModelError, match=message):
        GGUFModel.open(tmp_path / "y.gguf")


def test_a_stack_without_its_dimension_is_refused(tmp_path: Path) -> None:
    convert(CLEAN / "source", tmp_path / "x.gguf")
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        specs = [
            GGUFSpec(t.name, t.type, t.shape[1:] if "down_exps" in t.name else t.shape)
            for t in file.tensors.values()
        ]
        header, _, size = lay_out(file.fields, specs)
    (tmp_path / "y.gguf").write_bytes(header + bytes(size - len(header)))
    with pytest.raises(CheckpointError, match="three dimensions"):
        GGUFModel.open(tmp_path / "y.gguf")
