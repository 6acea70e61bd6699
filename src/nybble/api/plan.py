"""`nybble plan`: what a recipe will do to a checkpoint, from headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from nybble.checkpoint.compressed_tensors import CompressedTensors
from nybble.checkpoint.layout import Layout
from nybble.checkpoint.modelopt import ModelOpt
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import RecipeError
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import Recipe, load_recipe
from nybble.plan.untied import untied

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ModelOpt(), CompressedTensors())}


def find_layout(name: str) -> Layout:
    """A layout by its word. Raises RecipeError for an unknown one."""
    if name not in LAYOUTS:
        raise RecipeError(f"unknown layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def plan(
    model: str | PathLike[str],
    recipe: str | Recipe = "nvfp4",
    *,
    layout: str = "modelopt",
    generic: bool = False,
    data_free: bool = False,
    untie_head: bool = False,
) -> Plan:
    """The plan of a recipe for a local checkpoint folder; headers without data will do.

    `data_free` plans what a run without measured activations writes; RecipeError if the recipe has
    no such form. `untie_head` gives a tied model a head of its own, with codes. Raises as
    `make_plan` and `untied` do.
    """
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if data_free:
        chosen = chosen.without_data()
    checkpoint = open_source(model, headers_only=True, generic=generic, untie_head=untie_head)
    return make_plan(checkpoint, chosen, find_layout(layout), generic=generic)


def open_source(
    model: str | PathLike[str],
    *,
    headers_only: bool,
    generic: bool,
    untie_head: bool,
) -> Checkpoint:
    """The checkpoint to quantize, seen with a head of its own where that is asked for."""
    if untie_head and generic:
        raise RecipeError(
            "--untie-head needs a model type that is known: --generic guesses which matrix is the "
            "embedding, and cannot tell whether it is the head too; leave one out"
        )
    checkpoint = Checkpoint.open(Path(model), headers_only=headers_only)
    return untied(checkpoint) if untie_head else checkpoint


def data_free_form(found: Plan, *, generic: bool = False) -> Plan | None:
    """What a run without measured activations would write instead; None if the recipe has no such
    form.

    The plan itself, where it needs no data.
    """
    if not found.needs_data:
        return found
    try:
        return make_plan(
            found.checkpoint, found.recipe.without_data(), found.layout, generic=generic
        )
    except RecipeError:
        return None


def as_json(found: Plan, data_free: Plan | None) -> dict[str, object]:
    """The plan as the JSON document `nybble.plan/1`."""
    return {
        "schema": "nybble.plan/1",
        "model": str(found.checkpoint.path),
        "model_type": found.family.model_type,
        "recipe": found.recipe.name,
        "layout": found.layout.name,
        **asdict(totals(found)),
        "needs_data": found.needs_data,
        "data_free": None if data_free is None or data_free is found else asdict(totals(data_free)),
        "rows": [
            {
                **{k: v for k, v in asdict(row).items() if k != "scheme"},
                "scheme": row.scheme.name,
                "weight": row.scheme.weight.name if row.scheme.weight else row.dtype.lower(),
                "activations": row.scheme.activation,
                "bits_per_weight": row.bits_per_weight,
            }
            for row in found.rows
        ],
        "notes": list(found.notes),
    }


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of a plan. `bytes_per_token` is what one decoded token reads of the weights."""

    source_tensors: int
    tensors: int
    parameters: int
    active_parameters: int
    source_bytes: int
    bytes: int
    ratio: float
    bits_per_weight: float
    bytes_per_token: int
    source_bytes_per_token: int
    hub_parameters: int


def totals(found: Plan) -> Totals:
    """Sum up a plan."""
    source = sum(row.source_bytes for row in found.rows)
    aliases = found.checkpoint.aliases  # in the files there is nothing of theirs
    source -= sum(found.checkpoint.tensors[name].nbytes for name in aliases)
    parameters = sum(row.parameters for row in found.rows)
    quantized = sum(len(found.leaves(j.scheme, m.shape)) for j in found.jobs for m in j.members)
    active_source = sum(
        round(row.source_bytes * row.active / row.parameters)
        for row in found.rows
        if row.parameters
    )
    return Totals(
        source_tensors=len(found.checkpoint.tensors) - len(aliases),
        tensors=len(found.copies) + quantized,
        parameters=parameters,
        active_parameters=sum(row.active for row in found.rows),
        source_bytes=source,
        bytes=found.payload_bytes,
        ratio=source / found.payload_bytes,
        bits_per_weight=8 * found.payload_bytes / parameters,
        bytes_per_token=sum(row.active_bytes for row in found.rows),
        source_bytes_per_token=active_source,
        hub_parameters=found.stored_parameters,
    )


__all__ = [
    "LAYOUTS",
    "Plan",
    "Totals",
    "as_json",
    "data_free_form",
    "find_layout",
    "open_source",
    "plan",
    "totals",
]
