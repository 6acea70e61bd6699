"""The text of a conversation, by the chat template that comes with a model.

The template is chat_template.jinja, or else `chat_template` of tokenizer_config.json (a text, or a
list in which the one named "default" counts). It runs in a sandbox (sandbox.py), with what
transformers' apply_chat_template gives it.

Knows what a message may be made of, not what one means: roles, tools and reasoning are the
template's. Knows no token ids.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import MissingExtra, TextError
from nybble.text.folder import kind, read_bytes, read_object, token_text

if TYPE_CHECKING:
    import jinja2
    import jinja2.nodes

# The longest published templates are below 100 kB.
MAX_TEMPLATE_BYTES = 1000 * 1000

# Before it, templates could leave jinja2's sandbox (CVE-2025-27516).
_JINJA2 = (3, 1, 6)

_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TemplateError(TextError):
    """A template that refuses a conversation, or fails at it. `reason` is the message without where
    the template lies, for those who do not have the files."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, eq=False)
class ChatTemplate:
    """A chat template, compiled. `origin` says where it was found, `tokens` are the special tokens
    it may write: bos_token, eos_token and others, as far as tokenizer_config.json names them."""

    origin: str
    source: str
    tokens: Mapping[str, str]
    _compiled: jinja2.Template

    @classmethod
    def open(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model's folder, or None if it has none.

        Raises TextError for a template that cannot be read or compiled, MissingExtra without
        jinja2.
        """
        path = folder / "tokenizer_config.json"
        config = read_object(path)
        found = _find(folder, path, config)
        if found is None:
            return None
        return cls.compile(*found, path, config)

    @classmethod
    def compile(
        cls, origin: str, source: str, path: Path, config: Mapping[str, object]
    ) -> ChatTemplate:
        """A template by its source; `config` is the content of tokenizer_config.json, `path`."""
        named = {f"{name}_token": token_text(path, config, f"{name}_token") for name in _TOKENS}
        tokens = {name: token for name, token in named.items() if token is not None}
        return cls(origin, source, tokens, _compile(origin, source))

    def variables(self) -> frozenset[str]:
        """The names that the template looks up and does not set itself; `messages` is one of them,
        and switches such as enable_thinking are, also where the template sets one that is not
        given. What only its macros and loops have is not."""
        from jinja2 import meta, nodes

        tree = self._compiled.environment.parse(self.source)
        inner = {
            name.name
            for scope in tree.find_all((nodes.For, nodes.Macro))
            for name in scope.find_all(nodes.Name)
            if name.ctx in ("store", "param")
        }
        # jinja2 lists these too where they are set in one branch and read behind it.
        return frozenset(meta.find_undeclared_variables(tree) - (inner - set(_outer(tree))))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        time_limit_s: float | None = None,
        **variables: object,
    ) -> str:
        """The prompt for these messages, ending where the model's answer begins.

        Messages, `tools` (JSON schemas) and `variables` (such as enable_thinking) are JSON values,
        and are copied: the template changes none of them. Raises TextError for other values, for
        what the template refuses, and for a template that fails or does not end.
        """
        from nybble.text import sandbox

        try:
            given: dict[str, object] = {
                "documents": None,
                **self.tokens,
                **{name: _plain(name, value) for name, value in variables.items()},
                "messages": [_plain(f"messages[{i}]", m) for i, m in enumerate(messages)],
                "tools": None
                if tools is None
                else [_plain(f"tools[{i}]", tool) for i, tool in enumerate(tools)],
                "add_generation_prompt": add_generation_prompt,
            }
            return sandbox.render(self._compiled, given, time_limit_s)
        except TextError:
            raise
        except sandbox.Refused as error:
            reason = f"the chat template refuses this conversation: {error}"
            raise TemplateError(f"{self.origin}: {reason}", reason) from error
        except Exception as error:  # a template is a program, and may fail in any way
            reason = f"the chat template failed: {_cause(error)}"
            raise TemplateError(_failure(self.origin, error), reason) from error


def _outer(node: jinja2.nodes.Node) -> Iterator[str]:
    """The names in a template outside of its loops and macros."""
    from jinja2 import nodes

    for child in node.iter_child_nodes():
        if isinstance(child, nodes.For):
            child = child.iter
        if isinstance(child, nodes.Macro):
            continue
        if isinstance(child, nodes.Name):
            yield child.name
        yield from _outer(child)


def _find(folder: Path, path: Path, config: dict[str, object]) -> tuple[str, str] | None:
    own = folder / "chat_template.jinja"
    data = read_bytes(own, MAX_TEMPLATE_BYTES)
    if data is not None:
        try:
            return str(own), data.decode()
        except UnicodeDecodeError as error:
            raise TextError(f"{own}: is not UTF-8 at byte {error.start}; fetch it again") from error
    configured = configured_template(path, config)
    return None if configured is None else (f"{path}: chat_template", configured)


def configured_template(path: Path, config: Mapping[str, object]) -> str | None:
    """The chat template that tokenizer_config.json, `path`, holds, or None. Raises TextError."""
    value = config.get("chat_template")
    if isinstance(value, list):
        value = _default(path, value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise TextError(f"{path}: chat_template: expected a string or a list, found {kind(value)}")
    if len(value) > MAX_TEMPLATE_BYTES:
        raise TextError(
            f"{path}: chat_template: expected at most {MAX_TEMPLATE_BYTES:,} characters, found "
            f"{len(value):,}"
        )
    return value


def _default(path: Path, entries: list[object]) -> object:
    templates: dict[str, object] = {}
    for i, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(name, str):
            raise TextError(
                f"{path}: chat_template[{i}]: expected an object with name and template, found "
                f"{kind(entry)}"
            )
        templates[name] = entry.get("template")
    if not isinstance(templates.get("default"), str):
        raise TextError(
            f'{path}: chat_template: expected one with the name "default", found '
            f"{', '.join(sorted(templates)) or 'an empty list'}; put the one to use into "
            "chat_template.jinja"
        )
    return templates["default"]


def _compile(origin: str, source: str) -> jinja2.Template:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra(
            f"{origin}: a chat template needs the library jinja2: pip install 'nybble[torch]'"
        ) from error
    from nybble.text import sandbox

    numbers = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if numbers < _JINJA2:
        raise MissingExtra(
            f"{origin}: a chat template needs jinja2 3.1.6 or later, as those before let templates "
            f"out of the sandbox; found {jinja2.__version__}: pip install -U 'jinja2>=3.1.6' "
            "(it is of the extra nybble[torch])"
        )
    try:
        return sandbox.compile_template(source, origin)
    except Exception as error:
        raise TextError(_failure(origin, error)) from error


def _failure(origin: str, error: Exception) -> str:
    """What went wrong in a template, and in which of its lines, as far as jinja2 knows it."""
    line = getattr(error, "lineno", None)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == origin:
            line = frame.lineno
    where = f"{origin}, line {line}" if line else origin
    return (
        f"{where}: the chat template failed: {_cause(error)}; look at that line, or pass the "
        "prompt as text without a template"
    )


def _cause(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error)  # jinja2's str() has lines of its own
    return f"{type(error).__name__}: {text}"


def _plain(where: str, value: object) -> object:
    """A copy of a JSON value that holds nothing else: methods of other objects are not for
    templates."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise TextError(f"{where}: expected strings as keys, found {key!r}")
        return {key: _plain(f"{where}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{where}[{i}]", item) for i, item in enumerate(value)]
    raise TextError(
        f"{where}: expected what JSON can hold, found a {type(value).__module__}."
        f"{type(value).__qualname__}"
    )
