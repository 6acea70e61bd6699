"""`nybble repair`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json

if TYPE_CHECKING:
    from nybble.api.repair import Change, Repaired

_SHOWN = 8
_FOUND = 3


def command(
    path: Annotated[str, typer.Argument(metavar="CKPT", help="A local checkpoint folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    source: Annotated[
        Path | None,
        typer.Option(
            "--source", metavar="MODEL", help="The checkpoint it was made of, to restore from."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="RULES", help="Mend only these: NB210, NB2; notes too."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME[@VERSION]", help="As check has it.")
    ] = "",
    deep: Annotated[bool, typer.Option("--deep", help="Check every byte first.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change; write nothing.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="CKPT is a repaired folder: make the original again.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every change.")] = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Mend what check found, without quantizing again: scales, missing parts, names, configuration.

    nybble repair CKPT OUT --source MODEL --dry-run

    Exit code 0 if the result has no errors, 3 if it has.
    """
    from nybble.api.repair import repair
    from nybble.api.repair import undo as undo_repair
    from nybble.cli.output import write_json
    from nybble.progress import Display

    as_json = wants_json(json, output_format)
    if undo:
        with Display() as progress:
            not_kept = undo_repair(path, out, progress=progress)
        sys.stdout.write(f"undone       {out}: the tensors and files from before the repair\n")
        for name in not_kept:
            sys.stdout.write(f"not kept     {name}: only the folder that was repaired has it\n")
        return
    words = [w.strip() for entry in only or () for w in entry.split(",") if w.strip()]
    with Display() as progress:
        done = repair(
            path,
            out,
            source=source,
            only=words,
            engine=engine,
            deep=deep,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        write_json(done.as_json())
    else:
        sys.stdout.write(render(done, dry_run, verbose))
    if done.has_errors:
        raise typer.Exit(_FOUND)


def render(done: Repaired, dry_run: bool, verbose: bool = False) -> str:
    """The changes, what is left, and the verdict of check."""
    from nybble.cli.inspect import printable

    lines = _changes(done.changes, verbose)
    for rule, severity, message, reason in done.unmended:
        lines.append(f"left         {rule} {severity}: {message} ({reason})")
    lines += [
        f"not kept     {name}: left out; --undo cannot bring it back" for name in done.not_kept
    ]
    if not done.changes:
        lines.append("repaired     nothing: no finding that can be mended; nothing is written")
    elif dry_run:
        lines.append(f"dry run      {len(done.changes):,} changes; nothing is written")
    else:
        lines.append(
            f"repaired     {done.out}: {len(done.changes):,} changes, everything else byte for "
            "byte; nybble_repair/ has the manifest and the way back (--undo)"
        )
    if done.after is not None:
        from nybble.cli.findings import text

        lines += ["", text(done.after).rstrip("\n")]
    return printable("\n".join(lines)) + "\n"


def _changes(changes: list[Change], verbose: bool) -> list[str]:
    """Changes of one rule, action and kind of name together, numbers generalised."""
    from nybble.families.family import normalise

    if verbose:
        return [_line(c) for c in changes]
    kinds: dict[tuple[str, str, str, str], list[Change]] = {}
    for c in changes:
        kinds.setdefault((c.rule, c.what, c.action, normalise(c.name)), []).append(c)
    lines = []
    for (rule, what, action, pattern), members in kinds.items():
        if len(members) == 1:
            lines.append(_line(members[0]))
        else:
            first = members[0]
            lines.append(
                f"{rule}  {what} {action}: {len(members):,} x {pattern}; the first: {first.words}"
            )
    return lines


def _line(change: Change) -> str:
    name = f"{change.old_name} -> {change.name}" if change.old_name else change.name
    return f"{change.rule}  {change.what} {change.action}: {name}: {change.words}"
