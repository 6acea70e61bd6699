"""`nybble generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json
from nybble.cli.plan import Model


def command(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads it from stdin.")
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to generate at most.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus of this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="The k likeliest; 0: all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds, equal text.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of the turn.")
    ] = False,
    precision: Annotated[
        str, typer.Option("--precision", help="Activations in matmuls: bf16 or f32.")
    ] = "bf16",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: all processors.")
    ] = None,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Generate text from a checkpoint, quantized or not; streamed to the terminal."""
    from nybble.api.extras import needs_torch
    from nybble.api.generate import generate
    from nybble.cli.output import write_json
    from nybble.kernels.dispatch import choose
    from nybble.progress import waiting

    is_json = wants_json(json, output_format)
    if precision not in ("bf16", "f32"):
        raise typer.BadParameter(f"{precision!r}; choose bf16 or f32", param_hint="--precision")
    needs_torch("generate")
    with waiting("compiling the kernels, once"):
        choose()
    from nybble.engine.request import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, seed=seed, ignore_eos=ignore_eos)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    found = generate(
        model,
        sys.stdin.read() if prompt == "-" else prompt,
        params,
        raw=raw,
        system=system,
        precision=precision,  # type: ignore[arg-type]
        threads=threads,
        on_text=None if is_json else show,
    )
    if is_json:
        write_json(found.as_json())
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(
        f"\n{found.prompt_tokens} tokens of prompt in {found.prefill_s:.2f} s "
        f"({found.prompt_tokens / max(found.prefill_s, 1e-9):,.0f} tokens/s), {len(found.tokens)} "
        f"generated at {found.tokens_per_s:,.1f} tokens/s; ended by {found.finish}; "
        f"{found.kernels}, {found.threads} threads\n"
    )
