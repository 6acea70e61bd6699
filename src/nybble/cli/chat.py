"""`nybble chat`."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.flags import AheadFlags, Checkpoint, EngineFlags, SamplingFlags, expands, look_at
from nybble.cli.terminal import DIM, LEAST_TIMED, PLAIN, has_colours, shown
from nybble.errors import ContextTooLong, NybbleError, OutOfPages, TextError

if TYPE_CHECKING:
    from nybble.api.chat import Conversation, Piece

HELP = """\
/reset         begin anew; the system message stays
/system TEXT   another system message, and begin anew; without TEXT: none
/undo          take the last question and its answer back
/save FILE     write the conversation as JSON
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer
//...          a message that begins with /
"""


@expands
def command(
    model: Checkpoint,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="For templates that leave the choice."),
    ] = None,
    *,
    sampling: SamplingFlags,
    engine: EngineFlags,
    ahead: AheadFlags,
) -> None:
    """Talk with a model on the terminal: history, streamed answers, thinking dimmed.

    Sampling follows the folder's generation_config.json where no option says otherwise, with
    another seed for every answer. /help lists what can be typed. With a pipe for stdin, every line
    is a message; if one fails, the exit code is 1.
    """
    from nybble.api.extras import needs_torch
    from nybble.kernels.dispatch import choose
    from nybble.progress import waiting

    needs_torch("chat")
    options = engine.options(ahead)
    look_at(model)
    with waiting("compiling the kernels, once"):
        choose()
    from dataclasses import asdict

    from nybble.api.chat import Conversation
    from nybble.api.llm import LLM
    from nybble.engine.request import MOST_TOKENS
    from nybble.text.generation_config import sampling_defaults

    variables: dict[str, object] = {} if thinking is None else {"enable_thinking": thinking}
    params = sampling.params({"max_tokens": MOST_TOKENS, **sampling_defaults(model)})
    with LLM(model, **asdict(options)) as llm:
        llm.render([{"role": "user", "content": ""}], variables=variables)  # or says why not
        talk = Conversation(llm, params, system, variables)
        sys.stderr.write(f"{model}, {llm.context:,} tokens of context; /help\n")
        terminal = Terminal(talk)
        terminal.run()
    if terminal.has_failed and not terminal.is_person:
        raise typer.Exit(1)


class Terminal:
    """A conversation with the person at stdin: answers to stdout, everything else to stderr.

    `has_failed` says that a message got no answer.
    """

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.is_person = sys.stdin.isatty()
        self.has_colours = has_colours(sys.stdout)
        self.has_failed = False
        self._is_dim = False

    def run(self) -> None:
        """Until /quit or the end of stdin. Ctrl-C at a terminal ends an answer, not the program."""
        if self.is_person:
            _edit_lines()
        while (line := self._read()) is not None:
            try:
                if not self._obey(line):
                    return
            except NybbleError as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:
                if not self.is_person:
                    raise
                self._end_answer("stopped")

    def _read(self) -> str | None:
        """The next line, None at the end."""
        while True:
            try:
                if self.is_person:
                    return _ask()
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
            except EOFError:
                sys.stderr.write("\n")
                return None
            except KeyboardInterrupt:
                if not self.is_person:
                    raise
                sys.stderr.write("\n")  # as shells do: a fresh line
            except UnicodeDecodeError as error:
                raise TextError(f"stdin: {error}; give it UTF-8") from error

    def _obey(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
            return True
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/quit":
            return False
        if word == "/reset":
            self.talk.reset()
            self._say("begun anew")
        elif word == "/system":
            self.talk.system = rest or None
            self.talk.reset()
            self._say("begun anew, " + ("with that system message" if rest else "without one"))
        elif word == "/undo":
            taken = self.talk.undo()
            self._say("there is nothing to take back" if taken is None else f"taken back: {taken}")
        elif word == "/save":
            self._save(rest)
        else:
            self._say(HELP if word == "/help" else f"{word} is no command\n{HELP}")
        return True

    def _answer(self, question: str) -> None:
        is_begun = False
        try:
            with closing(self.talk.ask(question)) as pieces:
                for piece in pieces:
                    is_begun = True
                    self._show(piece)
        except NybbleError as error:
            self.has_failed = True
            if is_begun:
                self._end_line()
            self._say(f"error: {error}{self._way_out(error)}")
            return
        self._end_answer(self._why_cut())

    def _way_out(self, error: NybbleError) -> str:
        if isinstance(error, (ContextTooLong, OutOfPages)) and self.talk.messages:
            return "; or make room: /undo takes the last answer back, /reset begins anew"
        return ""

    def _why_cut(self) -> str:
        if self.talk.finish == "stop":
            return ""
        if self.talk.is_full:
            return "cut off, no room for more tokens: /undo or /reset"
        return "ended by --max-tokens"

    def _show(self, piece: Piece) -> None:
        if piece.is_thinking != self._is_dim:
            self._turn(is_dim=piece.is_thinking)
        sys.stdout.write(shown(piece.text, sys.stdout))
        sys.stdout.flush()

    def _turn(self, *, is_dim: bool) -> None:
        """Begin or end thinking: dimmed, or in its tags where nothing can be dimmed."""
        begin, end = (DIM, PLAIN) if self.has_colours else ("<think>\n", "\n</think>")
        sys.stdout.write(begin if is_dim else f"{end}\n\n")
        self._is_dim = is_dim

    def _end_answer(self, note: str) -> None:
        self._end_line()
        usage, told = self.talk.usage, []
        if usage is not None:
            is_timed = usage.tokens >= LEAST_TIMED
            rate = f", {usage.tokens_per_s:,.1f} tokens/s" if is_timed else ""
            used = f"context {self.talk.context_used:,} of {self.talk.llm.context:,}"
            told = [f"{usage.tokens} tokens{rate}", used]
        if note:
            told.append(note)
        if told:
            self._say(f"[{'; '.join(told)}]\n")

    def _end_line(self) -> None:
        if self._is_dim:
            self._turn(is_dim=False)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _save(self, name: str) -> None:
        if not name:
            raise TextError("/save needs the name of a file")
        document = {
            "schema": "nybble.chat/1",
            "model": str(self.talk.llm.folder),
            "messages": self.talk.everything(),
        }
        try:
            with open(name, "x", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise TextError(f"{name}: not saved: {error.strerror or error}") from error
        self._say(f"saved: {name}")

    def _say(self, text: str) -> None:
        line = shown(text.rstrip("\n"), sys.stderr)
        sys.stderr.write(f"{DIM}{line}{PLAIN}\n" if has_colours(sys.stderr) else f"{line}\n")
        sys.stderr.flush()


def _edit_lines() -> None:
    """Keys that edit the line, and the history of what was typed."""
    try:
        import readline  # noqa: F401
    except ImportError:  # a Python built without it
        return


def _ask() -> str:
    """A line of the person at the terminal; the prompt is no part of stdout's text."""
    if sys.stdout.isatty():
        return input("> ")
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input()
