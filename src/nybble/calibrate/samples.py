"""The windows of tokens that a model is calibrated on: some to fit with, others to judge the fit.

About a sixth of the tokens are the guard: a method keeps its codes only if they are better there,
too. Whole documents go to one side where they can; of a long document the last part is the guard's.
Nothing is padded, so every token that a statistic counts is a word of a text. All that went in is
hashed into `record`. Knows tokens, no model.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nybble.calibrate.corpus import render
from nybble.calibrate.overlap import Sketch
from nybble.calibrate.presets import LENGTH, SAMPLES, open_source
from nybble.calibrate.sources import Source, said
from nybble.errors import TextError
from nybble.text.chat import ChatTemplate
from nybble.text.tokenizer import Tokenizer

#: One token in six judges: enough that a loss on it is worth a decision, and 83 % still fit.
GUARD_SHARE = 6
#: Tokens of the shortest window: below it most tokens have hardly a context.
SHORTEST = 16
#: Tokens below which nothing is calibrated: a sixth of them would not fill 11 blocks of a row.
LEAST_TOKENS = 1024
#: Characters of a text kept for each token wanted; what no tokenizer reaches in ordinary text.
_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Samples:
    """Windows of token ids, int64 [length] each. Those whose numbers are in `guard` only judge.

    `record` is JSON-able and says everything that is needed to make the same again, with a sketch
    of the words (`overlap.Sketch`). `all_experts`: the protocol wants every expert to see every
    token.
    """

    windows: tuple[Tensor, ...] = field(repr=False)
    guard: frozenset[int]
    record: Mapping[str, object] = field(repr=False)
    all_experts: bool = False

    @property
    def fit_windows(self) -> list[Tensor]:
        """Those that are fitted to."""
        return [w for i, w in enumerate(self.windows) if i not in self.guard]

    @property
    def guard_windows(self) -> list[Tensor]:
        """Those that judge."""
        return [w for i, w in enumerate(self.windows) if i in self.guard]

    @property
    def fit_tokens(self) -> int:
        """Tokens of the fit."""
        return sum(len(w) for w in self.fit_windows)

    @property
    def guard_tokens(self) -> int:
        """Tokens of the guard."""
        return sum(len(w) for w in self.guard_windows)

    def __str__(self) -> str:
        return (
            f"{self.fit_tokens:,} tokens to fit and {self.guard_tokens:,} to judge, in "
            f"{len(self.windows):,} windows of up to {max(map(len, self.windows)):,} "
            f"({self.record['source']})"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """Token ids of a document, or of a part of it."""

    domain: str
    document: str
    ids: Sequence[int]


#: A window while it is made: its domain and token ids.
_Window = tuple[str, list[int]]


def open_samples(
    folder: Path,
    source: str | None = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    context: int | None = None,
) -> Samples:
    """The windows of `source` for the model in `folder`: None or a preset, or a file's path.

    `samples` x `length` tokens, by default the source's own protocol (128 x 512 or what the text
    has). `context` is the longest window that the model can read. Raises TextError for a source
    that cannot be read or has fewer tokens than asked for, or than LEAST_TOKENS.
    """
    found = open_source(source)
    tokenizer = Tokenizer.open(folder)
    template = None if found.ids else ChatTemplate.open(folder)
    count, longest = _sizes(found, samples, length, context)
    if found.ids:
        pieces = _ready_windows(found, tokenizer, count, longest)
        words = [tokenizer.decode(list(p.ids)) for p in pieces]
    else:
        pieces, words = _pieces(found, tokenizer, template, count, longest)
    _refuse_few(found, pieces, samples, count, longest)
    (fit, guard), domains, dropped = _windows(found, pieces, longest)
    windows = tuple(torch.tensor(w, dtype=torch.int64) for w in (*fit, *guard))
    judged = frozenset(range(len(fit), len(windows)))
    record = {
        "source": found.name,
        "protocol": found.protocol or "a file of the user's",
        "files": [file.as_json() for file in found.files],
        "asked": {"samples": samples, "length": length},
        "length": longest,
        "windows": {"fit": len(fit), "guard": len(guard)},
        "tokens": {"fit": sum(map(len, fit)), "guard": sum(map(len, guard))},
        "domains": domains,
        "documents": len({(p.domain, p.document) for p in pieces}),
        "tokens_left_out": dropped,  # rests shorter than SHORTEST
        "all_experts": found.all_experts,
        "tokenizer_sha256": tokenizer.sha256,
        "template_sha256": template and hashlib.sha256(template.source.encode()).hexdigest(),
        "sha256": _digest(windows, judged),
        "words": Sketch.of(words).as_json(),
    }
    return Samples(windows, judged, record, found.all_experts)


def _sizes(
    found: Source, samples: int | None, length: int | None, context: int | None
) -> tuple[int | None, int]:
    """How many windows, None for all, and how long the longest may be."""
    for name, value, least in (("--samples", samples, 1), ("--length", length, SHORTEST)):
        if value is not None and value < least:
            raise TextError(f"{name} {value}: at least {least} is needed")
    if length is not None and context is not None and length > context:
        raise TextError(
            f"--length {length:,}: windows longer than the model's context of {context:,} tokens; "
            f"use --length {context} or less"
        )
    if found.ids:
        longest = length or max(map(len, found.ids))
        if context is not None and longest > context:
            raise TextError(
                f"{found.name}: has windows of {longest:,} token ids, the model's context is "
                f"{context:,}; cut them with --length {context} or less"
            )
        return samples or found.samples, longest
    longest = length or min(found.length or LENGTH, context or LENGTH * LENGTH)
    return samples or found.samples or max(1, SAMPLES * LENGTH // longest), longest


# --------------------------------------------------------------------------------------- to tokens


def _pieces(
    found: Source,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    count: int | None,
    length: int,
) -> tuple[list[Piece], list[str]]:
    """As many tokens of the documents as are wanted, and the words they were made of."""
    assert count is not None
    document = found.documents[0] if len(found.documents) == 1 else None
    if document is not None and document.text is not None:
        parts = list(_parts(document.text, count, length * _CHARACTERS))
        return _spread(document.domain, parts, tokenizer, count, length), parts
    pieces: list[Piece] = []
    words: list[str] = []
    left = count * length if found.is_packed else count
    for each in found.documents:
        if left <= 0:
            break
        try:
            text = render(each, template)
        except TextError as error:
            raise TextError(f"{found.name}: {each.name}: {error}") from error
        # Only a template may write special tokens; in a text they are words like others.
        ids = tokenizer.encode(text, parse_special=each.messages is not None)
        ids = ids[: left if found.is_packed else length]
        if found.is_packed or len(ids) >= SHORTEST:
            left -= len(ids) if found.is_packed else 1
            pieces.append(Piece(each.domain, each.name.partition("#")[0], ids))
            words.append(said(each))
    return pieces, words


def _spread(
    domain: str, parts: Sequence[str], tokenizer: Tokenizer, count: int, length: int
) -> list[Piece]:
    """Windows of one text: all of it, or as many as are wanted from beginning to end."""
    chunks: list[list[int]] = []
    for part in parts:
        ids = tokenizer.encode(part, parse_special=False)
        chunks += [ids[i : i + length] for i in range(0, len(ids), length)]
    if len(chunks) > count:
        chunks = [chunks[i * len(chunks) // count] for i in range(count)]
    # Six windows are a "document" of which the last judges, so that the guard is spread, too.
    return [Piece(domain, str(i // GUARD_SHARE), ids) for i, ids in enumerate(chunks)]


def _parts(text: str, count: int, characters: int) -> Iterator[str]:
    """The text, or of one that is far too long `count` parts at even distances, each from the
    beginning of a line where there is one near."""
    if len(text) <= count * characters:
        yield text
        return
    for i in range(count):
        at = i * len(text) // count
        line = text.find("\n", at, at + characters // 4)
        begin = line + 1 if line >= 0 and at else at
        yield text[begin : begin + characters]


def _ready_windows(
    found: Source, tokenizer: Tokenizer, count: int | None, length: int
) -> list[Piece]:
    """Token ids as they were given, only cut where they are longer than asked for."""
    size = tokenizer.vocab_size
    pieces = []
    for number, ids in enumerate(found.ids):
        if (most := max(ids)) >= size:
            raise TextError(
                f"{found.name}: input_ids[{number}] holds the id {most:,}, and the model's "
                f"tokenizer has {size:,} tokens: the ids are another model's"
            )
        for i in range(0, len(ids), length):
            pieces.append(Piece("ids", str(number), ids[i : i + length]))
    return pieces[:count]


def _refuse_few(
    found: Source, pieces: Sequence[Piece], samples: int | None, count: int | None, length: int
) -> None:
    tokens = sum(len(p.ids) for p in pieces)
    if tokens == 0:
        raise TextError(
            f"{found.name}: has no token with this model's tokenizer: there is nothing to measure "
            "on"
        )
    is_own = found.name == "default"
    whose = "the text that comes with nybble" if is_own else f"the calibration text {found.name}"
    if tokens < LEAST_TOKENS:
        raise TextError(
            f"{whose} gives {tokens:,} tokens, at least {LEAST_TOKENS:,} are needed; give more "
            "text, or more and longer windows (--samples, --length)"
        )
    if samples is None:
        return
    if found.is_packed and not found.ids and tokens < samples * length:
        raise TextError(
            f"{whose} has {tokens:,} tokens with this tokenizer, and {samples:,} x {length:,} were "
            f"asked for; use --samples {tokens // length or 1}, or give more text"
        )
    if (not found.is_packed or found.ids) and len(pieces) < samples:
        raise TextError(f"{whose} has {len(pieces):,} windows, and {samples:,} were asked for")


# ------------------------------------------------------------------------------- guard and windows


def choose_guard(pieces: Sequence[Piece]) -> list[bool]:
    """Which pieces judge: of each domain about one token in GUARD_SHARE, possibly none.

    Documents of one or two pieces go to one side whole; of longer ones the end may be the guard's.
    """
    documents: dict[tuple[str, str], list[int]] = {}
    for i, piece in enumerate(pieces):
        documents.setdefault((piece.domain, piece.document), []).append(i)
    owed: dict[str, float] = defaultdict(float)
    spare: dict[str, list[list[int]]] = defaultdict(list)  # the next unit of each document
    found = [False] * len(pieces)

    def take_if_owed(unit: Sequence[int], domain: str, due: float) -> bool:
        size = sum(len(pieces[i].ids) for i in unit)
        if due < size / 2:
            return False
        owed[domain] -= size
        for i in unit:
            found[i] = True
        return True

    for (domain, _), members in documents.items():
        owed[domain] += sum(len(pieces[i].ids) for i in members) / GUARD_SHARE
        units = [members] if len(members) < 3 else [[i] for i in members[:0:-1]]
        left = (unit for unit in units if not take_if_owed(unit, domain, owed[domain]))
        if (unit := next(left, None)) is not None:
            spare[domain].append(unit)
    # Of a small sample no domain may owe a whole document, and all together do.
    for domain in sorted(spare, key=lambda name: -owed[name]):
        if len(spare[domain]) > 1:
            take_if_owed(spare[domain][-1], domain, sum(owed.values()))
    return found


def _windows(
    found: Source, pieces: Sequence[Piece], length: int
) -> tuple[tuple[list[list[int]], list[list[int]]], dict[str, dict[str, int]], int]:
    """The windows to fit and those to judge, the tokens of both by domain, and how many tokens
    were left out."""
    packed: dict[tuple[bool, str], list[int]] = {}
    domains: dict[str, str] = {}
    for number, (piece, judges) in enumerate(zip(pieces, choose_guard(pieces), strict=True)):
        own = piece.domain if found.is_packed and not found.ids else str(number)
        packed.setdefault((judges, own), []).extend(piece.ids)
        domains[own] = piece.domain
    sides: tuple[list[_Window], list[_Window]] = ([], [])
    dropped = 0
    for (judges, own), ids in packed.items():
        for i in range(0, len(ids), length):
            window = ids[i : i + length]
            if len(window) >= SHORTEST or found.ids:
                sides[judges].append((domains[own], window))
            else:
                dropped += len(window)
    _fill_guard(*sides)
    counts: dict[str, dict[str, int]] = {}
    for side, windows in zip(("fit", "guard"), sides, strict=True):
        for domain, window in windows:
            row = counts.setdefault(domain, {"fit": 0, "guard": 0})
            row[side] += len(window)
    fit, guard = ([window for _, window in windows] for windows in sides)
    return (fit, guard), counts, dropped


def _fill_guard(fit: list[_Window], guard: list[_Window]) -> None:
    """Move windows where whole documents left the guard less than half of its share: of a small
    sample, or of a text of one or two pieces."""
    fits, judges = (sum(len(window) for _, window in side) for side in (fit, guard))
    lacking = (fits + judges) / GUARD_SHARE - judges
    if lacking <= judges:
        return
    if len(fit) == 1:
        domain, only = fit[0]
        at = len(only) - max(SHORTEST, len(only) // GUARD_SHARE)
        guard.append((domain, only[at:]))
        del only[at:]
        return
    count = max(1, min(len(fit) // 2, round(lacking * len(fit) / fits)))
    step = len(fit) / count
    for i in reversed(range(count)):
        guard.append(fit.pop(int((i + 1) * step) - 1))


def _digest(windows: Sequence[Tensor], guard: frozenset[int]) -> str:
    """What must be equal for a run to be gone on with."""
    digest = hashlib.sha256(repr(([len(w) for w in windows], sorted(guard))).encode())
    for window in windows:
        digest.update(window.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
