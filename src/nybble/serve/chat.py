"""/v1/chat/completions: a conversation becomes a prompt by the model's template, tokens become the
message's content.

Where reasoning and tool calls will be told apart from content: `ChatWriter._delta`.

Source: OpenAI API reference, "Create chat completion", "The chat completion chunk object".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nybble.engine.request import Request
from nybble.errors import TextError
from nybble.serve.alternatives import Told, chat_logprobs, prompt_logprobs
from nybble.serve.answering import Prepared, check_size
from nybble.serve.errors import Refusal, invalid
from nybble.serve.generation import Generation, Step
from nybble.serve.protocol import Bounds, ChatAsked, read_chat
from nybble.serve.service import RENDER_S, Service
from nybble.serve.streaming import Writer, encode, encode_inside, separated, sse, usage
from nybble.text.chat import ChatTemplate, TemplateError


def prepare_chat(
    service: Service, body: Mapping[str, object], bounds: Bounds
) -> tuple[Prepared, Writer]:
    """Read, render and tokenize a chat. Raises Refusal."""
    chat = read_chat(body, bounds)
    model = service.check_model(chat.asked.model)
    text = render(service, chat)
    try:
        ids = service.encode("messages", text, add_special=chat.add_special)
    except TextError as error:
        raise invalid("messages", f"messages: {error}") from error
    id = service.new_id("chatcmpl")
    request = Request(
        id, service.check_prompt("messages", ids), chat.asked.params, chat.asked.priority
    )
    check_size((request,), bounds.context, lists=1)
    prepared = Prepared(chat.asked, model, id, (request,))
    return prepared, ChatWriter(service, prepared)


def render(service: Service, chat: ChatAsked) -> str:
    """The prompt of a conversation. Raises Refusal for what the template refuses or lacks."""
    template = service.served.template
    if template is None:
        raise invalid(
            "messages",
            "this model has no chat template, so a conversation has no form; "
            "/v1/completions continues a text",
        )
    unknown = sorted(chat.switches.keys() - service.switches)
    if unknown:
        known = ", ".join(sorted(service.switches)) or "none"
        raise invalid(
            "chat_template_kwargs",
            f"chat_template_kwargs: this model's template has no {unknown[0][:100]!r}; it has "
            f"{known}",
        )
    switches: dict[str, Any] = dict(chat.switches)
    try:
        return template.render(
            chat.messages,
            add_generation_prompt=chat.add_generation_prompt,
            time_limit_s=RENDER_S,
            **switches,
        )
    except TemplateError as error:
        raise _refused(template, chat, error) from error
    except TextError as error:
        raise invalid("messages", str(error)) from error


def _refused(template: ChatTemplate, chat: ChatAsked, error: TemplateError) -> Refusal:
    """Why a conversation has no form. OpenAI's newer clients call the system developer, and most
    templates know the older name alone."""
    roles = [message["role"] for message in chat.messages]
    is_known = "developer" in template.source or "system" not in template.source
    if is_known or "developer" not in roles:
        return invalid("messages", error.reason)
    path = f"messages[{roles.index('developer')}].role"
    return invalid(
        path, f"{path}: this model's chat template knows no role developer; send it as system"
    )


class ChatWriter:
    """Writes the answer to one chat."""

    def __init__(self, service: Service, prepared: Prepared) -> None:
        self._service, self._prepared = service, prepared
        self._has_logprobs = prepared.asked.params.logprobs is not None
        self._head = prepared.head(service, "chat.completion.chunk")
        # Nearly all chunks differ in the text alone, so the rest of them is written once.
        start = encode(self._head)[:-1].decode()
        usage = ',"usage":null' if prepared.asked.include_usage else ""
        self._starts = [
            f'data: {start}{usage},"choices":[{{"index":{i},"delta":'
            for i in range(prepared.asked.params.n)
        ]
        self._begun: set[int] = set()
        tokenizer = service.served.tokenizer
        self._told = [Told(prepared.asked.params, tokenizer) for _ in self._starts]

    def is_long(self, step: Step) -> bool:
        """Never: prompts are not scored in a stream."""
        return False

    def chunk(self, step: Step) -> Iterable[bytes]:
        """The role before a choice's first token, then its text, then how it ended."""
        out = ""
        start = self._starts[step.index]
        if step.index not in self._begun:
            self._begun.add(step.index)
            out += (
                start
                + '{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
            )
        token = step.token
        told = self._told[step.index].push(token) if token and self._has_logprobs else []
        if token is not None and (token.text or told):
            logprobs = "null"
            if told:
                content = list(chat_logprobs(told, self._service.pieces))
                logprobs = json.dumps({"content": content, "refusal": None})
            delta = self._delta(token.text)
            out += f'{start}{delta},"logprobs":{logprobs},"finish_reason":null}}]}}\n\n'
        if step.finish:
            finish = json.dumps(step.finish)
            out += f'{start}{{}},"logprobs":null,"finish_reason":{finish}}}]}}\n\n'
        return (out.encode(),)

    def _delta(self, text: str) -> str:
        return f'{{"content":{json.dumps(text)}}}'

    def end(self, generation: Generation) -> bytes:
        """The usage, if it was asked for."""
        if not self._prepared.asked.include_usage:
            return b""
        return sse({**self._head, "choices": [], "usage": usage(generation)})

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """The answer in one document."""
        head = {**self._head, "object": "chat.completion", "usage": usage(generation)}
        yield encode(head)[:-1] + b',"choices":['
        numbers = range(len(generation.answers))
        yield from separated(self._choice(generation, i) for i in numbers)
        yield b"]"
        scores = generation.prompts[0]
        if scores is not None:
            prompt = generation.requests[0].prompt
            yield b',"prompt_logprobs":['
            yield from encode_inside(prompt_logprobs(prompt, scores, self._service.pieces))
            yield b"]"
        yield b"}"

    def _choice(self, generation: Generation, index: int) -> Iterator[bytes]:
        answer = generation.answers[index]
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.text), "refusal": None},
            "finish_reason": answer.finish,
        }
        yield encode(choice)[:-1] + b',"logprobs":'
        if not self._has_logprobs:
            yield b"null}"
            return
        yield b'{"refusal":null,"content":['
        push = self._told[index].push
        told = (one for token in answer.tokens for one in push(token))
        yield from encode_inside(chat_logprobs(told, self._service.pieces))
        yield b"]}}"
