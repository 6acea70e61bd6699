"""What configuration files say of a module, and the words that all dialects have in common.

Looks at no tensor and knows no engine: what a file says is not what an engine does. The dialects
themselves are in `checkpoint/dialects`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate

from nybble.errors import CheckpointError

#: The file that most dialects are in; messages name it.
FLAT = "config.json"
Object = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Declared:
    """How the files say that a module is stored.

    `spelling` is theirs. `scheme` is a row of `SCHEMES`, "" where nybble has none; `weight` the
    weight's format in nybble's words (`FORMATS`, or "mxfp8", "int4" ...), "" where it has none.
    `activation` is in the words of `Scheme.activation`. With `by_class` the files name no module
    but every `Linear`: whether this one is, is for the caller to say.
    """

    spelling: str
    scheme: str
    weight: str
    group_size: int
    activation: str
    by_class: bool = False

    def __str__(self) -> str:
        return self.spelling

    @property
    def needs_input_scale(self) -> bool:
        """A measured scale of the input belongs in the file."""
        return self.activation in ("FP4", "FP8 static")


Rule = Callable[[str], Declared | None]


@dataclass(frozen=True, slots=True)
class Declaration:
    """What the files say; `layout` and `kv_cache` are "" where they say nothing of that."""

    layout: str = ""
    producer: str = ""
    kv_cache: str = ""
    disagreements: tuple[str, ...] = ()
    rule: Rule = field(default=lambda module: None, repr=False, compare=False)

    def of(self, module: str) -> Declared | None:
        """How this module is declared; None for one that is to stay unquantized."""
        return self.rule(module)


# ------------------------------------------------------------------------------------------ values


def as_object(value: object, where: str) -> dict[str, object]:
    """An object; anything else is refused, as `where`."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{place(where)} must be an object, found {type(value).__name__}")
    return {str(key): entry for key, entry in value.items()}


def place(where: str) -> str:
    """A place in a file, for a message: names of groups and modules are the file's own."""
    return where[:200] if where[:200].isprintable() else ascii(where[:200])[1:-1]


def optional(value: object, where: str) -> dict[str, object]:
    """An object, {} for null."""
    return {} if value is None else as_object(value, where)


def words(value: object, where: str) -> tuple[str, ...]:
    """A list of strings, () for null."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        raise CheckpointError(f"{place(where)} must be a list of strings")
    return tuple(value)


def number(value: object) -> int:
    """An integer, 0 for anything else."""
    return value if isinstance(value, int) else 0


def kv_cache_word(value: object) -> str:
    """One word for both spellings: "FP8" and {"num_bits": 8, "type": "float"} are "fp8"."""
    if isinstance(value, Mapping):
        kind = "fp" if value.get("type", "float") == "float" else "int"
        return f"{kind}{number(value.get('num_bits')) or 8}"
    return str(value or "").lower()


# ------------------------------------------------------------------------------------ names, globs


class Excluded:
    """Entries that exclude modules: a name covers itself and all below, a glob what it matches."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.names: set[str] = set()
        prefixes, globs = [], []
        for entry in entries:
            if not re.search(r"[*?\[]", entry):
                self.names.add(entry)
            elif not re.search(r"[*?\[]", entry[:-1]) and entry.endswith("*"):
                prefixes.append(entry[:-1])
            else:
                globs.append(f"(?:{translate(entry)})")
        self.prefixes = tuple(prefixes)
        self.glob = re.compile("|".join(globs)).match if globs else None

    def covers(self, module: str) -> bool:
        return (
            module.startswith(self.prefixes)
            or (bool(self.names) and above(module, self.names) is not None)
            or (self.glob is not None and self.glob(module) is not None)
        )


def above(module: str, names: Mapping[str, object] | set[str]) -> str | None:
    """The longest of `names` that is this module or a container of it."""
    while module not in names:
        at = module.rfind(".")
        if at < 0:
            return None
        module = module[:at]
    return module
