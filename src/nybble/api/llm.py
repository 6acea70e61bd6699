"""A checkpoint that answers: `LLM(folder).generate([...])`.

Requests of all threads go through one engine, in one loop of its own; here prompts become token
ids, and events become completions.
"""

from __future__ import annotations

import itertools
import logging
import operator
import queue
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import closing
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nybble.api.completion import Answer, Completion, Usage
from nybble.api.messages import check_messages
from nybble.api.opening import CacheDtype, DraftSource
from nybble.api.opening import OpenOptions as OpenOptions
from nybble.api.opening import open_engine as open_engine
from nybble.engine.request import Event, Request, SamplingParams, Token
from nybble.errors import EngineError, NybbleError, TextError
from nybble.kernels.compute import Precision
from nybble.text.chat import ChatTemplate
from nybble.text.generation_config import sampling_defaults

if TYPE_CHECKING:
    from nybble.engine.limits import EngineStats
    from nybble.engine.loop import EngineLoop

log = logging.getLogger("nybble")

#: Choices that may wait: an LLM's callers are few and wait for what they asked.
MOST_WAITING = 1 << 20
#: Requests of one call that the engine has at a time; each costs memory from when it is submitted.
MOST_SUBMITTED = 256
Prompt = str | Sequence[int]
#: Called with the number of the prompt, that of the choice, and the token.
OnToken = Callable[[int, int, Token], None]


class LLM:
    """A local checkpoint, quantized or not, ready to generate.

        with LLM("folder", memory=8) as llm:
            for done in llm.generate(["Once upon", "The sea"], SamplingParams(max_tokens=64)):
                print(done.text)

    Options are those of `OpenOptions`. Threads may share one: their requests run side by side.
    Greedy and seeded results do not depend on what else runs, and with `exact` not on what ran
    before. `close` it, or use it in a `with`.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        memory: float | None = None,
        kv_cache_dtype: CacheDtype = "auto",
        max_sequences: int = 32,
        max_batched_tokens: int = 1024,
        max_context: int | None = None,
        precision: Precision = "bf16",
        threads: int | None = None,
        prefix_cache: bool = True,
        exact: bool = False,
        draft: DraftSource = "auto",
        draft_tokens: int | None = None,
        snapshot_memory: float | None = None,
    ) -> None:
        """Raises what `open_engine` raises."""
        options = OpenOptions(
            memory,
            kv_cache_dtype,
            max_sequences,
            max_batched_tokens,
            max_context,
            precision,
            threads,
            prefix_cache,
            exact,
            draft,
            draft_tokens,
            snapshot_memory,
        )
        engine = open_engine(folder, options)
        from nybble.engine.loop import EngineLoop

        self.folder, self.options = Path(folder), options
        self.limits, self.tokenizer = engine.limits, engine.tokenizer
        self._numbers = itertools.count()
        self._loop: EngineLoop | None = EngineLoop(engine, MOST_WAITING)
        # The thread must have ended before the interpreter goes away.
        self._stop = weakref.finalize(self, self._loop.stop)

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its continuation: the model's, or what the pages hold."""
        return self.limits.room

    @property
    def stats(self) -> EngineStats:
        """What the engine does now, and has done."""
        return self._running().stats

    @cached_property
    def default_params(self) -> SamplingParams:
        """What the folder's generation_config.json recommends; greedy where it says nothing.

        Raises TextError for a file that says what cannot be.
        """
        try:
            return SamplingParams(**sampling_defaults(self.folder))  # type: ignore[arg-type]
        except EngineError as error:
            raise TextError(f"{self.folder / 'generation_config.json'}: {error}") from error

    @cached_property
    def _template(self) -> ChatTemplate:
        found = ChatTemplate.open(self.folder)
        if found is None:
            raise TextError(
                f"{self.folder}: has no chat template, so a conversation has no form; generate "
                "from a text instead (`nybble generate CKPT PROMPT`)"
            )
        return found

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Continue one prompt or many; a completion for each, in their order.

        A prompt is a text, taken as it is, or a list of token ids. `params` are one for all, or one
        for each; None is greedy. `on_token` is called with every token as it comes. Raises, before
        anything runs, TextError and EngineError for a prompt that cannot run (ContextTooLong for
        one too long). What fails later fails alone: see Completion. Ctrl-C cancels all of them.
        """
        listed = _listed(prompts)
        each = _for_each(params, len(listed))
        requests = [
            self._request(prompt, own, f"prompt {i}: " if len(listed) > 1 else "")
            for i, (prompt, own) in enumerate(zip(listed, each, strict=True))
        ]
        answers = [Answer(request, i) for i, request in enumerate(requests)]
        with closing(self._events(answers)) as events:
            for answer, event in events:
                if on_token is not None and event.token is not None:
                    on_token(answer.number, event.choice, event.token)
        return [answer.completion() for answer in answers]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[Token, None, None]:
        """The tokens that continue a prompt, as they come; leaving the iterator cancels the rest.

        Raises what `generate` raises, at once, and EngineError where it comes to that.
        """
        return _only_tokens(self.stream_with_usage(prompt, params))

    def stream_with_usage(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[tuple[Token, Usage], None, None]:
        """`stream`, and with each token what the request took until the engine had made it."""
        [own] = _for_each(params, 1)
        if own.n != 1:
            raise EngineError(f"a stream has one choice, found n = {own.n}; use generate")
        return self._stream(self._request(prompt, own, ""))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The text of a conversation up to where the answer begins, by the folder's chat template.

        `variables` are the template's, such as enable_thinking. Raises TextError, also for a
        message that is not one: a mapping with a `role`, and a `content` that is a text, None, or
        a list of parts of type text.
        """
        checked = check_messages(messages)
        return self._template.render(checked, tools=tools, **(variables or {}))  # type: ignore[arg-type]

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
        on_token: OnToken | None = None,
    ) -> Completion:
        """Answer a conversation; None for `params` is what the model's publisher recommends.

        Raises TextError for a folder without a chat template, for messages that are none (see
        `render`) and for what the template refuses.
        """
        text = self.render(messages, tools=tools, variables=variables)
        params = self.default_params if params is None else params
        return self.generate(self.encode(text), params, on_token=on_token)[0]

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation, whose template wrote the special tokens itself."""
        return self.tokenizer.encode(rendered, add_special=False)

    def close(self) -> None:
        """Cancel what still runs and give the memory back. May be called twice."""
        self._stop()
        self._loop = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------- one request

    def _request(self, prompt: Prompt, params: SamplingParams, where: str) -> Request:
        try:
            if isinstance(prompt, str):
                ids = self.tokenizer.encode(prompt, add_special=True)
            else:
                ids = _token_ids(prompt)
            request = Request(f"llm-{next(self._numbers)}", tuple(ids), params)
            self.limits.validate(request)
        except NybbleError as error:
            raise type(error)(f"{where}{error}") from error
        return request

    def _stream(self, request: Request) -> Generator[tuple[Token, Usage], None, None]:
        answer = Answer(request, 0)
        with closing(self._events([answer])) as events:
            for _, event in events:
                if event.token is not None:
                    yield event.token, answer.usage
                if answer.errors[0]:
                    raise EngineError(answer.errors[0])

    def _events(self, answers: Sequence[Answer]) -> Generator[tuple[Answer, Event], None, None]:
        """Submit, and yield what comes until all are done; those that are not are cancelled."""
        loop = self._running()
        inbox: queue.SimpleQueue[tuple[Event, float]] = queue.SimpleQueue()

        def receive(event: Event) -> None:
            """In the engine's thread: who reads the events late does not change their time."""
            inbox.put((event, time.perf_counter()))

        waiting, running = deque(answers), dict[str, Answer]()
        try:
            while waiting or running:
                while waiting and len(running) < MOST_SUBMITTED:
                    answer = waiting.popleft()
                    running[answer.request.id] = answer
                    loop.submit(answer.request, receive)
                event, made = inbox.get()
                answer = running[event.request]
                answer.take(event, made)
                _tell(answer.request, event)
                if answer.is_done:
                    del running[event.request]
                yield answer, event
        finally:
            for identity in running:
                loop.cancel(identity)

    def _running(self) -> EngineLoop:
        if self._loop is None:
            raise EngineError("this LLM was closed; make another")
        return self._loop


