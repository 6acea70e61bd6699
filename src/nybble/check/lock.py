"""A lock: size and sha256 of every file of a checkpoint. Knows no rule."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nybble.checkpoint.files import Files
from nybble.checkpoint.safetensors import parse_json
from nybble.errors import RecipeError

SCHEMA = "nybble.lock/1"
_PIECE = 1 << 24


@dataclass(frozen=True, slots=True)
class Lock:
    """(size, sha256) by file name; `where` it was made of."""

    where: str
    files: Mapping[str, tuple[int, str]]

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.lock/1`."""
        entries = {n: {"bytes": size, "sha256": h} for n, (size, h) in sorted(self.files.items())}
        return {"schema": SCHEMA, "where": self.where, "files": entries}


def make_lock(files: Files) -> Lock:
    """Hash every file; two at a time, as hashing is slower than a disk."""
    names = files.names()
    with ThreadPoolExecutor(2) as pool:
        hashes = list(pool.map(lambda name: sha256_of(files, name), names))
    sizes = [files.size(name) for name in names]
    return Lock(files.where, {n: (s, h) for n, s, h in zip(names, sizes, hashes, strict=True)})


def sha256_of(files: Files, name: str) -> str:
    """The hash of a file: the one that its place tells, else read."""
    if known := files.known_sha256(name):
        return known
    size, digest = files.size(name), hashlib.sha256()
    for at in range(0, size, _PIECE):
        digest.update(files.read(name, at, min(_PIECE, size - at)))
    return digest.hexdigest()


def read_lock(file: Path) -> Lock:
    """A lock that was written. Raises RecipeError for anything else."""
    try:
        document = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise RecipeError(
            f"{file}: cannot be read: {error.strerror}; --write-lock makes such a file"
        ) from error
    entries = document.get("files")
    if document.get("schema") != SCHEMA:
        raise RecipeError(f"{file}: expected schema {SCHEMA}, found {document.get('schema')!r}")
    if not isinstance(entries, Mapping):
        raise RecipeError(f"{file}: files must be an object file name -> bytes, sha256")
    files = {}
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("bytes"), int):
            raise RecipeError(f"{file}: {name}: expected an object with bytes and sha256")
        files[str(name)] = (int(entry["bytes"]), str(entry.get("sha256")))
    return Lock(str(document.get("where") or ""), files)
