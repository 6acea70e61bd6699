"""What a request body may hold: OpenAI's fields, and the extensions that engines share.

Every field is read with its bounds, what is known and cannot be done is refused by name, and so is
what is not known; NO_EFFECT lists the fields that are accepted and change nothing. A body becomes
an engine's SamplingParams and what the answer looks like; prompts become tokens elsewhere.

Sources: OpenAI API reference, "Create chat completion" and "Create completion"; the extensions as
in vLLM's documentation, "OpenAI-Compatible Server", extra parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nybble.engine.limits import MOST_PRIORITY
from nybble.engine.request import (
    MOST_ALTERNATIVES,
    MOST_BAD_WORDS,
    MOST_BIASES,
    MOST_CHOICES,
    MOST_GRAMMAR_BYTES,
    MOST_STOP_CHARACTERS,
    MOST_STOP_TOKENS,
    MOST_STOPS,
    MOST_TOKENS,
    Grammar,
    SamplingParams,
)
from nybble.errors import EngineError
from nybble.serve.errors import from_params, invalid, unsupported
from nybble.serve.fields import Fields, check_tokens, one_or_more

GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]

MOST_MESSAGES = 4_096
MOST_PROMPTS = 256
MOST_ANSWERS = 1_024
MOST_CHARACTERS = 1 << 24
MOST_SALT_CHARACTERS = 1_000
#: Of OpenAI's completions; chats go on until the context is full.
COMPLETION_TOKENS = 16

#: Accepted, and without effect: they describe the caller, or ask for what holds anyway.
NO_EFFECT = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
_NOT_YET_IN_CHAT = {
    "audio": "",
    "function_call": "",
    "functions": "",
    "prediction": "",
    "reasoning_effort": "chat_template_kwargs passes what this model's template knows",
    "tool_choice": "",
    "tools": "",
    "verbosity": "",
    "web_search_options": "",
}
_NOT_YET_IN_COMPLETIONS = {"suffix": "", "prompt_embeds": ""}
#: Of a message: a history as clients hand it back. Values that say nothing pass.
_NOT_YET_IN_MESSAGES = {
    "annotations": "",
    "audio": "",
    "function_call": "",
    "refusal": "",
    "tool_call_id": "",
    "tool_calls": "",
}
#: How the API calls what SamplingParams calls otherwise.
_NAMES = {"include_stop": "include_stop_str_in_output"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the model and the server allow: ids below `vocab`, `context` tokens of prompt and answer
    together. `defaults` are sampling options where a request names none."""

    vocab: int
    context: int
    defaults: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """What both kinds of request ask for. `cache_salt` divides the prefix cache further than keys
    do; `grammar_field` is the field that the grammar came from, if there is one."""

    model: str | None
    params: SamplingParams
    stream: bool
    include_usage: bool
    priority: int
    cache_salt: str = ""
    grammar_field: str | None = None


@dataclass(frozen=True, slots=True)
class ChatAsked:
    """A chat: what the template is given."""

    asked: Asked
    messages: tuple[Mapping[str, object], ...]
    switches: Mapping[str, object]
    add_generation_prompt: bool
    add_special: bool


@dataclass(frozen=True, slots=True)
class CompletionAsked:
    """Texts or token ids to go on from. `is_scored_only`: the prompt is echoed and nothing is
    added to it (max_tokens 0). `has_prompt_logprobs`: they were asked for beside the echo."""

    asked: Asked
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    add_special: bool
    is_scored_only: bool
    has_prompt_logprobs: bool


def read_chat(body: Mapping[str, object], bounds: Bounds) -> ChatAsked:
    """A body of /v1/chat/completions. Raises Refusal."""
    fields = Fields(body)
    fields.refuse(_NOT_YET_IN_CHAT)
    if fields.raw("modalities") not in (None, ["text"]):
        raise unsupported("modalities", "answers are text")
    messages = _messages(fields)
    switches = fields.unicode_mapping("chat_template_kwargs") or {}
    most = fields.whole("max_completion_tokens", 1, MOST_TOKENS)
    other = fields.whole("max_tokens", 1, MOST_TOKENS)
    if most is not None and other is not None and most != other:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; give one")
    alternatives = fields.whole("top_logprobs", 0, MOST_ALTERNATIVES)
    has_logprobs = fields.flag("logprobs")
    if alternatives is not None and not has_logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    found = ChatAsked(
        _asked(
            fields,
            bounds,
            max_tokens=most or other or min(bounds.context, MOST_TOKENS),
            logprobs=(alternatives or 0) if has_logprobs else None,
        ),
        messages,
        switches,
        fields.flag("add_generation_prompt", True),
        fields.flag("add_special_tokens"),
    )
    fields.finish()
    return found


