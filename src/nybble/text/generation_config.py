"""What a model's publisher recommends for drawing tokens: generation_config.json.

Knows the file's keys, not what they may be: who samples has the bounds.
"""

from __future__ import annotations

from pathlib import Path

from nybble.errors import TextError
from nybble.text.folder import kind, read_object

#: The keys that have the same meaning in every engine that reads the file.
_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, float]:
    """The sampling options that the folder's generation_config.json names, by the file's own names.

    `do_sample` false is temperature 0; true without a temperature is 1. Empty where the file is
    absent or names none. Raises TextError for a value that is no number.
    """
    path = folder / "generation_config.json"
    config = read_object(path)
    found = {key: _number(path, key, config[key]) for key in _KEYS if config.get(key) is not None}
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    elif config.get("do_sample") is True:
        found.setdefault("temperature", 1.0)
    if "top_k" in found:
        found["top_k"] = int(found["top_k"])
    return found


def _number(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TextError(f"{path}: {key}: expected a number, found {kind(value)}")
    if key == "top_k" and value != int(value):
        raise TextError(f"{path}: {key}: expected a whole number, found {value}")
    return value
