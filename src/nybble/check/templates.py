"""Rules about the chat template: whether it is there, is the source's, and what makes it fail.

A template that will not render is found by rendering: a few short conversations, in a process of
its own with little memory and time. Each is one that agents and clients really send. Judges no
wording: a template may say what it likes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.errors import CheckpointError, TextError
from nybble.text.chat import MAX_TEMPLATE_BYTES, configured_template
from nybble.text.isolated import Conversation, Rendered, try_template

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
_LEGACY = "chat_template.json"

# Words that no template writes of its own accord.
_USER, _SYSTEM, _RESULT, _THOUGHT = "quartz harbour", "amber rule", "seven degrees", "slate thought"
_CITY = "Reykholt"

_user: dict[str, object] = {"role": "user", "content": _USER}
_system: dict[str, object] = {"role": "system", "content": _SYSTEM}
_answer: dict[str, object] = {"role": "assistant", "content": "Yes."}
_result: dict[str, object] = {
    "role": "tool",
    "tool_call_id": "call00001",
    "name": "weather",
    "content": _RESULT,
}
_tool: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which city."}},
            "required": ["city"],
        },
    },
}


def _calls(arguments: object, **message: object) -> dict[str, object]:
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }
    return {"role": "assistant", **message, "tool_calls": [call]}


def _parts(kind: str) -> Conversation:
    image: dict[str, object] = {"type": kind}
    if kind == "image_url":
        image["image_url"] = {"url": "data:image/png;base64,"}
    return Conversation([{"role": "user", "content": [image, {"type": "text", "text": _USER}]}])


_ARGUMENTS = {"city": _CITY}
_PROBES: dict[str, Conversation] = {
    "plain": Conversation([_user]),
    "parts": Conversation([{"role": "user", "content": [{"type": "text", "text": _USER}]}]),
    "no user turn": Conversation([_system, _answer]),
    "tool calls": Conversation([_user, _calls(_ARGUMENTS, content=""), _result], [_tool]),
    "null content": Conversation([_user, _calls(_ARGUMENTS, content=None), _result], [_tool]),
    "no content": Conversation([_user, _calls(_ARGUMENTS), _result], [_tool]),
    "developer": Conversation([{"role": "developer", "content": _SYSTEM}, _user]),
    "string arguments": Conversation(
        [_user, _calls(json.dumps(_ARGUMENTS), content=""), _result], [_tool]
    ),
    "image": _parts("image"),
    "image_url": _parts("image_url"),
    "thinking": Conversation(
        [_user, {**_answer, "reasoning_content": _THOUGHT}, _user],
        switches={"preserve_thinking": True},
    ),
}


@dataclass(frozen=True, slots=True)
class FoundTemplate:
    """The template that counts, or why there is none to use (`fault`); `file` is where it is."""

    file: str
    source: str
    fault: str = ""


@cache
def _nothing() -> dict[str, Rendered]:
    return {}


def find_template(survey: Survey) -> FoundTemplate | None:
    """The chat template of a checkpoint: its own file, or that of tokenizer_config.json."""
    if TEMPLATE in survey.names:
        try:
            if (size := survey.files.size(TEMPLATE)) > MAX_TEMPLATE_BYTES:
                words = f"{size:,} bytes; at most {MAX_TEMPLATE_BYTES:,} are read"
                return FoundTemplate(TEMPLATE, "", words)
            return FoundTemplate(TEMPLATE, survey.files.read(TEMPLATE).decode())
        except CheckpointError as error:
            return FoundTemplate(TEMPLATE, "", str(error))
        except UnicodeDecodeError as error:
            return FoundTemplate(TEMPLATE, "", f"it is not UTF-8 at byte {error.start}")
    try:
        config = survey.documents.get(TOKENIZER_CONFIG, {})
        source = configured_template(Path(TOKENIZER_CONFIG), config)
    except TextError as error:
        return FoundTemplate(TOKENIZER_CONFIG, "", str(error))
    return None if source is None else FoundTemplate(TOKENIZER_CONFIG, source)


def probe(survey: Survey) -> Mapping[str, Rendered]:
    """What became of each conversation, by its name; empty without a template, and what was not
    tried is missing."""
    found = find_template(survey)
    if found is None or found.fault:
        return _nothing()
    config = survey.documents.get(TOKENIZER_CONFIG, {})
    tokens = {
        key: config[key]
        for key in sorted(config)
        if key.endswith("_token") and isinstance(config[key], (str, dict))
    }
    return _probe(found.source, json.dumps(tokens))


@lru_cache(maxsize=8)
def _probe(source: str, tokens: str) -> Mapping[str, Rendered]:
    # Two rounds: most templates are never asked for parts, some know nothing else.
    names = list(_PROBES)
    tried = try_template(source, json.loads(tokens), list(_PROBES.values()))
    found = dict(zip(names, tried, strict=False))
    plain, parts = found.get("plain"), found.get("parts")
    if plain and parts and not _says(plain, _USER) and _says(parts, _USER):
        again = [_in_parts(conversation) for conversation in _PROBES.values()]
        tried = try_template(source, json.loads(tokens), again)
        found = dict(zip(names, tried, strict=False))
    return found


def _in_parts(conversation: Conversation) -> Conversation:
    messages = []
    for message in conversation.messages:
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": [{"type": "text", "text": content}]}
        messages.append(message)
    return Conversation(messages, conversation.tools, conversation.switches)


def _says(rendered: Rendered | None, *words: str) -> bool:
    return rendered is not None and rendered.is_text and all(w in rendered.text for w in words)


def _is_usable(survey: Survey) -> bool:
    return _says(probe(survey).get("plain"), _USER)


def _is_inherited(survey: Survey) -> bool:
    """The source has the very same template."""
    if survey.source is None:
        return False
    ours, theirs = find_template(survey), find_template(survey.source)
    return ours is not None and theirs is not None and _same(ours.source, theirs.source)


def _same(one: str, other: str) -> bool:
    return one.replace("\r\n", "\n").strip() == other.replace("\r\n", "\n").strip()


def _file(survey: Survey) -> str:
    found = find_template(survey)
    return found.file if found else ""


# -------------------------------------------------------------------------------- there, and theirs


def _missing(survey: Survey) -> Iterator[Finding]:
    if find_template(survey) is not None or not survey.config:
        return
    if survey.source is not None:
        if (theirs := find_template(survey.source)) is not None:
            yield MISSING.finding(
                f"the source has a chat template in {theirs.file}, this checkpoint has none: "
                "expected the same one",
                file=TEMPLATE,
            )
    elif _chats(survey):
        yield MISSING.finding(
            f"{TOKENIZER_CONFIG} names tokens of a chat (<|im_start|> or alike), but there is no "
            f"{TEMPLATE} and no chat_template: expected one for a model that chats",
            file=TEMPLATE,
            severity=Severity.NOTE,
        )


def _chats(survey: Survey) -> bool:
    text = json.dumps(survey.documents.get(TOKENIZER_CONFIG, {}))
    return any(t in text for t in ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>"))


def _differs(survey: Survey) -> Iterator[Finding]:
    assert survey.source is not None
    ours, theirs = find_template(survey), find_template(survey.source)
    if ours is None or theirs is None or ours.fault or theirs.fault:
        return
    if not _same(ours.source, theirs.source):
        before, after = theirs.source.splitlines(), ours.source.splitlines()
        pairs = enumerate(zip(before, after, strict=False), 1)
        line = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)) + 1)
        yield DIFFERS.finding(
            f"{ours.file}: differs from the source's template from line {line} on "
            f"({len(before)} lines there, {len(after)} here): expected the same text",
            file=ours.file,
            line=line,
        )


def _twins(survey: Survey) -> Iterator[Finding]:
    places = _places(survey)
    first = next(iter(places), "")
    others = [file for file in places if not _same(places[file], places[first])]
    if not others:
        return
    inherited = survey.source is not None and _places(survey.source) == places
    yield TWINS.finding(
        f"{' and '.join([first, *others])} hold different chat templates: engines that read "
        f"{first} and those that read {others[0]} prompt the model differently",
        [first, *others],
        file=first,
        severity=Severity.NOTE if inherited else None,
    )


def _places(survey: Survey) -> dict[str, str]:
    """Every default template by the file it is in."""
    found = {}
    own = find_template(survey)
    if own and not own.fault:
        found[own.file] = own.source
    for file in (TOKENIZER_CONFIG, _LEGACY):
        try:
            source = configured_template(Path(file), survey.documents.get(file, {}))
        except TextError:
            continue
        if source is not None:
            found[file] = source
    return found


# ---------------------------------------------------------------------------------------- rendering


def _fails(survey: Survey) -> Iterator[Finding]:
    found = find_template(survey)
    if found is None:
        return
    if found.fault:
        yield FAILS.finding(f"{found.file}: the chat template: {found.fault}", file=found.file)
        return
    tried = probe(survey)
    plain = tried.get("plain") or Rendered()
    if plain.is_missing_library:
        words = f"{found.file}: the chat template was not tried: {plain.failure}"
        yield FAILS.finding(words, file=found.file, severity=Severity.NOTE)
    elif not plain.is_text:
        yield FAILS.finding(
            f"{found.file}: one user turn, the plainest conversation, does not render: "
            f"{_why(plain)}",
            file=found.file,
        )
    elif not _says(plain, _USER):
        yield FAILS.finding(
            f"{found.file}: one user turn renders to {len(plain.text)} characters without the "
            "user's words: the model would answer nothing that was asked",
            file=found.file,
        )


def _why(rendered: Rendered) -> str:
    return f'it says "{rendered.refusal}"' if rendered.refusal else rendered.failure


def _no_user(survey: Survey) -> Iterator[Finding]:
    yield from _tries(NO_USER, survey, "a conversation without a user turn", ("no user turn",))


def _tool_turn(survey: Survey) -> Iterator[Finding]:
    if not _knows_tools(survey):
        return
    tried = probe(survey)
    forms = ("tool calls", "string arguments", "null content", "no content")
    if not any(_says(tried.get(form), _CITY, _RESULT) for form in forms):
        what = "a turn of tool calls and its result"
        yield from _tries(TOOL_TURN, survey, what, forms[:1], (_CITY, _RESULT))
    elif _says(tried.get("tool calls"), _CITY, _RESULT):
        # Most servers make null an empty text.
        what = "a turn of tool calls whose content is null or missing"
        mild = Severity.NOTE
        yield from _tries(TOOL_TURN, survey, what, forms[2:], (_CITY, _RESULT), mild)


def _knows_tools(survey: Survey) -> bool:
    found = find_template(survey)
    return found is not None and "tool" in found.source and _is_usable(survey)


def _developer(survey: Survey) -> Iterator[Finding]:
    what = "a message of the role developer"
    yield from _tries(DEVELOPER, survey, what, ("developer",), (_SYSTEM,))


def _string_arguments(survey: Survey) -> Iterator[Finding]:
    # What knows no tool calls at all is another rule's.
    if _knows_tools(survey) and _says(probe(survey).get("tool calls"), _CITY):
        what = "tool arguments given as a JSON text"
        yield from _tries(STRING_ARGUMENTS, survey, what, ("string arguments",), (_CITY,))


def _image(survey: Survey) -> Iterator[Finding]:
    if not advertises_vision(survey) or not _is_usable(survey):
        return
    tried, plain = probe(survey), probe(survey).get("parts")
    text = plain.text if plain else ""
    forms = [tried[name] for name in ("image", "image_url") if name in tried]
    if not forms or any(_says(r, _USER) and r.text != text for r in forms):
        return
    why = next((_why(r) for r in forms if not r.is_text), "it leaves no trace in the prompt")
    yield IMAGE.finding(
        f"{_file(survey)}: config.json has a vision tower, but a message with an image does not "
        f"render as one: {why}",
        file=_file(survey),
        severity=Severity.NOTE if _is_inherited(survey) else None,
    )


def _thinking(survey: Survey) -> Iterator[Finding]:
    found = find_template(survey)
    if found is None or "<think>" not in found.source or not _is_usable(survey):
        return
    tried = probe(survey).get("thinking")
    if tried is not None and not _says(tried, _THOUGHT):
        yield THINKING.finding(
            f"{found.file}: writes <think>, but drops the reasoning of earlier turns with "
            "preserve_thinking=true too",
            file=found.file,
        )


def _tries(
    rule: Rule,
    survey: Survey,
    what: str,
    names: tuple[str, ...],
    words: tuple[str, ...] = (),
    severity: Severity | None = None,
) -> Iterator[Finding]:
    """One finding if any of the conversations does not render, or not with these words."""
    if not _is_usable(survey):
        return
    tried = probe(survey)
    bad = [(n, tried[n]) for n in names if n in tried and not _says(tried[n], *words)]
    if not bad:
        return
    name, first = bad[0]
    why = _why(first) if not first.is_text else "it renders, but what it says is left out"
    detail = f" ({name})" if len(names) > 1 else ""
    # What its author refuses in words is a decision; what breaks or vanishes is an accident.
    is_mild = bool(first.refusal) or _is_inherited(survey)
    yield rule.finding(
        f"{_file(survey)}: {what} does not render{detail}: {why}",
        file=_file(survey),
        severity=Severity.NOTE if is_mild else severity,
    )


def advertises_vision(survey: Survey) -> bool:
    """config.json describes a vision tower, and does not say that only the language model is
    here."""
    vision = survey.config.get("vision_config")
    return isinstance(vision, Mapping) and survey.config.get("language_model_only") is not True


_JINJA2 = frozenset({"jinja2"})
_SOURCE = frozenset({"source"})
_NO_QUERY = (
    "https://github.com/langgenius/dify/issues/33152",
    "https://github.com/lmstudio-ai/lmstudio-bug-tracker/issues/1855",
    "https://github.com/lmstudio-ai/lmstudio-bug-tracker/issues/1586",
)

MISSING = Rule(
    "NB506",
    "template-missing",
    Severity.WARNING,
    "The chat template is missing",
    "Without a chat template a server refuses chat requests, or falls back to a format that the "
    "model was not trained on. Quantizers that write only config and weights leave it behind.",
    "Copy chat_template.jinja (or chat_template of tokenizer_config.json) from the source.",
    _missing,
    threads=(
        "https://github.com/jundot/omlx/issues/2005",
        "https://github.com/unslothai/unsloth/issues/2744",
    ),
    is_repairable=True,
)
DIFFERS = Rule(
    "NB507",
    "template-differs",
    Severity.WARNING,
    "The chat template is not the source's",
    "A changed template prompts the model in a form that the original was not measured with: tool "
    "calls and reasoning break before any benchmark does. Community checkpoints often carry "
    '"fixed" templates; that may be wanted, and should be known.',
    "Copy the source's template, or keep the change on purpose and ignore this rule.",
    _differs,
    threads=("https://github.com/QwenLM/Qwen3/issues/1831",),
    is_repairable=True,
    needs=_SOURCE,
)
FAILS = Rule(
    "NB508",
    "template-fails",
    Severity.ERROR,
    "The chat template cannot be used",
    "It does not compile, is refused by jinja2's sandbox, does not end, or fails or says nothing "
    "for a single user turn. Every chat request to a server with this checkpoint fails, or is "
    "answered without the question. Templates of checkpoints are programs by strangers: one that "
    "reaches for attributes beginning with an underscore is an attack.",
    "Take the template of the original model; where the sandbox refused it, report the checkpoint.",
    _fails,
    threads=("https://github.com/janhq/jan/issues/6123",),
    is_repairable=True,
    needs=_JINJA2,
)
NO_USER = Rule(
    "NB509",
    "template-no-user-turn",
    Severity.WARNING,
    "The chat template fails without a user turn",
    "Agents that compact their history, and clients that continue an answer, send conversations "
    "without a user message. Qwen's own templates refuse them (\"No user query found in "
    'messages"): a note. A template that breaks otherwise is a warning.',
    "Add a user message in the client, or use a template that renders without one.",
    _no_user,
    threads=_NO_QUERY,
    needs=_JINJA2,
)
TOOL_TURN = Rule(
    "NB510",
    "template-tool-turn",
    Severity.WARNING,
    "The chat template fails on a turn of tool calls alone",
    "An assistant's turn that only calls tools has null as content, or none at all, and the tool's "
    "result follows: that is the common case of every agent. A template that leaves out the call "
    "or the result ends the loop with an error, or with the same call again and again. One that "
    "only stumbles over null is a note: most servers make it an empty text.",
    "Make the template treat missing content as empty, and write calls and results.",
    _tool_turn,
    threads=("https://github.com/QwenLM/Qwen3/issues/1831",),
    needs=_JINJA2,
)
DEVELOPER = Rule(
    "NB511",
    "template-developer-role",
    Severity.NOTE,
    "The chat template fails on the role developer, or drops it",
    "Newer clients send the system prompt with the role developer. A template that refuses the "
    "role fails openly (Qwen's do); one that skips it answers without the instructions. More than "
    "half of the published templates do one or the other: servers map the role.",
    "Map developer to system in the server, or in the template.",
    _developer,
    threads=(
        "https://github.com/sgl-project/sglang/issues/40082",
        "https://github.com/ggml-org/llama.cpp/pull/20215",
    ),
    needs=_JINJA2,
)
STRING_ARGUMENTS = Rule(
    "NB512",
    "template-string-arguments",
    Severity.NOTE,
    "The chat template fails on tool arguments given as text",
    "The OpenAI API sends the arguments of a tool call as a JSON text; some templates want an "
    "object. Servers that parse the text first (vLLM, SGLang) are not affected, those that hand it "
    "on fail at the second turn of an agent.",
    "Use a server that parses arguments, or a template that takes both.",
    _string_arguments,
    threads=("https://github.com/QwenLM/Qwen3/issues/1831",),
    needs=_JINJA2,
)
IMAGE = Rule(
    "NB513",
    "template-image",
    Severity.WARNING,
    "Vision is advertised, but the chat template places no image",
    "config.json has a vision tower and the template fails on an image, or leaves no placeholder "
    "for it: images are refused, or accepted and silently discarded.",
    "Copy the chat template of the original vision model.",
    _image,
    threads=("https://github.com/ollama/ollama/issues/17501",),
    is_repairable=True,
    needs=_JINJA2,
)
THINKING = Rule(
    "NB514",
    "template-drops-thinking",
    Severity.NOTE,
    "The chat template cannot keep earlier reasoning",
    "Templates of reasoning models drop the reasoning of earlier turns; newer ones keep it with "
    "preserve_thinking, which agents need (empty tool arguments were reported without it) and "
    "which keeps the prompt a plain continuation, so that prefix caches hit.",
    "Use a template that knows preserve_thinking, if the model's authors offer one.",
    _thinking,
    threads=("https://github.com/earendil-works/pi/issues/3325",),
    needs=_JINJA2,
)
TWINS = Rule(
    "NB517",
    "template-twins",
    Severity.WARNING,
    "Two files hold different chat templates",
    "transformers prefers chat_template.jinja, other readers chat_template of "
    "tokenizer_config.json. Where the two differ, the same checkpoint is prompted in two ways, and "
    "scores of two engines cannot be compared.",
    "Keep one template; delete or update the other.",
    _twins,
    threads=("https://github.com/huggingface/transformers/pull/33957",),
    is_repairable=True,
)

RULES = (
    MISSING,
    DIFFERS,
    FAILS,
    NO_USER,
    TOOL_TURN,
    DEVELOPER,
    STRING_ARGUMENTS,
    IMAGE,
    THINKING,
    TWINS,
)
