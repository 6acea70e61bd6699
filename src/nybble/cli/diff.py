"""`nybble diff`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json

if TYPE_CHECKING:
    from nybble.api.diff import Difference, ModuleValues, Template

_SHOWN = 10
_DIFFERENT = 3


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A local checkpoint folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, or another revision.")],
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Compare every byte; else tensors up to 1 MiB, 1 GiB of them, and samples.",
        ),
    ] = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Show what differs between two checkpoints: tensors, values, configuration, chat template.

    Exit code 0 if nothing differs in what was compared, 3 if something does, 1 for an error.
    """
    from nybble.api.diff import diff
    from nybble.cli.output import write_json
    from nybble.progress import Display

    as_json = wants_json(json, output_format)
    with Display() as progress:
        found = diff(a, b, deep, progress=progress)
    if as_json:
        write_json(found.as_json())
    else:
        sys.stdout.write(render(found))
    if not found.is_equal:
        raise typer.Exit(_DIFFERENT)


def render(found: Difference) -> str:
    """The difference as text."""
    from nybble.cli.inspect import printable

    lines = [f"A            {found.a}: {found.tensors_a:,} tensors"]
    lines.append(f"B            {found.b}: {found.tensors_b:,} tensors")
    lines += _grouped("only in A", found.only_in_a)
    lines += _grouped("only in B", found.only_in_b)
    lines += _grouped("dtype, shape", [(r.name, f"{r.a} -> {r.b}") for r in found.retyped])
    lines += _values(found)
    lines += _modules(found.modules)
    lines += _files(found)
    lines += _template(found.template)
    if found.renamed:
        one, other = found.renamed[0]
        lines.append(
            f"renamed      {len(found.renamed):,} tensors of quantized modules have another name "
            f"in B, {one} -> {other.rpartition('.')[2]} for one; that counts as equal"
        )
    if found.is_rearranged:
        lines.append(
            "arranged     the same tensors lie in other files or another order; that counts as "
            "equal"
        )
    if found.respelled:
        lines.append(
            f"spelling     {', '.join(found.respelled)}: other bytes, the same JSON; that counts "
            "as equal"
        )
    lines.append(_compared(found))
    return printable("\n".join(lines)) + "\n"


def _values(found: Difference) -> list[str]:
    rows = []
    for v in found.values:
        count = v.elements
        rows.append((v.name, f"{count.different:,} of {count.compared:,} compared elements differ"))
    return _grouped("values", rows, merge=False)


def _modules(modules: Sequence[ModuleValues]) -> list[str]:
    """One line per role and format, then the modules that differ most."""
    groups: dict[tuple[str, str], list[ModuleValues]] = {}
    for m in modules:
        groups.setdefault((m.role or "-", m.held), []).append(m)
    lines = []
    for (role, held), members in groups.items():
        ratios = [m.tensor_scale_ratio for m in members if m.tensor_scale_ratio is not None]
        parts = [_share("codes", [m.codes for m in members])]
        parts.append(_share("scales", [m.scales for m in members if m.scales]))
        if ratios:
            low, high = min(ratios), max(ratios)
            spread = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
            parts.append(f"tensor scale x {spread}")
        inputs = [m.input_scale_ratio for m in members if m.input_scale_ratio not in (None, 1.0)]
        if inputs:
            parts.append(f"{len(inputs):,} input scales differ")
        text = "; ".join(filter(None, parts))
        lines.append(f"quantized    {role} {held}: {len(members):,} modules differ; {text}")
    worst = sorted(modules, key=lambda m: -m.codes.different / max(m.codes.compared, 1))
    for m in worst[: _SHOWN // 2] if len(modules) > 1 else modules:
        ratio = "" if m.tensor_scale_ratio is None else f", scale x {m.tensor_scale_ratio:.6g}"
        share = m.codes.different / max(m.codes.compared, 1)
        lines.append(f"             {m.name}: {share:.2%} of the codes{ratio}")
    return lines


def _share(what: str, counts: Sequence[object]) -> str:
    from nybble.api.diff import Count

    known = [c for c in counts if isinstance(c, Count)]
    if not known:
        return ""
    different, compared = sum(c.different for c in known), sum(c.compared for c in known)
    return f"{different:,} of {compared:,} compared {what} ({different / max(compared, 1):.2%})"


def _files(found: Difference) -> list[str]:
    lines = [
        f"{s.file[:60]}: {s.path}: {s.a or '(absent)'} -> {s.b or '(absent)'}"
        for s in found.settings
    ]
    by_file: dict[str, list[str]] = {}
    for setting, line in zip(found.settings, lines, strict=True):
        by_file.setdefault(setting.file, []).append(line)
    shown = [line for entries in by_file.values() for line in _some(entries)]
    if found.hidden_settings:
        shown.append(f"and {found.hidden_settings:,} places more, beyond the first 100 of a file")
    labelled = [f"setting      {line}" for line in shown]
    for label, names in (
        ("file only A", found.files_only_in_a),
        ("file only B", found.files_only_in_b),
        ("file differs", found.files),
    ):
        labelled += [f"{label:<13}{name}" for name in _some(names)]
    return labelled


def _template(template: Template | None) -> list[str]:
    if template is None:
        return []
    where = [", ".join(places) or "none" for places in (template.a, template.b)]
    if not template.excerpt:
        return [f"template     the same text, in {where[0]} -> {where[1]}"]
    lines = [f"template     {where[0]} -> {where[1]}, {template.lines} lines of difference"]
    lines += [f"    {line}" for line in template.excerpt]
    if template.lines > len(template.excerpt):
        lines.append("    ...")
    return lines


def _compared(found: Difference) -> str:
    from nybble.cli.output import gib

    text = (
        f"{found.compared_whole:,} tensors whole, {found.sampled:,} by samples, "
        f"{gib(found.compared_bytes)} GiB read of each"
    )
    if found.sampled:
        text += "; --deep compares every byte"
    verdict = "nothing differs: " if found.is_equal else ""
    return f"compared     {verdict}{text}"


def _grouped(label: str, entries: Iterable[str | tuple[str, str]], merge: bool = True) -> list[str]:
    """One line per kind of name, numbers generalised; with `merge` entries count as one kind."""
    from nybble.families.family import normalise

    kinds: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        name, text = entry if isinstance(entry, tuple) else (entry, "")
        kinds.setdefault((normalise(name) if merge else name, text), []).append(name)
    lines = []
    for (pattern, text), names in kinds.items():
        what = names[0] if len(names) == 1 else f"{len(names):,} x {pattern}"
        lines.append(f"{label:<13}{what}" + (f": {text}" if text else ""))
    return _some(lines, f"{label:<13}")


def _some(lines: Sequence[str], indent: str = "") -> list[str]:
    if len(lines) <= _SHOWN:
        return list(lines)
    return [*lines[:_SHOWN], f"{indent}and {len(lines) - _SHOWN:,} more; --json names them all"]