def read_completion(body: Mapping[str, object], bounds: Bounds) -> CompletionAsked:
    """A body of /v1/completions. Raises Refusal."""
    fields = Fields(body)
    fields.refuse(_NOT_YET_IN_COMPLETIONS)
    prompts = _prompts(fields, bounds)
    echo = fields.flag("echo")
    most = fields.whole("max_tokens", 0, MOST_TOKENS)
    logprobs = fields.whole("logprobs", 0, MOST_ALTERNATIVES)
    if most == 0 and not echo:
        raise invalid("max_tokens", "max_tokens must be 1 or more, or echo true to score a prompt")
    asked = _asked(
        fields,
        bounds,
        # The engine always makes one token of a prompt; of a scored one it is not shown.
        max_tokens=COMPLETION_TOKENS if most is None else max(most, 1),
        logprobs=logprobs,
    )
    best_of = fields.whole("best_of", 1, MOST_CHOICES)
    if best_of is not None and best_of != asked.params.n:
        raise unsupported("best_of", "give n, and choose among the answers")
    if len(prompts) * asked.params.n > MOST_ANSWERS:
        raise invalid("n", f"n times the number of prompts must be at most {MOST_ANSWERS:,}")
    own = asked.params.prompt_logprobs
    if echo and logprobs is not None:
        scored = replace(asked.params, prompt_logprobs=max(logprobs, own or 0))
        asked = replace(asked, params=scored)
    add_special = fields.flag("add_special_tokens", True)
    fields.finish()
    return CompletionAsked(asked, prompts, echo, add_special, most == 0, own is not None)


def _asked(fields: Fields, bounds: Bounds, *, max_tokens: int, logprobs: int | None) -> Asked:
    fields.ignore(*NO_EFFECT)
    stream = fields.flag("stream")
    options = fields.inner("stream_options")
    include_usage = False
    if options is not None:
        if not stream:
            raise invalid("stream_options", "stream_options needs stream to be true")
        include_usage = options.flag("include_usage")
        options.ignore("include_obfuscation")
        options.finish()
    prompt_logprobs = fields.whole("prompt_logprobs", 0, MOST_ALTERNATIVES)
    if stream and prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "prompt_logprobs cannot be streamed; leave stream out")
    grammar_field, grammar = _grammar(fields)
    return Asked(
        fields.text("model", 1_000),
        replace(_params(fields, bounds, max_tokens, logprobs, prompt_logprobs), grammar=grammar),
        stream,
        include_usage,
        fields.whole("priority", -MOST_PRIORITY, MOST_PRIORITY) or 0,
        _cache_salt(fields),
        grammar_field,
    )


def _cache_salt(fields: Fields) -> str:
    """vLLM takes no empty one either: who sends it has most likely lost a secret."""
    salt = fields.text("cache_salt", MOST_SALT_CHARACTERS)
    if salt == "":
        raise invalid("cache_salt", "cache_salt must not be empty; leave it out")
    return salt or ""


