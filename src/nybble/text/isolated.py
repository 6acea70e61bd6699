"""A chat template tried in a process of its own, which has little memory and little time.

The sandbox bounds what a template builds; it cannot bound one comparison of two lists that name
each other sixty times over. A process can be ended. So templates that nobody vouches for are tried
here, and those that a user chose to run are rendered in `chat.py`.

Knows neither files nor what a conversation is for.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nybble.errors import MissingExtra, TextError
from nybble.text.chat import ChatTemplate

MEMORY_BYTES = 1 << 30
#: For one conversation, and processor time for all of them. A sound template takes milliseconds.
TIME_LIMIT_S = 2.0
CPU_LIMIT_S = 3
#: What the process may take by the clock: on a busy machine its start alone may take seconds.
WALL_LIMIT_S = 60.0
#: Of a prompt that is handed back. Conversations given here are a few lines long.
_TEXT_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given; `switches` are variables such as enable_thinking."""

    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rendered:
    """What became of one conversation: its text, or why there is none.

    `refusal` is the template's own raise_exception, `failure` anything else: an error in it, what
    the sandbox forbids, an end that does not come. `is_missing_library`: nothing was tried.
    """

    text: str = ""
    refusal: str = ""
    failure: str = ""
    is_missing_library: bool = False

    @property
    def is_text(self) -> bool:
        return not self.refusal and not self.failure


def try_template(
    source: str, config: Mapping[str, object], conversations: Sequence[Conversation]
) -> list[Rendered]:
    """Render each conversation, in order, as long as they come to an end.

    `config` is the content of tokenizer_config.json. After one that does not end, or takes too much
    memory, the rest is not tried and missing in the answer; that one says so.
    """
    request = {
        "source": source,
        "config": {k: v for k, v in config.items() if k.endswith("_token")},
        "conversations": [asdict(c) for c in conversations],
    }
    # -P: nothing is imported from the current folder, which may be the checkpoint.
    command = [sys.executable, "-P", "-m", "nybble.text.isolated"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=WALL_LIMIT_S,
            check=False,
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    # The last line may be cut off where the process was ended.
    lines = output.split(b"\n")[:-1]
    found = [Rendered(**json.loads(line)) for line in lines]
    if len(found) < len(conversations) and not (found and found[-1].is_missing_library):
        words = f"it does not end, or takes more than {MEMORY_BYTES >> 20} MiB, and was stopped"
        found.append(Rendered(failure=words))
    return found


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _render(template: ChatTemplate, conversation: Conversation) -> Rendered:
    from nybble.text import sandbox

    try:
        text = template.render(
            conversation.messages,
            tools=conversation.tools,
            time_limit_s=TIME_LIMIT_S,
            **conversation.switches,
        )
    except TextError as error:
        if isinstance(error.__cause__, sandbox.Refused):
            return Rendered(refusal=str(error.__cause__)[:300] or "without a word")
        return Rendered(failure=_reason(error))
    return Rendered(text=text[:_TEXT_LIMIT])


def _reason(error: TextError) -> str:
    """The sentence of chat.py without its file and its advice."""
    text = str(error).replace("the chat template failed: ", "", 1).removeprefix("the template")
    return text.lstrip(", :").rpartition("; ")[0][:300] or str(error)[:300]


def main() -> None:
    """Answer the request on standard input, a line for each conversation."""
    request = json.load(sys.stdin)
    _limit()

    def answer(rendered: Rendered) -> None:
        sys.stdout.write(json.dumps(asdict(rendered)) + "\n")
        sys.stdout.flush()

    where = Path("tokenizer_config.json")
    try:
        template = ChatTemplate.compile("the template", request["source"], where, request["config"])
    except MissingExtra as error:
        answer(Rendered(failure=str(error), is_missing_library=True))
        return
    except TextError as error:
        for _ in request["conversations"]:
            answer(Rendered(failure=_reason(error)))
        return
    for conversation in request["conversations"]:
        start = time.monotonic()
        answer(_render(template, Conversation(**conversation)))
        if time.monotonic() - start >= TIME_LIMIT_S:
            return  # the others would take as long


if __name__ == "__main__":
    main()
