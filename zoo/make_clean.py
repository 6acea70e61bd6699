"""Make the bases: `python zoo/make_clean.py OUT [NAME...]` writes OUT/clean and OUT/tool-made.

`source` and `source-dense` are random weights drawn here; the rest is what nybble, NVIDIA ModelOpt
and llm-compressor make of them. Their tensors and configurations are untouched; tokenizer, chat
template and processor are the source's own files. Needs nybble with its torch extra, and for the
last two the environments that `scripts/peers install modelopt llmcompressor` makes. Two runs of one
version give the same tensors.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from folder import Folder  # noqa: E402

SEED = 20261121
F32_TENSORS = ("A_log", "linear_attn.norm.weight")  # as the originals of Qwen3.5 hold them
BF16 = np.dtype(ml_dtypes.bfloat16)

# --- configurations: K of every linear is a multiple of 64, value heads are twice the key heads

TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "bos_token_id": 115,
    "dtype": "bfloat16",
    "eos_token_id": 115,
    "full_attention_interval": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 32,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 4096,
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 64,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "output_router_logits": False,
    "pad_token_id": None,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 64,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 128,
}
VISION: dict[str, Any] = {
    "deepstack_visual_indexes": [],
    "depth": 1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 16,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 48,  # like the published 4304 a multiple of 16 and not of 32
    "model_type": "qwen3_5_moe",
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_id": 120,
    "model_type": "qwen3_5_moe",
    "text_config": TEXT,
    "tie_word_embeddings": False,
    "transformers_version": "5.14.1",
    "video_token_id": 121,
    "vision_config": VISION,
    "vision_end_token_id": 119,
    "vision_start_token_id": 118,
}
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 115,
    "dtype": "bfloat16",
    "eos_token_id": 117,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.14.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 128,
}

# --- what a prompt is made of: byte-level BPE over ASCII, and Qwen's special tokens

MERGES = (
    *("Ġ t", "h e", "i n", "Ġ a", "e r", "o n", "r e", "Ġ s", "a t", "Ġt he", "i s", "o r"),
    *("e n", "Ġ w", "o u", "n d", "i t", "e s"),
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PLAIN += ("<think>", "</think>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def added_tokens() -> list[dict[str, Any]]:
    """The tokens above the vocabulary: 115 to 127."""
    return [
        {
            "id": 115 + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in SPECIAL,
        }
        for i, token in enumerate((*SPECIAL, *PLAIN))
    ]


def tokenizer() -> dict[str, Any]:
    """tokenizer.json: every printable byte of ASCII, space, newline and tab, and 18 merges."""
    alphabet = [*(chr(c) for c in range(0x21, 0x7F)), "Ġ", "Ċ", "ĉ"]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", **split}, {**byte_level, "use_regex": False}],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in MERGES],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added_tokens()
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


GENERATION = {
    "bos_token_id": 115,
    "do_sample": True,
    "eos_token_id": [117, 115],
    "pad_token_id": 115,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "5.14.1",
}
IMAGES = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 4,
    "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 4096, "shortest_edge": 64},
    "temporal_patch_size": 2,
}
CALIBRATION = (
    "the rain is on the water and the wind is in the reeds, there is no one near it\n" * 60
)

# --- weights

Shapes = dict[str, tuple[int, ...]]


def attention(prefix: str, query: int) -> Shapes:
    """Softmax attention; `query` rows of q_proj, twice the heads' where the output is gated."""
    p, h, d = prefix + "self_attn.", 64, 32
    return {
        f"{p}q_proj.weight": (query, h),
        f"{p}k_proj.weight": (d, h),
        f"{p}v_proj.weight": (d, h),
        f"{p}o_proj.weight": (h, 64),
        f"{p}q_norm.weight": (d,),
        f"{p}k_norm.weight": (d,),
    }


def delta(prefix: str) -> Shapes:
    """A gated DeltaNet mixer."""
    p = prefix + "linear_attn."
    return {
        f"{p}in_proj_qkv.weight": (128, 64),
        f"{p}in_proj_z.weight": (64, 64),
        f"{p}in_proj_b.weight": (2, 64),
        f"{p}in_proj_a.weight": (2, 64),
        f"{p}conv1d.weight": (128, 1, 4),
        f"{p}A_log": (2,),
        f"{p}dt_bias": (2,),
        f"{p}norm.weight": (32,),
        f"{p}out_proj.weight": (64, 64),
    }


def mlp(prefix: str, width: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, 64),
        f"{prefix}up_proj.weight": (width, 64),
        f"{prefix}down_proj.weight": (64, width),
    }


