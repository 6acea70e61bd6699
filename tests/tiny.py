"""Tiny random checkpoints of every family, and headers of the published ones: numpy only,
independent of nybble.

All dimensions differ, value heads are three times the key heads, and the vocabulary is odd: equal
sizes hide transposed weights. Every K divides by 32 unless a test asks for another one. A tensor's
values depend on its name and the seed alone, and an expert's on its number, so stacked and per-
expert forms of one model hold the same weights.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

TESTS = Path(__file__).parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

import make_headers  # noqa: E402

CONFIGS = TESTS / "fixtures" / "configs"
MODELS = TESTS.parent / "models"

Tensors = dict[str, NDArray[Any]]

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
}
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
HYBRIDS = ("qwen3_5_moe", "qwen3_5")
EXPERTS = ("qwen3_5_moe", "qwen3_moe")
FAMILIES = (*HYBRIDS, "qwen3_moe", "qwen3", "qwen2", "llama")
_CLASSES = {
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}

_BASE: dict[str, Any] = {
    "hidden_size": 96,
    "vocab_size": 131,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 224,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "attn_output_gate": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "mtp_num_hidden_layers": 1,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "in_channels": 3,
    "num_position_embeddings": 6,
    "out_hidden_size": 96,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def config(
    family: str, *, dtype: str = "BF16", vision: bool = False, **changed: object
) -> dict[str, Any]:
    """A config.json; keyword arguments replace keys of the text section, None takes one out."""
    text = dict(_BASE)
    if family in HYBRIDS:
        text |= _HYBRID
    if family in EXPERTS:
        text |= _EXPERTS
    text |= changed
    text = {k: v for k, v in text.items() if v is not None or k == "bos_token_id"}
    if family not in HYBRIDS:
        return {
            "architectures": [_CLASSES[family]],
            "model_type": family,
            "torch_dtype": _TORCH[dtype],
            **text,
        }
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "text_config": {"model_type": f"{family}_text", "dtype": _TORCH[dtype], **text},
        **({"vision_config": dict(_VISION)} if vision else {}),
        "image_token_id": 12,
        "title": "mixed ünïcode, 1e-06 and a long integer",
        "a_long_integer": 12345678901234567890,
    }


def listing(
    cfg: Mapping[str, Any], *, f32_gdn: bool = False
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes in module order, experts stacked where the family stacks them."""
    family = cfg["model_type"]
    if family in HYBRIDS:
        return make_headers.checkpoint(cfg, f32_gdn=f32_gdn)  # type: ignore[no-any-return]
    dtype = make_headers.TORCH[cfg["torch_dtype"]]
    h, d = (
        cfg["hidden_size"],
        cfg.get("head_dim") or cfg["hidden_size"] // cfg["num_attention_heads"],
    )
    q, kv = (
        cfg["num_attention_heads"] * d,
        cfg.get("num_key_value_heads", cfg["num_attention_heads"]) * d,
    )
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (cfg["vocab_size"], h))
    ]
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        rows = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        for name, shape in rows.items():
            found.append((f"{p}self_attn.{name}.weight", shape))
            is_biased = name != "o_proj" if family == "qwen2" else cfg.get("attention_bias", False)
            if is_biased:
                found.append((f"{p}self_attn.{name}.bias", shape[:1]))
        if family.startswith("qwen3"):
            found += [(f"{p}self_attn.{n}.weight", (d,)) for n in ("q_norm", "k_norm")]
        is_sparse = family in EXPERTS and i not in cfg.get("mlp_only_layers", ())
        if is_sparse:
            e, f = cfg["num_experts"], cfg["moe_intermediate_size"]
            found.append((f"{p}mlp.gate.weight", (e, h)))
            found.append((f"{p}mlp.experts.gate_up_proj", (e, 2 * f, h)))
            found.append((f"{p}mlp.experts.down_proj", (e, h, f)))
        else:
            f = cfg["intermediate_size"]
            for name, shape in (("gate_proj", (f, h)), ("up_proj", (f, h)), ("down_proj", (h, f))):
                found.append((f"{p}mlp.{name}.weight", shape))
                if cfg.get("mlp_bias", False):
                    found.append((f"{p}mlp.{name}.bias", shape[:1]))
        found += [(f"{p}{n}.weight", (h,)) for n in ("input_layernorm", "post_attention_layernorm")]
    found.append(("model.norm.weight", (h,)))
    if not cfg.get("tie_word_embeddings"):
        found.append(("lm_head.weight", (cfg["vocab_size"], h)))
    return [(name, dtype, shape) for name, shape in found]


