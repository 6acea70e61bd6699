"""`nybble bench`: how fast, beside what the machine could."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.flags import EngineFlags
from nybble.cli.output import JsonFlag, OutputFormat, amount, billions, wants_json, write_json
from nybble.cli.plan import Model

if TYPE_CHECKING:
    from nybble.api.bench import EngineBench, Row

app = typer.Typer(help="Measure speed, beside what the machine could reach.", no_args_is_help=True)

_HEAD = ("model", "size", "params", "format", "activations", "threads", "test")
_FIGURES = ("tokens/s", "of bandwidth", "of compute")


@app.callback()
def _group() -> None:
    """Measure speed, beside what the machine could reach."""


@app.command("engine")
def engine(
    model: Model,
    prompt: Annotated[
        int, typer.Option("--prompt", "-p", min=0, help="Tokens of a prompt; 0: no prefill.")
    ] = 512,
    generate: Annotated[
        int, typer.Option("--generate", "-g", min=0, help="Tokens to decode; 0: no decoding.")
    ] = 128,
    batch: Annotated[
        str, typer.Option("--batch", "-b", help="Sequences side by side, one test for each.")
    ] = "1,2,4,8,16,32",
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Measurements of each test.")] = 5,
    precision: Annotated[
        str, typer.Option("--precision", help="Activations in matmuls: bf16, f32 or int8.")
    ] = "bf16",
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="auto, bf16, fp8 or f32.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: all processors.")
    ] = None,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Prefill and decoding in tokens/s, and the share of the machine's limits that this is.

    The limits, bytes read and multiply-adds a second, are measured in the same run. Decoding is
    compared over packed bytes: of experts, those that tokens are expected to choose.
    """
    from nybble.api.bench import BenchOptions, bench_engine
    from nybble.errors import EngineError
    from nybble.progress import Display

    is_json = wants_json(json, output_format)
    opening = EngineFlags(
        precision=precision, kv_cache_dtype=kv_cache_dtype, threads=threads
    ).options()
    try:
        options = BenchOptions(prompt, generate, _numbers(batch), repeat)
    except EngineError as error:
        raise typer.BadParameter(str(error)) from error
    with Display() as progress:
        found = bench_engine(model, options, opening, progress=progress)
    if found.conditions.is_disturbed:
        sys.stderr.write("other processes kept the machine busy: measure again when it is quiet\n")
    if is_json:
        write_json(found.as_json())
    else:
        sys.stdout.write(render(found))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}; write numbers with commas, as in 1,8,32", param_hint="--batch"
        ) from None


def render(found: EngineBench) -> str:
    """A Markdown table, the limits, and the line that says where it was measured."""
    lines = [
        _line((*_HEAD, *_FIGURES)),
        _line(["---"] * len(_HEAD) + ["--:"] * len(_FIGURES)),
        *(_line(_cells(found, row)) for row in found.rows),
    ]
    peaks = ", ".join(f"{k} {v / 1e9:,.0f}" for k, v in found.limits.operations_s.items())
    return (
        "\n".join(lines)
        + f"\n\nlimits: read {found.limits.read_bytes_s / 1e9:.1f} GB/s; multiply-adds {peaks} "
        f"GOP/s; compute is compared with {found.operand}; KV cache {found.kv_cache}\n"
        f"{found.conditions}\n"
    )


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(found: EngineBench, row: Row) -> list[str]:
    return [
        found.model,
        amount(found.traffic.stored_bytes),
        billions(found.traffic.parameters),
        found.format,
        found.precision,
        str(found.limits.threads),
        str(row.case),
        f"{row.tokens_per_s:,.1f} ± {row.deviation:.1f}",
        f"{100 * row.of_read:.0f} %",
        f"{100 * row.of_compute:.0f} %",
    ]
