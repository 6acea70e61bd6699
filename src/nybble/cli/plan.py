"""`nybble plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json

if TYPE_CHECKING:
    from nybble.plan.plan import Plan

Model = Annotated[
    Path, typer.Argument(help="A local checkpoint folder; headers without data will do.")
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe's name, or a .toml file.")
]
LayoutName = Annotated[str, typer.Option("--layout", help="modelopt or compressed-tensors.")]
Generic = Annotated[
    bool, typer.Option("--generic", help="Unknown model type: weight-only, by shapes and names.")
]


def command(
    model: Model,
    recipe: RecipeName = "nvfp4",
    layout: LayoutName = "modelopt",
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Plan what a run without calibration data writes.")
    ] = False,
    generic: Generic = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Show what a recipe will do to a checkpoint: roles, formats, bytes. Reads headers only."""
    from nybble.api.plan import as_json, data_free_form, plan
    from nybble.cli.output import write_json

    found = plan(model, recipe, layout=layout, generic=generic, data_free=data_free)
    without_data = data_free_form(found, generic=generic)
    if wants_json(json, output_format):
        write_json(as_json(found, without_data))
        return
    sys.stdout.write(render(found, without_data))


def render(found: Plan, without_data: Plan | None) -> str:
    """The plan as text."""
    from nybble.api.plan import active_source_bytes, totals
    from nybble.cli.output import billions, gib, table

    sums = totals(found)
    parameters, size = int(str(sums["parameters"])), found.payload_bytes
    before = int(str(sums["source_bytes"]))
    rows = [
        [
            row.role,
            f"{row.tensors:,}",
            f"{row.modules:,}" if row.scheme.weight else "",
            billions(row.parameters),
            f"{row.scheme.weight} {row.scheme.activation}"
            if row.scheme.weight
            else row.dtype.lower(),
            gib(row.source_bytes),
            gib(row.bytes),
            f"{row.bits_per_weight:.3f}",
        ]
        for row in found.rows
    ]
    quantized = [row for row in found.rows if row.scheme.weight]
    four_bit = sum(r.parameters for r in quantized if r.scheme.weight and r.scheme.weight.is_packed)
    plain = sum(r.bytes for r in found.rows if not r.scheme.weight)
    lines = [
        f"{found.checkpoint.path}: {found.family.title} ({found.family.model_type}), recipe "
        f"{found.recipe.name}, layout {found.layout.name}",
        table(
            [
                "role",
                "tensors",
                "become",
                "parameters",
                "format, activations",
                "GiB now",
                "GiB then",
                "bits/weight",
            ],
            rows,
            right=(1, 2, 3, 5, 6, 7),
        ),
        f"total        {billions(parameters)} parameters, {gib(before)} GiB -> {gib(size)} GiB "
        f"({size:,} bytes), {before / size:.2f}x smaller, {8 * size / parameters:.2f} bits per "
        "parameter",
        f"why not 4x   a four-bit weight takes 4.5 bits with its scales: at most {16 / 4.5:.2f}x; "
        f"{four_bit / parameters:.0%} of the parameters are four-bit, and {gib(plain)} GiB stay "
        "as they are",
        f"active       {billions(int(str(sums['active_parameters'])))} parameters per decoded "
        f"token; it reads {int(str(sums['bytes_per_token'])) / 1e9:.2f} GB instead of "
        f"{active_source_bytes(found) / 1e9:.2f} GB",
        f"hub sidebar  will show {billions(found.stored_parameters)} parameters: it counts stored "
        "elements, and two four-bit weights share one; scales and the MTP head are left out",
        f"accounted    {len(found.checkpoint.tensors):,} of {len(found.checkpoint.tensors):,} "
        f"source tensors; {len(found.copies):,} go over byte for byte",
    ]
    if found.recipe.needs_data:
        lines.append(_without_data(found, without_data))
    lines += [f"note         {note}" for note in found.notes]
    return "\n".join(lines) + "\n"


def _without_data(found: Plan, without_data: Plan | None) -> str:
    from nybble.cli.output import gib

    if without_data is None:
        return (
            f"without data this recipe cannot run: {found.recipe.name} quantizes activations with "
            "measured scales"
        )
    kept = {r.role: r.bytes for r in without_data.rows if not r.scheme.weight}
    roles = [r for r in found.rows if r.scheme.needs_input_scale and r.role in kept]
    what = ", ".join(f"{r.role} ({gib(kept[r.role])} GiB instead of {gib(r.bytes)})" for r in roles)
    return (
        f"without data {what} stay in BF16, because static FP8 needs measured input scales: "
        f"{gib(without_data.payload_bytes)} GiB ({without_data.payload_bytes:,} bytes)"
    )
