"""/v1/completions: texts or token ids to go on from, and prompts to be scored.

Source: OpenAI API reference, "Create completion (legacy)". Scoring harnesses use `echo` with
`logprobs` and max_tokens 0 or 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nybble.engine.request import PromptLogprobs, Request, Token
from nybble.errors import TextError
from nybble.serve.alternatives import (
    CompletionLogprobs,
    Scores,
    Told,
    prompt_logprobs,
    written,
)
from nybble.serve.answering import Prepared, check_size
from nybble.serve.errors import invalid
from nybble.serve.generation import Generation, Step
from nybble.serve.protocol import Bounds, CompletionAsked, read_completion
from nybble.serve.service import Service
from nybble.serve.streaming import Writer, encode, encode_inside, separated, sse, usage


@dataclass(frozen=True, slots=True)
class Echo:
    """What is shown of the prompts: their texts, if they are echoed, of which the first `unseen`
    tokens of each are no part."""

    texts: tuple[str, ...]
    unseen: tuple[int, ...]
    is_scored_only: bool
    has_prompt_logprobs: bool


def prepare_completion(
    service: Service, body: Mapping[str, object], bounds: Bounds
) -> tuple[Prepared, Writer]:
    """Read and tokenize what to go on from. Raises Refusal."""
    completion = read_completion(body, bounds)
    asked = completion.asked
    model = service.check_model(asked.model)
    id = service.new_id("cmpl")
    numbers = range(len(completion.prompts))
    prompts = [_ids(service, completion, i) for i in numbers]
    requests = [Request(f"{id}-{i}", prompts[i], asked.params, asked.priority) for i in numbers]
    echo = Echo(
        tuple(_text(service, p) for p in completion.prompts) if completion.echo else (),
        tuple(_unseen(service, completion, i, prompts[i]) for i in numbers),
        completion.is_scored_only,
        completion.has_prompt_logprobs,
    )
    lists = int(echo.texts != () and asked.params.logprobs is not None) + echo.has_prompt_logprobs
    check_size(
        requests, bounds.context, lists=lists * asked.params.n, echoed=sum(map(len, echo.texts))
    )
    prepared = Prepared(asked, model, id, tuple(requests))
    return prepared, CompletionWriter(service, prepared, echo)


def _text(service: Service, prompt: str | tuple[int, ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    return service.served.tokenizer.decode(prompt, skip_special=False)


def _ids(service: Service, completion: CompletionAsked, number: int) -> tuple[int, ...]:
    prompt = completion.prompts[number]
    path = "prompt" if len(completion.prompts) == 1 else f"prompt[{number}]"
    if not isinstance(prompt, str):
        return service.check_prompt(path, prompt)
    try:
        ids = service.encode(path, prompt, add_special=completion.add_special)
    except TextError as error:
        raise invalid(path, f"{path}: {error}") from error
    return service.check_prompt(path, ids)


def _unseen(
    service: Service, completion: CompletionAsked, number: int, ids: tuple[int, ...]
) -> int:
    """1 if the tokenizer put a token before the text that is not written in it."""
    prompt = completion.prompts[number]
    bos = service.served.tokenizer.bos_id
    if not isinstance(prompt, str) or not completion.add_special or ids[0] != bos:
        return 0
    return 0 if prompt.startswith(service.pieces.text(ids[0])) else 1


class CompletionWriter:
    """Writes the answers to one request's prompts, the choices of each after those of the last."""

    def __init__(self, service: Service, prepared: Prepared, echo: Echo) -> None:
        self._pieces, self._prepared, self._echo = service.pieces, prepared, echo
        self._n, self._most = prepared.asked.params.n, prepared.asked.params.logprobs
        self._head = prepared.head(service, "text_completion")
        start = encode(self._head)[:-1].decode()
        usage = ',"usage":null' if prepared.asked.include_usage else ""
        self._start = f'data: {start}{usage},"choices":[{{"index":'
        choices = range(len(prepared.requests) * self._n)
        self._logprobs = [CompletionLogprobs(service.pieces) for _ in choices]
        tokenizer = service.served.tokenizer
        self._told = [Told(prepared.asked.params, tokenizer) for _ in choices]
        self._unechoed = set(choices) if echo.texts else set()
        # What was written of a prompt, for all of its choices.
        self._prompts: dict[int, tuple[Scores, CompletionLogprobs]] = {}

    def is_long(self, step: Step) -> bool:
        """Whether a step begins with a prompt."""
        return step.index in self._unechoed and (step.token is not None or step.finish != "")

    def chunk(self, step: Step) -> Iterator[bytes]:
        """The prompt before a choice's first token, if it is echoed, then its text, then how it
        ended."""
        index, token = step.index, step.token
        if index in self._unechoed and (token is not None or step.finish):
            self._unechoed.remove(index)
            scores = self._prompt_scores(index, step.scores)
            yield from self._event(index, self._echo.texts[index // self._n], scores)
        if token is not None and not self._echo.is_scored_only:
            scores = self._token_scores(index, [token])
            if token.text or scores:
                yield from self._event(index, token.text, scores)
        if step.finish:
            yield from self._event(index, "", [], self._finish(step.finish))

    def _event(
        self, index: int, text: str, scores: Sequence[Scores], finish: str | None = None
    ) -> Iterator[bytes]:
        yield f'{self._start}{index},"text":{json.dumps(text)},"logprobs":'.encode()
        yield from written(scores) if scores else (b"null",)
        yield f',"finish_reason":{json.dumps(finish)}}}]}}\n\n'.encode()

    def _prompt_scores(self, index: int, found: PromptLogprobs | None) -> list[Scores]:
        """Those of a choice's prompt, if they were asked for; written once for all choices."""
        if found is None or self._most is None:
            return []
        number, own = index // self._n, self._logprobs[index]
        if number not in self._prompts:
            prompt, unseen = self._prepared.requests[number].prompt, self._echo.unseen[number]
            after = CompletionLogprobs(self._pieces)
            self._prompts[number] = after.prompt(prompt, found, self._most, unseen), after
        scores, after = self._prompts[number]
        own.follow(after)
        return [scores]

    def _token_scores(self, index: int, tokens: Sequence[Token]) -> list[Scores]:
        if self._most is None:
            return []
        told = [one for token in tokens for one in self._told[index].push(token)]
        return [self._logprobs[index].tokens(told)] if told else []

    def _finish(self, finish: str) -> str:
        return "length" if self._echo.is_scored_only else finish

    def end(self, generation: Generation) -> bytes:
        """The usage, if it was asked for."""
        if not self._prepared.asked.include_usage:
            return b""
        return sse({**self._head, "choices": [], "usage": self._usage(generation)})

    def _usage(self, generation: Generation) -> dict[str, object]:
        return usage(generation, is_scored_only=self._echo.is_scored_only)

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """All answers in one document."""
        head = {**self._head, "usage": self._usage(generation)}
        yield encode(head)[:-1] + b',"choices":['
        listed = {
            number: b"".join(self._listed(generation, number))
            for number in range(len(generation.requests))
        }
        numbers = range(len(generation.answers))
        yield from separated(
            self._choice(generation, index, listed[index // self._n]) for index in numbers
        )
        yield b"]}"

    def _listed(self, generation: Generation, number: int) -> Iterator[bytes]:
        """A prompt's scores by id, if they were asked for beside the echo."""
        found = generation.prompts[number]
        if self._echo.has_prompt_logprobs and found is not None:
            yield b',"prompt_logprobs":['
            prompt = generation.requests[number].prompt
            yield from encode_inside(prompt_logprobs(prompt, found, self._pieces))
            yield b"]"

    def _choice(self, generation: Generation, index: int, listed: bytes) -> Iterator[bytes]:
        answer, number = generation.answers[index], index // self._n
        text, scores = "", list[Scores]()
        if self._echo.texts:
            text = self._echo.texts[number]
            scores = self._prompt_scores(index, generation.prompts[number])
        if not self._echo.is_scored_only:
            text += "".join(answer.text)
            scores = scores + self._token_scores(index, answer.tokens)
        finish = self._finish(answer.finish)
        choice = {"index": index, "text": text, "finish_reason": finish}
        yield encode(choice)[:-1] + b',"logprobs":'
        yield from written(scores) if self._most is not None else (b"null",)
        yield listed
        yield b"}"
