"""What the commands share in their output: tables, units, JSON."""

from __future__ import annotations

import json as json_module
import math
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Short for --output-format json.")]
OutputFormat = Annotated[str, typer.Option("--output-format", help="text or json.")]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def wants_json(json: bool, output_format: str) -> bool:
    """Whether JSON was asked for, in either spelling."""
    if output_format not in ("text", "json"):
        raise typer.BadParameter(
            f"{output_format!r}; choose text or json", param_hint="--output-format"
        )
    return json or output_format == "json"


def write_json(document: Mapping[str, object]) -> None:
    """One JSON document on stdout. JSON has no infinity: such values become null."""
    sys.stdout.write(json_module.dumps(_finite(document), indent=2) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns of text, two spaces apart; those in `right` are right-aligned. As wide as its
    content, never cut."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * w for w in widths], *rows]:
        cells = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def labelled(label: str, text: str) -> str:
    """A label and its text, wrapped to 100 columns with the text aligned."""
    return textwrap.fill(
        text,
        100,
        initial_indent=f"{label:<13}",
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )


def gib(n: int) -> str:
    """Bytes in GiB, with as many digits as small numbers need."""
    value = n / 2**30
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def amount(n: int) -> str:
    """Bytes with their unit: 1.88 GiB, 5.86 MiB, 412 B."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


def billions(n: int) -> str:
    """A count of parameters: 35.95B, 134.5M, 4,096."""
    if n >= 10**9:
        return f"{n / 1e9:.2f}B"
    if n >= 10**6:
        return f"{n / 1e6:.1f}M"
    return f"{n:,}"


def parse_bytes(text: str) -> int:
    """Decimal sizes: "5GB", "500 MB", "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise typer.BadParameter(
            f"{text!r} is no size; write 500MB or 5GB", param_hint="--shard-size"
        )
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise typer.BadParameter("a shard needs at least one byte", param_hint="--shard-size")
    return size
