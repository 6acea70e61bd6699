"""`nybble chat` and the flags of `nybble generate`: typed, piped, interrupted."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from nybble.cli import app
from nybble.errors import TextError

CARRIED = tiny.MODELS / "hybrid-chat-mtp"
CAT = "Tell me a short story about a cat."
STORY = "Once upon a time, there was a little girl named Lily."
QUICK = ("--temperature", "0", "-n", "24", "--memory", "0.2", "--max-context", "1024")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def run(*arguments: object, text: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


def piped(*lines: str, flags: tuple[str, ...] = QUICK) -> Any:
    """A chat with a pipe for stdin."""
    return run("chat", CARRIED, *flags, text="".join(f"{line}\n" for line in lines))


# ------------------------------------------------------------------------------------------- piped


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One conversation with every command in it."""
    saved = tmp_path_factory.mktemp("chat") / "saved.json"
    done = piped(
        CAT,
        "",
        "/undo",
        CAT,
        "And then?",
        "/undo",
        "/undo",
        "/undo",
        "/system You know cats.",
        CAT,
        f"/save {saved}",
        f"/save {saved}",
        "/save",
        "/nonsense",
        "//" + CAT,
        "/reset",
        CAT,
        "/quit",
        "never read",
    )
    assert done.exit_code == 0, done.output
    return done, saved


def test_every_line_is_answered_on_stdout(talk: tuple[Any, Path]) -> None:
    answers = talk[0].stdout
    assert answers.startswith(STORY)
    assert "\x1b" not in answers
    assert "tokens/s" not in answers
    assert answers.count("\n") >= 6


def test_an_undone_question_leaves_no_trace(talk: tuple[Any, Path]) -> None:
    answers = talk[0].stdout
    assert answers.count(STORY) >= 2  # again after /undo


def test_figures_and_answers_of_commands_are_on_stderr(talk: tuple[Any, Path]) -> None:
    told = talk[0].stderr
    assert len(re.findall(r"\[24 tokens, [\d,.]+ tokens/s; context \d+ of 1,024", told)) >= 3
    assert "ended by --max-tokens" in told
    assert "no room" not in told
    for words in (
        f"taken back: {CAT}",
        "taken back: And then?",
        "nothing to take back",
        "begun anew, with that system message",
        "begun anew",
        "/nonsense is no command",
        "/save needs the name of a file",
        "not saved: File exists",
    ):
        assert words in told, told
    assert "never read" not in told


def test_a_saved_conversation_has_all_messages(talk: tuple[Any, Path]) -> None:
    document = json.loads(talk[1].read_text())
    assert document["schema"] == "nybble.chat/1"
    assert [m["role"] for m in document["messages"]] == ["system", "user", "assistant"]
    assert document["messages"][0]["content"] == "You know cats."
    assert document["messages"][1]["content"] == CAT
    assert document["messages"][2]["content"] in talk[0].stdout


def test_the_history_is_read_by_the_model() -> None:
    done = piped(CAT, CAT)
    used = re.findall(r"context (\d+) of", done.stderr)
    first, second = map(int, used)
    assert second > 1.8 * first


def test_a_message_that_does_not_fit_is_an_error_and_the_talk_goes_on() -> None:
    long = "the cat sat on the mat " * 200
    done = piped(long, CAT, flags=("--temperature", "0", "-n", "8", "--max-context", "256"))
    assert done.exit_code == 1
    assert "error: the prompt has" in done.stderr
    assert "/undo" not in done.stderr  # there is no history to make shorter
    assert done.stdout.startswith("Once upon a time")


def test_a_full_context_is_told_from_max_tokens_and_names_the_way_out() -> None:
    flags = ("--temperature", "0", "--ignore-eos", "--max-context", "64")
    done = piped(CAT, CAT, "/undo", flags=flags)
    assert done.exit_code == 1
    assert "context 64 of 64; cut off, no room for more tokens" in done.stderr
    assert "--max-tokens" not in done.stderr
    [refused] = [line for line in done.stderr.split("\n") if line.startswith("error:")]
    assert "/undo" in refused
    assert "/reset" in refused


def test_a_few_tokens_have_no_speed() -> None:
    done = piped(CAT, flags=("--temperature", "0", "-n", "3"))
    assert done.exit_code == 0
    assert "[3 tokens; context" in done.stderr
    shown = run("generate", CARRIED, "Once", "--raw", "-n", 3)
    assert "tokens/s" not in shown.stderr
    assert "3 generated; ended by length" in shown.stderr


def test_thinking_is_marked_where_nothing_can_be_dimmed() -> None:
    done = piped(CAT, flags=(*QUICK, "--thinking"))
    assert done.stdout.startswith("<think>\n")
    assert "</think>" in done.stdout


def test_input_that_is_no_text_is_an_error() -> None:
    done = run("chat", CARRIED, *QUICK, text=b"caf\xe9\n")
    assert isinstance(done.exception, TextError)
    assert "stdin:" in str(done.exception)


