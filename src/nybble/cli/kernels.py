"""`nybble kernels`: the compiled kernels, ahead of their first use."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json

app = typer.Typer(
    help="The compiled kernels: build them ahead of their first use.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """The compiled kernels: build them ahead of their first use."""


@app.command("build")
def build(
    force: Annotated[
        bool, typer.Option("--force", help="Compile even if the library is there.")
    ] = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Compile the kernels now, for an image or a machine that will have no compiler."""
    from nybble.cli.output import write_json
    from nybble.errors import KernelUnavailable
    from nybble.kernels.build import build as build_library
    from nybble.kernels.dispatch import machine_isas
    from nybble.progress import waiting

    started = time.perf_counter()
    with waiting("compiling the kernels"):
        path, origin = build_library(force=force)
    if path is None:
        raise KernelUnavailable(f"no kernels were built: {origin}")
    sets = machine_isas()
    if not sets:
        raise KernelUnavailable(f"{path}: built, and cannot be loaded on this machine")
    found = {
        "schema": "nybble.kernels/1",
        "path": str(path),
        "bytes": path.stat().st_size,
        "origin": origin,
        "seconds": time.perf_counter() - started,
        "instruction_sets": sets,
    }
    if wants_json(json, output_format):
        write_json(found)
        return
    sys.stdout.write(
        f"{path}\n{origin}; {found['bytes']:,} bytes, {found['seconds']:.1f} s; "
        f"usable here: {', '.join(sets)}\n"
    )
