"""Regular expressions that come with a checkpoint: compiled only if matching them ends soon.

Python's matcher backtracks and cannot be stopped, so `(a+)+$` in an ignore list would hang whoever
reads it. Two shapes make that possible, and are refused: a repetition inside a repetition, unless
something between keeps the rounds apart, and a row of many wide repetitions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

#: `.*` and its like in one pattern; published ones have up to three.
WIDE_LIMIT = 4
LENGTH_LIMIT = 4096
#: A repetition of at most so many rounds is none.
_FEW = 4

_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)
_Node = tuple[Any, Any]


@lru_cache(maxsize=4096)
def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile an untrusted regular expression.

    Raises re.error for one that is malformed, and for one whose matching may take for ever.
    """
    if len(text) > LENGTH_LIMIT:
        raise re.error(f"{len(text)} characters, at most {LENGTH_LIMIT} are taken")
    try:
        tree = list(_parser.parse(text))
        compiled = re.compile(text)
    except (RecursionError, OverflowError) as error:
        raise re.error("too deeply nested") from error
    if any(_is_nested(node) for node in _walk(tree)):
        raise re.error("a repetition inside a repetition: matching may take for ever")
    wide = sum(_is_repeat(node) and _is_wide(node[1][2]) for node in _walk(tree))
    if wide > WIDE_LIMIT:
        raise re.error(
            f"{wide} wide repetitions such as '.*', at most {WIDE_LIMIT} are taken: matching may "
            "take for ever"
        )
    return compiled


def _walk(nodes: Sequence[_Node]) -> Iterator[_Node]:
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _walk(body)


def _bodies(node: _Node) -> Iterator[list[_Node]]:
    """The sequences inside a node: of a group, a repetition, the branches of an alternative."""
    operation, argument = node
    if operation is sre.BRANCH:
        yield from (list(branch) for branch in argument[1])
    elif isinstance(argument, tuple):
        for part in argument:
            if isinstance(part, _parser.SubPattern):
                yield list(part)


def _is_repeat(node: _Node) -> bool:
    operation, argument = node
    return operation in _REPEATS and argument[1] - argument[0] > _FEW


def _is_nested(node: _Node) -> bool:
    if not _is_repeat(node):
        return False
    body = _opened(list(node[1][2]))
    inner = [n for n in _walk(body) if _is_repeat(n)]
    has_branch = any(n[0] is sre.BRANCH for n in _walk(body))
    if not inner:
        return has_branch and _has_ambiguous_branch(body)
    # One repetition of single characters, and a literal beside it that it cannot match: `(\d+\.)*`.
    only = inner[0]
    single = list(only[1][2])
    if len(inner) > 1 or has_branch or len(single) != 1 or only not in body:
        return True
    literals = [chr(n[1]) for n in body if n[0] is sre.LITERAL]
    return not any(not _matches(single[0], c) for c in literals)


def _has_ambiguous_branch(body: list[_Node]) -> bool:
    """Alternatives of one character each are a class; others may overlap: `(a|aa)*`."""
    for node in _walk(body):
        if node[0] is sre.BRANCH:
            firsts = [list(branch)[:1] for branch in node[1][1]]
            heads = [f[0] for f in firsts if f and f[0][0] is sre.LITERAL]
            if len({h[1] for h in heads}) < len(firsts):
                return True
    return False


def _opened(body: list[_Node]) -> list[_Node]:
    """A body that is one group is that group's."""
    while len(body) == 1 and body[0][0] is sre.SUBPATTERN:
        body = list(body[0][1][3])
    return body


def _is_wide(body: Sequence[_Node]) -> bool:
    """Whether it may match letters, so that neighbours compete for the same text."""
    opened = _opened(list(body))
    return len(opened) != 1 or _matches(opened[0], "a") or _matches(opened[0], "_")


def _matches(node: _Node, character: str) -> bool:
    """Whether a node of one character matches this one; True where that is not known."""
    operation, argument = node
    code = ord(character)
    if operation is sre.LITERAL:
        return bool(argument == code)
    if operation is sre.NOT_LITERAL:
        return bool(argument != code)
    if operation is not sre.IN:
        return True
    negate = argument[0][0] is sre.NEGATE
    inside = any(_is_in(item, code) for item in argument[negate:])
    return inside != negate


def _is_in(item: _Node, code: int) -> bool:
    kind, value = item
    if kind is sre.LITERAL:
        return bool(value == code)
    if kind is sre.RANGE:
        return bool(value[0] <= code <= value[1])
    classes: dict[object, Callable[[str], bool]] = {
        sre.CATEGORY_DIGIT: str.isdigit,
        sre.CATEGORY_SPACE: str.isspace,
        sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
        sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdigit(),
        sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
        sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
    }
    return bool(classes[value](chr(code))) if value in classes else True
