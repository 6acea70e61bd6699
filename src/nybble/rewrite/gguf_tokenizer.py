"""Byte-level BPE tokenizers between Hugging Face files and GGUF metadata.

GGUF holds the vocabulary, the merges and the special tokens, but the splitting rule only by name
(`tokenizer.ggml.pre`): llama.cpp has the rules in its code. The names are found here by the rule
itself, as tokenizer.json spells it, so a new vocabulary with a known rule converts; an unknown rule
is refused, since any other name would tokenize differently.

Source: llama.cpp, conversion/base.py `get_vocab_base`, gguf-py/gguf/vocab.py `SpecialVocab`,
src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nybble.checkpoint.gguf import Field, Value
from nybble.errors import TextError
from nybble.text.folder import read_bytes, read_object

Fields = dict[str, Field]
Object = Mapping[str, object]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # GGUF's own spelling
    "pad": "padding",
    "mask": "mask",
}
_ADDED_BY = ("bos", "eos", "sep")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"
_RULES: dict[str, str] = {
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_OTHERS}{_REST}",
    "qwen35": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+{_REST}"
    ),
    "llama-bpe": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}{_REST}",
}
_NORMALIZED = ("qwen2", "qwen35")  # published with NFC before the split


@dataclass(frozen=True, slots=True)
class _Files:
    """What a folder says of its tokenizer."""

    folder: Path
    tokenizer: Object
    config: Object
    template: str | None

    @property
    def where(self) -> str:
        return str(self.folder / "tokenizer.json")


def tokenizer_fields(folder: Path, config: Object, vocab: int, *, is_llama: bool) -> Fields:
    """The `tokenizer.*` keys for a checkpoint folder whose embedding has `vocab` rows.

    Raises TextError for a tokenizer that GGUF, or nybble, cannot say.
    """
    files = _read(folder)
    pre = splitting_rule(files.tokenizer, files.where)
    tokens, types = _vocabulary(files, vocab)
    fields: Fields = {
        "model": Field("str", "gpt2"),
        "pre": Field("str", pre),
        "tokens": Field("[str]", tokens),
        "token_type": Field("[i32]", np.array(types, dtype=np.int32)),
    }
    if merges := _merges(files):
        fields["merges"] = Field("[str]", merges)
    fields |= _special_tokens(files, config)
    if is_llama:
        fields |= _llama_flags(files.config, vocab)
    named = {f"tokenizer.ggml.{key}": field for key, field in fields.items()}
    if files.template:
        named["tokenizer.chat_template"] = Field("str", files.template)
    return named


def _read(folder: Path) -> _Files:
    tokenizer = read_object(folder / "tokenizer.json")
    if not tokenizer:
        raise TextError(
            f"{folder}: no tokenizer.json; a GGUF file needs it: copy it from the original model"
        )
    config = read_object(folder / "tokenizer_config.json")
    return _Files(folder, tokenizer, config, _template(folder, config))


def _template(folder: Path, config: Object) -> str | None:
    """tokenizer_config.json's first, as llama.cpp's converter has it; the default of several."""
    found = config.get("chat_template")
    if isinstance(found, list):
        by_name = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = by_name.get("default")
    if found is None and (data := read_bytes(folder / "chat_template.jinja")) is not None:
        # As text files are read: every line end is one newline.
        try:
            found = data.decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise TextError(
                f"{folder}/chat_template.jinja: is no UTF-8 text: {error}; copy it from the source"
            ) from error
    if found is None:
        found = read_object(folder / "chat_template.json").get("chat_template")
    if found is not None and not isinstance(found, str):
        raise TextError(f"{folder}: the chat template must be text, found {type(found).__name__}")
    return found


# ------------------------------------------------------------------------------- the splitting rule


def splitting_rule(tokenizer: Object, where: str) -> str:
    """llama.cpp's name of a tokenizer.json's splitting rule. Raises TextError for unknown ones."""
    model = _object(tokenizer.get("model"))
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
        raise TextError(
            f"{where}: model {model.get('type')!r} with byte_fallback "
            f"{model.get('byte_fallback', False)}; nybble writes byte-level BPE to GGUF"
        )
    steps = _steps(tokenizer.get("pre_tokenizer"))
    normalizer = _object(tokenizer.get("normalizer")).get("type")
    for name in (*_RULES, "smollm", "gpt-2"):
        if steps == _steps(pre_tokenizer(name)):
            if normalizer is None or (normalizer == "NFC" and name in _NORMALIZED):
                return name
    raise TextError(
        f"{where}: llama.cpp knows splitting rules by name, and this one (normalizer {normalizer}, "
        f"{_shown(steps)}) is none of {', '.join((*_RULES, 'smollm', 'gpt-2'))}"
    )


def _shown(steps: list[object]) -> str:
    text = repr(steps)
    return text if len(text) < 200 else text[:200] + "..."


def _steps(pre_tokenizer: object) -> list[object]:
    """The steps of a pre-tokenizer, without what does not change the split."""
    found = _object(pre_tokenizer)
    if found.get("type") == "Sequence":
        inner = found.get("pretokenizers")
        return [s for one in (inner if isinstance(inner, list) else []) for s in _steps(one)]
    if found.get("type") == "Split":
        pattern = _object(found.get("pattern"))
        return [("Split", pattern.get("Regex"), found.get("behavior"), bool(found.get("invert")))]
    if found.get("type") == "ByteLevel":
        uses = found.get("use_regex", True)
        return [("ByteLevel", bool(found.get("add_prefix_space")), uses)]
    if found.get("type") == "Digits":
        return [("Digits", bool(found.get("individual_digits")))]
    return [found.get("type")]


def pre_tokenizer(name: str) -> dict[str, object]:
    """The pre-tokenizer of tokenizer.json that a name in `tokenizer.ggml.pre` stands for.

    Raises TextError for a name that nybble has no rule of.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name in _RULES:
        split = {
            "type": "Split",
            "pattern": {"Regex": _RULES[name]},
            "behavior": "Isolated",
            "invert": False,
        }
        steps: list[dict[str, object]] = [split, {**byte_level, "use_regex": False}]
        return {"type": "Sequence", "pretokenizers": steps}
    if name == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, {**byte_level, "use_regex": True}]}
    if name == "gpt-2":
        return {**byte_level, "use_regex": True}
    raise TextError(
        f"tokenizer.ggml.pre is {name!r}: nybble has the splitting rules of "
        f"{', '.join((*_RULES, 'smollm', 'gpt-2'))}; copy tokenizer.json from the original model"
    )


