"""What differs in the files beside the weights: settings in JSON, other files, the chat template.

JSON is compared by content, whatever its spelling; the chat template by its text, wherever it
stands; any other file by its bytes.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nybble.checkpoint.dialects import read_json
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import HEADER_LIMIT

_CHUNK = 16 << 20
_EXCERPT_LINES = 40
_SETTINGS = 100
_TEMPLATE = "chat_template"
_TEMPLATE_FILES = (f"{_TEMPLATE}.jinja", f"{_TEMPLATE}.json")


@dataclass(frozen=True, slots=True)
class Setting:
    """A place in a JSON file whose value differs; "" where it is absent, else JSON, shortened."""

    file: str
    path: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Template:
    """The chat template's places (the one that counts first), and what differs in its text."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    excerpt: tuple[str, ...]
    lines: int


@dataclass(slots=True)
class TextComparison:
    """The files beside the weights, but for the chat template."""

    a: Checkpoint
    b: Checkpoint
    settings: list[Setting] = field(default_factory=list)
    hidden: int = 0
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    respelled: list[str] = field(default_factory=list)

    def run(self) -> None:
        a, b = (set(_side_files(c)) for c in (self.a, self.b))
        self.only_in_a, self.only_in_b = sorted(a - b), sorted(b - a)
        for name in sorted(a & b):
            self.compare_file(name)

    def compare_file(self, name: str) -> None:
        one, other = self.a.path / name, self.b.path / name
        if one.samefile(other) or _same_bytes(one, other):
            return
        found = None
        if name.endswith(".json"):
            first, second = (_load(c, name) for c in (self.a, self.b))
            if first is not None and second is not None:
                found = list(_differences(first, second, ""))
        if found is None:
            self.files.append(name)
        elif not found:
            self.respelled.append(name)
        else:
            self.settings += [Setting(name, *place) for place in found[:_SETTINGS]]
            self.hidden += max(0, len(found) - _SETTINGS)


def _side_files(checkpoint: Checkpoint) -> list[str]:
    names = [n for n in checkpoint.side_files() if n not in _TEMPLATE_FILES]
    rewritten = ("config.json", CONFIG_FILE)
    return [*names, *(n for n in rewritten if (checkpoint.path / n).exists())]


def _same_bytes(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as one, b.open("rb") as other:
        while (chunk := one.read(_CHUNK)) == other.read(_CHUNK):
            if not chunk:
                return True
    return False


def _load(checkpoint: Checkpoint, name: str) -> object:
    """A JSON file without a chat template, which is compared by itself; None if it is not JSON."""
    if name == CONFIG_FILE:
        return read_json(checkpoint, name)
    path = checkpoint.path / name
    if path.stat().st_size > HEADER_LIMIT:
        return None
    try:
        document: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(document, dict) and name == "tokenizer_config.json":
        document.pop(_TEMPLATE, None)
    return document


_ABSENT = object()


def _differences(a: object, b: object, path: str) -> Iterator[tuple[str, str, str]]:
    """Path and both values, shortened, of every place where two JSON documents differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            step = key if re.fullmatch(r"\w+", key) else f"[{json.dumps(key)}]"
            below = f"{path}.{step}" if path and step == key else path + step
            yield from _differences(a.get(key, _ABSENT), b.get(key, _ABSENT), below)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and _is_nested(a + b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{path}[{i}]")
    elif a is not b and (a != b or type(a) is not type(b)):
        yield path, _shorten(a, b), _shorten(b, a)


def _is_nested(values: list[object]) -> bool:
    return any(isinstance(value, (list, dict)) for value in values)


def _shorten(value: object, other: object) -> str:
    if value is _ABSENT:
        return ""
    if isinstance(value, list) and isinstance(other, list) and len(value) > 8:
        theirs = {json.dumps(entry, sort_keys=True) for entry in other}
        own = [text for v in value if (text := json.dumps(v, sort_keys=True)) not in theirs]
        example = f", {own[0]} for one" if own else ""
        return f"{len(value)} entries, {len(own)} only here{example}"[:200]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"


def compare_templates(a: Checkpoint, b: Checkpoint) -> Template | None:
    one, other = _templates(a.path), _templates(b.path)
    text_a, text_b = next(iter(one.values()), ""), next(iter(other.values()), "")
    if one.keys() == other.keys() and text_a == text_b:
        return None
    lines = list(
        difflib.unified_diff(text_a.splitlines(), text_b.splitlines(), "A", "B", lineterm="", n=2)
    )
    return Template(tuple(one), tuple(other), tuple(lines[:_EXCERPT_LINES]), len(lines))


def _templates(path: Path) -> dict[str, str]:
    """Where the chat template stands, and its text there; the place that counts comes first."""
    found = {}
    jinja, *others = (path / name for name in (*_TEMPLATE_FILES, "tokenizer_config.json"))
    if jinja.is_file():
        found[jinja.name] = jinja.read_bytes().decode(errors="replace")
    for file in others:
        if not file.is_file():
            continue
        try:
            document = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            continue
        template = document.get(_TEMPLATE) if isinstance(document, dict) else None
        if isinstance(template, str):
            found[file.name] = template
        elif template:
            found[file.name] = json.dumps(template, indent=2).replace("\\n", "\n")
    return found
