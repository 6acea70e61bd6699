"""`nybble check`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag

if TYPE_CHECKING:
    from nybble.api.check import Rule

_FORMATS = ("text", "json", "sarif", "github", "markdown")
_FOUND = 3


def command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A folder, hf://org/model[@revision], or an http(s) folder."
        ),
    ] = "",
    source: Annotated[
        str,
        typer.Option("--source", metavar="MODEL", help="The checkpoint that it was made of."),
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="NAME[@VERSION]",
            help="vllm, sglang, trtllm, llamacpp or transformers: what this one would do decides.",
        ),
    ] = "",
    tensor_parallel: Annotated[
        int, typer.Option("--tp", metavar="N", min=0, help="Tensor-parallel size to fit.")
    ] = 0,
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="SM", help="GPU to run on: sm80 ... sm121, cpu.")
    ] = "",
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte; else headers, scalars and samples.")
    ] = False,
    select: Annotated[
        list[str] | None,
        typer.Option("--select", metavar="RULES", help="Only these: NB210, NB2, a name, ALL."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="RULES", help="All but these.")
    ] = None,
    explain: Annotated[
        str, typer.Option("--explain", metavar="RULE", help="Say what a rule is about, and stop.")
    ] = "",
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="Set aside the findings in this file."),
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option("--write-baseline", metavar="FILE", help="Keep all findings in this file."),
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option("--lock", metavar="FILE", help="Every file must have the hash it says."),
    ] = None,
    write_lock: Annotated[
        Path | None,
        typer.Option("--write-lock", metavar="FILE", help="Write size and sha256 of every file."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Name every module and tensor of a finding.")
    ] = False,
    json: JsonFlag = False,
    output_format: Annotated[
        str, typer.Option("--output-format", help="text, json, sarif, github or markdown.")
    ] = "text",
) -> None:
    """Find what is wrong with a checkpoint, anybody's: files, scales, configuration, engines.

    nybble check CKPT --engine vllm --source MODEL

    Exit code 0 without errors, 3 with errors, 1 if it cannot be checked.
    """
    from nybble.api import check as api
    from nybble.cli import findings
    from nybble.cli.output import write_json

    if output_format not in _FORMATS:
        raise typer.BadParameter(
            f"{output_format!r}; choose {', '.join(_FORMATS)}", param_hint="--output-format"
        )
    form = "json" if json else output_format
    # The process ends after this, and scanning a million live objects would take a tenth of it.
    gc.disable()
    if explain:
        _explain(api.find_rules([explain]), form)
        return
    if not path:
        raise typer.BadParameter("give a checkpoint", param_hint="PATH")
    for file in (write_baseline, write_lock):
        if file is not None:
            api.refuse_unwritable(file)
    found = api.check(
        path,
        source=source or None,
        engine=engine,
        tensor_parallel=tensor_parallel,
        hardware=hardware,
        deep=deep,
        select=_words(select),
        ignore=_words(ignore),
        baseline=baseline,
        lock=lock,
    )
    if write_baseline is not None:
        api.write_baseline(found, write_baseline)
    if write_lock is not None:
        api.write_lock(path, write_lock)
    if form == "json":
        write_json(found.as_json())
    elif form == "sarif":
        write_json(findings.sarif(found))
    else:
        render = {"text": findings.text, "github": findings.github, "markdown": findings.markdown}
        sys.stdout.write(render[form](found, verbose))
    if found.has_errors:
        raise typer.Exit(_FOUND)


def _words(given: list[str] | None) -> list[str]:
    """Options may be repeated, and lists with commas."""
    return [word.strip() for entry in given or () for word in entry.split(",") if word.strip()]


def _explain(rules: tuple[Rule, ...], form: str) -> None:
    from nybble.api.check import rule_json
    from nybble.cli.findings import explanation
    from nybble.cli.output import write_json

    if form == "json":
        write_json({"schema": "nybble.rules/1", "rules": [rule_json(rule) for rule in rules]})
    else:
        sys.stdout.write("\n".join(explanation(rule) for rule in rules))