def _object(value: object) -> Object:
    return value if isinstance(value, Mapping) else {}


# ---------------------------------------------------------------------------------- the vocabulary


def _added(files: _Files) -> dict[int, Object]:
    """Added tokens by id: tokenizer.json's, then those that only the other file has."""
    added: dict[int, Object] = {}
    listed = files.tokenizer.get("added_tokens")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), int):
            added[entry["id"]] = entry
    for number, entry in _object(files.config.get("added_tokens_decoder")).items():
        if isinstance(entry, Mapping) and number.isdecimal():
            added.setdefault(int(number), entry)
    return added


def _vocabulary(files: _Files, vocab: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token are padding."""
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    types = [UNUSED] * vocab
    plain = _object(_object(files.tokenizer.get("model")).get("vocab"))
    for text, number in plain.items():
        _check_id(files, text, number, vocab)
        assert isinstance(number, int)
        tokens[number], types[number] = text, NORMAL
    for number, entry in _added(files).items():
        content = entry.get("content")
        _check_id(files, content, number, vocab)
        assert isinstance(content, str)
        is_control = bool(entry.get("special")) or _looks_special(content)
        tokens[number] = content if is_control else content.replace("\u2581", " ")
        types[number] = CONTROL if is_control else USER_DEFINED
    return tokens, types


def _check_id(files: _Files, text: object, number: object, vocab: int) -> None:
    if not isinstance(text, str) or not isinstance(number, int) or not 0 <= number < vocab:
        raise TextError(
            f"{files.where}: the token {text!r} has id {number!r}, but the embedding has {vocab} "
            "rows; this tokenizer belongs to another model"
        )


def _looks_special(text: str) -> bool:
    """llama.cpp takes these for control tokens whatever the file says."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _merges(files: _Files) -> list[str]:
    """Merges as "left right"; a space inside a part is written as its byte-level letter."""
    found = _object(files.tokenizer.get("model")).get("merges")
    merges = []
    for merge in found if isinstance(found, list) else []:
        if isinstance(merge, str):
            merges.append(merge)
        elif isinstance(merge, list) and len(merge) == 2 and all(isinstance(p, str) for p in merge):
            merges.append(" ".join(part.replace(" ", "\u0120") for part in merge))
        else:
            raise TextError(f"{files.where}: {merge!r} is no merge of two parts")
    return merges


# -------------------------------------------------------------------------------- special tokens


def _special_tokens(files: _Files, config: Object) -> Fields:
    by_text = {entry.get("content"): number for number, entry in sorted(_added(files).items())}
    text_config = _object(config.get("text_config"))
    fields: Fields = {}
    for short, long in _SPECIAL.items():
        entry = files.config.get(f"{short}_token")
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        number: object = by_text.get(text) if isinstance(text, str) else None
        if number is None:
            number = config.get(f"{short}_token_id")
        if number is None:
            number = text_config.get(f"{short}_token_id")
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            fields[f"{long}_token_id"] = Field("u32", number)
    added = _adds(files)
    for short in _ADDED_BY:
        flag = added.get(short, files.config.get(f"add_{short}_token"))
        if isinstance(flag, bool):
            fields[f"add_{short}_token"] = Field("bool", flag)
    return fields


def _adds(files: _Files) -> dict[str, bool]:
    """Which special tokens the post-processor adds around a text."""
    processor = _object(files.tokenizer.get("post_processor"))
    inner = processor.get("processors")
    found: dict[str, bool] = {}
    for one in inner if isinstance(inner, list) else [processor] if processor else []:
        kind = _object(one).get("type")
        if kind == "ByteLevel":
            found.setdefault("bos", False)
            found.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            found |= _template_adds(files, _object(one))
        else:
            raise TextError(
                f"{files.where}: post_processor {kind!r}; nybble writes ByteLevel and "
                "TemplateProcessing to GGUF"
            )
    return found


def _template_adds(files: _Files, processor: Object) -> dict[str, bool]:
    single = processor.get("single")
    pieces = single if isinstance(single, list) else []
    specials = [_object(_object(p).get("SpecialToken")).get("id") for p in pieces]
    found: dict[str, bool] = {}
    for short, token in (("bos", specials[:1]), ("eos", specials[1:][-1:])):
        if not token or token[0] is None or len(specials) < 2:
            continue
        entry = files.config.get(f"{short}_token")
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if text is not None and text != token[0]:
            raise TextError(
                f"{files.where}: the template adds {token[0]!r} where tokenizer_config.json has "
                f"{short}_token {text!r}; GGUF knows one such token: make them agree"
            )
        found[short] = True
    return found


def _llama_flags(config: Object, vocab: int) -> Fields:
    fields: Fields = {}
    prefix = config.get("add_prefix_space")
    if isinstance(prefix, bool):
        fields["add_space_prefix"] = Field("bool", prefix)
    if vocab == 49152:  # llama.cpp's converter does so for the models of this vocabulary
        fields["add_bos_token"] = Field("bool", False)
    return fields


# ------------------------------------------------------------------------------ back to the files


def tokenizer_files(metadata: Mapping[str, Value], context: int) -> dict[str, dict[str, object]]:
    """tokenizer.json and tokenizer_config.json of GGUF metadata.

    Raises TextError where the metadata do not say all of it.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise TextError(
            f"tokenizer.ggml.model is {model!r}; nybble rebuilds byte-level BPE ('gpt2') only; "
            "copy tokenizer.json from the original model"
        )
    tokens, merges = _strings(metadata, "tokens"), _strings(metadata, "merges")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    types = _types(metadata, len(tokens))
    added = [(i, tokens[i], t) for i, t in enumerate(types) if t in (CONTROL, USER_DEFINED)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    ids = {
        short: metadata.get(f"tokenizer.ggml.{long}_token_id") for short, long in _SPECIAL.items()
    }
    document: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": kind == CONTROL}
            for i, text, kind in added
        ],
        "normalizer": {"type": "NFC"} if pre in _NORMALIZED else None,
        "pre_tokenizer": pre_tokenizer(pre),
        "post_processor": _post_processor(metadata, tokens, ids),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": _plain_vocabulary(tokens, types),
            "merges": merges,
        },
    }
    return {
        "tokenizer.json": document,
        "tokenizer_config.json": _tokenizer_config(metadata, tokens, ids, context),
    }


def _plain_vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    """The model's own vocabulary: added tokens behind it stay out, as far as their ids follow it
    without a gap, since the library numbers them so; those inside it are part of it."""
    last = max((i for i, kind in enumerate(types) if kind == NORMAL), default=-1)
    added = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED) and i > last]
    if added != list(range(last + 1, last + 1 + len(added))):
        last = len(tokens)
    return {t: i for i, t in enumerate(tokens) if i <= last and types[i] != UNUSED}


def _tokenizer_config(
    metadata: Mapping[str, Value], tokens: list[str], ids: Mapping[str, object], context: int
) -> dict[str, object]:
    named = {s: tokens[i] for s, i in ids.items() if isinstance(i, int) and i < len(tokens)}
    config: dict[str, object] = {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        **{f"{short}_token": text for short, text in named.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        # Not GPT2Tokenizer, which transformers 5 builds anew with its own splitting rule.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if isinstance(template, str) else {})


def _post_processor(
    metadata: Mapping[str, Value], tokens: list[str], ids: Mapping[str, object]
) -> dict[str, object] | None:
    """A template that adds the tokens llama.cpp is told to add; None if there are none."""
    first: list[object] = []
    last: list[object] = []
    special: dict[str, object] = {}
    for short, side in (("bos", first), ("eos", last)):
        number = ids[short]
        if metadata.get(f"tokenizer.ggml.add_{short}_token") is True and isinstance(number, int):
            if not 0 <= number < len(tokens):
                raise TextError(f"tokenizer.ggml.{short}_token_id is {number}, of {len(tokens)}")
            text = tokens[number]
            side.append({"SpecialToken": {"id": text, "type_id": 0}})
            special[text] = {"id": text, "ids": [number], "tokens": [text]}
    if not special:
        return None
    one = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    pair = [*one, *first, {"Sequence": {"id": "B", "type_id": 1}}, *last]
    return {"type": "TemplateProcessing", "single": one, "pair": pair, "special_tokens": special}


def _strings(metadata: Mapping[str, Value], key: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise TextError(f"tokenizer.ggml.{key} is missing; copy tokenizer.json from the original")
    return value


def _types(metadata: Mapping[str, Value], count: int) -> list[int]:
    value = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise TextError("tokenizer.ggml.token_type must have one entry per token")
    return [int(v) for v in value]
