"""The environment in which a chat template runs: jinja2's sandbox, as transformers sets it up, with
a bound on the work and on the size of values.

A template is a program that somebody published. It sees only what it is given, changes none of it,
and ends: loops, calls and filters are counted, and texts, lists and numbers have a largest size.
That stops the mistakes and the obvious attacks; it is no limit on memory to the byte.

Imports jinja2: import this module inside a function, where the extra `torch` is known to be there.
Knows neither files nor what a conversation is.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from math import inf
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum

# A template that looks at every message once for every message takes 4 million steps at 2,000.
MAX_STEPS = 10_000_000
# Of the prompt and of any text or list on the way: a million tokens are about 4 million characters.
MAX_LENGTH = 1 << 24
# Of a whole number, in bits: squaring in a loop doubles them each time.
MAX_INTEGER_BITS = 4096

# Of what jinja2's and Python's own loops take time for that grows with the square of the text.
MAX_SQUARED = 1 << 16
# Of the arguments that say how many pieces or how much space to make of anything.
MAX_PIECES = 100_000

# Of a list or object that becomes text, with all that is in it.
MAX_ENTRIES = 1_000_000

# Steps left, and the time.monotonic() at which rendering ends.
_steps: ContextVar[tuple[list[int], float]] = ContextVar("steps of this rendering")
# A width in a format string. Nothing in a prompt is padded to six digits of columns.
_WIDE_FORMAT = re.compile(r"\d{6,}|\*")
# The filters that make a text as long as they are told.
_GROWING = frozenset(("center", "format", "indent", "replace"))
_SQUARED = frozenset(("wordwrap", "urlize"))
_PIECES = frozenset(("batch", "slice", "tojson"))
_PRINTING = frozenset(("string", "tojson", "pprint", "format", "urlencode", "xmlattr"))
# Spaces keep these names out of a template's reach.
_COUNTED, _BOUNDED, _JOINED = "counted iterations", "bounded value", "joined values"


def compile_template(source: str, name: str) -> Template:
    """Compile a template's source; `name` is its file in tracebacks. Raises jinja2's errors."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_printable,
    )
    environment.filters["tojson"] = _tojson
    for key, function in environment.filters.items():
        environment.filters[key] = _guarded(key, function)
    environment.filters.update({_COUNTED: _counted, _BOUNDED: _bounded, _JOINED: _joined})
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_dict,
        lipsum=_lipsum,
        namespace=_Namespace,
    )
    tree = environment.parse(source, filename=name)
    _count_and_bound(tree)
    code = environment.compile(tree, name, name)
    return Template.from_code(environment, code, environment.make_globals(None))


def render(
    template: Template, variables: dict[str, object], time_limit_s: float | None = None
) -> str:
    """The output of a template, under the limits of this module and, at the next step after it, of
    time. Raises whatever the template raises."""
    end = inf if time_limit_s is None else time.monotonic() + time_limit_s
    token = _steps.set(([MAX_STEPS], end))
    try:
        pieces, length = [], 0
        for piece in template.generate(variables):
            length += len(piece)
            _check_length(length, "the prompt")
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _steps.reset(token)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _step()
        # jinja2 wraps format and format_map of a text.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(obj, LoopContext) and args:  # loop(children), of a recursive loop
            args = (_iterate(args[0]), *args[1:])
        elif isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            _check_method(owner, name, args)
            if name == "join" and args:
                args = (_check_join(owner, args[0]), *args[1:])
        return _bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        # jinja2 answers with an undefined value, which `if` takes for false without a word.
        if attribute.startswith("_"):
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is forbidden")
        return super().unsafe_undefined(obj, attribute)


class _Generation(Extension):
    """`{% generation %}`, which marks what a model wrote for those who train; here only a scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    def __repr__(self) -> str:  # jinja2's shows all that it holds
        return "<Namespace>"

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: the name begins with '_'")
        super().__setitem__(name, value)


# ------------------------------------------------------------------------------------------- limits


def _count_and_bound(tree: nodes.Template) -> None:
    """Make every loop count, and every way to build a text by naming it twice look at its size."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _filtered(loop.iter, _COUNTED)
    for concat in list(tree.find_all(nodes.Concat)):
        parts = nodes.List(concat.nodes, lineno=concat.lineno)
        concat.nodes = [_filtered(parts, _JOINED)]
    for block in list(tree.find_all(nodes.AssignBlock)):
        block.filter = _filtered(block.filter, _BOUNDED, block.lineno)


def _filtered(node: nodes.Node | None, name: str, line: int = 0) -> nodes.Filter:
    line = line if node is None else node.lineno
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


def _step() -> None:
    left, end = _steps.get()
    left[0] -= 1
    if left[0] < 0:
        raise TemplateRuntimeError(
            f"it took more than {MAX_STEPS:,} steps of loops and calls, and may be endless"
        )
    if end < inf and time.monotonic() > end:
        raise TemplateRuntimeError("it took longer than it was given, and may be endless")


