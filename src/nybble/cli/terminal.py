"""What a model says, on a terminal: dimmed where asked for, and never able to steer it."""

from __future__ import annotations

import os
from typing import TextIO

#: Begin and end of dimmed text.
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
#: A speed of fewer tokens says nothing.
LEAST_TIMED = 8

# A model may write escape sequences, which move the cursor, set titles or answer for the user.
_PICTURES = {
    **{i: 0x2400 + i for i in range(32) if i not in (9, 10)},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}


def has_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal that may be coloured (https://no-color.org)."""
    dumb = os.environ.get("TERM") == "dumb"
    return stream.isatty() and not os.environ.get("NO_COLOR") and not dumb


def shown(text: str, stream: TextIO) -> str:
    """A model's text for a stream: as it is for files and pipes, for a terminal with pictures in
    the place of control characters."""
    return text.translate(_PICTURES) if stream.isatty() else text
