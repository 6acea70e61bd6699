"""Tokens of a text and the text of tokens, as tokenizer.json defines them.

tokenizer.json is followed and nothing else: no class name, model type or other file changes how a
text is split. (transformers' AutoTokenizer reads every folder whose configuration says qwen3_5*
with Qwen's splitting rule, whatever its tokenizer.json says; the ids differ then, and these are the
ids of the file.) Two of its settings are limits of a request, not rules, and are switched off:
truncation and padding.

What ends and what begins a text is in other files: `eos_token_id` of generation_config.json and
config.json, `bos_token` and `add_bos_token` of tokenizer_config.json.

Knows neither conversations nor the model. The library `tokenizers` does the work.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import MissingExtra, TextError
from nybble.text.folder import kind, read_bytes, read_object, token_text

if TYPE_CHECKING:
    import tokenizers

# What decoding writes for bytes that are not UTF-8: possibly not yet.
_REPLACEMENT = "\ufffd"

_ADDED = '"added_tokens"'

# The library keeps ids in 32 bits.
_MAX_IDS = 1 << 32

# Other tokenizers' files, for the message to who has only these.
_OTHER_FILES = ("tokenizer.model", "*.tiktoken", "tiktoken.model", "vocab.json", "tekken.json")


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A tokenizer.json, opened.

    `sha256` is of the file's bytes. `eos_ids` are all that the folder's configurations name,
    possibly none. `bos_id` is the token that this model wants before a text, or None. May be shared
    between threads.
    """

    path: Path
    sha256: str
    eos_ids: frozenset[int]
    bos_id: int | None
    _library: tokenizers.Tokenizer
    _special_ids: frozenset[int]
    _byte_ids: frozenset[int]
    # encode(parse_special=False) is a switch of the library's object, not an argument.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Open the tokenizer of a model's folder.

        Raises TextError for a missing or malformed file, MissingExtra without `tokenizers`.
        """
        path = folder / "tokenizer.json"
        data = read_bytes(path)
        if data is None:
            raise TextError(_missing(folder))
        library = _load(path, data)
        special = (i for i, token in library.get_added_tokens_decoder().items() if token.special)
        return cls(
            path,
            hashlib.sha256(data).hexdigest(),
            _eos_ids(folder),
            _bos_id(folder, library),
            library,
            frozenset(special),
            _byte_ids(library),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; looks at all of them."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text.

        With `add_special` also what tokenizer.json's post-processor puts around a text, such as
        BOS. Special tokens written in the text become their ids, as prompts need it; without
        `parse_special` they are text like any other. Added tokens that tokenizer.json does not call
        special (Qwen's <think>) are recognised either way, as in transformers and llama.cpp.
        Raises TextError for a text that has no UTF-8 (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(
                f"the text has half a surrogate pair at character {error.start}, which is no "
                "Unicode text: read it again with the right encoding"
            ) from error
        with self._lock, _told(self.path):
            self._library.encode_special_tokens = not parse_special
            # Of the library's functions, this one lets other threads of Python run meanwhile.
            found = self._library.encode_batch_fast([text], add_special_tokens=add_special)
            return list(found[0].ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids, without special tokens unless asked for.

        Bytes that are not UTF-8 become U+FFFD. An id without a token, as the padded end of a
        model's vocabulary has them, has no text. Raises TextError for what cannot be an id.
        """
        for i in ids:
            self._check(i)
        with _told(self.path):
            return self._library.decode(list(ids), skip_special_tokens=skip_special)

    def has(self, token: int) -> bool:
        """Whether an id has a token. Raises TextError for what cannot be an id."""
        self._check(token)
        return self._library.id_to_token(token) is not None

    def stream(self, skip_special: bool = True) -> Stream:
        """A decoder for ids that come one by one."""
        return Stream(self, skip_special)

    def _check(self, token: int) -> None:
        if not 0 <= token < _MAX_IDS:
            raise TextError(
                f"{self.path}: {token} is no token id: expected 0 to {self.vocab_size - 1}"
            )


