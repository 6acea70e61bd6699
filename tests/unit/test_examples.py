"""The example scripts (independent decoder, GGUF reader) and how the test model was made."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
VLM = ROOT / "models" / "hybrid-chat-mtp"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# One float32 rounding: the tools and the decoder multiply the two scales in another order.
FLOAT32_RTOL = 2.0**-23
# compressed-tensors decompresses in BF16, rounding the scale, the quotient and the product.
BF16_RTOL = 3 * 2.0**-8


def script(folder: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def decode() -> ModuleType:
    return script("examples", "decode")


@pytest.fixture(scope="module")
def make_vlm() -> ModuleType:
    return script("models", "make_vlm")


@pytest.fixture(scope="module")
def smollm2() -> ModuleType:
    pytest.importorskip("gguf", reason="the GGUF example needs the gguf extra")
    return script("examples", "smollm2")


# --- decode.py against what two other quantizers decode their own files to


def golden_cases() -> list[tuple[str, str, str]]:
    cases = []
    for file in ("nvfp4_absmax", "mxfp4_absmax", "fp8_tensor", "fp8_channel", "fp8_block"):
        with safe_open(GOLDEN / f"{file}.safetensors", "np") as f:
            cases += [(file, *name.split(".")[:2]) for name in f.keys() if "dequantized" in name]
    return sorted(cases)


@pytest.mark.parametrize(("file", "case", "tool"), golden_cases())
def test_decodes_what_the_tool_decodes(
    decode: ModuleType, tmp_path: Path, file: str, case: str, tool: str
) -> None:
    golden = decode.read_file(GOLDEN / f"{file}.safetensors")
    prefix = f"{case}.{tool}."
    stored = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    wanted = stored.pop("dequantized").astype(np.float32)
    save_file({f"m.{leaf}": tensor for leaf, tensor in stored.items()}, tmp_path / "a.safetensors")
    with np.errstate(invalid="ignore", over="ignore"):
        [(name, weight)] = decode.decode(tmp_path)
    assert name == "m"
    rtol = FLOAT32_RTOL if tool == "modelopt" else BF16_RTOL
    np.testing.assert_allclose(weight, wanted, rtol=rtol, atol=0)


# --- decode.py comparing a checkpoint with its source


def quantized_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plainest FP8 quantization there is: one scale, round to nearest."""
    wide = weight.astype(np.float32)
    scale = np.abs(wide).max() / np.float32(448)
    return (wide / scale).astype(ml_dtypes.float8_e4m3fn), np.float32(scale).reshape(())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A BF16 folder with stacked experts, a head, MTP and vision, and its quantized checkpoint."""
    rng = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    source = {
        "model.layers.0.mlp.experts.gate_up_proj": random(2, 12, 16),
        "model.layers.0.mlp.experts.down_proj": random(2, 16, 6),
        "model.layers.0.self_attn.q_proj.weight": random(8, 16),
        "model.norm.weight": random(16),
        "mtp.fc.weight": random(4, 4),
        "mtp.layers.0.mlp.experts.down_proj": random(2, 4, 4),
        "model.visual.pos_embed.weight": random(4, 4),
    }
    checkpoint = {}
    for name, tensor in source.items():
        linears = {name: tensor}
        if name.startswith("model.layers.0.mlp.experts"):
            base = "model.layers.0.mlp.experts"
            linears = {f"{base}.{e}.down_proj.weight": tensor[e] for e in range(2)}
            if name.endswith("gate_up_proj"):
                linears = {f"{base}.{e}.gate_proj.weight": tensor[e, :6] for e in range(2)}
                linears |= {f"{base}.{e}.up_proj.weight": tensor[e, 6:] for e in range(2)}
        for linear, weight in linears.items():
            if ".layers.0." in linear and not linear.startswith("mtp"):
                codes, scale = quantized_fp8(weight)
                checkpoint |= {linear: codes, linear + "_scale": scale}
            else:
                checkpoint[linear] = weight
    for folder, tensors in (("source", source), ("checkpoint", checkpoint)):
        (tmp_path / folder).mkdir()
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()},
            tmp_path / folder / "model.safetensors",
        )
    return tmp_path / "checkpoint", tmp_path / "source"


def run(decode: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, arguments)])
    return int(decode.main())


def test_accepts_a_sound_checkpoint(
    decode: ModuleType,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, source = folders
    assert run(decode, monkeypatch, checkpoint, "--source", source) == 0
    printed = capsys.readouterr().out
    assert "7 modules, 704 weights decoded; 0 wrong" in printed
    assert "copied, mtp: 2 of 2 byte-identical" in printed
    assert "copied, vision: 1 of 1 byte-identical" in printed
    assert "copied, other: 1 of 1 byte-identical" in printed


def test_decodes_without_a_source(
    decode: ModuleType, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(decode, monkeypatch, folders[0]) == 0


def swapped_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray | None]:
    """Gate rows where up rows belong."""
    gate, up = (f"model.layers.0.mlp.experts.0.{leaf}_proj.weight" for leaf in ("gate", "up"))
    return {gate: tensors[up], up: tensors[gate]}


def one_byte(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray | None]:
    changed = tensors["mtp.fc.weight"].copy()
    changed.view(np.uint8)[0, 0] ^= 1
    return {"mtp.fc.weight": changed}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swapped_experts, "dB: not the source's weights"),
        (one_byte, "mtp.fc.weight: not a copy of the source"),
        (lambda tensors: {"model.norm.weight": None}, "model.norm.weight: missing"),
        (
            lambda tensors: {"model.norm.weight": tensors["model.norm.weight"].astype(np.float32)},
            "model.norm.weight: not a copy of the source",
        ),
        (
            lambda tensors: {"stray.weight": tensors["model.norm.weight"]},
            "stray.weight: not in the source",
        ),
        (
            lambda tensors: {
                "model.layers.0.self_attn.q_proj.weight_scale": np.array(np.nan, np.float32)
            },
            "q_proj.weight: not finite",
        ),
        (
            lambda tensors: {
                name: tensors[name][:4] for name in ("model.layers.0.self_attn.q_proj.weight",)
            },
            "q_proj.weight: shape (4, 16), source (8, 16)",
        ),
    ],
)
def test_tells_damage(
    decode: ModuleType,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: object,
    message: str,
) -> None:
    checkpoint, source = folders
    assert callable(damage)
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in decode.read_file(file).items()}
    tensors |= damage(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    assert run(decode, monkeypatch, checkpoint, "--source", source) == 1
    assert message in capsys.readouterr().out


def test_refuses_an_index_that_disagrees(decode: ModuleType, folders: tuple[Path, Path]) -> None:
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (folders[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="does not say what the files hold"):
        decode.compare(*folders)


def test_refuses_an_unknown_combination(decode: ModuleType, tmp_path: Path) -> None:
    codes = np.zeros((4, 8), np.uint8)
    scale = np.ones((4, 1), ml_dtypes.float8_e4m3fn)  # NVFP4 without its tensor scale
    save_file({"m.weight": codes, "m.weight_scale": scale}, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match="no format known"):
        decode.compare(tmp_path, None)


# --- models/make_vlm.py and the folder it made


def test_index_says_what_the_shards_hold() -> None:
    index = json.loads((VLM / "model.safetensors.index.json").read_text())
    held, size_bytes, elements = {}, 0, 0
    for file in sorted(VLM.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            held[name] = file.name
            size_bytes += tensor.nbytes
            elements += tensor.size
    assert index["weight_map"] == held
    assert index["metadata"] == {"total_parameters": elements, "total_size": size_bytes}


def test_vision_tower_is_made_again_equal(make_vlm: ModuleType) -> None:
    config = json.loads((VLM / "config.json").read_text())
    stored = load_file(VLM / "model-00003-of-00003.safetensors")
    made = make_vlm.vision_tensors(config["vision_config"])
    assert stored.keys() == made.keys()
    for name, tensor in made.items():
        assert stored[name].shape == tensor.shape
        assert stored[name].tobytes() == tensor.tobytes(), name


def test_folder_is_made_again_equal(make_vlm: ModuleType, tmp_path: Path) -> None:
    """From the flat folder, which is the stored one with nesting and tower taken out."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in make_vlm.COPIED:
        shutil.copyfile(VLM / name, flat / name)
    nested = json.loads((VLM / "config.json").read_text())
    config = nested["text_config"] | {"transformers_version": nested["transformers_version"]}
    (flat / "config.json").write_text(json.dumps(config))
    index = json.loads((VLM / "model.safetensors.index.json").read_text())
    tower = {k for k, file in index["weight_map"].items() if file.startswith("model-00003")}
    added = sum(load_file(VLM / "model-00003-of-00003.safetensors")[k].size for k in tower)
    for number in (1, 2):
        old = flat / f"model-{number:05}-of-00002.safetensors"
        shutil.copyfile(VLM / f"model-{number:05}-of-00003.safetensors", old)
    flat_index = {
        "metadata": {
            "total_parameters": index["metadata"]["total_parameters"] - added,
            "total_size": index["metadata"]["total_size"] - 2 * added,
        },
        "weight_map": {
            name: file.replace("00003.", "00002.")
            for name, file in index["weight_map"].items()
            if name not in tower
        },
    }
    (flat / "model.safetensors.index.json").write_text(json.dumps(flat_index))
    make_vlm.make(flat, tmp_path / "vlm")
    made = {file.name: file.read_bytes() for file in (tmp_path / "vlm").iterdir()}
    assert made == {name: (VLM / name).read_bytes() for name in made}
    assert made.keys() == {file.name for file in VLM.iterdir()} - {"README.md"}


