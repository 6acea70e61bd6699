"""`nybble quantize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json
from nybble.cli.plan import DataFree, Generic, LayoutName, Model, RecipeName

if TYPE_CHECKING:
    from nybble.api.quantize import Result
    from nybble.plan.plan import Plan


def command(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
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
    data_free: DataFree = False,
    calibration_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure input scales on; default: the project's own mixture.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens to measure them on; default: 8192."),
    ] = None,
    headroom: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="Room above the largest measured inputs, as a factor; default: 2."
        ),
    ] = None,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Quantize a checkpoint folder, and verify what was written.

    Static FP8 and W4A4 have their input scales measured first, in a short forward pass that needs
    the torch extra; --data-free goes without.
    """
    from nybble.api.quantize import quantize
    from nybble.cli.output import parse_bytes, write_json
    from nybble.cli.plan import check_words
    from nybble.formats.search import SEARCHES
    from nybble.kernels.dispatch import choose
    from nybble.progress import Display, waiting

    if search not in SEARCHES:
        raise typer.BadParameter(
            f"{search!r}; choose one of {', '.join(SEARCHES)}", param_hint="--search"
        )
    check_words(recipe, layout)
    is_json, shard_bytes = wants_json(json, output_format), parse_bytes(shard_size)
    with waiting("compiling the kernels, once"):
        choose()
    with Display() as progress:
        result = quantize(
            model,
            out,
            recipe,
            layout=layout,
            search=search,
            jobs=jobs,
            shard_size=shard_bytes,
            dry_run=dry_run,
            resume=resume,
            generic=generic,
            data_free=data_free,
            calibration_text=calibration_text,
            calibration_tokens=calibration_tokens,
            headroom=headroom,
            progress=progress,
            on_plan=None if is_json else _show_plan,
        )
    if is_json:
        write_json(result.as_json())
    else:
        sys.stdout.write(render(result))


def _show_plan(plan: Plan) -> None:
    """What is about to happen, while stopping it is still cheap."""
    from nybble.cli.plan import render as render_plan

    sys.stdout.write(render_plan(plan, plan))
    sys.stdout.flush()


def render(result: Result) -> str:
    """What the audit found."""
    from nybble.cli.output import amount, labelled, table

    checked = result.audit
    if checked is None:
        return labelled("dry run", f"nothing written to {result.out}") + "\n"
    source = sum(row.source_bytes for row in result.plan.rows)
    head = ["role", "scheme", "modules", "SQNR dB", "worst", "in module"]
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
    lines = [
        "",
        f"{result.out}: written and opened again",
        table(head, rows, right=(2, 3, 4)),
        *_input_scales(result),
        labelled(
            "verified",
            f"{checked.tensors:,} tensors, {checked.payload_bytes:,} bytes as planned; scales "
            f"finite and positive; {checked.sqnr_db:.2f} dB over all quantized weights "
            f"({result.search})",
        ),
        labelled("checked", _findings(result)),
        labelled("identical", f"{checked.copied:,} copied tensors byte for byte: {copied}"),
        labelled("size", f"{amount(source)} -> {amount(checked.payload_bytes)}"),
        labelled(
            "time",
            f"{result.seconds:.1f} s to quantize "
            f"({source / max(result.seconds, 1e-9) / 1e9:.2f} GB/s of source, "
            f"{result.cpu_seconds:.1f} CPU s), {result.audit_seconds:.1f} s to verify "
            f"({result.audit_cpu_seconds:.1f} CPU s); {result.kernels}, {result.threads} threads",
        ),
    ]
    if checked.all_zero:
        lines.append(
            labelled(
                "warning",
                f"{len(checked.all_zero):,} modules are zeros in the source itself, "
                f"{checked.all_zero[0]} for one: an interrupted download looks like that",
            )
        )
    return "\n".join(lines) + "\n"


def _findings(result: Result) -> str:
    """What the rules of check say: the worst by name, the rest by number."""
    from nybble.api.check import Severity

    worse = [f for f in result.findings if f.severity > Severity.NOTE]
    notes = len(result.findings) - len(worse)
    said = "; ".join(
        f"{f.rule.id} {f.severity}{f' in {f.engine}' if f.engine else ''}: {f.message}"
        for f in worse[:3]
    )
    more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
    return (
        said or "no error, no warning"
    ) + f"{more}; {notes} notes (nybble check {result.out} --source {result.plan.checkpoint.path})"


def _input_scales(result: Result) -> list[str]:
    """How the input scales were measured; no line where there are none."""
    from nybble.cli.output import labelled

    scales, checked = result.input_scales, result.audit
    if scales is None:
        if checked is None or not checked.input_scales:
            return []
        found = f"{checked.input_scales:,} modules, finite, positive, equal in fused groups"
        return [labelled("input scales", f"{found}; not measured by this run")]
    when = "as the interrupted run measured them"
    if result.measure_seconds:
        when = f"measured in {result.measure_seconds:.1f} s"
    text = (
        f"{len(scales.values):,} modules, largest magnitudes on {scales.tokens:,} tokens times "
        f"{scales.headroom:g}, {when} ({scales.calibration})"
    )
    if by_layer := scales.fallbacks_by_layer:
        most = max(by_layer, key=lambda layer: by_layer[layer])
        text += (
            f"; {len(scales.fallbacks):,} modules of experts without a token took the maximum of "
            f"their layer (most in {most}: {by_layer[most]:,})"
        )
    return [labelled("input scales", text)]