def experts(prefix: str) -> Shapes:
    """Router, stacks of experts and shared expert."""
    return {
        f"{prefix}mlp.gate.weight": (2, 64),
        f"{prefix}mlp.experts.gate_up_proj": (2, 128, 64),
        f"{prefix}mlp.experts.down_proj": (2, 64, 64),
        **mlp(f"{prefix}mlp.shared_expert.", 64),
        f"{prefix}mlp.shared_expert_gate.weight": (1, 64),
    }


def norms(prefix: str) -> Shapes:
    return {
        f"{prefix}{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm")
    }


def hybrid_shapes() -> tuple[Shapes, Shapes]:
    """The tensors of `source`: trunk, and what lies beside it."""
    p = "model.language_model."
    trunk = {f"{p}embed_tokens.weight": (128, 64)}
    trunk |= delta(f"{p}layers.0.") | experts(f"{p}layers.0.") | norms(f"{p}layers.0.")
    trunk |= attention(f"{p}layers.1.", 128) | experts(f"{p}layers.1.") | norms(f"{p}layers.1.")
    trunk |= {f"{p}norm.weight": (64,), "lm_head.weight": (128, 64)}
    m = "mtp.layers.0."
    rest: Shapes = {"mtp.fc.weight": (64, 128), **attention(m, 128), **experts(m), **norms(m)}
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        rest[f"mtp.{name}.weight"] = (64,)
    return trunk, rest | vision_shapes()


def vision_shapes() -> Shapes:
    v, b, h = "model.visual.", "model.visual.blocks.0.", VISION["hidden_size"]
    width, merged = VISION["intermediate_size"], 4 * h
    linears: Shapes = {
        f"{v}patch_embed.proj": (h, 3, 2, 4, 4),
        f"{b}attn.qkv": (3 * h, h),
        f"{b}attn.proj": (h, h),
        f"{b}mlp.linear_fc1": (width, h),
        f"{b}mlp.linear_fc2": (h, width),
        f"{v}merger.linear_fc1": (merged, merged),
        f"{v}merger.linear_fc2": (64, merged),
    }
    shapes: Shapes = {f"{v}pos_embed.weight": (VISION["num_position_embeddings"], h)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in (f"{b}norm1", f"{b}norm2", f"{v}merger.norm"):
        shapes |= {f"{name}.weight": (h,), f"{name}.bias": (h,)}
    return shapes


def dense_shapes() -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (128, 64)}
    for i in range(2):
        p = f"model.layers.{i}."
        shapes |= attention(p, 64) | mlp(f"{p}mlp.", 128) | norms(p)
    return shapes | {"model.norm.weight": (64,), "lm_head.weight": (128, 64)}


