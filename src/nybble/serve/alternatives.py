"""Log-probabilities in OpenAI's two shapes, and the engines' own for prompts.

A token's text may be a part of a character: chats show its bytes beside it, completions write it as
bytes:\\xe6\\xbc, so that different tokens never have one name. JSON has no -inf: a token that could
not come has LOWEST, as OpenAI writes it.

Source: OpenAI API reference, "The chat completion object", logprobs; "The completion object
(legacy)", logprobs. vLLM's documentation for prompt_logprobs.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from nybble.engine.request import Alternative, PromptLogprobs, SamplingParams, Token
from nybble.serve.streaming import encode_inside
from nybble.text.pieces import Pieces
from nybble.text.tokenizer import Tokenizer

LOWEST = -9999.0

_LISTS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
_Row = tuple[int, float | None, Sequence[Alternative], bool]

#: The lists of a completion's `logprobs`, an entry for each token: the insides of JSON lists.
Scores = dict[str, bytes]


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LOWEST)


class Told:
    """Whose log-probabilities one choice's answer has: without those that a stop text cut off.

    While a stop text may begin, they are held back as the text is.
    """

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self._can_cut = bool(params.stop) and not params.include_stop
        eos = frozenset() if params.ignore_eos else tokenizer.eos_ids
        self._ends = eos | frozenset(params.stop_token_ids)
        self._decoder = tokenizer.stream()
        self._begins = self._shown = 0
        self._held: list[tuple[int, Token]] = []

    def push(self, token: Token) -> list[Token]:
        """Add a token; those that can be told now."""
        if not self._can_cut:
            return [token]
        self._held.append((self._begins, token))
        self._shown += len(token.text)
        is_end = token.id in self._ends
        if not is_end:
            self._begins += len(self._decoder.push(token.id))
        is_cut = token.finish == "stop" and not is_end and self._begins > self._shown
        if token.finish and not is_cut:
            self._shown = self._begins + 1
        told = [one for begins, one in self._held if begins < self._shown]
        self._held = self._held[len(told) :]
        return told


def chat_logprobs(tokens: Iterable[Token], pieces: Pieces) -> Iterator[dict[str, object]]:
    """The entries of `logprobs.content`."""
    for token in tokens:
        yield {
            **_entry(token.id, token.logprob, pieces),
            "top_logprobs": [_entry(one.token, one.logprob, pieces) for one in token.top],
        }


def _entry(token: int, logprob: float, pieces: Pieces) -> dict[str, object]:
    found = pieces.of(token)
    return {
        "token": found.decode("utf-8", "replace"),
        "logprob": finite(logprob),
        "bytes": list(found),
    }


def prompt_logprobs(
    prompt: Sequence[int], found: PromptLogprobs, pieces: Pieces
) -> Iterator[dict[str, object] | None]:
    """Of each token of a prompt: itself and the alternatives by id; null for the first."""
    for token, logprob, top in zip(prompt, found.logprobs, found.top, strict=True):
        yield None if logprob is None else _by_id(token, logprob, top, pieces)


def written(parts: Sequence[Scores]) -> Iterator[bytes]:
    """The `logprobs` of a completion, of parts that follow one another, in pieces."""
    for name in _LISTS:
        yield b'%s"%s":[' % (b"{" if name is _LISTS[0] else b"],", name.encode())
        found = [part[name] for part in parts if part[name]]
        for i, inside in enumerate(found):
            if i:
                yield b","
            yield inside
    yield b"]}"


def _by_id(
    token: int, logprob: float, top: Sequence[Alternative], pieces: Pieces
) -> dict[str, object]:
    listed = {one.token: one.logprob for one in top} | {token: logprob}
    return {
        str(one): {"logprob": finite(value), "decoded_token": pieces.text(one)}
        for one, value in listed.items()
    }


class CompletionLogprobs:
    """The `logprobs` of a completion, whose tokens come one after another; offsets count the
    characters before each."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def follow(self, other: CompletionLogprobs) -> None:
        """Begin where another is now."""
        self._offset = other._offset
        self._decoder.setstate(other._decoder.getstate())

    def prompt(
        self, prompt: Sequence[int], found: PromptLogprobs, most: int, unseen: int
    ) -> Scores:
        """Those of an echoed prompt with `most` alternatives; its first `unseen` tokens are not in
        the text."""
        scores = enumerate(zip(prompt, found.logprobs, found.top, strict=True))
        return self._listed([(token, lp, top[:most], i < unseen) for i, (token, lp, top) in scores])

    def tokens(self, tokens: Sequence[Token]) -> Scores:
        """Those of generated tokens."""
        return self._listed([(t.id, t.logprob, t.top, False) for t in tokens])

    def _listed(self, rows: Sequence[_Row]) -> Scores:
        lists: tuple[Iterable[object], ...] = (
            (self._advance(token, unseen) for token, _, _, unseen in rows),
            (None if lp is None else finite(lp) for _, lp, _, _ in rows),
            (self._name(token) for token, _, _, _ in rows),
            (None if lp is None else self._top(token, lp, top) for token, lp, top, _ in rows),
        )
        return {
            name: b"".join(encode_inside(values))
            for name, values in zip(_LISTS, lists, strict=True)
        }

    def _advance(self, token: int, unseen: bool) -> int:
        offset = self._offset
        if not unseen:
            self._offset += len(self._decoder.decode(self._pieces.of(token)))
        return offset

    def _top(self, token: int, logprob: float, top: Sequence[Alternative]) -> dict[str, float]:
        # The likeliest keep their names where two tokens share one.
        named = {self._name(token): finite(logprob)}
        for one in reversed(top):
            named[self._name(one.token)] = finite(one.logprob)
        return named

    def _name(self, token: int) -> str:
        found = self._pieces.of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
