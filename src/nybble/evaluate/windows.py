"""What is scored: a text, its token ids cut into windows, and which tokens of each window count.

A perplexity without its convention is not a number, so each has a name:

    windows   non-overlapping windows of `length` ids, the last one ragged (a window of one token
              has nothing to score and is left out); every token but the first of each window
              counts; no BOS. What scripts around vLLM do, and the protocol behind the published
              figures of Qwen3.6-35B-A3B (wikitext-2: 581 windows of 512, 296,472 scored tokens).
    llamacpp  llama-perplexity: windows of `length` ids, the ragged tail dropped; only the second
              half counts, length - 1 - length // 2 tokens; where the model adds a BOS, it precedes
              the text, and the first token of every window is replaced by it.
              Source: llama.cpp tools/perplexity/perplexity.cpp, `perplexity`.
    sliding   a window every `stride` ids; a window counts the tokens that no earlier one has
              counted, so every token but the text's first counts once, with at least
              length - stride tokens before it. Source: transformers, "Perplexity of fixed-length
              models" (which weights a later window's mean by one token less than it has).

Knows no tokenizer and no model: ids come in, windows go out.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nybble.errors import EvaluationError, TextError

CONVENTIONS = ("windows", "llamacpp", "sliding")

#: sha256 of wiki.test.raw: 1,290,590 bytes, 4,358 lines, as published.
_WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
SUITES = ("wikitext2",)

IntArray = NDArray[np.int64]


# -------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True, slots=True)
class Text:
    """A text to score; `name` is a suite's or a file's."""

    name: str
    content: str

    @property
    def nbytes(self) -> int:
        """Bytes in UTF-8."""
        return len(self.content.encode())

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def join_lines(text: str) -> str:
    """The lines of `text` that are not blank, each with its line end, joined by an empty line.

    That is `"\\n\\n".join(row for row in dataset["text"] if row.strip())` over the rows of the data
    set `wikitext-2-raw-v1`, whose rows keep their line end; a line of spaces is blank. Only "\\n"
    ends a line. Without the line ends the text of wikitext-2 has as many Qwen3.6 tokens (a run of
    line ends is one token), so published token counts do not tell the two apart.
    """
    lines = text.split("\n")
    rows = [line + "\n" for line in lines[:-1]] + lines[-1:]
    return "\n\n".join(row for row in rows if row.strip())


def load_suite(name: str) -> Text:
    """A text that comes with nybble, by name; "wikitext2" is the raw test split, lines joined.

    Raises TextError for an unknown name or if the packaged file is damaged.
    """
    if name not in SUITES:
        raise TextError(f"suite {name!r} is unknown; there are: {', '.join(SUITES)}")
    file = resources.files("nybble.evaluate") / "texts" / "wikitext2" / "wiki.test.raw.gz"
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(
            f"suite {name!r}: {file} cannot be read: {error}; install nybble again"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != _WIKITEXT2_SHA256:
        raise TextError(
            f"suite {name!r}: {file} has sha256 {found}, expected {_WIKITEXT2_SHA256}; install "
            "nybble again"
        )
    return Text(name, join_lines(data.decode()))


def read_text(path: Path) -> Text:
    """A UTF-8 file, byte for byte. Raises TextError if it is empty, not UTF-8 or unreadable."""
    try:
        content = path.read_bytes().decode()
    except OSError as error:
        raise TextError(f"{path}: the text cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 at byte {error.start}; convert it") from error
    if not content.strip():
        raise TextError(f"{path}: the text is empty; there is nothing to score")
    return Text(path.name, content)


# ------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Tokens that the model sees at once: `tokens[first_scored:]` are scored, each from the logits
    at the position before it.

    tokens: int64 [L]. `start` is the place of tokens[0] among the ids that were cut
    (under "llamacpp" with a BOS, those with the BOS in front).
    """

    tokens: IntArray
    first_scored: int
    start: int

    @property
    def scored_count(self) -> int:
        """How many tokens count."""
        return len(self.tokens) - self.first_scored

    @property
    def targets(self) -> IntArray:
        """The scored tokens, int64 [scored_count]."""
        return self.tokens[self.first_scored :]

    @property
    def predicting(self) -> slice:
        """The positions whose logits predict `targets`."""
        return slice(self.first_scored - 1, len(self.tokens) - 1)


