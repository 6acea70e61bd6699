"""Reading the small files of a model's folder that concern text, with limits and plain errors.

Knows bytes, JSON and the types of single fields. What a field means is its caller's business.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path

from nybble.errors import TextError

# The largest published tokenizer.json are below 40 MB.
MAX_FILE_BYTES = 100 * 1000 * 1000


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes | None:
    """The bytes of a file, or None if there is none of that name.

    Raises TextError for anything that is not a regular file of at most `limit` bytes.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TextError(f"{path}: expected a regular file; found a folder or a device")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TextError(f"{path}: reading it: {error.strerror or error}") from error
    if len(data) > limit:
        raise TextError(
            f"{path}: expected at most {limit:,} bytes, found more; this is not the file of a "
            "model: fetch it again"
        )
    return data


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file; empty if there is no such file. Raises TextError."""
    data = read_bytes(path)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}: is not JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise TextError(f"{path}: expected a JSON object, found {kind(value)}")
    return value


def token_text(path: Path, config: Mapping[str, object], key: str) -> str | None:
    """The text of a named token, which tokenizer_config.json gives as a string or as an object
    with `content`; None if it is absent or null. Raises TextError."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
        key = f"{key}.content"
        if value is None:
            raise TextError(f"{path}: {key}: expected a string, found nothing")
    if value is None or isinstance(value, str):
        return value
    raise TextError(f"{path}: {key}: expected a string or an object, found {kind(value)}")


def kind(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")