# --- smollm2.py


def test_undoes_the_converters_row_order(smollm2: ModuleType) -> None:
    heads, size, columns = 3, 8, 5
    weight = np.arange(heads * size * columns, dtype=np.float32).reshape(-1, columns)
    halves = weight.reshape(heads, 2, size // 2, columns)  # as llama.cpp's converter writes it
    stored = halves.swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(stored, weight)
    np.testing.assert_array_equal(smollm2.half_split_rows(stored, heads), weight)


def tiny_gguf(path: Path, **extra: str) -> dict[str, np.ndarray]:
    """Write a one-layer llama GGUF; its tensors as they lie in the file, float32."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", *"1abĠ", "ab", "Ġab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 6)
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in extra.items():
        writer.add_string(key.replace("_", "."), value)
    shapes = {"token_embd": (7, 8), "output_norm": (8,), "output": (7, 8)}
    layer = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8)}
    layer |= {"attn_output": (8, 8), "ffn_norm": (8,), "ffn_gate": (16, 8), "ffn_up": (16, 8)}
    layer |= {"ffn_down": (8, 16)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(3)
    tensors = {f"{k}.weight": rng.standard_normal(s, np.float32) for k, s in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_writes_a_hugging_face_folder(smollm2: ModuleType, tmp_path: Path) -> None:
    stored = tiny_gguf(tmp_path / "tiny.gguf")
    text = smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert "quantized before" in text
    assert (tmp_path / "out" / "NOTICE").read_text() == text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["tie_word_embeddings"]) == (1e-05, False)
    assert (config["num_key_value_heads"], config["head_dim"], config["vocab_size"]) == (1, 4, 7)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert len(weights) == len(stored)
    for name in ("blk.0.ffn_down.weight", "output.weight", "token_embd.weight"):
        wanted = stored[name].astype(ml_dtypes.bfloat16)
        assert weights[smollm2.hugging_face_name(name)].tobytes() == wanted.tobytes()
    rows = weights["model.layers.0.self_attn.k_proj.weight"]
    wanted = stored["blk.0.attn_k.weight"][[0, 2, 1, 3]].astype(ml_dtypes.bfloat16)
    assert rows.tobytes() == wanted.tobytes()


def test_refuses_what_it_does_not_know(smollm2: ModuleType, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", llama_rope_scaling_type="yarn")
    with pytest.raises(SystemExit, match="yarn"):
        smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    with pytest.raises(SystemExit, match="no place"):
        smollm2.hugging_face_name("blk.0.attn_q.bias")


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> object:
    """The tokenizer of the real model, through the `tokenizers` library."""
    cached = Path.home() / ".cache" / "nybble" / "smollm2" / GGUF
    file = Path(os.environ.get("NYBBLE_SMOLLM2_GGUF", cached))
    if not file.exists():
        pytest.skip(f"{GGUF} is neither at $NYBBLE_SMOLLM2_GGUF nor at {cached}")
    tokenizers = pytest.importorskip("tokenizers")
    content = smollm2.tokenizer(smollm2.Metadata(smollm2.GGUFReader(file)))
    path = tmp_path_factory.mktemp("smollm2") / "tokenizer.json"
    path.write_text(json.dumps(content))
    return tokenizers.Tokenizer.from_file(str(path))


def test_token_ids_are_those_of_another_implementation(smollm2_tokenizer: object) -> None:
    cases = json.loads((Path(__file__).parent / "smollm2_ids.json").read_text())["cases"]
    assert len(cases) >= 30
    for case in cases:
        encoded = smollm2_tokenizer.encode(case["text"])  # type: ignore[attr-defined]
        assert encoded.ids == case["ids"], case["text"]
        decoded = smollm2_tokenizer.decode(  # type: ignore[attr-defined]
            encoded.ids, skip_special_tokens=False
        )
        assert decoded == case["text"]