def make_windows(
    ids: ArrayLike,
    length: int,
    convention: str = "windows",
    *,
    stride: int | None = None,
    bos: int | None = None,
    limit: int | None = None,
) -> tuple[Window, ...]:
    """Cut the ids of a text (no special tokens added) into windows.

    `stride` belongs to "sliding", which needs it; `bos` to "llamacpp": the id that the model's
    tokenizer puts in front, if it does. `limit` keeps only the first windows. Raises TextError if
    the text is empty or too short, EvaluationError for settings that contradict each other.
    """
    tokens = _check_ids(ids)
    _check_settings(length, convention, stride, bos, limit)
    if convention == "llamacpp":
        windows = _llamacpp(tokens, length, bos)
    else:
        if len(tokens) < max(2, length // 2):
            raise TextError(
                f"the text has {len(tokens)} tokens, windows of {length} need at least "
                f"{max(2, length // 2)} (half a window); give a longer text or a smaller --length"
            )
        step = stride if stride is not None else length
        windows = list(_sliding(tokens, length, step))
    return tuple(windows[:limit])


def count_scored(windows: Sequence[Window]) -> int:
    """Scored tokens of all windows."""
    return sum(window.scored_count for window in windows)


def _check_ids(ids: ArrayLike) -> IntArray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TextError(
            f"token ids must be a list of integers, found {array.dtype} of shape {array.shape}"
        )
    if array.size == 0:
        raise TextError("the text is empty: it has no tokens; there is nothing to score")
    tokens = array.astype(np.int64)  # a copy: the windows are views of it
    if int(tokens.min()) < 0:
        at = int(tokens.argmin())
        raise TextError(f"token {at} of the text has the id {tokens[at]}; ids are not negative")
    return tokens


def _check_settings(
    length: int, convention: str, stride: int | None, bos: int | None, limit: int | None
) -> None:
    if convention not in CONVENTIONS:
        raise EvaluationError(
            f"convention {convention!r} is unknown; there are: {', '.join(CONVENTIONS)}"
        )
    # llama.cpp scores length - 1 - length // 2 tokens: none of 2.
    shortest = 3 if convention == "llamacpp" else 2
    if length < shortest:
        raise EvaluationError(f"a window of {length} tokens scores nothing; give {shortest} up")
    if (stride is not None) != (convention == "sliding"):
        mend = f"give --stride, such as {length // 2}" if stride is None else "leave --stride out"
        verb = "needs a" if convention == "sliding" else "has no"
        raise EvaluationError(f"the convention {convention!r} {verb} stride; {mend}")
    if stride is not None and not 0 < stride < length:
        raise EvaluationError(
            f"stride {stride} with windows of {length}: give 1 to {length - 1}; windows that do "
            "not overlap are the convention 'windows'"
        )
    if bos is not None and (convention != "llamacpp" or bos < 0):
        raise EvaluationError(
            f"the convention {convention!r} adds no BOS {bos}; 'llamacpp' does, with an id >= 0"
        )
    if limit is not None and limit < 1:
        raise EvaluationError(f"a limit of {limit} windows leaves none; give 1 or more")


def _sliding(tokens: IntArray, length: int, stride: int) -> Iterator[Window]:
    """Windows every `stride` tokens, of which those past the previous window's end count; without
    an overlap the first of each has no context and cannot."""
    previous_end = 0
    for start in range(0, len(tokens), stride):
        end = min(start + length, len(tokens))
        if end - start > 1:
            yield Window(tokens[start:end], max(1, previous_end - start), start)
        previous_end = end
        if end == len(tokens):
            return


def _llamacpp(tokens: IntArray, length: int, bos: int | None) -> list[Window]:
    if bos is not None:
        tokens = np.concatenate(([bos], tokens))
    if len(tokens) < 2 * length:
        raise TextError(
            f"the text has {len(tokens)} tokens, the convention 'llamacpp' needs at least two "
            f"windows of {length}; give a longer text or a shorter window"
        )
    windows = []
    for start in range(0, len(tokens) - length + 1, length):
        window = tokens[start : start + length]
        if bos is not None:
            window = window.copy()
            window[0] = bos
        windows.append(Window(window, length // 2 + 1, start))
    return windows
