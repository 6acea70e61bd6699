"""`nybble quantize`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer
from typer.core import TyperCommand

from nybble.cli.allocate_flags import Formats, TargetBits, TargetSize
from nybble.cli.output import JsonFlag, OutputFormat, wants_json
from nybble.cli.plan import DataFree, Generic, LayoutName, Model, RecipeName, UntieHead

if TYPE_CHECKING:
    from nybble.api.quantize import Result
    from nybble.formats.search import Search
    from nybble.plan.plan import Plan
    from nybble.progress import Progress


class Options(TypedDict):
    """The options that a run with a recipe and one with a target have in common."""

    layout: str
    search: Search
    jobs: int | None
    shard_size: int
    dry_run: bool
    resume: bool
    generic: bool
    data_free: bool
    untie_head: bool
    calibrate: str | None
    effort: str | None
    samples: int | None
    length: int | None
    allow_mixed: bool
    calibration_text: Path | None
    calibration_tokens: int | None
    headroom: float | None


CALIBRATE = "--calibrate"


class Command(TyperCommand):
    """Gives `--calibrate` without a value its default: typer knows no option with an optional
    value."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """See click: the arguments, with "default" behind a --calibrate that has no value: no text
        is an option, nor a folder, which is MODEL."""
        return super().parse_args(ctx, list(_with_default(args)))


def _with_default(args: list[str]) -> Iterator[str]:
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        yield arg
        if arg == CALIBRATE and (following.startswith("-") or _is_model(following)):
            yield "default"


def _is_model(value: str) -> bool:
    """Whether what follows --calibrate is the folder to quantize: a preset's name goes first."""
    from nybble.calibrate.presets import PRESETS

    return os.path.isdir(value) and value not in PRESETS


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
    untie_head: UntieHead = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            CALIBRATE,
            metavar="[TEXT|PRESET]",
            help="Choose codes by what passes through each linear: on a .txt, .jsonl or .json of "
            "yours, or a preset (nvidia:FOLDER, infatoshi); without, the project's own "
            "mixture, and then it may not stand right before OUT.",
        ),
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="Of --calibrate: fast, default or best.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Windows to calibrate on; default: 128."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=16, metavar="L", help="Tokens of a window; default: 512.")
    ] = None,
    allow_mixed: Annotated[
        bool,
        typer.Option(
            "--allow-mixed",
            help="Resume a calibrated run on a machine with other instructions or threads: the "
            "bytes will differ.",
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Do the tasks of --calibrate on a Ray cluster (HOST:PORT, auto or local), with "
            "--jobs threads each; MODEL and OUT on a filesystem that all its machines share.",
        ),
    ] = None,
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    formats: Formats = None,
    promote: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="Of the W4A4 weights, make this share W4A16: those whose inputs suffer most, as "
            "measured; 0: what is out of proportion.",
        ),
    ] = None,
    kv_scales: Annotated[
        bool,
        typer.Option(
            "--kv-scales",
            help="Measure the scales of an FP8 KV cache; without, engines cast with 1.",
        ),
    ] = False,
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
    the torch extra; --data-free goes without. --calibrate runs the model over text layer by layer
    and chooses every code by it: more faithful at the same size.
    """
    from nybble.api.calibrated import EFFORTS
    from nybble.cli import allocate_flags
    from nybble.cli.output import parse_bytes, write_json
    from nybble.cli.plan import check_words
    from nybble.cli.quantized import render
    from nybble.formats.search import SEARCHES
    from nybble.kernels.dispatch import choose
    from nybble.progress import Display, waiting

    if search not in SEARCHES:
        raise typer.BadParameter(
            f"{search!r}; choose one of {', '.join(SEARCHES)}", param_hint="--search"
        )
    if effort is not None and effort not in EFFORTS:
        raise typer.BadParameter(
            f"{effort!r}; choose one of {', '.join(EFFORTS)}", param_hint="--effort"
        )
    check_words(recipe, layout)
    target = allocate_flags.target(target_bits, target_size, formats)
    is_json, shard_bytes = wants_json(json, output_format), parse_bytes(shard_size)
    options: Options = {
        "layout": layout,
        "search": search,
        "jobs": jobs,
        "shard_size": shard_bytes,
        "dry_run": dry_run,
        "resume": resume,
        "generic": generic,
        "data_free": data_free,
        "untie_head": untie_head,
        "calibrate": calibrate,
        "effort": effort,
        "samples": samples,
        "length": length,
        "allow_mixed": allow_mixed,
        "calibration_text": calibration_text,
        "calibration_tokens": calibration_tokens,
        "headroom": headroom,
    }
    with waiting("compiling the kernels, once"):
        choose()
    with Display() as progress:
        if target is not None:
            _refuse_beside_target(promote, kv_scales, ray)
            found = allocate_flags.run(
                target,
                model,
                out,
                recipe,
                formats=formats,
                progress=progress,
                is_quiet=is_json,
                **options,
            )
            result = found.result
            more: dict[str, object] = {"allocation": found.as_json()}
        else:
            result, more = _quantize(
                model, out, recipe, options, promote, kv_scales, ray, progress, is_quiet=is_json
            )
    if is_json:
        write_json({**result.as_json(), **more})
    else:
        sys.stdout.write(render(result))


def _refuse_beside_target(promote: float | None, kv_scales: bool, ray: str | None) -> None:
    from nybble.errors import RecipeError

    for name, is_given in (
        ("--promote", promote is not None),
        ("--kv-scales", kv_scales),
        ("--ray", ray is not None),
    ):
        if is_given:
            raise RecipeError(
                f"{name} and a target of bits or bytes are not made for each other yet; leave one "
                "out"
            )


def _quantize(
    model: Path,
    out: Path,
    recipe: str,
    options: Options,
    promote: float | None,
    kv_scales: bool,
    ray: str | None,
    progress: Progress,
    *,
    is_quiet: bool,
) -> tuple[Result, dict[str, object]]:
    """One recipe for all; what else the JSON document says."""
    from nybble.api.quantize import quantize

    more: dict[str, object] = {}
    if promote is not None:
        recipe, more["promotion"] = _promoted(model, out, recipe, options, promote, progress)
    on_plan = None if is_quiet else _show_plan
    return (
        quantize(
            model,
            out,
            recipe,
            kv_scales=kv_scales,
            ray=ray,
            progress=progress,
            on_plan=on_plan,
            **options,
        ),
        more,
    )


def _promoted(
    model: Path, out: Path, recipe: str, options: Options, share: float, progress: Progress
) -> tuple[str, dict[str, object]]:
    """The derived recipe's file, and what was measured."""
    from nybble.api.input_measurement import calibration_text
    from nybble.api.promotion import TOKENS, promoted_recipe
    from nybble.errors import RecipeError

    if options["data_free"] or options["dry_run"]:
        raise RecipeError(
            "--promote measures what rounding inputs does; leave --data-free and --dry-run out"
        )
    text, windows = options["calibration_text"], None
    if options["calibrate"] is not None:
        from nybble.calibrate.samples import open_samples

        asked = {name: options[name] for name in ("samples", "length")}
        windows = open_samples(model, options["calibrate"], **asked).fit_windows
    found = promoted_recipe(
        model,
        out,
        recipe,
        share=share or None,
        text=None if text is None else calibration_text(text),
        tokens=options["calibration_tokens"] or TOKENS,
        windows=windows,
        layout=options["layout"],
        headroom=options["headroom"],
        generic=options["generic"],
        untie_head=options["untie_head"],
        resume=options["resume"],
        threads=options["jobs"],
        progress=progress,
    )
    return str(found.path), found.as_json()


def _show_plan(plan: Plan) -> None:
    """What is about to happen, while stopping it is still cheap."""
    from nybble.cli.plan import render as render_plan

    sys.stdout.write(render_plan(plan, plan))
    sys.stdout.flush()