def _tell(request: Request, event: Event) -> None:
    """Why the cache did not have more of a prompt."""
    if event.missed:
        log.info(
            "%s, choice %d: %d of %d tokens of the prompt came from the cache: %s",
            *(request.id, event.choice, event.cached or 0, len(request.prompt), event.missed),
        )


def _only_tokens(
    stream: Generator[tuple[Token, Usage], None, None],
) -> Generator[Token, None, None]:
    with closing(stream):
        for token, _ in stream:
            yield token


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, a text or numbers, or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    items = _items("prompts", prompts)
    if items and _is_number(items[0]):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _is_number(item: object) -> bool:
    """Also a number of an array, which itself has an __index__ too."""
    return isinstance(item, float) or (hasattr(item, "__index__") and not getattr(item, "shape", 0))


def _items(what: str, given: object) -> list[object]:
    """What a list or an array holds. Raises EngineError for what has no order, or none."""
    if not isinstance(given, (bytes, bytearray, Mapping, Set)):
        try:
            return list(given)  # type: ignore[call-overload, no-any-return]
        except TypeError:
            pass
    hint = "; a conversation is for chat" if isinstance(given, Mapping) else ""
    raise EngineError(
        f"{what}: expected a text or a list of token ids, found a {type(given).__name__}{hint}"
    )


def _token_ids(prompt: object) -> list[int]:
    found = []
    for token in _items("the prompt", prompt):
        try:
            found.append(operator.index(token))  # type: ignore[arg-type]
        except TypeError:
            raise EngineError(f"the prompt: expected token ids, found {token!r}") from None
        if isinstance(token, bool):
            raise EngineError(f"the prompt: expected token ids, found {token!r}")
    return found


def _for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)):
        raise EngineError(f"params: expected SamplingParams, found a {type(params).__name__}")
    if len(params) != count:
        raise EngineError(f"{count} prompts and {len(params)} params; give one, or one for each")
    for i, own in enumerate(params):
        if not isinstance(own, SamplingParams):
            raise EngineError(f"params[{i}]: expected SamplingParams, found a {type(own).__name__}")
    return params
