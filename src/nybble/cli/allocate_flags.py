"""The options of `nybble quantize` that ask for an allocation, and what they print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.errors import RecipeError

if TYPE_CHECKING:
    from nybble.api.allocate import Allocation, Row, Target
    from nybble.formats.search import Search
    from nybble.progress import Progress

TargetBits = Annotated[
    str | None,
    typer.Option(
        "--target-bits",
        metavar="B",
        help="Bits per weight of what the recipe quantizes, scales included: 4.75, or +0.25 over "
        "uniform NVFP4. Chooses NVFP4, FP8 or BF16 for every group of modules by measured "
        "divergence.",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        metavar="SIZE",
        help="The same for the whole checkpoint: GiB (21.5), or a decimal size (23GB).",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--formats",
        metavar="LIST",
        help="Formats to choose from, with commas; default: nvfp4,fp8,bf16.",
    ),
]


def target(bits: str | None, size: str | None, formats: str | None) -> Target | None:
    """What was asked for; None where nothing was."""
    from nybble.api.allocate import Target
    from nybble.cli.output import parse_bytes

    if bits is not None and size is not None:
        raise typer.BadParameter(
            "--target-bits and --target-size say the same thing twice; leave one out"
        )
    if bits is not None:
        value = _number(bits, "--target-bits", "4.75, or +0.25 over uniform NVFP4")
        return Target(more_bits=value) if bits.strip().startswith("+") else Target(bits=value)
    if size is not None:
        if size.strip().upper().endswith("B"):
            return Target(payload_bytes=parse_bytes(size))
        value = _number(size, "--target-size", "21.5 (GiB), or 23GB")
        return Target(payload_bytes=int(value * 2**30))
    if formats is not None:
        raise typer.BadParameter(
            "--formats belongs to --target-bits or --target-size; add one, or leave it out"
        )
    return None


def _number(text: str, option: str, example: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise typer.BadParameter(
            f"{text!r} is no number above 0; write {example}", param_hint=option
        )
    return value


def run(
    wanted: Target,
    model: Path,
    out: Path,
    recipe: str,
    *,
    formats: str | None,
    layout: str,
    search: Search,
    jobs: int | None,
    shard_size: int,
    dry_run: bool,
    resume: bool,
    generic: bool,
    data_free: bool,
    untie_head: bool,
    calibrate: str | None,
    effort: str | None,
    samples: int | None,
    length: int | None,
    allow_mixed: bool,
    calibration_text: Path | None,
    calibration_tokens: int | None,
    headroom: float | None,
    progress: Progress,
    is_quiet: bool,
) -> Allocation:
    """`quantize` with these options, under a limit of bytes."""
    from nybble.api.allocate import allocate_command
    from nybble.calibrate.allocate import FORMATS

    if dry_run or generic or calibration_tokens is not None:
        raise RecipeError(
            "an allocation is only known after measuring, of a model that nybble computes, on the "
            "guard windows of a calibration text: leave --dry-run, --generic and "
            "--calibration-tokens out (--samples and --length say how much text)"
        )

    if untie_head:
        raise RecipeError(
            "--untie-head and a target of bits or bytes are not made for each other yet; leave one "
            "out"
        )

    def show(rows: Sequence[Row], chosen: str) -> None:
        if not is_quiet:
            typer.echo(render(rows, chosen))

    return allocate_command(
        model,
        out,
        recipe,
        wanted,
        formats=tuple(formats.split(",")) if formats else FORMATS,
        layout=layout,
        search=search,
        jobs=jobs,
        shard_size=shard_size,
        resume=resume,
        data_free=data_free,
        calibrate=calibrate,
        effort=effort,
        samples=samples,
        length=length,
        allow_mixed=allow_mixed,
        calibration_text=calibration_text,
        headroom=headroom,
        progress=progress,
        on_rows=show,
    )


def render(rows: Sequence[Row], chosen: str) -> str:
    """The candidates as measured, and which one is written."""
    from nybble.cli.output import amount, labelled, table

    head = ["candidate", "bits", "size", "KL", "95 % interval", "expected", "off by", "vs control"]
    lines = [table(head, [_cells(row, chosen) for row in rows], right=(1, 2, 3, 4, 5, 6, 7))]
    best = next(row for row in rows if row.candidate.name == chosen)
    note = f"{chosen}: {best.candidate.reason}; {amount(best.payload_bytes)}. "
    if chosen == "control":
        note += "No allocation by damages was better than evenly spaced layers"
    elif best.gap is None:
        note += "There is no control of other modules at these bytes"
    elif best.gap.difference.interval is None or best.gap.difference.interval.high >= 0:
        note += "Its lead over the control is within the noise of this text"
    else:
        note += "Better than the control beyond the noise of this text"
    return "\n".join(["", *lines, labelled("chosen", note), ""])


def _cells(row: Row, chosen: str) -> list[str]:
    from nybble.cli.output import amount

    interval = row.kl.interval
    return [
        row.candidate.name + (" *" if row.candidate.name == chosen else ""),
        f"{row.bits:.4f}",
        amount(row.payload_bytes),
        f"{row.kl.value:.5f}",
        f"{interval.low:.5f} .. {interval.high:.5f}" if interval else "-",
        f"{row.expected:.5f}",
        f"{row.surrogate_error:+.0%}",
        f"{row.gap.ratio.value - 1:+.1%}" if row.gap else "-",
    ]
