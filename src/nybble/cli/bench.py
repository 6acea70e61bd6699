"""`nybble bench`: how fast, beside what the machine could."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from nybble.cli.flags import AheadFlags, EngineFlags, expands
from nybble.cli.output import JsonFlag, OutputFormat, amount, billions, wants_json, write_json
from nybble.cli.plan import Model

if TYPE_CHECKING:
    from nybble.api.bench import BenchOptions, EngineBench, Row
    from nybble.api.opening import OpenOptions
    from nybble.api.turns import Figures, Turn, TurnsBench, TurnsOptions

app = typer.Typer(help="Measure speed, beside what the machine could reach.", no_args_is_help=True)

_HEAD = ("model", "size", "params", "format", "activations", "threads", "test")
_FIGURES = ("tokens/s", "of bandwidth", "of compute")
_TURN_FIGURES = (
    *("prompt", "known", "hit", "first token", "without cache", "saved", "accepted"),
    *("a step", "tokens/s", "without drafts", "speed-up"),
)
#: A turn that hits less than this of what it could says why.
_GOOD_HIT = 0.95


@app.callback()
def _group() -> None:
    """Measure speed, beside what the machine could reach."""


@dataclass(frozen=True)
class SizeFlags:
    """What is measured: steps by themselves, or a conversation."""

    prompt: Annotated[
        int | None,
        typer.Option(
            "--prompt",
            "-p",
            min=0,
            help="Tokens of a prompt, 512; 0: no prefill. With --multi-turn those of rules and "
            "tools, 3,000 where the context has room.",
        ),
    ] = None
    generate: Annotated[
        int | None,
        typer.Option(
            "--generate",
            "-g",
            min=0,
            help="Tokens to decode, 128; 0: no decoding. With --multi-turn those of an answer, 64.",
        ),
    ] = None
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", "-b", help="Sequences side by side, one test for each: 1,2,4,8,16,32."
        ),
    ] = None
    repeat: Annotated[
        int | None,
        typer.Option("--repeat", min=1, help="Measurements of each test, 5; of a conversation, 1."),
    ] = None
    multi_turn: Annotated[
        bool,
        typer.Option(
            "--multi-turn", help="A conversation of an agent, with prefix cache and drafts."
        ),
    ] = False
    turns: Annotated[int | None, typer.Option("--turns", min=1, help="Of the conversation, 8.")] = (
        None
    )

    def check(self, ahead: AheadFlags) -> None:
        """A flag of one kind of measurement has no place in the other."""
        if self.multi_turn and self.batch is not None:
            raise typer.BadParameter("--multi-turn has one conversation at a time, so no --batch")
        if not self.multi_turn and self.turns is not None:
            raise typer.BadParameter("--turns are those of --multi-turn")
        if not self.multi_turn and ahead != AheadFlags():
            raise typer.BadParameter(
                "prefix cache and drafts are measured by --multi-turn; without it steps are timed "
                "alone"
            )

    def steps(self) -> BenchOptions:
        """Of steps by themselves."""
        from nybble.api.bench import BenchOptions

        batches = None if self.batch is None else _numbers(self.batch)
        given = {"prompt": self.prompt, "generate": self.generate, "batches": batches}
        return _made(BenchOptions, {**given, "repeats": self.repeat})

    def conversation(self) -> TurnsOptions:
        """Of a conversation."""
        from nybble.api.turns import TurnsOptions

        given = {"turns": self.turns, "prompt": self.prompt, "answer": self.generate}
        return _made(TurnsOptions, {**given, "repeats": self.repeat})


Options = TypeVar("Options")


def _made(kind: type[Options], given: Mapping[str, object]) -> Options:
    """Options of what was given. What is out of bounds is a usage error."""
    from nybble.errors import EngineError

    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except EngineError as error:
        raise typer.BadParameter(str(error)) from error


#: Steps go to the runner directly: a cache and drafts would only take memory.
_NOTHING_AHEAD = AheadFlags(prefix_cache=False, draft="off")


@app.command("engine")
@expands
def engine(
    model: Model,
    memory: Annotated[
        float | None,
        typer.Option("--memory", help="GiB for the state of sequences; default: by what is free."),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Activations in matmuls: bf16, f32 or int8.")
    ] = "bf16",
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="auto, bf16, fp8 or f32.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: all processors.")
    ] = None,
    *,
    sizes: SizeFlags,
    ahead: AheadFlags,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Prefill and decoding in tokens/s, and the share of the machine's limits that this is.

    The limits, bytes read and multiply-adds a second, are measured in the same run. Decoding is
    compared over packed bytes: of experts, those that tokens are expected to choose.

    --multi-turn: what an agent waits for in each turn of a conversation, with prefix cache and
    drafts, and without them in the same run.
    """
    is_json = wants_json(json, output_format)
    flags = EngineFlags(
        memory=memory, precision=precision, kv_cache_dtype=kv_cache_dtype, threads=threads
    )
    sizes.check(ahead)
    opening = flags.options(ahead if sizes.multi_turn else _NOTHING_AHEAD)
    found, text = (_talk if sizes.multi_turn else _steps)(model, sizes, opening)
    if found.conditions.is_disturbed:
        sys.stderr.write("other processes kept the machine busy: measure again when it is quiet\n")
    if is_json:
        write_json(found.as_json())
    else:
        sys.stdout.write(text)