def test_a_folder_without_a_template_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(CARRIED, folder)
    (folder / "chat_template.jinja").unlink()
    done = run("chat", folder, *QUICK, text=CAT)
    assert isinstance(done.exception, TextError)
    assert "nybble generate" in str(done.exception)
    assert done.stdout == ""


def test_a_program_that_pipes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nybble", "chat", str(CARRIED), *QUICK],
        input=CAT.encode(),  # without an end of line
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(STORY.encode())
    assert b"\x1b" not in done.stdout + done.stderr


# -------------------------------------------------------------------------------------- a terminal


class Person:
    """Somebody at a terminal."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nybble", "chat", str(CARRIED), *flags],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm", **environment},
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(slave),
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, words: str, seconds: float = 60) -> str:
        """What came until these words, words included."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    data = os.read(self.master, 4096)
                except OSError:  # the other side is gone
                    raise AssertionError(self.seen) from None
                self.seen += data.decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def types(self, text: str) -> None:
        os.write(self.master, text.encode())

    def leaves(self) -> int:
        """The exit code."""
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:
                    break
        return self.process.wait(20)


def _take_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


@pytest.fixture
def people() -> Iterator[Any]:
    made: list[Person] = []

    def sit_down(*flags: str, **environment: str) -> Person:
        made.append(Person(*flags, **environment))
        return made[-1]

    yield sit_down
    for person in made:
        if person.process.poll() is None:
            person.process.kill()
            person.process.wait()
        os.close(person.master)


def test_a_person_is_asked_answered_and_told_the_speed(people: Any) -> None:
    person = people(*QUICK)
    person.wait_for("> ")
    person.types(CAT + "\n")
    person.wait_for(STORY)
    person.wait_for("tokens/s")
    person.wait_for("> ")
    person.types("\x04")  # Ctrl-D
    assert person.leaves() == 0


def test_an_interrupt_stops_the_answer_and_not_the_program(people: Any) -> None:
    person = people("--temperature", "0", "--ignore-eos", "-n", "100000", "--memory", "0.2")
    person.wait_for("> ")
    time.sleep(1)  # readline shows its prompt a moment before it listens
    person.types("\x03")  # at the prompt: a fresh line
    person.wait_for("> ")
    person.types(CAT + "\n")
    person.wait_for("Once upon")
    person.types("\x03")
    person.wait_for("stopped]")
    person.wait_for("> ")
    person.types("/undo\n")
    person.wait_for(f"taken back: {CAT}")
    person.wait_for("> ")
    person.types("/quit\n")
    assert person.leaves() == 0
    assert "Traceback" not in person.seen


def test_thinking_is_dimmed_on_a_terminal_that_has_colours(people: Any) -> None:
    person = people(*QUICK, "--thinking")
    person.wait_for("> ")
    person.types(CAT + "\n")
    person.wait_for(DIM)
    assert "<think>" not in person.wait_for(PLAIN)


def test_no_color_is_obeyed(people: Any) -> None:
    person = people(*QUICK, "--thinking", NO_COLOR="1")
    person.wait_for("> ")
    person.types(CAT + "\n")
    shown = person.wait_for("tokens/s")
    assert "<think>" in shown
    assert DIM not in shown


# ---------------------------------------------------------------------------------- nybble generate


def test_several_prompts_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time,\n\nThe cat\n")
    flags = ("--raw", "-n", 6, "--memory", 0.2, "--file", file, "--json")
    document = json.loads(run("generate", CARRIED, "Lily", *flags).stdout)
    assert document["schema"] == "nybble.generate/1"
    found = document["completions"]
    assert [done["prompt"] for done in found] == ["Lily", "Once upon a time,", "The cat"]
    alone = json.loads(run("generate", CARRIED, "The cat", "--raw", "-n", 6, "--json").stdout)
    assert alone["tokens"] == found[2]["tokens"]
    assert alone["logprobs"] == found[2]["logprobs"]
    shown = run("generate", CARRIED, "Lily", *flags[:-1])
    assert shown.exit_code == 0, shown.output
    assert all(f"[{i}]" in shown.stdout for i in (1, 2, 3))
    assert "3 prompts of" in shown.stderr


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one\\ntwo"\n"three"\n')
    shown = run("generate", CARRIED, "--raw", "-n", 1, "--file", file, "--json")
    assert [c["prompt"] for c in json.loads(shown.stdout)["completions"]] == ["one\ntwo", "three"]
    for text in ('{"a": 1}\n', '"half\n', "[" * 100_000):
        file.write_text(text)
        shown = run("generate", CARRIED, "--file", file)
        assert shown.exit_code == 2
        assert "prompt 1: expected a JSON string" in " ".join(shown.output.split())


