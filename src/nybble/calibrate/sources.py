"""Where calibration documents come from: the user's files, and the records that name them.

A text file is one document; a .jsonl has one of each line ({"text"}, {"messages"[, "tools"]} or
{"input_ids"}); a .json {"input_ids": [[...], ...]} holds token ids, the same for every tool that is
compared. Named mixtures are in presets.py. Knows no tokenizer: what a document becomes in tokens is
the business of samples.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from nybble.calibrate.corpus import Document, Message
from nybble.errors import TextError

USER_LICENCE = "LicenseRef-user"
#: A file that is read whole: far more than any calibration needs, far less than a machine has.
MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class File:
    """A file that was read: enough to find out later whether it is the same."""

    name: str
    nbytes: int
    sha256: str

    def as_json(self) -> dict[str, object]:
        """For the record."""
        return {"name": self.name, "bytes": self.nbytes, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Source:
    """Documents or token ids, and how their protocol cuts them.

    `documents` are in the order in which they are used up; those with the same domain and the same
    name up to "#" are parts of one. `ids` are ready windows. Exactly one of the two is there.
    `is_packed`: documents follow one another in windows; otherwise each is one window, cut at its
    length. `samples` and `length` are the protocol's, None for as many as there are.
    """

    name: str
    files: tuple[File, ...]
    documents: Sequence[Document] = ()
    ids: Sequence[Sequence[int]] = ()
    samples: int | None = None
    length: int | None = None
    is_packed: bool = True
    all_experts: bool = False
    protocol: str = ""


def read_file(path: Path) -> Source:
    """The documents of a text file, a .jsonl or a .json of token ids.

    Raises TextError for a file that cannot be read, holds nothing, or has a line that is none of
    the known forms.
    """
    data = _read(path)
    file = File(path.name, len(data), hashlib.sha256(data).hexdigest())
    try:
        content = data.decode("utf-8-sig")  # some editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
    if not content.strip():
        raise TextError(f"{path}: the calibration text is empty: there is nothing to measure on")
    if path.suffix.lower() == ".jsonl":
        return _jsonl(path, file, content)
    if path.suffix.lower() == ".json":
        return Source(path.name, (file,), ids=_ids_document(path, content))
    document = Document("text", path.stem, USER_LICENCE, text=content)
    return Source(path.name, (file,), documents=(document,))


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The objects of a .jsonl with the numbers of their lines, blank lines left out.

    Raises TextError, naming the line, for what is no JSON object.
    """
    return _rows(path, _read(path).decode(errors="replace"))


def conversation(where: str, row: Mapping[str, object], domain: str, name: str) -> Document:
    """A document of a row's `messages` and `tools`. Raises TextError, naming `where`."""
    return Document(
        domain,
        name,
        USER_LICENCE,
        messages=_messages(where, "messages", row["messages"], needs="role"),
        tools=_messages(where, "tools", row["tools"]) if row.get("tools") else None,
    )


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise TextError(
                f"{path}: {size:,} bytes of calibration text, at most {MAX_BYTES:,} are read; give "
                "a part of it"
            )
        return path.read_bytes()
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror or error}") from None


def _rows(path: Path, content: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() knows other ends too
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path}: line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise TextError(
                f"{path}: line {number} holds {type(row).__name__}, expected an object with text, "
                "messages or input_ids"
            )
        yield number, row


def _jsonl(path: Path, file: File, content: str) -> Source:
    documents: list[Document] = []
    ids: list[list[int]] = []
    for number, row in _rows(path, content):
        where = f"{path}: line {number}"
        domain = row.get("domain", "text")
        name = f"{path.stem}/{number}"
        if not isinstance(domain, str):
            raise TextError(f"{where}: domain is {domain!r}, expected a word")
        if isinstance(row.get("text"), str):
            documents.append(Document(domain, name, USER_LICENCE, text=str(row["text"])))
        elif "messages" in row:
            documents.append(conversation(where, row, domain, name))
        elif "input_ids" in row:
            ids.append(_ids(where, row["input_ids"]))
        else:
            raise TextError(
                f"{where}: has {', '.join(row) or 'nothing'}, expected text (a string), messages "
                "or input_ids"
            )
    if documents and ids:
        raise TextError(
            f"{path}: some lines hold token ids, others words; put them into files of their own"
        )
    return Source(path.name, (file,), documents=tuple(documents), ids=ids)


def _messages(where: str, key: str, value: object, needs: str | None = None) -> tuple[Message, ...]:
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value) or not value:
        raise TextError(f"{where}: {key} must be a list of objects, found {str(value)[:60]}")
    if needs is not None and not all(isinstance(m.get(needs), str) for m in value):
        raise TextError(f"{where}: each of {key} needs a {needs}")
    return tuple(value)


def _ids_document(path: Path, content: str) -> list[list[int]]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}: no JSON: {error}") from None
    rows = data.get("input_ids") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise TextError(
            f'{path}: expected {{"input_ids": [[...], ...]}}, one list of token ids a window'
        )
    return [_ids(f"{path}: input_ids[{i}]", row) for i, row in enumerate(rows)]


def _ids(where: str, row: object) -> list[int]:
    if not isinstance(row, list) or not row or {type(i) for i in row} != {int} or min(row) < 0:
        raise TextError(f"{where}: expected a list of token ids, integers from 0, at least one")
    return list(row)


def said(document: Document) -> str:
    """The words of a document without the marks of any template, to look for them elsewhere."""
    if document.text is not None:
        return document.text
    parts = chain.from_iterable(
        (m.get("reasoning_content"), m.get("content")) for m in document.messages or ()
    )
    return "\n".join(part for part in parts if isinstance(part, str))