def tensors(
    cfg: Mapping[str, Any],
    *,
    seed: int = 0,
    stacked: bool | None = None,
    mtp_stacked: bool = True,
    f32_gdn: bool = False,
    prefix: str = "",
) -> Tensors:
    """Random values. `stacked` None: as published (qwen3_moe per expert). `prefix` replaces
    "model.language_model."."""
    if stacked is None:
        stacked = cfg["model_type"] != "qwen3_moe"
    found: Tensors = {}
    for name, dtype, shape in listing(cfg, f32_gdn=f32_gdn):
        value = _values(name, shape, seed).astype(DTYPES[dtype])
        if prefix and name.startswith("model.language_model."):
            name = prefix + name.removeprefix("model.language_model.")
        is_split = not (mtp_stacked if name.startswith("mtp.") else stacked)
        if ".mlp.experts." in name and is_split:
            found.update(split(name, value))
        else:
            found[name] = value
    return found


def split(name: str, stack: NDArray[Any]) -> Tensors:
    """A stack of experts as the tensors of the per-expert layout."""
    container, _, kind = name.rpartition(".")
    found: Tensors = {}
    for e, matrix in enumerate(stack):
        half = len(matrix) // 2
        parts = (
            {"gate_proj": matrix[:half], "up_proj": matrix[half:]}
            if kind == "gate_up_proj"
            else {"down_proj": matrix}
        )
        for part, value in parts.items():
            found[f"{container}.{e}.{part}.weight"] = np.ascontiguousarray(value)
    return found


def _values(name: str, shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    x = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name or name.endswith("A_log"):
        return np.float32(1) + x / np.float32(4)
    # Rows and tensors of very different sizes: a scale taken from the wrong one shows.
    sizes = np.float32(0.02) * 2 ** rng.uniform(-3, 3, shape[:-1]).astype(np.float32)
    sizes *= np.float32(2 ** rng.uniform(-3, 3))
    return x * sizes[..., None] if x.ndim > 1 else x * np.float32(0.02)


def write(
    folder: Path, cfg: Mapping[str, Any], values: Mapping[str, NDArray[Any]], *, shards: int = 1
) -> Path:
    """A checkpoint folder with its side files; the tensors stay in their order, in `shards`
    files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(values)
    step = -(-len(names) // shards)
    parts = [names[i : i + step] for i in range(0, len(names), step)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        is_lone = len(parts) == 1
        file = "model.safetensors" if is_lone else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, {name: values[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    if len(parts) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(cfg, indent=2, ensure_ascii=False), "utf-8")
    for name, text in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


SIDE_FILES = {
    "tokenizer.json": '{"version": "1.0",\n  "added_tokens": []}',
    "tokenizer_config.json": '{"chat_template":"{{ x }}"}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}\r\n{% endfor %}",
    "generation_config.json": '{"temperature": 0.60, "do_sample": true}\n\n',
    "preprocessor_config.json": "{}",
    "original/params.json": "{}",
}


def write_safetensors(path: Path, values: Mapping[str, NDArray[Any]]) -> None:
    """One file, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in values.items():
        header[name] = {
            "dtype": _SPELLED[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values.values():
            file.write(np.ascontiguousarray(value).tobytes())


def checkpoint(
    folder: Path, family: str, *, shards: int = 1, seed: int = 0, **options: Any
) -> Path:
    """A tiny checkpoint of a family; options as for `config` and `tensors`."""
    own = {
        k: options.pop(k) for k in ("stacked", "mtp_stacked", "f32_gdn", "prefix") if k in options
    }
    cfg = config(family, **options)
    return write(folder, cfg, tensors(cfg, seed=seed, **own), shards=shards)


def read(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint folder as (dtype, shape, bytes), read without nybble."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            assert name not in found, f"{name} is in two files"
            begin, end = entry["data_offsets"]
            found[name] = (
                entry["dtype"],
                tuple(entry["shape"]),
                data[8 + length + begin : 8 + length + end],
            )
    return found


def array(entry: tuple[str, tuple[int, ...], bytes]) -> NDArray[Any]:
    """One tensor of `read` as an array."""
    dtype, shape, data = entry
    return np.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def published(
    folder: Path, name: str, *, data: str = "none", drop: Sequence[str] = (), **options: Any
) -> Path:
    """Headers of the BF16 original of a published checkpoint, from its configuration alone."""
    cfg = json.loads((CONFIGS / name / "config.json").read_text("utf-8"))
    cfg.pop("quantization_config", None)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source_config.json"
    source.write_text(json.dumps(cfg), "utf-8")
    found = [
        t
        for t in make_headers.checkpoint(cfg, **options)
        if not t[0].startswith(tuple(drop) or ("\0",))
    ]
    make_headers.write(folder, make_headers.files(found, 10e9), source, [], data)
    source.unlink()
    return folder


def copy_model(name: str, folder: Path) -> Path:
    """One of the repository's trained models, in a folder that a test may change."""
    shutil.copytree(MODELS / name, folder)
    return folder
