"""`nybble perplexity`, `nybble eval` and `nybble reference`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json
from nybble.cli.plan import Model

if TYPE_CHECKING:
    from nybble.api.evaluate import Protocol

TextFile = Annotated[
    Path | None, typer.Option("--text", help="A UTF-8 file to score, instead of a suite.")
]
Suite = Annotated[
    str | None, typer.Option("--suite", help="A text that comes along: wikitext2, the default.")
]
Convention = Annotated[
    str | None,
    typer.Option(
        "--convention", help="How text becomes windows: windows (default), llamacpp, sliding."
    ),
]
Length = Annotated[
    int | None, typer.Option("--length", min=2, help="Tokens of a window; default 512.")
]
Stride = Annotated[
    int | None, typer.Option("--stride", min=1, help="Tokens between windows, if sliding.")
]
Limit = Annotated[
    int | None, typer.Option("--windows", min=1, help="Score only the first so many windows.")
]
PrecisionName = Annotated[
    str, typer.Option("--precision", help="Activations in matmuls: bf16, f32 or int8.")
]
KvName = Annotated[
    str, typer.Option("--kv-cache-dtype", help="Cached keys and values: bf16 or f32.")
]
Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate-activations/--weights-only",
        help="Round the inputs of linears as the checkpoint declares for serving, or not.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Default: all processors.")]
Spill = Annotated[
    Path | None,
    typer.Option("--spill", help="Keep hidden states in this folder instead of memory; resumable."),
]


def perplexity(
    model: Model,
    text: TextFile = None,
    suite: Suite = None,
    convention: Convention = None,
    length: Length = None,
    stride: Stride = None,
    windows: Limit = None,
    precision: PrecisionName = "bf16",
    kv_cache_dtype: KvName = "bf16",
    simulate: Simulate = True,
    threads: Threads = None,
    spill: Spill = None,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Measure the perplexity of a checkpoint on a text, one layer in memory at a time."""
    from nybble.api.evaluate import perplexity as run
    from nybble.cli.evaluated import render_perplexity
    from nybble.progress import Display

    is_json = wants_json(json, output_format)
    protocol = _protocol(
        *(text, suite, convention, length, stride, windows),
        *(precision, kv_cache_dtype, simulate, threads, spill),
    )
    _prepare("perplexity")
    with Display() as progress:
        found = run(model, protocol, progress)
    _write(found, is_json, render_perplexity)


def evaluate(
    candidate: Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint to judge.")],
    reference: Annotated[
        Path,
        typer.Option("--reference", "-r", help="The BF16 model, or a pack of `nybble reference`."),
    ],
    text: TextFile = None,
    suite: Suite = None,
    convention: Convention = None,
    length: Length = None,
    stride: Stride = None,
    windows: Limit = None,
    precision: PrecisionName = "bf16",
    kv_cache_dtype: KvName = "bf16",
    simulate: Simulate = True,
    threads: Threads = None,
    spill: Spill = None,
    head: Annotated[
        Path | None,
        typer.Option("--head", help="The folder with the output head, if the pack has none."),
    ] = None,
    llamacpp: Annotated[
        bool, typer.Option("--llamacpp", help="Print as llama-perplexity --kl-divergence does.")
    ] = False,
    drafts: Annotated[
        bool,
        typer.Option(
            "--drafts", help="Compare the guesses of both MTP heads, too: how many are accepted."
        ),
    ] = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Measure how far a checkpoint is from its BF16 original: KL divergence, top-1, perplexity."""
    from nybble.api.acceptance import LENGTH, WINDOWS, acceptance, refuse_headless
    from nybble.api.evaluate import evaluate as run
    from nybble.cli.evaluated import render_divergence, render_drafts
    from nybble.cli.output import write_json
    from nybble.evaluate.divergence import render_llamacpp
    from nybble.progress import Display

    is_json = wants_json(json, output_format)
    protocol = _protocol(
        *(text, suite, convention, length, stride, windows),
        *(precision, kv_cache_dtype, simulate, threads, spill),
    )
    _prepare("eval")
    if drafts:  # before the long part
        for folder in (reference, candidate):
            refuse_headless(folder)
    accepted = None
    with Display() as progress:
        found = run(candidate, reference, protocol, progress, head=head)
        if drafts:
            accepted = acceptance(
                reference,
                candidate,
                text=text,
                windows=windows or WINDOWS,
                length=length or LENGTH,
                precision=protocol.precision,
                simulate=simulate,
                threads=threads,
                progress=progress,
            )
    if is_json:
        write_json(found.as_json() | ({"drafts": accepted.as_json()} if accepted else {}))
        return
    sys.stdout.write(render_llamacpp(found.divergence) if llamacpp else render_divergence(found))
    if accepted is not None:
        sys.stdout.write(render_drafts(accepted))


def reference(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    text: TextFile = None,
    suite: Suite = None,
    convention: Convention = None,
    length: Length = None,
    stride: Stride = None,
    windows: Limit = None,
    has_head: Annotated[
        bool,
        typer.Option("--with-head/--without-head", help="Put the output head into the pack."),
    ] = True,
    kv_cache_dtype: KvName = "bf16",
    threads: Threads = None,
    spill: Spill = None,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Keep what exact KL needs of a BF16 model: its final hidden states, tokens and output head."""
    from nybble.api.evaluate import reference as run
    from nybble.cli.evaluated import render_reference
    from nybble.progress import Display

    is_json = wants_json(json, output_format)
    protocol = _protocol(
        *(text, suite, convention, length, stride, windows),
        *("bf16", kv_cache_dtype, True, threads, spill),
    )
    _prepare("reference")
    with Display() as progress:
        found = run(model, out, protocol, progress, has_head=has_head)
    _write(found, is_json, render_reference)


# ---------------------------------------------------------------------------------------- arguments


def _protocol(
    text: Path | None,
    suite: str | None,
    convention: str | None,
    length: int | None,
    stride: int | None,
    windows: int | None,
    precision: str,
    kv_dtype: str,
    simulate: bool,
    threads: int | None,
    spill: Path | None,
) -> Protocol:
    from nybble.api.evaluate import Protocol
    from nybble.evaluate.windows import CONVENTIONS, SUITES
    from nybble.kernels.compute import PRECISIONS

    for name, value, allowed in (
        ("--precision", precision, PRECISIONS),
        ("--kv-cache-dtype", kv_dtype, ("bf16", "f32")),
        ("--convention", convention, CONVENTIONS),
        ("--suite", suite, SUITES),
    ):
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value!r}; choose {', '.join(allowed)}", param_hint=name)
    return Protocol(
        text,
        suite,
        convention,
        length,
        stride,
        windows,
        precision,  # type: ignore[arg-type]
        kv_dtype,  # type: ignore[arg-type]
        simulate,
        threads,
        spill,
    )


def _prepare(command: str) -> None:
    from nybble.api.extras import needs_torch
    from nybble.kernels.dispatch import choose
    from nybble.progress import waiting

    needs_torch(command)
    with waiting("compiling the kernels, once"):
        choose()


def _write(found, is_json, render) -> None:  # type: ignore[no-untyped-def]
    from nybble.cli.output import write_json

    if is_json:
        write_json(found.as_json())
    else:
        sys.stdout.write(render(found))