def test_choices_stops_and_alternatives() -> None:
    common = ("--raw", "--json", "--memory", 0.2)
    flags = ("-n", 10, "--n", 3, "--temperature", 1, "--logprobs", 2, "--prompt-logprobs", 1)
    document = json.loads(run("generate", CARRIED, "Once upon a time,", *flags, *common).stdout)
    assert len(document["choices"]) == 3
    assert document["choices"][0]["tokens"] == document["tokens"]
    assert all(len(top) == 2 for top in document["top_logprobs"])
    assert document["prompt_logprobs"]["logprobs"][0] is None
    prompt = "Once upon a time, there was a little"
    whole = json.loads(run("generate", CARRIED, prompt, "-n", 20, *common).stdout)["text"]
    word = whole.split()[3]
    cut = json.loads(run("generate", CARRIED, prompt, "-n", 20, "--stop", word, *common).stdout)
    assert cut["text"] == whole[: whole.index(word)]
    assert cut["finish_reason"] == "stop"


def test_a_prompt_from_stdin() -> None:
    shown = run("generate", CARRIED, "-", "--raw", "-n", 2, "--json", text="Once upon")
    assert json.loads(shown.stdout)["prompt"] == "Once upon"


def test_an_interrupt_ends_generate_with_130() -> None:
    flags = ("--raw", "--ignore-eos", "-n", "1000000", "--memory", "0.2")
    running = subprocess.Popen(
        [sys.executable, "-m", "nybble", "generate", str(CARRIED), "Once upon", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert running.stdout is not None
    assert running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert told == b"interrupted\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-p", "0"], "top_p must be above 0"),
        (["--min-tokens", "9", "-n", "3"], "min_tokens must be at most max_tokens"),
        (["--logit-bias", "x=1"], "write ID=BIAS"),
        (["--kv-cache-dtype", "int4"], "choose auto, bf16, fp8 or f32"),
        (["--precision", "fp16"], "choose bf16, f32 or int8"),
        (["--regex", "a", "--json-object"], "choose one of"),
        (["--json-schema", "/nowhere"], "/nowhere: cannot be read"),
        (["--json-schema", "/"], "/: cannot be read"),
        (["--json-schema", __file__], "no JSON"),
        (["--raw", "--system", "x"], "--raw uses no template"),
        (["--logprobs", "1"], "with --json alone"),
        (["--prompt-logprobs", "1"], "with --json alone"),
        (["-", "-"], "given twice"),
        ([""], "PROMPT: it is empty"),
        (["-"], "stdin, given as -, is empty"),
        (["--n", "1000"], "n must be 1 to 128"),
        (["--memory", "0"], "memory must be"),
        (["--max-batched-tokens", "64"], "max_batched_tokens must be at least"),
    ],
)
def test_bad_flags_are_usage_errors(flags: list[str], words: str) -> None:
    prompt = [] if flags[-1] in ("-", "") else ["x"]
    shown = run("generate", CARRIED, *prompt, *flags)
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_a_wrong_path_is_answered_before_torch_is_loaded(command: str) -> None:
    words = ["nybble", command, "/nope", *["x"] * (command == "generate")]
    program = (
        f"import sys; sys.argv = {words}\n"
        "from nybble.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"False\n")
    assert done.stderr.startswith(b"error: /nope: ")


@pytest.mark.parametrize("link", ["raise ImportError from e", "raise ImportError", "raise"])
def test_an_interrupt_while_libraries_load_is_one_line(link: str) -> None:
    program = (
        "from nybble import cli\n"
        "def app(prog_name):\n"
        "    try:\n        raise KeyboardInterrupt\n"
        f"    except KeyboardInterrupt as e:\n        {link}\n"
        "cli.app = app\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_an_interrupt_that_a_library_swallows_is_one_line() -> None:
    program = (
        "import contextlib, signal\n"
        "from nybble import cli\n"
        "def app(prog_name):\n"
        "    with contextlib.suppress(KeyboardInterrupt):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    raise ImportError('numpy._core.umath failed to import')\n"
        "cli.app = app\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_an_import_that_fails_by_itself_is_not_an_interrupt() -> None:
    program = (
        "from nybble import cli\n"
        "def app(prog_name):\n    raise ImportError('libx')\n"
        "cli.app = app\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"ImportError: libx" in done.stderr


def test_a_grammar_that_was_cut_off_is_warned_of() -> None:
    pytest.importorskip("llguidance")
    cut = run("generate", CARRIED, "x", "--raw", "--regex", "[a-z]{20,30}", "-n", 2)
    assert cut.exit_code == 0
    assert "warning: a text was cut off" in cut.stderr
    whole = run("generate", CARRIED, "x", "--raw", "--regex", "yes|no", "-n", 9)
    assert whole.exit_code == 0
    assert "warning" not in whole.stderr


def test_no_prompt_is_a_usage_error() -> None:
    shown = run("generate", CARRIED)
    assert shown.exit_code == 2
    assert "PROMPT" in shown.output
