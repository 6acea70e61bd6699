"""`nybble quantize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json
from nybble.cli.plan import Generic, LayoutName, Model, RecipeName

if TYPE_CHECKING:
    from nybble.api.quantize import Result


def command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    recipe: RecipeName = "nvfp4",
    layout: LayoutName = "modelopt",
    search: Annotated[
        str, typer.Option("--search", help="Block scales: absmax, four-six or mse (exact).")
    ] = "mse",
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Threads; default: all processors.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Payload of a shard, decimal: 500MB, 5GB.")
    ] = "10GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run; same bytes in the end.")
    ] = False,
    generic: Generic = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Quantize a checkpoint folder without calibration data, and verify what was written."""
    from nybble.api.quantize import quantize
    from nybble.cli.output import parse_bytes, write_json
    from nybble.formats.search import SEARCHES
    from nybble.progress import Display

    if search not in SEARCHES:
        raise typer.BadParameter(
            f"{search!r}; choose one of {', '.join(SEARCHES)}", param_hint="--search"
        )
    with Display() as progress:
        result = quantize(
            model,
            out,
            recipe,
            layout=layout,
            search=search,
            jobs=jobs,
            shard_size=parse_bytes(shard_size),
            dry_run=dry_run,
            resume=resume,
            generic=generic,
            progress=progress,
        )
    if wants_json(json, output_format):
        write_json(result.as_json())
    else:
        sys.stdout.write(render(result))


def render(result: Result) -> str:
    """Before and after, and what the audit found."""
    from nybble.cli.output import gib, table
    from nybble.cli.plan import render as render_plan

    text = render_plan(result.plan, result.plan)
    checked = result.audit
    if checked is None:
        return text + f"dry run      nothing written to {result.out}\n"
    source = sum(row.source_bytes for row in result.plan.rows)
    rows = [
        [
            e.role,
            e.scheme,
            f"{e.modules:,}",
            f"{e.sqnr_db:.2f}",
            f"{e.worst_db:.2f}",
            e.worst_module,
        ]
        for e in checked.errors
    ]
    copied = ", ".join(f"{role} {n:,}" for role, n in sorted(checked.copied_by_role.items()))
    return text + "\n".join(
        [
            "",
            f"{result.out}: written and opened again",
            table(
                ["role", "scheme", "modules", "SQNR dB", "worst", "in module"],
                rows,
                right=(2, 3, 4),
            ),
            f"verified     {checked.tensors:,} tensors, {checked.payload_bytes:,} bytes as "
            f"planned; scales finite and positive; {checked.sqnr_db:.2f} dB over all quantized "
            f"weights ({result.search})",
            f"identical    {checked.copied:,} copied tensors byte for byte: {copied}",
            f"size         {gib(source)} GiB -> {gib(checked.payload_bytes)} GiB",
            f"time         {result.seconds:.1f} s to quantize "
            f"({source / max(result.seconds, 1e-9) / 1e9:.2f} GB/s of source), "
            f"{result.audit_seconds:.1f} s to verify, {result.cpu_seconds:.1f} CPU s; "
            f"{result.kernels}, {result.threads} threads",
            "",
        ]
    )