def _iterate(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        _step()
        yield value


# With the context as argument, jinja2 cannot evaluate it while it compiles.
@pass_context
def _counted(_context: Context, values: Iterable[object]) -> Iterator[object]:
    return _iterate(values)


@pass_context
def _joined(_context: Context, values: list[object]) -> str:
    texts = [str(_printable(value)) for value in values]
    _check_length(sum(map(len, texts)), "a text")
    return "".join(texts)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's, with its step counted and what it makes bounded."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _step()
        given = (*args[first + 1 :], *kwargs.values())
        if len(args) > first:
            args = (*args[:first], _countable(name, args[first], given), *args[first + 1 :])
        return _bounded(function(*args, **kwargs))

    return guarded


def _countable(name: str, value: object, given: tuple[object, ...]) -> object:
    """What a filter is applied to: within bounds, and counted where it is looked through."""
    if name in _PRINTING:
        _printable([value, *given])
    if name in _GROWING:
        _check_method(str(_printable(value)), name, given)
    elif name == "sum" and any(isinstance(x, (list, tuple)) for x in given):
        raise TemplateRuntimeError("sum is for numbers")
    elif name in _SQUARED and len(str(value)) > MAX_SQUARED:
        raise TemplateRuntimeError(f"{name} is for at most {MAX_SQUARED:,} characters")
    elif name in _PIECES and any(isinstance(x, int) and x > MAX_PIECES for x in given):
        raise TemplateRuntimeError(f"{name} is for at most {MAX_PIECES:,} pieces")
    elif name == "join" and not isinstance(value, str):
        value = _check_join(given[0] if given else "", value)
    return _iterate(value) if isinstance(value, Iterator) else value


def _check_join(separator: object, values: object) -> object:
    """The values, as a list if they can be looked through, that joining makes no text too long."""
    if not isinstance(values, Iterable):
        return values
    found = list(_iterate(values)) if isinstance(values, Iterator) else list(values)
    texts = sum(len(x) if isinstance(x, str) else 1 for x in found)
    _printable(found)
    _check_length(texts + len(str(separator)) * len(found), "a text")
    return found


def _printable(value: object) -> object:
    """The value, if its text is within bounds: a list may hold one text, or one list, many times
    over."""
    if not isinstance(value, (list, tuple, dict)):
        return value
    length, entries, rest = 0, 0, [value]
    while rest:
        one = rest.pop()
        inner = [*one, *one.values()] if isinstance(one, dict) else one
        entries += len(inner)
        length += sum(len(x) for x in inner if isinstance(x, str))
        _check_length(length + entries, "the text of a value")
        rest += [x for x in inner if isinstance(x, (list, tuple, dict))]
        if entries > MAX_ENTRIES or len(rest) > MAX_ENTRIES:
            raise TemplateRuntimeError(f"a value has more than {MAX_ENTRIES:,} entries to print")
    return value


def _bounded(value: object) -> object:
    if isinstance(value, (str, list, tuple)):
        _check_length(len(value), "a value")
    return value


def _check_length(length: int, what: str) -> None:
    if length > MAX_LENGTH:
        raise TemplateRuntimeError(
            f"{what} would be more than {MAX_LENGTH:,} characters or entries long"
        )


def _check_operands(operator: str, left: object, right: object) -> None:
    long = [len(x) for x in (left, right) if isinstance(x, (str, list, tuple))]
    whole = [x for x in (left, right) if isinstance(x, int)]
    if operator == "%" and isinstance(left, str):
        _check_format(left)
        _printable([right])
    elif operator == "+" and long:
        _check_length(sum(long), "a sum")
    elif operator == "*" and long and whole:
        _check_length(long[0] * whole[0], "a product")
    elif operator != "+" and len(whole) == 2:
        bits = whole[0].bit_length() * (abs(whole[1]) if operator == "**" else 1)
        if operator in ("*", "**") and max(bits, whole[1].bit_length()) > MAX_INTEGER_BITS:
            raise TemplateRuntimeError(f"a number would have more than {MAX_INTEGER_BITS:,} bits")


def _check_method(text: str, name: str, args: tuple[object, ...]) -> None:
    """Bound what a method of a text may make: ljust(width), replace(old, new), format()."""
    for value in args:
        if isinstance(value, int):
            _check_length(value, "a text")
    if name.startswith("format"):
        _check_format(text)
        _printable(list(args))
    elif name == "translate":
        raise TemplateRuntimeError("translate is not for templates")
    elif name == "expandtabs":
        width = args[0] if args and isinstance(args[0], int) else 8
        _check_length(len(text) + text.count("\t") * width, "a text")
    elif name == "indent":
        width = max((x if isinstance(x, int) else len(str(x)) for x in args), default=4)
        _check_length(len(text) + (text.count("\n") + 1) * width, "a text")
    elif name == "replace" and len(args) > 1 and isinstance(args[1], str):
        found = text.count(args[0]) if isinstance(args[0], str) else 0
        _check_length(len(text) + found * len(args[1]), "a text")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateRuntimeError(f"the format {text[:40]!r} asks for a very wide field")


# --------------------------------------------------------------------- what templates may call


class Refused(Exception):
    """The template itself says that it cannot render this conversation."""


def _raise_exception(message: object) -> None:
    raise Refused(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, >, & and ' for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    if n > 100 or max > 1000:
        raise TemplateRuntimeError("lipsum is for at most 100 paragraphs of 1,000 words")
    return generate_lorem_ipsum(n, html, min, max)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function in place of the type: the type's own methods are not for templates.
    return dict(*args, **kwargs)
