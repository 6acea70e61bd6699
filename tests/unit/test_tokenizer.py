"""Ids are those of tokenizer.json, text that was streamed never changes, and what is wrong with the
files is said."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import random
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import MissingExtra, TextError
from nybble.text import folder as text_folder
from nybble.text.tokenizer import Stream, Tokenizer

tokenizers = pytest.importorskip("tokenizers")

MODELS = Path(__file__).parents[2] / "models"
CHAT = MODELS / "hybrid-chat-mtp"
STORIES = MODELS / "stories-hybrid-moe"

# GPT-2's alphabet of bytes: the order in which every fixture here numbers its first 256 tokens.
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def write(folder: Path, **files: object) -> Path:
    """Write JSON files named by their stem."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def byte_level(folder: Path) -> Path:
    """A byte-level BPE with GPT-2's splitting rule. Of its merges, GPT-2's rule forbids the one of
    "!" and a line break, Qwen's those of digits, and both allow "hi"."""
    merges = [("1", "2"), ("h", "i"), ("!", "Ċ"), ("12", "3")]
    vocab = {token: i for i, token in enumerate(ALPHABET)}
    vocab |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


def byte_fallback(folder: Path) -> Path:
    """A tokenizer like Llama 2's: words begin with U+2581, unknown characters are byte tokens, and
    the post-processor puts <s> before a text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("\u2581", "a", "b", "\u2581a", "ab", "\u00e9", "\u2581\u2581", "\ufffd", "."):
        vocab[token] = len(vocab)
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "\u2581")]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    library.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("\u2581"),
            tokenizers.normalizers.Replace(" ", "\u2581"),
        ]
    )
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    library.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


def edited(folder: Path, edit: Callable[[dict[str, object]], object]) -> Path:
    """The byte-level fixture with its tokenizer.json changed."""
    path = byte_level(folder) / "tokenizer.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(TextError) as found:
        Tokenizer.open(folder)
    assert str(folder) in str(found.value)
    return str(found.value)


def streamed(stream: Stream, ids: Sequence[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.finish()]


# ----------------------------------------------------------------------------------------- encoding


def test_the_file_is_followed_where_autotokenizer_follows_the_model_type(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = byte_level(tmp_path)
    write(
        folder,
        config={"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}},
        tokenizer_config={"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    ours = Tokenizer.open(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    one, two, three = (ALPHABET.index(digit) for digit in "123")
    twelve, hi, bang, hundred = 256, 257, 258, 259

    assert ours.encode("12") == [twelve]
    assert auto.encode("12", add_special_tokens=False) == [one, two]
    assert ours.encode("hi123") == [hi, hundred]
    assert auto.encode("hi123", add_special_tokens=False) == [hi, one, two, three]
    # GPT-2's rule ends a word of punctuation at the line's end, Qwen's takes the line break in.
    assert ours.encode("!\n") == [ALPHABET.index("!"), ALPHABET.index("Ċ")]
    assert auto.encode("!\n", add_special_tokens=False) == [bang]
    # Where the rules agree, so do the ids.
    assert ours.encode("hi") == auto.encode("hi", add_special_tokens=False) == [hi]


@pytest.mark.parametrize("folder", [CHAT, STORIES], ids=lambda folder: folder.name)
def test_ids_are_those_of_transformers_reading_the_same_file(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.open(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    rng = random.Random(0)
    texts = ["", " ", "Once upon a time, 1234 foxes\r\n\n didn't\u00a0jump.", "<|im_start|>user\nx"]
    texts += [
        "".join(chr(rng.choice([rng.randint(1, 0x2FF), 0x4E2D, 0x1F600])) for _ in range(37))
        for _ in range(50)
    ]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)


def test_special_tokens_in_a_text_are_tokens_unless_it_is_raw() -> None:
    tokenizer = Tokenizer.open(CHAT)
    text = "a<|im_start|>b<think>c"
    prompt = tokenizer.encode(text)
    raw = tokenizer.encode(text, parse_special=False)
    assert prompt == [64, 4088, 65, 4094, 66]
    assert not {4087, 4088, 4089} & set(raw)
    assert 4094 in raw, "<think> is an added token, not a special one"
    assert tokenizer.decode(raw, skip_special=True) == text
    assert tokenizer.encode(text) == prompt, "the switch must not stay"


def test_nothing_is_added_unless_asked_for(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(byte_fallback(tmp_path))
    plain = tokenizer.encode("a")
    assert tokenizer.encode("a", add_special=True) == [1, *plain]
    assert 1 not in plain
    assert tokenizer.encode("") == []


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    def limit(document: dict[str, object]) -> None:
        document["truncation"] = {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        document["padding"] = {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }

    tokenizer = Tokenizer.open(edited(tmp_path, limit))
    assert tokenizer.encode("abc") == [ALPHABET.index(c) for c in "abc"]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(TextError, match="character 2"):
        Tokenizer.open(CHAT).encode("ab\ud800")


# ----------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("bad", [-1, 1 << 32])
def test_what_cannot_be_an_id_is_refused(bad: int) -> None:
    tokenizer = Tokenizer.open(CHAT)
    with pytest.raises(TextError, match="no token id: expected 0 to 4095"):
        tokenizer.decode([5, bad])
    with pytest.raises(TextError, match="no token id"):
        tokenizer.stream().push(bad)


def test_ids_of_a_padded_vocabulary_have_no_text() -> None:
    tokenizer = Tokenizer.open(CHAT)
    assert tokenizer.decode([64, 4096, 65]) == "ab"
    assert "".join(streamed(tokenizer.stream(), [64, 4096, 65])) == "ab"


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    tokenizer = Tokenizer.open(CHAT)
    ids = [64, 4089, 65]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|>b"
    assert "".join(streamed(tokenizer.stream(), ids)) == "ab"
    assert streamed(tokenizer.stream(skip_special=False), ids) == ["a", "<|im_end|>", "b", ""]


def test_a_character_is_never_streamed_in_part(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(byte_level(tmp_path))
    ids = tokenizer.encode("x\U0001f600y")
    assert len(ids) == 6
    assert streamed(tokenizer.stream(), ids) == ["x", "", "", "", "\U0001f600", "y", ""]
    assert streamed(tokenizer.stream(), ids[:3]) == ["x", "", "", "\ufffd"]


def test_a_run_of_byte_tokens_is_held_back_until_it_ends(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(byte_fallback(tmp_path))
    ids = tokenizer.encode("a\u65e5a")
    assert streamed(tokenizer.stream(), ids) == ["a", "", "", "", "\u65e5a", ""]
    # One byte more, and the library calls all four invalid: the character must not be out already.
    spoilt = [*ids[:-1], 3 + 0x80]
    assert tokenizer.decode(spoilt) == "a" + "\ufffd" * 4
    assert "".join(streamed(tokenizer.stream(), spoilt)) == tokenizer.decode(spoilt)


@pytest.mark.parametrize("kind", ["chat", "stories", "byte_fallback"])
@pytest.mark.parametrize("skip_special", [True, False])
def test_the_stream_of_any_ids_is_their_decoded_text(
    kind: str, skip_special: bool, tmp_path: Path
) -> None:
    folder = {"chat": CHAT, "stories": STORIES}.get(kind) or byte_fallback(tmp_path)
    tokenizer = Tokenizer.open(folder)
    every = range(tokenizer.vocab_size + 3)  # with three that have no token
    pieces = [i for i in every if "\ufffd" in tokenizer.decode([i])]
    assert len(pieces) > 60
    rng = random.Random(1)
    for _ in range(1500):
        ids = [
            rng.choice(pieces if rng.random() < 0.6 else every) for _ in range(rng.randint(0, 11))
        ]
        stream = tokenizer.stream(skip_special)
        said = "".join(streamed(stream, ids))
        assert said == tokenizer.decode(ids, skip_special), ids
        assert stream.finish() == "", "a finished stream is as new"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
OPENED = [Tokenizer.open(CHAT), Tokenizer.open(STORIES)]


@given(TEXTS, st.sampled_from(OPENED), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_text_survives_encoding_up_to_its_normal_form(
    text: str, tokenizer: Tokenizer, parse_special: bool
) -> None:
    ids = tokenizer.encode(text, parse_special=parse_special)
    decoded = tokenizer.decode(ids, skip_special=False)
    assert unicodedata.is_normalized("NFC", text) is (decoded == text)
    said = streamed(tokenizer.stream(skip_special=False), ids)
    assert "".join(said) == decoded
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in said)


# ------------------------------------------------------------------------------- the folder's facts


def test_the_carried_models() -> None:
    chat, stories = Tokenizer.open(CHAT), Tokenizer.open(STORIES)
    assert (chat.vocab_size, chat.eos_ids, chat.bos_id) == (4096, frozenset({4087, 4089}), None)
    assert (stories.vocab_size, stories.eos_ids, stories.bos_id) == (512, frozenset({2}), None)
    data = (CHAT / "tokenizer.json").read_bytes()
    assert chat.sha256 == hashlib.sha256(data).hexdigest()


def test_the_vocabulary_reaches_to_the_largest_id(tmp_path: Path) -> None:
    def leave_a_hole(document: dict[str, object]) -> None:
        model = document["model"]
        assert isinstance(model, dict)
        model["vocab"]["zz"] = 300
        document["added_tokens"] = []

    assert Tokenizer.open(edited(tmp_path, leave_a_hole)).vocab_size == 301


def test_added_tokens_that_the_library_would_renumber_are_refused(tmp_path: Path) -> None:
    def leave_a_hole(document: dict[str, object]) -> None:
        added = document["added_tokens"]
        assert isinstance(added, list)
        added[-1]["id"] = 300

    message = refusal(edited(tmp_path, leave_a_hole))
    assert "'<|im_end|>' has the id 300, and the library tokenizers makes it 261" in message


def test_eos_is_the_union_of_what_the_configurations_name(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    assert Tokenizer.open(folder).eos_ids == frozenset()
    write(folder, tokenizer_config={"eos_token": "<|im_end|>"})
    assert Tokenizer.open(folder).eos_ids == frozenset(), "nothing is guessed"
    write(folder, config={"eos_token_id": 7, "text_config": {"eos_token_id": [8, 9]}})
    assert Tokenizer.open(folder).eos_ids == {7, 8, 9}
    write(folder, generation_config={"eos_token_id": [9, 10]})
    assert Tokenizer.open(folder).eos_ids == {7, 8, 9, 10}
    write(folder, generation_config={"eos_token_id": None}, config={"text_config": None})
    assert Tokenizer.open(folder).eos_ids == frozenset()


@pytest.mark.parametrize("value", ["</s>", True, -1, 2.0, [1, "2"], {"id": 2}])
def test_an_eos_that_is_no_id_is_refused(value: object, tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    for name, config in (
        ("generation_config", {"eos_token_id": value}),
        ("config", {"text_config": {"eos_token_id": value}}),
    ):
        write(folder, config={}, generation_config={})
        write(folder, **{name: config})
        message = refusal(folder)
        assert f"{name}.json" in message
        assert "eos_token_id: expected a token id or a list" in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, 1),  # the post-processor says it, if the name does too
        ({"bos_token": "<s>"}, 1),
        ({"bos_token": "<s>", "add_bos_token": True}, 1),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, 1),
        ({"bos_token": "<s>", "add_bos_token": False}, None),
        ({"bos_token": "</s>"}, None),
        ({"bos_token": "</s>", "add_bos_token": True}, 2),
    ],
)
def test_bos_is_what_the_files_want_before_a_text(
    config: dict[str, object] | None, expected: int | None, tmp_path: Path
) -> None:
    folder = byte_fallback(tmp_path)
    write(folder, tokenizer_config={"bos_token": "<s>"} if config is None else config)
    assert Tokenizer.open(folder).bos_id == expected


def test_no_bos_is_guessed(tmp_path: Path) -> None:
    assert Tokenizer.open(byte_fallback(tmp_path)).bos_id is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"bos_token": 1}, "bos_token: expected a string or an object, found a number"),
        ({"bos_token": {"text": "<s>"}}, "bos_token.content: expected a string, found nothing"),
        ({"add_bos_token": "yes"}, "add_bos_token: expected a boolean, found a string"),
        ({"add_bos_token": True}, "bos_token None is no token"),
        ({"add_bos_token": True, "bos_token": "<bos>"}, "bos_token '<bos>' is no token"),
        ([], "expected a JSON object, found a list"),
    ],
)
def test_a_wrong_tokenizer_config_is_refused(config: object, words: str, tmp_path: Path) -> None:
    message = refusal(write(byte_level(tmp_path), tokenizer_config=config))
    assert "tokenizer_config.json" in message
    assert words in message


# ---------------------------------------------------------------------------------------- bad files


def test_a_missing_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "has no tokenizer.json" in refusal(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "qwen.tiktoken").write_bytes(b"x")
    message = refusal(tmp_path)
    assert "has qwen.tiktoken, tokenizer.model but no tokenizer.json" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b"null"])
def test_a_file_that_is_no_tokenizer_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert "tokenizers cannot use this file" in refusal(tmp_path)


def test_a_broken_post_processor_is_refused(tmp_path: Path) -> None:
    broken = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    # Here the library panics, which is no Exception of Python's.
    message = refusal(edited(tmp_path, lambda document: document.update(post_processor=broken)))
    assert "tokenizers cannot use this file" in message


def test_tokens_drawn_at_random_are_refused(tmp_path: Path) -> None:
    def drop(document: dict[str, object]) -> None:
        model = document["model"]
        assert isinstance(model, dict)
        model["dropout"] = 0.25

    assert "model.dropout is 0.25" in refusal(edited(tmp_path, drop))


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
def test_a_configuration_that_is_no_json_is_refused(name: str, tmp_path: Path) -> None:
    (byte_level(tmp_path) / f"{name}.json").write_text("{'a': 1}")
    assert f"{name}.json: is not JSON" in refusal(tmp_path)
    (tmp_path / f"{name}.json").write_text('{"a":' * 100_000)
    assert f"{name}.json: is not JSON" in refusal(tmp_path)


def test_files_too_large_or_not_regular_are_refused(tmp_path: Path) -> None:
    path = byte_level(tmp_path) / "tokenizer.json"
    limit = path.stat().st_size
    assert text_folder.read_bytes(path, limit) == path.read_bytes()
    with pytest.raises(TextError, match="expected at most"):
        text_folder.read_bytes(path, limit - 1)
    path.unlink()
    os.mkfifo(path)
    assert "expected a regular file" in refusal(tmp_path)
    path.unlink()
    path.mkdir()
    assert "expected a regular file" in refusal(tmp_path)


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> ModuleType:
        if name == "tokenizers":
            raise ModuleNotFoundError("No module named 'tokenizers'", name=name)
        return found(name, *args, **kwargs)  # type: ignore[arg-type]

    folder = byte_level(tmp_path)
    monkeypatch.delitem(sys.modules, "tokenizers")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r"tokenizers: pip install 'nybble\[torch\]'"):
        Tokenizer.open(folder)
