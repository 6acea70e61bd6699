"""The bytes that a token adds to a text, which may be part of a character.

`Tokenizer.decode` gives text; log-probabilities are reported for tokens, and two tokens that are
each half a character must not look alike. Knows how tokenizer.json's decoders spell bytes.
"""

from __future__ import annotations

from functools import lru_cache

from nybble.text.tokenizer import Tokenizer

#: Some decoders treat the first token of a text differently; a token's own text is that behind it.
_BEFORE = "a"
_MOST_KEPT = 1 << 16


class Pieces:
    """Token ids as bytes, by one tokenizer. May be shared between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = tokenizer._library
        self._piece, self._decoder = library.id_to_token, library.decoder
        self._added = {i: str(t.content) for i, t in library.get_added_tokens_decoder().items()}
        self._is_byte_level = self._decoder is not None and self._decoder.decode(["Ġ"]) == " "
        self._byte_ids = tokenizer._byte_ids
        self.of = lru_cache(_MOST_KEPT)(self._of)

    def _of(self, token: int) -> bytes:
        """The bytes of one id; none for an id without a token."""
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._piece(token)
        if piece is None:
            return b""
        if token in self._byte_ids:
            return bytes([int(piece[3:5], 16)])
        if self._is_byte_level:
            codes = [_BYTES.get(character) for character in piece]
            if None not in codes:
                return bytes(code for code in codes if code is not None)
        if self._is_byte_level or self._decoder is None:
            return piece.encode()
        text: str = self._decoder.decode([_BEFORE, piece])
        return text.removeprefix(self._decoder.decode([_BEFORE])).encode()

    def text(self, token: int) -> str:
        """One id as text; a part of a character is U+FFFD."""
        return self.of(token).decode("utf-8", "replace")


def _byte_level() -> dict[str, int]:
    """What each character of a byte-level vocabulary stands for.

    Source: OpenAI's GPT-2, encoder.py, bytes_to_unicode: printable characters are themselves, the
    others follow from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level()
