"""What a conversation may be made of, looked at before a chat template reads it.

Templates drop in silence, or fail on, what they were not written for; here it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nybble.errors import TextError


def check_messages(messages: object) -> Sequence[Mapping[str, object]]:
    """The messages for a template: mappings with a role, and a text, nothing or parts of type text
    as their content. Parts become one text, each a line, as `nybble serve` has it, since not every
    template reads lists. Raises TextError, which names messages[i]."""
    if not isinstance(messages, (list, tuple)):
        raise TextError(
            "messages: expected a list such as [{'role': 'user', 'content': 'Hello'}], found a "
            f"{_kind(messages)}"
        )
    if not messages:
        raise TextError("messages: the list is empty; give it what the user says")
    for i, message in enumerate(messages):
        _check_message(f"messages[{i}]", message)
    return [_joined(message) for message in messages]


def _joined(message: Mapping[str, object]) -> Mapping[str, object]:
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _check_message(where: str, message: object) -> None:
    if not isinstance(message, Mapping):
        raise TextError(
            f"{where}: expected a mapping with role and content, found a {_kind(message)}"
        )
    if not isinstance(message.get("role"), str):
        raise TextError(
            f"{where}: role: expected a text such as 'user', "
            + (f"found a {_kind(message['role'])}" if "role" in message else "found none")
        )
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        for j, part in enumerate(content):
            _check_part(f"{where}: content[{j}]", part)
    elif content is not None and not isinstance(content, str):
        raise TextError(
            f"{where}: content: expected a text, None or a list of parts, found a {_kind(content)}"
        )


def _check_part(where: str, part: object) -> None:
    if not isinstance(part, Mapping):
        raise TextError(f"{where}: expected a mapping with type and text, found a {_kind(part)}")
    if part.get("type") != "text":
        raise TextError(
            f"{where}: a part of type {part.get('type')!r}; only parts of type 'text' can be read"
        )
    if not isinstance(part.get("text"), str):
        raise TextError(f"{where}: text: expected a text, found a {_kind(part.get('text'))}")


def _kind(value: object) -> str:
    return type(value).__name__
