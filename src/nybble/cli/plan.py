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
    Path,
    typer.Argument(
        metavar="MODEL", help="A local checkpoint folder; headers without data will do."
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe's name, or a .toml file.")
]
LayoutName = Annotated[str, typer.Option("--layout", help="modelopt or compressed-tensors.")]
DataFree = Annotated[
    bool,
    typer.Option("--data-free", help="Measure no input scales: the recipe's form without them."),
]
UntieHead = Annotated[
    bool,
    typer.Option(
        "--untie-head",
        help="Give a tied model an output head of its own, in the recipe's format: a larger "
        "folder, of which every token reads less.",
    ),
]
Generic = Annotated[
    bool, typer.Option("--generic", help="Unknown model type: weight-only, by shapes and names.")
]


def command(
    model: Model,
    recipe: RecipeName = "nvfp4",
    layout: LayoutName = "modelopt",
    data_free: DataFree = False,
    untie_head: UntieHead = False,
    generic: Generic = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Show what a recipe will do to a checkpoint: roles, formats, bytes. Reads headers only."""
    from nybble.api.plan import as_json, data_free_form, plan
    from nybble.cli.output import write_json

    check_words(recipe, layout)
    is_json = wants_json(json, output_format)
    found = plan(
        model, recipe, layout=layout, generic=generic, data_free=data_free, untie_head=untie_head
    )
    without_data = data_free_form(found, generic=generic)
    if is_json:
        write_json(as_json(found, without_data))
        return
    sys.stdout.write(render(found, without_data))


def check_words(recipe: str, layout: str) -> None:
    """A misspelt recipe or layout is a usage error, as any other option's value is."""
    from nybble.api.plan import LAYOUTS
    from nybble.plan.recipe import recipe_names

    if layout not in LAYOUTS:
        raise typer.BadParameter(
            f"{layout!r}; choose one of {', '.join(LAYOUTS)}", param_hint="--layout"
        )
    if recipe not in recipe_names() and not recipe.endswith(".toml"):
        raise typer.BadParameter(
            f"{recipe!r}; choose one of {', '.join(recipe_names())}, or give a file ending in "
            ".toml",
            param_hint="--recipe",
        )


def render(found: Plan, without_data: Plan | None) -> str:
    """The plan as text, and what its data-free form would be, where that is another one."""
    from nybble.api.plan import totals
    from nybble.cli.output import amount, billions, labelled, table

    sums = totals(found)
    rows = [
        [
            row.role,
            f"{row.tensors:,}",
            f"{row.modules:,}" if row.scheme.weight else "",
            billions(row.parameters),
            row.scheme.name if row.scheme.weight else row.dtype.lower(),
            amount(row.source_bytes),
            amount(row.bytes),
            f"{row.bits_per_weight:.3f}",
        ]
        for row in found.rows
    ]
    head = ["role", "tensors", "become", "parameters", "format", "now", "then", "bits/weight"]
    lines = [
        f"{found.checkpoint.path}: {found.family.title} ({found.family.model_type}), recipe "
        f"{found.recipe.name}, layout {found.layout.name}",
        table(head, rows, right=(1, 2, 3, 5, 6, 7)),
        labelled(
            "total",
            f"{billions(sums.parameters)} parameters, {amount(sums.source_bytes)} -> "
            f"{amount(sums.bytes)} ({sums.bytes:,} bytes), {sums.ratio:.2f}x smaller, "
            f"{sums.bits_per_weight:.2f} bits per parameter",
        ),
        labelled("why not 4x", _why_not_four(found)),
        labelled(
            "active",
            f"{billions(sums.active_parameters)} parameters per decoded token, which reads "
            f"{amount(sums.bytes_per_token)} of weights instead of "
            f"{amount(sums.source_bytes_per_token)}",
        ),
        labelled(
            "hub sidebar",
            f"will show {billions(sums.hub_parameters)} parameters: it counts stored elements, and "
            "two four-bit weights share one; scales and the MTP head are left out",
        ),
        labelled(
            "accounted",
            f"{sums.source_tensors:,} of {sums.source_tensors:,} source tensors; "
            f"{len(found.copies):,} go over byte for byte",
        ),
    ]
    if found.needs_data:
        lines.append(labelled("measured", _measured(found)))
        if without_data is not found:
            lines.append(labelled("without data", _without_data(found, without_data)))
    lines += [labelled("note", note) for note in found.notes]
    return "\n".join(lines) + "\n"


def _why_not_four(found: Plan) -> str:
    from nybble.cli.output import amount

    formats = {r.scheme.weight for r in found.rows if r.scheme.weight}
    total = sum(r.parameters for r in found.rows)
    plain = amount(sum(r.bytes for r in found.rows if not r.scheme.weight))
    parts = []
    for fmt in sorted(formats, key=lambda f: f.element.bits):
        share = sum(r.parameters for r in found.rows if r.scheme.weight is fmt) / total
        bits = fmt.element.bits + (fmt.scale.bits / fmt.block[1] if fmt.is_packed else 0)
        parts.append(
            f"{share:.0%} of the parameters become {fmt}, {bits:g} bits each with their scales "
            f"(at most {16 / bits:.2f}x)"
        )
    return f"{'; '.join(parts)}; {plain} stay as they are"


def _measured(found: Plan) -> str:
    modules = sum(len(j.members) for j in found.jobs if j.scheme.needs_input_scale)
    schemes = dict.fromkeys(j.scheme.name for j in found.jobs if j.scheme.needs_input_scale)
    return (
        f"the input scales of {modules:,} modules ({', '.join(schemes)}), in a short forward pass "
        "over text: needs the torch extra"
    )


def _without_data(found: Plan, without_data: Plan | None) -> str:
    from nybble.cli.output import amount

    if without_data is None:
        return f"no such form: {found.recipe.name} quantizes activations with measured scales"
    parts = []
    for role in dict.fromkeys(r.role for r in found.rows if r.scheme.needs_input_scale):
        measured = [r for r in found.rows if r.role == role]
        free = [r for r in without_data.rows if r.role == role]
        formats = dict.fromkeys(r.scheme.name if r.scheme.weight else "BF16" for r in free)
        parts.append(
            f"{role} in {', '.join(formats)} ({amount(sum(r.bytes for r in free))} instead of "
            f"{amount(sum(r.bytes for r in measured))})"
        )
    return (
        f"with --data-free: {', '.join(parts)}; {amount(without_data.payload_bytes)} "
        f"({without_data.payload_bytes:,} bytes)"
    )