def _params(
    fields: Fields,
    bounds: Bounds,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    vocab = bounds.vocab

    def real(name: str, low: float, high: float, otherwise: float) -> float:
        value = fields.real(name, low, high)
        return bounds.defaults.get(name, otherwise) if value is None else value

    top_k = fields.whole("top_k", -1, 2**31 - 1)
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=real("temperature", 0, 100, 1.0),
            # vLLM's clients say -1 for all.
            top_k=int(bounds.defaults.get("top_k", 0)) if top_k is None else max(top_k, 0),
            top_p=real("top_p", 0, 1, 1.0),
            min_p=real("min_p", 0, 1, 0.0),
            # OpenAI's seeds have a sign.
            seed=None if seed is None else seed % 2**64,
            ignore_eos=fields.flag("ignore_eos"),
            n=fields.whole("n", 1, MOST_CHOICES) or 1,
            min_tokens=fields.whole("min_tokens", 0, MOST_TOKENS) or 0,
            presence_penalty=real("presence_penalty", -2, 2, 0),
            frequency_penalty=real("frequency_penalty", -2, 2, 0),
            repetition_penalty=real("repetition_penalty", 0, 100, 1.0),
            logit_bias=fields.biases("logit_bias", MOST_BIASES, vocab),
            stop=one_or_more(
                fields.raw("stop"), lambda: fields.texts("stop", MOST_STOPS, MOST_STOP_CHARACTERS)
            ),
            stop_token_ids=fields.tokens("stop_token_ids", MOST_STOP_TOKENS, vocab),
            include_stop=fields.flag("include_stop_str_in_output"),
            bad_words=fields.texts("bad_words", MOST_BAD_WORDS, MOST_STOP_CHARACTERS),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    except EngineError as error:
        raise from_params(error, _NAMES) from error


# ------------------------------------------------------------------------------------------ prompts


def _prompts(fields: Fields, bounds: Bounds) -> tuple[str | tuple[int, ...], ...]:
    value = fields.raw("prompt")
    if isinstance(value, str):
        return (_prompt_text("prompt", value),)
    values = fields.items("prompt", max(bounds.context, MOST_PROMPTS)) or []
    if not values:
        raise invalid(
            "prompt", "prompt must be a string, a list of strings, or token ids; none found"
        )
    if type(values[0]) is int:
        return (check_tokens("prompt", values, bounds.vocab),)
    if len(values) > MOST_PROMPTS:
        raise invalid(
            "prompt", f"prompt must have at most {MOST_PROMPTS} texts, found {len(values):,}"
        )
    return tuple(_prompt(f"prompt[{i}]", one, bounds) for i, one in enumerate(values))


def _prompt(path: str, value: object, bounds: Bounds) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return _prompt_text(path, value)
    if isinstance(value, list) and value:
        return check_tokens(path, value, bounds.vocab)
    raise invalid(path, f"{path} must be a string or a list of token ids")


def _prompt_text(path: str, text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise invalid(path, f"{path} must have at most {MOST_CHARACTERS:,} characters")
    return text


def _messages(fields: Fields) -> tuple[Mapping[str, object], ...]:
    values = fields.items("messages", MOST_MESSAGES) or []
    if not values:
        raise invalid("messages", "messages must be a list of at least one message")
    return tuple(_message(f"messages[{i}]", value) for i, value in enumerate(values))


def _message(path: str, value: object) -> Mapping[str, object]:
    """A message as templates know them: role, content, and what else is text."""
    if not isinstance(value, dict):
        raise invalid(path, f"{path} must be an object with role and content")
    fields = Fields(value, path + ".")
    role = fields.text("role", 100)
    if not role:
        raise invalid(f"{path}.role", f"{path}.role must say whose message it is, such as user")
    if role in ("tool", "function"):
        raise unsupported(f"{path}.role", value=role)
    message: dict[str, object] = {"role": role, "content": _content(fields, role)}
    for name in ("name", "reasoning_content"):
        text = fields.text(name, MOST_CHARACTERS)
        if text is not None:
            message[name] = text
    fields.refuse(_NOT_YET_IN_MESSAGES)
    fields.finish()
    return message


def _content(fields: Fields, role: str) -> str:
    """The text of a message; parts of text are its lines. Only an assistant may have said
    nothing."""
    value = fields.raw("content")
    if isinstance(value, list):
        parts = fields.items("content", MOST_MESSAGES) or []
        return "\n".join(_part(fields.path(f"content[{i}]"), part) for i, part in enumerate(parts))
    text = fields.text("content", MOST_CHARACTERS)
    if text is None and role != "assistant":
        path = fields.path("content")
        raise invalid(
            path, f"{path} is missing: a message of role {role} needs a string or a list of parts"
        )
    return text or ""


def _part(path: str, value: object) -> str:
    fields = Fields(value if isinstance(value, dict) else {}, path + ".")
    kind = fields.text("type", 100)
    if kind != "text":
        if kind in ("image_url", "input_audio", "file", "video_url", "audio_url"):
            raise unsupported(f"{path}.type", "this server takes text", value=kind)
        raise invalid(f"{path}.type", f"{path} must be an object of type text")
    text = fields.text("text", MOST_CHARACTERS)
    if text is None:
        raise invalid(f"{path}.text", f"{path}.text must be a string")
    fields.finish()
    return text


# ----------------------------------------------------------------------------- structured output


_Named = tuple[str, Grammar | None]


def _grammar(fields: Fields) -> tuple[str | None, Grammar | None]:
    """The grammar that an answer is to follow, and the field that says so."""
    named = (
        ("response_format", _response_format(fields)),
        ("structured_outputs", _structured(fields)),
        *_guided(fields, "guided_"),
    )
    found = [(name, grammar) for name, grammar in named if grammar is not None]
    if len(found) > 1:
        raise invalid(
            "response_format", "the answer can follow one of response_format and the guided fields"
        )
    return found[0] if found else (None, None)


def _response_format(fields: Fields) -> Grammar | None:
    form = fields.inner("response_format")
    if form is None:
        return None
    kind = form.one_of("type", ("text", "json_object", "json_schema"))
    grammar = Grammar("json_object") if kind == "json_object" else None
    if kind is None:
        raise invalid("response_format.type", "response_format needs a type")
    if kind == "json_schema":
        named = form.inner("json_schema")
        schema = named.mapping("schema") if named is not None else None
        if named is None or schema is None:
            raise invalid(
                "response_format.json_schema", "response_format.json_schema.schema is missing"
            )
        named.text("name", 1_000)
        named.text("description", 100_000)
        # A schema is always followed to the letter.
        named.flag("strict")
        named.finish()
        grammar = _schema("response_format.json_schema.schema", schema)
    form.finish()
    return grammar


def _structured(fields: Fields) -> Grammar | None:
    inner = fields.inner("structured_outputs")
    if inner is None:
        return None
    found = [grammar for _, grammar in _guided(inner, "") if grammar is not None]
    if inner.flag("json_object"):
        found.append(Grammar("json_object"))
    inner.finish()
    if len(found) != 1:
        raise invalid(
            "structured_outputs",
            "structured_outputs needs one of json, json_object, regex, choice and grammar",
        )
    return found[0]


def _guided(fields: Fields, prefix: str) -> list[_Named]:
    names = (prefix + name for name in ("json", "regex", "grammar", "choice"))
    schema, regex, lark, choice = names
    return [
        (schema, _guided_json(fields, schema)),
        (regex, _guided_text(fields, regex, "regex")),
        (lark, _guided_text(fields, lark, "lark")),
        (choice, _guided_choice(fields, choice)),
    ]


def _guided_json(fields: Fields, name: str) -> Grammar | None:
    if isinstance(fields.raw(name), str):
        text = fields.text(name, MOST_GRAMMAR_BYTES)
        return None if text is None else _made(fields.path(name), "json_schema", text)
    schema = fields.mapping(name)
    return None if schema is None else _schema(fields.path(name), schema)


def _guided_text(fields: Fields, name: str, kind: GrammarKind) -> Grammar | None:
    text = fields.text(name, MOST_GRAMMAR_BYTES)
    return None if text is None else _made(fields.path(name), kind, text)


def _guided_choice(fields: Fields, name: str) -> Grammar | None:
    if not fields.has(name):
        fields.raw(name)
        return None
    words = fields.texts(name, 1_000, 10_000)
    if not words:
        raise invalid(fields.path(name), f"{fields.path(name)} must have at least one text")
    alternatives = " | ".join(json.dumps(word, ensure_ascii=False) for word in words)
    return _made(fields.path(name), "lark", f"start: {alternatives}")


def _schema(path: str, schema: Mapping[str, object]) -> Grammar:
    try:
        text = json.dumps(schema, allow_nan=False)
    except ValueError as error:  # 1e999 is a JSON number, and beyond what a float holds
        raise invalid(path, f"{path} has a number that is too large") from error
    return _made(path, "json_schema", text)


def _made(path: str, kind: GrammarKind, text: str) -> Grammar:
    try:
        return Grammar(kind, text)
    except EngineError as error:
        raise invalid(path, f"{path}: {error}") from error
