"""`nybble generate`: prompts become text, from any checkpoint that loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.extras import needs_torch
from nybble.errors import TextError
from nybble.kernels.dispatch import choose, default_threads

if TYPE_CHECKING:
    from nybble.api.completion import Choice, Completion
    from nybble.api.llm import OpenOptions
    from nybble.engine.request import PromptLogprobs, SamplingParams, Token
    from nybble.text.chat import ChatTemplate


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated from some prompts, and how fast.

    `prompts` are the texts that the model read, templates included; `text`, `tokens` and `finish`
    are those of the first. `seconds` is all of it, without opening the checkpoint.
    """

    prompts: tuple[str, ...]
    completions: tuple[Completion, ...]
    seconds: float
    kernels: str
    threads: int

    @property
    def text(self) -> str:
        """The text of the first prompt's first choice. Raises EngineError if it failed."""
        return self.completions[0].text

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its token ids."""
        return self.completions[0].tokens

    @property
    def finish(self) -> str:
        """How it ended."""
        return self.completions[0].finish

    @property
    def prefill_s(self) -> float:
        """What the first prompt took until its first token, once it was its turn."""
        return self.completions[0].usage.prefill_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens each second: after the first for one prompt, of all for several."""
        if len(self.completions) == 1:
            return self.completions[0].usage.tokens_per_s
        made = sum(c.usage.tokens for c in self.completions)
        return made / self.seconds if self.seconds > 0 else 0.0

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.generate/1`: one prompt's fields, or several in a list."""
        head: dict[str, object] = {"schema": "nybble.generate/1"}
        each = [_entry(p, c) for p, c in zip(self.prompts, self.completions, strict=True)]
        if len(each) == 1:
            usage = self.completions[0].usage
            head |= each[0] | {
                "prefill_seconds": usage.prefill_s,
                "decode_seconds": usage.seconds - usage.first_token_s,
            }
        else:
            head |= {"completions": each, "seconds": self.seconds}
        return head | {
            "tokens_per_second": self.tokens_per_s,
            "kernels": self.kernels,
            "threads": self.threads,
        }


def _entry(prompt: str, completion: Completion) -> dict[str, object]:
    choices = [_choice(choice) for choice in completion.choices]
    found: dict[str, object] = {
        "prompt": prompt,
        "prompt_tokens": completion.usage.prompt_tokens,
        "cached_tokens": completion.usage.cached_tokens,
        "drafted_tokens": completion.usage.drafted,
        "accepted_tokens": completion.usage.accepted,
        **choices[0],
    }
    if len(choices) > 1:
        found["choices"] = choices
    if completion.prompt_logprobs is not None:
        found["prompt_logprobs"] = _prompt_logprobs(completion.prompt_logprobs)
    return found


def _choice(choice: Choice) -> dict[str, object]:
    found: dict[str, object] = {
        "text": choice.text,
        "tokens": list(choice.tokens),
        "logprobs": list(choice.logprobs),
        "finish_reason": choice.finish,
    }
    if any(choice.top):
        found["top_logprobs"] = [[[a.token, a.logprob] for a in top] for top in choice.top]
    if choice.error:
        found["error"] = choice.error
    return found


def _prompt_logprobs(prompt: PromptLogprobs) -> dict[str, object]:
    return {
        "logprobs": list(prompt.logprobs),
        "top_logprobs": [[[a.token, a.logprob] for a in top] for top in prompt.top],
    }


def generate(
    model: str | PathLike[str],
    prompts: str | Sequence[str],
    params: SamplingParams | None = None,
    *,
    raw: bool = False,
    system: str | None = None,
    options: OpenOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Generate from a local checkpoint folder, which is opened for this alone; see `LLM`.

    A prompt is a user's message where the folder has a chat template, unless `raw`; `system` goes
    before it. `on_text` is called with every piece of text of the first prompt's first choice.
    Raises MissingExtra without torch, TextError for a prompt or template that cannot be used, and
    what `LLM` raises.
    """
    needs_torch("generate")
    from dataclasses import asdict

    from nybble.api.llm import LLM, OpenOptions

    def show(prompt: int, choice: int, token: Token) -> None:
        if on_text is not None and token.text and (prompt, choice) == (0, 0):
            on_text(token.text)

    listed = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not listed:
        raise TextError("there is no prompt to go on from")
    options = options or OpenOptions()
    template = None if raw else _template(Path(model), system)
    with LLM(model, **asdict(options)) as llm:
        texts = tuple(p if template is None else _render(template, p, system) for p in listed)
        # A template writes its special tokens itself.
        ids = [llm.tokenizer.encode(text, add_special=template is None) for text in texts]
        began = time.perf_counter()
        completions = llm.generate(ids, params, on_token=show)
        ended = time.perf_counter()
    threads = options.threads or default_threads()
    return Generation(texts, tuple(completions), ended - began, str(choose()), threads)


def _template(folder: Path, system: str | None) -> ChatTemplate | None:
    from nybble.text.chat import ChatTemplate

    template = ChatTemplate.open(folder)
    if template is None and system is not None:
        raise TextError(
            f"{folder}: has no chat template, so a system message has no place; put it into the "
            "prompt"
        )
    return template


def _render(template: ChatTemplate, prompt: str, system: str | None) -> str:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return template.render([*messages, {"role": "user", "content": prompt}])
