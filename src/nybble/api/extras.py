"""Which libraries a command needs beyond the core, asked before anything is done."""

from __future__ import annotations

from importlib.util import find_spec

from nybble.errors import MissingExtra


def needs_torch(command: str, otherwise: str = "") -> None:
    """Raise MissingExtra, naming the extra and, where there is one, the way without."""
    for library in ("torch", "tokenizers", "jinja2"):
        if find_spec(library) is None:
            raise MissingExtra(
                f"{command} runs the model, which needs {library}: "
                f"pip install 'nybble[torch]'{otherwise}"
            )
