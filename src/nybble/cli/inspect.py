"""`nybble inspect`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json

if TYPE_CHECKING:
    from nybble.api.inspect import Inspection, Part
    from nybble.check.contents import Module

_SHOWN = 10
_AGREES = {True: "yes", False: "NO", None: "?"}


def command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A local checkpoint folder; headers without data will do."
        ),
    ],
    modules: Annotated[
        str | None,
        typer.Option(
            "--modules", metavar="GLOB", help="List the modules whose path matches, with tensors."
        ),
    ] = None,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Show what a checkpoint declares, what it holds, and whether the two agree. Headers only."""
    from nybble.api.inspect import inspect
    from nybble.cli.output import write_json

    as_json = wants_json(json, output_format)
    found = inspect(path)
    chosen = None if modules is None else list(found.contents.matching(modules))
    if as_json:
        document = found.as_json()
        if chosen is not None:
            document["modules"] = [m.as_json() for m in chosen]
        write_json(document)
    elif chosen is not None:
        sys.stdout.write(render_modules(chosen, len(found.contents.modules)))
    else:
        sys.stdout.write(render(found))


def render(found: Inspection) -> str:
    """The inspection as text."""
    from nybble.cli.output import billions, gib, table

    said = found.declaration
    rows = [
        [
            row.role or "-",
            f"{row.modules:,}",
            billions(row.parameters),
            gib(row.nbytes),
            f"{row.bits_per_weight:.3f}" if row.parameters else "",
            str(row.declared or "-"),
            row.held,
            _AGREES[row.agrees],
        ]
        for row in found.rows
    ]
    head = "role modules parameters GiB bits/weight".split()
    layout = said.layout or "not quantized"
    lines = [
        f"{found.path}: {found.model_type or 'no model_type'}, {layout}"
        + (f", written by {said.producer}" if said.producer else ""),
        table([*head, "config says", "file holds", "agree"], rows, right=(1, 2, 3, 4)),
        f"total        {found.tensors:,} tensors, {found.payload_bytes:,} bytes "
        f"({gib(found.payload_bytes)} GiB); {found.file_bytes:,} bytes with headers, in "
        f"{found.files} file{'s' * (found.files != 1)}",
        f"parameters   {found.parameters:,} ({billions(found.parameters)}), "
        f"{found.bits_per_parameter:.3f} bits each",
        f"hub sidebar  {_hub(found)}",
        f"KV cache     {_kv_cache(found)}",
        f"MTP head     {_part(found.mtp)}",
        f"vision       {_part(found.vision)}",
    ]
    if found.residual_scales:
        lines.append(
            f"input scale  {found.residual_scales:,} residual scalars ({found.residual_bytes:,} "
            "bytes) in modules whose declaration reads none; not a fault. nybble leaves them out "
            f"and would write {found.bytes_without_residual:,} bytes"
        )
    lines += _mismatches(found.mismatches)
    lines += [f"configs      {line}" for line in said.disagreements]
    lines += [f"note         {line}" for line in found.notes]
    return printable("\n".join(lines)) + "\n"


def printable(text: str) -> str:
    """Text with control characters escaped: what a checkpoint says reaches no terminal raw."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def render_modules(modules: Iterable[Module], total: int) -> str:
    """Modules one by one, with their tensors."""
    from nybble.api.inspect import held

    lines = []
    for m in modules:
        says = f"config says {m.declared}" if m.declared else "not declared"
        agrees = {True: "agree", False: "DISAGREE", None: "cannot tell"}[m.kind.agrees]
        lines.append(f"{m.name}  {m.role or '-'}: {says}, file holds {held(m)}: {agrees}")
        lines += [
            f"    {t.name[len(m.name) :].lstrip('.')}  {t.dtype} {list(t.shape)}  "
            f"{t.nbytes:,} bytes in {t.file}"
            for t in m.tensors
        ]
    lines = lines or [f"none of {total:,} modules matches; * stands for any text, dots too"]
    return "\n".join(lines) + "\n"


def _hub(found: Inspection) -> str:
    counted = f"{found.stored_parameters:,} stored elements, without scales and MTP head"
    if found.index_parameters is None:
        return f"{counted}; the index says nothing of it"
    if found.index_parameters == found.stored_parameters:
        return f"{counted}; the index says the same"
    return f"{counted}; the index says {found.index_parameters:,}"


def _kv_cache(found: Inspection) -> str:
    declared = found.declaration.kv_cache
    scales = len(found.contents.kv_scales)
    held = f"{scales:,} scale tensors" if scales else "no scale tensors"
    return f"{declared} declared, {held}" if declared else f"nothing declared, {held}"


def _part(part: Part | None) -> str:
    from nybble.cli.output import gib

    if part is None:
        return "none"
    return f"{part.tensors:,} tensors in {', '.join(part.dtypes)}, {gib(part.nbytes)} GiB"


def _mismatches(modules: tuple[Module, ...]) -> list[str]:
    from nybble.api.inspect import held

    lines = []
    for m in modules[:_SHOWN]:
        says = m.declared or "nothing: unquantized"
        lines.append(f"disagree     {m.name}: config says {says}, file holds {held(m)}")
    if len(modules) > _SHOWN:
        rest = len(modules) - _SHOWN
        lines.append(f"disagree     and {rest:,} modules more; --json names them all")
    return lines