def draw(bits: np.random.PCG64, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """One tensor: nearly normal, rows of different sizes, three bits of mantissa (so that the
    files compress). Drawn from the bit generator itself, whose stream no version changes."""
    raw = bits.random_raw(4 * math.prod(shape)).reshape(4, *shape) >> np.uint64(40)
    x = raw.astype(np.float32).sum(axis=0) / np.float32(2**24) - np.float32(2)
    if "norm" in name or name.endswith("A_log"):
        is_zero_centred = "linear_attn" not in name and "visual" not in name
        x = x / np.float32(4) + np.float32(0 if is_zero_centred else 1)
    elif x.ndim > 1:
        size = 2.0 ** -(bits.random_raw(math.prod(shape[:-1])) % np.uint64(16) / 8 + 4)
        x = x * size.astype(np.float32).reshape(*shape[:-1], 1)
    else:
        x = x / np.float32(16)
    mantissa, exponent = np.frexp(x)
    kept = np.ldexp(np.round(mantissa * 16) / np.float32(16), exponent)
    return kept.astype(np.float32 if name.endswith(F32_TENSORS) else BF16)


def draw_all(shapes: Shapes, *, is_zero_centred: bool = True) -> dict[str, NDArray[Any]]:
    """The tensors of these shapes; norms around 1 where the model does not add 1 itself."""
    bits = np.random.PCG64(SEED)
    drawn = {name: draw(bits, name, shape) for name, shape in shapes.items()}
    if not is_zero_centred:
        for name in drawn:
            if "norm" in name:
                drawn[name] = (drawn[name].astype(np.float32) + 1).astype(BF16)
    return drawn


def behaviour(folder: Folder) -> None:
    """Tokenizer, chat template and generation settings."""
    folder.put("tokenizer.json", tokenizer())
    folder.put("tokenizer_config.json", tokenizer_config())
    folder.put("generation_config.json", GENERATION)
    folder.files["chat_template.jinja"] = (HERE / "chat_template.jinja").read_bytes()


def source() -> Folder:
    """Hybrid mixture of experts with MTP head and vision tower, as Qwen publishes them."""
    trunk, rest = hybrid_shapes()
    folder = Folder(tensors=draw_all(trunk | rest))
    for name in folder.tensors:
        part = 1 if name in trunk else 2
        folder.shard_of[name] = f"model-0000{part}-of-00002.safetensors"
    folder.put("config.json", CONFIG)
    folder.put("preprocessor_config.json", IMAGES)
    behaviour(folder)
    return folder


def source_dense() -> Folder:
    """A dense Qwen3, one file and no index."""
    folder = Folder(tensors=draw_all(dense_shapes(), is_zero_centred=False), has_index=False)
    folder.put("config.json", DENSE)
    behaviour(folder)
    return folder


# --- what tools make of them


def nybble(model: Path, out: Path, *options: str) -> None:
    call([sys.executable, "-m", "nybble", "quantize", str(model), str(out), *options])


def peer(environment: str, runner: str, *arguments: str) -> None:
    """A runner of `peers/` in the environment of its tool."""
    root = HERE.parent
    asked = [str(root / "scripts" / "peers"), "python", environment]
    python = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    call([python, str(root / "peers" / runner), *arguments])


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


MODELOPT = ("modelopt", "run_modelopt.py")
LLMCOMPRESSOR = ("llmcompressor", "run_llmcompressor.py")
TEXT_FILE = "calibration.txt"

NYBBLE: dict[str, tuple[str, ...]] = {
    "clean/nybble-modelopt": ("source", "--data-free", "--shard-size", "200KB"),
    "clean/nybble-ct": (
        *("source", "--data-free", "--layout", "compressed-tensors"),
        *("--shard-size", "200KB"),
    ),
    "clean/nybble-w4a4": (
        *("source", "--recipe", "nvfp4-w4a4", "--shard-size", "200KB"),
        *("--calibration-text", TEXT_FILE, "--calibration-tokens", "256"),
    ),
    "clean/nybble-dense": ("source-dense", "--data-free"),
}
PEERS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "clean/modelopt-moe": (
        MODELOPT,
        ("source", "w4a4_max", "--calibrate", TEXT_FILE, "--mtp", "mtp"),
    ),
    "clean/modelopt-dense": (MODELOPT, ("source-dense", "w4a16_max")),
    "clean/llmcompressor-moe": (LLMCOMPRESSOR, ("source", "nvfp4a16")),
    "clean/llmcompressor-dense": (
        LLMCOMPRESSOR,
        ("source-dense", "nvfp4", "--calibrate", TEXT_FILE),
    ),
    # What the tools make when asked a little differently.
    "tool-made/modelopt-without-mtp": (
        MODELOPT,
        ("source", "w4a4_max", "--calibrate", TEXT_FILE),
    ),
    "tool-made/modelopt-mtp-layers-only": (
        MODELOPT,
        ("source", "w4a4_max", "--calibrate", TEXT_FILE, "--mtp", "mtp.layers.0"),
    ),
    "tool-made/modelopt-uncalibrated": (MODELOPT, ("source", "w4a4_max", "--mtp", "mtp")),
    "tool-made/llmcompressor-ignores-head-only": (
        LLMCOMPRESSOR,
        ("source", "nvfp4a16", "--ignore", "lm_head"),
    ),
    "tool-made/llmcompressor-model-free": (LLMCOMPRESSOR, ("source", "mf_nvfp4a16")),
}
BEHAVIOUR = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("generation_config.json", "preprocessor_config.json"),
)


def make_peer(out: Path, name: str) -> None:
    """What a tool makes; the source's files that decide about text and images go along."""
    (environment, runner), (model, recipe, *options) = PEERS[name]
    folder, origin = out / name, out / "clean" / model
    texts = [str(out / option) if option.endswith(".txt") else option for option in options]
    peer(environment, runner, str(origin), str(folder), recipe, *texts)
    for file in BEHAVIOUR:
        if (origin / file).exists():
            shutil.copyfile(origin / file, folder / file)
    for file in folder.iterdir():
        file.chmod(0o644)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    out, names = Path(arguments[0]).resolve(), set(arguments[1:])
    out.mkdir(parents=True, exist_ok=True)
    (out / TEXT_FILE).write_text(CALIBRATION)
    for name, make in (("source", source), ("source-dense", source_dense)):
        shutil.rmtree(out / "clean" / name, ignore_errors=True)
        make().write(out / "clean" / name)
    for name in (*NYBBLE, *PEERS):
        if names and name.partition("/")[2] not in names:
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name in PEERS:
            make_peer(out, name)
            continue
        model, *options = NYBBLE[name]
        texts = [str(out / option) if option.endswith(".txt") else option for option in options]
        nybble(out / "clean" / model, out / name, *texts)
    (out / TEXT_FILE).unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