class Stream:
    """Text of ids that come one by one: what was returned never changes, and no character is ever
    returned in part. All that was returned, with `finish`, is `decode` of all ids.

    Only the ids since the boundary before the last are decoded again: some decoders treat the first
    token of a text differently, so that a token's own text shows only behind another.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._ids: list[int] = []
        self._old = 0  # of these ids were complete at the last boundary
        self._said = ""  # what has been returned of the text of these ids

    def push(self, token: int) -> str:
        """Add one id; the text that is now certain, often that of this id, possibly empty."""
        tokenizer = self._tokenizer
        if (self._skip and token in tokenizer._special_ids) or not tokenizer.has(token):
            return ""
        self._ids.append(token)
        # A run of byte tokens is UTF-8 as a whole or not at all: only its end decides.
        return "" if token in tokenizer._byte_ids else self._say(is_final=False)

    def finish(self) -> str:
        """The text still held back, when no id follows; then the stream is as new."""
        text = self._say(is_final=True) if len(self._ids) > self._old else ""
        self._ids, self._old, self._said = [], 0, ""
        return text

    def _say(self, *, is_final: bool) -> str:
        text = self._tokenizer.decode(self._ids, skip_special=False)
        is_whole = is_final or not text.endswith(_REPLACEMENT)
        # An unfinished character is one U+FFFD; those before it stay.
        certain = text if is_whole else text[:-1]
        if not certain.startswith(self._said):
            raise TextError(
                f"{self._tokenizer.path}: this decoder changes earlier text when a token follows, "
                "so its text cannot be streamed: decode all ids at once"
            )
        new = certain[len(self._said) :]
        self._said = certain
        if is_whole and new:
            self._ids = self._ids[self._old :]
            self._old = len(self._ids)
            self._said = self._tokenizer.decode(self._ids, skip_special=False)
        return new


# ------------------------------------------------------------------------------------------ opening


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: expected the folder of a model, found no such folder"
    others = sorted(path.name for pattern in _OTHER_FILES for path in folder.glob(pattern))
    if others:
        return (
            f"{folder}: has {', '.join(others)} but no tokenizer.json, the only tokenizer file "
            "that nybble reads: fetch it, or write it with transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return f"{folder}: has no tokenizer.json: fetch it from where the model came from"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn whatever the library raises into a TextError about the file.

    A Rust panic is a BaseException whose class cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TextError(
            f"{path}: the library tokenizers cannot use this file: {error}; fetch it again, or "
            "upgrade tokenizers"
        ) from error


def _load(path: Path, data: bytes) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtra(
            f"{path}: reading it needs the library tokenizers: pip install 'nybble[torch]'"
        ) from error
    with _told(path):
        library = tokenizers.Tokenizer.from_buffer(data)
        library.no_truncation()
        library.no_padding()
        library.encode("a")
    _check_added(path, data, library)
    dropout = getattr(library.model, "dropout", None)
    if dropout:
        raise TextError(
            f"{path}: model.dropout is {dropout:g}: tokens of a text would be drawn at random; "
            "set it to null"
        )
    return library


def _check_added(path: Path, data: bytes, library: tokenizers.Tokenizer) -> None:
    """The library numbers added tokens itself, one after another, and only logs it where the file
    says otherwise: the model would read other tokens than it was trained on."""
    for token in _added(data):
        content, expected = str(token["content"]), token["id"]
        found = library.token_to_id(content)
        if found != expected:
            raise TextError(
                f"{path}: added_tokens: {content!r} has the id {expected}, and the library "
                f"tokenizers makes it {found}, as added tokens must continue the vocabulary "
                "without a gap: fill the gap with unused tokens"
            )


def _added(data: bytes) -> list[dict[str, object]]:
    """The list `added_tokens` of a tokenizer.json that the library has accepted.

    The library writes it before the vocabulary, and reading all of a large file in Python takes as
    long as the library does.
    """
    text = data.decode()
    start = text.find(_ADDED)
    if start < 0:
        return []
    rest = text[start + len(_ADDED) :].lstrip(" \t\r\n:")
    found = json.JSONDecoder().raw_decode(rest)[0] if rest.startswith("[") else None
    return list(json.loads(data).get("added_tokens", []) if found is None else found)


def _byte_ids(library: tokenizers.Tokenizer) -> frozenset[int]:
    """The tokens that stand for one byte, where the decoder joins these to characters."""
    decoder = library.decoder
    if decoder is None or decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    ids = (library.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)


def _eos_ids(folder: Path) -> frozenset[int]:
    ids: set[int] = set()
    path = folder / "generation_config.json"
    ids.update(_ids(path, "eos_token_id", read_object(path).get("eos_token_id")))
    path = folder / "config.json"
    config = read_object(path)
    ids.update(_ids(path, "eos_token_id", config.get("eos_token_id")))
    inner = config.get("text_config")
    if isinstance(inner, dict):
        ids.update(_ids(path, "text_config.eos_token_id", inner.get("eos_token_id")))
    elif inner is not None:
        raise TextError(f"{path}: text_config: expected an object, found {kind(inner)}")
    return frozenset(ids)


def _ids(path: Path, key: str, value: object) -> list[int]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    ids = [i for i in values if type(i) is int and i >= 0]  # a bool is no id
    if len(ids) != len(values):
        raise TextError(
            f"{path}: {key}: expected a token id or a list of token ids, found {value!r}"
        )
    return ids


def _bos_id(folder: Path, library: tokenizers.Tokenizer) -> int | None:
    """`bos_token`, if `add_bos_token` says so; where that is not said, if tokenizer.json's own
    post-processor puts it before a text."""
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    token, wanted = token_text(path, config, "bos_token"), config.get("add_bos_token")
    if wanted is not None and not isinstance(wanted, bool):
        raise TextError(f"{path}: add_bos_token: expected a boolean, found {kind(wanted)}")
    bos = None if token is None else library.token_to_id(token)
    if wanted is None:
        with _told(folder / "tokenizer.json"):
            begins = library.encode("", add_special_tokens=True).ids[:1]
        return bos if begins == [bos] else None
    if wanted and bos is None:
        raise TextError(
            f"{path}: add_bos_token is true, and bos_token {token!r} is no token of "
            "tokenizer.json: set add_bos_token to false or name a token"
        )
    return bos if wanted else None
