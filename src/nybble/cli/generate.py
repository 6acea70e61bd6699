"""`nybble generate`."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.flags import AheadFlags, Checkpoint, EngineFlags, SamplingFlags, expands, look_at
from nybble.cli.output import JsonFlag, OutputFormat, wants_json
from nybble.cli.terminal import LEAST_TIMED, shown
from nybble.errors import EngineError

if TYPE_CHECKING:
    from nybble.api.completion import Choice
    from nybble.api.generate import Generation

Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT...", help="Texts to go on from; - reads one from stdin."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--file", help="More prompts: one a line; JSON strings in a .jsonl file."),
]


@expands
def command(
    model: Checkpoint,
    prompts: Prompts = None,
    file: PromptFile = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take prompts as they are, without the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    *,
    sampling: SamplingFlags,
    n: Annotated[int, typer.Option("--n", min=1, help="Choices of each prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", min=0, help="Likeliest tokens to list (--json).")
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option("--prompt-logprobs", min=0, help="The same of the prompt.")
    ] = None,
    engine: EngineFlags,
    ahead: AheadFlags,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Generate text from a checkpoint, quantized or not; one prompt is streamed to the terminal.

    Greedy and at most 256 tokens where no option says otherwise. Several prompts run side by side.
    """
    from nybble.api.extras import needs_torch
    from nybble.cli.output import write_json
    from nybble.kernels.dispatch import choose
    from nybble.progress import waiting

    is_json = wants_json(json, output_format)
    if raw and system is not None:
        raise typer.BadParameter("--raw uses no template, so --system has no place; choose one")
    if not is_json and (logprobs is not None or prompt_logprobs is not None):
        raise typer.BadParameter("--logprobs and --prompt-logprobs are shown with --json alone")
    asked = _prompts(prompts, file)
    needs_torch("generate")
    options = engine.options(ahead)
    params = sampling.params({}, n=n, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    look_at(model)
    with waiting("compiling the kernels, once"):
        choose()
    from nybble.api.generate import generate

    is_streamed = len(asked) == n == 1 and not is_json
    screen = _Screen()
    try:
        found = generate(
            model,
            asked,
            params,
            raw=raw,
            system=system,
            options=options,
            on_text=screen.show if is_streamed else None,
        )
    except KeyboardInterrupt:
        screen.end_line()
        raise
    if is_json:
        write_json(found.as_json())
    else:
        _write(found, is_streamed=is_streamed)
    choices = [c for done in found.completions for c in done.choices]
    failed = [c.error for c in choices if c.error]
    if failed:
        raise EngineError(failed[0])
    if params.grammar is not None and any(c.finish == "length" for c in choices):
        sys.stderr.write(
            "warning: a text was cut off before its grammar was complete, by --max-tokens or the "
            "context\n"
        )


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    given = prompts or []
    if given.count("-") > 1:
        raise typer.BadParameter("- reads all of stdin, and was given twice", param_hint="PROMPT")
    found = [_stdin() if prompt == "-" else prompt for prompt in given]
    if "" in found:
        empty = "stdin, given as -, is empty" if given[found.index("")] == "-" else "it is empty"
        raise typer.BadParameter(empty, param_hint="PROMPT")
    if file is not None:
        found += _read_prompts(file)
    if not found:
        raise typer.BadParameter("give a PROMPT, or prompts in a --file")
    return found


def _read_prompts(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file}: cannot be read: {error}", param_hint="--file") from error
    if file.suffix != ".jsonl":
        return lines
    return [_json_prompt(file, number, line) for number, line in enumerate(lines, 1)]


def _json_prompt(file: Path, number: int, line: str) -> str:
    try:
        value = json_module.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, str):
        raise typer.BadParameter(
            f"{file}: prompt {number}: expected a JSON string", param_hint="--file"
        )
    return value


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"stdin: {error}; give it UTF-8", param_hint="PROMPT") from error


class _Screen:
    """Where text is streamed to."""

    def __init__(self) -> None:
        self._is_line_open = False

    def show(self, text: str) -> None:
        """Write a piece at once."""
        sys.stdout.write(shown(text, sys.stdout))
        sys.stdout.flush()
        self._is_line_open = not text.endswith("\n")

    def end_line(self) -> None:
        """On a terminal, what is said next begins a line."""
        if self._is_line_open and sys.stdout.isatty():
            sys.stdout.write("\n")
            sys.stdout.flush()


def _write(found: Generation, *, is_streamed: bool) -> None:
    """The texts, unless they are out already, then the figures on stderr."""
    if is_streamed:
        sys.stdout.write("\n")
    elif len(found.completions) > 1 or len(found.completions[0].choices) > 1:
        for i, done in enumerate(found.completions, 1):
            for j, choice in enumerate(done.choices, 1):
                name = f"{i}.{j}" if len(done.choices) > 1 else str(i)
                _write_choice(name, choice)
    sys.stdout.flush()
    if not any(choice.error for done in found.completions for choice in done.choices):
        sys.stderr.write(f"\n{_figures(found)}; {found.kernels}, {found.threads} threads\n")


def _write_choice(name: str, choice: Choice) -> None:
    ended = f" ({choice.error})" if choice.error else ""
    sys.stdout.write(f"[{name}]{ended} {shown(choice.text, sys.stdout)}\n\n")


def _figures(found: Generation) -> str:
    read = sum(done.usage.prompt_tokens for done in found.completions)
    made = sum(done.usage.tokens for done in found.completions)
    if len(found.completions) > 1:
        return (
            f"{len(found.completions)} prompts of {read:,} tokens, {made:,} generated, in "
            f"{found.seconds:.2f} s{_rate(' at', made, found.tokens_per_s)}"
        )
    prefill_s = found.prefill_s
    ended = found.completions[0].choices[0].finish
    return (
        f"{read} tokens of prompt in {prefill_s:.2f} s"
        f"{_rate(',', read, read / max(prefill_s, 1e-9))}; {made} generated"
        f"{_rate(' at', made, found.tokens_per_s)}; ended by {ended}"
    )


def _rate(lead: str, tokens: int, tokens_per_s: float) -> str:
    return f"{lead} {tokens_per_s:,.1f} tokens/s" if tokens >= LEAST_TIMED else ""
