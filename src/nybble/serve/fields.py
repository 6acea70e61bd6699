"""Reading JSON objects that strangers wrote: every field has a type and a bound, and a field that
nobody read is an error.

Knows JSON and types; what the fields mean is its callers' business.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from nybble.serve.errors import Refusal, invalid, unsupported


def read_json(body: bytes) -> Mapping[str, object]:
    """The JSON object in a request's body.

    Raises Refusal for other bytes, for keys that come twice (two readers would take different ones)
    and for NaN and Infinity, which Python's reader takes and JSON does not have.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(None, f"the body is not UTF-8 at byte {error.start}") from error
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise invalid(None, "the body's JSON is nested too deeply") from error
    except ValueError as error:
        raise invalid(None, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise invalid(None, f"the body must be a JSON object, found {kind(value)}")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:100]
        raise invalid(twice, f"the key {twice!r} comes twice in one object")
    return found


def _constant(name: str) -> object:
    raise invalid(None, f"the body is not JSON: it has {name}")


def kind(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return "a string" if isinstance(value, str) else "a number"


class Fields:
    """One JSON object, read field by field. null counts as absent, as in OpenAI's API.

    `where` is the object's own place, as in "response_format."
    """

    def __init__(self, values: Mapping[str, object], where: str = "") -> None:
        self._values, self._where = values, where
        self._read: set[str] = set()

    def raw(self, name: str) -> object:
        """A value of any type, or None."""
        self._read.add(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Whether there is a value other than null."""
        return self._values.get(name) is not None

    def path(self, name: str) -> str:
        """The field's name from the top of the body."""
        return self._where + name

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number", value)
        if not low <= value <= high:
            raise self._outside(name, f"{low:,} to {high:,}", value)
        return value

    def real(self, name: str, low: float, high: float) -> float | None:
        """A number within bounds."""
        value = self.raw(name)
        return None if value is None else self._real(name, value, low, high)

    def _real(self, name: str, value: object, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, "a number", value)
        # Compared before it is converted: 10^400 is a JSON number, and no float.
        if not low <= value <= high or not math.isfinite(value):
            raise self._outside(name, f"{low:g} to {high:g}", value)
        return float(value)

    def text(self, name: str, most: int) -> str | None:
        """A string of at most `most` characters."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        if len(value) > most:
            raise invalid(
                self.path(name),
                f"{self.path(name)} must have at most {most:,} characters, found {len(value):,}",
            )
        self._check_unicode(name, value)
        return value

    def _check_unicode(self, name: str, text: str) -> None:
        # JSON can spell half of a surrogate pair, which is no character.
        try:
            text.encode()
        except UnicodeEncodeError as error:
            path = self.path(name)
            raise invalid(
                path, f"{path} has a lone surrogate at character {error.start}: it is no text"
            ) from error

    def one_of(self, name: str, allowed: Iterable[str]) -> str | None:
        """One of some words."""
        value = self.text(name, 100)
        if value is not None and value not in allowed:
            raise invalid(
                self.path(name),
                f"{self.path(name)} must be {' or '.join(allowed)}, found {value!r}",
            )
        return value

    def items(self, name: str, most: int) -> list[object] | None:
        """A list of at most `most` entries of any kind."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(name, "a list", value)
        if len(value) > most:
            raise invalid(
                self.path(name),
                f"{self.path(name)} must have at most {most:,} entries, found {len(value):,}",
            )
        return value

    def texts(self, name: str, most: int, characters: int) -> tuple[str, ...]:
        """A list of strings."""
        found = []
        for i, value in enumerate(self.items(name, most) or ()):
            if not isinstance(value, str) or not 0 < len(value) <= characters:
                raise invalid(
                    self.path(f"{name}[{i}]"),
                    f"{self.path(name)}[{i}] must be a string of 1 to {characters:,} characters",
                )
            self._check_unicode(f"{name}[{i}]", value)
            found.append(value)
        return tuple(found)

    def tokens(self, name: str, most: int, vocab: int) -> tuple[int, ...]:
        """A list of token ids."""
        values = self.items(name, most) or []
        return check_tokens(self.path(name), values, vocab)

    def inner(self, name: str) -> Fields | None:
        """An object."""
        value = self.mapping(name)
        return None if value is None else Fields(value, self.path(name) + ".")

    def mapping(self, name: str) -> Mapping[str, object] | None:
        """An object whose keys are data."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value

    def unicode_mapping(self, name: str) -> Mapping[str, object] | None:
        """An object whose keys and values become text."""
        value = self.mapping(name)
        if value is not None:
            try:
                text = json.dumps(value, ensure_ascii=False)
            except RecursionError as error:
                path = self.path(name)
                raise invalid(path, f"{path} is nested too deeply") from error
            self._check_unicode(name, text)
        return value

    def biases(self, name: str, most: int, vocab: int) -> dict[int, float]:
        """Token ids, written as strings because JSON has no other keys, and their numbers."""
        found: dict[int, float] = {}
        values = self.mapping(name) or {}
        if len(values) > most:
            raise invalid(
                self.path(name), f"{name} must have at most {most:,} entries, found {len(values):,}"
            )
        for key, value in values.items():
            is_id = key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab
            if not is_id:
                raise invalid(
                    self.path(name),
                    f"{name}: {key[:20]!r} is no token id; expected 0 to {vocab - 1:,}",
                )
            found[int(key)] = self._real(name, value, -100, 100)
        return found

    def ignore(self, *names: str) -> None:
        """Count fields as read that change nothing."""
        self._read.update(names)

    def refuse(self, names: Mapping[str, str]) -> None:
        """Refuse fields that are known and cannot be done; `names` says what to do instead. Values
        that ask for nothing pass."""
        for name, instead in names.items():
            value = self.raw(name)
            if value not in (None, False, "", "none", "auto", [], {}):
                raise unsupported(self.path(name), instead)

    def finish(self) -> None:
        """Raise Refusal for fields that were not read."""
        unknown = sorted(self._values.keys() - self._read)
        if unknown:
            names = ", ".join(self.path(name)[:100] for name in unknown[:5])
            raise invalid(
                self.path(unknown[0])[:100],
                f"unknown field{'s' if len(unknown) > 1 else ''}: {names}; nothing is ignored "
                "silently, so check the spelling or leave it out",
                "unknown_parameter",
            )

    def _wrong(self, name: str, expected: str, value: object) -> Refusal:
        path = self.path(name)
        return invalid(path, f"{path} must be {expected}, found {kind(value)}")

    def _outside(self, name: str, bounds: str, value: float) -> Refusal:
        path = self.path(name)
        found = repr(value)
        if len(found) > 40:
            found = f"a number of {len(found):,} digits"
        return invalid(path, f"{path} must be {bounds}, found {found}")


def check_tokens(path: str, values: list[object], vocab: int) -> tuple[int, ...]:
    """Token ids, as a list of JSON holds them. Raises Refusal for anything else."""
    # Whole lists at once: a prompt may have a million.
    if not all(type(value) is int for value in values):
        wrong = next(i for i, value in enumerate(values) if type(value) is not int)
        raise invalid(path, f"{path}[{wrong}] must be a token id, found {kind(values[wrong])}")
    ids: tuple[int, ...] = tuple(values)  # type: ignore[arg-type]
    if ids and not (0 <= min(ids) and max(ids) < vocab):
        raise invalid(path, f"{path} must be token ids of 0 to {vocab - 1:,}")
    return ids


def one_or_more(value: object, read: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    """A list of strings that may be written as one string."""
    if isinstance(value, str):
        return (value,) if value else ()
    return read()
