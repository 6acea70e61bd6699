"""The command line: arguments in, tables out. Heavy modules are imported inside the commands, so
that help is quick."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Annotated, NoReturn

import typer

import nybble
from nybble.cli import (
    bench,
    chat,
    check,
    convert,
    diff,
    doctor,
    evaluate,
    generate,
    inspect,
    kernels,
    plan,
    quantize,
    repair,
    serve,
)
from nybble.errors import NybbleError

app = typer.Typer(
    name="nybble",
    help="Four-bit LLM checkpoints: plan, quantize, check, repair, convert, measure, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.command)
app.command("quantize", cls=quantize.Command)(quantize.command)
app.command("check")(check.command)
app.command("repair")(repair.command)
app.command("convert")(convert.command)
app.command("inspect")(inspect.command)
app.command("diff")(diff.command)
app.command("perplexity")(evaluate.perplexity)
app.command("eval")(evaluate.evaluate)
app.command("reference")(evaluate.reference)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("serve")(serve.command)
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.command)
app.add_typer(kernels.app, name="kernels")


INTERRUPTED = 130
_interrupts: list[int] = []  # signals that came, as not every library keeps KeyboardInterrupt


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"nybble {nybble.__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Four-bit LLM checkpoints: plan, quantize, check, repair, convert, measure, serve."""


def _watch_interrupts() -> None:
    def note(number: int, frame: FrameType | None) -> None:
        _interrupts.append(number)
        signal.default_int_handler(number, frame)

    is_ours = threading.current_thread() is threading.main_thread()
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)


def _was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is among what led to an error that libraries make of it as they load."""
    if _interrupts:
        return True
    seen: set[int] = set()
    ahead: list[BaseException | None] = [error]
    while ahead:
        found = ahead.pop()
        if isinstance(found, KeyboardInterrupt):
            return True
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            ahead += [found.__cause__, found.__context__]
    return False


def _end_interrupted() -> NoReturn:
    sys.stderr.write("interrupted\n")
    sys.exit(INTERRUPTED)


def main() -> None:
    """Run the command line. Errors become one line on stderr and the exit code of their kind."""
    _watch_interrupts()
    try:
        app(prog_name="nybble")  # also under `python -m`
    except NybbleError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as done:
        if done.code == INTERRUPTED:  # typer's answer to Ctrl-C
            stays = ""
            if "quantize" in sys.argv:
                stays = "; what is written stays, --resume continues"
            elif "--spill" in sys.argv:
                stays = "; the layers that are done stay, the same command goes on from there"
            sys.stderr.write(f"interrupted{stays}\n")
        raise
    except KeyboardInterrupt:
        _end_interrupted()
    except (ImportError, SystemError) as error:  # what libraries make of Ctrl-C while they load
        if not _was_interrupted(error):
            raise
        _end_interrupted()
    except BrokenPipeError:  # `nybble ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