def _steps(model: Path, sizes: SizeFlags, opening: OpenOptions) -> tuple[EngineBench, str]:
    from nybble.api.bench import bench_engine
    from nybble.progress import Display

    options = sizes.steps()
    with Display() as progress:
        found = bench_engine(model, options, opening, progress=progress)
    return found, render(found)


def _talk(model: Path, sizes: SizeFlags, opening: OpenOptions) -> tuple[TurnsBench, str]:
    from nybble.api.turns import bench_turns
    from nybble.progress import Display

    options = sizes.conversation()
    with Display() as progress:
        found = bench_turns(model, options, opening, progress=progress)
    return found, render_turns(found)


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


def _line(cells: Sequence[str]) -> str:
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


def render_turns(found: TurnsBench) -> str:
    """A Markdown table with a row for each turn and one for all, what they mean, and the line that
    says where it was measured."""
    from nybble.api.turns import Figures

    of_all = found.figures
    lines = [
        _line((*_HEAD, *_TURN_FIGURES)),
        _line(["---"] * len(_HEAD) + ["--:"] * len(_TURN_FIGURES)),
        *(_line(_turn_cells(found, turn, Figures((turn,)))) for turn in found.turns),
        _line(_all_cells(found, of_all)),
    ]
    told = [
        f"turn {turn.number}: {turn.missed}"
        for turn in found.turns
        if turn.missed and turn.cached < _GOOD_HIT * turn.known
    ]
    equal = sum(turn.is_equal for turn in found.turns)
    return "\n".join(
        [
            *lines,
            "",
            "known: tokens of the prompt that were computed before; hit: of these from the cache; "
            "a step: tokens that a step of decoding makes",
            f"{found.ahead}{_drafting(found)}; {equal} of {len(found.turns)} answers are equal "
            "without them",
            *told,
            f"{found.conditions}\n",
        ]
    )


def _drafting(found: TurnsBench) -> str:
    by_position = ", ".join(f"{share:.2f}" for share in found.acceptance)
    accepted = f"; accepted by position: {by_position}" if by_position else ""
    return accepted + (f"; {found.drafting}" if found.drafting else "")


def _turn_cells(found: TurnsBench, turn: Turn, figures: Figures) -> list[str]:
    sizes = [f"{turn.prompt:,}", f"{turn.known:,}"]
    return [*_model_cells(found, f"turn {turn.number}"), *sizes, *_figure_cells(figures)]


def _all_cells(found: TurnsBench, figures: Figures) -> list[str]:
    sizes = [f"{sum(turn.prompt for turn in found.turns):,}"]
    sizes.append(f"{sum(turn.known for turn in found.turns):,}")
    return [*_model_cells(found, "all"), *sizes, *_figure_cells(figures)]


def _model_cells(found: TurnsBench, test: str) -> list[str]:
    return [
        found.model,
        amount(found.traffic.stored_bytes),
        billions(found.traffic.parameters),
        found.format,
        found.precision,
        str(found.conditions.threads),
        test,
    ]


def _figure_cells(figures: Figures) -> list[str]:
    return [
        _percent(figures.hit_rate),
        f"{figures.first_s:.3f} s",
        f"{figures.plain_first_s:.3f} s",
        f"{figures.saved_s:.3f} s",
        _percent(figures.acceptance),
        f"{figures.accepted_length:.2f}",
        f"{figures.tokens_per_s:,.1f}",
        f"{figures.plain_tokens_per_s:,.1f}",
        f"{figures.speed_up:.2f}x",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
